/* naive.c - the operations of this folder as simple loops: `--isa naive`.
 *
 * This file is the specification, bit for bit. The other tables (product.c, attention.c, kernel_body.h) compute many
 * results at once and in another order, but each single result with the same roundings. test_kernels.c compares them
 * with these loops. The order of additions matters in three places:
 *
 *   product     sum = fma(x[k], w[k], sum) for k = 0, 1, 2, ...
 *   row sum     16 lanes: element i is added to lane i % 16; lanes_sum() adds the lanes
 *   attention   tiles of 128 keys; if a tile raises the maximum score, the sums so far are rescaled
 *
 * Every other operator rounds once. NaN and infinity propagate as in the formulas. bfloat16 can hold both. An INT8
 * chunk with NaN or infinity gets the scale NaN. */
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>

/* ---------------------------------------------------------------- products */

/* A row of INT8 consists of chunks. The last one may be shorter. */
typedef struct {
    float scale;
    char unused[SCALE_BYTES - sizeof(float)];
    int8_t bytes[INT8_CHUNK];
} Chunk;

/* sum + a . b, where a and b are row operands of n elements (panel.c). */
static float dot(Precision precision, float sum, const void *a, const void *b, int n) {
    const float *x = a, *y = b;
    const uint16_t *narrow_x = a, *narrow_y = b;
    const Chunk *p = a, *q = b;
    if (precision == F32)
        for (int k = 0; k < n; k++) sum = fmaf(x[k], y[k], sum);
    if (precision == BF16)
        for (int k = 0; k < n; k++) sum = fmaf(float_of_bf16(narrow_x[k]), float_of_bf16(narrow_y[k]), sum);
    if (precision == INT8)
        for (; n > 0; n -= INT8_CHUNK, p++, q++) {
            int exact = 0;
            for (int k = 0; k < smaller(n, INT8_CHUNK); k++) exact += p->bytes[k] * q->bytes[k];
            sum = fmaf((float)exact, p->scale * q->scale, sum);
        }
    return sum;
}

/* y (L,O) = or += x (L,I) @ w^T (O,I) + bias (O). A row of x is one segment. In a convolution it is one segment for
 * each tap: the channels of a pixel. */
static void naive_product(float *y, const Rows *x, const Linear *layer, int mode, char *memory) {
    int O = layer->weight.rows, n = x->n;
    size_t bytes = row_bytes(layer->precision, n);
    (void)memory;
    PARALLEL_FOR (int o = 0; o < O; o++) {
        float *floats = allocate(sizeof(float) * (size_t)layer->weight.cols);
        char *w = allocate(bytes * (size_t)x->segments);
        weight_row(&layer->weight, o, floats);
        for (int s = 0; s < x->segments; s++)
            narrow_row(layer->precision, w + s * bytes, floats + (x->skip + s) * n, n);
        for (int r = 0; r < x->rows; r++) {
            float sum = 0, *out = y + (size_t)r * O + o;
            for (int s = 0; s < x->segments; s++)
                sum = dot(layer->precision, sum, rows_locate(x, r, 1, s).at, w + s * bytes, n);
            if (layer->bias) sum += layer->bias[o];
            *out = mode == ACCUMULATE ? *out + sum : sum;
        }
        free(floats), free(w);
    }
}

/* ---------------------------------------------------------------- attention */

/* exp(x) = 2^n exp(r), where x = n ln 2 + r and exp(r) is the polynomial of Cephes' expf. The error is about 1 ulp. The
 * result is 0 for n < -126, where it would be subnormal. x is limited to 88.3. */
static float exponential(float x) {
    static const float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                              4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    x = x < -88.03f ? -88.03f : x > 88.3f ? 88.3f : x;
    float n = rintf(x * 1.44269504f), p = c[0];
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
    for (int i = 1; i < 6; i++) p = fmaf(p, r, c[i]);
    p = fmaf(r * r, p, r) + 1.0f;
    return n >= -126.0f ? ldexpf(p, (int)n) : p * 0.0f; /* NaN * 0 is NaN */
}

static float rounded(Precision precision, float x) {
    return precision == BF16 ? float_of_bf16(bf16_of(x)) : x;
}

