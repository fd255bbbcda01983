/* test_noise.c - noise.c against torch's CPU generator. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>

/* As make_goldens.py writes them. */
static const uint64_t seeds[] = {0, 7, 4294967303, 18446744073709551615u};
enum { SEEDS = sizeof seeds / sizeof *seeds };

/* The numbers of a golden, a new array with a row a seed, and their count in a row; 0 if it is not so. */
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

/* torch's random_() of int32 gives the low 31 bits of each. */
static void test_integers(void) {
    int n;
    double *expected = load("integers", &n), *row = expected;
    Generator generator;
    for (int s = 0; s < SEEDS; s++, row += n) {
        int same = 0;
        generator_seed(&generator, seeds[s]);
        for (int i = 0; i < n; i++) same += (generator_next(&generator) & 0x7fffffff) == row[i];
        CHECK(same == n, "seed %llu: %d of %d integers are torch's", (unsigned long long)seeds[s], same, n);
    }
    free(expected);
    /* The C++ standard (rand.predef) states the 10000th of mt19937, with all its bits. */
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

/* A row of the golden is what one generator draws in pieces of `sizes`. */
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
        CHECK(at == n && worst <= 1e-6, "%s, seed %llu: off by %.1e", name, (unsigned long long)seeds[s],
              worst);
    }
    free(drawn);
    free(expected);
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
    test_draws("randn_clip", (int[]){16 * 2 * 4 * 6}, 1);
}
