/* attention.c - softmax(scale q k^T + bias) v for every head, in tiles (Dao et al., FlashAttention, 2022).
 *
 * The scores of a block of queries against a tile of keys live in a small buffer; an online softmax keeps, for each
 * query, the largest score so far, the sum of the exponentials, and the weighted sum of values, and rescales them
 * when the maximum rises. Both products are the same tile as in product.c: keys and values are packed once per call
 * into its panels, per head.
 *
 *   scores (queries, TILE_KEYS) = q @ k^T        panels of k: [d][C keys]
 *   out (queries, d)           += p @ v          panels of v: [keys][C of d]
 *
 * The tile of keys is the same on every instruction set, since a rescaling rounds. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

enum { TILE_KEYS = 128, BLOCK_ROWS = 5 };

static int smaller(int a, int b) { return a < b ? a : b; }
static int round_up(int a, int b) { return (a + b - 1) / b * b; }

/* Where a head's packed keys and values lie: keys_size floats of keys, then values_size of values. */
typedef struct {
    const Attention *a;
    float *packed;
    int C, width; /* columns of a panel; d rounded up to panels */
    size_t keys_size, values_size, packed_size, block_size;
} Plan;

static void pack_keys(const Plan *plan, int head) {
    const Attention *a = plan->a;
    float *out = plan->packed + head * (plan->keys_size + plan->values_size);
    for (int first = 0; first < a->keys; first += plan->C, out += (size_t)a->d * plan->C)
        for (int j = 0; j < plan->C; j++) {
            const float *key = a->k + (size_t)(first + j) * a->kv_stride + head * a->d;
            for (int i = 0; i < a->d; i++) out[i * plan->C + j] = first + j < a->keys ? key[i] : 0.0f;
        }
}

static void pack_values(const Plan *plan, int head) {
    const Attention *a = plan->a;
    float *out = plan->packed + head * (plan->keys_size + plan->values_size) + plan->keys_size;
    for (int first = 0; first < plan->width; first += plan->C)
        for (int s = 0; s < a->keys; s++, out += plan->C) {
            const float *value = a->v + (size_t)s * a->kv_stride + head * a->d + first;
            int cols = smaller(plan->C, a->d - first);
            memcpy(out, value, sizeof(float) * (size_t)cols);
            memset(out + cols, 0, sizeof(float) * (size_t)(plan->C - cols));
        }
}

/* What a block of queries remembers from tile to tile. */
typedef struct {
    float *out;                /* [rows][width] */
    float *scores;             /* [rows][TILE_KEYS] */
    float *sums;               /* [rows][LANES] */
    float *maximum;            /* [rows] */
    const float **q, **p;      /* row pointers, past the end the last one */
    int rows, padded;          /* queries; rounded up to row tiles */
} Block;

static void multiply_tile(const Plan *plan, const Block *block, int head, int first, int keys) {
    const Attention *a = plan->a;
    int R = kernels->tile_rows;
    const float *panels = plan->packed + head * (plan->keys_size + plan->values_size) + (size_t)first * a->d;
    memset(block->scores, 0, sizeof(float) * (size_t)block->padded * TILE_KEYS);
    for (int j = 0; j < keys; j += plan->C)
        for (int i = 0; i < block->padded; i += R)
            kernels->product_tile(block->scores + (size_t)i * TILE_KEYS + j, TILE_KEYS, block->q + i, 0,
                                  panels + (size_t)j * a->d, 1, a->d);
}

static void softmax_rows(const Plan *plan, const Block *block, int head, int query, int first, int keys) {
    const Attention *a = plan->a;
    for (int i = 0; i < block->rows; i++) {
        const float *bias = NULL;
        if (a->bias) bias = a->bias + head * a->bias_head + (query + i) * a->bias_query + first;
        float rescale, *out = block->out + (size_t)i * plan->width;
        block->maximum[i] = kernels->softmax_tile(block->scores + (size_t)i * TILE_KEYS, keys, a->scale, bias,
                                                  block->maximum[i], block->sums + i * LANES, &rescale);
        if (rescale != 1.0f)
            for (int j = 0; j < plan->width; j++) out[j] *= rescale;
    }
}

