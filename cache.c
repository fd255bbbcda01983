/* cache.c - what earlier chunks left to look back at: the keys and values of their frames in every block.
 *
 * A clip is made chunk by chunk. The frames of a chunk see each other and the frames before them, never one after;
 * so what a frame shows to later ones, its key and its value in each block, is computed once and kept. A window says
 * how many frames a chunk sees, itself counted in, and a sink how many of the clip's first are never dropped. With
 * window 9, sink 1 and chunks of 3 the fifth chunk (frames 12 to 14) sees
 *
 *   clip       0   1   2   3   4   5   6   7   8   9  10  11 [12  13  14]
 *   held       0                           7   8   9  10  11
 *   absolute   0                           7   8   9  10  11  12  13  14
 *   relative   0                           1   2   3   4   5   6   7   8
 *
 * The last two lines are the times that RoPE turns keys and queries by. Keys are held as they were before it and
 * turned when they are read: a held frame may then have another position in every pass, and where it has the same,
 * float32 gives the bits of turning it once.
 *
 * A chunk passes the transformer several times, once for every step while it is noise, and a last time when it is
 * finished. Every pass writes its keys behind the frames that are held, over those of the pass before; only after
 * the last are they held, too (kv_cache_keep). */
#include "sora.h"

#include <string.h>

static size_t frame_size(const KvCache *c) { return (size_t)c->tokens * c->D; } /* elements in one block */

/* Where frame j of a block lies in keys, or in values. */
static char *frame_at(const KvCache *c, char *of, int block, int j) {
    return of + type_bytes(c->type, ((size_t)block * c->capacity + j) * frame_size(c));
}

KvCache kv_cache_take(Arena *arena, const Transformer *t, Window window, int capacity, int tokens, Type type) {
    KvCache c = {.window = window, .layers = t->num_layers, .tokens = tokens, .D = t->dim, .capacity = capacity, .type = type};
    size_t bytes = type_bytes(type, (size_t)c.layers * capacity * frame_size(&c));
    c.frame_numbers = arena_take(arena, sizeof(int) * (size_t)capacity);
    c.keys = arena_take(arena, bytes);
    c.values = arena_take(arena, bytes);
    return c;
}

void kv_cache_drop(KvCache *c, int from, int count) {
    int rest = c->frames - from - count;
    size_t bytes = type_bytes(c->type, (size_t)rest * frame_size(c));
    for (int i = 0; i < c->layers; i++) {
        memmove(frame_at(c, c->keys, i, from), frame_at(c, c->keys, i, from + count), bytes);
        memmove(frame_at(c, c->values, i, from), frame_at(c, c->values, i, from + count), bytes);
    }
    memmove(c->frame_numbers + from, c->frame_numbers + from + count, sizeof(int) * (size_t)rest);
    c->frames -= count;
}

void kv_cache_make_room(KvCache *c, int frames) {
    int excess = c->frames + frames - c->capacity;
    if (c->frames && excess > 0) kv_cache_drop(c, c->window.sink, excess);
}

static void widen(float *out, const void *in, Type type, size_t n) {
    if (type == TYPE_BF16) kernels->from_bf16(out, in, n);
    else memcpy(out, in, n * sizeof(float));
}

static void narrow(void *out, const float *in, Type type, size_t n) {
    if (type == TYPE_BF16) kernels->to_bf16(out, in, n);
    else memcpy(out, in, n * sizeof(float));
}

void kv_cache_read(const KvCache *c, int block, float *keys, float *values) {
    PARALLEL_FOR (int j = 0; j < c->frames; j++) {
        widen(keys + j * frame_size(c), frame_at(c, c->keys, block, j), c->type, frame_size(c));
        widen(values + j * frame_size(c), frame_at(c, c->values, block, j), c->type, frame_size(c));
    }
}

void kv_cache_write(KvCache *c, int block, const float *keys, const float *values, int frames) {
    if (!c->capacity) return;
    PARALLEL_FOR (int f = 0; f < frames; f++) {
        narrow(frame_at(c, c->keys, block, c->frames + f), keys + f * frame_size(c), c->type, frame_size(c));
        narrow(frame_at(c, c->values, block, c->frames + f), values + f * frame_size(c), c->type, frame_size(c));
    }
}

void kv_cache_keep(KvCache *c, const Chunk *chunk) {
    for (int f = 0; f < chunk->frames; f++) c->frame_numbers[c->frames++] = chunk->first + f;
}

int kv_cache_position(const KvCache *c, const Chunk *chunk, int j) {
    if (c->window.relative) return j;
    return j < c->frames ? c->frame_numbers[j] : chunk->first + j - c->frames;
}
