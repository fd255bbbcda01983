/* sora.h - text to video, the stages in the order in which data flows through them.
 *
 *   prompt -> tokenizer.c -> ids -> text_encoder.c -> embeds ---+
 *   seed -> engine/noise.c -> noise -> latents -> transformer.c -> velocity -> sampler.c -> latents (steps times)
 *   latents -> vae.c -> frames -> y4m.c -> file
 *
 * pipeline.c strings them together; sora.c is the command line.
 *
 * Glossary of dimension letters, here, in shape comments, in Python and in tests:
 *   C T H W   latent channels, frames, height, width       F Y X   video frames, rows, columns
 *   n         prompt tokens with the closing </s>           N       text positions that the transformer sees (512)
 *   L         video tokens, ordered (t, h, w)               D       transformer width (dim)
 *   h d       attention heads, width of one head            E       text encoder width (text_dim)
 *   I O       inputs and outputs of a product               K       length of a product's sum
 */
#ifndef SORA_H
#define SORA_H

#include "engine/engine.h"

#define SORA_VERSION "0.1.0"

/* ---------------------------------------------------------------- tokenizer.c: prompt -> ids */

typedef struct Tokenizer Tokenizer;
const char *tokenizer_load(const WeightFile *file, Tokenizer **out);
void tokenizer_free(Tokenizer *tokenizer);
/* diffusers' prompt_clean without ftfy: HTML entities, curly quotes, Unicode white space. Returns a new string;
 * invalid UTF-8 in text becomes U+FFFD. */
char *prompt_clean(const char *text, size_t bytes);
/* ids [n], n <= limit, the last one </s>; text as given (clean it first). Returns n. */
int tokenizer_encode(const Tokenizer *tokenizer, const char *text, int32_t *ids, int limit);
/* The piece of an id, for --tokenize; empty if out of range. */
Bytes tokenizer_piece(const Tokenizer *tokenizer, int32_t id);

/* ---------------------------------------------------------------- text_encoder.c: ids -> embeds (umT5) */

/* ---------------------------------------------------------------- sampler.c: velocity -> next latents */

typedef enum { UNIPC, EULER, DPM, SAMPLERS } Sampler;
bool sampler_parse(const char *name, Sampler *out); /* "unipc", "euler" or "dpm++"; false for any other */
const char *sampler_name(Sampler sampler);

typedef struct {
    Sampler sampler;
    int steps;
    float *sigmas;    /* [steps + 1], falling from 1 or little less to 0 */
    float *timesteps; /* [steps], what the transformer is told */
} Schedule;
/* As the scheduler of diffusers; shift > 0, steps >= 1, train_timesteps is 1000 in every released model. */
Schedule schedule_make(Sampler sampler, int steps, double shift, int train_timesteps);
void schedule_free(Schedule *schedule);

/* What a sampler remembers of earlier steps. */
typedef struct {
    size_t n;      /* elements of the latents */
    float *x0[3];  /* guesses of the clip, this step's first */
    float *sample; /* latents from which the last step set out */
} History;
History history_take(Arena *arena, size_t n);
/* latents [n] move from sigmas[step] to sigmas[step + 1]. Steps go upwards from 0, which forgets the past. */
void sampler_step(const Schedule *schedule, int step, const float *velocity, float *latents,
                  History *history);

/* ---------------------------------------------------------------- y4m.c: frames -> file */

typedef struct {
    int width, height;
    int rate_num, rate_den; /* frames a second */
    int chroma;             /* 420 or 444 when writing; reading also 422 and 400 (mono) */
} VideoFormat;

/* Planes of 8 bits, BT.601 limited range, from a frame [3,Y,X] of floats in [-1,1]; out has y4m_frame_bytes(). */
size_t y4m_frame_bytes(const VideoFormat *format);
void y4m_convert(const VideoFormat *format, const float *frame, uint8_t *out);
/* The header line of interface with its newline, at most 79 bytes; returns its length. */
size_t y4m_header(const VideoFormat *format, char out[80]);

typedef struct Y4mReader Y4mReader;
const char *y4m_open(Bytes bytes, Y4mReader **out, VideoFormat *format); /* bytes stay the caller's */
/* Next frame as floats [3,Y,X] in [-1,1]; *end is set after the last one. */
const char *y4m_next(Y4mReader *reader, float *frame, bool *end);
void y4m_close(Y4mReader *reader);

#endif
