/* pipeline.c - strings the stages together: prompt, noise, the denoising loop, frames, file.
 *
 * Follows diffusers' WanPipeline. The order is the order of memory, too: the text encoder's buffers are gone
 * before the transformer's are taken, and those before the decoder's, so a run needs the largest of the
 * three, not their sum; the weights lie in the mapped file and are paged in as they are read. What a run will
 * need is added up before it starts, by the same functions that lay the buffers out. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---------------------------------------------------------------- the run */

int prompt_ids(const Model *m, const char *prompt, int32_t *ids) {
    Bytes clean = prompt_clean((Bytes){(const uint8_t *)prompt, strlen(prompt)});
    int n = tokenizer_encode(m->tokenizer, clean, ids, m->transformer.text_len);
    free((void *)clean.data);
    return n;
}

/* A prompt, from text to what the transformer reads. */
typedef struct {
    const char *name;
    int n;
    int32_t *ids;
    float *embeds; /* (n, text_dim) */
} Prompt;

static Prompt prompt_read(const Model *m, const char *name, const char *text) {
    Prompt p = {.name = name, .ids = allocate(sizeof(int32_t) * (size_t)m->transformer.text_len)};
    p.n = prompt_ids(m, text, p.ids);
    return p;
}

/* How many there are before the first that is infinite or NaN. */
static size_t count_finite(const float *values, size_t count) {
    size_t i = 0;
    while (i < count && isfinite(values[i])) i++;
    return i;
}

/* A run ends where its numbers stop being finite: all that could follow is a black clip. --check's table shows where
 * that began. */
static void stay_finite(const Model *m, const float *values, size_t count, const char *what) {
    if (count_finite(values, count) == count) return;
    taps_report();
    die(STATUS_CHECK, "%s: not finite; try another --precision (this is %s), --shift or --steps, or check the "
        "weights", what, precision_name(m->precision));
}

static void prompt_encode(const Model *m, Prompt *p) {
    p->n = tap_ids(p->ids, p->n, m->transformer.text_len, m->text_encoder.vocab_size, "%s.ids", p->name);
    p->embeds = allocate(sizeof(float) * (size_t)p->n * m->text_encoder.dim);
    progress("text encoder", 0, 1);
    profile_begin(TEXT_ENCODER);
    text_encode(&m->text_encoder, p->ids, p->n, p->embeds);
    profile_end(TEXT_ENCODER);
    tap(p->embeds, SHAPE(p->n, m->text_encoder.dim), "%s.embeds", p->name);
    stay_finite(m, p->embeds, (size_t)p->n * m->text_encoder.dim, reason("%s.embeds", p->name));
}

static void prompt_free(Prompt *p) {
    free(p->ids);
    free(p->embeds);
}

/* One run: what was asked, and the sizes that follow from it. */
typedef struct {
    Model *model;
    const Settings *settings;
    Schedule schedule;
    bool guided;             /* guidance 1 is the conditional velocity itself; diffusers takes less as 1 */
    Prompt prompt, negative; /* the latter if guided */
    int C, T, H, W;          /* of the latents, (T,C,H,W) */
    size_t frame, elements;  /* C*H*W, and T times that */
    char noise_sha256[65];   /* of the file of --noise */
} Run;

/* Very many steps and a large shift give noise levels that float32 cannot tell apart. */
static Schedule falling_schedule(const Model *m, const Settings *s) {
    Schedule schedule = schedule_make(s->sampler, s->steps, s->shift,
                                      weights_size_or(m->file, "scheduler.num_train_timesteps", 1 << 20, 1000));
    for (int i = 0; i < s->steps; i++)
        if (!(schedule.sigmas[i + 1] < schedule.sigmas[i]))
            die(STATUS_USAGE, "--steps %d with --shift %g: the noise level does not fall in step %d; expected fewer "
                "steps or a smaller shift", s->steps, s->shift, i + 1);
    return schedule;
}

static Run run_plan(Model *m, const Settings *s) {
    Run run = {.model = m, .settings = s, .guided = s->guidance > 1.0, .C = m->transformer.in_dim};
    run.schedule = falling_schedule(m, s);
    run.prompt = prompt_read(m, "prompt", s->prompt);
    if (run.guided) run.negative = prompt_read(m, "negative", s->negative);
    run.T = (s->frames - 1) / m->vae.temporal_stride + 1;
    run.H = s->height / m->vae.spatial_stride;
    run.W = s->width / m->vae.spatial_stride;
    run.frame = (size_t)run.C * run.H * run.W;
    run.elements = run.T * run.frame;
    return run;
}

