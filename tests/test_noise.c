/* test_noise.c - noise.c against numbers that torch's CPU generator drew (goldens/noise). */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The seeds of make_goldens.py. */
static const uint64_t seeds[] = {0, 7, 4294967303, 18446744073709551615u};
enum { SEEDS = sizeof seeds / sizeof *seeds };

/* Reads goldens/noise/NAME.npy (SEEDS, *columns) into a new array. *columns is 0 if the file is not as expected. */
static double *load(const char *name, int *columns) {
    char path[64];
    snprintf(path, sizeof path, "goldens/noise/%s.npy", name);
    Npy array;
    const char *why = npy_read(test_path(path), &array);
    bool right = !why && array.shape.n == 2 && array.shape.d[0] == SEEDS;
    CHECK(right, "%s: %s", path, why ? why : "another shape");
    *columns = right ? array.shape.d[1] : 0;
    size_t count = SEEDS * (size_t)*columns;
    double *values = allocate(count * sizeof *values);
    npy_get(&array, 0, count, values);
    npy_free(&array);
    return values;
}

/* torch's random_() of int32 returns the low 31 bits of each integer. */
static void test_integers(void) {
    int n;
    double *expected = load("integers", &n), *row = expected;
    Generator generator;
    for (int s = 0; s < SEEDS; s++, row += n) {
        int same = 0;
        generator_seed(&generator, seeds[s]);
        for (int i = 0; i < n; i++) same += (generator_next(&generator) & 0x7fffffff) == row[i];
        CHECK(same == n, "seed %llu: %d of %d integers equal torch's", (unsigned long long)seeds[s], same, n);
    }
    free(expected);
    /* The C++ standard ([rand.predef]) defines the 10000th integer of mt19937. */
    generator_seed(&generator, 5489);
    uint32_t last = 0;
    for (int i = 0; i < 10000; i++) last = generator_next(&generator);
    CHECK(last == 4123659995u, "the 10000th integer of seed 5489 is %u", (unsigned)last);
}

static double largest_difference(const float *a, const double *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, isfinite(a[i]) ? fabs(a[i] - b[i]) : INFINITY);
    return worst;
}

/* Draws `pieces` times from one generator, sizes[i] numbers each, and compares with a row of the golden. */
static void test_draws(const char *name, const int *sizes, int pieces) {
    int columns;
    double *expected = load(name, &columns);
    size_t n = (size_t)columns;
    float *drawn = allocate(n * sizeof *drawn);
    for (int s = 0; s < SEEDS; s++) {
        Generator generator;
        generator_seed(&generator, seeds[s]);
        size_t at = 0;
        for (int i = 0; i < pieces && n; at += (size_t)sizes[i++])
            generator_randn(&generator, drawn + at, (size_t)sizes[i]);
        double worst = largest_difference(drawn, expected + (size_t)s * n, n);
        CHECK(at == n && worst <= 1e-6, "%s, seed %llu: largest difference %.1e", name, (unsigned long long)seeds[s],
              worst);
    }
    free(drawn);
    free(expected);
}

/* draw_next() in parts must give the same n numbers as one generator_randn(). After generator_skip(n), the generator
 * must go on as after generator_randn(n). */
static void test_parts(int n) {
    static const int parts[] = {1, 5, 16, 3, 48, 17, 2};
    float *whole = allocate(sizeof(float) * ((size_t)n + 40)), *handed = allocate(sizeof(float) * ((size_t)n + 40));
    for (uint64_t seed = 0; seed < 3; seed++) {
        Generator generator, later;
        generator_seed(&generator, seed);
        generator_seed(&later, seed);
        generator_randn(&generator, whole, (size_t)n);
        generator_randn(&generator, whole + n, 23);
        generator_randn(&generator, whole + n + 23, 5);
        Draw draw = draw_start(seed, (size_t)n);
        for (int at = 0, i = 0; at < n; i++) {
            int part = smaller(parts[(i + (int)seed) % 7], n - at);
            draw_next(&draw, handed + at, (size_t)part);
            at += part;
        }
        generator_skip(&later, (size_t)n);
        generator_randn(&later, handed + n, 23);
        generator_randn(&later, handed + n + 23, 5);
        CHECK(!memcmp(whole, handed, sizeof(float) * (size_t)n),
              "%d numbers drawn in parts differ, seed %d", n, (int)seed);
        CHECK(!memcmp(whole + n, handed + n, sizeof(float) * 28),
              "the numbers after %d skipped ones differ, seed %d", n, (int)seed);
    }
    free(whole), free(handed);
}

void test_noise(void) {
    static const int sizes[] = {1, 2, 15, 16, 17, 31, 33, 4099};
    static const int mixed[] = {3, 5, 16, 1, 17, 2, 40};
    char name[32];
    test_integers();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        snprintf(name, sizeof name, "randn_%d", sizes[i]);
        test_draws(name, &sizes[i], 1);
    }
    test_draws("randn_mixed", mixed, sizeof mixed / sizeof *mixed);
    for (int n = 1; n <= 100; n++) test_parts(n);
    test_parts(4096);
    test_draws("randn_clip", (int[]){16 * 2 * 4 * 6}, 1);
}
