/* drift.c - how a long clip changes, measured on its pixels: a line a chunk on standard error, tab-separated.
 *
 * What goes wrong in clips that are made chunk by chunk shows in a few numbers: colours burn out or fade (mean and
 * deviation of each channel, saturation, clipped pixels), pictures blur or crisp up (sharpness, the mean magnitude of
 * the Laplacian of luma), motion dies (mean change of luma from frame to frame) or comes round again with the
 * window's period (repetition). All but the last two columns are relative to the first chunk: 1 is as there, clipped
 * is a difference of shares. The repetition is the best correlation of the chunk's motion, on a thumbnail, with that
 * of some time more than a second and at most 16 seconds earlier; the lag is how many seconds earlier.
 *
 * The last line, "drift", has in each column what lies furthest from the first chunk. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RED, GREEN, BLUE, RED_DEV, GREEN_DEV, BLUE_DEV, SATURATION, SHARPNESS, MOTION, CLIPPED, MEASURES };
static const char *const names[MEASURES] = {"red", "green", "blue", "red_dev", "green_dev", "blue_dev", "saturation",
                                            "sharpness", "motion", "clipped"};
enum { SIDE = 16, THUMB = SIDE * SIDE, MEMORY_SECONDS = 16 };

struct Drift {
    VideoFormat format;
    int frames, chunk, chunk_frames; /* seen in all; number of the chunk; in the chunk */
    double sums[MEASURES];           /* over the chunk's frames */
    double first[MEASURES], worst[MEASURES], worst_repetition, worst_lag;
    float *luma, *before;            /* (Y,X): this frame's and the last one's */
    float thumb[THUMB];
    int remembered;                  /* changes of thumbnails that are kept, a ring */
    float *changes;                  /* (remembered, THUMB) */
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

/* Colours, saturation, clipped values; luma on the way. */
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

/* The change from the frame before: its mean magnitude, and that of the thumbnail into the ring. */
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

/* How alike the chunk's motion is to that `lag` frames earlier: a correlation, 0 where nothing moves. */
static double correlation(const Drift *d, int lag) {
    double product = 0, here = 0, there = 0;
    for (int f = d->frames - d->chunk_frames; f < d->frames; f++) {
        const float *a = d->changes + (size_t)(f % d->remembered) * THUMB;
        const float *b = d->changes + (size_t)((f - lag) % d->remembered) * THUMB;
        for (int i = 0; i < THUMB; i++) product += a[i] * b[i], here += a[i] * a[i], there += b[i] * b[i];
    }
    return here > 0 && there > 0 ? product / sqrt(here * there) : 0;
}

static double strongest_repetition(const Drift *d, double *seconds) {
    double best = 0;
    *seconds = 0;
    for (int lag = (int)rate(d) + 1; lag + d->chunk_frames <= smaller(d->frames, d->remembered); lag++) {
        double found = correlation(d, lag);
        if (found > best) best = found, *seconds = lag / rate(d);
    }
    return best;
}

/* `value` beside what the first chunk has. */
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
        int of = d->chunk_frames - (i == MOTION && d->chunk == 0); /* nothing comes before the clip's first frame */
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

void drift_close(Drift *d) {
    if (!d) return;
    fprintf(stderr, "drift\t%.3f", d->frames / rate(d));
    print_measures(d->worst, d->worst_repetition, d->worst_lag);
    free(d->luma), free(d->before), free(d->changes);
    free(d);
}
