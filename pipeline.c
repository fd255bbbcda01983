/* pipeline.c - runs the stages: prompts -> embeds, noise -> latents (the denoising loop), latents -> frames -> file.
 *
 * A clip is generated chunk by chunk. Most models generate the whole clip as one chunk and follow diffusers'
 * WanPipeline; models that generate in chunks follow Self-Forcing's CausalInferencePipeline. make_clip() is the
 * whole loop:
 *
 *   for each chunk:  x = noise, or latents of a source, or a mixture     (frames,C,H,W)
 *     for each step: v = transformer(x, timestep, prompt)
 *                    v = u + guidance * (v - u), u = transformer(x, timestep, negative prompt)
 *                    x = sampler_step(x, v)
 *     the decoder turns x into frames; each frame is written at once
 *     one more pass of x fills the KV cache, if another chunk follows
 *
 * Stages free their buffers as early as possible. The text encoder's are freed before the transformer's are allocated,
 * and the transformer's are freed after the last chunk's last step, before that chunk is decoded:
 *
 *   peak memory = max(text encoder, transformer, decoder)      one chunk
 *                 max(text encoder, transformer + decoder)     several chunks
 *
 * A source (--image, --video) adds the VAE's encoder: to the maximum if one chunk is encoded, to the sum if several are.
 * A story adds the text encoder to the sum: later prompts are encoded when they take effect.
 *
 * With several chunks it does not depend on the clip's length. Weights are read from the mapped file and are not
 * counted. run_memory() computes the peak before the run, with the functions that allocate the buffers. */
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

typedef struct {
    char name[32]; /* of its taps: "prompt", "prompt01", "negative" */
    double time;   /* seconds; the prompt holds from here on */
    int n;
    int32_t *ids;  /* [n]; NULL if the embeds were read from a file */
    float *embeds; /* (n, text_dim); NULL until they are encoded */
} Prompt;

static Prompt prompt_new(const Model *m, const char *name, double time, const char *text) {
    Prompt p = {.time = time, .ids = allocate(sizeof(int32_t) * (size_t)m->transformer.text_len)};
    snprintf(p.name, sizeof p.name, "%s", name);
    p.n = prompt_ids(m, text, p.ids);
    return p;
}

/* Embeds of --embeds or --negative-embeds in the place of a prompt. A file may have axes of 1 in front. */
static Prompt prompt_read(const Model *m, const char *name, const char *option, const char *path, char sha256[65]) {
    Npy file;
    int most = m->transformer.text_len, dim = m->text_encoder.dim;
    const char *why = npy_read(path, &file);
    if (why) die(STATUS_USAGE, "%s %s: %s", option, path, why);
    Shape shape = SHAPE(file.shape.n > 1 ? file.shape.d[file.shape.n - 2] : 1, dim);
    why = npy_fit(&file, &shape);
    if (why) die(STATUS_USAGE, "%s %s: %s", option, path, why);
    if (shape.d[0] < 1 || shape.d[0] > most)
        die(STATUS_USAGE, "%s %s: %d tokens, expected 1 to %d", option, path, shape.d[0], most);
    Prompt p = {.n = shape.d[0], .embeds = npy_floats(&file)};
    snprintf(p.name, sizeof p.name, "%s", name);
    for (size_t i = 0, count = shape_count(&shape); i < count; i++)
        if (!isfinite(p.embeds[i]))
            die(STATUS_USAGE, "%s %s: value %zu of %zu is NaN or infinity, expected finite values", option, path, i + 1,
                count);
    sha256_of(file.mapping.data, file.mapping.size, sha256);
    npy_free(&file);
    return p;
}

/* Ends the run at the first NaN or infinity, which would give a black clip. With --check, its table is printed first,
 * because it names the first tensor that differs. */
static void require_finite(const Model *m, const float *values, size_t count, const char *what) {
    size_t i = 0;
    while (i < count && isfinite(values[i])) i++;
    if (i == count) return;
    taps_report();
    die(STATUS_CHECK, "%s: NaN or infinity, expected finite values; try another --precision (this is %s), --shift or "
        "--steps, or check the weights", what, precision_name(m->precision));
}

/* Runs the text encoder, unless the embeds were read from a file. */
static void prompt_encode(const Model *m, Prompt *p) {
    if (p->embeds) {
        tap(p->embeds, SHAPE(p->n, m->text_encoder.dim), "%s.embeds", p->name);
        return;
    }
    p->n = tap_ids(p->ids, p->n, m->transformer.text_len, m->text_encoder.vocab_size, "%s.ids", p->name);
    p->embeds = allocate(sizeof(float) * (size_t)p->n * m->text_encoder.dim);
    profile_begin(TEXT_ENCODER);
    text_encode(&m->text_encoder, p->ids, p->n, p->embeds);
    profile_end(TEXT_ENCODER);
    tap(p->embeds, SHAPE(p->n, m->text_encoder.dim), "%s.embeds", p->name);
    require_finite(m, p->embeds, (size_t)p->n * m->text_encoder.dim, reason("%s.embeds", p->name));
}

static void prompt_free(Prompt *p) {
    free(p->ids);
    free(p->embeds);
}

/* The plan of a run: its settings, and the sizes that follow from them. */
typedef struct {
    Model *model;
    const Settings *settings;
    const Recipe *recipe;
    Schedule own;              /* made for this run; none if the model has a fixed one */
    Schedule schedule, first;  /* of all generated chunks but the first; of the first; the last steps with --strength */
    bool guided;               /* guidance > 1: each step runs the negative prompt, too */
    int prompt_count;
    Prompt *prompts, negative; /* [prompt_count]; the negative one is set if guided */
    int C, T, H, W;            /* latents (T,C,H,W); T is rounded up to whole chunks */
    int decoded;               /* latent frames that are decoded: the first ones of T */
    int given, redrawn;        /* the source's latent frames: kept as they are, or mixed with noise (--strength) */
    int chunks, given_chunks;  /* number of chunks; the first of them hold the given frames */
    int chunk_frames;          /* frames in a chunk, or the most */
    Window window;             /* size and sink are at most T */
    int tokens;                /* in a latent frame */
    int recached;              /* latent frames to keep for RECACHE; 0 if it cannot happen */
    size_t frame_size;         /* C*H*W, elements of a latent frame */
    InputHashes inputs;
} Run;

/* With many steps and a large shift, neighbouring sigmas round to the same float32: this is refused. */
static Schedule make_schedule(const Model *m, const Settings *s) {
    Schedule schedule = schedule_make(s->sampler, s->steps, s->shift,
                                      weights_size_or(m->file, "scheduler.num_train_timesteps", 1 << 20, 1000));
    for (int i = 0; i < s->steps; i++)
        if (!(schedule.sigmas[i + 1] < schedule.sigmas[i]))
            die(STATUS_USAGE, "--steps %d with --shift %g: sigma does not decrease in step %d, expected fewer steps or a "
                "smaller shift", s->steps, s->shift, i + 1);
    return schedule;
}

