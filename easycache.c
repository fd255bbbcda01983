/* easycache.c - velocity of a step without the transformer, if it hardly changes (--easycache X).
 *
 * From step to step the velocity v changes about in proportion to the latents x that the transformer reads. The two
 * latest computed steps, now and before, give the rate (|...| is the mean of the absolute values):
 *
 *   rate = |v_now - v_before| / |x_now - x_before|
 *
 * So the change that a step would bring can be told before the step, from its x. These changes are added up, relative
 * to the last computed velocity:
 *
 *   error += rate * |x - x of the step before| / |v_now|
 *
 * While the error is below X the step is left out: its velocity is x + (v_now - x_now). At X the step is computed, and
 * the error begins again at 0. An example with X = 0.05, where c is computed and - is left out:
 *
 *   change         .02  .02  .02  .01  .01  .01  .01  .01
 *   error          .02  .04  .06  .01  .02  .03  .04  .05
 *                   -    -    c    -    -    -    -    c
 *
 * The first ten steps and the last are always computed. The first branch of guidance decides for both. Where another
 * expert takes over (Wan 2.2 A14B), nothing is known of it: two steps are computed.
 *
 * Follows EasyCache (Zhou et al., arXiv 2507.02860), easycache_generate.py for Wan 2.1. */
#include "sora.h"

#include <math.h>
#include <string.h>

EasyCache easycache_take(Arena *arena, size_t n, bool guided) {
    return (EasyCache){.n = n, .latest = arena_floats(arena, n), .x = arena_floats(arena, n),
                       .cond = arena_floats(arena, n), .uncond = arena_floats(arena, guided ? n : 0)};
}

/* |a - b|, or |a| if b is NULL */
static double mean_change(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += fabsf(b ? a[i] - b[i] : a[i]);
    return sum / (double)n;
}

bool easycache_leaves_out(EasyCache *c, double most, int step, int steps, const float *x) {
    bool always = step < EASYCACHE_FIRST || step + 1 == steps || c->known < 2;
    if (!always) c->error += c->rate * mean_change(x, c->latest, c->n) / mean_change(c->cond, NULL, c->n);
    memcpy(c->latest, x, sizeof(float) * c->n);
    if (!always && c->error < most) return true;
    c->error = 0;
    return false;
}

void easycache_keep(EasyCache *c, const float *x, const float *cond, const float *uncond) {
    if (c->known) c->rate = mean_change(cond, c->cond, c->n) / mean_change(x, c->x, c->n);
    c->known = smaller(c->known + 1, 2);
    memcpy(c->x, x, sizeof(float) * c->n);
    memcpy(c->cond, cond, sizeof(float) * c->n);
    if (uncond) memcpy(c->uncond, uncond, sizeof(float) * c->n);
}

void easycache_velocity(const EasyCache *c, const float *x, float *cond, float *uncond) {
    for (size_t i = 0; i < c->n; i++) cond[i] = x[i] + (c->cond[i] - c->x[i]);
    for (size_t i = 0; uncond && i < c->n; i++) uncond[i] = x[i] + (c->uncond[i] - c->x[i]);
}

void easycache_state(EasyCache *c, bool guided, StateFile *f) {
    c->known = (int)state_number(f, "easycache.known", c->known, 0, 2);
    state_item(f, "easycache.rate", &c->rate, sizeof c->rate);
    state_item(f, "easycache.error", &c->error, sizeof c->error);
    float *arrays[] = {c->latest, c->x, c->cond, c->uncond};
    for (int i = 0; c->known && i < 3 + guided; i++) state_item(f, "easycache.array", arrays[i], sizeof(float) * c->n);
}
