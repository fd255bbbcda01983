/* peak.c - what the machine can do: the yardstick for everything that bench measures.
 *
 * Arithmetic. A processor multiplies fastest when nothing but registers takes part: CHAINS independent sums,
 * so many that a new instruction starts every cycle in every unit while earlier ones are under way, each one
 * instruction over and over. There is a row for each such instruction: fused multiply-add of one float, of a
 * register of floats, dot products of bfloat16 pairs, of four bytes. No kernel that is made of it can be
 * faster; one that reaches nine tenths has nothing left to gain but that tenth, or another instruction.
 *
 * Memory. All threads read a region larger than the caches, each element once. */
#include "bench/bench.h"

#include <string.h>

enum { CHAINS = 12, ROUNDS = 1 << 16 };

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* A function that runs `sum = instruction` ROUNDS times in CHAINS chains. Bytes of 0x3f are 0.75 in any of
 * the types. OPAQUE tells the compiler that a register may hold anything, or it would see
 * that all chains are equal. */
#define OPAQUE(v) __asm__ volatile("" : "+" VECTOR(v))
#define PEAK(name, target, V, instruction)                                                                   \
    static target void name(void) {                                                                          \
        V sums[CHAINS], a;                                                                                   \
        memset(&a, 0x3f, sizeof a);                                                                          \
        UNROLL for (int i = 0; i < CHAINS; i++) {                                                            \
            sums[i] = a;                                                                                     \
            OPAQUE(sums[i]);                                                                                 \
        }                                                                                                    \
        for (int round = 0; round < ROUNDS; round++)                                                         \
            UNROLL for (int i = 0; i < CHAINS; i++) {                                                        \
                V sum = sums[i];                                                                             \
                sums[i] = instruction;                                                                       \
            }                                                                                                \
        UNROLL for (int i = 0; i < CHAINS; i++) OPAQUE(sums[i]);                                             \
    }

#if defined(__x86_64__)
#include <immintrin.h>
#define VECTOR(v) "v"(v)
#define TARGET(isa) __attribute__((target(isa)))
PEAK(scalar_f32, TARGET("fma"), __m128, _mm_fmadd_ss(a, a, sum))
PEAK(avx2_f32, TARGET("avx2,fma"), __m256, _mm256_fmadd_ps(a, a, sum))
PEAK(avx512_f32, TARGET("avx512f"), __m512, _mm512_fmadd_ps(a, a, sum))
PEAK(avx512_bf16, TARGET("avx512f,avx512bf16"), __m512,
     _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)a))
PEAK(avx512_int8, TARGET("avx512f,avx512vnni"), __m512i, _mm512_dpbusd_epi32(sum, a, a))
#ifdef __linux__
/* The same in tiles: four sums, three times. */
#define TILE_PEAK(name, instruction)                                                                         \
    static void name(void) {                                                                                 \
        amx_enter();                                                                                         \
        for (int round = 0; round < ROUNDS; round++)                                                         \
            for (int i = 0; i < CHAINS; i += 4)                                                              \
                __asm__ volatile(instruction " %%tmm7, %%tmm6, %%tmm0\n" instruction " %%tmm7, %%tmm6, %%tmm1\n"   \
                                 instruction " %%tmm7, %%tmm6, %%tmm2\n" instruction " %%tmm7, %%tmm6, %%tmm3" : :); \
        amx_leave();                                                                                         \
    }
TILE_PEAK(tiles_bf16, "tdpbf16ps")
TILE_PEAK(tiles_int8, "tdpbssd")
#endif
#define HAS(name, test) static bool has_##name(void) { return test; }
HAS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
HAS(avx512, __builtin_cpu_supports("avx512f"))
HAS(avx512_bf16, __builtin_cpu_supports("avx512bf16"))
HAS(avx512_vnni, __builtin_cpu_supports("avx512vnni"))
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define VECTOR(v) "w"(v)
PEAK(scalar_f32, , float, __builtin_fmaf(a, a, sum))
PEAK(neon_f32, , float32x4_t, vfmaq_f32(sum, a, a))
PEAK(neon_int8, __attribute__((target("arch=armv8.2-a+dotprod"))), int32x4_t,
     vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(a)))
