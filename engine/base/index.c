/* index.c - names to numbers: open addressing in a table that is at most half full.
 *
 * The hash is FNV-1a, which grows byte by byte: whoever walks along a text has the hash of each prefix for
 * one more multiplication. Its upper half is folded into the lower, which alone chooses the place. */
#include "engine/engine.h"

#include <string.h>

uint64_t hash_next(uint64_t hash, uint8_t byte) {
    return (hash ^ byte) * 1099511628211u;
}

static uint64_t hash_name(Bytes name) {
    uint64_t hash = HASH_START;
    for (size_t i = 0; i < name.size; i++) hash = hash_next(hash, name.data[i]);
    return hash;
}

Index index_new(size_t count, const void *names, size_t stride) {
    size_t places = 16;
    while (places < 2 * count) places *= 2;
    Index index = {allocate(places * sizeof(int32_t)), places - 1, names, stride};
    memset(index.places, 0xff, places * sizeof(int32_t));
    return index;
}

int32_t *index_hashed(const Index *index, Bytes name, uint64_t hash) {
    for (size_t p = hash ^ hash >> 32;; p++) {
        int32_t *place = &index->places[p & index->mask];
        if (*place < 0) return place;
        const void *entry = (const char *)index->names + (size_t)*place * index->stride;
        const Bytes *other = entry;
        if (other->size == name.size && !memcmp(other->data, name.data, name.size)) return place;
    }
}

int32_t *index_place(const Index *index, Bytes name) {
    return index_hashed(index, name, hash_name(name));
}
