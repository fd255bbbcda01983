/* test_easycache.c - easycache.c on latents whose changes are chosen. */
#include "sora.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { STEPS = 30, N = 16 };

static _Alignas(64) float memory[2][4 * N];

static EasyCache cache_new(int which, bool guided) {
    memset(memory[which], 0xff, sizeof memory[which]); /* all NaN, so that a read before the first write shows */
    return easycache_take(&(Arena){.base = (char *)memory[which], .size = sizeof memory[which]}, N, guided);
}

/* Latents of a step: after the tenth, each element grows by the step's change, by turns up and down. */
static void latents_at(int step, const double *change, float x[N]) {
    double sum = 0;
    for (int i = 0; i <= step; i++) sum += change[i];
    for (int i = 0; i < N; i++) x[i] = (float)(i % 2 ? -sum : sum);
}

/* The velocity follows the latents: the rate is 1, and the mean of its absolute values is 1. */
static void velocity_at(const float x[N], float v[N], float offset) {
    for (int i = 0; i < N; i++) v[i] = x[i] + offset;
}

/* Runs all steps; picture[step] becomes 'c' or '-'. */
static void run_steps(EasyCache *c, double most, const double *change, bool guided, char picture[STEPS + 1]) {
    float x[N], v[N], u[N], now[N] = {0};
    for (int step = 0; step < STEPS; step++) {
        latents_at(step, change, x);
        bool left_out = easycache_leaves_out(c, most, step, STEPS, x);
        picture[step] = left_out ? '-' : 'c';
        velocity_at(x, v, 1), velocity_at(x, u, -3);
        if (!left_out) {
            easycache_keep(c, x, v, guided ? u : NULL);
            memcpy(now, x, sizeof now);
            continue;
        }
        float cond[N], uncond[N];
        easycache_velocity(c, x, cond, guided ? uncond : NULL);
        for (int i = 0; i < N; i++) {
            CHECK(cond[i] == x[i] + (now[i] + 1 - now[i]), "step %d: velocity %d is %g", step, i, cond[i]);
            if (!guided) continue;
            CHECK(uncond[i] == x[i] + (now[i] - 3 - now[i]), "step %d: uncond %d is %g", step, i, uncond[i]);
        }
    }
    picture[STEPS] = 0;
}

/* The example of easycache.c. The first step's latents are zeros. */
static const double example[STEPS] = {
    0, .25, .125, .0625, .0625, .03, .03, .03, .03, .03,
    .0204, .0204, .0204, .0101, .0101, .0101, .0101, .0101, .0101, .0101,
    .0101, .0101, .0101, .06, .001, .001, .06, .001, .001, .001};
static const char expected[] = "cccccccccc" "--c" "----c----c" "c--c--c";

static void check_rule(void) {
    char picture[STEPS + 1];
    for (int guided = 0; guided < 2; guided++) {
        EasyCache c = cache_new(0, guided);
        run_steps(&c, 0.05, example, guided, picture);
        CHECK(!strcmp(picture, expected), "steps are %s, expected %s", picture, expected);
    }
    EasyCache never = cache_new(0, false), always = cache_new(1, false);
    run_steps(&never, 1e-9, example, false, picture);
    CHECK(!strchr(picture, '-'), "with almost nothing to be left out, steps are %s", picture);
    run_steps(&always, 1e9, example, false, picture);
    CHECK(strspn(picture, "c") == EASYCACHE_FIRST &&
              strspn(picture + EASYCACHE_FIRST, "-") == STEPS - EASYCACHE_FIRST - 1,
          "with all that may be left out, steps are %s", picture);
}

void test_easycache(void) {
    check_rule();
}
