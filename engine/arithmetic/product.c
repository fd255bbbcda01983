/* product.c - y = x @ w^T + b, the operation in which nearly all time goes: linear layers and convolutions.
 *
 * The specification is three loops:
 *
 *   for each row r of x, for each output o:
 *       sum = 0;  for k in 0..K-1:  sum = fma(x[r][k], w[o][k], sum);   y[r][o] = sum + b[o]
 *
 * This file computes exactly that, in another order of (r, o) and with k cut in parts, which changes no bit:
 * a product's sum is one chain over k, and a chain may stop in memory and go on. The plan is that of BLIS
 * (Van Zee and van de Geijn, 2015):
 *
 *   - w is packed into panels of C outputs (panel.c), transposed: panel[k][j] = w[o+j][k]. A group of panels
 *     that fits a budget is packed by all threads, then used by all threads.
 *   - a task is a block of rows against some panels of the group; its sums lie in a small buffer.
 *   - k runs in parts so short that a part of a panel and the block's rows stay in the second-level cache,
 *     all tiles of the block over each. Meanwhile the next panel's part is fetched.
 *
 * Where all rows are one block (the few tokens of a prompt) a panel is used only once. It then never leaves
 * the cache: a task packs a part, multiplies it, and forgets it.
 *
 * In float32, x is never copied; for narrower arithmetic its rows are narrowed first. bfloat16 that tiles
 * want as floats is widened again, a block and a part at a time. A convolution differs from a linear layer
 * only in where its rows lie: for each tap, the rows of the product are runs of channels
 * at shifted pixels. */
#include "engine/engine.h"

#include <stdarg.h>
#include <string.h>

