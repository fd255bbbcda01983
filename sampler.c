/* sampler.c - velocity -> the next latents.
 *
 * A flow model is trained on x = (1 - sigma) x0 + sigma noise, and predicts v = noise - x0. So sigma 1 is noise, sigma
 * 0 is the clip, and every velocity gives a prediction of the clip: x0 = x - sigma v. A schedule lists the sigmas and
 * the timestep that the transformer reads for each. A step moves x from sigmas[step] to sigmas[step + 1].
 *
 * Three samplers make a schedule of any length. They follow diffusers 0.42.1 as it is configured for Wan:
 *
 *   euler    FlowMatchEulerDiscreteScheduler: x + (sigma_next - sigma) v.
 *   dpm++    DPMSolverMultistepScheduler, dpmsolver++ of order 2 (arXiv:2211.01095): an exponential integrator in
 *            lambda = log((1 - sigma) / sigma), which extrapolates x0 from this step's and the last step's prediction.
 *            h is the change of lambda in a step. The update of order 1 is Euler's: the paper's weight of x0,
 *            (1 - sigma_next) (1 - e^-h), equals 1 - sigma_next / sigma.
 *   unipc    UniPCMultistepScheduler, bh2 of order 2 (arXiv:2302.04867). The predictor is the update of dpm++. Before
 *            it, the corrector repeats the last step with the x0 that is now known at its end.
 *
 * Distilled models come with a fixed list of timesteps, and one of two rules:
 *
 *   euler    as above.
 *   renoise  x = (1 - sigma_next) x0 + sigma_next noise, with fresh noise. After the last step x = x0. Self-Forcing's
 *            list is 1000 750 500 250 with a shift s of 5: t = 1000 s u / (1 + (s - 1) u) for u = 1, 0.75, 0.5, 0.25
 *              t      1000      937.5    833.333  625
 *              sigma  1         0.9375   0.83333  0.625  0
 *              x      noise -> 0.0625 x0 + 0.9375 noise -> 0.16667 x0 + 0.83333 noise -> 0.375 x0 + 0.625 noise -> x0
 *
 * Rounding. A multistep update is a weighted sum of one sample and up to three predictions of x0. Weights are computed
 * in double and rounded to float; the sum is formed in double. diffusers computes the weights in float32 and loses
 * digits where h is small: the latents differ by 1e-6 at 50 steps, and by up to 1e-4 at 1000.
 *
 * Weights are the same float with every C library. Only log1p is called, once a step. For shifts 1, 2, ... 12, a weight
 * would change only if log1p were wrong by more than 600 units in the last place (up to 100 steps) or 3 (up to 1000):
 * tests/test_libm.c. If lambda_change() took the difference of two logarithms, or the corrector called expm1, an error
 * of one unit would change a weight from 116 steps on.
 *
 * Pitfalls, all upstream's:
 *   - The three schedules differ, although all are called flow sigmas.
 *   - euler shifts its smallest sigma twice.
 *   - unipc and dpm++ truncate timesteps to integers, but not the sigmas that belong to them.
 *   - unipc starts at sigma 1 - 1e-6, because lambda is infinite at 1. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const names[] = {[UNIPC] = "unipc", [EULER] = "euler", [DPM] = "dpm++", [RENOISE] = "renoise"};

bool sampler_parse(const char *name, Sampler *out) {
    for (int i = 0; i < SAMPLERS; i++) {
        if (strcmp(name, names[i])) continue;
        *out = (Sampler)i;
        return true;
    }
    return false;
}

const char *sampler_name(Sampler sampler) { return names[sampler]; }

/* ---------------------------------------------------------------- schedules */

/* Element i of numpy's linspace(start, stop, intervals + 1), rounded as numpy rounds. */
static double linspace(double start, double stop, int intervals, int i) {
    if (i == 0) return start;
    return i < intervals ? i * ((stop - start) / intervals) + start : stop;
}

static double warp(double sigma, double shift) { return shift * sigma / (1 + (shift - 1) * sigma); }

/* In float32, as in the constructor of diffusers' FlowMatchEulerDiscreteScheduler. */
static double warp_float(float sigma, double shift) {
    return (float)shift * sigma / (1 + (float)(shift - 1) * sigma);
}

static double sigma_unipc(int steps, double shift, int train_timesteps, int i) {
    double sigma = warp(linspace(1, 1.0 / train_timesteps, steps, i), shift);
    return i == 0 && fabs(sigma - 1) < 1e-6 ? sigma - 1e-6 : sigma;
}