/* All chunks have chunk_frames frames, except an independent first frame and the last given chunk, which may be shorter.
 * The last generated chunk may reach past the clip's end. */
static Chunk chunk_at(const Run *run, int index) {
    bool given = index < run->given_chunks;
    int n = run->chunk_frames, start = given ? 0 : run->given, i = given ? index : index - run->given_chunks;
    bool alone = run->recipe->independent_first_frame && start == 0;
    Chunk chunk = {.first = start + i * n - (alone && i ? n - 1 : 0), .frames = alone && !i ? 1 : n};
    if (given) chunk.frames = smaller(chunk.frames, run->given - chunk.first);
    return chunk;
}

/* Number of chunks of n frames that hold so many frames, the first of which may be alone in its chunk. */
static int count_chunks(int frames, int n, bool alone) {
    return alone && frames ? 1 + ceiling(frames - 1, n) : ceiling(frames, n);
}

/* The chunk's frames, except those past the clip's end. */
static int chunk_decoded(const Run *run, Chunk chunk) { return smaller(chunk.frames, run->decoded - chunk.first); }

/* How many video frames the first `latent` latent frames decode to. */
static int video_frames(const Run *run, int latent) { return latent ? 1 + (latent - 1) * run->model->vae.temporal_stride : 0; }

/* Start time of the chunk's first video frame, in seconds. */
static double chunk_time(const Run *run, Chunk chunk) {
    return (double)video_frames(run, chunk.first) * run->settings->fps_den / run->settings->fps_num;
}

static int latent_frames(const Run *run, int frames) { return (frames - 1) / run->model->vae.temporal_stride + 1; }

static void plan_chunks(Run *run) {
    const Recipe *r = run->recipe;
    const Settings *s = run->settings;
    int n = r->chunk_frames ? r->chunk_frames : run->decoded;
    bool alone = r->independent_first_frame;
    if (s->source) *(s->strength >= 0 ? &run->redrawn : &run->given) = latent_frames(run, s->source_frames);
    run->chunk_frames = n;
    run->given_chunks = count_chunks(run->given, n, alone);
    run->chunks = run->given_chunks + count_chunks(run->decoded - run->given, n, alone && !run->given);
    Chunk last = chunk_at(run, run->chunks - 1);
    run->T = last.first + last.frames;
    if (run->redrawn && run->T > run->decoded)
        die(STATUS_USAGE, "--strength: the model generates chunks of %d latent frames, expected a number of frames that "
            "fills them, found %d", n, s->frames);
    run->window = (Window){s->window ? smaller(s->window, run->T) : run->T, s->sink, !strcmp(s->positions, "relative")};
    run->window.sink = smaller(run->window.sink, run->T);
}

static PromptChange prompt_change(const Run *run) {
    PromptChange change = run->recipe->prompt_change;
    return change != BY_POSITIONS ? change : run->window.relative ? FLUSH : KEEP;
}

static void plan_prompts(Run *run) {
    const Settings *s = run->settings;
    const Story *story = &s->story;
    run->prompt_count = 1 + story->count;
    run->prompts = allocate(sizeof(Prompt) * (size_t)run->prompt_count);
    run->prompts[0] = s->embeds ? prompt_read(run->model, "prompt", "--embeds", s->embeds, run->inputs.embeds)
                                : prompt_new(run->model, "prompt", 0, s->prompt);
    for (int i = 0; i < story->count; i++)
        run->prompts[i + 1] = prompt_new(run->model, reason("prompt%02d", i + 1), story->lines[i].time,
                                          story->lines[i].text);
    if (run->guided && s->negative_embeds)
        run->negative = prompt_read(run->model, "negative", "--negative-embeds", s->negative_embeds,
                                    run->inputs.negative_embeds);
    else if (run->guided)
        run->negative = prompt_new(run->model, "negative", 0, s->negative);
    if (story->count && prompt_change(run) == RECACHE) run->recached = run->window.size;
}

static Run run_plan(Model *m, const Settings *s) {
    Run run = {.model = m, .settings = s, .recipe = &m->recipe, .guided = s->guidance > 1.0,
               .C = m->transformer.in_dim};
    const int *patch = m->transformer.patch_size;
    run.decoded = latent_frames(&run, s->frames);
    run.H = s->height / m->vae.spatial_stride;
    run.W = s->width / m->vae.spatial_stride;
    run.frame_size = (size_t)run.C * run.H * run.W;
    run.tokens = run.H / patch[1] * (run.W / patch[2]);
    run.schedule = m->recipe.schedule, run.first = m->recipe.first;
    if (!run.schedule.steps) run.schedule = run.first = run.own = make_schedule(m, s);
    if (s->strength >= 0) {
        run.schedule = schedule_end(&run.schedule, s->strength);
        run.first = schedule_end(&run.first, s->strength);
    }
    if (s->source) sha256_of(s->source->bytes.data, s->source->bytes.size, run.inputs.source);
    plan_chunks(&run);
    plan_prompts(&run);
    return run;
}

static void run_free(Run *run) {
    schedule_free(&run->own);
    for (int i = 0; i < run->prompt_count; i++) prompt_free(&run->prompts[i]);
    prompt_free(&run->negative);
    free(run->prompts);
}

static const Schedule *chunk_schedule(const Run *run, int index) {
    return index > run->given_chunks ? &run->schedule : &run->first;
}

static Shape latent_shape(const Run *run, int frames) { return SHAPE(run->C, frames, run->H, run->W); }

/* Taps that follow are named "chunkCCC.PREFIX...", or "PREFIX..." if the model does not generate in chunks. CCC counts
 * generated chunks; given ones are "givenCCC". */
static void scope(const Run *run, int chunk, const char *prefix) {
    if (chunk < run->given_chunks) tap_scope("given%03d.%s", chunk, prefix);
    else if (run->recipe->chunk_frames) tap_scope("chunk%03d.%s", chunk - run->given_chunks, prefix);
    else tap_scope("%s", prefix);
}

/* Taps the chunk's frames as a part of a tensor of the clip from latent frame `from` on, [C,T-from,H,W]. */
static void tap_clip(const Run *run, Chunk chunk, float *latents, int from, const char *name) {
    tap_scope("%s", "");
    for (int f = 0; f < chunk.frames; f++)
        tap_frame(latents + f * run->frame_size, latent_shape(run, run->T - from), chunk.first - from + f, name);
}

/* ---------------------------------------------------------------- noise */

