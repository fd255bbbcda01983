/* cache.c - keys and values of earlier frames, which self attention reads (KV cache).
 *
 * A model that generates in chunks is causal: a frame attends to its own chunk and to earlier frames, never to later
 * ones. So the keys and values of a finished frame do not change, and each block's are stored:
 *
 *   keys, values: (layers, capacity, tokens, D), oldest frame first
 *
 * A Window limits how many frames a chunk sees. `size` counts them all, the chunk included; the first `sink` frames of
 * the clip are never dropped. With size 9, sink 1 and chunks of 3, the fifth chunk (frames 12 to 14) sees
 *
 *   frames of the clip    0   1   2   3   4   5   6   7   8   9  10  11 [12  13  14]
 *   kept in the cache     0                           7   8   9  10  11
 *   absolute positions    0                           7   8   9  10  11  12  13  14
 *   relative positions    0                           1   2   3   4   5   6   7   8
 *
 * RoPE rotates keys and queries by these positions. Keys are stored before RoPE and rotated in every pass, because a
 * frame's relative position changes. For absolute positions this gives the same bits as rotating once (in float32).
 *
 * A chunk passes through the transformer once for each step, and once more when its latents are finished. Each pass
 * writes its keys and values behind the kept frames, over those of the pass before. Only after the last pass does
 * kv_cache_keep() keep them:
 *
 *   [ kept frames | of the current pass | free ]
 *
 * Follows the caches of Self-Forcing (absolute positions), LongLive (sink) and Infinity-RoPE (relative positions). */
#include "sora.h"

#include <limits.h>
#include <string.h>

static size_t frame_size(const KvCache *c) { return (size_t)c->tokens * c->D; } /* elements in one block */

/* Address of frame j of a block in keys or values. */
static char *frame_at(const KvCache *c, char *of, int block, int j) {
    return of + type_bytes(c->type, ((size_t)block * c->capacity + j) * frame_size(c));
}

KvCache kv_cache_take(Arena *arena, const Transformer *t, Window window, int capacity, int tokens, Type type) {
    KvCache c = {.window = window, .layers = t->num_layers, .tokens = tokens, .D = t->dim, .capacity = capacity,
                 .type = type};
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

void kv_cache_state(KvCache *c, StateFile *f) {
    int *numbers = c->frame_numbers;
    c->frames = (int)state_number(f, "cache.frames", c->frames, 0, c->capacity);
    for (int j = 0; j < c->frames; j++)
        numbers[j] = (int)state_number(f, "cache.frame_number", numbers[j], 0, INT_MAX / 2);
    size_t bytes = type_bytes(c->type, c->frames * frame_size(c));
    for (int i = 0; c->frames && i < c->layers; i++) {
        state_item(f, "cache.keys", frame_at(c, c->keys, i, 0), bytes);
        state_item(f, "cache.values", frame_at(c, c->values, i, 0), bytes);
    }
}
