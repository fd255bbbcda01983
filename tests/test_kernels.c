/* test_kernels.c - compares each table of kernels that this processor supports with naive.c, bit for bit, with 1 and 3
 * threads; and naive.c with the formulas in double precision. */
#include "engine/engine.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>

static float *random_floats(size_t n, uint64_t seed) {
    Generator generator;
    float *x = allocate(n * sizeof *x);
    generator_seed(&generator, seed);
    generator_randn(&generator, x, n);
    return x;
}

/* Whether all values have equal bits, are both NaN, or differ by at most slack * (largest finite value). */
static bool agree(const float *a, const float *b, size_t n, float slack) {
    float largest = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(b[i])) largest = fmaxf(largest, fabsf(b[i]));
    for (size_t i = 0; i < n; i++)
        if (bits_of(a[i]) != bits_of(b[i]) && !(isnan(a[i]) && isnan(b[i])) &&
            !(fabsf(a[i] - b[i]) <= slack * largest))
            return false;
    return true;
}

/* Instructions that multiply pairs of bfloat16 add in the processor's own order, so the result is not bit-exact. A last
 * bit of a score may turn the last bit of a rounded exponential. AMX rounds other exponentials, relative to another
 * score than the highest: the largest is not exactly 1. check_order() is exact. */
static float slack_of(Precision precision) {
    static const float slack[] = {[RISING] = 0, [PAIRS] = 1e-3f, [AMX_TILES] = 3e-3f};
    return precision == BF16 ? slack[kernels->order_of_bf16] : 0;
}

/* Calls `compute` with every table and 1 and 3 threads. Each time it must give the same n floats as naive. */
static void same_everywhere(const char *what, Precision precision, size_t n, void (*compute)(void *, float *),
                            void *with, float *result) {
    float *again = allocate(n * sizeof *again);
    int threads = threads_count();
    kernels_choose("naive");
    compute(with, result);
    FOR_TABLES(name)
        for (int t = 1; t <= 3; t += 2) {
            threads_set(t);
            memset(again, 0xff, n * sizeof *again);
            compute(with, again);
            CHECK(agree(again, result, n, slack_of(precision)), "%s: %s with %d threads differs from naive",
                  what, name, t);
        }
    kernels_choose("auto");
    threads_set(threads);
    free(again);
}

/* The allowed error of naive against double precision, relative to the largest value. It comes from rounding the
 * factors. */
static const double allowed[PRECISIONS] = {2e-6, 1e-2, 1.5e-2};

/* ---------------------------------------------------------------- the choice */

static void check_names(void) {
    int chosen = 0;
    FOR_TABLES(name) {
        CHECK(!strcmp(kernels->name, name), "%s chooses %s", name, kernels->name);
        chosen++;
    }
    CHECK(chosen >= 2, "only %d tables run here", chosen);
    CHECK(kernels_choose("avx1024"), "an unknown name is accepted");
    CHECK(!kernels_choose("auto") && strcmp(kernels->name, "naive"), "auto takes naive");
}

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

