/* product.c - y = x @ w^T + b, the operation in which nearly all time goes: linear layers and convolutions.
 *
 * The specification is three loops:
 *
 *   for each row r of x, for each output o:
 *       sum = 0;  for k in 0..K-1:  sum = fma(x[r][k], w[o][k], sum);   y[r][o] = sum + b[o]
 *
 * This file visits (r, o) in another order, and cuts k in parts. That changes no bit: a sum is one chain over k,
 * and a chain may stop in memory and go on. The plan is that of BLIS (Van Zee and van de Geijn, 2015). Weights are
 * copied first, and rows where they do not lie in order, so that tiles read both in order:
 *
 *                            C outputs
 *                             +---+---+---+---+
 *                             |   |   |   |   |   panels: panel[k][j] = w[o+j][k]
 *                        k    |   |   |   |   |
 *                  k          +---+---+---+---+
 *   R rows  +-------------+   +---+---+---+---+
 *           | packed rows |   | tile  |       |   a task's sums: 8 tiles high,
 *           +-------------+   +---+---+---+---+   at most 16 panels wide
 *           |             |   |   |   |   |   |
 *           +-------------+   +---+---+---+---+
 *
 *   for each group of panels that fits a budget:                 packed by all threads, then used by all
 *     for each task, a block of rows against some panels:        one thread
 *       for each part of k:                                      short enough for the second-level cache
 *         pack the block's rows, but where tiles can read them in place
 *         for each panel:
 *           for each slice of k, for each tile of rows:  tile()  meanwhile the next slice is fetched
 *           at the end of k: add the bias, write y
 *
 * Where all rows are one block (the few tokens of a prompt) a panel is used only once. So the task itself packs
 * it, a part at a time, and it never leaves the cache.
 *
 * A convolution differs from a linear layer only in where its rows lie: for each tap, a row of the product is a
 * segment, the channels of a shifted pixel. The pixels of a tile follow each other in the image, so tiles read most
 * segments in place; where a tile crosses the image's edge, packing puts its segments side by side. */
#include "engine/engine.h"

#include <stdarg.h>
#include <string.h>