static Shape latent_shape(const Run *run) { return SHAPE(run->C, run->T, run->H, run->W); }

/* (C,T,H,W), as files and torch have it, to (T,C,H,W). */
static void to_frames(const Run *run, float *frames, const float *clip) {
    size_t plane = (size_t)run->H * run->W;
    for (int t = 0; t < run->T; t++)
        for (int c = 0; c < run->C; c++)
            memcpy(frames + ((size_t)t * run->C + c) * plane, clip + ((size_t)c * run->T + t) * plane,
                   sizeof(float) * plane);
}

static void read_noise(Run *run, float *latents) {
    Npy file;
    Shape shape = latent_shape(run);
    const char *path = run->settings->noise, *why = npy_read(path, &file);
    if (!why) why = npy_fit(&file, &shape);
    if (why) die(STATUS_USAGE, "--noise %s: %s", path, why);
    float *noise = npy_floats(&file);
    size_t finite = count_finite(noise, run->elements);
    if (finite < run->elements)
        die(STATUS_USAGE, "--noise %s: number %zu of %zu is not finite", path, finite + 1, run->elements);
    sha256_of(file.mapping.data, file.mapping.size, run->noise_sha256);
    to_frames(run, latents, noise);
    free(noise);
    npy_free(&file);
}

/* The first latents, a new array. */
static float *make_noise(Run *run) {
    float *latents = allocate(sizeof(float) * run->elements);
    if (run->settings->noise) {
        read_noise(run, latents);
        return latents;
    }
    Generator generator;
    float *noise = allocate(sizeof(float) * run->elements);
    generator_seed(&generator, run->settings->seed);
    generator_randn(&generator, noise, run->elements);
    to_frames(run, latents, noise);
    free(noise);
    return latents;
}

/* Everything that the denoising loop holds, in one arena. */
typedef struct {
    TransformerState state;
    TextContext cond, uncond;
    KvCache cache;
    History history;
    float *velocity, *unconditional, *timesteps;
} Denoiser;

static Denoiser denoiser_take(Arena *arena, const Run *run) {
    const Transformer *t = &run->model->transformer;
    Denoiser d = {.cond = text_context_take(arena, t, run->prompt.n)};
    if (run->guided) d.uncond = text_context_take(arena, t, run->negative.n);
    d.state = transformer_state_take(arena, t, run->T, run->T, run->H, run->W);
    d.cache = kv_cache_take(arena, t, (Window){.window = run->T}, 0, d.state.tokens, TYPE_F32);
    d.timesteps = arena_floats(arena, run->T);
    d.history = history_take(arena, run->elements);
    d.velocity = arena_floats(arena, run->elements);
    d.unconditional = arena_floats(arena, run->guided ? run->elements : 0);
    return d;
}

static void predict(const Run *run, Denoiser *d, const char *name, const TextContext *context, int step,
                    float timestep, const float *latents, float *velocity) {
    Chunk chunk = {0, run->T, d->timesteps};
    for (int f = 0; f < run->T; f++) d->timesteps[f] = timestep;
    tap_scope("step%03d.%s.", step, name);
    profile_begin(TRANSFORMER);
    transformer_forward(&run->model->transformer, &d->state, context, &d->cache, &chunk, latents, velocity);
    profile_end(TRANSFORMER);
    tap_scope("step%03d.", step);
}

/* The loop: velocity at the present noise level, with and without the prompt; guidance;
 * a step of the sampler. */
