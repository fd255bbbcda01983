/* test_kernels.c - products and attention against their specification, and the numeric contract: the same
 * bits from every instruction set and every number of threads. */
#include "engine/engine.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const isas[] = {"generic", "avx2", "avx512", "neon"};

static float *random_floats(size_t n, uint64_t seed) {
    Generator generator;
    float *x = allocate(n * sizeof *x);
    generator_seed(&generator, seed);
    generator_randn(&generator, x, n);
    return x;
}

/* Calls `compute` under every table that runs here, with 1 and 3 threads,
 * and wants the same n floats each time. */
static void same_everywhere(const char *what, size_t n, void (*compute)(void *, float *), void *with,
                            float *result) {
    float *again = allocate(n * sizeof *again);
    int threads = threads_count();
    kernels_choose("generic");
    threads_set(1);
    compute(with, result);
    for (int i = 0; i < 4; i++)
        for (int t = 1; t <= 3; t += 2) {
            if (kernels_choose(isas[i])) continue;
            threads_set(t);
            memset(again, 0xff, n * sizeof *again);
            compute(with, again);
            CHECK(!memcmp(again, result, n * sizeof *again), "%s: %s with %d threads differs from generic",
                  what, isas[i], t);
        }
    kernels_choose("auto");
    threads_set(threads);
    free(again);
}

/* What a precision may be off by, relative to the largest value, when random numbers are multiplied: bytes
 * only, since bfloat16 is compared with the specification on rounded numbers. */
static const double allowed[PRECISIONS] = {0, 0, 1.5e-2};

/* ---------------------------------------------------------------- products */

typedef struct {
    int L, I, O;
    const float *x;
    Linear layer;
} Product;

static void compute_linear(void *with, float *y) {
    const Product *p = with;
    linear(y, p->x, p->L, &p->layer);
}

static float rounded(Precision precision, float x) {
    uint16_t narrow;
    if (precision != BF16) return x;
    kernels->to_bf16(&narrow, &x, 1);
    kernels->from_bf16(&x, &narrow, 1);
    return x;
}

/* The specification, to the bit: one chain of fused multiply-adds, then the bias. */
static void specify_linear(const Product *p, const float *w, float *y) {
    Precision precision = p->layer.precision;
    for (int l = 0; l < p->L; l++)
        for (int o = 0; o < p->O; o++) {
            const float *x = p->x + (size_t)l * p->I, *column = w + (size_t)o * p->I;
            float sum = 0;
            for (int k = 0; k < p->I; k++)
                sum = fmaf(rounded(precision, x[k]), rounded(precision, column[k]), sum);
            y[(size_t)l * p->O + o] = p->layer.bias ? sum + p->layer.bias[o] : sum;
        }
}

static void check_linear(Precision precision, int L, int I, int O, bool bias) {
    size_t n = (size_t)L * O;
    float *x = random_floats((size_t)L * I, 1), *w = random_floats((size_t)O * I, 2),
          *b = random_floats(O, 3);
    float *y = allocate(n * sizeof *y), *expected = allocate(n * sizeof *y);
    Product p = {L, I, O, x, {{w, TYPE_F32, O, I}, bias ? b : NULL, precision}};
    char what[64];
    snprintf(what, sizeof what, "%s linear %dx%d @ %d", precision_name(precision), L, I, O);
    same_everywhere(what, n, compute_linear, &p, y);
    specify_linear(&p, w, expected);
    double error = relative_error(y, expected, n);
    CHECK(error <= allowed[precision], "%s: relative error %.2e", what, error);
    free(x), free(w), free(b), free(y), free(expected);
}

/* Narrow weights are widened exactly, so the product is that of the widened ones. */
static void check_narrow(Type type) {
    enum { L = 5, I = 96, O = 37 };
    uint8_t *bytes = allocate(type_bytes(type, I * O));
    float *w = allocate(sizeof(float) * I * O), *x = random_floats(L * I, 4), y[L * O], expected[L * O];
    Generator generator;
    generator_seed(&generator, 5);
    for (size_t i = 0; i < type_bytes(type, I * O); i++)
        bytes[i] = (uint8_t)(generator_next(&generator) >> 7 & 0xbf);
    convert_to_floats(w, bytes, type, I * O);
    Product p = {L, I, O, x, {{bytes, type, O, I}, NULL, F32}};
    compute_linear(&p, y);
    specify_linear(&p, w, expected);
    CHECK(!memcmp(y, expected, sizeof y), "a product with %s weights differs from that with widened ones",
          type_name(type));
    free(bytes), free(w), free(x);
}

/* ---------------------------------------------------------------- attention */

static void compute_attention(void *with, float *out) {
    Attention a = *(const Attention *)with;
    a.out = out;
    attention(&a);
}

