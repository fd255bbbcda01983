/* test_sampler.c - sampler.c against diffusers' schedulers, against the formulas of distilled models, and on a straight
 * path, whose end is known. */
#include "tests/test.h"
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The columns of the tables that make_goldens.py writes. */
enum { WIDTH = 6, SHIFT = 0, STEPS, STEP, TIMESTEP, SIGMA, VELOCITY, LATENTS = VELOCITY + WIDTH,
       AFTER = LATENTS + WIDTH, COLUMNS = AFTER + WIDTH };

static History history_new(size_t n) {
    static _Alignas(64) char memory[1024];
    memset(memory, 0xff, sizeof memory); /* all NaN, so that a read before the first write shows */
    return history_take(&(Arena){.base = memory, .size = sizeof memory}, n);
}

/* Reads goldens/sampler/NAME.npy into a new array of *rows rows; NULL if its shape is not as expected. */
static float *load(const char *name, int rank, int columns, int *rows) {
    char path[64];
    snprintf(path, sizeof path, "goldens/sampler/%s.npy", name);
    Npy array;
    const char *wrong = npy_read(test_path(path), &array);
    CHECK(!wrong, "%s: %s", path, wrong);
    if (wrong) return NULL;
    bool shaped = array.shape.n == rank && array.shape.d[rank - 1] == columns;
    CHECK(shaped, "%s has another shape than the test", path);
    float *values = shaped ? npy_floats(&array) : NULL;
    *rows = array.shape.d[0];
    npy_free(&array);
    return values;
}

/* Each row of the table is one step. A row with step 0 begins a new run. */
static void test_table(Sampler sampler) {
    const char *name = sampler_name(sampler);
    int rows;
    float *table = load(name, 2, COLUMNS, &rows);
    if (!table) return;
    History history = history_new(WIDTH);
    Schedule schedule = {0};
    float latents[WIDTH];
    for (int r = 0; r < rows; r++) {
        const float *row = table + r * COLUMNS;
        int step = (int)row[STEP];
        if (step == 0) {
            schedule_free(&schedule);
            schedule = schedule_make(sampler, (int)row[STEPS], row[SHIFT], 1000);
            memcpy(latents, row + LATENTS, sizeof latents);
        }
        CHECK(schedule.timesteps[step] == row[TIMESTEP], "%s row %d: time step %.9g, not %.9g", name, r,
              schedule.timesteps[step], row[TIMESTEP]);
        CHECK(schedule.sigmas[step] == row[SIGMA], "%s row %d: sigma %.9g, not %.9g", name, r,
              schedule.sigmas[step], row[SIGMA]);
        sampler_step(&schedule, step, row + VELOCITY, latents, &history, NULL);
        double error = relative_error(latents, row + AFTER, WIDTH);
        CHECK(error < 2e-6, "%s row %d (shift %g, %g steps): relative error of step %d is %.1e", name, r, row[SHIFT],
              row[STEPS], step, error);
    }
    schedule_free(&schedule);
    free(table);
}

static void test_long_schedules(void) {
    int rows;
    float *table = load("schedule", 3, 2, &rows);
    if (!table) return;
    const float *row = table;
    for (int sampler = 0; sampler < SAMPLERS; sampler++) {
        Schedule schedule = schedule_make((Sampler)sampler, 1000, 5, 1000);
        int differ = 0;
        for (int i = 0; i < 1000; i++, row += 2)
            differ += schedule.timesteps[i] != row[0] || schedule.sigmas[i] != row[1];
        CHECK(differ == 0, "%s: %d of 1000 steps differ", sampler_name((Sampler)sampler), differ);
        CHECK(schedule.sigmas[1000] == 0, "the last sigma is not 0");
        schedule_free(&schedule);
    }
    free(table);
}

/* If the velocity is constant, every estimate of x0 is exact. Each sampler must then reach x0 in any number of steps.
 * */
static void test_straight_path(void) {
    enum { N = 3 };
    const float noise[N] = {1, -2, 0.5f}, clip[N] = {-3, 0.25f, 2};
    float velocity[N], latents[N];
    for (int i = 0; i < N; i++) velocity[i] = noise[i] - clip[i];
    History history = history_new(N);
    for (int sampler = 0; sampler < SAMPLERS; sampler++)
        for (int steps = 1; steps <= 50; steps++) {
            Schedule schedule = schedule_make((Sampler)sampler, steps, 8, 1000);
            /* dpm++ starts at a sigma up to 1e-3 below 1, so the start is a mixture of clip and noise. */
            for (int i = 0; i < N; i++) latents[i] = clip[i] + schedule.sigmas[0] * velocity[i];
            for (int i = 0; i < steps; i++) sampler_step(&schedule, i, velocity, latents, &history, NULL);
            double error = relative_error(latents, clip, N);
            CHECK(error < 2e-6, "%s, %d steps: relative error %.1e", sampler_name((Sampler)sampler), steps, error);
            schedule_free(&schedule);
        }
}

