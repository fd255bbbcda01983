/* product.c - y = x @ w^T + b, the operation in which nearly all time goes: linear layers and convolutions.
 *
 * The specification is three loops:
 *
 *   for each row r of x, for each output o:
 *       sum = 0;  for k in 0..K-1:  sum = fma(x[r][k], w[o][k], sum);   y[r][o] = sum + b[o]
 *
 * This file computes exactly that, in another order of (r, o) and with k cut in pieces, which changes no bit: a
 * product's sum is one chain over k, and a chain may stop in memory and go on. The plan is that of BLIS (Van Zee and
 * van de Geijn, 2015):
 *
 *   - w is packed into panels of C outputs, transposed and widened to floats: panel[k][j] = w[o+j][k]. A group of
 *     panels that fits a budget is packed by all threads, then used by all threads.
 *   - a task is a block of rows against some panels of the group; its sums lie in a small buffer.
 *   - k runs in chunks whose part of a panel stays in the first-level cache, all row tiles of the block over it.
 *
 * x is never copied. A convolution differs from a linear layer only in where its rows lie: for each tap, the rows
 * of the product are runs of channels at shifted pixels. */
#include "engine/engine.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK_TILES = 8,        /* row tiles a task takes at once */
    CHUNK = 512,            /* of k, about */
    MAX_SEGMENTS = 27,      /* taps of a 3x3x3 convolution */
};

void *scratch(size_t bytes) {
    static void *region;
    static size_t size;
    if (bytes > size) {
        free(region);
        region = allocate(bytes);
        size = bytes;
    }
    return region;
}

static int smaller(int a, int b) { return a < b ? a : b; }
static int ceiling(int a, int b) { return (a + b - 1) / b; }

/* b (n, cols) = rows [0,rows) of w, transposed; columns past `rows` are zero. */
static void transpose(float *b, int cols, const float *w, size_t stride, int rows, int n) {
    for (int j = 0; j < cols; j++) {
        const float *row = w + (size_t)j * stride;
        for (int k = 0; k < n; k++) b[(size_t)k * cols + j] = j < rows ? row[k] : 0.0f;
    }
}

/* panel (K, cols) from rows [first, first+cols) of w. Narrow types are widened a slice at a time. */
static void pack_panel(float *panel, int cols, const Weight *w, int first) {
    enum { SLICE = 256 };
    float slice[MAX_TILE_COLS * SLICE];
    int rows = smaller(cols, w->rows - first), K = w->cols;
    for (int k = 0; k < K; k += SLICE) {
        int n = smaller(SLICE, K - k);
        for (int j = 0; j < rows; j++) {
            size_t at = (size_t)(first + j) * K + k;
            convert_to_floats(slice + j * SLICE, (const char *)w->data + type_bytes(w->type, at), w->type, n);
        }
        transpose(panel + (size_t)k * cols, cols, slice, SLICE, rows, n);
    }
}

/* One block of rows against panels [0,count) of a group; outputs start at column `first` of y. */
typedef struct {
    const Rows *x;
    const float *panels, *bias;
    float *y;
    int O, first;
} Group;

static void finish_tile(const Group *g, const float *acc, int row, int rows, int column) {
    int cols = smaller(kernels->tile_cols, g->O - column);
    for (int i = 0; i < rows; i++) {
        float *y = g->y + (size_t)(row + i) * g->O + column;
        const float *sum = acc + i * kernels->tile_cols;
        for (int j = 0; j < cols; j++) y[j] = g->bias ? sum[j] + g->bias[column + j] : sum[j];
    }
}

/* acc (tiles*R, C) = all of k for one panel. Short segments go several at a time, long ones in parts. */
static void multiply_panel(float *acc, const Rows *x, const float *const *rows, const float *panel, int tiles) {
    int R = kernels->tile_rows, C = kernels->tile_cols;
    int together = x->n < CHUNK ? smaller(CHUNK / x->n, x->segments) : 1;
    memset(acc, 0, sizeof(float) * (size_t)(tiles * R * C));
    for (int s = 0; s < x->segments; s += together) {
        int segments = smaller(together, x->segments - s);
        for (int k = 0; k < x->n; k += CHUNK) {
            int n = smaller(CHUNK, x->n - k);
            const float *b = panel + ((size_t)s * x->n + k) * C;
            for (int t = 0; t < tiles; t++)
                kernels->product_tile(acc + t * R * C, C, rows + (t * x->segments + s) * R, k, b, segments, n);
        }
    }
}

