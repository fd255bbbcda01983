/* index.c - a hash table from names (byte strings) to the numbers of the caller's entries.
 *
 * It uses open addressing with linear probing. The number of places is a power of two and at least twice the number
 * of names. The hash is the 64-bit FNV-1a (Fowler, Noll, Vo), which reads one byte at a time. So prefixes_next()
 * computes the hashes of all prefixes of a text with one multiplication each. The lower bits of hash ^ hash >> 32
 * choose the place.
 *
 * Names from an untrusted file can be chosen so that all of them hash to one place, which would make n names cost n^2
 * comparisons. So a name that is not placed after MAX_PROBES comparisons is not added, and the index is `crowded`.
 * Names that nobody chose to collide stay far below that: in a table that is half full, the longest run of taken
 * places is about 5 log(n), 100 for a billion names. */
#include "engine/engine.h"

#include <string.h>

enum { MAX_PROBES = 256 };

static const uint64_t HASH_START = 14695981039346656037u;

static uint64_t hash_next(uint64_t hash, uint8_t byte) { return (hash ^ byte) * 1099511628211u; }

static uint64_t hash_name(Bytes name) {
    uint64_t hash = HASH_START;
    for (size_t i = 0; i < name.size; i++) hash = hash_next(hash, name.data[i]);
    return hash;
}

Index index_new(size_t count, const void *names, size_t stride) {
    size_t places = 16;
    while (places < 2 * count) places *= 2;
    Index index = {.places = allocate(places * sizeof(int32_t)), .mask = places - 1, .names = names, .stride = stride};
    memset(index.places, 0xff, places * sizeof(int32_t));
    return index;
}

static Bytes name_of(const Index *index, int32_t entry) {
    const void *bytes = (const char *)index->names + (size_t)entry * index->stride;
    return *(const Bytes *)bytes;
}

/* The place that holds the name, or the free place where it belongs; NULL if neither is near. */
static int32_t *find_place(const Index *index, Bytes name, uint64_t hash) {
    size_t first = hash ^ hash >> 32;
    for (size_t p = first; p < first + MAX_PROBES; p++) {
        int32_t *place = &index->places[p & index->mask];
        if (*place < 0) return place;
        Bytes other = name_of(index, *place);
        if (other.size == name.size && !memcmp(other.data, name.data, name.size)) return place;
    }
    return NULL;
}

static int32_t find(const Index *index, Bytes name, uint64_t hash) {
    const int32_t *place = find_place(index, name, hash);
    return place ? *place : -1;
}

int32_t index_find(const Index *index, Bytes name) { return find(index, name, hash_name(name)); }

int32_t index_add(Index *index, int32_t entry) {
    Bytes name = name_of(index, entry);
    int32_t *place = find_place(index, name, hash_name(name)), old = place ? *place : -1;
    if (place) *place = entry;
    else index->crowded = true;
    index->longest = larger_size(index->longest, name.size);
    return old;
}

Prefixes index_prefixes(const Index *index, Bytes text) {
    if (text.size > index->longest) text.size = index->longest;
    return (Prefixes){index, text, 0, HASH_START};
}

int32_t prefixes_next(Prefixes *walk) {
    while (walk->size < walk->text.size) {
        walk->hash = hash_next(walk->hash, walk->text.data[walk->size++]);
        int32_t entry = find(walk->index, (Bytes){walk->text.data, walk->size}, walk->hash);
        if (entry >= 0) return entry;
    }
    return -1;
}

int32_t index_longest(const Index *index, Bytes text, size_t *size) {
    int32_t best = -1;
    Prefixes walk = index_prefixes(index, text);
    *size = 0;
    for (int32_t entry; (entry = prefixes_next(&walk)) >= 0; best = entry) *size = walk.size;
    return best;
}