enum {
    BLOCK_TILES = 8,        /* row tiles a task takes at once */
    TASK_PANELS = 16,       /* and panels, at most */
    GROUP_BYTES = 16 << 20, /* of packed panels, unless one is larger */
    STREAM_BYTES = 4 << 20, /* a larger result will have left the second-level cache before it is read */
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

/* One product. Its group of packed panels starts with that of output `first`. */
typedef struct {
    const Rows *x;
    const Linear *layer;
    float *y;
    const Tile *tile;
    int mode, K, first;
    char *panels; /* NULL: tasks pack for themselves */
    size_t panel_size;
    bool stream; /* y is written past the caches */
} Product;

/* ---------------------------------------------------------------- a task */

/* A block of rows against panels of the group. The last tile may have more rows than there are: what it reads
 * there is left over, and its sums are not written. */
typedef struct {
    int row, rows, tiles, panel, panels;
    float *sums;  /* [panels][tiles][R][C] */
    char *packed; /* rows of a part of k, where they are packed: [tiles][R] */
    char *own;    /* a slice of a panel, if tasks pack for themselves */
    Span spans[BLOCK_TILES][MAX_SEGMENTS]; /* of a part of k, for each tile */
} Task;

static size_t sums_bytes(Precision precision) {
    int R = kernels->tile[precision].rows;
    return sizeof(float) * (size_t)(TASK_PANELS * BLOCK_TILES * R * kernels->tile_cols);
}

static size_t rows_bytes(Precision precision) {
    const Tile *tile = &kernels->tile[precision];
    return (size_t)(BLOCK_TILES * tile->rows) * packed_bytes(precision, tile->part);
}

static size_t task_bytes(Precision precision) {
    return sums_bytes(precision) + rows_bytes(precision) + panel_bytes(precision, kernels->tile[precision].slice);
}

static void pack_whole(const Product *p, int panel) {
    char *packed = p->panels + panel * p->panel_size;
    for (int k = 0, part = p->tile->part; k < p->K; k += part)
        pack_panel(p->layer->precision, packed + panel_bytes(p->layer->precision, k), &p->layer->weight,
                   p->first + panel * kernels->tile_cols, p->x->skip * p->x->n + k, smaller(part, p->K - k));
}

Segment rows_locate(const Rows *x, int row, int rows, int segment) {
    if (x->locate) return x->locate(x->of, row, rows, segment);
    return (Segment){(const char *)x->of + (size_t)row * x->stride, x->stride, rows};
}

/* Whether tiles can read `rows` rows in place: if they are evenly spaced. Rows a multiple of 4 KB apart would share one
 * set of the first-level cache. */
static bool readable(const Product *p, Segment found, int rows) {
    bool whole = rows == p->tile->rows || p->x->whole_tiles || found.stride == 0;
    return found.rows >= rows && whole && (found.stride == 0 || found.stride % 4096);
}

/* n elements of a segment, from element `from` on, of the rows from `row` on, to packed rows. */
static void pack_rows(const Product *p, char *packed, int row, int rows, int segment, int from, int n) {
    Precision precision = p->layer->precision;
    size_t stride = packed_bytes(precision, p->tile->part);
    Segment found = {0};
    for (int i = 0, in_run = 0; i < rows; i++, in_run++) {
        if (in_run == found.rows) found = rows_locate(p->x, row + i, rows - i, segment), in_run = 0;
        pack_piece(precision, packed + i * stride,
                   found.at + (size_t)in_run * found.stride + row_offset(precision, from), n);
    }
}

/* n elements of the task's rows, from k on, as spans: where they lie, or packed. Of those in place, only INT8's are
 * filled up to a whole step. */
static void find_spans(const Product *p, Task *task, int k, int n) {
    Precision precision = p->layer->precision;
    int R = p->tile->rows, each = p->x->n;
    bool in_place = tiles_take_operands(precision) && (precision == INT8 || each % p->tile->step == 0);
    size_t stride = packed_bytes(precision, p->tile->part);
    for (int t = 0; t < task->tiles; t++) {
        int rows = smaller(R, task->rows - t * R), row = task->row + t * R;
        char *packed = task->packed + (size_t)(t * R) * stride;
        Span *span = task->spans[t];
        if (!in_place) *span = (Span){packed, stride, n};
        for (int done = 0, piece; done < n; done += piece) {
            int segment = (k + done) / each, from = (k + done) % each;
            piece = smaller(n - done, each - from);
            Segment found = rows_locate(p->x, row, rows, segment);
            Span here = {packed + packed_offset(precision, done), stride, piece};
            if (in_place && readable(p, found, rows))
                here = (Span){found.at + row_offset(precision, from), found.stride, piece};
            else
                pack_rows(p, packed + packed_offset(precision, done), row, rows, segment, from, piece);
            if (in_place) *span++ = here;
        }
        for (int i = 0; !in_place && i < rows; i++) fill_up(precision, packed + i * stride, n);
    }
}

/* out = n elements of spans, from element `from` on; how many spans these are. */
static int part_of(Span *out, const Span *spans, Precision precision, int from, int n) {
    int count = 0;
    for (; from >= spans->n; spans++) from -= spans->n;
    for (; n > 0; n -= out[count++].n, from = 0, spans++)
        out[count] = (Span){spans->at + packed_offset(precision, from), spans->stride, smaller(n, spans->n - from)};
    return count;
}

/* A place in the weights: a panel of the task, and k. */
typedef struct {
    int panel, k;
} Place;

static const char *packed_at(const Product *p, const Task *task, Place at) {
    return p->panels + (task->panel + at.panel) * p->panel_size + panel_bytes(p->layer->precision, at.k);
}

/* The sums of a panel. If all of k is one part, a panel is finished before the next begins. */
static float *sums_of(const Product *p, const Task *task, int panel) {
    int place = p->K > p->tile->part ? panel : 0;
    return task->sums + place * task->tiles * p->tile->rows * kernels->tile_cols;
}

/* Sums = or += n of k from `at` on, `done` after the part's beginning. Meanwhile `next` is fetched. */
static void multiply_slice(const Product *p, const Task *task, Place at, int done, int n, Place next) {
    int R = p->tile->rows, C = kernels->tile_cols, first = p->first + task->panel * C, skipped = p->x->skip * p->x->n;
    Precision precision = p->layer->precision;
    const Weight *w = &p->layer->weight;
    float *sums = sums_of(p, task, at.panel);
    const char *panel = task->own;
    if (p->panels) panel = packed_at(p, task, at);
    else pack_panel(precision, task->own, w, first + at.panel * C, skipped + at.k, n);
    for (int t = 0; t < task->tiles; t++) {
        Span spans[MAX_SEGMENTS];
        int count = part_of(spans, task->spans[t], precision, done, n);
        Ahead ahead = p->panels
                          ? panel_ahead(precision, packed_at(p, task, next), n, t)
                          : weights_ahead(precision, w, first + next.panel * C, skipped + next.k, n, t, task->tiles);
        p->tile->multiply(sums + t * R * C, C, at.k ? ACCUMULATE : REPLACE, spans, count, panel, ahead);
    }
}

/* Writes the sums of a panel, but for rows and outputs past the last. */
static void finish_panel(const Product *p, const Task *task, int panel) {
    int C = kernels->tile_cols, O = p->layer->weight.rows, column = p->first + (task->panel + panel) * C;
    const float *bias = p->layer->bias ? p->layer->bias + column : NULL;
    kernels->write_sums(p->y + (size_t)task->row * O + column, (size_t)O, p->mode, sums_of(p, task, panel), task->rows,
                        smaller(C, O - column), bias, p->stream);
}

/* The task's sums = or += n of k, from `k` on, slice by slice. */
static void multiply_part(const Product *p, const Task *task, int k, int n) {
    for (int i = 0; i < task->panels; i++) {
        for (int done = 0, slice; done < n; done += slice) {
            slice = smaller(p->tile->slice, n - done);
            Place next = {i, k + done + slice};
            if (done + slice == n) next = i + 1 < task->panels ? (Place){i + 1, k} : (Place){0, k + n};
            multiply_slice(p, task, (Place){i, k + done}, done, slice, next);
        }
        if (k + n == p->K) finish_panel(p, task, i);
    }
}

static void run_task(const Product *p, Task task, char *memory) {
    task.tiles = ceiling(task.rows, p->tile->rows);
    task.sums = (float *)(void *)memory;
    task.packed = memory + sums_bytes(p->layer->precision);
    task.own = task.packed + rows_bytes(p->layer->precision);
    tiles_enter();
    for (int k = 0, part; k < p->K; k += part) {
        part = smaller(p->tile->part, p->K - k);
        find_spans(p, &task, k, part);
        multiply_part(p, &task, k, part);
    }
    tiles_leave();
}

/* ---------------------------------------------------------------- all of them */

/* Enough tasks for every thread, and no more panels apart than that takes. */
static int panels_per_task(int blocks, int panels) {
    int parts = ceiling(16 * threads_count(), blocks);
    return smaller(TASK_PANELS, ceiling(panels, smaller(parts, panels)));
}

/* A panel has room for all of k, though a product may leave out the first segments. */
static size_t panel_size_of(const Linear *layer) { return panel_bytes(layer->precision, layer->weight.cols); }

/* Of the memory in which a group of panels is packed: none for one block of rows, whose tasks pack for themselves. */
static size_t group_bytes(const Linear *layer, int rows) {
    size_t panels = (size_t)ceiling(layer->weight.rows, kernels->tile_cols);
    size_t panel_size = panel_size_of(layer), most = larger_size(1, GROUP_BYTES / panel_size);
    if (rows <= BLOCK_TILES * kernels->tile[layer->precision].rows) return 0;
    return panel_size * (panels < most ? panels : most);
}

/* A region: a group of panels, then what threads have for themselves. */
static size_t region_bytes(const Linear *layer, int rows) {
    return whole_lines(group_bytes(layer, rows)) + task_bytes(layer->precision) * (size_t)threads_count();
}

void product_in_panels(float *y, const Rows *x, const Linear *layer, int mode, char *memory) {
    const Tile *tile = &kernels->tile[layer->precision];
    int C = kernels->tile_cols, O = layer->weight.rows, block = BLOCK_TILES * tile->rows;
    int K = x->segments * x->n, blocks = ceiling(x->rows, block), group = ceiling(O, C);
    size_t each_thread = task_bytes(layer->precision), panel_size = panel_size_of(layer);
    char *mine = memory + region_bytes(layer, x->rows) - each_thread * (size_t)threads_count();
    Product p = {x, layer, y, tile, mode, K, 0, blocks > 1 ? memory : NULL, panel_size,
                 .stream = mode == REPLACE && sizeof *y * (size_t)x->rows * (size_t)O > STREAM_BYTES};
    if (p.panels) group = (int)(group_bytes(layer, x->rows) / panel_size);
    for (; p.first < O; p.first += group * C) {
        int count = smaller(group, ceiling(O - p.first, C)), each = panels_per_task(blocks, count);
        int parts = ceiling(count, each);
        if (p.panels) {
            PARALLEL_FOR (int i = 0; i < count; i++) pack_whole(&p, i);
        }
        PARALLEL_FOR (int i = 0; i < blocks * parts; i++) {
            int row = i / parts * block, panel = i % parts * each;
            run_task(&p, (Task){.row = row, .rows = smaller(block, x->rows - row), .panel = panel,
                                .panels = smaller(each, count - panel)},
                     mine + each_thread * (size_t)thread_index());
        }
    }
}

static void run_product(float *y, const Rows *x, const Linear *layer, int mode, char *memory) {
    kernels->product(y, x, layer, mode, memory);
    profile_flops(2.0 * x->rows * layer->weight.rows * x->segments * x->n);
}

void product(float *y, Rows x, const Linear *layer, int mode) {
    run_product(y, &x, layer, mode, scratch(product_memory(layer, x.rows)));
}

size_t product_memory(const Linear *layer, int rows) { return region_bytes(layer, rows); }

/* Of a narrowed row: as packed rows lie, so that tiles can read it there. */
static size_t narrow_bytes(Precision precision, int n) { return CACHE_LINE + whole_lines(row_bytes(precision, n)); }

size_t rows_memory(Precision precision, int L, int n) {
    return precision == F32 ? 0 : narrow_bytes(precision, n) * (size_t)round_up(L, kernels->tile[precision].rows);
}

Rows rows_at(Precision precision, const void *of, size_t stride, int L, int n) {
    return (Rows){.rows = L, .segments = 1, .n = n, .of = of, .stride = stride, .precision = precision};
}

Rows rows_of(Precision precision, float *x, void *memory, int L, int n) {
    if (precision == F32) return rows_at(F32, x, sizeof *x * (size_t)n, L, n);
    Rows rows = rows_at(precision, memory, narrow_bytes(precision, n), L, n);
    rows.whole_tiles = true;
    return rows;
}

size_t linear_memory(const Linear *layer, int L) {
    return product_memory(layer, L) + rows_memory(layer->precision, L, layer->weight.cols);
}

void linear(float *y, const float *x, int L, const Linear *layer) {
    char *memory = scratch(linear_memory(layer, L));
    Rows rows = rows_of(layer->precision, (float *)x, memory + product_memory(layer, L), L, layer->weight.cols);
    narrow_rows(rows, x);
    run_product(y, &rows, layer, REPLACE, memory);
}

Linear linear_bind(const WeightFile *file, Precision precision, int O, int I, int with_bias,
                   const char *name, ...) {
    char prefix[MAX_TENSOR_NAME];
    va_list arguments;
    va_start(arguments, name);
    tensor_name(prefix, name, arguments);
    va_end(arguments);
    Linear layer = {.weight = weights_bind(file, O, I, "%s.weight", prefix), .precision = precision};
    if (with_bias) layer.bias = weights_floats(file, O, "%s.bias", prefix);
    return layer;
}
