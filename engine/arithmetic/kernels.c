/* kernels.c - the kernel tables, and the choice among them when the program starts.
 *
 * kernel_body.h is written once in a small vocabulary of vector operations. The vocabulary is defined four
 * times, in vector_*.h: for one float (any machine, and the readable meaning of the rest), AVX2, AVX-512 and
 * NEON. Functions carry their instruction set as an attribute, so one binary holds them all and no compiler
 * flag is needed.
 *
 * TILE_ROWS x TILE_VECTORS is as many accumulators as the register file holds beside one row element and one
 * vector of each column: 14x2 of 32 registers on AVX-512, 6x2 of 16 on AVX2, 6x4 of 32 on NEON. */
#include "engine/engine.h"

#include <math.h>

/* Loops over a tile are unrolled whole, or its accumulators would not stay in registers. */
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

enum { PART = 1536 }; /* of k, at most: this part of a panel and of a block's rows stay in the second-level cache */

enum { DISTANCE = 128 }; /* words of a row of weights that are fetched before they are transposed */

/* Into the second-level cache. */
#if defined(__GNUC__)
#define PREFETCH(p) __builtin_prefetch(p, 0, 2)
#else
#define PREFETCH(p) ((void)(p))
#endif

/* ---------------------------------------------------------------- generic */

/* NaN takes the second way: C leaves its conversion undefined, and what it multiplies is NaN already. */
static inline float power_of_two(float n) {
    return float_from_bits((uint32_t)(n >= -127.0f ? (int)n + 127 : 0) << 23);
}

static inline uint32_t dot_int8(uint32_t sum, uint32_t a, uint32_t b) {
    for (int shift = 0; shift < 32; shift += 8)
        sum += (uint32_t)((int8_t)(a >> shift & 255) * (int8_t)(b >> shift & 255));
    return sum;
}

#define ISA_NAME "generic"
#define NAME(x) generic_##x
#define TARGET
#define TILE_ROWS 4
#define TILE_VECTORS 4
#define FAST_INT8 false
#define BYTE_OFFSET 0
#include "engine/arithmetic/vector_generic.h"
#include "engine/arithmetic/kernel_body.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* ---------------------------------------------------------------- avx2 */

#define TARGET_AVX2 __attribute__((target("avx2,fma")))

static inline TARGET_AVX2 float avx2_highest(__m256 v) {
    float x[8], m;
    _mm256_storeu_ps(x, v);
    m = x[0];
    for (int i = 1; i < 8; i++) m = m > x[i] ? m : x[i];
    return m;
}

static inline TARGET_AVX2 void avx2_store_bf16(uint16_t *p, __m256 v) {
    __m256i bits = _mm256_castps_si256(v),
            odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000),
                              _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    bits = _mm256_srli_epi32(bits, 16);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x88);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(bits));
}

/* Two rounds within halves of a register, then the halves trade places. */
static inline TARGET_AVX2 void transpose_8x8(__m256i r[8]) {
    __m256i a[8], b[8];
    UNROLL for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

#define ISA_NAME "avx2"
#define NAME(x) avx2_##x
#define TARGET TARGET_AVX2
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define FAST_INT8 true
#define BYTE_OFFSET 0
#include "engine/arithmetic/vector_avx2.h"
#include "engine/arithmetic/kernel_body.h"

/* --------------------------------------------------------------- avx512, with one, two or no dot products */

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw")))

static inline TARGET_AVX512 void avx512_store_bf16(uint16_t *p, __m512 v) {
    __m512i bits = _mm512_castps_si512(v),
            odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    bits = _mm512_srli_epi32(bits, 16);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bits));
}

/* b with the signs of a. */
static inline TARGET_AVX512 __m512i avx512_sign(__m512i b, __m512i a) {
    return _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
}

/* The same in quarters of a register, which then trade places in two rounds. */
static inline TARGET_AVX512 void transpose_16x16(__m512i r[16]) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    }
}