/* Schedules of distilled models: a list of sigmas and a rule. Each rule is compared with its authors' formula in
 * double:
 *
 *   FastWan, Self-Forcing   x0 = x - sigma v, then x = (1 - next) x0 + next noise
 *   LightX2V                x0 = x - sigma v, then x = x0 + next v
 *   rCM                     in its own variables: the angle t = atan(sigma / (1 - sigma)) and
 *                           X = cos(t) x0 + sin(t) noise; sora's x is X / (cos t + sin t) */
enum { LIST = 4, N = 5 };
typedef double Formula(double x, double v, double noise, double sigma, double next);

static double fastwan(double x, double v, double noise, double sigma, double next) {
    return (1 - next) * (x - sigma * v) + next * noise;
}

static double lightx2v(double x, double v, double noise, double sigma, double next) {
    (void)noise;
    return x - sigma * v + next * v;
}

static double rcm(double x, double v, double noise, double sigma, double next) {
    double t = atan2(sigma, 1 - sigma), u = atan2(next, 1 - next), X = x * (cos(t) + sin(t));
    double x0 = (X - sin(t) * v) / (cos(t) + sin(t));
    return (cos(u) * x0 + sin(u) * noise) / (cos(u) + sin(u));
}

static void test_list(const char *name, Sampler rule, Formula *formula, const double sigmas[LIST]) {
    float narrow[LIST], latents[N], velocity[N], noise[N];
    double x[N];
    for (int i = 0; i < LIST; i++) narrow[i] = (float)sigmas[i];
    for (int j = 0; j < N; j++) x[j] = latents[j] = 0.3f * (float)j - 0.7f;
    Schedule schedule = schedule_of(rule, LIST, narrow, narrow);
    History history = history_new(N);
    for (int i = 0; i < LIST; i++) {
        bool last = i + 1 == LIST;
        for (int j = 0; j < N; j++) velocity[j] = (float)sin(3 * i + j), noise[j] = (float)cos(5 * i - j);
        CHECK(sampler_needs_noise(&schedule, i) == (rule == RENOISE && !last),
              "%s, step %d: sampler_needs_noise() is wrong", name, i);
        sampler_step(&schedule, i, velocity, latents, &history, last ? NULL : noise);
        for (int j = 0; j < N; j++) {
            x[j] = formula(x[j], velocity[j], last ? 0 : noise[j], sigmas[i], last ? 0 : sigmas[i + 1]);
            CHECK(fabs(latents[j] - x[j]) < 1e-6, "%s, step %d: %.9g, not %.9g", name, i, latents[j], x[j]);
        }
    }
    schedule_free(&schedule);
}

static void test_lists(void) {
    const double angles[LIST] = {atan(80), 1.5, 1.4, 1.0}, warped[LIST] = {1, 0.9375, 5.0 / 6, 0.625};
    double flow[LIST];
    for (int i = 0; i < LIST; i++) flow[i] = sin(angles[i]) / (sin(angles[i]) + cos(angles[i]));
    test_list("rCM", RENOISE, rcm, flow);
    test_list("FastWan", RENOISE, fastwan, (const double[LIST]){1, 0.757, 0.522, 0.25});
    test_list("Self-Forcing", RENOISE, fastwan, warped);
    test_list("LightX2V", EULER, lightx2v, warped);
}

static void test_names(void) {
    Sampler parsed;
    for (int sampler = 0; sampler < SAMPLERS; sampler++)
        CHECK(sampler_parse(sampler_name((Sampler)sampler), &parsed) && (int)parsed == sampler,
              "sampler_parse() does not accept %s", sampler_name((Sampler)sampler));
    CHECK(!sampler_parse("Euler", &parsed) && !sampler_parse("", &parsed), "an unknown sampler is accepted");
}

void test_sampler(void) {
    test_names();
    test_lists();
    for (int sampler = 0; sampler < SAMPLERS; sampler++) test_table((Sampler)sampler);
    test_long_schedules();
    test_straight_path();
}
