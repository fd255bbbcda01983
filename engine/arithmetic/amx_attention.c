/* amx_attention.c - attention in bfloat16, in the tiles of AMX. What it computes is in attention.c.
 *
 * Both products are transposed, so that queries lie side by side, 16 in a register:
 *
 *   scores (keys, 32) = k @ q^T          rows: keys              panel: 32 queries
 *   out (d, 32)      += v^T @ weights    rows: v transposed      panel: the exponentials of the scores
 *
 * Then the maximum and the sum of a query's scores need nothing from neighbouring lanes, and two rows of exponentials,
 * narrowed and interleaved, are a line of a panel. Keys come in chunks, which stay in the second-level cache while the
 * queries of a block pass by:
 *
 *   for each task, a head and a block of queries:               one thread
 *     for each chunk of keys:
 *       for each panel of 32 queries:  scores = k @ q^T;  weights = exp(scores - maximum);  out += v^T @ weights
 *     divide by the sums, transpose, write
 *
 * If a query's maximum rises, what was summed for it is multiplied by exp(old - new), once a chunk. exp(x) is 2^n 2^r,
 * where n + r = x log2 e and |r| <= 1/2; 2^r is a polynomial in r, whose error is below 3e-6. Exponentials are then
 * rounded to 8 bits. */
#include "engine/engine.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512bf16")))

enum { SIDE = 16, WIDE = 2 * SIDE, CHUNK = 1024, BLOCK_PANELS = 8 };

/* Where a head's narrowed keys and values lie. Keys are rows of d. Values are transposed, chunk by chunk: d rows of
 * CHUNK keys. Zeros fill all sizes up to whole tiles. Strides are in bytes. */
typedef struct {
    const Attention *a;
    int d, keys, chunks; /* d and keys rounded up */
    size_t key_stride, value_stride, keys_size, chunk_size, head_size;
    char *packed;
} Plan;

static Plan make_plan(const Attention *a) {
    Plan p = {.a = a, .d = round_up(a->d, WIDE), .keys = round_up(a->keys, WIDE), .chunks = ceiling(a->keys, CHUNK)};
    p.key_stride = sizeof(uint16_t) * (size_t)p.d;
    p.value_stride = CACHE_LINE + sizeof(uint16_t) * CHUNK; /* not a power of two: see packed_bytes() */
    p.keys_size = p.key_stride * (size_t)p.keys;
    p.chunk_size = p.value_stride * (size_t)p.d;
    p.head_size = p.keys_size + p.chunk_size * (size_t)p.chunks;
    return p;
}

/* A block of queries. The first two lines are for each panel, and last from chunk to chunk. The others are for the
 * panel and the chunk at hand. */
typedef struct {
    char *queries;              /* a panel of d */
    float *out, *maximum, *sum; /* [d][WIDE], [WIDE], [WIDE] */
    float *scores;              /* [CHUNK][WIDE] */
    uint16_t *weights;          /* a panel of CHUNK */
} Block;

static Block take_block(Arena *arena, int d) {
    size_t width = (size_t)d, panel = sizeof(uint16_t) * WIDE * width;
    return (Block){.queries = arena_take(arena, BLOCK_PANELS * panel),
                   .out = arena_floats(arena, BLOCK_PANELS * WIDE * width),
                   .maximum = arena_floats(arena, BLOCK_PANELS * WIDE),
                   .sum = arena_floats(arena, BLOCK_PANELS * WIDE),
                   .scores = arena_floats(arena, CHUNK * WIDE),
                   .weights = arena_take(arena, sizeof(uint16_t) * CHUNK * WIDE)};
}

static size_t block_bytes(int d) {
    Arena measured = {0};
    take_block(&measured, d);
    return measured.used;
}

size_t amx_attention_memory(Precision precision, int keys, int heads, int d) {
    if (precision != BF16) return tiles_attention_memory(precision, keys, heads, d);
    Plan p = make_plan(&(Attention){.keys = keys, .d = d});
    return p.head_size * (size_t)heads + block_bytes(p.d) * (size_t)threads_count();
}

/* ---------------------------------------------------------------- keys and values */