static void add_values(const Plan *plan, const Block *block, int head, int first, int keys) {
    int R = kernels->tile_rows;
    const float *panels = plan->packed + head * (plan->keys_size + plan->values_size) + plan->keys_size;
    for (int j = 0; j < plan->width; j += plan->C)
        for (int i = 0; i < block->padded; i += R)
            kernels->product_tile(block->out + (size_t)i * plan->width + j, plan->width, block->p + i, 0,
                                  panels + (size_t)j * plan->a->keys + (size_t)first * plan->C, 1, keys);
}

static void attend(const Plan *plan, int head, int query, int rows, float *memory) {
    const Attention *a = plan->a;
    const float *q[BLOCK_ROWS * MAX_TILE_ROWS], *p[BLOCK_ROWS * MAX_TILE_ROWS];
    float maximum[BLOCK_ROWS * MAX_TILE_ROWS];
    Block block = {.q = q, .p = p, .maximum = maximum, .rows = rows, .padded = round_up(rows, kernels->tile_rows)};
    block.scores = memory;
    block.out = block.scores + (size_t)block.padded * TILE_KEYS;
    block.sums = block.out + (size_t)block.padded * plan->width;
    memset(block.out, 0, sizeof(float) * (size_t)block.padded * (size_t)(plan->width + LANES));
    for (int i = 0; i < block.padded; i++) {
        int row = smaller(i, rows - 1);
        q[i] = a->q + (size_t)(query + row) * a->q_stride + head * a->d;
        p[i] = block.scores + (size_t)row * TILE_KEYS;
        maximum[i] = -1e30f;
    }
    for (int first = 0; first < a->keys; first += TILE_KEYS) {
        int keys = smaller(TILE_KEYS, a->keys - first);
        multiply_tile(plan, &block, head, first, keys);
        softmax_rows(plan, &block, head, query, first, keys);
        add_values(plan, &block, head, first, keys);
    }
    for (int i = 0; i < rows; i++) {
        float total = lanes_sum(block.sums + i * LANES), *out = a->out + (size_t)(query + i) * a->out_stride + head * a->d;
        for (int j = 0; j < a->d; j++) out[j] = block.out[(size_t)i * plan->width + j] / total;
    }
}

/* Floats: packed keys and values of all heads, then a block's memory for each thread. */
static Plan make_plan(const Attention *a) {
    int C = kernels->tile_cols;
    Plan plan = {.a = a, .C = C, .width = round_up(a->d, C)};
    plan.keys_size = (size_t)round_up(a->keys, C) * a->d;
    plan.values_size = (size_t)plan.width * a->keys;
    plan.packed_size = (plan.keys_size + plan.values_size) * a->heads;
    plan.block_size = (size_t)BLOCK_ROWS * kernels->tile_rows * (TILE_KEYS + plan.width + LANES);
    return plan;
}

static size_t plan_bytes(const Plan *plan) {
    return sizeof(float) * (plan->packed_size + plan->block_size * (size_t)threads_count());
}

size_t attention_memory(int keys, int heads, int d) {
    Plan plan = make_plan(&(Attention){.keys = keys, .heads = heads, .d = d});
    return plan_bytes(&plan);
}

void attention(const Attention *a) {
    Plan plan = make_plan(a);
    int block = BLOCK_ROWS * kernels->tile_rows, blocks = round_up(a->queries, block) / block;
    plan.packed = scratch(plan_bytes(&plan));
    PARALLEL_FOR for (int head = 0; head < a->heads; head++) {
        pack_keys(&plan, head);
        pack_values(&plan, head);
    }
    PARALLEL_FOR for (int task = 0; task < blocks * a->heads; task++) {
        int query = task % blocks * block;
        attend(&plan, task / blocks, query, smaller(block, a->queries - query),
               plan.packed + plan.packed_size + plan.block_size * (size_t)thread_index());
    }
    profile_flops(4.0 * a->queries * a->keys * a->heads * a->d);
}
