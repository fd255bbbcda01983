/* drift.c - measures how a long clip changes (--drift): a tab-separated line for each chunk on standard error.
 *
 * Clips that are generated in chunks go wrong in a few ways, and each shows in a number:
 *
 *   red green blue, *_dev   mean and standard deviation of a channel    colours burn out or fade
 *   saturation              mean of max(r,g,b) - min(r,g,b)             the same
 *   sharpness               mean |Laplacian| of luma                    blur, or over-sharpening
 *   motion                  mean |change| of luma from frame to frame   motion stops
 *   clipped                 share of values at 0 or 1                   colours burn out
 *   repetition, lag         best correlation with earlier motion; how many seconds earlier    the clip loops
 *
 * Repetition and lag are absolute. `clipped` is the difference from the first chunk (0: unchanged), every other column
 * the quotient (1: unchanged). Repetition compares the changes of a 16x16 thumbnail in this chunk with those of more
 * than a second earlier, within the last 16 seconds.
 *
 * The last line, "drift", has in each column the value furthest from the first chunk's. */
#include "sora.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RED, GREEN, BLUE, RED_DEV, GREEN_DEV, BLUE_DEV, SATURATION, SHARPNESS, MOTION, CLIPPED, MEASURES };
static const char *const names[MEASURES] = {"red", "green", "blue", "red_dev", "green_dev", "blue_dev", "saturation",
                                            "sharpness", "motion", "clipped"};
enum { SIDE = 16, THUMB = SIDE * SIDE, MEMORY_SECONDS = 16 };

struct Drift {
    VideoFormat format;
    int frames, chunk, chunk_frames; /* frames so far; index of the chunk; its frames so far */
    double sums[MEASURES];           /* over the chunk's frames */
    double first[MEASURES], worst[MEASURES], worst_repetition, worst_lag;
    float *luma, *before;            /* (Y,X): of this frame and of the last one */
    float thumb[THUMB];              /* of the last frame */
    int remembered;                  /* capacity of the ring buffer of thumbnail changes, in frames */
    float *changes;                  /* (remembered, THUMB): frame f is at f % remembered */
};

static double rate(const Drift *d) { return (double)d->format.rate_num / d->format.rate_den; }

Drift *drift_open(const VideoFormat *format) {
    Drift *d = allocate(sizeof *d);
    size_t pixels = (size_t)format->width * format->height;
    *d = (Drift){.format = *format};
    d->remembered = (int)fmin(ceil(rate(d) * MEMORY_SECONDS), 4096);
    d->luma = allocate(sizeof(float) * pixels);
    d->before = allocate(sizeof(float) * pixels);
    d->changes = allocate(sizeof(float) * THUMB * (size_t)d->remembered);
    fprintf(stderr, "chunk\tseconds");
    for (int i = 0; i < MEASURES; i++) fprintf(stderr, "\t%s", names[i]);
    fprintf(stderr, "\trepetition\tlag\n");
    return d;
}

/* Adds the frame's colour measures to the sums, and sets d->luma. */
static void measure_colours(Drift *d, const float *frame) {
    size_t pixels = (size_t)d->format.width * d->format.height;
    double sum[3] = {0}, squares[3] = {0}, saturation = 0, clipped = 0;
    for (size_t i = 0; i < pixels; i++) {
        float c[3], most = 0, least = 1;
        for (int j = 0; j < 3; j++) {
            c[j] = 0.5f + 0.5f * frame[j * pixels + i];
            sum[j] += c[j], squares[j] += c[j] * c[j];
            most = fmaxf(most, c[j]), least = fminf(least, c[j]);
            clipped += c[j] <= 0 || c[j] >= 1;
        }
        saturation += most - least;
        d->luma[i] = 0.299f * c[0] + 0.587f * c[1] + 0.114f * c[2];
    }
    for (int j = 0; j < 3; j++) {
        double mean = sum[j] / pixels;
        d->sums[RED + j] += mean;
        d->sums[RED_DEV + j] += sqrt(fmax(squares[j] / pixels - mean * mean, 0));
    }
    d->sums[SATURATION] += saturation / pixels;
    d->sums[CLIPPED] += clipped / (3 * pixels);
}

static void measure_sharpness(Drift *d) {
    int X = d->format.width, Y = d->format.height;
    double sum = 0;
    for (int y = 1; y + 1 < Y; y++)
        for (int x = 1; x + 1 < X; x++) {
            const float *p = d->luma + (size_t)y * X + x;
            sum += fabsf(4 * p[0] - p[-1] - p[1] - p[-X] - p[X]);
        }
    if (X > 2 && Y > 2) d->sums[SHARPNESS] += sum / ((X - 2.0) * (Y - 2.0));
}