static void specify_linear(const Product *p, const float *w, float *y) {
    for (int l = 0; l < p->L; l++)
        for (int o = 0; o < p->O; o++) {
            double sum = p->layer.bias ? p->layer.bias[o] : 0;
            for (int k = 0; k < p->I; k++)
                sum += (double)p->x[(size_t)l * p->I + k] * w[(size_t)o * p->I + k];
            y[(size_t)l * p->O + o] = (float)sum;
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
    same_everywhere(what, precision, n, compute_linear, &p, y);
    specify_linear(&p, w, expected);
    double error = relative_error(y, expected, n);
    CHECK(error <= allowed[precision], "%s: relative error %.2e", what, error);
    free(x), free(w), free(b), free(y), free(expected);
}

/* Conversion to float32 is exact, so a product with narrow weights must equal that with converted weights. */
static void check_narrow(Type type) {
    enum { L = 5, I = 768, O = 37 };
    uint8_t *bytes = allocate(type_bytes(type, I * O));
    float *w = allocate(sizeof(float) * I * O), *x = random_floats(L * I, 4), y[L * O], expected[L * O];
    Generator generator;
    generator_seed(&generator, 5);
    for (size_t i = 0; i < type_bytes(type, I * O); i++)
        bytes[i] = (uint8_t)(generator_next(&generator) >> 7 & 0xbf);
    convert_to_floats(w, bytes, type, I * O);
    Product p = {L, I, O, x, {{bytes, type, O, I}, NULL, F32}};
    compute_linear(&p, y);
    p.layer.weight = (Weight){w, TYPE_F32, O, I};
    compute_linear(&p, expected);
    CHECK(!memcmp(y, expected, sizeof y), "a product with %s weights differs from that with widened ones",
          weight_type(type)->name);
    free(bytes), free(w), free(x);
}

/* ---------------------------------------------------------------- orders of BF16 */

/* amx_dot() where it is known by hand: what each chain holds, what counts as 0, and where a result is rounded. */
static void check_amx_dot(void) {
    static const struct {
        float sum, a[4], b[4], result;
    } cases[] = {
        {1, {2, 3, 5, 7}, {11, 13, 17, 19}, 1 + 22 + 39 + 85 + 133},
        {0, {0x1p24f, 1, 1, -0x1p24f}, {1, 1, 1, 1}, 1},    /* even: 2^24 + 1 is 2^24; odd: 1 - 2^24 is exact */
        {0x1p24f, {1, 1, 0, 0}, {1, 1, 1, 1}, 0x1p24f + 2}, /* 1 + 1 first, then the sum */
        {0, {0x1p-130f, 1, 0, 0}, {0x1p100f, 0, 0, 0}, 0},  /* a subnormal operand */
        {0x1p-130f, {0, 0, 0, 0}, {0, 0, 0, 0}, 0},         /* a subnormal sum */
        {0, {0x1p-70f, 0, 0, 0}, {0x1p-60f, 0, 0, 0}, 0},   /* a subnormal product */
        {0, {0x1p-126f, 0, -0x1p-70f, 0}, {1, 0, 0x1p-80f, 0}, 0},        /* 2^-126 - 2^-150 is below */
        {0, {0x1p-126f, 0, -0x1p-72f, 0}, {1, 0, 0x1p-80f, 0}, 0x1p-126f}, /* rounded, it is not */
        {0, {0x1p-70f, 0, -0x1p-70f, 0}, {0x1p-54f, 0, 0x1p-55f, 0}, 0x1p-125f},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint16_t a[4], b[4];
        for (int k = 0; k < 4; k++) a[k] = bf16_of(cases[i].a[k]), b[k] = bf16_of(cases[i].b[k]);
        float found = amx_dot(cases[i].sum, a, b, 4);
        CHECK(found == cases[i].result, "case %zu of AMX's order gives %a, not %a", i, found, cases[i].result);
    }
}

/* What VDPBF16PS gives for normal numbers: of each pair it adds the second product first. */
static float pairs_dot(float sum, const uint16_t *a, const uint16_t *b, int n) {
    for (int k = 1; k <= n; k += 2) {
        if (k < n) sum = fmaf(float_of_bf16(a[k]), float_of_bf16(b[k]), sum);
        sum = fmaf(float_of_bf16(a[k - 1]), float_of_bf16(b[k - 1]), sum);
    }
    return sum;
}

/* Where the processor can run the table: every sum of a product is `dot`, though k is cut and filled up, and rows are
 * packed or, where k is even, lie so. Weights have magnitudes from 2^-60 to 2^60, so that the order shows. */
static void check_order(const char *table, float (*dot)(float, const uint16_t *, const uint16_t *, int), int I) {
    enum { L = 70, O = 45, MOST = 1101 };
    if (kernels_choose(table)) {
        kernels_choose("auto");
        return;
    }
    float *x = random_floats((size_t)L * I, 30), *w = random_floats((size_t)O * I, 31);
    float *y = allocate(sizeof(float) * L * O);
    uint16_t a[MOST], b[MOST];
    Product p = {L, I, O, x, {{w, TYPE_F32, O, I}, NULL, BF16}};
    for (int i = 0; i < O * I; i++) w[i] = ldexpf(w[i], i % 121 - 60);
    compute_linear(&p, y);
    for (int l = 0; l < L; l++)
        for (int o = 0; o < O; o++) {
            for (int k = 0; k < I; k++) a[k] = bf16_of(x[l * I + k]), b[k] = bf16_of(w[o * I + k]);
            float expected = dot(0, a, b, I);
            CHECK(bits_of(y[l * O + o]) == bits_of(expected), "%s: the sum of row %d, output %d, %d of k is %a, not %a",
                  table, l, o, I, y[l * O + o], expected);
        }
    kernels_choose("auto");
    free(x), free(w), free(y);
}

/* ---------------------------------------------------------------- products of the released models' sizes */

enum { EVERY = 13, SAMPLED_ROWS = 3 }; /* compared are every 13th output, so some of each panel, of 3 rows */

/* Uniform bfloat16 in (-1/64, 1/64): faster to draw than normal numbers. */
static uint16_t *random_weights(size_t n) {
    uint16_t *w = allocate(n * sizeof *w);
    uint32_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        w[i] = bf16_of((float)(int32_t)state * 0x1p-37f);
    }
    return w;
}