static bool has_neon(void) { return true; }
static bool has_dotprod(void) { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#else
#define VECTOR(v) "m"(v)
PEAK(plain_f32, , float, sum * a + a)
static bool has_plain(void) { return true; }
#endif

typedef struct {
    const char *name, *tables; /* of kernels that use it, a space around each */
    Precision precision;
    double flop; /* of one instruction */
    void (*run)(void);
    bool (*runs_here)(void);
} Instruction;

static const Instruction instructions[] = {
#if defined(__x86_64__)
    {"FMA of one float", " naive generic ", F32, 2, scalar_f32, has_avx2},
    {"AVX2 FMA", " avx2 ", F32, 16, avx2_f32, has_avx2},
    {"AVX-512 FMA", " avx512 avx512vnni avx512bf16 amx ", F32, 32, avx512_f32, has_avx512},
    {"AVX-512 VDPBF16PS", " avx512bf16 ", BF16, 64, avx512_bf16, has_avx512_bf16},
    {"AVX-512 VPDPBUSD", " avx512vnni avx512bf16 ", INT8, 128, avx512_int8, has_avx512_vnni},
#ifdef __linux__
    {"AMX TDPBF16PS", " amx ", BF16, 16384, tiles_bf16, can_amx},
    {"AMX TDPBSSD", " amx ", INT8, 32768, tiles_int8, can_amx},
#endif
#elif defined(__aarch64__)
    {"FMADD of one float", " naive generic ", F32, 2, scalar_f32, has_neon},
    {"NEON FMLA", " neon neondotprod ", F32, 8, neon_f32, has_neon},
    {"NEON SDOT", " neondotprod ", INT8, 32, neon_int8, has_dotprod},
#else
    {"multiply and add", " naive generic ", F32, 2, plain_f32, has_plain},
#endif
};
enum { INSTRUCTIONS = sizeof instructions / sizeof *instructions };

static double rate_of(int i, int threads, double duration) {
    int before = threads_count(), pieces = 4 * threads;
    double start = seconds(), flop = 0;
    threads_set(threads);
    do {
        PARALLEL_FOR (int piece = 0; piece < pieces; piece++) instructions[i].run();
        flop += instructions[i].flop * CHAINS * ROUNDS * pieces;
    } while (seconds() - start < duration);
    threads_set(before);
    return flop / (seconds() - start);
}

static bool used_by_kernels(const Instruction *instruction) {
    char name[32];
    snprintf(name, sizeof name, " %s ", kernels->name);
    return strstr(instruction->tables, name);
}

/* The fastest row of the chosen kernels that can multiply in a precision; three tries, since one may be
 * interrupted. It is kept until other kernels are chosen. */
static int best_for(Precision precision) {
    static int best[PRECISIONS];
    static const Kernels *found_for[PRECISIONS];
    double highest = 0;
    if (found_for[precision] == kernels) return best[precision];
    for (int try = 0; try < 3 * INSTRUCTIONS; try++) {
        int i = try % INSTRUCTIONS;
        if (instructions[i].precision > precision || !instructions[i].runs_here()) continue;
        double rate = used_by_kernels(&instructions[i]) ? rate_of(i, 1, 0.02) : 0;
        if (rate > highest) highest = rate, best[precision] = i;
    }
    found_for[precision] = kernels;
    return best[precision];
}

double peak_product(Precision precision, int threads, double duration) {
    return rate_of(best_for(precision), threads, duration);
}

const char *peak_instruction(Precision precision) { return instructions[best_for(precision)].name; }

enum { PIECES = 80 }; /* for each thread */

static void run_arithmetic(void *with) {
    const Instruction *instruction = with;
    int pieces = PIECES * threads_count();
    PARALLEL_FOR (int piece = 0; piece < pieces; piece++) instruction->run();
}

typedef struct {
    const uint64_t *words;
    size_t count;
} Region;

static volatile uint64_t sink; /* what is stored there has to be computed */

static void run_reading(void *with) {
    enum { PIECE = 1 << 16 };
    const Region *region = with;
    PARALLEL_FOR (size_t start = 0; start < region->count; start += PIECE) {
        uint64_t sum = 0;
        for (size_t i = start; i < start + PIECE; i++) sum += region->words[i];
        sink = sum;
    }
}

static void bench_arithmetic(int threads) {
    for (int i = 0; i < INSTRUCTIONS; i++) {
        const Instruction *it = &instructions[i];
        double flop = it->flop * CHAINS * ROUNDS * PIECES * threads;
        if (it->runs_here())
            measure(&(Job){"peak", it->name, it->precision, 0, threads, flop, 0, run_arithmetic, (void *)it});
    }
}

static void bench_reading(int threads) {
    size_t bytes = (size_t)1 << 30;
    Region region = {hold(bytes), bytes / 8};
    measure(&(Job){"peak", "memory, reading", F32, 0, threads, 0, (double)bytes, run_reading, &region});
    release();
}

void bench_peaks(void) {
    int all = threads_count();
    for (int threads = 1;; threads = all) {
        bench_arithmetic(threads);
        bench_reading(threads);
        if (threads == all) break;
    }
}
