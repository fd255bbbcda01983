/* kernels.c - the kernel tables, and the choice among them when the program starts.
 *
 * kernel_body.h is written once in a small vocabulary of vector operations. Here the vocabulary is defined four
 * times: for one float (any machine, and the readable meaning of the rest), AVX2, AVX-512 and NEON. Functions carry
 * their instruction set as an attribute, so one binary holds them all and no compiler flag is needed.
 *
 * TILE_ROWS x TILE_VECTORS is as many accumulators as the register file holds beside one row element and one vector
 * of each column: 14x2 of 32 registers on AVX-512, 6x2 of 16 on AVX2, 6x4 of 32 on NEON. */
#include "engine/engine.h"

#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

void threads_set(int count) {
#ifdef _OPENMP
    omp_set_num_threads(count);
#else
    (void)count;
#endif
}

int threads_count(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

float lanes_sum(const float lanes[LANES]) {
    float sum[LANES];
    memcpy(sum, lanes, sizeof sum);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

/* Loops over a tile are unrolled whole, or its accumulators would not stay in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

/* ---------------------------------------------------------------- generic */

/* Not-a-number takes the second way: C leaves its conversion undefined, and what it multiplies is one already. */
static inline float power_of_two(float n) {
    uint32_t bits = (uint32_t)(n >= -127.0f ? (int)n + 127 : 0) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define ISA_NAME "generic"
#define NAME(x) generic_##x
#define TARGET
#define V float
#define VLEN 1
#define TILE_ROWS 4
#define TILE_VECTORS 4
#define V_LOAD(p) (*(p))
#define V_STORE(p, v) (*(p) = (v))
#define V_SET(x) (x)
#define V_ADD(a, b) ((a) + (b))
#define V_SUB(a, b) ((a) - (b))
#define V_MUL(a, b) ((a) * (b))
#define V_DIV(a, b) ((a) / (b))
#define V_FMA(a, b, c) fmaf(a, b, c)
#define V_MAX(a, b) ((a) > (b) ? (a) : (b))
#define V_MIN(a, b) ((a) < (b) ? (a) : (b))
#define V_ROUND(x) rintf(x)
#define V_POW2(n) power_of_two(n)
#define V_HMAX(v) (v)
#include "engine/kernel_body.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* ---------------------------------------------------------------- avx2 */

static inline __attribute__((target("avx2,fma"))) float highest_of_8(__m256 v) {
    float x[8], m;
    _mm256_storeu_ps(x, v);
    m = x[0];
    for (int i = 1; i < 8; i++) m = m > x[i] ? m : x[i];
    return m;
}

#define ISA_NAME "avx2"
#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma")))
#define V __m256
#define VLEN 8
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, v) _mm256_storeu_ps(p, v)
#define V_SET(x) _mm256_set1_ps(x)
#define V_ADD(a, b) _mm256_add_ps(a, b)
#define V_SUB(a, b) _mm256_sub_ps(a, b)
#define V_MUL(a, b) _mm256_mul_ps(a, b)
#define V_DIV(a, b) _mm256_div_ps(a, b)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_MAX(a, b) _mm256_max_ps(a, b)
#define V_MIN(a, b) _mm256_min_ps(a, b)
#define V_ROUND(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define V_POW2(n)                                                                                                    \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
#define V_HMAX(v) highest_of_8(v)
#include "engine/kernel_body.h"

/* ---------------------------------------------------------------- avx512 */

#define ISA_NAME "avx512"
#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx512f")))
#define V __m512
#define VLEN 16
#define TILE_ROWS 14
#define TILE_VECTORS 2
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, v) _mm512_storeu_ps(p, v)
#define V_SET(x) _mm512_set1_ps(x)
#define V_ADD(a, b) _mm512_add_ps(a, b)
#define V_SUB(a, b) _mm512_sub_ps(a, b)
#define V_MUL(a, b) _mm512_mul_ps(a, b)
#define V_DIV(a, b) _mm512_div_ps(a, b)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_MAX(a, b) _mm512_max_ps(a, b)
#define V_MIN(a, b) _mm512_min_ps(a, b)
#define V_ROUND(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define V_POW2(n)                                                                                                    \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23))
#define V_HMAX(v) _mm512_reduce_max_ps(v)
#include "engine/kernel_body.h"

/* The operating system must save the registers too; the compiler's builtin asks both. */
static bool has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512(void) { return __builtin_cpu_supports("avx512f"); }

#elif defined(__aarch64__)
#include <arm_neon.h>

/* ---------------------------------------------------------------- neon */

#define ISA_NAME "neon"
#define NAME(x) neon_##x
#define TARGET
#define V float32x4_t
#define VLEN 4
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define V_LOAD(p) vld1q_f32(p)
#define V_STORE(p, v) vst1q_f32(p, v)
#define V_SET(x) vdupq_n_f32(x)
#define V_ADD(a, b) vaddq_f32(a, b)
#define V_SUB(a, b) vsubq_f32(a, b)
#define V_MUL(a, b) vmulq_f32(a, b)
#define V_DIV(a, b) vdivq_f32(a, b)
#define V_FMA(a, b, c) vfmaq_f32(c, a, b)
#define V_MAX(a, b) vmaxq_f32(a, b)
#define V_MIN(a, b) vminq_f32(a, b)
#define V_ROUND(x) vrndnq_f32(x)
#define V_POW2(n) vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23))
#define V_HMAX(v) vmaxvq_f32(v)
#include "engine/kernel_body.h"
static bool has_neon(void) { return true; }
#endif

/* ---------------------------------------------------------------- the choice */

static bool has_generic(void) { return true; }

/* Best first. */
static const struct {
    const Kernels *table;
    bool (*runs_here)(void);
} choices[] = {
#if defined(__x86_64__)
    {&avx512_table, has_avx512},
    {&avx2_table, has_avx2},
#elif defined(__aarch64__)
    {&neon_table, has_neon},
#endif
    {&generic_table, has_generic},
};

const Kernels *kernels = &generic_table;

const char *kernels_choose(const char *isa) {
    bool any = !strcmp(isa, "auto");
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
        if (!any && strcmp(isa, choices[i].table->name)) continue;
        if (choices[i].runs_here()) {
            kernels = choices[i].table;
            return NULL;
        }
        if (!any) return reason("this processor cannot run the %s kernels", isa);
    }
    static const char *const known[] = {"generic", "avx2", "avx512", "neon"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(isa, known[i])) return reason("this build has no %s kernels", isa);
    return reason("'%s' is no instruction set; expected auto, generic, avx2, avx512 or neon", isa);
}

