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
 *   - w is packed into panels of C outputs (panel.c), transposed: panel[k][j] = w[o+j][k]. A group of panels that fits
 *     a budget is packed by all threads, then used by all threads.
 *   - a task is a block of rows against some panels of the group; its sums lie in a small buffer.
 *   - k runs in chunks whose part of a panel stays in the second-level cache, all row tiles of the block over it.
 *
 * In float32, x is never copied; for narrower arithmetic its rows are narrowed first. A convolution differs from a
 * linear layer only in where its rows lie: for each tap, the rows of the product are runs of channels at shifted
 * pixels. */
#include "engine/engine.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum {
    BLOCK_TILES = 8,        /* row tiles a task takes at once */
    CHUNK = 1536,           /* of k, about */
    MAX_SEGMENTS = 27,      /* taps of a 3x3x3 convolution */
    GROUP_BYTES = 16 << 20, /* of packed panels, unless one is larger */
};

static Arena region;

void *scratch(size_t bytes) {
    if (bytes > region.size) {
        scratch_free();
        region = arena_open(bytes);
    }
    return region.base;
}

void scratch_free(void) { arena_close(&region); }

/* The part of k that a tile takes at once: for INT8, what is under one scale. */
static int chunk_of(Precision precision) { return precision == INT8 ? INT8_CHUNK : CHUNK; }

/* A panel from rows [first, first+C) of w, a slice at a time, which is widened if it is narrow. */
static void pack_panel(char *panel, const Linear *layer, const Rows *x, int first) {
    enum { SLICE = INT8_CHUNK };
    float slice[MAX_TILE_COLS * SLICE];
    const Weight *w = &layer->weight;
    int cols = smaller(kernels->tile_cols, w->rows - first);
    for (int s = 0; s < x->segments; s++)
        for (int k = 0; k < x->n; k += SLICE) {
            int n = smaller(SLICE, x->n - k);
            for (int j = 0; j < cols; j++) {
                size_t at = type_bytes(w->type, (size_t)(first + j) * w->cols + (size_t)s * x->n + k);
                convert_to_floats(slice + j * SLICE, (const char *)w->data + at, w->type, n);
            }
            pack_rows(layer->precision, panel, slice, SLICE, cols, n);
            panel += panel_bytes(layer->precision, n);
        }
}

/* A group of panels, and what is to become of their columns, the first of which is column `first` of y. */
typedef struct {
    const Rows *x;
    const Linear *layer;
    const char *panels;
    size_t panel_size;
    float *y;
    int first, mode;
} Group;

static void finish_tile(const Group *g, float *acc, int row, int rows, int column) {
    int O = g->layer->weight.rows, cols = smaller(kernels->tile_cols, O - column);
    const float *bias = g->layer->bias;
    for (int i = 0; i < rows; i++) {
        float *restrict y = g->y + (size_t)(row + i) * O + column, *restrict sum = acc + i * kernels->tile_cols;
        if (bias)
            for (int j = 0; j < cols; j++) sum[j] += bias[column + j];
        if (g->mode == ACCUMULATE)
            for (int j = 0; j < cols; j++) y[j] += sum[j];
        else
            memcpy(y, sum, sizeof(float) * (size_t)cols);
    }
}

/* acc (tiles*R, C) = all of k for one panel. Short segments go several at a time, long ones in parts. */
static void multiply_panel(float *acc, const Group *g, const void *const *rows, const char *panel, int tiles) {
    Precision precision = g->layer->precision;
    int R = kernels->tile_rows, C = kernels->tile_cols, chunk = chunk_of(precision), length = g->x->n;
    int together = length < chunk && precision != INT8 ? smaller(chunk / length, g->x->segments) : 1;
    memset(acc, 0, sizeof(float) * (size_t)(tiles * R * C));
    for (int s = 0; s < g->x->segments; s += together) {
        int segments = smaller(together, g->x->segments - s);
        for (int k = 0; k < length; k += chunk) {
            int n = smaller(chunk, length - k);
            for (int t = 0; t < tiles; t++)
                kernels->tile[precision](acc + t * R * C, C, rows + (t * g->x->segments + s) * R,
                                         row_offset(precision, k), panel, segments, n);
            panel += segments * panel_bytes(precision, n);
        }
    }
}