static size_t sampled_row(const Product *p, int i) { return (size_t)(p->L - 1) * i / (SAMPLED_ROWS - 1); }

/* naive's results for the sampled rows and outputs: (SAMPLED_ROWS, ceiling(O / EVERY)). */
static float *sample_naively(const Product *p) {
    const uint16_t *weights = p->layer.weight.data;
    size_t count = (size_t)ceiling(p->O, EVERY), I = (size_t)p->I;
    uint16_t *w = allocate(sizeof *w * count * I);
    float *x = allocate(sizeof *x * SAMPLED_ROWS * I), *y = allocate(sizeof *y * SAMPLED_ROWS * count);
    for (size_t i = 0; i < count; i++) memcpy(w + i * I, weights + i * EVERY * I, sizeof *w * I);
    for (int i = 0; i < SAMPLED_ROWS; i++) memcpy(x + i * I, p->x + sampled_row(p, i) * I, sizeof *x * I);
    kernels_choose("naive");
    linear(y, x, SAMPLED_ROWS, &(Linear){{w, TYPE_BF16, (int)count, p->I}, NULL, p->layer.precision});
    free(w), free(x);
    return y;
}

static void check_sampled(const Product *p, const float *expected, const char *name) {
    Precision precision = p->layer.precision;
    size_t count = (size_t)ceiling(p->O, EVERY);
    float *y = allocate(sizeof *y * (size_t)p->L * p->O);
    float *found = allocate(sizeof *found * SAMPLED_ROWS * count);
    linear(y, p->x, p->L, &p->layer);
    for (int i = 0; i < SAMPLED_ROWS; i++)
        for (size_t j = 0; j < count; j++) found[i * count + j] = y[sampled_row(p, i) * p->O + j * EVERY];
    CHECK(agree(found, expected, SAMPLED_ROWS * count, slack_of(precision)),
          "%s linear %dx%d @ %d: %s differs from naive", precision_name(precision), p->L, p->I, p->O, name);
    free(y), free(found);
}

/* Few rows are one block, for which a task packs its own panels; where blocks follow each other, they share
 * groups of panels. */
static void check_large(Precision precision, bool few, int I, int O, const uint16_t *w) {
    float *x = random_floats((size_t)(MAX_TILE_ROWS * 8 + 1) * I, 11);
    FOR_TABLES(name) {
        if (!strcmp(name, "naive")) continue;
        int L = few ? 3 : kernels->tile[precision].rows * 8 + 1;
        Product p = {L, I, O, x, {{w, TYPE_BF16, O, I}, NULL, precision}};
        float *expected = sample_naively(&p);
        kernels_choose(name);
        check_sampled(&p, expected, name);
        free(expected);
    }
    kernels_choose("auto");
    free(x);
}

/* umT5's and the 1.3B model's feed-forward layers; then more outputs than the panels of one group have; then results
 * that are written past the caches. */