static void denoise(const Run *run, Denoiser *d, float *latents) {
    const Settings *s = run->settings;
    const Schedule *schedule = &run->schedule;
    float guidance = (float)s->guidance;
    tap(schedule->timesteps, SHAPE(s->steps), "timesteps");
    tap(schedule->sigmas, SHAPE(s->steps + 1), "sigmas");
    for (int step = 0; step < s->steps; step++) {
        float timestep = schedule->timesteps[step], *v = d->velocity, *u = d->unconditional;
        progress("step", step, s->steps);
        predict(run, d, "cond", &d->cond, step, timestep, latents, v);
        if (run->guided) {
            predict(run, d, "uncond", &d->uncond, step, timestep, latents, u);
            for (size_t i = 0; i < run->elements; i++) v[i] = u[i] + guidance * (v[i] - u[i]);
        }
        tap_frames(v, latent_shape(run), "velocity");
        profile_begin(SAMPLER);
        sampler_step(schedule, step, v, latents, &d->history);
        profile_end(SAMPLER);
        tap_frames(latents, latent_shape(run), "latents");
        stay_finite(run->model, latents, run->elements, reason("latents after step %d of %d", step + 1, s->steps));
    }
    tap_scope("%s", "");
}

/* From noise and prompts to final latents. */
static void make_latents(Run *run, float *latents) {
    const Transformer *t = &run->model->transformer;
    Prompt *prompt = &run->prompt, *negative = &run->negative;
    prompt_encode(run->model, prompt);
    if (run->guided) prompt_encode(run->model, negative);
    scratch_free();
    Arena count = {0};
    denoiser_take(&count, run);
    Arena arena = arena_open(count.used);
    Denoiser denoiser = denoiser_take(&arena, run);
    tap_frames(latents, latent_shape(run), "noise");
    profile_begin(TRANSFORMER);
    transformer_read(t, prompt->embeds, prompt->n, &denoiser.cond);
    if (run->guided) transformer_read(t, negative->embeds, negative->n, &denoiser.uncond);
    profile_end(TRANSFORMER);
    denoise(run, &denoiser, latents);
    tap_frames(latents, latent_shape(run), "latents");
    arena_close(&arena);
    scratch_free();
}

/* ---------------------------------------------------------------- frames */

typedef struct {
    const Run *run;
    VideoFormat format;
    OutputFile file, record; /* the record is open where there will be one */
    Preview preview;
    uint8_t *planes;
    Sha256 sha;
    int index;
} Video;

static void write_bytes(Video *video, const void *data, size_t bytes) {
    output_write(&video->file, data, bytes);
    sha256_add(&video->sha, data, bytes);
}

/* The sink of the decoder: a frame is converted, written and flushed before the next is decoded. */
static void write_frame(void *to, float *frame) {
    Video *video = to;
    const Settings *s = video->run->settings;
    profile_end(VAE_DECODE);
    profile_begin(OUTPUT);
    tap_frame(frame, SHAPE(3, s->frames, s->height, s->width), video->index, "video");
    stay_finite(video->run->model, frame, (size_t)3 * s->height * s->width,
                reason("frame %d of %d", video->index + 1, s->frames));
    y4m_convert(&video->format, frame, video->planes);
    write_bytes(video, "FRAME\n", 6);
    write_bytes(video, video->planes, y4m_frame_bytes(&video->format));
    output_flush(&video->file);
    profile_end(OUTPUT);
    preview_frame(&video->preview, &video->format, frame, video->index); /* may wait: no stage's time */
    progress("frame", ++video->index, s->frames);
    profile_resume(VAE_DECODE);
}

/* Both files are opened before the work begins, so that what cannot be written is known then. Standard output
 * and devices, which are written straight, have no record. */
static Video video_open(const Run *run) {
    const Settings *s = run->settings;
    Video video = {.run = run, .format = {s->width, s->height, s->fps_num, s->fps_den, s->chroma}};
    video.file = output_open(s->output);
    if (video.file.temporary) {
        char *record = record_path(s);
        if (s->record) video.record = output_open(record);
        else if (!access(record, F_OK)) warn("%s will not be of this video", record);
        free(record);
    }
    if (s->preview) video.preview = preview_open();
    video.planes = allocate(y4m_frame_bytes(&video.format));
    sha256_start(&video.sha);
    return video;
}

static void decode(const Run *run, Video *video, const float *latents) {
    VaeStream *decoder = vae_decoder_open(&run->model->vae, run->H, run->W, write_frame, video);
    char header[80];
    write_bytes(video, header, y4m_header(&video->format, header));
    progress("frame", 0, run->settings->frames);
    for (int t = 0; t < run->T; t++) {
        profile_begin(VAE_DECODE);
        vae_decode(decoder, latents + t * run->frame);
        profile_end(VAE_DECODE);
    }
    vae_stream_close(decoder);
    scratch_free();
}

