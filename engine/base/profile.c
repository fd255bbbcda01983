/* profile.c - --profile: for each stage its calls, seconds and floating-point operations.
 *
 * One stage runs at a time. A stage that works frame by frame (decode, write) begins and ends once a frame. The code
 * that does the operations counts them: a product (M,K) @ (K,N) is 2*M*K*N. The total is the time from the first
 * begin to the print, so it includes the time between stages. Passes that --easycache leaves out are no calls.
 * Columns: name, calls, seconds, 10^9 operations, 10^9 operations a second; tabs between them. */
#include "engine/engine.h"

static const char *const names[STAGES] = {
    "load", "text_encoder", "transformer", "sampler", "vae_encode", "vae_decode", "output",
};
static struct { long calls; double seconds, flops; } stages[STAGES];
static Stage running = STAGES;
static int left_out;
static double started, first = -1;

void profile_resume(Stage stage) {
    running = stage;
    started = seconds();
    if (first < 0) first = started;
}

void profile_begin(Stage stage) {
    profile_resume(stage);
    stages[stage].calls++;
}

void profile_end(Stage stage) {
    stages[stage].seconds += seconds() - started;
    running = STAGES;
}

void profile_flops(double count) {
    if (running != STAGES) stages[running].flops += count;
}

void profile_left_out(int passes) { left_out = passes; }

static void print_line(const char *name, long calls, double duration, double flops) {
    double rate = duration > 0 ? flops * 1e-9 / duration : 0;
    fprintf(stderr, "%s\t%ld\t%.3f\t%.3f\t%.1f\n", name, calls, duration, flops * 1e-9, rate);
}

void profile_print(void) {
    double flops = 0;
    for (int s = 0; s < STAGES; s++) {
        if (!stages[s].calls) continue;
        print_line(names[s], stages[s].calls, stages[s].seconds, stages[s].flops);
        flops += stages[s].flops;
    }
    print_line("total", 1, first < 0 ? 0 : seconds() - first, flops);
    if (left_out) fprintf(stderr, "passes_left_out\t%d\n", left_out);
    fprintf(stderr, "peak_memory_mib\t%.0f\n", (double)memory_peak() / 1048576);
}
