/* test_libm.c - the result does not depend on the C library.
 *
 * The program calls log, exp, pow, sin and cos of libm in double and rounds the results to float. Libraries differ in
 * the last bits of the double. The float is still the same if the exact value is further from the midpoint of two
 * floats than the library's error. The table gives that distance in ulp of a double, computed with 113 bits (gcc's
 * libquadmath). A library whose functions are wrong by less changes nothing:
 *
 *     9.17  noise, all 2^24 uniforms: cosine of 6034747 * 2^-24; the sines have 46.0, the logarithms 21.3
 *    14.7   RoPE: 850 latent frames, 1024 latent rows and columns, heads of width 128 and 32
 *   661     whole timesteps; 1.95 for the timesteps of euler with shifts 1 to 12 and up to 100 steps
 *   658     coefficients of unipc and dpm++ with shifts 1 to 12 and up to 100 steps; 3.2 up to 1000 steps
 * 2e4       bias of padded text (log of 1 to 4096), buckets of relative positions in the text encoder
 *
 * The test program is linked with --wrap (Makefile): calls of these functions come to this file, which calls libm and
 * changes the result by some ulp. The error of this machine's libm, below 1 ulp, is added to that. */
#include "sora.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- a libm with errors */

enum { EXACT, UP, DOWN, MIXED, ROUNDS = 6 };
static _Thread_local struct {
    int units;
    uint64_t round; /* UP: away from zero; DOWN: towards zero; MIXED and later: by a hash of the result */
} error;

/* Changes y by error.units ulp. Results 0 and 1 are exact in every library: log(1), cos(0), sin(0), pow(x, 0). */
static double moved(double y, uint64_t function) {
    if (error.round == EXACT || y == 0 || y == 1) return y;
    uint64_t bits, hash;
    memcpy(&bits, &y, sizeof bits);
    hash = (bits ^ function << 56 ^ error.round << 60) * 0x9e3779b97f4a7c15u;
    bool up = error.round == UP || (error.round >= MIXED && hash >> 63);
    bits += up ? (uint64_t)error.units : -(uint64_t)error.units;
    memcpy(&y, &bits, sizeof y);
    return y;
}

#define WRAP(name, number, parameters, ...) \
    double __real_##name parameters; \
    double __wrap_##name parameters; \
    double __wrap_##name parameters { return moved(__real_##name(__VA_ARGS__), number); }
WRAP(log, 1, (double x), x)
WRAP(log1p, 2, (double x), x)
WRAP(exp, 3, (double x), x)
WRAP(pow, 4, (double x, double y), x, y)
WRAP(cos, 5, (double x), x)
WRAP(sin, 6, (double x), x)

/* gcc may replace a sin() and a cos() by one call. */
void __real_sincos(double x, double *sine, double *cosine);
void __wrap_sincos(double x, double *sine, double *cosine);
void __wrap_sincos(double x, double *sine, double *cosine) {
    __real_sincos(x, sine, cosine);
    *sine = moved(*sine, 6);
    *cosine = moved(*cosine, 5);
}

/* Calls `fill` with the exact libm and with errors. The bits of `values` must not change. */
static void check_rounds(const char *what, int units, void (*fill)(const void *of, float *values),
                         const void *of, size_t count) {
    float *expected = allocate(count * sizeof(float)), *found = allocate(count * sizeof(float));
    fill(of, expected);
    for (int round = UP; round < ROUNDS; round++) {
        size_t differ = 0;
        error.units = units;
        error.round = (uint64_t)round;
        fill(of, found);
        error.round = EXACT;
        for (size_t i = 0; i < count; i++) differ += memcmp(&found[i], &expected[i], sizeof(float)) != 0;
        CHECK(differ == 0, "%s: %zu of %zu floats differ if libm is wrong by %d ulp (round %d)", what, differ,
              count, units, round);
    }
    free(expected), free(found);
}

/* ---------------------------------------------------------------- noise */

enum { UNIFORMS = 1 << 24, BLOCK = 1 << 12 };
static float one_radius; /* a uniform number whose radius is 1 */

/* The radii, cosines and sines of the eight uniform numbers from `first` * 2^-24 on. */
static void normal_parts(int first, float parts[32]) {
    for (int j = 0; j < 8; j++) {
        parts[j] = parts[24 + j] = (float)(first + j) * 0x1p-24f;
        parts[8 + j] = 0; /* an angle whose cosine is 1 */
        parts[16 + j] = one_radius;
    }
    normal_16(parts);
    normal_16(parts + 16);
}

/* Whether results changed up and down by `units` ulp round to the same floats. */
static bool survives(int first, int units) {
    float up[32], down[32];
    error.units = units;
    error.round = UP;
    normal_parts(first, up);
    error.round = DOWN;
    normal_parts(first, down);
    error.round = EXACT;
    return !memcmp(up, down, sizeof up);
}

static void find_one_radius(void) {
    float x[16] = {0};
    for (int k = 6601364 - 64; x[0] != 1 && k < UNIFORMS; k++) { /* 1 - exp(-1/2) */
        one_radius = x[0] = (float)k * 0x1p-24f;
        normal_16(x);
    }
    CHECK(x[0] == 1, "no uniform number gives the radius 1");
}

