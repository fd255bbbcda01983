/* kernels.c - the operations in which the time goes, each at the shapes of Wan 2.1 1.3B and umT5-XXL. */
#include "bench/bench.h"

#include <math.h>
#include <stdio.h>

static const char *label(const char *format, int a, int b) {
    static char text[64];
    snprintf(text, sizeof text, format, a, b);
    return text;
}

/* ---------------------------------------------------------------- linear layers */

typedef struct {
    Linear layer;
    const float *x;
    float *y;
    int L;
} Product;

static void run_linear(void *with) {
    const Product *p = with;
    linear(p->y, p->x, p->L, &p->layer);
}

static void bench_linear(Precision precision, int L, int I, int O) {
    Product p = {random_linear(precision, O, I), random_floats((size_t)L * I),
                 hold(sizeof(float) * (size_t)L * O), L};
    double bytes = 4.0 * L * ((double)I + O) + (double)type_bytes(p.layer.weight.type, (size_t)O * I);
    measure(&(Job){"kernel", label("linear %d->%d", I, O), precision, L, 0, 2.0 * L * I * O, bytes,
                   run_linear, &p});
    release();
}

/* ---------------------------------------------------------------- attention */

static void run_attention(void *with) { attention(with); }

void bench_attention(Precision precision, int queries, int keys, int threads) {
    enum { HEADS = 12, WIDTH = 128, D = HEADS * WIDTH };
    size_t n = (size_t)queries * D, m = (size_t)keys * D;
    Attention a = {.precision = precision, .q = random_floats(n), .k = random_floats(m),
                   .v = random_floats(m), .out = hold(n * sizeof(float)), .queries = queries, .keys = keys,
                   .heads = HEADS, .d = WIDTH, .q_stride = D, .kv_stride = D, .out_stride = D,
                   .scale = 1.0f / sqrtf(WIDTH)};
    const char *name = queries == keys ? "self attention" : label("cross attention, %d keys", keys, 0);
    measure(&(Job){"kernel", name, precision, queries, threads, 4.0 * queries * keys * D, 8.0 * (double)(n + m),
                   run_attention, &a});
    release();
}

/* ---------------------------------------------------------------- convolutions */

enum { KERNEL = 3, TAPS = KERNEL * KERNEL * KERNEL };

/* A 3x3x3 convolution over three frames, padded with zeros in space. */
typedef struct {
    Linear layer;
    int side, channels;
    const char *frames, *zeros; /* row operands: three frames of side x side pixels; one pixel */
    size_t pixel;
    float *y;
} Convolution;

static Segment locate(const void *of, int row, int rows, int tap) {
    const Convolution *c = of;
    int x = row % c->side - 1 + tap % KERNEL, y = row / c->side - 1 + tap / KERNEL % KERNEL;
    int t = tap / (KERNEL * KERNEL), left = smaller(rows, c->side - row % c->side);
    if (y < 0 || y >= c->side || x >= c->side) return (Segment){c->zeros, 0, left};
    if (x < 0) return (Segment){c->zeros, 0, 1};
    const char *at = c->frames + ((size_t)(t * c->side + y) * c->side + x) * c->pixel;
    return (Segment){at, c->pixel, smaller(left, c->side - x)};
}

static void run_convolution(void *with) {
    const Convolution *c = with;
    Rows rows = {.rows = c->side * c->side, .segments = TAPS, .n = c->channels, .locate = locate, .of = c};
    product(c->y, rows, &c->layer, REPLACE);
}

static void bench_convolution(Precision precision, int side, int channels) {
    int pixels = side * side;
    size_t pixel = row_bytes(precision, channels);
    char *operands = hold(3 * pixels * pixel);
    narrow_rows(rows_at(precision, operands, pixel, 3 * pixels, channels),
                random_floats(3 * (size_t)pixels * channels));
    Convolution c = {random_linear(precision, channels, TAPS * channels), side, channels, operands, hold(pixel), pixel,
                     hold(sizeof(float) * (size_t)pixels * channels)};
    double weights = (double)TAPS * channels * channels;
    double bytes = pixels * (3.0 * c.pixel + 4.0 * channels) + weights * (precision == F32 ? 4 : 2);
    const char *name = label("convolution %d channels", channels, 0);
    measure(&(Job){"kernel", name, precision, pixels, 0, 2.0 * pixels * weights, bytes, run_convolution, &c});
    release();
}

/* ---------------------------------------------------------------- all of them */

/* 256x256 and 480x832 pixels of 17 frames are 1,280 and 7,800 tokens. The decoder's four levels at 256x256
 * pixels have 32, 64, 128 and 256 a side. */
void bench_kernels(void) {
    static const int tokens[] = {1280, 7800};
    for (Precision p = F32; p < PRECISIONS; p++) {
        for (int i = 0; i < 2; i++) {
            bench_linear(p, tokens[i], 1536, 1536);
            bench_linear(p, tokens[i], 1536, 8960);
            bench_linear(p, tokens[i], 8960, 1536);
        }
        if (p == INT8) break; /* attention, decoder and text encoder have no arithmetic in bytes */
        for (int i = 0; i < 2; i++) {
            bench_attention(p, tokens[i], tokens[i], 0);
            bench_attention(p, tokens[i], 41, 0);
        }
        bench_linear(p, 40, 4096, 4096);
        bench_linear(p, 40, 4096, 10240);
        bench_linear(p, 40, 10240, 4096);
        bench_convolution(p, 32, 384);
        bench_convolution(p, 64, 384);
        bench_convolution(p, 128, 192);
        bench_convolution(p, 256, 96);
    }
}