static void check_large_products(void) {
    static const int several_groups[PRECISIONS] = {500, 1000, 2000};
    uint16_t *w = random_weights((size_t)4096 * 10240);
    for (int p = 0; p < PRECISIONS; p++) {
        check_large((Precision)p, true, 4096, 10240, w);
        check_large((Precision)p, true, 8960, 1536, w);
        check_large((Precision)p, true, 1536, 8960, w);
        check_large((Precision)p, false, 8960, several_groups[p], w);
        check_large((Precision)p, false, 256, 40000, w);
    }
    free(w);
}

/* ---------------------------------------------------------------- convolutions */

/* A 3x3x3 convolution over frames of 70x5 pixels, so wide that tiles lie within a line, and others across its end. The
 * first frame is zero and is skipped. Pixels outside are zero. */
enum { HEIGHT = 5, WIDTH = 70, PIXELS = HEIGHT * WIDTH, OUT = 19 };

typedef struct {
    Precision precision;
    int channels;
    const float *x, *w, *bias; /* (3,PIXELS,channels); (OUT,27*channels); (OUT) */
    char *frames, *zeros;
} Convolution;

static const char *pixel_under(const Convolution *c, int row, int tap) {
    int x = row % WIDTH - 1 + tap % 3, y = row / WIDTH - 1 + tap / 3 % 3, t = 1 + tap / 9;
    bool inside = x >= 0 && x < WIDTH && y >= 0 && y < HEIGHT;
    return inside ? c->frames + (size_t)(t * PIXELS + y * WIDTH + x) * row_bytes(c->precision, c->channels) : c->zeros;
}

/* Every second time it says less than is so. */
static Segment locate(const void *of, int row, int rows, int tap) {
    const Convolution *c = of;
    const char *at = pixel_under(c, row, tap);
    Segment run = {at, at == c->zeros ? 0 : row_bytes(c->precision, c->channels), 1};
    while (run.rows < rows && pixel_under(c, row + run.rows, tap) == at + (size_t)run.rows * run.stride) run.rows++;
    if (row % 2) run.rows = ceiling(run.rows, 2);
    return run;
}

static void compute_convolution(void *with, float *y) {
    Convolution c = *(const Convolution *)with;
    Linear layer = {{c.w, TYPE_F32, OUT, 27 * c.channels}, c.bias, c.precision};
    size_t bytes = row_bytes(c.precision, c.channels);
    c.zeros = allocate(bytes);
    c.frames = allocate(bytes * 3 * PIXELS);
    narrow_rows(rows_at(c.precision, c.frames, bytes, 3 * PIXELS, c.channels), c.x);
    Rows rows = {.rows = PIXELS, .segments = 18, .n = c.channels, .skip = 9, .locate = locate, .of = &c};
    product(y, rows, &layer, REPLACE);
    product(y, rows, &layer, ACCUMULATE);
    free(c.zeros), free(c.frames);
}

static void specify_convolution(const Convolution *c, float *y) {
    for (int pixel = 0; pixel < PIXELS; pixel++)
        for (int o = 0; o < OUT; o++) {
            double sum = c->bias[o];
            for (int tap = 9; tap < 27; tap++)
                for (int i = 0; i < c->channels; i++) {
                    int row = pixel / WIDTH + tap / 3 % 3 - 1, column = pixel % WIDTH + tap % 3 - 1;
                    if (row < 0 || row >= HEIGHT || column < 0 || column >= WIDTH) continue;
                    sum += (double)c->x[(tap / 9 * PIXELS + row * WIDTH + column) * c->channels + i] *
                           c->w[(o * 27 + tap) * c->channels + i];
                }
            y[pixel * OUT + o] = (float)(2 * sum);
        }
}