static void check_noise(void) {
    static bool wrong[UNIFORMS / BLOCK];
    int block = 0;
    find_one_radius();
    PARALLEL_FOR (int b = 0; b < UNIFORMS / BLOCK; b++)
        for (int i = 0; i < BLOCK; i += 8) wrong[b] |= !survives(b * BLOCK + i, 8);
    while (block < UNIFORMS / BLOCK && !wrong[block]) block++;
    CHECK(block == UNIFORMS / BLOCK, "after uniform %d * 2^-24 a float differs if libm is wrong by 8 ulp",
          block * BLOCK);
    CHECK(!survives(6034744, 10),
          "10 ulp do not change the float of the cosine of 6034747 * 2^-24, expected a change from 9.17 on");
}

/* ---------------------------------------------------------------- positions, time, text */

static void fill_rope(const void *of, float *values) {
    const int *size = of; /* positions, pairs */
    for (int i = 0; i < size[0]; i++) rope_angles(values + (size_t)i * 2 * (size_t)size[1], i, size[1]);
}

static void check_rope(void) {
    static const int sizes[][2] = {{850, 22}, {1024, 21}, {850, 6}, {1024, 5}}; /* heads 128 and 32 wide */
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        check_rounds("RoPE", 8, fill_rope, sizes[i], 2 * (size_t)sizes[i][0] * (size_t)sizes[i][1]);
}

static void fill_times(const void *of, float *values) {
    int freq_dim = *(const int *)of;
    for (int t = 0; t <= 1000; t++) timestep_sinusoids(values + (size_t)t * (size_t)freq_dim, freq_dim, (float)t);
}

/* The timesteps of euler are not whole numbers. */
static void fill_euler_times(const void *of, float *values) {
    int freq_dim = *(const int *)of;
    for (int shift = 1; shift <= 12; shift++) {
        Schedule schedule = schedule_make(EULER, 100, shift, 1000);
        for (int i = 0; i < 100; i++, values += freq_dim) timestep_sinusoids(values, freq_dim, schedule.timesteps[i]);
        schedule_free(&schedule);
    }
}

/* Timesteps of distilled models: Self-Forcing, rCM (rounded to bfloat16), FastWan. */
static void fill_list_times(const void *of, float *values) {
    static const float list[] = {1000, 937.5f, 833.3333f, 625, 988, 932, 852, 608, 757, 522};
    int freq_dim = *(const int *)of;
    for (int i = 0; i < 10; i++, values += freq_dim) timestep_sinusoids(values, freq_dim, list[i]);
}

static void check_time(void) {
    static const int dims[] = {128, 256};
    for (int i = 0; i < 2; i++) {
        check_rounds("time", 8, fill_times, &dims[i], 1001 * (size_t)dims[i]);
        check_rounds("a list's time", 8, fill_list_times, &dims[i], 10 * (size_t)dims[i]);
        check_rounds("euler's time", 1, fill_euler_times, &dims[i], 1200 * (size_t)dims[i]);
    }
}

static void fill_padding(const void *of, float *values) {
    const Transformer *t = of;
    for (int n = 0; n < t->text_len; n++) {
        Arena arena = arena_open((size_t)1 << 14);
        values[n] = text_context_take(&arena, t, n).bias[n];
        arena_close(&arena);
    }
}

static void fill_embeds(const void *of, float *values) {
    static const int32_t ids[512];
    text_encode(of, ids, 512, values);
}

static void check_text(void) {
    Transformer t = {.text_len = 512, .dim = 1, .num_layers = 1};
    check_rounds("padding", 8, fill_padding, &t, 512);
    kernels_choose("auto");
    Model model = model_load("tests/goldens/model/model.gguf", F32);
    check_rounds("text encoder", 8, fill_embeds, &model.text_encoder, 512 * (size_t)model.text_encoder.dim);
    model_free(&model);
}

/* ---------------------------------------------------------------- sampler */

enum { LATENTS = 8, SHIFTS = 12 };
typedef struct {
    Sampler sampler;
    int steps;
} Run;

static void uniform(Generator *generator, float *values) {
    for (int i = 0; i < LATENTS; i++) values[i] = (float)(generator_next(generator) & 0xffffff) * 0x1p-23f - 1;
}

/* The latents after each step, for each shift. */
static void fill_latents(const void *of, float *values) {
    const Run *run = of;
    _Alignas(64) char memory[1024];
    Generator generator;
    generator_seed(&generator, 1);
    for (int shift = 1; shift <= SHIFTS; shift++) {
        Schedule schedule = schedule_make(run->sampler, run->steps, shift, 1000);
        History history = history_take(&(Arena){.base = memory, .size = sizeof memory}, LATENTS);
        float latents[LATENTS], velocity[LATENTS];
        uniform(&generator, latents);
        for (int step = 0; step < run->steps; step++, values += LATENTS) {
            uniform(&generator, velocity);
            sampler_step(&schedule, step, velocity, latents, &history, NULL);
            memcpy(values, latents, sizeof latents);
        }
        schedule_free(&schedule);
    }
}

static void check_sampler(void) {
    for (int sampler = 0; sampler < SAMPLERS; sampler++)
        for (int steps = 1; steps <= 1000; steps += steps < 100 ? 1 : 100)
            check_rounds(sampler_name((Sampler)sampler), 8, fill_latents, &(Run){(Sampler)sampler, steps},
                         (size_t)SHIFTS * (size_t)steps * LATENTS);
}

void test_libm(void) {
    check_noise();
    check_rope();
    check_time();
    check_text();
    check_sampler();
}