/* ---------------------------------------------------------------- types */

size_t type_bytes(Type type, size_t n) {
    switch (type) {
    case TYPE_F32: return n * 4;
    case TYPE_F16:
    case TYPE_BF16: return n * 2;
    case TYPE_Q8_0: return n / 32 * 34;
    }
    return 0;
}

const char *type_name(Type type) {
    switch (type) {
    case TYPE_F32: return "f32";
    case TYPE_F16: return "f16";
    case TYPE_BF16: return "bf16";
    case TYPE_Q8_0: return "q8_0";
    }
    return NULL;
}

/* Both halves of the range by one multiplication each: a subnormal half is its bits times 2^-24. */
static float half_to_float(uint16_t half) {
    uint32_t exponent = half >> 10 & 31, mantissa = half & 1023, bits;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24f;
    } else {
        bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
        memcpy(&value, &bits, sizeof value);
    }
    return half >> 15 ? -value : value;
}

static void convert_bf16(float *out, const uint8_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, in + 2 * i, sizeof half);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

static void convert_f16(float *out, const uint8_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, in + 2 * i, sizeof half);
        out[i] = half_to_float(half);
    }
}

/* Blocks of 32: a half-precision scale, then 32 signed bytes (ggml's block_q8_0). */
static void convert_q8_0(float *out, const uint8_t *in, size_t n) {
    for (size_t i = 0; i < n; i += 32, in += 34) {
        uint16_t half;
        memcpy(&half, in, sizeof half);
        float scale = half_to_float(half);
        for (int j = 0; j < 32; j++) out[i + j] = scale * (float)(int8_t)in[2 + j];
    }
}

void convert_to_floats(float *out, const void *in, Type type, size_t n) {
    switch (type) {
    case TYPE_F32: memcpy(out, in, n * 4); break;
    case TYPE_F16: convert_f16(out, in, n); break;
    case TYPE_BF16: convert_bf16(out, in, n); break;
    case TYPE_Q8_0: convert_q8_0(out, in, n); break;
    }
}
