/* amx.c - products in the tiles of AMX (Intel's server processors since 2023).
 *
 * A tile register holds 16 rows of 64 bytes. One instruction multiplies two of them and adds to a third:
 *
 *                       b: 16 lines, a line for each pair of k (INT8: four of k), 16 columns in a line
 *                      +----------+----------+
 *                      | tmm6     | tmm7     |      one step of a panel of 32 columns
 *                      +----------+----------+
 *        +----------+  +----------+----------+
 *   a:   | tmm4     |  | tmm0     | tmm1     |      16 rows of 32 k (INT8: 64 k)
 *        +----------+  +----------+----------+
 *        | tmm5     |  | tmm2     | tmm3     |      16 rows
 *        +----------+  +----------+----------+
 *
 * So R = C = 32, and four loads serve four products. The layout is that of panel.c: [k/2][C] pairs or [k/4][C] four
 * bytes, k filled up with zeros to a whole step. Rows are loaded past the first-level cache, which keeps the panel.
 *
 * TDPBF16PS adds in an order of its own. For each 32 of k, beginning with sum = what the tile held:
 *
 *   even = 0;  for p in 0..15:  even = fma(a[2p],   b[2p],   even)
 *   odd  = 0;  for p in 0..15:  odd  = fma(a[2p+1], b[2p+1], odd)
 *   sum  = sum + (even + odd)
 *
 * Each operation rounds to nearest even. Subnormal numbers count as 0, as operands and as results; a result is
 * subnormal if it would be with an unlimited exponent. amx_dot() is that order in plain C, on every machine. The tests
 * hold the instruction to it where the processor has one.
 *
 * TDPBSSD adds integers, so INT8 has the bits of every other table. */
#include "engine/engine.h"

#include <math.h>

/* x, or 0 of its sign if it is subnormal. */
static float flushed(float x) { return fabsf(x) < FLT_MIN ? copysignf(0, x) : x; }

/* a * b + c of normal numbers, rounded once. Near 2^-126 the exponent is raised for a while, so that the result is
 * rounded as if there were no subnormal numbers. Of a and b the smaller is raised: neither overflows. */
static float fma_flushed(float a, float b, float c) {
    float result = fmaf(a, b, c);
    if (!(fabsf(result) <= FLT_MIN) || result == 0) return result;
    float raised = fabsf(a) < fabsf(b) ? fmaf(a * 0x1p64f, b, c * 0x1p64f) : fmaf(a, b * 0x1p64f, c * 0x1p64f);
    return fabsf(raised) < 0x1p-62f ? copysignf(0, raised) : result;
}

float amx_dot(float sum, const uint16_t *a, const uint16_t *b, int n) {
    for (int from = 0; from < n; from += AMX_STEP) {
        float chain[2] = {0, 0};
        for (int k = from; k < from + AMX_STEP; k++) {
            float x = k < n ? flushed(float_of_bf16(a[k])) : 0, y = k < n ? flushed(float_of_bf16(b[k])) : 0;
            chain[k % 2] = fma_flushed(x, y, chain[k % 2]);
        }
        sum = flushed(flushed(sum) + flushed(chain[0] + chain[1]));
    }
    return sum;
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AMX_TARGET
#define AMX_TARGET "avx512f,avx512bw" /* of what is not done in tiles */
#endif

/* ---------------------------------------------------------------- whether there is one */

/* Registers that the operating system saves: bits 17 and 18 are the tiles and their shapes. */
static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* The kernel gives tiles to a process that asks for them: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). It holds
 * for all threads, those that run already, too. */
static bool may_use_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

bool can_amx(void) {
    enum { OSXSAVE = 1 << 27, BF16_TILES = 1 << 22, TILES = 1 << 24, INT8_TILES = 1 << 25 };
    unsigned a, b, c, d, wanted = BF16_TILES | TILES | INT8_TILES;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
    return (saved_registers() >> 17 & 3) == 3 && may_use_tiles();
}

/* ---------------------------------------------------------------- the tiles */