static void multiply_block(const Group *g, int row, int panel, int panels) {
    int R = kernels->tile_rows, C = kernels->tile_cols;
    int rows = smaller(BLOCK_TILES * R, g->x->rows - row), tiles = ceiling(rows, R), segments = g->x->segments;
    const float *where[BLOCK_TILES * MAX_TILE_ROWS * MAX_SEGMENTS];
    _Alignas(64) float acc[BLOCK_TILES * MAX_TILE_ROWS * MAX_TILE_COLS];
    for (int t = 0; t < tiles; t++) /* rows past the end read the last one, and are not written */
        for (int s = 0; s < segments; s++)
            for (int i = 0; i < R; i++)
                where[(t * segments + s) * R + i] = g->x->locate(g->x->of, row + smaller(t * R + i, rows - 1), s);
    size_t panel_size = (size_t)segments * g->x->n * C;
    for (int p = panel; p < panel + panels; p++) {
        multiply_panel(acc, g->x, where, g->panels + p * panel_size, tiles);
        for (int t = 0; t < tiles; t++)
            finish_tile(g, acc + t * R * C, row + t * R, smaller(R, rows - t * R), g->first + p * C);
    }
}

/* Enough tasks for every thread, and no more panels apart than that takes. */
static int panels_per_task(int blocks, int panels) {
    int parts = ceiling(4 * threads_count(), blocks);
    return ceiling(panels, smaller(parts, panels));
}

void product(float *y, Rows x, const Linear *layer) {
    Weight w = layer->weight;
    int C = kernels->tile_cols, blocks = ceiling(x.rows, BLOCK_TILES * kernels->tile_rows);
    size_t panel_size = (size_t)w.cols * C;
    int group = (int)(PRODUCT_MEMORY / (panel_size * sizeof(float)));
    group = smaller(group < 1 ? 1 : group, ceiling(w.rows, C));
    float *panels = scratch(group * panel_size * sizeof(float));
    for (int first = 0; first < w.rows; first += group * C) {
        int count = smaller(group, ceiling(w.rows - first, C)), each = panels_per_task(blocks, count);
        int parts = ceiling(count, each);
        PARALLEL_FOR for (int p = 0; p < count; p++) pack_panel(panels + p * panel_size, C, &w, first + p * C);
        Group g = {&x, panels, layer->bias, y, w.rows, first};
        PARALLEL_FOR for (int task = 0; task < blocks * parts; task++) {
            int panel = task % parts * each;
            multiply_block(&g, task / parts * BLOCK_TILES * kernels->tile_rows, panel, smaller(each, count - panel));
        }
    }
    profile_flops(2.0 * x.rows * w.rows * w.cols);
}

typedef struct {
    const float *x;
    size_t stride;
} Dense;

static const float *locate_dense(const void *of, int row, int segment) {
    const Dense *dense = of;
    (void)segment;
    return dense->x + (size_t)row * dense->stride;
}

void linear(float *y, const float *x, int L, const Linear *layer) {
    Dense dense = {x, (size_t)layer->weight.cols};
    product(y, (Rows){L, 1, layer->weight.cols, locate_dense, &dense}, layer);
}

Linear linear_bind(const WeightFile *file, int O, int I, int with_bias, const char *name, ...) {
    char prefix[64];
    va_list arguments;
    va_start(arguments, name);
    vsnprintf(prefix, sizeof prefix, name, arguments);
    va_end(arguments);
    Linear layer = {.weight = weights_bind(file, O, I, "%s.weight", prefix)};
    if (with_bias) layer.bias = weights_floats(file, O, "%s.bias", prefix);
    return layer;
}