/* out (d) of one query of one head. */
static void attend(const Attention *a, int head, int query) {
    Precision precision = a->precision;
    const float *q = a->q + query * a->q_stride + head * a->d, *bias = NULL;
    float *out = a->out + query * a->out_stride + head * a->d, sums[LANES] = {0}, maximum = -FLT_MAX;
    if (a->bias) bias = a->bias + head * a->bias_head + query * a->bias_query;
    for (int i = 0; i < a->d; i++) out[i] = 0;
    for (int first = 0; first < a->keys; first += TILE_KEYS) {
        int n = smaller(TILE_KEYS, a->keys - first);
        float scores[TILE_KEYS], before = maximum;
        for (int j = 0; j < n; j++) {
            const float *k = a->k + (first + j) * a->kv_stride + head * a->d;
            float sum = 0;
            for (int i = 0; i < a->d; i++)
                sum = fmaf(rounded(precision, q[i]), rounded(precision, k[i]), sum);
            scores[j] = bias ? sum * a->scale + bias[first + j] : sum * a->scale;
            if (scores[j] > maximum) maximum = scores[j];
        }
        float rescale = exponential(before - maximum);
        for (int i = 0; i < LANES; i++) sums[i] *= rescale;
        for (int i = 0; i < a->d; i++) out[i] *= rescale;
        for (int j = 0; j < n; j++) {
            const float *v = a->v + (first + j) * a->kv_stride + head * a->d;
            float p = exponential(scores[j] - maximum);
            sums[j % LANES] += p;
            for (int i = 0; i < a->d; i++)
                out[i] = fmaf(rounded(precision, p), rounded(precision, v[i]), out[i]);
        }
    }
    float total = lanes_sum(sums);
    for (int i = 0; i < a->d; i++) out[i] /= total;
}

static void naive_attention(const Attention *a) {
    PARALLEL_FOR (int i = 0; i < a->heads * a->queries; i++) attend(a, i / a->queries, i % a->queries);
}

/* ---------------------------------------------------------------- rows */

float lanes_sum(const float lanes[LANES]) {
    float sum[LANES];
    memcpy(sum, lanes, sizeof sum);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

static float sum(const float *x, int n) {
    float lanes[LANES] = {0};
    for (int i = 0; i < n; i++) lanes[i % LANES] += x[i];
    return lanes_sum(lanes);
}

static float sum_squares(const float *x, int n, float center) {
    float lanes[LANES] = {0};
    for (int i = 0; i < n; i++) lanes[i % LANES] = fmaf(x[i] - center, x[i] - center, lanes[i % LANES]);
    return lanes_sum(lanes);
}

static void naive_rms_norm(float *y, const float *x, int n, const float *gain, float eps) {
    float factor = 1.0f / sqrtf(sum_squares(x, n, 0) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

/* As torch's F.normalize: divides by max(norm, 1e-12). */
static void naive_l2_norm(float *y, const float *x, int n, const float *gain) {
    float norm = sqrtf(sum_squares(x, n, 0)), factor = sqrtf((float)n) / (norm < 1e-12f ? 1e-12f : norm);
    for (int i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

static void naive_layer_norm(float *y, const float *x, int n, float eps, const float *scale,
                             const float *shift) {
    float mean = sum(x, n) / (float)n, factor = 1.0f / sqrtf(sum_squares(x, n, mean) / (float)n + eps);
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * scale[i] + shift[i];
}

static void naive_silu(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = x[i] / (1.0f + exponential(-x[i]));
}

/* 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). */
static void naive_gelu(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float cubic = fmaf(x[i] * x[i] * x[i], 0.044715f, x[i]);
        y[i] = x[i] / (1.0f + exponential(cubic * -1.59576912f));
    }
}

/* ---------------------------------------------------------------- narrow numbers */

static void naive_to_bf16(uint16_t *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = bf16_of(x[i]);
}

static void naive_from_f16(float *y, const uint16_t *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = float_of_f16(x[i]);
}

static void naive_from_bf16(float *y, const uint16_t *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = float_of_bf16(x[i]);
}

/* x = about scale * bytes, scale = max |x| / 127. If 127 / max |x| overflows, all bytes are 0. If x holds NaN or
 * infinity, all bytes are 0 and the scale is NaN. */
static float naive_quantize(uint8_t *bytes, const float *x, int n, int *sum) {
    float largest = 0;
    for (int k = 0; k < n; k++) largest = fmaxf(largest, isnan(x[k]) ? INFINITY : fabsf(x[k]));
    float factor = 127.0f / largest;
    *sum = 0;
    for (int k = 0; k < n; k++) {
        int value = factor > 0 && factor < INFINITY ? (int)rintf(x[k] * factor) : 0;
        bytes[k] = (uint8_t)value;
        *sum += value;
    }
    return largest < INFINITY ? largest / 127.0f : NAN;
}

static float naive_multiply_add(float a, float b, float c) { return a * b + c; }

const Kernels naive_table = {
    .name = "naive",
    .fast = {true, false, false},
    .product = naive_product,
    .attention = naive_attention,
    .attention_memory = tiles_attention_memory,
    .rms_norm_row = naive_rms_norm,
    .l2_norm_row = naive_l2_norm,
    .layer_norm_row = naive_layer_norm,
    .silu = naive_silu,
    .gelu = naive_gelu,
    .from_f16 = naive_from_f16,
    .from_bf16 = naive_from_bf16,
    .to_bf16 = naive_to_bf16,
    .quantize = naive_quantize,
    /* product_memory() and attention_memory() count a tile as one result */
    .tile = {{NULL, 1, INT8_CHUNK, INT8_CHUNK, 1}, {NULL, 1, INT8_CHUNK, INT8_CHUNK, 1},
             {NULL, 1, INT8_CHUNK, INT8_CHUNK, 4}},
    .tile_cols = 1,
    .multiply_add = naive_multiply_add,
};
