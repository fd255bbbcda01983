/* bench.c - how fast sora is on this machine, and how close to what the machine can do.
 *
 *   bench FILE.tsv [peaks] [kernels] [stages] [growth] [minute] [steps]
 *   bench FILE.tsv transformer|attention|text_encoder|vae_decode PRECISION SIZE [THREADS]
 *
 * Lines go to standard output as a table, and to the file as tab-separated values, a heading line first.
 *
 * How time is taken. A job runs once to warm up (one that takes a second is warm by then), then at least
 * three times and until half a second has passed, but not beyond five seconds; the median counts. A
 * processor's clock and its neighbours change from one second to the next, so the peak that a rate is
 * compared with is not one number from the start of the run: right after each repeat the peak is measured for
 * ten milliseconds, and `of_peak` is the median of the ratios. A fraction can be trusted
 * where a rate cannot. */
#include "bench/bench.h"

#include <stdlib.h>
#include <string.h>

static FILE *table;

/* ---------------------------------------------------------------- memory and numbers */

static void **held;
static int held_count;

void *hold(size_t bytes) {
    held = reallocate(held, sizeof *held * (size_t)(held_count + 1));
    return held[held_count++] = allocate(bytes);
}

void release(void) {
    while (held_count) free(held[--held_count]);
}

/* Uniform in [-sqrt 3, sqrt 3): speed does not depend on the values, as long as none
 * is subnormal or infinite. */
static float next_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return ((float)(*state >> 8) * 0x1p-23f - 1.0f) * 1.7320508f;
}

float *random_floats(size_t n) {
    float *x = hold(n * sizeof *x);
    uint32_t state = 1;
    for (size_t i = 0; i < n; i++) x[i] = next_random(&state);
    return x;
}

/* Blocks of q8_0 with a scale of 2^-11, so that the values are like the others'. */
static void fill(void *data, Type type, size_t n) {
    uint32_t state = 2;
    for (size_t i = 0; i < n; i++) {
        float value = next_random(&state) * 0.02f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        if (type == TYPE_F32) ((float *)data)[i] = value;
        else if (type == TYPE_BF16) ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
        else ((uint8_t *)data)[i / 32 * 34 + 2 + i % 32] = (uint8_t)(state >> 24);
    }
    if (type != TYPE_Q8_0) return;
    for (size_t i = 0; i < n; i += 32) ((uint16_t *)data)[i / 32 * 17] = 0x1000;
}

Linear random_linear(Precision precision, int O, int I) {
    static const Type types[PRECISIONS] = {TYPE_F32, TYPE_BF16, TYPE_Q8_0};
    void *data = hold(type_bytes(types[precision], (size_t)O * I));
    fill(data, types[precision], (size_t)O * I);
    return (Linear){
        .weight = {data, types[precision], O, I}, .bias = random_floats((size_t)O), .precision = precision};
}

/* ---------------------------------------------------------------- time */

enum { MOST_REPEATS = 15, LEAST_REPEATS = 3 };

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static void print(const Job *job, double duration, double fraction) {
    double gflops = job->flop / duration * 1e-9, gbytes = job->bytes / duration * 1e-9;
    printf("%-7s %-28s %-4s %6d %3d", job->kind, job->name, precision_name(job->precision), job->size,
           job->threads);
    printf(job->flop > 0 ? " %10.5f s %8.1f GFLOP/s" : " %10.5f s %8.1f GB/s   ", duration,
           job->flop > 0 ? gflops : gbytes);
    printf(fraction > 0 ? " %4.0f %%\n" : "\n", 100 * fraction);
    fprintf(table, "%s\t%s\t%s\t%d\t%d\t%.6f\t%.4f\t%.2f\t%.4f\t%.4f\t%.2f\t%s\n", job->kind, job->name,
            precision_name(job->precision), job->size, job->threads, duration, job->flop * 1e-9, gflops,
            fraction, job->bytes * 1e-9, gbytes, fraction > 0 ? peak_instruction(job->precision) : "");
    fflush(NULL);
}

double measure(const Job *given) {
    Job job = *given;
    double durations[MOST_REPEATS], fractions[MOST_REPEATS] = {0};
    int before = threads_count(), n = 0;
    bool compared = job.flop > 0 && strcmp(job.kind, "peak");
    job.threads = job.threads ? job.threads : before;
    threads_set(job.threads);
    bool warm = false;
    double begin = seconds();
    for (double spent = 0; n < MOST_REPEATS && (spent < 0.5 || (n < LEAST_REPEATS && spent < 5) || !n);
         spent = seconds() - begin) {
        double start = seconds();
        job.run(job.with);
        durations[n] = seconds() - start;
        if (compared) fractions[n] = job.flop / durations[n] / peak_product(job.precision, job.threads, 0.01);
        if (warm || durations[n] > 1) n++;
        warm = true;
    }
    threads_set(before);
    double duration = median(durations, n);
    print(&job, duration, median(fractions, n));
    return duration;
}

/* ---------------------------------------------------------------- command line */

static const struct {
    const char *name;
    void (*run)(void);
} parts[] = {
    {"peaks", bench_peaks}, {"kernels", bench_kernels}, {"stages", bench_stages},
    {"growth", bench_growth}, {"minute", bench_minute}, {"steps", bench_steps},
};

static void run_part(const char *name) {
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strcmp(name, parts[i].name)) {
            parts[i].run();
            return;
        }
    die(STATUS_USAGE, "'%s' is no part of the measurement", name);
}

int main(int argc, char **argv) {
    Precision precision;
    if (argc < 3)
        die(STATUS_USAGE, "usage: bench FILE.tsv PART..., or bench FILE.tsv STAGE PRECISION SIZE [THREADS]");
    kernels_choose("auto");
    threads_set(threads_default());
    table = fopen(argv[1], "w");
    if (!table) die(STATUS_RESOURCE, "%s: cannot be written", argv[1]);
    fputs("kind\tname\tprecision\tsize\tthreads\tseconds\tgflop\tgflop/s\tof_peak\tgbyte\tgbyte/s\tinstruction\n",
          table);
    printf("kernels %s, threads %d\n", kernels->name, threads_count());
    printf("%-7s %-28s %-4s %6s %3s %12s %16s %6s\n", "kind", "name", "", "size", "thr", "seconds", "rate",
           "peak");
    if (argc > 4 && precision_parse(argv[3], &precision))
        bench_stage(argv[2], precision, argv[4], argc > 5 ? atoi(argv[5]) : 0);
    else
        for (int i = 2; i < argc; i++) run_part(argv[i]);
    fclose(table);
    return STATUS_OK;
}
