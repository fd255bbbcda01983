/* bench.h - what the parts of the measurement share. bench.c tells how time is taken and what is printed. */
#ifndef BENCH_H
#define BENCH_H

#include "sora.h"

/* ---------------------------------------------------------------- bench.c: taking the time */

/* run(with) does `flop` operations and touches `bytes` of memory at least (each operand once). */
typedef struct {
    const char *kind, *name; /* "kernel", "linear 1536->8960" */
    Precision precision;
    int size;                /* tokens, pixels or frames */
    int threads;             /* 0: all */
    double flop, bytes;
    void (*run)(void *with);
    void *with;
} Job;
double measure(const Job *job); /* seconds of one run, the median; prints its line */

/* Memory that release() frees, and random numbers of about unit variance in it. */
void *hold(size_t bytes);
float *random_floats(size_t n);
Linear random_linear(Precision precision, int O, int I); /* as wide as the precision: float32, bfloat16, q8_0 */
void release(void);

/* ---------------------------------------------------------------- peak.c: what the machine can do */

void bench_peaks(void);
/* Operations a second of the instructions that multiply in this precision, from registers, over about
 * `duration` seconds: the fastest that the chosen kernels use. A product in bfloat16 or bytes may widen them
 * and use those of a wider precision, so its limit is the largest of them. */
double peak_product(Precision precision, int threads, double duration);
const char *peak_instruction(Precision precision); /* which that is */
double peak_memory(int threads); /* bytes a second, reading */

/* ---------------------------------------------------------------- kernels.c, stages.c, steps.c: what it does */

void bench_kernels(void);
void bench_attention(Precision precision, int queries, int keys, int threads); /* 12 heads of 128 */
void bench_stages(void);
void bench_growth(void); /* the transformer against tokens, the decoder against frames, both against threads */
void bench_minute(void); /* what a minute of Wan 2.1 1.3B costs when it is made in chunks */
void bench_steps(void);  /* from three loops to the tiled product */
/* One stage: "transformer" (two blocks, 17 frames of WxH pixels), "text_encoder" (one block, so many tokens), or
 * "vae_decode" (5 frames of WxH). */
void bench_stage(const char *name, Precision precision, const char *size, int threads);

#endif