/* Adds the frame's motion to the sums, and its change of the thumbnail to the ring buffer. */
static void measure_motion(Drift *d) {
    int X = d->format.width, Y = d->format.height;
    float thumb[THUMB] = {0}, *change = d->changes + (size_t)(d->frames % d->remembered) * THUMB;
    double sum = 0;
    for (int y = 0; y < Y; y++)
        for (int x = 0; x < X; x++) {
            float luma = d->luma[(size_t)y * X + x];
            sum += fabsf(luma - d->before[(size_t)y * X + x]);
            thumb[y * SIDE / Y * SIDE + x * SIDE / X] += luma;
        }
    if (d->frames) d->sums[MOTION] += sum / ((double)X * Y);
    for (int i = 0; i < THUMB; i++) change[i] = d->frames ? thumb[i] - d->thumb[i] : 0;
    memcpy(d->thumb, thumb, sizeof thumb);
}

void drift_frame(Drift *d, const float *frame) {
    measure_colours(d, frame);
    measure_sharpness(d);
    measure_motion(d);
    float *luma = d->before;
    d->before = d->luma;
    d->luma = luma;
    d->frames++;
    d->chunk_frames++;
}

/* Correlation of the chunk's thumbnail changes with those `lag` frames earlier; 0 if nothing moves. */
static double correlation(const Drift *d, int lag) {
    double product = 0, here = 0, there = 0;
    for (int f = d->frames - d->chunk_frames; f < d->frames; f++) {
        const float *a = d->changes + (size_t)(f % d->remembered) * THUMB;
        const float *b = d->changes + (size_t)((f - lag) % d->remembered) * THUMB;
        for (int i = 0; i < THUMB; i++) product += a[i] * b[i], here += a[i] * a[i], there += b[i] * b[i];
    }
    return here > 0 && there > 0 ? product / sqrt(here * there) : 0;
}

/* The largest correlation of all lags, and its lag in seconds. */
static double strongest_repetition(const Drift *d, double *seconds) {
    double best = 0;
    *seconds = 0;
    for (int lag = (int)rate(d) + 1; lag + d->chunk_frames <= smaller(d->frames, d->remembered); lag++) {
        double found = correlation(d, lag);
        if (found > best) best = found, *seconds = lag / rate(d);
    }
    return best;
}

/* A measure relative to the first chunk's. */
static double relative(int measure, double value, double first) {
    if (measure == CLIPPED) return value - first;
    return first > 0 ? value / first : value > 0 ? INFINITY : 1;
}

static void print_measures(const double *values, double repetition, double lag) {
    for (int i = 0; i < MEASURES; i++) fprintf(stderr, "\t%.4f", values[i]);
    fprintf(stderr, "\t%.3f\t%.2f\n", repetition, lag);
}

void drift_chunk(Drift *d) {
    double lag, repetition = strongest_repetition(d, &lag), values[MEASURES];
    for (int i = 0; i < MEASURES; i++) {
        int of = d->chunk_frames - (i == MOTION && d->chunk == 0); /* the clip's first frame has no motion */
        double value = of > 0 ? d->sums[i] / of : 0;
        if (d->chunk == 0) d->first[i] = value, d->worst[i] = i != CLIPPED;
        values[i] = relative(i, value, d->first[i]);
        if (fabs(values[i] - (i != CLIPPED)) > fabs(d->worst[i] - (i != CLIPPED))) d->worst[i] = values[i];
        d->sums[i] = 0;
    }
    if (repetition > d->worst_repetition) d->worst_repetition = repetition, d->worst_lag = lag;
    progress(NULL, 0, 0);
    fprintf(stderr, "%d\t%.3f", d->chunk++, (d->frames - d->chunk_frames) / rate(d));
    print_measures(values, repetition, lag);
    d->chunk_frames = 0;
}

void drift_state(Drift *d, StateFile *f) {
    size_t pixels = sizeof(float) * (size_t)d->format.width * d->format.height;
    d->frames = (int)state_number(f, "drift.frames", d->frames, 0, INT_MAX / 2);
    d->chunk = (int)state_number(f, "drift.chunk", d->chunk, 0, INT_MAX / 2);
    d->chunk_frames = (int)state_number(f, "drift.chunk_frames", d->chunk_frames, 0, d->frames);
    double *values[] = {d->sums, d->first, d->worst, &d->worst_repetition, &d->worst_lag};
    for (int i = 0; i < 5; i++) state_item(f, "drift.values", values[i], sizeof(double) * (i < 3 ? MEASURES : 1));
    state_item(f, "drift.before", d->before, pixels);
    state_item(f, "drift.thumb", d->thumb, sizeof d->thumb);
    state_item(f, "drift.changes", d->changes, sizeof(float) * THUMB * (size_t)d->remembered);
}

void drift_close(Drift *d) {
    if (!d) return;
    fprintf(stderr, "drift\t%.3f", d->frames / rate(d));
    print_measures(d->worst, d->worst_repetition, d->worst_lag);
    free(d->luma), free(d->before), free(d->changes);
    free(d);
}