static void multiply_block(const Group *g, int row, int panel, int panels) {
    int R = kernels->tile_rows, C = kernels->tile_cols;
    int rows = smaller(BLOCK_TILES * R, g->x->rows - row), tiles = ceiling(rows, R), segments = g->x->segments;
    const void *where[BLOCK_TILES * MAX_TILE_ROWS * MAX_SEGMENTS];
    _Alignas(64) float acc[BLOCK_TILES * MAX_TILE_ROWS * MAX_TILE_COLS];
    for (int t = 0; t < tiles; t++) /* rows past the end read the last one, and are not written */
        for (int s = 0; s < segments; s++)
            for (int i = 0; i < R; i++)
                where[(t * segments + s) * R + i] = g->x->locate(g->x->of, row + smaller(t * R + i, rows - 1), s);
    for (int p = panel; p < panel + panels; p++) {
        multiply_panel(acc, g, where, g->panels + p * g->panel_size, tiles);
        for (int t = 0; t < tiles; t++)
            finish_tile(g, acc + t * R * C, row + t * R, smaller(R, rows - t * R), g->first + p * C);
    }
}

/* Enough tasks for every thread, and no more panels apart than that takes. */
static int panels_per_task(int blocks, int panels) {
    int parts = ceiling(16 * threads_count(), blocks);
    return ceiling(panels, smaller(parts, panels));
}

/* Bytes of a panel over all of k, and of the memory in which a group of them is packed. */
static size_t panel_size_of(const Rows *x, const Linear *layer) {
    return x->segments * panel_bytes(layer->precision, x->n);
}

static size_t group_bytes(size_t panel_size) {
    return panel_size > GROUP_BYTES ? panel_size : GROUP_BYTES / panel_size * panel_size;
}

static void run_product(float *y, const Rows *x, const Linear *layer, int mode, char *memory) {
    int C = kernels->tile_cols, O = layer->weight.rows, block = BLOCK_TILES * kernels->tile_rows;
    int blocks = ceiling(x->rows, block);
    size_t panel_size = panel_size_of(x, layer);
    int group = (int)(group_bytes(panel_size) / panel_size);
    for (int first = 0; first < O; first += group * C) {
        int count = smaller(group, ceiling(O - first, C)), each = panels_per_task(blocks, count);
        int parts = ceiling(count, each);
        PARALLEL_FOR for (int p = 0; p < count; p++) pack_panel(memory + p * panel_size, layer, x, first + p * C);
        Group g = {x, layer, memory, panel_size, y, first, mode};
        PARALLEL_FOR for (int task = 0; task < blocks * parts; task++) {
            int panel = task % parts * each;
            multiply_block(&g, task / parts * block, panel, smaller(each, count - panel));
        }
    }
    profile_flops(2.0 * x->rows * O * layer->weight.cols);
}

void product(float *y, Rows x, const Linear *layer, int mode) {
    run_product(y, &x, layer, mode, scratch(group_bytes(panel_size_of(&x, layer))));
}

typedef struct {
    const char *x;
    size_t stride; /* bytes */
} Dense;

static const void *locate_dense(const void *of, int row, int segment) {
    const Dense *dense = of;
    (void)segment;
    return dense->x + (size_t)row * dense->stride;
}

/* Panels, then x narrowed: float32 is read where it lies. */
size_t product_memory(Precision precision, int L, int I) {
    return group_bytes(panel_bytes(precision, I)) + (precision == F32 ? 0 : L * row_bytes(precision, I));
}

void linear(float *y, const float *x, int L, const Linear *layer) {
    int I = layer->weight.cols;
    Dense dense = {(const char *)x, row_bytes(layer->precision, I)};
    Rows rows = {L, 1, I, locate_dense, &dense};
    size_t panels = product_memory(layer->precision, 0, I);
    char *memory = scratch(product_memory(layer->precision, L, I));
    if (layer->precision != F32) {
        dense.x = memory + panels;
        narrow_rows(layer->precision, memory + panels, x, I, L, I);
    }
    run_product(y, &rows, layer, REPLACE, memory);
}

Linear linear_bind(const WeightFile *file, Precision precision, int O, int I, int with_bias, const char *name, ...) {
    char prefix[64];
    va_list arguments;
    va_start(arguments, name);
    vsnprintf(prefix, sizeof prefix, name, arguments);
    va_end(arguments);
    Linear layer = {.weight = weights_bind(file, O, I, "%s.weight", prefix), .precision = precision};
    if (with_bias) layer.bias = weights_floats(file, O, "%s.bias", prefix);
    return layer;
}