#define ISA_NAME "avx512"
#define NAME(x) avx512_##x
#define TARGET TARGET_AVX512
#define TILE_ROWS 14
#define TILE_VECTORS 2
#define FAST_INT8 true
#define BYTE_OFFSET 0
#include "engine/arithmetic/vector_avx512.h"
#include "engine/arithmetic/kernel_body.h"

#define ISA_NAME "avx512vnni"
#define NAME(x) avx512vnni_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define TILE_ROWS 14
#define TILE_VECTORS 2
#define FAST_INT8 true
#define BYTE_OFFSET 128
#define AVX512_VNNI
#include "engine/arithmetic/vector_avx512.h"
#include "engine/arithmetic/kernel_body.h"

#define ISA_NAME "avx512bf16"
#define NAME(x) avx512bf16_##x
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,avx512bf16")))
#define TILE_ROWS 14
#define TILE_VECTORS 2
#define FAST_INT8 true
#define BYTE_OFFSET 128
#define AVX512_VNNI
#define DOT_BF16(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#include "engine/arithmetic/vector_avx512.h"
#include "engine/arithmetic/kernel_body.h"

#ifdef __linux__
/* The rest of a table whose products in BF16 and INT8 are in amx.c. A slice is 512 of k, so that a panel's slice stays
 * in the first-level cache. */
#define HAS_AMX
#define ISA_NAME "amx"
#define NAME(x) amx_##x
#define TARGET TARGET_AVX512
#define TILE_ROWS 14
#define TILE_VECTORS 2
#define FAST_INT8 false /* BF16 is faster: its weights are only transposed, and its sums need no scales */
#define BYTE_OFFSET 0
#define TILE_BF16 {amx_tile_bf16, 32, PART, 512, AMX_STEP}
#define TILE_INT8 {amx_tile_int8, 32, PART, 512, 2 * AMX_STEP}
#define ORDER AMX_TILES
#define ATTENTION amx_attention
#define ATTENTION_MEMORY amx_attention_memory
#define ENTER amx_enter
#define LEAVE amx_leave
#include "engine/arithmetic/vector_avx512.h"
#include "engine/arithmetic/kernel_body.h"
#endif

/* The compiler's builtin asks the operating system, too: it must save the registers. */
static bool can_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool can_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
#ifdef HAS_AMX
static bool can_run_amx(void) {
    return can_avx512() && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") && can_amx();
}
#endif
static bool can_avx512vnni(void) { return can_avx512() && __builtin_cpu_supports("avx512vnni"); }
static bool can_avx512bf16(void) { return can_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }

/* Intel's processors start VDPBF16PS every second cycle, half the rate of float32 (80 against 140 GFLOP/s a
 * core were measured on Emerald Rapids); there the float32 unit does the work. */
static bool pairs_pay(void) { return !__builtin_cpu_is("intel"); }

#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>

/* ---------------------------------------------------------------- neon, without and with dot products */

static inline void neon_store_bf16(uint16_t *p, float32x4_t v) {
    uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    bits = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    bits = vbslq_u32(vceqq_f32(v, v), bits, vdupq_n_u32(0x7fc00000));
    vst1_u16(p, vshrn_n_u32(bits, 16));
}

static inline void transpose_4x4(uint32x4_t r[4]) {
    uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32(r[0], r[1])),
               b = vreinterpretq_u64_u32(vtrn2q_u32(r[0], r[1]));
    uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32(r[2], r[3])),
               d = vreinterpretq_u64_u32(vtrn2q_u32(r[2], r[3]));
    r[0] = vreinterpretq_u32_u64(vtrn1q_u64(a, c));
    r[1] = vreinterpretq_u32_u64(vtrn1q_u64(b, d));
    r[2] = vreinterpretq_u32_u64(vtrn2q_u64(a, c));
    r[3] = vreinterpretq_u32_u64(vtrn2q_u64(b, d));
}

static inline uint32x4_t neon_dot_int8(uint32x4_t sum, int8x16_t a, int8x16_t b) {
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    return vaddq_u32(sum, vreinterpretq_u32_s32(vpaddq_s32(low, high)));
}