/* Two rows of 16 floats as a line of 16 pairs of bfloat16. */
static inline TARGET __m512i pairs_of(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

static void pack_keys(const Plan *p, int head, int chunk) {
    const Attention *a = p->a;
    char *row = p->packed + (size_t)head * p->head_size + (size_t)(chunk * CHUNK) * p->key_stride;
    for (int key = chunk * CHUNK; key < smaller(p->keys, (chunk + 1) * CHUNK); key++, row += p->key_stride) {
        memset(row, 0, p->key_stride);
        if (key < a->keys) narrow_row(BF16, row, a->k + key * a->kv_stride + (size_t)head * a->d, a->d);
    }
}

/* A chunk's values, 32 keys and 16 of d at a time: rows of two keys become lines of pairs, which are transposed. */
static TARGET void pack_values(const Plan *p, int head, int chunk) {
    const Attention *a = p->a;
    char *out = p->packed + (size_t)head * p->head_size + p->keys_size + (size_t)chunk * p->chunk_size;
    for (int key = chunk * CHUNK; key < smaller(p->keys, (chunk + 1) * CHUNK); key += WIDE)
        for (int i = 0; i < p->d; i += SIDE) {
            Word lines[SIDE * SIDE];
            __mmask16 inside = (__mmask16)((1u << smaller(SIDE, larger(0, a->d - i))) - 1);
            for (int j = 0; j < SIDE; j++) {
                const float *v = a->v + (key + 2 * j) * a->kv_stride + (size_t)head * a->d + i;
                __m512 first = _mm512_maskz_loadu_ps(key + 2 * j < a->keys ? inside : 0, v);
                __m512 second = _mm512_maskz_loadu_ps(key + 2 * j + 1 < a->keys ? inside : 0, v + a->kv_stride);
                _mm512_storeu_si512(lines + j * SIDE, pairs_of(first, second));
            }
            kernels->transpose((Word *)(out + (size_t)i * p->value_stride) + (key % CHUNK) / 2,
                               p->value_stride / sizeof(Word), lines, SIDE, SIDE, SIDE);
        }
}

/* ---------------------------------------------------------------- one panel of queries and one chunk of keys */

/* 2^x for x <= 0; 0 where x is below -150. NaN stays NaN. */
static inline TARGET __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(0.00958104711f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0559059717f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.240241453f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.693124354f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

static void add_bias(const Attention *a, float *scores, int head, int query, int first, int keys) {
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < smaller(WIDE, a->queries - query); i++) {
            float *score = scores + j * WIDE + i;
            *score = *score * a->scale + a->bias[head * a->bias_head + (query + i) * a->bias_query + first + j];
        }
}

/* 16 queries: scores [keys][WIDE] to weights; rescales what was summed, out [d][WIDE]. NaN in a score may be lost from
 * `highest`, but its weight is NaN, and so is the sum. */
static TARGET void soften(float *out, int d, float *maximum, float *sum, uint16_t *weights, const float *scores,
                          int keys, float scale) {
    __m512 before = _mm512_loadu_ps(maximum), highest = before, factor = _mm512_set1_ps(scale * 1.44269504f);
    for (int j = 0; j < keys; j++) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + j * WIDE));
    __m512 total = _mm512_loadu_ps(sum);
    if (_mm512_cmp_ps_mask(highest, before, _CMP_NEQ_UQ)) {
        __m512 rescale = power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, highest), factor));
        total = _mm512_mul_ps(total, rescale);
        for (float *row = out; row < out + d * WIDE; row += WIDE)
            _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), rescale));
        _mm512_storeu_ps(maximum, highest);
    }
    for (int j = 0; j < round_up(keys, WIDE); j += 2) {
        __m512 weight[2];
        for (int k = 0; k < 2; k++) {
            weight[k] = _mm512_setzero_ps();
            __m512 below = _mm512_sub_ps(_mm512_loadu_ps(scores + (j + k) * WIDE), highest);
            if (j + k < keys) weight[k] = power_of_two(_mm512_mul_ps(below, factor));
            total = _mm512_add_ps(total, weight[k]);
        }
        _mm512_storeu_si512(weights + j * WIDE, pairs_of(weight[0], weight[1]));
    }
    _mm512_storeu_ps(sum, total);
}

