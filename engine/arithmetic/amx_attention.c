/* amx_attention.c - attention in bfloat16, in the tiles of AMX. What it computes is in attention.c.
 *
 * Both products are transposed, so that queries lie side by side, 16 in a register:
 *
 *   scores (keys, 32) = k @ q^T          rows: keys              panel: 32 queries
 *   out (d, 32)      += v^T @ weights    rows: v transposed      panel: the exponentials of the scores
 *
 * Then the sum of a query's weights needs nothing from neighbouring lanes, and two rows of weights, narrowed and
 * interleaved, are a line of a panel. Keys come in chunks, which stay in the second-level cache while the queries of a
 * block pass by:
 *
 *   for each task, a head and a block of queries:               one thread
 *     for each chunk of keys:
 *       for each panel of 32 queries:
 *         for each 32 keys of the chunk:  scores = k @ q^T;  weights = exp(scores - maximum);  sums += weights
 *         out += v^T @ weights
 *     divide by the sums, transpose, write
 *
 * `maximum` is subtracted so that exp() does not overflow. It need not be the highest score. It starts as the highest
 * of the first 32 that are not all hidden. If 32 later weights of a query add up to more than MOST, the values of the
 * keys before them are added to `out`, `out` and the sum are multiplied by exp(old - new), and the 32 weights are
 * computed again.
 *
 * exp(x) is 2^n 2^r, where n + r = x log2 e and 0 <= r < 1; 2^r is a polynomial in r, whose error is below 3e-6.
 * Weights are then rounded to 8 bits, and it is these that are summed. */
#include "engine/engine.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <immintrin.h>
#include <math.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512bf16")))

enum { SIDE = 16, WIDE = 2 * SIDE, CHUNK = 512, BLOCK_PANELS = 8 };
static const float MOST = 0x1p32f, LOWEST = -FLT_MAX; /* LOWEST: the maximum before the first key */
static const Ahead nothing = {.at = "", .run = 1 << 30};

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
    p.key_stride = CACHE_LINE * (size_t)(p.d / WIDE | 1); /* odd numbers of lines: see packed_bytes() */
    p.value_stride = CACHE_LINE * (CHUNK / WIDE | 1);
    p.keys_size = p.key_stride * (size_t)p.keys;
    p.chunk_size = p.value_stride * (size_t)p.d;
    p.head_size = p.keys_size + p.chunk_size * (size_t)p.chunks;
    return p;
}

/* A block of queries. The first two lines are for each panel, and last from chunk to chunk. The others are for the
 * panel at hand: scores of 32 keys and of the next 32, weights of a chunk. */
typedef struct {
    char *queries;              /* a panel of d */
    float *out, *maximum, *sum; /* [d][WIDE], [WIDE], [WIDE] */
    float *scores;              /* [2][WIDE][WIDE] */
    uint16_t *weights;          /* a panel of CHUNK */
} Block;

static Block take_block(Arena *arena, int d) {
    size_t width = (size_t)d, panel = sizeof(uint16_t) * WIDE * width;
    return (Block){.queries = arena_take(arena, BLOCK_PANELS * panel),
                   .out = arena_floats(arena, BLOCK_PANELS * WIDE * width),
                   .maximum = arena_floats(arena, BLOCK_PANELS * WIDE),
                   .sum = arena_floats(arena, BLOCK_PANELS * WIDE),
                   .scores = arena_floats(arena, 2 * WIDE * WIDE),
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

/* 2^x; 0 where x is below -150; NaN stays NaN. A polynomial gives 2^r, where x = n + r and 0 <= r < 1 (r is 0 for
 * -infinity). VSCALEFPS multiplies by 2^n. */
static inline TARGET __m512 power_of_two(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0.0135410074f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0519984066f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.241450161f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.693002701f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.00000262f));
    return _mm512_scalef_ps(y, x);
}

/* A panel of a head's queries, beginning with number `query`, and a chunk of keys, beginning with number `key`. */
typedef struct {
    const Plan *plan;
    int head, query, key, keys; /* keys: how many */
    const char *packed_keys, *packed_values;
    const char *queries;        /* a panel of d */
    float *out, *maximum, *sum; /* [d][WIDE], [WIDE], [WIDE] */
    uint16_t *weights;          /* a panel of the chunk's keys */
    float factor;               /* weight = 2^(factor * (score - maximum)) */
} Panel;

/* scores [WIDE keys][WIDE queries] of the keys from `from` on; past the last key -infinity */
static void score(const Panel *p, float *scores, int from) {
    const Attention *a = p->plan->a;
    const Span keys = {p->packed_keys + from * p->plan->key_stride, p->plan->key_stride, p->plan->d};
    amx_tile_bf16(scores, WIDE, REPLACE, &keys, 1, p->queries, nothing);
    for (int j = 0; a->bias && j < smaller(WIDE, p->keys - from); j++)
        for (int i = 0; i < smaller(WIDE, a->queries - p->query); i++) {
            const float *bias = a->bias + p->head * a->bias_head + (p->query + i) * a->bias_query + p->key + from;
            scores[j * WIDE + i] = scores[j * WIDE + i] * a->scale + bias[j];
        }
    for (int i = (p->keys - from) * WIDE; i < WIDE * WIDE; i++) scores[i] = -INFINITY;
}

