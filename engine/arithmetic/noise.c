/* noise.c - draws the same normal numbers as torch.randn(n, generator=torch.Generator().manual_seed(seed)) on a CPU in
 * float32.
 *
 * Integers: the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998, mt19937ar.c), seeded with the low 32 bits of
 * the seed. Seed 5489 gives 3499211612, then 581869302.
 *
 * Normal numbers: the Box-Muller transform. torch has two variants and chooses by n
 * (ATen/native/cpu/DistributionTemplates.h):
 *
 *   n >= 16   Fill the array with uniform floats u. Transform it in blocks of 16, for j = 0 to 7:
 *                 radius = sqrt(-2 log(1 - u[j])), angle = 2 pi u[j+8]
 *                 x[j] = radius cos(angle), x[j+8] = radius sin(angle)
 *             If n is not a multiple of 16, draw the last 16 elements anew and transform them. They overwrite
 *             elements of the block before.
 *   n < 16    Compute one number at a time in double from two 53-bit uniforms. Each pair of uniforms gives two numbers;
 *             the second is kept for the next number, which may belong to a later call.
 *
 * So torch.randn(20) does not begin with torch.randn(4), and a call with n >= 16 does not use a kept number. A tensor
 * of any shape is drawn as a flat array in C order.
 *
 * torch computes log, sin and cos with its own float vector functions. This file computes them in double and rounds to
 * float. Five of six numbers then equal torch's bit for bit; the others differ by the error of torch's functions.
 * (Without AVX2 torch uses the C library, and differs from its own AVX2 results by 2e-6.)
 *
 * For n >= 16 the result is the same with every C library whose log, sin and cos are within 9 ulp of a double: for none
 * of the 2^24 uniform floats is the exact value that close to the midpoint of two floats (tests/test_libm.c). For
 * n < 16 there are 2^53 uniforms and no such proof; no clip draws so few. */
#include "engine/engine.h"

#include <math.h>

enum { N = 624, M = 397 };

static const double TWO_PI = 6.283185307179586476925;

void generator_seed(Generator *generator, uint64_t seed) {
    uint32_t *s = generator->state;
    s[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < N; i++) s[i] = 1812433253u * (s[i - 1] ^ s[i - 1] >> 30) + i;
    generator->next = N;
    generator->has_spare = false;
}

static uint32_t twist(uint32_t high, uint32_t low) {
    uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
}

static void next_state(uint32_t *s) {
    for (int i = 0; i < N; i++) s[i] = s[(i + M) % N] ^ twist(s[i], s[(i + 1) % N]);
}

uint32_t generator_next(Generator *generator) {
    if (generator->next == N) {
        next_state(generator->state);
        generator->next = 0;
    }
    uint32_t y = generator->state[generator->next++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

/* Uniform in [0, 1), a multiple of 2^-24. */
static float uniform_float(Generator *generator) {
    return (float)(generator_next(generator) & 0xffffff) * 0x1p-24f;
}

/* Uniform in [0, 1), a multiple of 2^-53. */
static double uniform_double(Generator *generator) {
    uint64_t high = generator_next(generator), low = generator_next(generator);
    return (double)((high << 32 | low) & 0x1fffffffffffffu) * 0x1p-53;
}

/* torch's normal_fill_16() */
void normal_16(float x[16]) {
    for (int j = 0; j < 8; j++) {
        float radius = sqrtf(-2 * (float)log(1 - (double)x[j]));
        float angle = (float)TWO_PI * x[j + 8];
        x[j] = radius * (float)cos(angle);
        x[j + 8] = radius * (float)sin(angle);
    }
}

static void uniform_fill(Generator *generator, float *out, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = uniform_float(generator);
}

static void normal_fill(Generator *generator, float *out, size_t n) {
    uniform_fill(generator, out, n);
    for (size_t i = 0; i + 16 <= n; i += 16) normal_16(out + i);
    if (n % 16) {
        uniform_fill(generator, out + n - 16, 16);
        normal_16(out + n - 16);
    }
}

/* torch's at::normal_distribution<double>: the first uniform gives the angle, the second the radius. */
static double normal_one(Generator *generator) {
    if (generator->has_spare) {
        generator->has_spare = false;
        return generator->spare;
    }
    double angle = TWO_PI * uniform_double(generator);
    double radius = sqrt(-2 * log1p(-uniform_double(generator)));
    generator->spare = radius * sin(angle);
    generator->has_spare = true;
    return radius * cos(angle);
}

void generator_randn(Generator *generator, float *out, size_t n) {
    if (n >= 16) normal_fill(generator, out, n);
    else for (size_t i = 0; i < n; i++) out[i] = (float)normal_one(generator);
}

/* ---------------------------------------------------------------- skipping, drawing in parts */

void generator_skip(Generator *generator, size_t n) {
    float unused[16];
    if (n < 16) {
        generator_randn(generator, unused, n);
        return;
    }
    for (size_t left = n % 16 ? n + 16 : n; left > 0; left--) generator_next(generator);
}

Draw draw_start(uint64_t seed, size_t n) {
    Draw draw = {.n = n, .place = 16};
    generator_seed(&draw.generator, seed);
    return draw;
}

/* Draws the next block. If n is not a multiple of 16, the last block is x[n-16..n-1]: it overlaps the block before, and
 * its uniforms are numbers n to n+15 of the sequence. */
static void next_block(Draw *draw) {
    draw->place = 0;
    if (draw->n < 16) {
        generator_randn(&draw->generator, draw->block, draw->n);
        return;
    }
    size_t used = (draw->at + 15) / 16 * 16; /* uniform numbers */
    if (draw->n - draw->at <= 16)
        for (; draw->n % 16 && used < draw->n; used++) generator_next(&draw->generator);
    uniform_fill(&draw->generator, draw->block, 16);
    normal_16(draw->block);
}

void draw_next(Draw *draw, float *out, size_t count) {
    for (size_t i = 0; i < count; i++, draw->at++) {
        bool last_begins = draw->n > 16 && draw->at == draw->n - 16;
        if (draw->place == 16 || last_begins) next_block(draw);
        out[i] = draw->block[draw->place++];
    }
}
