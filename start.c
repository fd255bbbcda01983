/* start.c - what a chunk's denoising begins with: noise from the seed or a file, the encoded frames of a source, or a
 * mixture of both (--strength). And what a picture becomes, which follows diffusers' WanImageToVideoPipeline:
 *
 *   generates in chunks   the encoded picture is a chunk of its own, whose keys and values others look back at
 *   TI2V-5B               held frames: the picture's latent frame is not denoised, and its timestep is 0
 *   I2V-A14B              condition: the clip picture, 0, 0, ... is encoded, and read beside the latents in every
 *                         step. A mask comes first, with a channel for each video frame of a latent one: 1 for a
 *                         picture, else 0
 *
 * --last-image is a second held frame, or the last frame of the clip that becomes the condition. With --extend the
 * picture is the source's last frame. */
#include "pipeline.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- noise */

static void noise_read(Run *run, Noise *noise) {
    Shape shape = latent_shape(run, run->T - run->given);
    const char *path = run->settings->noise, *why = npy_read(path, &noise->file);
    if (!why) why = npy_fit(&noise->file, &shape);
    if (!why) why = npy_finite(&noise->file);
    if (why) die(STATUS_USAGE, "--noise %s: %s", path, why);
    sha256_of(noise->file.mapping.data, noise->file.mapping.size, run->inputs.noise);
}