/* The weights of scores, which are added to the sums. If maxima are too low, returns whose, and adds nothing. */
static TARGET uint32_t soften(const Panel *p, const float *scores, int from) {
    uint16_t *weights = p->weights + from * WIDE;
    __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    __m512 factor = _mm512_set1_ps(p->factor), most = _mm512_set1_ps(MOST);
    __m512 maximum[2] = {_mm512_loadu_ps(p->maximum), _mm512_loadu_ps(p->maximum + SIDE)};
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int j = 0; j < WIDE; j += 2)
        for (int half = 0; half < 2; half++) {
            __m512 first = _mm512_loadu_ps(scores + j * WIDE + half * SIDE);
            __m512 second = _mm512_loadu_ps(scores + (j + 1) * WIDE + half * SIDE);
            first = power_of_two(_mm512_mul_ps(_mm512_sub_ps(first, maximum[half]), factor));
            second = power_of_two(_mm512_mul_ps(_mm512_sub_ps(second, maximum[half]), factor));
            __m512i pairs = pairs_of(first, second);
            sum[half] = _mm512_dpbf16_ps(sum[half], (__m512bh)pairs, ones);
            _mm512_storeu_si512(weights + (j + half) * WIDE, pairs);
        }
    uint32_t low = _mm512_cmp_ps_mask(sum[0], most, _CMP_GT_OQ);
    low |= (uint32_t)_mm512_cmp_ps_mask(sum[1], most, _CMP_GT_OQ) << SIDE;
    if (low) return low;
    for (int half = 0; half < 2; half++) {
        float *total = p->sum + half * SIDE;
        _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), sum[half]));
    }
    return 0;
}

/* Raises the maxima that are too low to those of scores, and rescales what was summed under them. */
static TARGET void raise_maxima(const Panel *p, const float *scores, uint32_t low) {
    for (int i = 0; i < WIDE; i += SIDE, low >>= SIDE) {
        __m512 before = _mm512_loadu_ps(p->maximum + i), highest = before, factor = _mm512_set1_ps(p->factor);
        for (int j = 0; j < WIDE; j++)
            highest = _mm512_mask_max_ps(highest, (__mmask16)low, highest, _mm512_loadu_ps(scores + j * WIDE + i));
        __m512 rescale = power_of_two(_mm512_mul_ps(_mm512_sub_ps(before, highest), factor));
        rescale = _mm512_mask_mov_ps(_mm512_set1_ps(1), (__mmask16)low, rescale);
        for (float *row = p->out + i; row < p->out + p->plan->d * WIDE; row += WIDE)
            _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), rescale));
        _mm512_storeu_ps(p->sum + i, _mm512_mul_ps(_mm512_loadu_ps(p->sum + i), rescale));
        _mm512_storeu_ps(p->maximum + i, highest);
    }
}

/* out += the values of keys [from, to), times their weights */
static void add_values(const Panel *p, int from, int to) {
    size_t stride = p->plan->value_stride;
    for (int i = 0; i < p->plan->d && from < to; i += WIDE) {
        const Span values = {p->packed_values + i * stride + sizeof(uint16_t) * (size_t)from, stride, to - from};
        amx_tile_bf16(p->out + i * WIDE, WIDE, ACCUMULATE, &values, 1, p->weights + from * WIDE, nothing);
    }
}

/* The next 32 scores are computed before these are softened: the processor does both at once. */
static void attend_chunk(const Panel *p, float *scores) {
    int keys = round_up(p->keys, WIDE), pending = 0; /* the first key whose value is still to be added */
    score(p, scores, 0);
    for (int from = 0; from < keys; from += WIDE) {
        float *now = scores + from % (2 * WIDE) * WIDE, *next = scores + (from + WIDE) % (2 * WIDE) * WIDE;
        if (from + WIDE < keys) score(p, next, from + WIDE);
        uint32_t low = soften(p, now, from);
        if (!low) continue;
        add_values(p, pending, from);
        pending = from;
        raise_maxima(p, now, low);
        soften(p, now, from);
    }
    add_values(p, pending, keys);
}

/* ---------------------------------------------------------------- a task */

static Panel panel_of(const Plan *p, const Block *b, int head, int query, int panel, int chunk) {
    const Attention *a = p->a;
    const char *keys = p->packed + (size_t)head * p->head_size, *values = keys + p->keys_size;
    return (Panel){.plan = p, .head = head, .query = query + panel * WIDE,
                   .key = chunk * CHUNK, .keys = smaller(CHUNK, a->keys - chunk * CHUNK),
                   .packed_keys = keys + (size_t)(chunk * CHUNK) * p->key_stride,
                   .packed_values = values + (size_t)chunk * p->chunk_size,
                   .queries = b->queries + (size_t)panel * p->d * WIDE * sizeof(uint16_t),
                   .out = b->out + panel * p->d * WIDE, .maximum = b->maximum + panel * WIDE,
                   .sum = b->sum + panel * WIDE, .weights = b->weights,
                   .factor = 1.44269504f * (a->bias ? 1 : a->scale)};
}

static void attend(const Plan *p, Block b, int head, int query) {
    const Attention *a = p->a;
    int queries = smaller(BLOCK_PANELS * WIDE, a->queries - query), panels = ceiling(queries, WIDE);
    Weight q = {a->q + query * a->q_stride + (size_t)head * a->d, TYPE_F32, queries, (int)a->q_stride};
    for (int i = 0; i < panels; i++)
        pack_panel(BF16, b.queries + (size_t)i * p->d * WIDE * sizeof(uint16_t), &q, i * WIDE, 0, a->d);
    memset(b.out, 0, sizeof(float) * (size_t)(panels * p->d * WIDE));
    for (int i = 0; i < panels * WIDE; i++) b.maximum[i] = LOWEST, b.sum[i] = 0;
    amx_enter();
    for (int chunk = 0; chunk < p->chunks; chunk++)
        for (int i = 0; i < panels; i++) {
            Panel panel = panel_of(p, &b, head, query, i, chunk);
            attend_chunk(&panel, b.scores);
        }
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