static void check_convolution(Precision precision, int channels) {
    float *x = random_floats((size_t)3 * PIXELS * channels, 12), *bias = random_floats(OUT, 14),
          *w = random_floats((size_t)OUT * 27 * channels, 13), y[PIXELS * OUT], expected[PIXELS * OUT];
    Convolution c = {precision, channels, x, w, bias, NULL, NULL};
    char what[64];
    snprintf(what, sizeof what, "%s convolution of %d channels", precision_name(precision), channels);
    same_everywhere(what, precision, PIXELS * OUT, compute_convolution, &c, y);
    specify_convolution(&c, expected);
    double error = relative_error(y, expected, PIXELS * OUT);
    CHECK(error <= allowed[precision], "%s: relative error %.2e", what, error);
    free(x), free(w), free(bias);
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
    same_everywhere(what, precision, n, compute_attention, &a, y);
    specify_attention(&a, expected);
    double error = relative_error(y, expected, n);
    CHECK(error < 2 * allowed[precision], "%s: relative error %.2e", what, error);
    free(q), free(k), free(v), free(b), free(y), free(expected);
}

/* ---------------------------------------------------------------- rows */

static void compute_rows(void *with, float *y) {
    enum { L = 3, N = 67 };
    const float *x = with, *gain = x + L * N, *shift = gain + N;
    rms_norm(y, x, L, N, gain, 1e-6f);
    l2_norm(y + L * N, x, L, N, gain);
    layer_norm(rows_of(F32, y + 2 * L * N, NULL, L, N), x, 1e-6f, gain, shift, L);
    silu(y + 3 * L * N, x, L * N);
    gelu(rows_of(F32, y + 4 * L * N, NULL, L, N), x, NULL);
}