/* The seed gives one sequence of random numbers:
 *
 *   [ initial noise of the clip, T*C*H*W numbers | noise of re-noising steps, in the order of the steps ... ]
 *     ^ initial                                    ^ steps
 *
 * Given frames have no noise, and T is then that of the generated frames.
 *
 * --noise replaces the initial noise; the numbers of the steps stay the same. */
typedef struct {
    Npy file; /* --noise, [C,T,H,W] */
    Draw initial;
    Generator steps;
} Noise;

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

static Noise noise_open(Run *run) {
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

/* latents (frames,C,H,W) = the noise that a re-noising step adds */
static void fresh_noise(const Run *run, Noise *noise, Chunk chunk, float *latents) {
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

static void noise_state(Noise *noise, StateFile *f) {
    Draw *draw = &noise->initial;
    generator_state(&draw->generator, f);
    draw->at = (size_t)state_number(f, "noise.at", (int64_t)draw->at, 0, (int64_t)draw->n);
    draw->place = (int)state_number(f, "noise.place", draw->place, 0, 16);
    state_item(f, "noise.block", draw->block, sizeof draw->block);
    generator_state(&noise->steps, f);
}

/* ---------------------------------------------------------------- the source: frames -> latents */

/* The encoder at work. It is opened for the source's first frame and closed after its last. */
typedef struct {
    const Run *run;
    SourceReader *source;
    VaeStream *stream;
    float *frame; /* [3,Y,X] */
    int taken;    /* frames of the source so far */
    int encoded;  /* latent frames so far */
    float *out;   /* where the next one goes */
} Encoding;

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

/* Reads over the source's first frames. */
static void source_skip(SourceReader *source, int frames, float *frame) {
    for (int i = 0; i < frames; i++) source_next(source, frame);
}

static void encoding_state(const Run *run, Encoding *e, StateFile *f) {
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

/* latents (frames,C,H,W) = what a chunk begins with: (1 - sigma) * encoded + sigma * noise, or one of the two */
static void begin_chunk(const Run *run, Encoding *encoding, Noise *noise, int index, float *latents) {
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

/* ---------------------------------------------------------------- frames */

typedef struct {
    const Run *run;
    VideoFormat format;
    OutputFile file, record; /* the record is opened only if one is written */
    Preview preview;
    uint8_t *planes;         /* Y, Cb, Cr of one frame */
    Mark mark;               /* set with --mark */
    Sha256 sha;              /* of the bytes written so far */
    Drift *drift;            /* NULL without --drift */
    SourceReader *source;    /* NULL without --extend */
    int index;               /* of the next frame */
    int chunk;               /* chunks that are decoded */
    int resumed;             /* frames that an earlier run had written */
    double started, next;    /* when the first step began; before when no state is written; in seconds() */
    VaeStream *decoder;      /* NULL before the first latent frame */
    char *state;             /* name of the state file; NULL: none is written */
    bool kept;               /* the state file exists */
    bool warned;             /* that the state cannot be written */
    int constant;            /* frames of one colour */
    size_t values, clamped;  /* of the frames that were decoded; those that are -1 or 1 */
} Video;

static VideoFormat format_of(const Settings *s) {
    return (VideoFormat){s->width, s->height, s->fps_num, s->fps_den, s->chroma};
}

static void write_bytes(Video *video, const void *data, size_t bytes) {
    output_write(&video->file, data, bytes);
    sha256_add(&video->sha, data, bytes);
}

/* One line on a terminal: "step 3/20", or in models that generate in chunks
 * "chunk 1/7, step 3/4, 0.6 s of video, speed 0.05x"; 1x is real time. */
static void show_progress(const Video *video, const char *stage, int done, int total) {
    const Run *run = video->run;
    if (!run->recipe->chunk_frames) {
        progress(stage, done, total);
        return;
    }
    double second = (double)run->settings->fps_num / run->settings->fps_den, taken = seconds() - video->started;
    progress_detail("%s %d/%d, %.1f s of video, speed %.2fx", stage, done, total, video->index / second,
                    taken > 0 ? (video->index - video->resumed) / second / taken : 0);
    progress("chunk", video->chunk, run->chunks);
}

static void write_header(Video *video) {
    char header[80];
    const VideoFormat *f = &video->format;
    write_bytes(video, header, video->run->settings->ppm ? ppm_header(f->width, f->height, header) : y4m_header(f, header));
}

/* planes = the pixels of a PPM, which has the same size: chroma is 444 */
static void planes_to_pixels(Video *video) {
    const VideoFormat *format = &video->format;
    float *frame = allocate(sizeof(float) * y4m_frame_bytes(format));
    y4m_to_floats(format, false, video->planes, frame);
    ppm_convert(format->width, format->height, frame, video->planes);
    free(frame);
}

static void write_planes(Video *video) {
    if (video->run->settings->ppm) planes_to_pixels(video);
    else write_bytes(video, "FRAME\n", 6);
    write_bytes(video, video->planes, y4m_frame_bytes(&video->format));
    output_flush(&video->file);
}

/* Counts the signs of a failed run whose numbers are all finite: frames of one colour, values clamped to -1 or 1. */
static void inspect_frame(Video *video, const float *frame) {
    size_t pixels = (size_t)video->format.width * (size_t)video->format.height, same = 0;
    for (int c = 0; c < 3; c++, frame += pixels)
        for (size_t i = 0; i < pixels; i++) {
            same += frame[i] == frame[0];
            video->clamped += frame[i] == -1 || frame[i] == 1;
        }
    video->values += 3 * pixels;
    video->constant += same == 3 * pixels;
}

/* Why a run most likely failed, from its settings. */
static const char *likely_cause(const Run *run) {
    const Settings *s = run->settings;
    if (s->guidance > 15) return reason("--guidance %g is more than most models bear", s->guidance);
    if (!run->recipe->schedule.steps && (s->steps <= 8 || s->guidance <= 1))
        return reason("%d steps with guidance %g suit distilled weights only, and those need their own schedule in the file "
                      "(export.py --recipe)", s->steps, s->guidance);
    if (run->model->precision != F32)
        return reason("numbers beyond the range of %s; try --precision f32", precision_name(run->model->precision));
    return "a schedule or guidance that does not suit the weights, or damaged weights";
}

static void warn_of_failure(const Video *video) {
    double clamped = (double)video->clamped / (double)video->values;
    if (video->constant)
        warn("%d of %d frames have one colour only; likely cause: %s", video->constant, video->index, likely_cause(video->run));
    else if (clamped >= 0.9)
        warn("%.0f %% of the clip's values are at the ends of their range; likely cause: %s", 100 * clamped,
             likely_cause(video->run));
}

/* The decoder's FrameSink: converts, writes and flushes one frame. With --extend the source's frames are written as they
 * are, in place of the decoder's, without label and mark. */
static void write_frame(void *to, float *frame) {
    Video *video = to;
    const Settings *s = video->run->settings;
    bool kept = s->extend && video->index < s->source_frames;
    profile_end(VAE_DECODE);
    profile_begin(OUTPUT);
    if (kept) source_next(video->source, frame);
    tap_frame(frame, SHAPE(3, s->frames, s->height, s->width), video->index, "video");
    require_finite(video->run->model, frame, (size_t)3 * s->height * s->width,
                reason("frame %d of %d", video->index + 1, s->frames));
    if (!kept) inspect_frame(video, frame);
    y4m_convert(&video->format, frame, video->planes);
    if (s->mark && !kept) mark_add(&video->mark, &video->format, video->planes);
    if (s->label && !kept && label_is_due(&video->format, video->index)) label_draw(&video->format, video->planes);
    write_planes(video);
    profile_end(OUTPUT);
    if (s->drift) drift_frame(video->drift, frame);
    preview_frame(&video->preview, &video->format, frame, video->index); /* may sleep: timed in no stage */
    video->index++;
    show_progress(video, "frame", video->index, s->frames);
    profile_resume(VAE_DECODE);
}

/* Opens both files before the work begins, so that a file that cannot be written is reported at once. There is no
 * record and no state beside standard output, a device or a FIFO (files without a temporary name). A new run does not
 * replace another run's state. */
static Video video_open(const Run *run) {
    const Settings *s = run->settings;
    Video video = {.run = run, .format = format_of(s)};
    video.state = state_path(s->output);
    if (!s->resume && !access(video.state, F_OK))
        die(STATUS_USAGE, "%s: an unfinished run of this output; resume it with --resume, or delete the file", video.state);
    video.file = s->resume ? output_continue(s->output) : output_open(s->output);
    if (video.file.temporary) {
        char *stale = format_string("%s.part", video.state);
        unlink(stale); /* left by a process that was killed while it wrote a state; the lock is ours */
        free(stale);
        char *record = record_path(s->output);
        if (s->record) video.record = output_open(record);
        else if (!access(record, F_OK))
            warn("%s is the record of an earlier video; --no-record leaves it unchanged", record);
        free(record);
    }
    if (!video.file.temporary || !s->arguments.size) {
        free(video.state);
        video.state = NULL;
    }
    if (s->preview) video.preview = preview_open();
    if (s->drift) video.drift = drift_open(&video.format);
    if (s->extend) video.source = source_reader_open(s->source, s->width, s->height);
    video.planes = allocate(y4m_frame_bytes(&video.format));
    sha256_start(&video.sha);
    return video;
}

/* Writes the file's header, and opens a decoder that writes its frames behind it. */
static void decoder_open(const Run *run, Video *video) {
    if (!video->index) write_header(video);
    if (run->settings->mark) video->mark = mark_make(record_bits(run->model, run->settings, &run->inputs));
    show_progress(video, "frame", video->index, run->settings->frames);
    video->decoder = vae_open(&run->model->vae, DECODER, run->H, run->W, write_frame, video);
}

/* Commits the video before the record: if the record fails, the video is there; if the video fails, an older video
 * keeps its own record. */
static void video_close(Video *video) {
    const Run *run = video->run;
    char sha[65];
    sha256_finish(&video->sha, sha);
    weights_require_unchanged(run->model->file);
    if (video->kept) output_sync(&video->file);
    output_commit(&video->file);
    if (video->record.stream) record_write(&video->record, run->model, run->settings, &run->inputs, sha);
    if (video->kept) {
        unlink(video->state);
        outputs_forget(video->state);
        outputs_advise("%s", "");
    }
    drift_close(video->drift);
    source_reader_close(video->source);
    warn_of_failure(video);
    free(video->planes);
    free(video->state);
}

/* ---------------------------------------------------------------- the loop */

/* One branch of classifier-free guidance: its prompt and its KV cache. */
typedef struct {
    const char *name; /* "cond" or "uncond", as in tap names */
    Arena arena;      /* holds the text context */
    TextContext text;
    KvCache cache;
} Branch;

/* The state of the denoising loop. */
typedef struct {
    int chunk;                           /* index of the current chunk */
    int step, frame;                     /* denoising steps done in it; latent frames of it that are decoded */
    Encoding encoding;                   /* of the source */
    Arena arena;
    TransformerState state;
    Branch cond, uncond;
    History history;
    int prompt;       /* index of the current prompt */
    float *latents;   /* (frames,C,H,W) of the chunk; allocated by itself, outlives the arena */
    float *velocity, *unconditional, *noise; /* (frames,C,H,W); the last two only if they are needed */
    float *timesteps; /* [frames] of the current pass */
    float *recent;    /* (run->recached,C,H,W): the latest finished latents, for RECACHE */
} Sampling;

static int longest_pass(const Run *run) { return (int)larger(run->chunk_frames, run->recached); }

/* A clip of one chunk needs no cache. */
static int cache_capacity(const Run *run) { return run->chunks > 1 ? run->window.size : 0; }

static void take_buffers(Arena *arena, const Run *run, Sampling *s) {
    const Transformer *t = &run->model->transformer;
    size_t elements = run->chunk_frames * run->frame_size, longest = longest_pass(run) * run->frame_size;
    int room = cache_capacity(run), seen = (int)larger(room, run->chunk_frames);
    Type type = run->model->precision == F32 ? TYPE_F32 : TYPE_BF16;
    s->state = transformer_state_take(arena, t, longest_pass(run), seen, run->H, run->W);
    s->cond.cache = kv_cache_take(arena, t, run->window, room, run->tokens, type);
    s->uncond.cache = kv_cache_take(arena, t, run->window, run->guided ? room : 0, run->tokens, type);
    s->history = history_take(arena, elements);
    s->velocity = arena_floats(arena, longest);
    s->unconditional = arena_floats(arena, run->guided ? elements : 0);
    s->noise = arena_floats(arena, sampler_needs_noise(&run->first, 0) || sampler_needs_noise(&run->schedule, 0)
                                       ? elements : 0);
    s->timesteps = arena_floats(arena, longest_pass(run));
    s->recent = arena_floats(arena, run->recached * run->frame_size);
}

static size_t text_context_memory(const Run *run, int n) {
    Arena count = {0};
    text_context_take(&count, &run->model->transformer, n);
    return count.used;
}

/* The branch's text context from a prompt's embeds. */
static void load_context(const Run *run, Branch *branch, const Prompt *prompt) {
    const Transformer *t = &run->model->transformer;
    arena_close(&branch->arena);
    branch->arena = arena_open(text_context_memory(run, prompt->n));
    branch->text = text_context_take(&branch->arena, t, prompt->n);
    profile_begin(TRANSFORMER);
    text_context_fill(t, prompt->embeds, prompt->n, &branch->text);
    profile_end(TRANSFORMER);
}

/* All chunks are denoised: of the buffers only the last chunk's latents are needed. */
static bool sampling_done(const Run *run, const Sampling *s) { return s->chunk + 1 == run->chunks && s->frame > 0; }

/* Allocates all but the latents. */
static void sampling_open(const Run *run, Sampling *s) {
    Arena count = {0};
    take_buffers(&count, run, s);
    s->arena = arena_open(count.used);
    take_buffers(&s->arena, run, s);
    load_context(run, &s->cond, &run->prompts[s->prompt]);
    if (run->guided) load_context(run, &s->uncond, &run->negative);
}

/* Frees all but the latents, which are still to be decoded. */
static void sampling_close(Sampling *s) {
    arena_close(&s->arena);
    arena_close(&s->cond.arena);
    arena_close(&s->uncond.arena);
    scratch_free();
}

/* velocity (frames,C,H,W) of the chunk's latents, all of whose frames have the same timestep */
static void run_transformer(const Run *run, Sampling *s, Branch *branch, Chunk chunk, float timestep,
                            const float *latents, float *velocity) {
    for (int f = 0; f < chunk.frames; f++) s->timesteps[f] = timestep;
    chunk.timesteps = s->timesteps;
    profile_begin(TRANSFORMER);
    transformer_forward(&run->model->transformer, &s->state, &branch->text, &branch->cache, &chunk, latents, velocity);
    profile_end(TRANSFORMER);
}

/* One more pass of finished latents in each branch, whose keys and values stay in the cache. Taps are called
 * NAME.blockBB in the first branch, NAME.uncond.blockBB in the second. */
static void fill_cache(const Run *run, Sampling *s, int index, const char *name, Chunk chunk, const float *latents) {
    Branch *branches[] = {&s->cond, &s->uncond};
    for (int i = 0; i <= run->guided; i++) {
        scope(run, index, i ? reason("%s.%s.", name, branches[i]->name) : reason("%s.", name));
        run_transformer(run, s, branches[i], chunk, run->recipe->context_noise, latents, s->velocity);
        kv_cache_keep(&branches[i]->cache, &chunk);
    }
}

/* Shifts the chunk's finished frames into s->recent, the newest last. */
static void keep_recent_latents(const Run *run, Sampling *s, Chunk chunk) {
    int kept = smaller(run->recached, chunk.frames), before = run->recached - kept;
    if (!kept) return;
    memmove(s->recent, s->recent + kept * run->frame_size, sizeof(float) * before * run->frame_size);
    memcpy(s->recent + before * run->frame_size, s->latents + (chunk.frames - kept) * run->frame_size,
           sizeof(float) * kept * run->frame_size);
}

/* As in LongLive: one pass with the new prompt over the window's frames computes their keys and values again. The
 * sink keeps its old ones if its frames have left the window. `done`: frames of the clip that are finished. */
static void recache(const Run *run, Sampling *s, int index, int done) {
    KvCache *caches[] = {&s->cond.cache, &s->uncond.cache};
    int window = run->window.size, sink = run->window.sink;
    if (run->recipe->recache_sink || done <= window) sink = 0;
    for (int i = 0; i <= run->guided; i++) kv_cache_drop(caches[i], sink, caches[i]->frames - sink);
    int frames = smaller(window - sink, done);
    Chunk chunk = {.first = done - frames, .frames = frames};
    fill_cache(run, s, index, "recache", chunk, s->recent + (run->recached - frames) * run->frame_size);
}

/* As in Infinity-RoPE: the cache keeps its first frame and its last two. */
static void flush_cache(const Run *run, Sampling *s) {
    KvCache *caches[] = {&s->cond.cache, &s->uncond.cache};
    for (int i = 0; i <= run->guided; i++)
        if (caches[i]->frames > 3) kv_cache_drop(caches[i], 1, caches[i]->frames - 3);
}

/* A prompt takes effect at the first chunk that begins at or after the prompt's time. */
static void change_prompt(const Run *run, Sampling *s, const Video *video) {
    int index = s->chunk;
    Chunk chunk = chunk_at(run, index);
    int next = s->prompt;
    while (next + 1 < run->prompt_count && run->prompts[next + 1].time <= chunk_time(run, chunk)) next++;
    if (next == s->prompt) return;
    s->prompt = next;
    show_progress(video, "text encoder", 0, 1);
    tap_scope("%s", "");
    prompt_encode(run->model, &run->prompts[next]); /* only now: the first frame does not wait for later prompts */
    load_context(run, &s->cond, &run->prompts[next]);
    if (prompt_change(run) == RECACHE) recache(run, s, index, chunk.first);
    if (prompt_change(run) == FLUSH) flush_cache(run, s);
}

/* One denoising step of the current chunk: the transformer, guidance, the sampler. */
static void denoise_step(const Run *run, Sampling *s, Noise *noise) {
    int index = s->chunk, step = s->step;
    Chunk chunk = chunk_at(run, index);
    const Schedule *schedule = chunk_schedule(run, index);
    float timestep = schedule->timesteps[step], guidance = (float)run->settings->guidance;
    float *x = s->latents, *v = s->velocity, *u = s->unconditional; /* (frames,C,H,W) */
    scope(run, index, reason("step%03d.cond.", step));
    run_transformer(run, s, &s->cond, chunk, timestep, x, v);
    if (run->guided) {
        scope(run, index, reason("step%03d.uncond.", step));
        run_transformer(run, s, &s->uncond, chunk, timestep, x, u);
        for (size_t i = 0; i < chunk.frames * run->frame_size; i++) v[i] = u[i] + guidance * (v[i] - u[i]);
    }
    scope(run, index, reason("step%03d.", step));
    tap_frames(v, latent_shape(run, chunk.frames), "velocity");
    if (sampler_needs_noise(schedule, step)) fresh_noise(run, noise, chunk, s->noise);
    profile_begin(SAMPLER);
    sampler_step(schedule, step, v, x, &s->history, s->noise);
    profile_end(SAMPLER);
    tap_frames(x, latent_shape(run, chunk.frames), "latents");
    require_finite(run->model, x, chunk.frames * run->frame_size,
                   reason("latents after step %d of %d%s", step + 1, schedule->steps,
                       run->chunks > 1 ? reason(", chunk %d of %d", index + 1, run->chunks) : ""));
    s->step++;
}

static void tap_schedules(const Run *run) {
    const Schedule *schedules[] = {&run->schedule, &run->first};
    bool two = run->recipe->first.steps && (run->first.steps != run->schedule.steps ||
                                            memcmp(run->first.timesteps, run->schedule.timesteps,
                                                   sizeof(float) * (size_t)run->first.steps));
    for (int i = 0; i <= two; i++) {
        tap(schedules[i]->timesteps, SHAPE(schedules[i]->steps), "%stimesteps", i ? "first." : "");
        tap(schedules[i]->sigmas, SHAPE(schedules[i]->steps + 1), "%ssigmas", i ? "first." : "");
    }
}

/* ---------------------------------------------------------------- the state */

/* What must be equal in the run that resumes. */
static void identity_state(const Run *run, StateFile *f) {
    const Model *m = run->model;
    Bytes arguments = run->settings->arguments;
    char digest[65];
    if (!state_same(f, "arguments", arguments.data, arguments.size)) state_refuse(f, "it was replaced meanwhile");
    if (!state_same(f, "version", SORA_VERSION, strlen(SORA_VERSION)))
        state_refuse(f, "the run was begun by another version of sora; this is %s", SORA_VERSION);
    weights_digest(m->file, digest);
    if (!state_same(f, "model", digest, 64)) state_refuse(f, "the run was begun with another model file");
    arithmetic_digest(m->precision, digest);
    if (!state_same(f, "arithmetic", digest, 64))
        state_refuse(f, "the run was begun with other arithmetic: the %s kernels of this build give other bits in %s",
                     kernels->name, precision_name(m->precision));
    if (!state_same(f, "noise", run->inputs.noise, sizeof run->inputs.noise))
        state_refuse(f, "the run was begun with another --noise file");
    if (!state_same(f, "embeds", run->inputs.embeds, sizeof run->inputs.embeds))
        state_refuse(f, "the run was begun with another --embeds file");
    if (!state_same(f, "source", run->inputs.source, sizeof run->inputs.source))
        state_refuse(f, "the run was begun with another --%s file", run->settings->image ? "image" : "video");
    if (!state_same(f, "negative_embeds", run->inputs.negative_embeds, sizeof run->inputs.negative_embeds))
        state_refuse(f, "the run was begun with another --negative-embeds file");
    for (int i = 0; i < run->prompt_count + run->guided; i++) {
        const Prompt *prompt = i < run->prompt_count ? &run->prompts[i] : &run->negative;
        if (prompt->ids && !state_same(f, "prompt.ids", prompt->ids, sizeof *prompt->ids * (size_t)prompt->n))
            state_refuse(f, "the run was begun with other token ids of the %s", prompt->name);
    }
}

static void position_state(const Run *run, Sampling *s, StateFile *f) {
    s->chunk = (int)state_number(f, "chunk", s->chunk, 0, run->chunks - 1);
    bool generated = s->chunk >= run->given_chunks;
    int steps = generated ? chunk_schedule(run, s->chunk)->steps : 0;
    int frames = chunk_decoded(run, chunk_at(run, s->chunk));
    s->step = (int)state_number(f, "step", s->step, generated, steps);
    s->frame = (int)state_number(f, "frame", s->frame, 0, s->step == steps ? frames : 0);
    s->prompt = (int)state_number(f, "prompt", s->prompt, 0, run->prompt_count - 1);
}

/* Finds the frames that are written already, and cuts off what follows them. They are in the .part file, or, if the
 * process was killed between renaming the video and removing the state, in the finished video, from which they are
 * copied. */
static void restore_video(Video *video, size_t bytes, const char *sha256, StateFile *f) {
    const char *places[] = {video->file.temporary, video->file.path};
    for (int i = 0; i < 2 && video->sha.length != bytes; i++) {
        Bytes there;
        char found[65] = "";
        if (map_file(places[i], &there)) continue;
        if (there.size >= bytes) sha256_of(there.data, bytes, found);
        bool equal = !strcmp(found, sha256);
        if (equal) sha256_add(&video->sha, there.data, bytes);
        if (equal && i == 1) output_write_at(&video->file, 0, there.data, bytes);
        unmap_file(there);
    }
    if (video->sha.length == bytes) output_cut(&video->file, bytes);
    else state_refuse(f, "%s does not begin with the %d frames that were written", places[0], video->index);
}

/* --extend: the source goes on behind the frames of it that are written. */
static void skip_kept(const Video *video) {
    const Settings *s = video->run->settings;
    float *frame = allocate(sizeof(float) * 3 * (size_t)s->height * s->width);
    source_skip(video->source, smaller(video->index, s->source_frames), frame);
    free(frame);
}

static void video_state(Video *video, StateFile *f) {
    Sha256 written = video->sha;
    char hex[65];
    sha256_finish(&written, hex);
    size_t bytes = (size_t)state_number(f, "video.bytes", (int64_t)video->sha.length, 0, INT64_MAX);
    state_item(f, "video.sha256", hex, 64);
    video->constant = (int)state_number(f, "video.constant", video->constant, 0, video->index);
    video->values = (size_t)state_number(f, "video.values", (int64_t)video->values, 0, INT64_MAX);
    video->clamped = (size_t)state_number(f, "video.clamped", (int64_t)video->clamped, 0, (int64_t)video->values);
    if (state_is_read(f) && !state_fault(f) && video->file.stream) restore_video(video, bytes, hex, f);
}

/* Everything that a run changes. Reading first opens the buffers that the position needs. */
static void run_state(const Run *run, Sampling *s, Noise *noise, Video *video, StateFile *f) {
    position_state(run, s, f);
    if (state_fault(f)) return;
    Chunk chunk = chunk_at(run, s->chunk);
    int decoded = chunk.first + s->frame;
    if (state_is_read(f)) {
        video->index = video_frames(run, decoded);
        if (s->prompt > 0) prompt_encode(run->model, &run->prompts[s->prompt]);
        if (!sampling_done(run, s)) sampling_open(run, s);
        if (decoded) decoder_open(run, video);
        if (video->source) skip_kept(video);
    }
    s->history.n = chunk.frames * run->frame_size;
    state_item(f, "latents", s->latents, sizeof(float) * s->history.n);
    noise_state(noise, f);
    if (run->settings->source) encoding_state(run, &s->encoding, f);
    if (!sampling_done(run, s)) {
        history_state(&s->history, f);
        state_item(f, "recent", s->recent, sizeof(float) * run->recached * run->frame_size);
        kv_cache_state(&s->cond.cache, f);
        kv_cache_state(&s->uncond.cache, f);
    }
    if (decoded) vae_stream_state(video->decoder, f);
    if (video->drift) drift_state(video->drift, f);
    video_state(video, f);
}

/* From now on a failed or interrupted run can be resumed. */
static void note_state(Video *video) {
    video->kept = true;
    outputs_note(video->state, true);
    outputs_advise("; to resume: sora --resume -o %s", video->run->settings->output);
}

/* Writes the state if it is time: the first after state_seconds, so that a short run writes none, each further one as
 * long after the last. If writing takes more than 1.5 of 30 seconds, the pause grows in proportion. Before the last
 * chunk is decoded (`urgent`) only the age of the run counts. */
static void save_state(const Run *run, Sampling *s, Noise *noise, Video *video, bool urgent) {
    double start = seconds(), pause = run->settings->state_seconds;
    if (!video->state || start < (urgent ? video->started + pause : video->next)) return;
    weights_require_unchanged(run->model->file);
    output_sync(&video->file); /* the state counts on these frames */
    StateFile *f = state_create(video->state);
    identity_state(run, f);
    run_state(run, s, noise, video, f);
    outputs_note(video->file.temporary, true); /* before the rename: from then on the state needs it */
    const char *why = state_commit(f);
    outputs_note(video->file.temporary, !why || video->kept);
    if (!why) note_state(video);
    else if (!video->warned) warn("%s: cannot write: %s; the run continues without", video->state, why);
    video->warned = why != NULL;
    double now = seconds();
    video->next = now + pause * fmax(1, (now - start) / 1.5);
}

/* Opens the state to resume from and checks that it is this run's. */
static StateFile *find_state(const Run *run, const Video *video) {
    StateFile *f;
    const char *why = state_open(video->state, &f);
    if (!why) identity_state(run, f);
    if (!why) why = state_fault(f);
    if (why) die(STATUS_USAGE, "%s: %s", video->state, why);
    return f;
}

/* state: NULL for a new run. */
static Sampling sampling_begin(const Run *run, Noise *noise, Video *video, StateFile *state) {
    Sampling s = {.cond.name = "cond", .uncond.name = "uncond"};
    video->started = seconds();
    video->next = video->started + run->settings->state_seconds;
    s.latents = allocate(sizeof(float) * run->chunk_frames * run->frame_size);
    if (!state) return s;
    run_state(run, &s, noise, video, state);
    const char *why = state_close(state);
    if (why) die(STATUS_USAGE, "%s: %s", video->state, why);
    video->chunk = s.chunk;
    video->resumed = video->index;
    note_state(video);
    return s;
}

/* ---------------------------------------------------------------- the loop */

/* The latents of the current chunk, from the step it has reached. */
static void make_chunk(const Run *run, Sampling *s, Noise *noise, Video *video) {
    Chunk chunk = chunk_at(run, s->chunk);
    bool generated = s->chunk >= run->given_chunks, last = s->chunk + 1 == run->chunks;
    int steps = generated ? chunk_schedule(run, s->chunk)->steps : 0;
    s->history.n = chunk.frames * run->frame_size;
    if (s->step == 0) begin_chunk(run, &s->encoding, noise, s->chunk, s->latents);
    if (!s->arena.base) sampling_open(run, s); /* after the encoder's buffers */
    if (s->step == 0 && generated) change_prompt(run, s, video);
    if (s->step == 0 && s->chunk == run->given_chunks) tap_schedules(run);
    while (s->step < steps) {
        show_progress(video, "step", s->step, steps);
        denoise_step(run, s, noise);
        save_state(run, s, noise, video, last && s->step == steps);
    }
    if (generated && run->recipe->chunk_frames) {
        scope(run, s->chunk, "");
        tap_frames(s->latents, latent_shape(run, chunk.frames), "latents");
    }
    tap_clip(run, chunk, s->latents, 0, "latents");
    keep_recent_latents(run, s, chunk);
    if (last) sampling_close(s);
}

/* Decodes and writes the chunk's frames, from the frame it has reached, except those past the clip's end. */
static void decode_chunk(const Run *run, Sampling *s, Noise *noise, Video *video) {
    int frames = chunk_decoded(run, chunk_at(run, s->chunk));
    if (!video->decoder) decoder_open(run, video);
    while (s->frame < frames) {
        profile_begin(VAE_DECODE);
        vae_push(video->decoder, s->latents + s->frame * run->frame_size);
        profile_end(VAE_DECODE);
        s->frame++;
        save_state(run, s, noise, video, false);
    }
    video->chunk++;
    if (video->drift) drift_chunk(video->drift);
}

/* All chunks: their latents, their frames, the cache for later ones. A resumed run starts in the middle. */
static void make_clip(const Run *run, Noise *noise, Video *video, StateFile *state) {
    Sampling s = sampling_begin(run, noise, video, state);
    for (; s.chunk < run->chunks; s.chunk++, s.step = s.frame = 0) {
        if (s.frame == 0) make_chunk(run, &s, noise, video);
        decode_chunk(run, &s, noise, video);
        if (s.chunk + 1 == run->chunks) break;
        show_progress(video, "cache", 0, 1);
        fill_cache(run, &s, s.chunk, "cache", chunk_at(run, s.chunk), s.latents); /* last: the frames do not wait for it */
    }
    free(s.latents);
    vae_close(video->decoder);
    scratch_free();
}

/* ---------------------------------------------------------------- memory and operations of a run */

/* Tokens of the longest prompt; of the longest one that the text encoder encodes, 0 if it encodes none. */
static int longest_prompt(const Run *run, bool encoded) {
    int n = 0;
    for (int i = -1; i < run->prompt_count; i++) {
        const Prompt *p = i < 0 ? &run->negative : &run->prompts[i];
        if (p->ids || !encoded) n = (int)larger(n, p->n);
    }
    return n;
}

/* Of the encoder and of what it reads; 0 without a source. */
static size_t source_stage_memory(const Run *run) {
    const Settings *s = run->settings;
    if (!s->source) return 0;
    size_t encoded = run->redrawn ? run->chunk_frames * run->frame_size : 0; /* in begin_chunk() */
    return vae_memory(&run->model->vae, ENCODER, run->H, run->W) + source_reader_memory(s->source, s->width, s->height) +
           sizeof(float) * ((size_t)3 * s->height * s->width + encoded);
}

/* Private memory at its peak, in bytes: what is kept for the whole run, plus the largest stage (see the top of this
 * file). Scratch is the memory that linear layers and attention use for packed operands. */
static size_t run_memory(const Run *run) {
    const TextEncoder *e = &run->model->text_encoder;
    const Transformer *t = &run->model->transformer;
    const Vae *vae = &run->model->vae;
    const VideoFormat format = format_of(run->settings);
    int n = longest_prompt(run, false), encoded = longest_prompt(run, true), L = longest_pass(run) * run->tokens,
        keys = (int)larger(cache_capacity(run), run->chunk_frames) * run->tokens;
    Sampling sampling = {.cond.name = NULL};
    Arena buffers = {0};
    take_buffers(&buffers, run, &sampling);
    size_t latents = sizeof(float) * run->chunk_frames * run->frame_size,
           noise = latents, /* the copy in to_frame_major() */
           rest = 1 << 20, /* small: the C library's, open files, prompts, schedules */
           kept = latents + noise + y4m_frame_bytes(&format) + rest,
           reading = encoded ? text_encoder_memory(e, encoded) + text_encoder_scratch(e, encoded) : 0,
           encoding = source_stage_memory(run),
           encoding_scratch = encoding ? vae_scratch(vae, ENCODER, run->H, run->W) : 0,
           denoising = buffers.used + text_context_memory(run, n) +
                       (run->guided ? text_context_memory(run, run->negative.n) : 0),
           denoising_scratch = larger(text_context_fill_memory(t, n),
                                      transformer_scratch(t, longest_pass(run), L, keys, n + 1)),
           decoding = vae_memory(vae, DECODER, run->H, run->W),
           decoding_scratch = vae_scratch(vae, DECODER, run->H, run->W);
    if (run->settings->extend) kept += source_reader_memory(run->settings->source, run->settings->width, run->settings->height);
    for (int i = 0; i < run->prompt_count; i++) kept += sizeof(float) * (size_t)run->prompts[i].n * e->dim;
    size_t before = larger(reading, encoding + encoding_scratch),
           apart = larger(denoising + denoising_scratch, decoding + decoding_scratch),
           together = denoising + decoding, scratch = larger(denoising_scratch, decoding_scratch);
    if (run->given_chunks > 1 || (run->redrawn && run->chunks > 1))
        together += encoding, scratch = larger(scratch, encoding_scratch);
    if (run->prompt_count > 1)
        together += text_encoder_memory(e, encoded), scratch = larger(scratch, text_encoder_scratch(e, encoded));
    return kept + larger(before, run->chunks > 1 ? together + scratch : apart);
}

/* All passes of all chunks, for one branch. */
static double passes_flops(const Run *run, int positions) {
    const Transformer *t = &run->model->transformer;
    double flops = 0;
    for (int i = 0; i < run->chunks; i++) {
        Chunk chunk = chunk_at(run, i);
        int seen = smaller(chunk.first + chunk.frames, run->window.size);
        int steps = i < run->given_chunks ? 0 : chunk_schedule(run, i)->steps, passes = steps + (i + 1 < run->chunks);
        flops += passes * transformer_flops(t, chunk.frames * run->tokens, seen * run->tokens, positions);
    }
    return flops;
}

static double run_flops(const Run *run) {
    const Model *m = run->model;
    double flops = passes_flops(run, run->prompts[0].n + 1) +
                   vae_flops(&m->vae, DECODER, run->decoded, run->H, run->W);
    if (run->settings->source) flops += vae_flops(&m->vae, ENCODER, run->settings->source_frames, run->H, run->W);
    for (int i = -1; i < run->prompt_count; i++) {
        const Prompt *p = i < 0 ? &run->negative : &run->prompts[i];
        if (p->ids) flops += text_encoder_flops(&m->text_encoder, p->n);
    }
    if (run->guided) flops += passes_flops(run, run->negative.n + 1);
    return flops;
}

static void estimate(const Run *run) {
    const Settings *s = run->settings;
    size_t bytes = run_memory(run), available = memory_available();
    int longest = model_frames(run->model);
    if (bytes > available)
        die(STATUS_RESOURCE, "--size %dx%d with --frames %d needs %.1f GiB of memory, %.1f GiB are available", s->width,
            s->height, s->frames, bytes / 0x1p30, available / 0x1p30);
    if (s->frames > longest && !(run->recipe->chunk_frames && s->window))
        warn("--frames %d: the model was trained on clips of %d frames; motion tends to repeat in longer ones",
             s->frames, longest);
    if (run->prompts[0].ids && run->prompts[0].n == 1)
        warn("the prompt is empty; the model alone decides what the video shows");
    const Prompt *last = &run->prompts[run->prompt_count - 1];
    if (last->time > chunk_time(run, chunk_at(run, run->chunks - 1)))
        warn("the prompt at %g s is not used: the clip's last chunk begins at %.3g s", last->time,
             chunk_time(run, chunk_at(run, run->chunks - 1)));
    progress_note("%dx%d, %d frames, %d steps: %.4g TFLOP in %s, %.2f GiB of memory beside the weights",
                  s->width, s->height, s->frames, s->steps, run_flops(run) * 1e-12,
                  precision_name(run->model->precision), bytes / 0x1p30);
}

void embeds_write(Model *model, const char *prompt, const char *path) {
    OutputFile out = output_open(path);
    Prompt p = prompt_new(model, "prompt", 0, prompt);
    char header[256];
    progress("text encoder", 0, 1);
    prompt_encode(model, &p);
    Shape shape = SHAPE(p.n, model->text_encoder.dim);
    output_write(&out, header, npy_header(header, sizeof header, &shape, 'f'));
    output_write(&out, p.embeds, sizeof(float) * shape_count(&shape));
    output_commit(&out);
    prompt_free(&p);
    scratch_free();
    progress(NULL, 0, 0);
}

size_t generate_memory(Model *model, const Settings *settings) {
    Run run = run_plan(model, settings);
    size_t bytes = run_memory(&run);
    run_free(&run);
    return bytes;
}

void generate(Model *model, const Settings *settings) {
    Run run = run_plan(model, settings);
    estimate(&run);
    Video video = video_open(&run);
    Noise noise = noise_open(&run); /* first, because a bad --noise file should be reported at once */
    StateFile *state = settings->resume ? find_state(&run, &video) : NULL;
    progress("text encoder", 0, 1);
    prompt_encode(model, &run.prompts[0]);
    if (run.guided) prompt_encode(model, &run.negative);
    scratch_free();
    make_clip(&run, &noise, &video, state);
    if (settings->noise) npy_free(&noise.file);
    run_free(&run);
    progress(NULL, 0, 0);
    video_close(&video);
}

const char *generate_read(Model *model, const Settings *settings, Bytes state) {
    Run run = run_plan(model, settings);
    Video video = {.run = &run, .format = format_of(settings)};
    Noise noise = noise_open(&run);
    Sampling s = {.latents = allocate(sizeof(float) * run.chunk_frames * run.frame_size)};
    StateFile *f;
    const char *why = state_parse(state, &f);
    for (int i = 0; i < run.prompt_count + run.guided; i++) {
        Prompt *prompt = i < run.prompt_count ? &run.prompts[i] : &run.negative;
        if (!prompt->embeds) prompt->embeds = allocate(sizeof(float) * (size_t)prompt->n * model->text_encoder.dim);
    }
    if (!why) {
        identity_state(&run, f);
        run_state(&run, &s, &noise, &video, f);
        why = state_close(f);
    }
    sampling_close(&s);
    free(s.latents);
    vae_close(video.decoder);
    run_free(&run);
    return why;
}
