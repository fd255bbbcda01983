/* test_noise.c - noise.c against torch's CPU generator. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>

/* As make_goldens.py writes them. */
static const uint64_t seeds[] = {0, 7, 4294967303, 18446744073709551615u};
enum { SEEDS = sizeof seeds / sizeof *seeds };

static bool load(const char *name, char kind, Npy *out) {
    char path[64];
    snprintf(path, sizeof path, "goldens/noise/%s.npy", name);
    const char *why = npy_read(test_path(path), out);
    CHECK(!why, "%s: %s", path, why);
    if (!why)
        CHECK(out->kind == kind && out->shape.n == 2 && out->shape.d[0] == SEEDS, "%s: another shape", path);
    return !why;
}

/* torch's random_() of int32 gives the low 31 bits of each. */
static void test_integers(void) {
    Npy expected;
    Generator generator;
    if (!load("integers", 'i', &expected)) return;
    int n = expected.shape.d[1];
    const int32_t *row = expected.values;
    for (int s = 0; s < SEEDS; s++, row += n) {
        int same = 0;
        generator_seed(&generator, seeds[s]);
        for (int i = 0; i < n; i++) same += (int32_t)(generator_next(&generator) & 0x7fffffff) == row[i];
        CHECK(same == n, "seed %llu: %d of %d integers are torch's", (unsigned long long)seeds[s], same, n);
    }
    npy_free(&expected);
    /* The C++ standard (rand.predef) states the 10000th of mt19937, with all its bits. */
    generator_seed(&generator, 5489);
    uint32_t last = 0;
    for (int i = 0; i < 10000; i++) last = generator_next(&generator);
    CHECK(last == 4123659995u, "the 10000th integer of seed 5489 is %u", (unsigned)last);
}

static double largest_difference(const float *a, const float *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, isfinite(a[i]) ? fabs((double)a[i] - b[i]) : INFINITY);
    return worst;
}

/* A row of the golden is what one generator draws in pieces of `sizes`. */
static void test_draws(const char *name, const int *sizes, int pieces) {
    Npy expected;
    if (!load(name, 'f', &expected)) return;
    size_t n = (size_t)expected.shape.d[1];
    float *drawn = allocate(n * sizeof *drawn);
    for (int s = 0; s < SEEDS; s++) {
        Generator generator;
        generator_seed(&generator, seeds[s]);
        size_t at = 0;
        for (int i = 0; i < pieces; at += (size_t)sizes[i++])
            generator_randn(&generator, drawn + at, (size_t)sizes[i]);
        double worst = largest_difference(drawn, (const float *)expected.values + (size_t)s * n, n);
        CHECK(at == n && worst <= 1e-6, "%s, seed %llu: off by %.1e", name, (unsigned long long)seeds[s],
              worst);
    }
    free(drawn);
    npy_free(&expected);
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