static double sigma_dpm(int steps, double shift, int train_timesteps, int i) {
    return warp(1 - linspace(1, 1.0 / train_timesteps, steps, steps - i), shift);
}

static double sigma_euler(int steps, double shift, int train_timesteps, int i) {
    double first = warp_float(1, shift) * train_timesteps;
    double last = warp_float(1 / (float)train_timesteps, shift) * train_timesteps;
    return warp(linspace(first, last, steps - 1, i) / train_timesteps, shift);
}

Schedule schedule_make(Sampler sampler, int steps, double shift, int train_timesteps) {
    static double (*const sigma_at[SAMPLERS])(int, double, int, int) = {
        [UNIPC] = sigma_unipc, [EULER] = sigma_euler, [DPM] = sigma_dpm};
    Schedule schedule = {.sampler = sampler, .steps = steps};
    schedule.sigmas = allocate((size_t)(steps + 1) * sizeof(float));
    schedule.timesteps = allocate((size_t)steps * sizeof(float));
    for (int i = 0; i < steps; i++) {
        double sigma = sigma_at[sampler](steps, shift, train_timesteps, i);
        schedule.sigmas[i] = (float)sigma;
        schedule.timesteps[i] = sampler == EULER ? schedule.sigmas[i] * (float)train_timesteps
                                                 : (float)trunc(sigma * train_timesteps);
    }
    return schedule; /* sigmas[steps] is 0, as allocated */
}

Schedule schedule_of(Sampler sampler, int steps, const float *timesteps, const float *sigmas) {
    Schedule schedule = {.sampler = sampler, .steps = steps};
    schedule.sigmas = allocate((size_t)(steps + 1) * sizeof(float));
    schedule.timesteps = allocate((size_t)steps * sizeof(float));
    memcpy(schedule.sigmas, sigmas, (size_t)steps * sizeof(float));
    memcpy(schedule.timesteps, timesteps, (size_t)steps * sizeof(float));
    return schedule;
}

int steps_in_part(int steps, double part) { return smaller((int)(steps * part), steps); }

Schedule schedule_end(const Schedule *schedule, double part) {
    int steps = steps_in_part(schedule->steps, part), from = schedule->steps - steps;
    return (Schedule){schedule->sampler, steps, schedule->sigmas + from, schedule->timesteps + from};
}

void schedule_free(Schedule *schedule) {
    free(schedule->sigmas);
    free(schedule->timesteps);
}

char *schedule_string(const Schedule *schedule) {
    char *text = format_string("%.9g", schedule->timesteps[0]);
    for (int i = 1; i < schedule->steps; i++) {
        char *longer = format_string("%s %.9g", text, schedule->timesteps[i]);
        free(text);
        text = longer;
    }
    return text;
}

/* ---------------------------------------------------------------- steps */

enum { NOW, BEFORE, EARLIER, PREDICTIONS }; /* x0 as predicted at this step, one and two steps ago */

/* Weights of a multistep update: next = sample * x + sum over i of x0[i] * prediction i */
typedef struct {
    float sample, x0[PREDICTIONS];
} Weights;

/* h of a step: the change of lambda from sigma a to sigma b. Infinite in the last step, where b is 0. */
static double lambda_change(const Schedule *schedule, int step) {
    double a = schedule->sigmas[step], b = schedule->sigmas[step + 1];
    return log1p((a - b) / (b * (1 - a)));
}

/* phi_3(-h) of exponential integrators, 1/3! - h/4! + h^2/5! - ... Accurate to the last place for 0 < h < log 4, which
 * is the largest h of any step but the first and the last. */
static double phi3_at(double h) {
    double sum = 1;
    for (int k = 18; k >= 1; k--) sum = 1 - h / (k + 3) * sum;
    return sum / 6;
}

/* From the sample at `step` to the next, as multistep_dpm_solver_second_order_update and multistep_uni_p_bh_update do.
 * The first and the last step are of order 1: the first has no earlier prediction, in the last h is infinite. */
static Weights predictor(const Schedule *schedule, int step) {
    double ratio = (double)schedule->sigmas[step + 1] / schedule->sigmas[step];
    double slope = 0;
    if (step > 0 && step < schedule->steps - 1)
        slope = 0.5 * lambda_change(schedule, step) / lambda_change(schedule, step - 1);
    double gain = 1 - ratio;
    return (Weights){(float)ratio, {[NOW] = (float)(gain * (1 + slope)), [BEFORE] = (float)(gain * -slope)}};
}

