/* steps.c - from three loops to the tiled product, in steps: y (L,O) = x (L,I) @ w^T, w (O,I).
 *
 * docs/kernels.md walks through them. Each step computes the same bits: an element is one chain of fused
 * multiply-adds over k, and what changes is the order in which elements and pieces of their chains are
 * visited. The steps are written for AVX2 or NEON, with sizes that divide evenly; the last is the same for all
 * sizes, engine/arithmetic/product.c, once more on wider registers where there are any. Each step is measured
 * against the peak of its own instruction, that of the kernels named beside it. */
#include "bench/bench.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#define ISA "avx2"
#include "engine/arithmetic/vector_avx2.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET
#define ISA "neon"
#include "engine/arithmetic/vector_neon.h"
#else
#define TARGET
#define ISA "generic"
#include "engine/arithmetic/vector_generic.h"
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* The queries' layer of Wan 2.1 1.3B. A tile's R x VECTORS sums, VECTORS columns and one row element
 * fill AVX2's 16 registers. */
enum { L = 1280, I = 1536, O = 1536, R = 4, VECTORS = 3, C = VECTORS * VLEN, CHUNK = 512 };

typedef struct {
    const float *x, *w, *wt; /* (L,I), (O,I), (I,O) */
    float *y;                /* (L,O) */
} Problem;

/* 1. The definition. Each addition waits for the one before it: four cycles for one product. */
static TARGET void naive(void *with) {
    const Problem *p = with;
    for (int r = 0; r < L; r++)
        for (int o = 0; o < O; o++) {
            float sum = 0;
            for (int k = 0; k < I; k++) sum = fmaf(p->x[r * I + k], p->w[o * I + k], sum);
            p->y[r * O + o] = sum;
        }
}

/* 2. Outputs side by side. Neighbouring outputs do not wait for each other, so the compiler puts them into
 * one register once w is transposed. Every product now loads and stores its sum. */
static TARGET void side_by_side(void *with) {
    const Problem *p = with;
    memset(p->y, 0, sizeof(float) * L * O);
    for (int r = 0; r < L; r++)
        for (int k = 0; k < I; k++) {
            float *y = p->y + r * O, x = p->x[r * I + k];
            const float *column = p->wt + k * O;
            for (int o = 0; o < O; o++) y[o] = fmaf(x, column[o], y[o]);
        }
}

/* y (R,C), rows O apart, += n elements of R rows of x times n rows of C columns, `stride` floats apart. The
 * sums stay in registers for all of n: R + C loads serve R*C products. */
static inline TARGET void tile(float *y, const float *x, const float *columns, int stride, int n) {
    V sum[R][VECTORS];
    UNROLL for (int i = 0; i < R; i++)
        UNROLL for (int j = 0; j < VECTORS; j++) sum[i][j] = V_LOAD(y + i * O + j * VLEN);
    for (int k = 0; k < n; k++) {
        V column[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) column[j] = V_LOAD(columns + k * stride + j * VLEN);
        UNROLL for (int i = 0; i < R; i++) {
            V element = V_SET(x[i * I + k]);
            UNROLL for (int j = 0; j < VECTORS; j++) sum[i][j] = V_FMA(element, column[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < R; i++)
        UNROLL for (int j = 0; j < VECTORS; j++) V_STORE(y + i * O + j * VLEN, sum[i][j]);
}

/* 3. A tile in registers. Its columns are read where they lie, each k from another page of memory. */
static TARGET void register_tile(void *with) {
    const Problem *p = with;
    memset(p->y, 0, sizeof(float) * L * O);
    for (int o = 0; o < O; o += C)
        for (int r = 0; r < L; r += R) tile(p->y + r * O + o, p->x + r * I, p->wt + o, O, I);
}

/* panel (n,C) = n elements of C rows of w, transposed. */
static void pack(float *panel, const float *w, int n) {
    for (int j = 0; j < C; j++)
        for (int k = 0; k < n; k++) panel[k * C + j] = w[j * I + k];
}

/* 4. A packed panel. C rows of w are copied once into the order
 * in which all tiles of these columns read them. */
static TARGET void multiply_columns(const Problem *p, int o) {
    float panel[I * C];
    pack(panel, p->w + o * I, I);
    for (int r = 0; r < L; r += R) tile(p->y + r * O + o, p->x + r * I, panel, C, I);
}

static void packed_panel(void *with) {
    const Problem *p = with;
    memset(p->y, 0, sizeof(float) * L * O);
    for (int o = 0; o < O; o += C) multiply_columns(p, o);
}

/* 5. k in chunks. A chunk of the panel stays in the first-level cache while all rows pass, and memory for the
 * panel no longer grows with I; but the sums go to memory and back between chunks. */
static TARGET void k_in_chunks(void *with) {
    const Problem *p = with;
    float panel[CHUNK * C];
    memset(p->y, 0, sizeof(float) * L * O);
    for (int o = 0; o < O; o += C)
        for (int k = 0; k < I; k += CHUNK) {
            pack(panel, p->w + o * I + k, CHUNK);
            for (int r = 0; r < L; r += R) tile(p->y + r * O + o, p->x + r * I + k, panel, C, CHUNK);
        }
}

/* 6. Threads. Columns are independent of each other. */
static void all_threads(void *with) {
    const Problem *p = with;
    memset(p->y, 0, sizeof(float) * L * O);
    PARALLEL_FOR (int o = 0; o < O; o += C) multiply_columns(p, o);
}

/* 7. The engine: what the program runs. */
static void engine(void *with) {
    const Problem *p = with;
    linear(p->y, p->x, L, &(Linear){.weight = {p->w, TYPE_F32, O, I}, .precision = F32});
}

static const struct {
    const char *name, *isa;
    void (*run)(void *);
    int threads; /* 0: all */
} steps[] = {
    {"naive loop", "naive", naive, 1},
    {"outputs side by side", ISA, side_by_side, 1},
    {"tile in registers", ISA, register_tile, 1},
    {"packed panel", ISA, packed_panel, 1},
    {"k in chunks", ISA, k_in_chunks, 1},
    {"all threads", ISA, all_threads, 0},
    {"the engine", ISA, engine, 0},
    {"wider registers", "auto", engine, 0},
};

void bench_steps(void) {
    float *wt = hold(sizeof(float) * I * O), *expected = hold(sizeof(float) * L * O);
    Problem p = {random_floats(L * I), random_floats(O * I), wt, hold(sizeof(float) * L * O)};
    for (int o = 0; o < O; o++)
        for (int k = 0; k < I; k++) wt[k * O + o] = p.w[o * I + k];
    double bytes = 4.0 * (L * I + O * I + L * O);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        const char *before = peak_instruction(F32);
        if (kernels_choose(steps[i].isa)) die(STATUS_USAGE, "the steps are written for %s", steps[i].isa);
        if (!strcmp(steps[i].isa, "auto") && !strcmp(peak_instruction(F32), before)) break;
        measure(&(Job){"step", steps[i].name, F32, L, steps[i].threads, 2.0 * L * I * O, bytes, steps[i].run,
                       &p});
        if (i == 0) memcpy(expected, p.y, sizeof(float) * L * O);
        if (memcmp(expected, p.y, sizeof(float) * L * O)) die(STATUS_CHECK, "'%s' differs", steps[i].name);
    }
    kernels_choose("auto");
    release();
}
