/* attention.c - softmax(scale q k^T + bias) v for every head, in tiles (Dao et al., FlashAttention, 2022).
 *
 * The scores of a block of queries against a tile of keys live in a small buffer; an online softmax keeps,
 * for each query, the largest score so far, the sum of the exponentials, and the weighted sum of values, and
 * rescales them when the maximum rises. Both products are the same tile as in product.c: keys and values are
 * packed once per call into its panels, per head. In BF16, queries, keys, values and the exponentials are
 * narrowed; scores, sums and the softmax stay in float32. Queries and exponentials are the rows of a product,
 * so they are packed as rows are; where tiles take floats, the exponentials already lie so.
 *
 *   scores (queries, TILE_KEYS) = q @ k^T        panels of k: C keys, over d
 *   out (queries, d)           += p @ v          panels of v: C of d, over the keys
 *
 * A score of -infinity weighs 0. So the largest score so far starts at the least finite number, not at
 * -infinity: then a tile of hidden keys leaves 0 in the sums, and a query that sees none divides 0 by 0. */
#include "engine/engine.h"

enum { BLOCK_ROWS = 5 };

/* Where a head's packed keys and values lie, and what they are packed as. Sizes in bytes. */
typedef struct {
    const Attention *a;
    Precision precision;
    const Tile *tile;
    char *packed;
    int C, width; /* columns of a panel; d rounded up to panels */
    size_t query_row, weight_row; /* from one packed row to the next */
    size_t key_panel, value_panel, keys_size, head_size, packed_size, block_size;
} Plan;

static const float *head_of(const float *x, size_t stride, int row, int head, int d) {
    return x + (size_t)row * stride + (size_t)head * d;
}

static void pack_head(const Plan *plan, int head) {
    const Attention *a = plan->a;
    char *out = plan->packed + head * plan->head_size;
    Weight keys = {head_of(a->k, a->kv_stride, 0, head, a->d), TYPE_F32, a->keys, (int)a->kv_stride};
    for (int first = 0; first < a->keys; first += plan->C, out += plan->key_panel)
        pack_panel(plan->precision, out, &keys, first, 0, a->d);
    out = plan->packed + head * plan->head_size + plan->keys_size;
    for (int first = 0; first < plan->width; first += plan->C, out += plan->value_panel)
        pack_columns(plan->precision, out, head_of(a->v, a->kv_stride, 0, head, a->d) + first, a->kv_stride,
                     smaller(plan->C, a->d - first), a->keys);
}

/* What a block of queries remembers from tile to tile. Rows past the last query are computed, too, from what is
 * left over, and not written. */
typedef struct {
    const char *queries;           /* packed rows: [padded] of d; whole tiles of floats where they lie */
    size_t query_row;          /* from one to the next */
    char *weights;             /* packed rows: [padded] of TILE_KEYS; the scores themselves if tiles take floats */
    float *out;                /* [padded][width] */
    float *scores;             /* [padded][TILE_KEYS] */
    float *sums;               /* [rows][LANES] */
    float maximum[BLOCK_ROWS * MAX_TILE_ROWS];
    int rows, padded;          /* queries; rounded up to row tiles */
} Block;

static void multiply_keys(const Plan *plan, const Block *block, int head, int first, int keys) {
    const char *panel = plan->packed + head * plan->head_size + (size_t)(first / plan->C) * plan->key_panel;
    for (int j = 0; j < keys; j += plan->C, panel += plan->key_panel)
        for (int i = 0; i < block->padded; i += plan->tile->rows)
            plan->tile->multiply(block->scores + (size_t)i * TILE_KEYS + j, TILE_KEYS, REPLACE,
                                 &(Span){block->queries + i * block->query_row, block->query_row, plan->a->d}, 1, panel,
                                 panel_ahead(plan->precision, panel + plan->key_panel, plan->a->d,
                                             i / plan->tile->rows));
}

static void softmax_rows(const Plan *plan, Block *block, int head, int query, int first, int keys) {
    const Attention *a = plan->a;
    for (int i = 0; i < block->rows; i++) {
        const float *bias = NULL;
        if (a->bias) bias = a->bias + head * a->bias_head + (query + i) * a->bias_query + first;
        float rescale, *out = block->out + (size_t)i * plan->width,
              *scores = block->scores + (size_t)i * TILE_KEYS;
        block->maximum[i] = kernels->softmax_tile(scores, keys, a->scale, bias, block->maximum[i],
                                                  block->sums + i * LANES, &rescale);
        if (plan->precision != F32)
            pack_floats(plan->precision, block->weights + i * plan->weight_row, scores, keys);
        if (rescale != 1.0f)
            for (int j = 0; j < plan->width; j++) out[j] *= rescale;
    }
}

static void add_values(const Plan *plan, const Block *block, int head, int first, int keys) {
    const char *panel = plan->packed + head * plan->head_size + plan->keys_size +
                        panel_bytes(plan->precision, first);
    for (int j = 0; j < plan->width; j += plan->C, panel += plan->value_panel)
        for (int i = 0; i < block->padded; i += plan->tile->rows)
            plan->tile->multiply(block->out + (size_t)i * plan->width + j, plan->width, ACCUMULATE,
                                 &(Span){block->weights + i * plan->weight_row, plan->weight_row, keys}, 1, panel,
                                 panel_ahead(plan->precision, panel + plan->value_panel, keys, i / plan->tile->rows));
}