static void specify_attention(const Attention *a, float *out) {
    double *p = allocate(sizeof *p * (size_t)a->keys);
    for (int h = 0; h < a->heads; h++)
        for (int i = 0; i < a->queries; i++) {
            double highest = -1e300, total = 0;
            for (int j = 0; j < a->keys; j++) {
                p[j] = 0;
                for (int k = 0; k < a->d; k++)
                    p[j] += (double)a->q[i * a->q_stride + h * a->d + k] *
                            a->k[j * a->kv_stride + h * a->d + k];
                p[j] = p[j] * a->scale + (a->bias ? a->bias[h * a->bias_head + i * a->bias_query + j] : 0);
                highest = fmax(highest, p[j]);
            }
            for (int j = 0; j < a->keys; j++) total += p[j] = exp(p[j] - highest);
            for (int k = 0; k < a->d; k++) {
                double sum = 0;
                for (int j = 0; j < a->keys; j++) sum += p[j] * a->v[j * a->kv_stride + h * a->d + k];
                out[i * a->out_stride + h * a->d + k] = (float)(sum / total);
            }
        }
    free(p);
}

static void check_attention(Precision precision, int queries, int keys, int heads, int d, bool bias) {
    size_t width = (size_t)heads * d, n = queries * width, longest = (size_t)queries + keys;
    float *q = random_floats(n, 6), *k = random_floats(keys * width, 7), *v = random_floats(keys * width, 8);
    float *b = random_floats(heads * longest, 9), *y = allocate(n * sizeof *y),
          *expected = allocate(n * sizeof *y);
    Attention a = {.precision = precision, .q = q, .k = k, .v = v, .queries = queries, .keys = keys,
                   .heads = heads, .d = d, .q_stride = width, .kv_stride = width, .out_stride = width,
                   .scale = 0.7f};
    if (bias) a.bias = b + queries - 1, a.bias_head = (ptrdiff_t)longest, a.bias_query = -1;
    char what[64];
    snprintf(what, sizeof what, "%s attention %dx%d, %d heads of %d", precision_name(precision), queries,
             keys, heads, d);
    same_everywhere(what, n, compute_attention, &a, y);
    specify_attention(&a, expected);
    double error = relative_error(y, expected, n);
    CHECK(error < (precision == F32 ? 2e-6 : 2e-2), "%s: relative error %.2e", what, error);
    free(q), free(k), free(v), free(b), free(y), free(expected);
}

/* ---------------------------------------------------------------- rows */

static void compute_rows(void *with, float *y) {
    enum { L = 3, N = 67 };
    const float *x = with, *gain = x + L * N, *shift = gain + N;
    rms_norm(y, x, L, N, gain, 1e-6f);
    l2_norm(y + L * N, x, L, N, gain);
    layer_norm(y + 2 * L * N, x, L, N, 1e-6f, gain, shift, L);
    silu(y + 3 * L * N, x, L * N);
    gelu(y + 4 * L * N, x, L * N);
}

static void check_rows(void) {
    enum { L = 3, N = 67 };
    float *x = random_floats((L + 2) * N, 10), *y = allocate(sizeof(float) * 5 * L * N);
    same_everywhere("norms and activations", 5 * L * N, compute_rows, x, y);
    for (int i = 0; i < L * N; i++) {
        double z = x[i], s = z / (1 + exp(-z));
        double g = 0.5 * z * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
        CHECK(fabs(y[3 * L * N + i] - s) <= 3e-7 * fmax(1, fabs(s)), "silu(%g) = %g, not %g", z,
              y[3 * L * N + i], s);
        CHECK(fabs(y[4 * L * N + i] - g) <= 3e-7 * fmax(1, fabs(g)), "gelu(%g) = %g, not %g", z,
              y[4 * L * N + i], g);
    }
    free(x), free(y);
}

/* Far out the activations are their limits, and nothing overflows or becomes not-a-number. */
static void check_extremes(void) {
    float x[] = {-1e30f, -200.0f, -90.0f, 0.0f, 90.0f, 200.0f, 1e30f}, y[7];
    silu(y, x, 7);
    for (int i = 0; i < 7; i++)
        CHECK(fabsf(y[i] - fmaxf(x[i], 0)) < 1e-7f * fmaxf(1.0f, fabsf(x[i])), "silu(%g) = %g", x[i], y[i]);
    gelu(y, x, 7);
    for (int i = 0; i < 7; i++)
        CHECK(fabsf(y[i] - fmaxf(x[i], 0)) < 1e-7f * fmaxf(1.0f, fabsf(x[i])), "gelu(%g) = %g", x[i], y[i]);
}

void test_kernels(void) {
    int sizes[][3] = {{1, 1, 1}, {1, 300, 7}, {13, 24, 33}, {14, 512, 32}, {113, 513, 65}, {40, 1030, 96}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int p = 0; p < PRECISIONS; p++)
            check_linear((Precision)p, sizes[i][0], sizes[i][1], sizes[i][2], i % 2);
    check_narrow(TYPE_F16);
    check_narrow(TYPE_BF16);
    check_narrow(TYPE_Q8_0);
    for (int p = F32; p <= BF16; p++) {
        check_attention((Precision)p, 1, 1, 1, 2, false);
        check_attention((Precision)p, 17, 40, 3, 24, true);
        check_attention((Precision)p, 75, 129, 2, 40, false);
        check_attention((Precision)p, 3, 513, 1, 130, true);
    }
    check_rows();
    check_extremes();
}