/* The video comes first: whatever happens to the record then, the video is safe; and if the video cannot have
 * its name, what stands there keeps the record that belongs to it. */
static void video_close(Video *video) {
    const Run *run = video->run;
    char sha[65];
    sha256_finish(&video->sha, sha);
    output_commit(&video->file);
    if (video->record.stream) record_write(&video->record, run->model, run->settings, run->noise_sha256, sha);
    free(video->planes);
}

/* ---------------------------------------------------------------- what it will take */

static int tokens_of(const Run *run) {
    const int *patch = run->model->transformer.patch_size;
    return run->T * run->H * run->W / (patch[0] * patch[1] * patch[2]);
}

/* Each stage's memory: its buffers, and what its products and attention pack. */

static int longer_prompt(const Run *run) { return (int)larger(run->prompt.n, run->negative.n); }

static size_t encoding_memory(const Run *run) {
    const TextEncoder *e = &run->model->text_encoder;
    int n = longer_prompt(run);
    return text_encoder_memory(e, n) + larger(product_memory(e->precision, n, e->ffn_dim),
                                              attention_memory(F32, n, e->num_heads, e->head_dim));
}

static size_t denoising_memory(const Run *run) {
    const Transformer *t = &run->model->transformer;
    int positions = longer_prompt(run) + 1, L = tokens_of(run);
    Arena denoiser = {0};
    denoiser_take(&denoiser, run);
    size_t reading = sizeof(float) * (size_t)positions * (size_t)(t->text_dim + 2 * t->dim);
    return denoiser.used +
           larger(reading + product_memory(F32, positions, t->text_dim),
                  larger(attention_memory(t->precision, L, t->num_heads, t->dim / t->num_heads),
                         product_memory(t->precision, L, t->ffn_dim)));
}

static size_t decoding_memory(const Run *run) {
    const Vae *vae = &run->model->vae;
    return vae_decoder_memory(vae, run->H, run->W) + vae_decoder_scratch(vae, run->H, run->W);
}

/* Bytes of private memory at the highest point. */
static size_t run_memory(const Run *run) {
    return larger(encoding_memory(run), larger(denoising_memory(run), decoding_memory(run))) +
           run->elements * sizeof(float);
}

static double run_flops(const Run *run) {
    const Model *m = run->model;
    const Transformer *t = &m->transformer;
    int L = tokens_of(run), n = run->prompt.n, n_negative = run->negative.n;
    double flops = text_encoder_flops(&m->text_encoder, n) +
                   run->settings->steps * transformer_flops(t, L, L, n + 1);
    if (run->guided)
        flops += text_encoder_flops(&m->text_encoder, n_negative) +
                 run->settings->steps * transformer_flops(t, L, L, n_negative + 1);
    return flops + vae_decoder_flops(&m->vae, run->T, run->H, run->W);
}

static void estimate(const Run *run) {
    const Settings *s = run->settings;
    size_t bytes = run_memory(run), available = memory_available();
    if (bytes > available)
        die(STATUS_RESOURCE, "%dx%d with %d frames needs %.1f GiB of memory and %.1f GiB can be had",
            s->width, s->height, s->frames, bytes / 0x1p30, available / 0x1p30);
    int longest = model_frames(run->model);
    if (s->frames > longest)
        warn("%d frames: the model made clips of %d, and beyond them motion tends to repeat", s->frames,
             longest);
    progress_note("%dx%d, %d frames, %d steps: %.4g TFLOP in %s, %.2f GiB of memory beside the weights",
                  s->width, s->height, s->frames, s->steps, run_flops(run) * 1e-12,
                  precision_name(run->model->precision), bytes / 0x1p30);
}

void generate(Model *model, const Settings *settings) {
    Run run = run_plan(model, settings);
    estimate(&run);
    Video video = video_open(&run);
    float *latents = make_noise(&run); /* before the prompts, whose reading takes time: its file may be wrong */
    make_latents(&run, latents);
    decode(&run, &video, latents);
    free(latents);
    schedule_free(&run.schedule);
    prompt_free(&run.prompt);
    prompt_free(&run.negative);
    progress(NULL, 0, 0);
    video_close(&video);
}