#define ISA_NAME "neon"
#define NAME(x) neon_##x
#define TARGET
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define FAST_INT8 false
#define BYTE_OFFSET 0
#include "engine/arithmetic/vector_neon.h"
#include "engine/arithmetic/kernel_body.h"

#if !defined(__clang__) || __clang_major__ >= 16 /* older ones know dot products for a whole file only */
#define HAS_NEON_DOTPROD
#define ISA_NAME "neondotprod"
#define NAME(x) neondotprod_##x
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define FAST_INT8 true
#define BYTE_OFFSET 0
#define NEON_DOTPROD
#include "engine/arithmetic/vector_neon.h"
#include "engine/arithmetic/kernel_body.h"

static bool can_neondotprod(void) { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#endif
#endif

/* ---------------------------------------------------------------- the choice */

static bool yes(void) { return true; }
static bool no(void) { return false; }

/* Best first. can(): this processor runs the table. prefers(): "auto" may take it, if this processor runs it. */
static const struct {
    const Kernels *table;
    bool (*can)(void), (*prefers)(void);
} choices[] = {
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef HAS_AMX
    {&amx_table, can_run_amx, yes},
#endif
    {&avx512bf16_table, can_avx512bf16, pairs_pay},
    {&avx512vnni_table, can_avx512vnni, yes},
    {&avx512_table, can_avx512, yes},
    {&avx2_table, can_avx2, yes},
#elif defined(__aarch64__)
#ifdef HAS_NEON_DOTPROD
    {&neondotprod_table, can_neondotprod, yes},
#endif
    {&neon_table, yes, yes},
#endif
    {&generic_table, yes, yes},
    {&naive_table, yes, no},
};

const Kernels *kernels = &generic_table;

const char *kernels_known(int i) {
    static const char *const names[] = {"naive", "generic", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx",
                                        "neon", "neondotprod", NULL};
    return names[i];
}

/* Tries what no macro tells (engine.h), with numbers that the compiler does not know. The square of 1 + 2^-12
 * lies in the middle between two floats: rounded to the even one before the addition, it adds up to 0. */
static const char *otherwise_rounded(const Kernels *table) {
    volatile float one = 1.0f, ulp = FLT_EPSILON, least = FLT_MIN, zero = 0.0f;
    float x = one + 0x1p-12f, y = -(one + 0x1p-11f), nan = zero / zero;
    if (table->multiply_add(x, x, y) != 0) return "a * b + c is rounded once: compile with -ffp-contract=off";
    if (fmaf(x, x, y) != 0x1p-24f) return "fmaf() rounds twice";
    if (one + ulp / 2 != 1 || one + ulp * 1.5f != one + 2 * ulp) return "results are not rounded to nearest";
    if (least / 2 == 0) return "subnormal numbers become 0: link without -ffast-math";
    if (nan == nan || signbit(-zero + zero)) return "NaN or -0 is not told from other numbers";
    return NULL;
}

const char *kernels_choose(const char *isa) {
    bool automatic = !strcmp(isa, "auto"), built = false;
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
        if (automatic ? !choices[i].prefers() : strcmp(isa, choices[i].table->name)) continue;
        built = true;
        if (!choices[i].can()) continue;
        const char *why = otherwise_rounded(choices[i].table);
        if (why) die(STATUS_CHECK, "this build computes other numbers: %s", why);
        kernels = choices[i].table;
        return NULL;
    }
    if (built) return reason("this processor cannot run the %s kernels", isa);
    char known[256] = "auto";
    for (int i = 0; kernels_known(i); i++) {
        if (!strcmp(isa, kernels_known(i))) return reason("this build has no %s kernels", isa);
        snprintf(known + strlen(known), sizeof known - strlen(known), kernels_known(i + 1) ? ", %s" : " or %s",
                 kernels_known(i));
    }
    return reason("'%s' is no instruction set; expected %s", isa, known);
}