enum {
    BLOCK_TILES = 8,        /* row tiles a task takes at once */
    TASK_PANELS = 16,       /* and panels, at most */
    CHUNK = 1536,           /* of k, at most */
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

/* One product. Its group of packed panels starts with that of output `first`. */
typedef struct {
    const Rows *x;
    const Linear *layer;
    Precision precision; /* of the layer */
    float *y;
    int mode, first;
    char *panels;        /* NULL: tasks pack for themselves */
    size_t panel_size;
} Product;

/* A part of k: several short segments, or a piece of a long one. */
typedef struct {
    int segment, segments, k, n;
    size_t at, bytes; /* in a panel */
} Part;

/* The next part, or the first after {0}; false after the last. */
static bool next_part(const Product *p, Part *part) {
    const Rows *x = p->x;
    part->at += part->bytes;
    part->k += part->n;
    if (part->k == x->n) part->k = 0, part->segment += part->segments;
    if (part->segment == x->segments) return false;
    part->n = smaller(CHUNK, x->n - part->k);
    part->segments = x->n > CHUNK ? 1 : smaller(CHUNK / x->n, x->segments - part->segment);
    part->bytes = (size_t)part->segments * panel_bytes(p->precision, part->n);
    return true;
}

static void pack_part(const Product *p, const Part *part, int column, char *panel) {
    for (int s = part->segment; s < part->segment + part->segments;
         s++, panel += panel_bytes(p->precision, part->n))
        pack_rows(p->precision, panel, &p->layer->weight, column, (p->x->skip + s) * p->x->n + part->k,
                  part->n);
}

static void pack_panel(const Product *p, int column, char *panel) {
    for (Part part = {0}; next_part(p, &part);) pack_part(p, &part, column, panel + part.at);
}

/* ---------------------------------------------------------------- a task */

/* A block of rows against panels of the group. Rows past the end of x read the last one,
 * and are not written. */
typedef struct {
    int row, rows, tiles, panel, panels;
    float *acc, *wide; /* [panels][tiles][R][C]; a part of the rows, if they must be widened */
    char *packed;      /* a part of a panel, if tasks pack for themselves */
    const void *where[BLOCK_TILES * MAX_SEGMENTS * MAX_TILE_ROWS]; /* [tiles][segments][R] */
    const void *where_wide[BLOCK_TILES * MAX_TILE_ROWS];           /* [tiles][R] */
} Task;

/* Floats in which a thread keeps a task's sums, and a part of its rows. */
static size_t acc_size(void) {
    return (size_t)TASK_PANELS * BLOCK_TILES * kernels->tile_rows * kernels->tile_cols;
}
static size_t wide_size(void) { return (size_t)BLOCK_TILES * kernels->tile_rows * CHUNK; }

static size_t task_bytes(Precision precision) {
    return sizeof(float) * (acc_size() + wide_size()) + panel_bytes(precision, CHUNK);
}

static void begin_task(const Product *p, Task *task, char *memory) {
    int R = kernels->tile_rows, segments = p->x->segments;
    task->rows = smaller(BLOCK_TILES * R, p->x->rows - task->row);
    task->tiles = ceiling(task->rows, R);
    task->acc = (float *)memory;
    task->wide = task->acc + acc_size();
    task->packed = (char *)(task->wide + wide_size());
    memset(task->acc, 0, sizeof(float) * (size_t)(task->panels * task->tiles * R * kernels->tile_cols));
    for (int i = 0; i < task->tiles * R; i++)
        p->x->locate(p->x->of, task->row + smaller(i, task->rows - 1),
                     task->where + i / R * segments * R + i % R, R);
}

/* What tiles are given of the rows in a part. */
typedef struct {
    const void *const *rows;
    int stride; /* from tile to tile */
    size_t from;
    int segments, n;
} Operands;

static Operands widen_rows(const Product *p, Task *task, const Part *part) {
    int R = kernels->tile_rows;
    float *out = task->wide;
    for (int i = 0; i < task->tiles * R; i++) {
        const void **where = task->where + (i / R * p->x->segments + part->segment) * R + i % R;
        task->where_wide[i] = out;
        for (int s = 0; s < part->segments; s++, out += part->n)
            kernels->from_bf16(out, (const uint16_t *)where[s * R] + part->k, (size_t)part->n);
    }
    return (Operands){task->where_wide, R, 0, 1, part->segments * part->n};
}

static Operands rows_of(const Product *p, Task *task, const Part *part) {
    int R = kernels->tile_rows;
    if (tile_type(p->precision) != p->precision) return widen_rows(p, task, part);
    return (Operands){task->where + part->segment * R, p->x->segments * R, row_offset(p->precision, part->k),
                      part->segments, part->n};
}

/* acc (tiles*R, C) += a part of one panel; `next` is what comes after it. */
static void multiply_part(const Product *p, float *acc, int tiles, const Operands *a, const char *panel,
                          const char *next) {
    int R = kernels->tile_rows, C = kernels->tile_cols;
    size_t share = panel_bytes(p->precision, a->segments * a->n) / TILES_AHEAD;
    for (int t = 0; t < tiles; t++)
        kernels->tile[p->precision](acc + t * R * C, C, a->rows + t * a->stride, a->from, panel, a->segments,
                                    a->n, next + t * share);
}

static void multiply_rows(const Product *p, Task *task, const Part *part) {
    int C = kernels->tile_cols;
    Operands a = rows_of(p, task, part);
    for (int i = 0; i < task->panels; i++) {
        int panel = task->panel + i;
        const char *packed = task->packed, *next = packed;
        if (p->panels) {
            packed = p->panels + panel * p->panel_size + part->at;
            next = i + 1 < task->panels ? packed + p->panel_size : packed + part->bytes;
        } else {
            pack_part(p, part, p->first + panel * C, task->packed);
        }
        multiply_part(p, task->acc + i * task->tiles * kernels->tile_rows * C, task->tiles, &a, packed, next);
    }
}

static void finish_tile(const Product *p, float *acc, int row, int rows, int column) {
    int O = p->layer->weight.rows, cols = smaller(kernels->tile_cols, O - column);
    const float *bias = p->layer->bias;
    for (int i = 0; i < rows; i++) {
        float *restrict y = p->y + (size_t)(row + i) * O + column,
              *restrict sum = acc + i * kernels->tile_cols;
        if (bias)
            for (int j = 0; j < cols; j++) sum[j] += bias[column + j];
        if (p->mode == ACCUMULATE)
            for (int j = 0; j < cols; j++) y[j] += sum[j];
        else
            memcpy(y, sum, sizeof(float) * (size_t)cols);
    }
}

static void run_task(const Product *p, int row, int panel, int panels, char *memory) {
    int R = kernels->tile_rows, C = kernels->tile_cols;
    Task task = {.row = row, .panel = panel, .panels = panels};
    begin_task(p, &task, memory);
    for (Part part = {0}; next_part(p, &part);) multiply_rows(p, &task, &part);
    for (int i = 0; i < panels; i++)
        for (int t = 0; t < task.tiles; t++)
            finish_tile(p, task.acc + (i * task.tiles + t) * R * C, row + t * R,
                        smaller(R, task.rows - t * R), p->first + (panel + i) * C);
}

/* ---------------------------------------------------------------- all of them */

/* Enough tasks for every thread, and no more panels apart than that takes. */
static int panels_per_task(int blocks, int panels) {
    int parts = ceiling(16 * threads_count(), blocks);
    return smaller(TASK_PANELS, ceiling(panels, smaller(parts, panels)));
}

/* Of the memory in which a group of panels is packed: none for one block of rows, whose tasks pack for themselves. */
static size_t group_bytes(const Linear *layer, int rows, size_t panel_size) {
    size_t panels = (size_t)ceiling(layer->weight.rows, kernels->tile_cols), most = larger(1, GROUP_BYTES / panel_size);
    if (rows <= BLOCK_TILES * kernels->tile_rows) return 0;
    return panel_size * (panels < most ? panels : most);
}

/* A region: a group of panels, then what threads have for themselves. */
static size_t region_bytes(const Linear *layer, int rows, size_t panel_size) {
    return (group_bytes(layer, rows, panel_size) + 63) / 64 * 64 +
           task_bytes(layer->precision) * (size_t)threads_count();
}

static size_t panel_size_of(const Rows *x, const Linear *layer) {
    return (size_t)x->segments * panel_bytes(layer->precision, x->n);
}

void product_in_panels(float *y, const Rows *x, const Linear *layer, int mode, char *memory) {
    int C = kernels->tile_cols, O = layer->weight.rows, block = BLOCK_TILES * kernels->tile_rows;
    int blocks = ceiling(x->rows, block);
    Product p = {x, layer, layer->precision, y, mode, 0, blocks > 1 ? memory : NULL, panel_size_of(x, layer)};
    int group = blocks > 1 ? (int)(group_bytes(layer, x->rows, p.panel_size) / p.panel_size) : ceiling(O, C);
    char *mine = memory + region_bytes(layer, x->rows, p.panel_size) -
                 task_bytes(p.precision) * (size_t)threads_count();
    for (; p.first < O; p.first += group * C) {
        int count = smaller(group, ceiling(O - p.first, C)), each = panels_per_task(blocks, count);
        int parts = ceiling(count, each);
        if (p.panels) {
            PARALLEL_FOR (int i = 0; i < count; i++)
                pack_panel(&p, p.first + i * C, p.panels + i * p.panel_size);
        }
        PARALLEL_FOR (int i = 0; i < blocks * parts; i++) {
            int panel = i % parts * each;
            run_task(&p, i / parts * block, panel, smaller(each, count - panel),
                     mine + task_bytes(p.precision) * (size_t)thread_index());
        }
    }
}

static void run_product(float *y, const Rows *x, const Linear *layer, int mode, char *memory) {
    kernels->product(y, x, layer, mode, memory);
    profile_flops(2.0 * x->rows * layer->weight.rows * x->segments * x->n);
}

void product(float *y, Rows x, const Linear *layer, int mode) {
    run_product(y, &x, layer, mode, scratch(region_bytes(layer, x.rows, panel_size_of(&x, layer))));
}

typedef struct {
    const char *x;
    size_t stride; /* bytes */
} Dense;

static void locate_dense(const void *of, int row, const void **where, int stride) {
    const Dense *dense = of;
    (void)stride;
    *where = dense->x + (size_t)row * dense->stride;
}

size_t product_memory(const Linear *layer, int rows, int segments) {
    return region_bytes(layer, rows, segments * panel_bytes(layer->precision, layer->weight.cols / segments));
}

/* A region, then x narrowed: float32 is read where it lies. */
size_t linear_memory(const Linear *layer, int L) {
    size_t narrow = layer->precision == F32 ? 0 : L * row_bytes(layer->precision, layer->weight.cols);
    return product_memory(layer, L, 1) + narrow;
}

void linear(float *y, const float *x, int L, const Linear *layer) {
    int I = layer->weight.cols;
    Dense dense = {(const char *)x, row_bytes(layer->precision, I)};
    Rows rows = {L, 1, I, 0, locate_dense, &dense};
    char *memory = scratch(linear_memory(layer, L));
    if (layer->precision != F32) {
        char *narrow = memory + product_memory(layer, L, 1);
        narrow_rows(layer->precision, narrow, x, I, L, I);
        dense.x = narrow;
    }
    run_product(y, &rows, layer, REPLACE, memory);
}

Linear linear_bind(const WeightFile *file, Precision precision, int O, int I, int with_bias,
                   const char *name, ...) {
    char prefix[64];
    va_list arguments;
    va_start(arguments, name);
    vsnprintf(prefix, sizeof prefix, name, arguments);
    va_end(arguments);
    Linear layer = {.weight = weights_bind(file, O, I, "%s.weight", prefix), .precision = precision};
    if (with_bias) layer.bias = weights_floats(file, O, "%s.bias", prefix);
    return layer;
}