static void check_rows(void) {
    enum { L = 3, N = 67 };
    float *x = random_floats((L + 2) * N, 10), *y = allocate(sizeof(float) * 5 * L * N);
    same_everywhere("norms and activations", F32, 5 * L * N, compute_rows, x, y);
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

/* For large |x| the activations equal their limits 0 and x, without overflow or NaN. */
static void check_extremes(void) {
    float x[] = {-1e30f, -200.0f, -90.0f, 0.0f, 90.0f, 200.0f, 1e30f}, y[7];
    silu(y, x, 7);
    for (int i = 0; i < 7; i++)
        CHECK(fabsf(y[i] - fmaxf(x[i], 0)) < 1e-7f * fmaxf(1.0f, fabsf(x[i])), "silu(%g) = %g", x[i], y[i]);
    gelu(rows_of(F32, y, NULL, 1, 7), x, NULL);
    for (int i = 0; i < 7; i++)
        CHECK(fabsf(y[i] - fmaxf(x[i], 0)) < 1e-7f * fmaxf(1.0f, fabsf(x[i])), "gelu(%g) = %g", x[i], y[i]);
}

/* ---------------------------------------------------------------- NaN and infinity */

static bool all_nan(const float *x, size_t n, size_t stride) {
    for (size_t i = 0; i < n; i++)
        if (!isnan(x[i * stride])) return false;
    return true;
}

static bool any_finite(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (isfinite(x[i])) return true;
    return false;
}

static bool all_finite(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return false;
    return true;
}

/* The bits of floats, and of the bfloat16 that torch rounds them to. */
static void check_bf16(void) {
    static const uint32_t cases[][2] = {
        {0x00000000, 0x0000}, {0x80000000, 0x8000}, {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80},
        {0x3f808001, 0x3f81}, {0x3f818000, 0x3f82}, {0x00008000, 0x0000}, {0x00018000, 0x0002},
        {0x7f7f0000, 0x7f7f}, {0x7f7fffff, 0x7f80}, {0xff7fffff, 0xff80}, {0x7f800000, 0x7f80},
        {0xff800000, 0xff80}, {0x7fc00000, 0x7fc0}, {0x7f800001, 0x7fc0}, {0x7fffffff, 0x7fc0},
        {0xffc00000, 0x7fc0}, {0xff800001, 0x7fc0}, {0xffffffff, 0x7fc0},
    };
    enum { N = sizeof cases / sizeof *cases };
    FOR_TABLES(name) {
        float x[N], back[N];
        uint16_t y[N];
        for (int i = 0; i < N; i++) x[i] = float_from_bits(cases[i][0]);
        kernels->to_bf16(y, x, N);
        kernels->from_bf16(back, y, N);
        for (int i = 0; i < N; i++) {
            CHECK(y[i] == cases[i][1], "%s: %08x as bfloat16 is %04x, not %04x", name, cases[i][0], y[i],
                  cases[i][1]);
            CHECK(bits_of(back[i]) == (uint32_t)y[i] << 16, "%s: bfloat16 %04x is widened to %08x", name,
                  y[i], bits_of(back[i]));
        }
    }
    kernels_choose("auto");
}

/* All half-precision numbers: (-1)^s * 2^(e-25) * (1024 + m), and 2^-24 * m where e is 0. */
static void check_f16(void) {
    enum { N = 1 << 16 };
    uint16_t *x = allocate(sizeof *x * N);
    float *y = allocate(sizeof *y * N);
    for (int i = 0; i < N; i++) x[i] = (uint16_t)i;
    FOR_TABLES(name) {
        kernels->from_f16(y, x, N);
        for (int i = 0; i < N; i++) {
            int e = i >> 10 & 31, m = i & 1023;
            double size = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
            float expected = (float)(e < 31 ? size : m ? NAN : INFINITY);
            CHECK(isnan(expected) ? isnan(y[i]) : bits_of(y[i]) == bits_of(i >> 15 ? -expected : expected),
                  "%s: half-precision %04x is widened to %a", name, (unsigned)i, y[i]);
        }
    }
    kernels_choose("auto");
    free(x), free(y);
}

/* NaN and infinity in a row of x must appear in that row of y and in no other. The same for outputs and rows of w. */
static void check_nan_in_product(Precision precision) {
    enum { L = 20, I = 530, O = 37 };
    float *x = random_floats(L * I, 15), *w = random_floats(O * I, 16), y[L * O];
    Product p = {L, I, O, x, {{w, TYPE_F32, O, I}, NULL, precision}};
    char what[64];
    x[3 * I + 300] = NAN, x[4 * I + 529] = -NAN, x[17 * I] = INFINITY, x[18 * I + 1] = -INFINITY;
    snprintf(what, sizeof what, "%s rows that are not finite", precision_name(precision));
    same_everywhere(what, precision, L * O, compute_linear, &p, y);
    CHECK(all_finite(y, 3 * O) && all_finite(y + 5 * O, 12 * O) && all_finite(y + 19 * O, O),
          "%s: other rows are not finite", what);
    CHECK(all_nan(y + 3 * O, 2 * O, 1), "%s: NaN is lost", what);
    CHECK(!any_finite(y + 17 * O, 2 * O), "%s: infinity is lost", what);
    w[9 * I + 500] = NAN;
    same_everywhere(what, precision, L * O, compute_linear, &p, y);
    CHECK(all_nan(y + 9, L, O), "%s: NaN in the weights is lost", what);
    CHECK(all_finite(y, 9) && all_finite(y + 10, O - 10), "%s: other outputs are not finite", what);
    free(x), free(w);
}

/* Rows so small that 127 / largest overflows, rows so large that a sum of squares would overflow, and zeros. */
static void check_ends_of_range(Precision precision) {
    enum { L = 6, I = 260, O = 18 };
    static const float scales[L] = {1, 1e-44f, 1e-38f, 3e-37f, 1e36f, 0};
    float *x = random_floats(L * I, 17), *w = random_floats(O * I, 18), y[L * O];
    Product p = {L, I, O, x, {{w, TYPE_F32, O, I}, NULL, precision}};
    for (int i = 0; i < L * I; i++) x[i] *= scales[i / I];
    same_everywhere("numbers at the ends of the range", precision, L * O, compute_linear, &p, y);
    CHECK(all_finite(y, L * O), "%s: very small or large inputs overflow", precision_name(precision));
    free(x), free(w);
}

enum { KEYS = 300, QUERIES = 18, D = 20 };

static Attention random_attention(Precision precision, float *bias) {
    return (Attention){.precision = precision, .q = random_floats(QUERIES * D, 19),
                       .k = random_floats(KEYS * D, 20), .v = random_floats(KEYS * D, 21),
                       .queries = QUERIES, .keys = KEYS, .heads = 1, .d = D, .q_stride = D, .kv_stride = D,
                       .out_stride = D, .scale = 0.3f, .bias = bias, .bias_query = KEYS};
}

static void free_attention(const Attention *a) { free((void *)a->q), free((void *)a->k), free((void *)a->v); }

/* Query 0 sees all keys; 1 only the last tile; 2 none; 3 all, with scores near -1e37; 4 only the first key. */
static void check_hidden_keys(Precision precision) {
    float *bias = allocate(sizeof(float) * QUERIES * KEYS), y[QUERIES * D], visible[QUERIES * D];
    Attention a = random_attention(precision, bias);
    for (int j = 0; j < KEYS; j++) {
        bias[1 * KEYS + j] = j < 2 * TILE_KEYS ? -INFINITY : 0;
        bias[2 * KEYS + j] = -INFINITY;
        bias[3 * KEYS + j] = -1e37f;
        bias[4 * KEYS + j] = j > 0 ? -INFINITY : 0;
    }
    same_everywhere("attention with hidden keys", precision, QUERIES * D, compute_attention, &a, y);
    CHECK(all_nan(y + 2 * D, D, 1), "%s: a query that sees no key is not NaN", precision_name(precision));
    for (int i = 0; i < D; i++) {
        double sum = 0;
        for (int j = 0; j < KEYS; j++) sum += a.v[j * D + i];
        CHECK(fabs(y[3 * D + i] - sum / KEYS) < 2 * allowed[precision],
              "keys whose scores are far below 0 give %g, not the mean %g", y[3 * D + i], sum / KEYS);
        CHECK(fabs(y[4 * D + i] - a.v[i]) < 4 * allowed[precision], "the only visible key gives %g, not %g",
              y[4 * D + i], a.v[i]);
    }
    Attention last = a;
    last.k += 2 * TILE_KEYS * D, last.v += 2 * TILE_KEYS * D, last.keys -= 2 * TILE_KEYS, last.bias = NULL;
    same_everywhere("attention to the last tile", precision, QUERIES * D, compute_attention, &last, visible);
    CHECK(!memcmp(y + D, visible + D, sizeof(float) * D), "%s: hidden tiles of keys change the result",
          precision_name(precision));
    free(bias), free_attention(&a);
}

/* Scores that rise or fall from key to key, by 0 to 9 each: the highest so far is far above the first ones. */
static void check_steep_attention(Precision precision) {
    enum { MANY = 1100 };
    float *q = allocate(sizeof *q * QUERIES * D), *k = allocate(sizeof *k * MANY * D), *v = random_floats(MANY * D, 23);
    float y[QUERIES * D];
    for (int i = 0; i < QUERIES; i++) q[i * D] = (float)(i - QUERIES / 2);
    for (int j = 0; j < MANY; j++) k[j * D] = (float)j;
    Attention a = {.precision = precision, .q = q, .k = k, .v = v, .queries = QUERIES, .keys = MANY, .heads = 1, .d = D,
                   .q_stride = D, .kv_stride = D, .out_stride = D, .scale = 1};
    same_everywhere("attention with steep scores", precision, QUERIES * D, compute_attention, &a, y);
    CHECK(all_finite(y, QUERIES * D), "steep scores give NaN");
    FOR_TABLES(name) {
        compute_attention(&a, y);
        for (int i = 0; i < QUERIES; i++) {
            Attention alone = a;
            float one[D];
            alone.q += i * D, alone.queries = 1;
            compute_attention(&alone, one);
            CHECK(!memcmp(one, y + i * D, sizeof one), "%s: query %d is another one beside steep ones", name, i);
        }
    }
    kernels_choose("auto");
    free(q), free(k), free(v);
}

static void check_nan_in_attention(Precision precision) {
    float y[QUERIES * D];
    Attention a = random_attention(precision, NULL);
    ((float *)a.q)[5 * D + 3] = NAN, ((float *)a.q)[7 * D] = INFINITY;
    ((float *)a.v)[140 * D + 2] = NAN, ((float *)a.v)[9 * D + 4] = INFINITY;
    same_everywhere("attention with NaN", precision, QUERIES * D, compute_attention, &a, y);
    CHECK(all_nan(y + 5 * D, D, 1) && all_nan(y + 7 * D, D, 1), "NaN in a query is lost");
    CHECK(all_nan(y + 2, QUERIES, D), "NaN in a value is lost");
    CHECK(y[4] == INFINITY, "infinity in a value becomes %g", y[4]);
    CHECK(all_finite(y, 2) && all_finite(y + 5, D - 5), "NaN in a query spreads to others");
    ((float *)a.k)[290 * D] = NAN;
    same_everywhere("attention with NaN", precision, QUERIES * D, compute_attention, &a, y);
    CHECK(all_nan(y, QUERIES * D, 1), "NaN in a key is lost");
    free_attention(&a);
}

static void check_attention_of_int8(void) {
    Attention narrow = random_attention(BF16, NULL), bytes = narrow;
    float y[QUERIES * D], expected[QUERIES * D];
    bytes.precision = INT8;
    FOR_TABLES(name) {
        compute_attention(&narrow, expected);
        compute_attention(&bytes, y);
        CHECK(!memcmp(y, expected, sizeof y), "%s: attention of int8 is not that of bf16", name);
    }
    kernels_choose("auto");
    free_attention(&narrow);
}

static void check_nan_in_rows(void) {
    enum { L = 3, N = 67 };
    float *x = random_floats((L + 2) * N, 22), y[5 * L * N];
    x[N + 66] = NAN;
    same_everywhere("norms and activations of NaN", F32, 5 * L * N, compute_rows, x, y);
    for (int i = 0; i < 5; i++) {
        const float *out = y + i * L * N;
        CHECK(all_finite(out, N) && all_finite(out + 2 * N, N), "NaN spreads to other rows");
        CHECK(i < 3 ? all_nan(out + N, N, 1) : all_finite(out + N, N - 1) && isnan(out[N + 66]),
              "NaN is lost, or spreads within an activation");
    }
    x[N + 66] = -INFINITY, x[2 * N] = INFINITY;
    same_everywhere("norms and activations of infinity", F32, 5 * L * N, compute_rows, x, y);
    free(x);
}

void test_kernels(void) {
    int sizes[][3] = {{1, 1, 1}, {1, 300, 7}, {13, 24, 33}, {14, 512, 32}, {113, 513, 65}, {40, 1030, 96}};
    check_names();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int p = 0; p < PRECISIONS; p++)
            check_linear((Precision)p, sizes[i][0], sizes[i][1], sizes[i][2], i % 2);
    for (Type t = TYPE_F16; t <= TYPE_BF16; t++)
        if (weight_type(t) && weight_type(t)->widen) check_narrow(t);
    check_amx_dot();
    for (int I = 1100; I <= 1101; I++) {
        check_order("amx", amx_dot, I);
        check_order("avx512bf16", pairs_dot, I);
    }
    check_large_products();
    for (int p = F32; p <= BF16; p++) {
        check_convolution((Precision)p, 4);
        check_convolution((Precision)p, 96);
        check_convolution((Precision)p, 131);
        check_attention((Precision)p, 1, 1, 1, 2, false);
        check_attention((Precision)p, 17, 40, 3, 24, true);
        check_attention((Precision)p, 75, 129, 2, 40, false);
        check_attention((Precision)p, 3, 513, 1, 130, true);
        check_attention((Precision)p, 260, 1030, 2, 40, true);
        check_attention((Precision)p, 33, 1025, 1, 64, false);
        check_hidden_keys((Precision)p);
        check_steep_attention((Precision)p);
        check_nan_in_attention((Precision)p);
    }
    check_attention_of_int8();
    check_rows();
    check_extremes();
    check_f16();
    check_bf16();
    for (int p = 0; p < PRECISIONS; p++) {
        check_nan_in_product((Precision)p);
        check_ends_of_range((Precision)p);
    }
    check_nan_in_rows();
}
