/* gguf_builder.h - builds GGUF files in memory, valid or damaged, for tests and fuzzing. */
#ifndef GGUF_BUILDER_H
#define GGUF_BUILDER_H

#include <stdint.h>
#include <string.h>

typedef struct {
    uint8_t data[16384];
    size_t size;
} Builder;

static inline void put(Builder *b, const void *bytes, size_t n) {
    memcpy(b->data + b->size, bytes, n);
    b->size += n;
}

static inline void put_u32(Builder *b, uint32_t value) {
    put(b, &value, sizeof value);
}

static inline void put_u64(Builder *b, uint64_t value) {
    put(b, &value, sizeof value);
}

static inline void put_string(Builder *b, const char *text) {
    put_u64(b, strlen(text));
    put(b, text, strlen(text));
}

static inline void put_header(Builder *b, uint64_t tensors, uint64_t keys) {
    b->size = 0;
    put(b, "GGUF", 4);
    put_u32(b, 3);
    put_u64(b, tensors);
    put_u64(b, keys);
}

/* A key with a single value: the lowest `bytes` bytes of `bits`. */
static inline void put_key(Builder *b, const char *name, uint32_t type, uint64_t bits, size_t bytes) {
    put_string(b, name);
    put_u32(b, type);
    put(b, &bits, bytes);
}

/* The name and header of an array; the elements follow. */
static inline void put_array(Builder *b, const char *name, uint32_t type, uint64_t count) {
    put_string(b, name);
    put_u32(b, 9);
    put_u32(b, type);
    put_u64(b, count);
}

/* A tensor of shape (rows, cols). The format puts the innermost size first. */
static inline void put_tensor(Builder *b, const char *name, uint64_t cols, uint64_t rows, uint32_t type,
                              uint64_t offset) {
    put_string(b, name);
    put_u32(b, 2);
    put_u64(b, cols);
    put_u64(b, rows);
    put_u32(b, type);
    put_u64(b, offset);
}

static inline void put_padding(Builder *b) {
    while (b->size % 32) b->data[b->size++] = 0;
}

#endif
