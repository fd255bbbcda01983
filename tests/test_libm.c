/* test_libm.c - every C library gives the same bits.
 *
 * The program takes logarithms, powers, sines and cosines from libm, in double, and rounds what follows from
 * them to float. Libraries differ in the last place of a double. The float is the same all the same where the
 * exact value is further than that from the middle between two floats; how much further, in units of the last
 * place of a double, by which the functions may be wrong, all at once (113 bits, gcc's libquadmath):
 *
 *     9.17  noise: all 2^24 uniforms (the cosine of 6034747 * 2^-24; sines 46.0, logarithms 21.3)
 *    14.7   RoPE: the first 850 frames, 1024 rows and columns of latents, heads 128 and 32 wide
 *   661     time steps that are whole numbers; 1.95 for euler's, shifts 1, 2, ... 12, up to 100 steps
 *   658     weights of unipc and dpm++, the same shifts, up to 100 steps; 3.2 up to 1000
 * 2e4       the text's padding (logarithms of 1 to 4096) and the distances between its words
 *
 * The tests are linked so that the program's calls of these functions come here (Makefile), and go on to libm
 * with a result that is moved. This library's own error, less than one unit, comes on top. */
#include "sora.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- a library that is wrong */

enum { EXACT, UP, DOWN, MIXED, ROUNDS = 6 };
static _Thread_local struct {
    int units;
    uint64_t round; /* UP: away from zero; DOWN: towards it; from MIXED on: each result its own way */
} error;

/* What is exact in every library stays so: log(1), cos(0), sin(0), pow(x, 0). */
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

/* A compiler may join the two. */
void __real_sincos(double x, double *sine, double *cosine);
void __wrap_sincos(double x, double *sine, double *cosine);
void __wrap_sincos(double x, double *sine, double *cosine) {
    __real_sincos(x, sine, cosine);
    *sine = moved(*sine, 6);
    *cosine = moved(*cosine, 5);
}

/* Runs what fills `values` with an exact library and with wrong ones: the bits must be the same. */
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
        CHECK(differ == 0, "%s: %zu of %zu numbers differ where libm is wrong by %d units (round %d)", what, differ,
              count, units, round);
    }
    free(expected), free(found);
}

/* ---------------------------------------------------------------- noise */

enum { UNIFORMS = 1 << 24, BLOCK = 1 << 12 };
static float one_radius; /* of a uniform number that gives the radius 1 */

/* The radii, cosines and sines of eight uniform numbers from `first` on. */
static void normal_parts(int first, float parts[32]) {
    for (int j = 0; j < 8; j++) {
        parts[j] = parts[24 + j] = (float)(first + j) * 0x1p-24f;
        parts[8 + j] = 0; /* an angle whose cosine is 1 */
        parts[16 + j] = one_radius;
    }
    normal_16(parts);
    normal_16(parts + 16);
}

/* Whether results that are moved up and down round to the same floats. */
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
    CHECK(block == UNIFORMS / BLOCK, "from uniform %d * 2^-24 on, some float differs where libm is wrong by 8 units",
          block * BLOCK);
    CHECK(!survives(6034744, 10), "10 units make no difference to the cosine of 6034747 * 2^-24, 9.17 from another");
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

/* euler's time steps are not whole. */
static void fill_euler_times(const void *of, float *values) {
    int freq_dim = *(const int *)of;
    for (int shift = 1; shift <= 12; shift++) {
        Schedule schedule = schedule_make(EULER, 100, shift, 1000);
        for (int i = 0; i < 100; i++, values += freq_dim) timestep_sinusoids(values, freq_dim, schedule.timesteps[i]);
        schedule_free(&schedule);
    }
}

/* Nor are those of models that bring their own: Self-Forcing's, rCM's (rounded to bfloat16), FastWan's. */
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

/* Latents after each step, for every shift. */
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
