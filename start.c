/* start.c - what a chunk's denoising begins with: noise from the seed or a file, the encoded frames of a source, or a
 * mixture of both (--strength). */
#include "pipeline.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- noise */

static void noise_read(Run *run, Noise *noise) {
    Shape shape = latent_shape(run, run->T - run->given);
    const char *path = run->settings->noise, *why = npy_read(path, &noise->file);
    if (!why) why = npy_fit(&noise->file, &shape);
    if (why) die(STATUS_USAGE, "--noise %s: %s", path, why);
    for (size_t i = 0, count = shape_count(&shape); i < count; i++) {
        double value;
        npy_get(&noise->file, i, 1, &value);
        if (!isfinite((float)value))
            die(STATUS_USAGE, "--noise %s: value %zu of %zu is NaN or infinity, expected finite values", path, i + 1,
                count);
    }
    sha256_of(noise->file.mapping.data, noise->file.mapping.size, run->inputs.noise);
}

Noise noise_open(Run *run) {
    size_t count = (run->T - run->given) * run->frame_size;
    Noise noise = {.initial = draw_start(run->settings->seed, count)};
    if (run->settings->noise) noise_read(run, &noise);
    if (!sampler_needs_noise(&run->schedule, 0) && !sampler_needs_noise(&run->first, 0)) return noise;
    generator_seed(&noise.steps, run->settings->seed);
    generator_skip(&noise.steps, count);
    return noise;
}

/* Reorders random numbers from torch's (C,frames,H,W) to (frames,C,H,W), unless the model was trained on the latter. */
static void to_frame_major(const Run *run, int frames, float *latents) {
    if (run->recipe->noise_frames_first) return;
    size_t plane = (size_t)run->H * run->W;
    float *drawn = allocate(sizeof(float) * frames * run->frame_size);
    memcpy(drawn, latents, sizeof(float) * frames * run->frame_size);
    for (int f = 0; f < frames; f++)
        for (int c = 0; c < run->C; c++)
            memcpy(latents + ((size_t)f * run->C + c) * plane, drawn + ((size_t)c * frames + f) * plane,
                   sizeof(float) * plane);
    free(drawn);
}

static void copy_noise(const Run *run, const Npy *file, Chunk chunk, float *latents) {
    size_t plane = (size_t)run->H * run->W;
    int T = run->T - run->given, first = chunk.first - run->given; /* of the noise */
    for (int f = 0; f < chunk.frames; f++)
        for (int c = 0; c < run->C; c++)
            for (size_t i = 0; i < plane; i++) {
                double value;
                npy_get(file, ((size_t)c * T + first + f) * plane + i, 1, &value);
                *latents++ = (float)value;
            }
}

/* latents (frames,C,H,W) = the chunk's part of the initial noise, times noise_scale */
static void initial_noise(const Run *run, Noise *noise, Chunk chunk, float *latents) {
    size_t count = chunk.frames * run->frame_size;
    if (run->settings->noise) {
        copy_noise(run, &noise->file, chunk, latents);
    } else {
        draw_next(&noise->initial, latents, count);
        to_frame_major(run, chunk.frames, latents);
    }
    tap_clip(run, chunk, latents, run->given, "noise");
    for (size_t i = 0; i < count; i++) latents[i] *= run->recipe->noise_scale;
}

void fresh_noise(const Run *run, Noise *noise, Chunk chunk, float *latents) {
    generator_randn(&noise->steps, latents, chunk.frames * run->frame_size);
    to_frame_major(run, chunk.frames, latents);
    tap_frames(latents, latent_shape(run, chunk.frames), "noise");
}

static void generator_state(Generator *g, StateFile *f) {
    state_item(f, "noise.numbers", g->state, sizeof g->state);
    g->next = (int)state_number(f, "noise.next", g->next, 0, (int)(sizeof g->state / sizeof *g->state));
    g->has_spare = state_number(f, "noise.has_spare", g->has_spare, 0, 1);
    state_item(f, "noise.spare", &g->spare, sizeof g->spare);
}