static void attend_chunk(const Plan *p, const Block *b, int head, int query, int panel, int chunk) {
    const Attention *a = p->a;
    const Ahead nothing = {.at = p->packed, .run = 1 << 30};
    const char *keys = p->packed + (size_t)head * p->head_size + (size_t)(chunk * CHUNK) * p->key_stride;
    const char *values = p->packed + (size_t)head * p->head_size + p->keys_size + (size_t)chunk * p->chunk_size;
    const char *queries = b->queries + (size_t)panel * p->d * WIDE * sizeof(uint16_t);
    float *out = b->out + panel * p->d * WIDE, *maximum = b->maximum + panel * WIDE, *sum = b->sum + panel * WIDE;
    int n = smaller(CHUNK, a->keys - chunk * CHUNK), padded = round_up(n, WIDE);
    for (int i = 0; i < padded; i += WIDE)
        amx_tile_bf16(b->scores + i * WIDE, WIDE, REPLACE, &(Span){keys + i * p->key_stride, p->key_stride, p->d}, 1,
                      queries, nothing);
    if (a->bias) add_bias(a, b->scores, head, query + panel * WIDE, chunk * CHUNK, n);
    for (int i = 0; i < WIDE; i += SIDE)
        soften(out + i, p->d, maximum + i, sum + i, b->weights + 2 * i, b->scores + i, n, a->bias ? 1 : a->scale);
    for (int i = 0; i < p->d; i += WIDE)
        amx_tile_bf16(out + i * WIDE, WIDE, ACCUMULATE, &(Span){values + i * p->value_stride, p->value_stride, padded},
                      1, b->weights, nothing);
}

/* ---------------------------------------------------------------- a task */

static void attend(const Plan *p, Block b, int head, int query) {
    const Attention *a = p->a;
    int queries = smaller(BLOCK_PANELS * WIDE, a->queries - query), panels = ceiling(queries, WIDE);
    Weight q = {a->q + query * a->q_stride + (size_t)head * a->d, TYPE_F32, queries, (int)a->q_stride};
    for (int i = 0; i < panels; i++)
        pack_panel(BF16, b.queries + (size_t)i * p->d * WIDE * sizeof(uint16_t), &q, i * WIDE, 0, a->d);
    memset(b.out, 0, sizeof(float) * (size_t)(panels * p->d * WIDE));
    for (int i = 0; i < panels * WIDE; i++) b.maximum[i] = -FLT_MAX, b.sum[i] = 0;
    amx_enter();
    for (int chunk = 0; chunk < p->chunks; chunk++)
        for (int i = 0; i < panels; i++) attend_chunk(p, &b, head, query, i, chunk);
    amx_leave();
    for (int i = 0; i < queries; i++) {
        float *y = a->out + (query + i) * a->out_stride + (size_t)head * a->d;
        const float *out = b.out + i / WIDE * p->d * WIDE + i % WIDE;
        for (int j = 0; j < a->d; j++) y[j] = out[j * WIDE] / b.sum[i];
    }
}

void amx_attention(const Attention *a) {
    if (a->precision != BF16) {
        attention_in_tiles(a);
        return;
    }
    Plan p = make_plan(a);
    size_t packed = p.head_size * (size_t)a->heads, each = block_bytes(p.d);
    int blocks = ceiling(a->queries, BLOCK_PANELS * WIDE);
    p.packed = scratch(amx_attention_memory(BF16, a->keys, a->heads, a->d));
    PARALLEL_FOR (int i = 0; i < a->heads * p.chunks; i++) {
        pack_keys(&p, i / p.chunks, i % p.chunks);
        pack_values(&p, i / p.chunks, i % p.chunks);
    }
    PARALLEL_FOR (int i = 0; i < a->heads * blocks; i++) {
        Arena arena = {.base = p.packed + packed + each * (size_t)thread_index(), .size = each};
        attend(&p, take_block(&arena, p.d), i / blocks, i % blocks * BLOCK_PANELS * WIDE);
    }
}
#endif