/* All eight have 16 rows of 64 bytes. */
void amx_enter(void) {
    struct {
        uint8_t palette, start, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}

void amx_leave(void) { __asm__ volatile("tilerelease" : : : "memory"); }

/* Compilers do not use tile registers of their own accord, so none is named as overwritten. */
#define LOAD(tile, from, stride)                                                                              \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((size_t)(stride)) : "memory")
#define LOAD_ONCE(tile, from, stride)                                                                         \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((size_t)(stride)) : "memory")
#define STORE(tile, to, stride)                                                                               \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((size_t)(stride)) : "memory")
#define ZERO_ALL() __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3")
#define MULTIPLY(instruction, sum, a, b) __asm__ volatile(instruction " %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : : )
/* Four products of what is loaded. */
#define MULTIPLY_ALL(instruction)                                                                             \
    MULTIPLY(instruction, 0, 4, 6);                                                                           \
    MULTIPLY(instruction, 1, 4, 7);                                                                           \
    MULTIPLY(instruction, 2, 5, 6);                                                                           \
    MULTIPLY(instruction, 3, 5, 7)

enum { SIDE = 16, LINE = 2 * SIDE * 4, STEP_BYTES = SIDE * LINE }; /* of a panel, one step of k */

static void load_step(const char *rows, size_t stride, const char *panel, const Ahead *ahead) {
    LOAD(6, panel, LINE);
    LOAD(7, panel + LINE / 2, LINE);
    LOAD_ONCE(4, rows, stride);
    LOAD_ONCE(5, rows + SIDE * stride, stride);
    for (size_t i = 0; i < ahead->bytes; i += 64) __builtin_prefetch(ahead->at + i, 0, 2);
}

__attribute__((noinline)) void amx_tile_bf16(float *acc, int ld, int mode, const Span *spans, int count,
                                             const void *panel, Ahead ahead) {
    const char *b = panel;
    size_t line = sizeof *acc * (size_t)ld;
    if (mode == REPLACE) {
        ZERO_ALL();
    } else {
        LOAD(0, acc, line);
        LOAD(1, acc + SIDE, line);
        LOAD(2, acc + SIDE * ld, line);
        LOAD(3, acc + SIDE * ld + SIDE, line);
    }
    int left = ahead.run;
    for (const Span *span = spans; span < spans + count; span++) {
        const char *a = span->at;
        for (int k = 0; k < span->n; k += AMX_STEP, a += 64, b += STEP_BYTES, ahead.at += ahead.bytes) {
            load_step(a, span->stride, b, &ahead);
            MULTIPLY_ALL("tdpbf16ps");
            if (--left == 0) ahead.at += ahead.skip, left = ahead.run;
        }
    }
    STORE(0, acc, line);
    STORE(1, acc + SIDE, line);
    STORE(2, acc + SIDE * ld, line);
    STORE(3, acc + SIDE * ld + SIDE, line);
}

/* acc += sum * (scale of the row * scale of the column), as tile_int8() of kernel_body.h. */
__attribute__((target(AMX_TARGET))) static void add_scaled(float *acc, int ld, const int32_t *sums, const char *rows,
                                                           size_t stride, const float *scales) {
    for (int i = 0; i < 2 * SIDE; i++) {
        float *restrict out = acc + (size_t)i * ld, scale = *(const float *)(const void *)(rows + i * stride);
        for (int j = 0; j < 2 * SIDE; j++) out[j] = fmaf((float)sums[i * 2 * SIDE + j], scale * scales[j], out[j]);
    }
}

__attribute__((noinline)) void amx_tile_int8(float *acc, int ld, int mode, const Span *span, int count,
                                             const void *panel, Ahead ahead) {
    _Alignas(64) int32_t sums[2 * SIDE * 2 * SIDE];
    const char *chunk = span->at, *b = panel;
    (void)count;
    for (int i = 0; mode == REPLACE && i < 2 * SIDE; i++) memset(acc + (size_t)i * ld, 0, 2 * SIDE * sizeof *acc);
    for (int n = span->n; n > 0; n -= INT8_CHUNK, chunk += SCALE_BYTES + INT8_CHUNK) {
        const float *scales = (const float *)(const void *)b;
        b += 2 * LINE; /* the scales, and corrections, which are 0 for signed bytes */
        ZERO_ALL();
        for (int k = 0; k < smaller(n, INT8_CHUNK); k += 64, b += STEP_BYTES, ahead.at += ahead.bytes) {
            load_step(chunk + SCALE_BYTES + k, span->stride, b, &ahead);
            MULTIPLY_ALL("tdpbssd");
        }
        STORE(0, sums, LINE);
        STORE(1, sums + SIDE, LINE);
        STORE(2, sums + SIDE * 2 * SIDE, LINE);
        STORE(3, sums + SIDE * 2 * SIDE + SIDE, LINE);
        add_scaled(acc, ld, sums, chunk, span->stride, scales);
    }
}
#endif