/* Lays a block out in a thread's memory. */
static void begin_block(const Plan *plan, Block *block, int head, int query, char *memory) {
    const Attention *a = plan->a;
    block->queries = memory, block->query_row = plan->query_row;
    block->scores = (float *)(void *)(memory + (size_t)block->padded * plan->query_row);
    block->out = block->scores + (size_t)block->padded * TILE_KEYS;
    block->sums = block->out + (size_t)block->padded * plan->width;
    block->weights = (char *)(block->sums + (size_t)block->padded * LANES);
    if (tiles_take_floats(plan->precision)) block->weights = (char *)block->scores;
    memset(block->out, 0, sizeof(float) * (size_t)block->padded * (size_t)(plan->width + LANES));
    for (int i = 0; i < block->rows; i++) block->maximum[i] = -FLT_MAX;
    if (plan->precision == F32 && block->rows == block->padded) {
        block->queries = (const char *)head_of(a->q, a->q_stride, query, head, a->d);
        block->query_row = sizeof(float) * a->q_stride;
        return;
    }
    for (int i = 0; i < block->rows; i++)
        pack_floats(plan->precision, memory + i * plan->query_row,
                    head_of(a->q, a->q_stride, query + i, head, a->d), a->d);
}

static void attend(const Plan *plan, int head, int query, int rows, char *memory) {
    const Attention *a = plan->a;
    Block block = {.rows = rows, .padded = round_up(rows, plan->tile->rows)};
    begin_block(plan, &block, head, query, memory);
    for (int first = 0; first < a->keys; first += TILE_KEYS) {
        int keys = smaller(TILE_KEYS, a->keys - first);
        multiply_keys(plan, &block, head, first, keys);
        softmax_rows(plan, &block, head, query, first, keys);
        add_values(plan, &block, head, first, keys);
    }
    for (int i = 0; i < rows; i++) {
        float total = lanes_sum(block.sums + i * LANES),
              *out = a->out + (query + i) * a->out_stride + (size_t)head * a->d;
        for (int j = 0; j < a->d; j++) out[j] = block.out[(size_t)i * plan->width + j] / total;
    }
}

/* Packed keys and values of all heads, then a block's memory for each thread. */
static Plan make_plan(const Attention *a) {
    Plan plan = {.a = a, .precision = a->precision, .C = kernels->tile_cols};
    plan.tile = &kernels->tile[plan.precision];
    int rows = BLOCK_ROWS * plan.tile->rows;
    plan.width = round_up(a->d, plan.C);
    bool floats = tiles_take_floats(plan.precision);
    plan.query_row = packed_bytes(plan.precision, a->d);
    plan.weight_row = floats ? sizeof(float) * TILE_KEYS : packed_bytes(plan.precision, TILE_KEYS);
    plan.key_panel = panel_bytes(plan.precision, a->d);
    plan.value_panel = panel_bytes(plan.precision, a->keys);
    plan.keys_size = (size_t)ceiling(a->keys, plan.C) * plan.key_panel;
    plan.head_size = plan.keys_size + (size_t)(plan.width / plan.C) * plan.value_panel;
    plan.packed_size = whole_lines(plan.head_size * (size_t)a->heads);
    plan.block_size = whole_lines((size_t)rows * (sizeof(float) * (size_t)(TILE_KEYS + plan.width + LANES) +
                                                  plan.query_row + (floats ? 0 : plan.weight_row)));
    return plan;
}

static size_t plan_bytes(const Plan *plan) {
    return plan->packed_size + plan->block_size * (size_t)threads_count();
}

size_t tiles_attention_memory(Precision precision, int keys, int heads, int d) {
    Plan plan = make_plan(&(Attention){.precision = precision, .keys = keys, .heads = heads, .d = d});
    return plan_bytes(&plan);
}

void attention_in_tiles(const Attention *a) {
    Plan plan = make_plan(a);
    int block = BLOCK_ROWS * plan.tile->rows, blocks = ceiling(a->queries, block);
    plan.packed = scratch(plan_bytes(&plan));
    PARALLEL_FOR (int head = 0; head < a->heads; head++) pack_head(&plan, head);
    PARALLEL_FOR (int task = 0; task < blocks * a->heads; task++) {
        int query = task % blocks * block;
        attend(&plan, task / blocks, query, smaller(block, a->queries - query),
               plan.packed + plan.packed_size + plan.block_size * (size_t)thread_index());
    }
}

size_t attention_memory(Precision precision, int keys, int heads, int d) {
    return kernels->attention_memory(precision_of_floats(precision), keys, heads, d);
}

void attention(const Attention *a) {
    Attention floats = *a;
    floats.precision = precision_of_floats(a->precision);
    kernels->attention(&floats);
    profile_flops(4.0 * a->queries * a->keys * a->heads * a->d);
}