void noise_state(Noise *noise, StateFile *f) {
    Draw *draw = &noise->initial;
    generator_state(&draw->generator, f);
    draw->at = (size_t)state_number(f, "noise.at", (int64_t)draw->at, 0, (int64_t)draw->n);
    draw->place = (int)state_number(f, "noise.place", draw->place, 0, 16);
    state_item(f, "noise.block", draw->block, sizeof draw->block);
    generator_state(&noise->steps, f);
}

/* ---------------------------------------------------------------- the source: frames -> latents */

/* The encoder's FrameSink. */
static void take_encoded(void *to, float *latents) {
    Encoding *e = to;
    const Run *run = e->run;
    tap_frame(latents, latent_shape(run, run->given + run->redrawn), e->encoded++, "encoded");
    memcpy(e->out, latents, sizeof(float) * run->frame_size);
    e->out += run->frame_size;
}

/* e->frame = the source's next frame, clamped to [-1,1] */
static void take_source(const Settings *s, Encoding *e) {
    source_next(e->source, e->frame);
    for (size_t i = 0, n = (size_t)3 * s->height * s->width; i < n; i++)
        e->frame[i] = e->frame[i] > 1 ? 1 : e->frame[i] < -1 ? -1 : e->frame[i];
    if (s->image) tap(e->frame, SHAPE(3, s->height, s->width), "image");
    else tap_frame(e->frame, SHAPE(3, s->source_frames, s->height, s->width), e->taken, "source");
    e->taken++;
}

static void encoding_open(const Run *run, Encoding *e) {
    const Settings *s = run->settings;
    e->run = run;
    e->source = source_reader_open(s->source, s->width, s->height);
    e->stream = vae_open(&run->model->vae, ENCODER, run->H, run->W, take_encoded, e);
    e->frame = allocate(sizeof(float) * 3 * (size_t)s->height * s->width);
}

void source_skip(SourceReader *source, int frames, float *frame) {
    for (int i = 0; i < frames; i++) source_next(source, frame);
}

void encoding_state(const Run *run, Encoding *e, StateFile *f) {
    const Settings *s = run->settings;
    e->taken = (int)state_number(f, "source.taken", e->taken, 0, s->source_frames);
    e->encoded = (int)state_number(f, "source.encoded", e->encoded, 0, run->given + run->redrawn);
    if (e->taken == 0 || e->taken == s->source_frames) return; /* not open yet, or no longer */
    if (state_is_read(f)) {
        encoding_open(run, e);
        source_skip(e->source, e->taken, e->frame);
    }
    vae_stream_state(e->stream, f);
}

/* latents (frames,C,H,W) = the source's next latent frames */
static void encode(const Run *run, Encoding *e, int frames, float *latents) {
    const Settings *s = run->settings;
    tap_scope("%s", "");
    if (!e->stream) encoding_open(run, e);
    e->out = latents;
    for (int end = e->encoded + frames; e->encoded < end;) {
        progress("encode", e->taken, s->source_frames);
        profile_begin(VAE_ENCODE);
        take_source(s, e);
        vae_push(e->stream, e->frame);
        profile_end(VAE_ENCODE);
    }
    require_finite(run->model, latents, frames * run->frame_size, "encoded");
    if (e->taken < s->source_frames) return;
    source_reader_close(e->source);
    vae_close(e->stream);
    free(e->frame);
    scratch_free();
}

void begin_chunk(const Run *run, Encoding *encoding, Noise *noise, int index, float *latents) {
    Chunk chunk = chunk_at(run, index);
    size_t count = chunk.frames * run->frame_size;
    if (index < run->given_chunks) {
        encode(run, encoding, chunk.frames, latents);
        return;
    }
    float *encoded = run->redrawn ? allocate(sizeof(float) * count) : NULL, sigma = chunk_schedule(run, index)->sigmas[0];
    if (encoded) encode(run, encoding, chunk.frames, encoded);
    initial_noise(run, noise, chunk, latents);
    for (size_t i = 0; encoded && i < count; i++) latents[i] = (1 - sigma) * encoded[i] + sigma * latents[i];
    free(encoded);
}