/* From the sample at `step - 1` to a corrected one at `step`, given x0 at both, as multistep_uni_c_bh_update does. Of
 * order 2 from step 2 on, where it solves
 *
 *   [ 1   1 ] [ rho     ]   [ b1 ]        rho is the weight of the change of x0 from step - 2 to step - 1,
 *   [ rk  1 ] [ rho_now ] = [ b2 ]        rho_now that of its change from step - 1 to step
 *
 * rk is minus the h of the step before, divided by this step's h. b1 = phi_2 / phi_1, b2 = 2 phi_3 / phi_1, where
 * phi_k(-h) = 1/k! - h phi_(k+1)(-h). */
static Weights corrector(const Schedule *schedule, int step) {
    double ratio = (double)schedule->sigmas[step] / schedule->sigmas[step - 1];
    double rho_now = 0.5, rho_earlier = 0;
    if (step > 1) {
        double h = lambda_change(schedule, step - 1), rk = -lambda_change(schedule, step - 2) / h;
        double phi3 = phi3_at(h), phi2 = 0.5 - h * phi3, phi1 = 1 - h * phi2;
        double b1 = phi2 / phi1, b2 = 2 * phi3 / phi1;
        double rho = (b1 - b2) / (1 - rk);
        rho_now = b1 - rho;
        rho_earlier = rho / rk;
    }
    double gain = 1 - ratio;
    return (Weights){(float)ratio,
                     {[NOW] = (float)(gain * rho_now),
                      [BEFORE] = (float)(gain * (1 - rho_now - rho_earlier)),
                      [EARLIER] = (float)(gain * rho_earlier)}};
}

static void combine(float *next, Weights w, const float *x, float *const x0[PREDICTIONS], size_t n) {
    for (size_t i = 0; i < n; i++) {
        double sum = (double)w.sample * x[i];
        for (int g = 0; g < PREDICTIONS; g++)
            if (w.x0[g] != 0) sum += (double)w.x0[g] * x0[g][i]; /* with weight 0 it may not exist yet */
        next[i] = (float)sum;
    }
}

History history_take(Arena *arena, size_t n) {
    History history = {.n = n, .sample = arena_floats(arena, n)};
    for (int g = 0; g < PREDICTIONS; g++) history.x0[g] = arena_floats(arena, n);
    return history;
}

static void multistep(const Schedule *schedule, int step, const float *velocity, float *latents,
                      History *history) {
    float **x0 = history->x0, *oldest = x0[EARLIER];
    x0[EARLIER] = x0[BEFORE];
    x0[BEFORE] = x0[NOW];
    x0[NOW] = oldest;
    for (size_t i = 0; i < history->n; i++)
        x0[NOW][i] = (float)(latents[i] - (double)schedule->sigmas[step] * velocity[i]);
    if (schedule->sampler == UNIPC) {
        if (step > 0) combine(latents, corrector(schedule, step), history->sample, x0, history->n);
        memcpy(history->sample, latents, history->n * sizeof(float));
    }
    combine(latents, predictor(schedule, step), latents, x0, history->n);
}

static void euler(const Schedule *schedule, int step, const float *velocity, float *latents, size_t n) {
    double change = schedule->sigmas[step + 1] - schedule->sigmas[step];
    for (size_t i = 0; i < n; i++) latents[i] = (float)(latents[i] + change * velocity[i]);
}

/* x0 is rounded to float, as it is upstream. */
static void renoise(const Schedule *schedule, int step, const float *velocity, float *latents, size_t n,
                    const float *noise) {
    double sigma = schedule->sigmas[step], next = schedule->sigmas[step + 1];
    for (size_t i = 0; i < n; i++) {
        latents[i] = (float)(latents[i] - sigma * velocity[i]);
        if (next > 0) latents[i] = (float)((1 - next) * latents[i] + next * noise[i]);
    }
}

void sampler_step(const Schedule *schedule, int step, const float *velocity, float *latents, History *history,
                  const float *noise) {
    if (schedule->sampler == EULER) euler(schedule, step, velocity, latents, history->n);
    else if (schedule->sampler == RENOISE) renoise(schedule, step, velocity, latents, history->n, noise);
    else multistep(schedule, step, velocity, latents, history);
}

bool sampler_needs_noise(const Schedule *schedule, int step) {
    return schedule->sampler == RENOISE && step + 1 < schedule->steps;
}

void history_state(History *h, StateFile *f) {
    for (int g = 0; g < PREDICTIONS; g++) state_item(f, "history.x0", h->x0[g], sizeof(float) * h->n);
    state_item(f, "history.sample", h->sample, sizeof(float) * h->n);
}