Noise noise_open(Run *run) {
    size_t count = (run->T - run->given) * run->frame_size;
    Noise noise = {.initial = draw_start(run->settings->seed, count)};
    if (run->settings->noise) noise_read(run, &noise);
    if (!run_renoises(run)) return noise;
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

void source_skip(SourceReader *source, int frames, float *frame) {
    for (int i = 0; i < frames; i++) source_next(source, frame);
}

/* The encoder's FrameSink. */
static void take_encoded(void *to, float *latents) {
    Encoding *e = to;
    const Run *run = e->run;
    tap_frame(latents, latent_shape(run, run->encoded), e->encoded++, "encoded");
    memcpy(e->out, latents, sizeof(float) * run->frame_size);
    e->out += e->stride;
}

static void read_last_picture(const Settings *s, float *frame) {
    SourceReader *reader = source_reader_open(s->last_source, s->width, s->height);
    source_next(reader, frame);
    source_reader_close(reader);
}

/* e->frame = the next frame that is encoded, clamped to [-1,1]: the source's, then zeros, then the last picture */
static void take_frame(const Run *run, Encoding *e) {
    const Settings *s = run->settings;
    Shape picture = SHAPE(3, s->height, s->width);
    int read = s->source_frames - run->ahead;
    bool first = e->taken < read, last = s->last_source && e->taken + 1 == run->pictured;
    if (first) source_next(e->source, e->frame);
    else if (last) read_last_picture(s, e->frame);
    else memset(e->frame, 0, sizeof(float) * video_frame_values(s));
    for (size_t i = 0; i < video_frame_values(s); i++)
        e->frame[i] = e->frame[i] > 1 ? 1 : e->frame[i] < -1 ? -1 : e->frame[i];
    if (first && s->video) tap_frame(e->frame, SHAPE(3, read, s->height, s->width), e->taken, "source");
    else if (first || last) tap(e->frame, picture, first ? "image" : "last_image");
    e->taken++;
}

static void stream_open(const Run *run, Encoding *e) {
    vae_close(e->stream);
    e->stream = vae_open(&run->model->vae, ENCODER, run->H, run->W, take_encoded, e);
}

static void encoding_open(const Run *run, Encoding *e) {
    const Settings *s = run->settings;
    e->run = run;
    e->source = source_reader_open(s->source, s->width, s->height);
    stream_open(run, e);
    e->frame = allocate(sizeof(float) * video_frame_values(s));
    source_skip(e->source, run->ahead, e->frame);
}

size_t condition_size(const Run *run) { return (size_t)run->T * run->condition_channels * run->H * run->W; }

static void take_conditions(const Run *run, Encoding *e) {
    e->held = allocate(sizeof(float) * run->held * run->frame_size);
    e->condition = allocate(sizeof(float) * condition_size(run));
}

static void encoding_close(Encoding *e) {
    source_reader_close(e->source), e->source = NULL;
    vae_close(e->stream), e->stream = NULL;
    free(e->frame), e->frame = NULL;
}

void encoding_free(Encoding *e) {
    encoding_close(e);
    free(e->held);
    free(e->condition);
}

void encoding_state(const Run *run, Encoding *e, StateFile *f) {
    if (state_is_read(f)) take_conditions(run, e);
    state_item(f, "held", e->held, sizeof(float) * run->held * run->frame_size);
    state_item(f, "planes", e->condition, sizeof(float) * condition_size(run));
    e->taken = (int)state_number(f, "source.taken", e->taken, 0, run->pictured);
    e->encoded = (int)state_number(f, "source.encoded", e->encoded, 0, run->encoded);
    if (e->taken == 0 || e->taken == run->pictured) return; /* not open yet, or no longer */
    if (state_is_read(f)) {
        encoding_open(run, e);
        source_skip(e->source, e->taken, e->frame);
    }
    vae_stream_state(e->stream, f);
}

/* Writes the next latent frames (C,H,W) to `out`, `stride` floats from one to the next. */
static void encode(const Run *run, Encoding *e, int frames, float *out, size_t stride) {
    tap_scope("%s", "");
    if (!e->stream) encoding_open(run, e);
    e->out = out, e->stride = stride;
    for (int end = e->encoded + frames; e->encoded < end;) {
        progress("encode", e->taken, run->pictured);
        profile_begin(VAE_ENCODE);
        if (run->held && e->taken) stream_open(run, e); /* each picture is encoded by itself */
        take_frame(run, e);
        vae_push(e->stream, e->frame);
        profile_end(VAE_ENCODE);
    }
    for (int f = 0; f < frames; f++) require_finite(run->model, out + f * stride, run->frame_size, "encoded");
    if (e->taken < run->pictured) return;
    encoding_close(e);
    scratch_free();
}

/* Channel k of the mask's latent frame t belongs to video frame s * t + k - (s - 1), where s is the VAE's temporal
 * stride. Latent frame 0 stands for video frame 0 alone: all its channels are 1. */
static void encode_condition(const Run *run, Encoding *e) {
    size_t plane = (size_t)run->H * run->W, stride = run->condition_channels * plane;
    int masks = run->condition_channels - run->C;
    float *last = e->condition + (run->T - 1) * stride;
    for (size_t i = 0; i < masks * plane; i++) e->condition[i] = 1;
    for (size_t i = 0; run->settings->last_source && i < plane; i++) last[(masks - 1) * plane + i] = 1;
    encode(run, e, run->T, e->condition + masks * plane, stride);
    for (int f = 0; f < run->T; f++)
        tap_frame(e->condition + f * stride, SHAPE(run->condition_channels, run->T, run->H, run->W), f, "condition");
}

bool is_held(const Run *run, int frame) {
    return (run->held > 0 && frame == 0) || (run->held > 1 && frame == run->T - 1);
}

void hold_frames(const Run *run, const Encoding *e, Chunk chunk, float *latents) {
    const float *held = e->held;
    for (int f = 0; f < chunk.frames; f++) {
        if (!is_held(run, chunk.first + f)) continue;
        memcpy(latents + f * run->frame_size, held, sizeof(float) * run->frame_size);
        held += run->frame_size;
    }
}

void begin_chunk(const Run *run, Encoding *encoding, Noise *noise, int index, float *latents) {
    Chunk chunk = chunk_at(run, index);
    size_t count = chunk.frames * run->frame_size;
    if (index < run->given_chunks) {
        encode(run, encoding, chunk.frames, latents, run->frame_size);
        return;
    }
    if (run->held || run->condition_channels) take_conditions(run, encoding);
    if (run->held) encode(run, encoding, run->held, encoding->held, run->frame_size);
    if (run->condition_channels) encode_condition(run, encoding);
    float sigma = chunk_schedule(run, index)->sigmas[0], *encoded = NULL;
    if (run->redrawn) encoded = allocate(sizeof(float) * count);
    if (encoded) encode(run, encoding, chunk.frames, encoded, run->frame_size);
    initial_noise(run, noise, chunk, latents);
    for (size_t i = 0; encoded && i < count; i++) latents[i] = (1 - sigma) * encoded[i] + sigma * latents[i];
    hold_frames(run, encoding, chunk, latents);
    free(encoded);
}

