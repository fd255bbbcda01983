/* pipeline.c - strings the stages together: prompt, noise, the denoising loop, frames, file.
 *
 * A clip is made chunk by chunk, and the frames of a chunk are written before the next is begun; most models know
 * one chunk only, the whole clip. Whole clips follow diffusers' WanPipeline, chunks Self-Forcing's
 * CausalInferencePipeline. make_clip() is the page on which all of it happens.
 *
 * The order is the order of memory, too: the text encoder's buffers are gone before the transformer's are taken, and
 * those after the last chunk has passed, before it is decoded. So a clip of one chunk needs the largest of the three,
 * more chunks need transformer and decoder at once, and none more for being longer; the weights lie in the mapped file
 * and are paged in as they are read. What a run will need is added up before it starts, by the same functions that lay
 * the buffers out. */
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
    char name[32];
    double time; /* from when on it holds */
    int n;
    int32_t *ids;
    float *embeds; /* (n, text_dim) */
} Prompt;

static Prompt prompt_read(const Model *m, const char *name, double time, const char *text) {
    Prompt p = {.time = time, .ids = allocate(sizeof(int32_t) * (size_t)m->transformer.text_len)};
    snprintf(p.name, sizeof p.name, "%s", name);
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
    const Recipe *recipe;
    Schedule schedule, first; /* the first chunk's */
    bool guided;              /* guidance 1 is the conditional velocity itself; diffusers takes less as 1 */
    int prompt_count;
    Prompt *prompts, negative; /* the latter if guided */
    int C, T, H, W;           /* of the latents, (T,C,H,W); T: whole chunks */
    int shown;                /* of the T, those that are decoded */
    int chunks, chunk_frames; /* the most in a chunk */
    Window window;            /* .window: never more than T */
    int tokens;               /* of a latent frame */
    int remade;               /* frames that a new prompt's pass takes, at most */
    size_t frame;             /* C*H*W */
    char noise_sha256[65];    /* of the file of --noise */
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

/* The clip's chunks: whole ones, the last of which may reach beyond the clip's end. */
static Chunk chunk_at(const Run *run, int index) {
    int n = run->chunk_frames, alone = run->recipe->independent_first_frame;
    if (alone) return index ? (Chunk){.first = 1 + (index - 1) * n, .frames = n} : (Chunk){.frames = 1};
    return (Chunk){.first = index * n, .frames = n};
}

/* When the chunk's first frame is shown, in seconds. */
static double chunk_time(const Run *run, Chunk chunk) {
    int frame = chunk.first ? 1 + (chunk.first - 1) * run->model->vae.temporal_stride : 0;
    return (double)frame * run->settings->fps_den / run->settings->fps_num;
}

static void plan_chunks(Run *run) {
    const Recipe *r = run->recipe;
    const Settings *s = run->settings;
    int n = r->chunk_frames ? r->chunk_frames : run->shown, alone = r->independent_first_frame;
    run->chunk_frames = n;
    run->chunks = alone + ceiling(run->shown - alone, n);
    run->T = alone + (run->chunks - alone) * n;
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
    run->prompts[0] = prompt_read(run->model, "prompt", 0, s->prompt);
    for (int i = 0; i < story->count; i++)
        run->prompts[i + 1] = prompt_read(run->model, reason("prompt%02d", i + 1), story->lines[i].time,
                                          story->lines[i].text);
    if (run->guided) run->negative = prompt_read(run->model, "negative", 0, s->negative);
    if (story->count && prompt_change(run) == RECACHE) run->remade = run->window.size;
}

static Run run_plan(Model *m, const Settings *s) {
    Run run = {.model = m, .settings = s, .recipe = &m->recipe, .guided = s->guidance > 1.0,
               .C = m->transformer.in_dim};
    const int *patch = m->transformer.patch_size;
    run.shown = (s->frames - 1) / m->vae.temporal_stride + 1;
    run.H = s->height / m->vae.spatial_stride;
    run.W = s->width / m->vae.spatial_stride;
    run.frame = (size_t)run.C * run.H * run.W;
    run.tokens = run.H / patch[1] * (run.W / patch[2]);
    run.schedule = m->recipe.schedule, run.first = m->recipe.first;
    if (!run.schedule.steps) run.schedule = run.first = falling_schedule(m, s);
    plan_chunks(&run);
    plan_prompts(&run);
    return run;
}

static void run_free(Run *run) {
    if (!run->recipe->schedule.steps) schedule_free(&run->schedule);
    for (int i = 0; i < run->prompt_count; i++) prompt_free(&run->prompts[i]);
    prompt_free(&run->negative);
    free(run->prompts);
}

static Shape latent_shape(const Run *run, int frames) { return SHAPE(run->C, frames, run->H, run->W); }

/* Taps that follow are of this; of this chunk, in models that make chunks. */
static void scope(const Run *run, int chunk, const char *of) {
    if (run->recipe->chunk_frames) tap_scope("chunk%03d.%s", chunk, of);
    else tap_scope("%s", of);
}

/* Frames of a tensor of the whole clip. */
static void tap_clip(const Run *run, Chunk chunk, float *latents, const char *name) {
    tap_scope("%s", "");
    for (int f = 0; f < chunk.frames; f++)
        tap_frame(latents + f * run->frame, latent_shape(run, run->T), chunk.first + f, name);
}

/* ---------------------------------------------------------------- noise */

/* Two cursors on one sequence of numbers, that of the seed: the clip's first noise, and what steps add, behind it.
 * A file takes the place of the first, not of its numbers. */
typedef struct {
    Npy file;
    Draw first;
    Generator later;
} Noise;

static void noise_read(Run *run, Noise *noise) {
    Shape shape = latent_shape(run, run->T);
    const char *path = run->settings->noise, *why = npy_read(path, &noise->file);
    if (!why) why = npy_fit(&noise->file, &shape);
    if (why) die(STATUS_USAGE, "--noise %s: %s", path, why);
    for (size_t i = 0, count = shape_count(&shape); i < count; i++) {
        double value;
        npy_get(&noise->file, i, 1, &value);
        if (!isfinite((float)value))
            die(STATUS_USAGE, "--noise %s: number %zu of %zu is not finite", path, i + 1, count);
    }
    sha256_of(noise->file.mapping.data, noise->file.mapping.size, run->noise_sha256);
}

static Noise noise_open(Run *run) {
    size_t count = run->T * run->frame;
    Noise noise = {.first = draw_start(run->settings->seed, count)};
    if (run->settings->noise) noise_read(run, &noise);
    if (!sampler_needs_noise(&run->schedule, 0) && !sampler_needs_noise(&run->first, 0)) return noise;
    generator_seed(&noise.later, run->settings->seed);
    generator_skip(&noise.later, count);
    return noise;
}

/* Numbers that torch has in the order (C,frames,H,W) into latents (frames,C,H,W), if that is not the model's own. */
static void arrange(const Run *run, int frames, float *latents) {
    if (run->recipe->noise_frames_first) return;
    size_t plane = (size_t)run->H * run->W;
    float *drawn = allocate(sizeof(float) * frames * run->frame);
    memcpy(drawn, latents, sizeof(float) * frames * run->frame);
    for (int f = 0; f < frames; f++)
        for (int c = 0; c < run->C; c++)
            memcpy(latents + ((size_t)f * run->C + c) * plane, drawn + ((size_t)c * frames + f) * plane,
                   sizeof(float) * plane);
    free(drawn);
}

static void copy_noise(const Run *run, const Npy *file, Chunk chunk, float *latents) {
    size_t plane = (size_t)run->H * run->W;
    for (int f = 0; f < chunk.frames; f++)
        for (int c = 0; c < run->C; c++)
            for (size_t i = 0; i < plane; i++) {
                double value;
                npy_get(file, ((size_t)c * run->T + chunk.first + f) * plane + i, 1, &value);
                *latents++ = (float)value;
            }
}

/* The chunk's part of the clip's first noise. */
static void first_noise(const Run *run, Noise *noise, Chunk chunk, float *latents) {
    size_t count = chunk.frames * run->frame;
    if (run->settings->noise) {
        copy_noise(run, &noise->file, chunk, latents);
    } else {
        draw_next(&noise->first, latents, count);
        arrange(run, chunk.frames, latents);
    }
    tap_clip(run, chunk, latents, "noise");
    for (size_t i = 0; i < count; i++) latents[i] *= run->recipe->noise_scale;
}

/* What a step adds. */
static void fresh_noise(const Run *run, Noise *noise, Chunk chunk, float *latents) {
    generator_randn(&noise->later, latents, chunk.frames * run->frame);
    arrange(run, chunk.frames, latents);
    tap_frames(latents, latent_shape(run, chunk.frames), "noise");
}

/* ---------------------------------------------------------------- frames */

typedef struct {
    const Run *run;
    VideoFormat format;
    OutputFile file, record; /* the record is open where there will be one */
    Preview preview;
    uint8_t *planes;
    Mark mark;
    Sha256 sha;
    Drift *drift;
    int index;
} Video;

static VideoFormat format_of(const Settings *s) {
    return (VideoFormat){s->width, s->height, s->fps_num, s->fps_den, s->chroma};
}

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
    if (s->mark) mark_add(&video->mark, &video->format, video->planes);
    if (s->label && label_is_due(&video->format, video->index)) label_draw(&video->format, video->planes);
    write_bytes(video, "FRAME\n", 6);
    write_bytes(video, video->planes, y4m_frame_bytes(&video->format));
    output_flush(&video->file);
    profile_end(OUTPUT);
    if (s->drift) drift_frame(video->drift, frame);
    preview_frame(&video->preview, &video->format, frame, video->index); /* may wait: no stage's time */
    video->index++;
    if (!video->run->recipe->chunk_frames) progress("frame", video->index, s->frames);
    profile_resume(VAE_DECODE);
}

/* Both files are opened before the work begins, so that what cannot be written is known then. Standard output
 * and devices, which are written straight, have no record. */
static Video video_open(const Run *run) {
    const Settings *s = run->settings;
    Video video = {.run = run, .format = format_of(s)};
    video.file = output_open(s->output);
    if (video.file.temporary) {
        char *record = record_path(s->output);
        if (s->record) video.record = output_open(record);
        else if (!access(record, F_OK)) warn("%s will not be of this video", record);
        free(record);
    }
    if (s->preview) video.preview = preview_open();
    if (s->drift) video.drift = drift_open(&video.format);
    video.planes = allocate(y4m_frame_bytes(&video.format));
    sha256_start(&video.sha);
    return video;
}

/* The decoder, whose frames go to the file, which begins here. */
static VaeStream *decoder_open(const Run *run, Video *video) {
    char header[80];
    write_bytes(video, header, y4m_header(&video->format, header));
    if (run->settings->mark) video->mark = mark_make(record_bits(run->model, run->settings, run->noise_sha256));
    if (!run->recipe->chunk_frames) progress("frame", 0, run->settings->frames);
    return vae_decoder_open(&run->model->vae, run->H, run->W, write_frame, video);
}

/* The video comes first: whatever happens to the record then, the video is safe; and if the video cannot have
 * its name, what stands there keeps the record that belongs to it. */
static void video_close(Video *video) {
    const Run *run = video->run;
    char sha[65];
    sha256_finish(&video->sha, sha);
    output_commit(&video->file);
    if (video->record.stream) record_write(&video->record, run->model, run->settings, run->noise_sha256, sha);
    drift_close(video->drift);
    free(video->planes);
}

/* ---------------------------------------------------------------- the loop */

/* One side of guidance: a prompt, and what its passes left to look back at. */
typedef struct {
    const char *name;
    Arena arena; /* of the text */
    TextContext text;
    KvCache cache;
} Side;

/* What a run changes as it goes on; all else follows from its settings. */
typedef struct {
    Arena arena;
    TransformerState state;
    Side cond, uncond;
    History history;
    int prompt;                          /* the one that holds now */
    float *latents;                      /* (frames,C,H,W) of the chunk; not in the arena */
    float *velocity, *unconditional, *noise;
    float *timesteps;                    /* of the frames that pass */
    float *recent;                       /* the last run->remade frames that are finished */
} Sampling;

static int longest_pass(const Run *run) { return (int)larger(run->chunk_frames, run->remade); }

/* A clip of one chunk has nobody that looks back. */
static int cache_room(const Run *run) { return run->chunks > 1 ? run->window.size : 0; }

static void lay_out(Arena *arena, const Run *run, Sampling *s) {
    const Transformer *t = &run->model->transformer;
    size_t elements = run->chunk_frames * run->frame, longest = longest_pass(run) * run->frame;
    int room = cache_room(run), seen = (int)larger(room, run->chunk_frames);
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
    s->recent = arena_floats(arena, run->remade * run->frame);
}

static size_t text_memory(const Run *run, int n) {
    Arena count = {0};
    text_context_take(&count, &run->model->transformer, n);
    return count.used;
}

static void read_prompt(const Run *run, Side *side, const Prompt *prompt) {
    const Transformer *t = &run->model->transformer;
    arena_close(&side->arena);
    side->arena = arena_open(text_memory(run, prompt->n));
    side->text = text_context_take(&side->arena, t, prompt->n);
    profile_begin(TRANSFORMER);
    text_context_fill(t, prompt->embeds, prompt->n, &side->text);
    profile_end(TRANSFORMER);
}

static Sampling sampling_open(const Run *run) {
    Sampling s = {.cond.name = "cond", .uncond.name = "uncond"};
    Arena count = {0};
    lay_out(&count, run, &s);
    s.arena = arena_open(count.used);
    lay_out(&s.arena, run, &s);
    s.latents = allocate(sizeof(float) * run->chunk_frames * run->frame);
    read_prompt(run, &s.cond, &run->prompts[0]);
    if (run->guided) read_prompt(run, &s.uncond, &run->negative);
    return s;
}

/* All but the latents. */
static void sampling_close(Sampling *s) {
    arena_close(&s->arena);
    arena_close(&s->cond.arena);
    arena_close(&s->uncond.arena);
    scratch_free();
}

/* velocity of the chunk's latents at one time step. */
static void pass(const Run *run, Sampling *s, Side *side, Chunk chunk, float timestep, const float *latents,
                 float *velocity) {
    for (int f = 0; f < chunk.frames; f++) s->timesteps[f] = timestep;
    chunk.timesteps = s->timesteps;
    profile_begin(TRANSFORMER);
    transformer_forward(&run->model->transformer, &s->state, &side->text, &side->cache, &chunk, latents, velocity);
    profile_end(TRANSFORMER);
}

/* Passes after which later ones can look back at the chunk. */
static void remember(const Run *run, Sampling *s, Chunk chunk, const float *latents) {
    Side *sides[] = {&s->cond, &s->uncond};
    for (int i = 0; i <= run->guided; i++) {
        pass(run, s, sides[i], chunk, run->recipe->context_noise, latents, s->velocity);
        kv_cache_keep(&sides[i]->cache, &chunk);
    }
}

/* Keeps the finished frames that a new prompt's pass would take; the last one stands at the end. */
static void keep_recent(const Run *run, Sampling *s, Chunk chunk) {
    int kept = smaller(run->remade, chunk.frames), before = run->remade - kept;
    if (!kept) return;
    memmove(s->recent, s->recent + kept * run->frame, sizeof(float) * before * run->frame);
    memcpy(s->recent + before * run->frame, s->latents + (chunk.frames - kept) * run->frame,
           sizeof(float) * kept * run->frame);
}

/* LongLive's: with the new prompt, one pass over the frames that are held, all at once, writes their keys and values
 * anew. While the sink is older than the window its own stay. */
static void recache(const Run *run, Sampling *s, int made) {
    KvCache *caches[] = {&s->cond.cache, &s->uncond.cache};
    int window = run->window.size, sink = run->window.sink;
    if (run->recipe->recache_sink || made <= window) sink = 0;
    for (int i = 0; i <= run->guided; i++) kv_cache_drop(caches[i], sink, caches[i]->frames - sink);
    Chunk chunk = {.first = made - smaller(window - sink, made), .frames = smaller(window - sink, made)};
    remember(run, s, chunk, s->recent + (run->remade - chunk.frames) * run->frame);
}

/* Infinity-RoPE's: the first frame and the last two stay. */
static void flush(const Run *run, Sampling *s) {
    KvCache *caches[] = {&s->cond.cache, &s->uncond.cache};
    for (int i = 0; i <= run->guided; i++)
        if (caches[i]->frames > 3) kv_cache_drop(caches[i], 1, caches[i]->frames - 3);
}

/* A prompt holds from the first chunk on that begins at or after its time. */
static void change_prompt(const Run *run, Sampling *s, int index) {
    Chunk chunk = chunk_at(run, index);
    int next = s->prompt;
    while (next + 1 < run->prompt_count && run->prompts[next + 1].time <= chunk_time(run, chunk)) next++;
    if (next == s->prompt) return;
    s->prompt = next;
    read_prompt(run, &s->cond, &run->prompts[next]);
    scope(run, index, "recache.");
    if (prompt_change(run) == RECACHE) recache(run, s, chunk.first);
    if (prompt_change(run) == FLUSH) flush(run, s);
}

static void show_progress(const Run *run, int chunk, int step, int steps, double started) {
    if (!run->recipe->chunk_frames) {
        progress("step", step, steps);
        return;
    }
    double made = chunk_time(run, chunk_at(run, chunk)), taken = seconds() - started;
    progress_detail("step %d/%d, %.1f s made, %.2f of real time", step + 1, steps, made, taken > 0 ? made / taken : 0);
    progress("chunk", chunk, run->chunks);
}

/* Decodes the chunk's frames and hands them on to the file; those beyond the clip's end are left out. */
static void decode(const Run *run, VaeStream *decoder, Chunk chunk, const float *latents) {
    for (int f = 0; f < chunk.frames && chunk.first + f < run->shown; f++) {
        profile_begin(VAE_DECODE);
        vae_decode(decoder, latents + f * run->frame);
        profile_end(VAE_DECODE);
    }
}

/* One step of a chunk: the velocity at the present noise level, with and without the prompt; guidance; the sampler. */
static void take_step(const Run *run, Sampling *s, Noise *noise, int index, int step) {
    Chunk chunk = chunk_at(run, index);
    const Schedule *schedule = index ? &run->schedule : &run->first;
    float timestep = schedule->timesteps[step], guidance = (float)run->settings->guidance;
    float *x = s->latents, *v = s->velocity, *u = s->unconditional; /* (frames,C,H,W) */
    scope(run, index, reason("step%03d.cond.", step));
    pass(run, s, &s->cond, chunk, timestep, x, v);
    if (run->guided) {
        scope(run, index, reason("step%03d.uncond.", step));
        pass(run, s, &s->uncond, chunk, timestep, x, u);
        for (size_t i = 0; i < chunk.frames * run->frame; i++) v[i] = u[i] + guidance * (v[i] - u[i]);
    }
    scope(run, index, reason("step%03d.", step));
    tap_frames(v, latent_shape(run, chunk.frames), "velocity");
    if (sampler_needs_noise(schedule, step)) fresh_noise(run, noise, chunk, s->noise);
    profile_begin(SAMPLER);
    sampler_step(schedule, step, v, x, &s->history, s->noise);
    profile_end(SAMPLER);
    tap_frames(x, latent_shape(run, chunk.frames), "latents");
    stay_finite(run->model, x, chunk.frames * run->frame,
                reason("latents after step %d of %d%s", step + 1, schedule->steps,
                       run->chunks > 1 ? reason(", chunk %d of %d", index + 1, run->chunks) : ""));
}

static void tap_schedules(Run *run) {
    Schedule *schedules[] = {&run->schedule, &run->first};
    bool two = run->recipe->first.steps && (run->first.steps != run->schedule.steps ||
                                            memcmp(run->first.timesteps, run->schedule.timesteps,
                                                   sizeof(float) * (size_t)run->first.steps));
    for (int i = 0; i <= two; i++) {
        tap(schedules[i]->timesteps, SHAPE(schedules[i]->steps), "%stimesteps", i ? "first." : "");
        tap(schedules[i]->sigmas, SHAPE(schedules[i]->steps + 1), "%ssigmas", i ? "first." : "");
    }
}

/* Chunk by chunk: noise becomes latents in steps, latents become frames in the file; a last pass lets later chunks
 * look back. */
static void make_clip(Run *run, Noise *noise, Video *video) {
    Sampling s = sampling_open(run);
    VaeStream *decoder = NULL;
    double started = seconds();
    for (int index = 0; index < run->chunks; index++) {
        Chunk chunk = chunk_at(run, index);
        int steps = (index ? &run->schedule : &run->first)->steps;
        s.history.n = chunk.frames * run->frame;
        change_prompt(run, &s, index);
        first_noise(run, noise, chunk, s.latents);
        if (index == 0) tap_schedules(run);
        for (int step = 0; step < steps; step++) {
            show_progress(run, index, step, steps, started);
            take_step(run, &s, noise, index, step);
        }
        if (run->recipe->chunk_frames) {
            scope(run, index, "");
            tap_frames(s.latents, latent_shape(run, chunk.frames), "latents");
        }
        tap_clip(run, chunk, s.latents, "latents");
        keep_recent(run, &s, chunk);
        scope(run, index, "cache.");
        if (index + 1 < run->chunks) remember(run, &s, chunk, s.latents);
        else sampling_close(&s);
        tap_scope("%s", "");
        if (!decoder) decoder = decoder_open(run, video);
        decode(run, decoder, chunk, s.latents);
        if (video->drift) drift_chunk(video->drift);
    }
    free(s.latents);
    vae_stream_close(decoder);
    scratch_free();
}

/* ---------------------------------------------------------------- what it will take */

static int longest_prompt(const Run *run) {
    int n = run->negative.n;
    for (int i = 0; i < run->prompt_count; i++) n = (int)larger(n, run->prompts[i].n);
    return n;
}

/* Bytes of private memory at the highest point: what the run keeps, and the largest of its stages. A clip of one
 * chunk is decoded once the transformer's buffers are gone. Scratch is what products and attention pack. */
static size_t run_memory(const Run *run) {
    const TextEncoder *e = &run->model->text_encoder;
    const Transformer *t = &run->model->transformer;
    const Vae *vae = &run->model->vae;
    const VideoFormat format = format_of(run->settings);
    int n = longest_prompt(run), L = longest_pass(run) * run->tokens,
        keys = (int)larger(cache_room(run), run->chunk_frames) * run->tokens;
    Sampling sampling = {.cond.name = NULL};
    Arena buffers = {0};
    lay_out(&buffers, run, &sampling);
    size_t latents = sizeof(float) * run->chunk_frames * run->frame, noise = latents, /* while it is arranged */
           rest = 1 << 20, /* files' and the C library's own, prompts, schedules */
           kept = latents + noise + y4m_frame_bytes(&format) + rest,
           encoding = text_encoder_memory(e, n) + text_encoder_scratch(e, n),
           reading = text_context_fill_memory(t, n),
           denoising = buffers.used + text_memory(run, n) + (run->guided ? text_memory(run, run->negative.n) : 0),
           denoising_scratch = larger(reading, transformer_scratch(t, longest_pass(run), L, keys, n + 1)),
           decoding = vae_decoder_memory(vae, run->H, run->W),
           decoding_scratch = vae_decoder_scratch(vae, run->H, run->W);
    for (int i = 0; i < run->prompt_count; i++) kept += sizeof(float) * (size_t)run->prompts[i].n * e->dim;
    size_t apart = larger(denoising + denoising_scratch, decoding + decoding_scratch),
           together = denoising + decoding + larger(denoising_scratch, decoding_scratch);
    return kept + larger(encoding, run->chunks > 1 ? together : apart);
}

/* All passes of all chunks, for one side of guidance. */
static double passes_flops(const Run *run, int positions) {
    const Transformer *t = &run->model->transformer;
    double flops = 0;
    for (int i = 0; i < run->chunks; i++) {
        Chunk chunk = chunk_at(run, i);
        int seen = smaller(chunk.first + chunk.frames, run->window.size);
        int passes = (i ? &run->schedule : &run->first)->steps + (i + 1 < run->chunks);
        flops += passes * transformer_flops(t, chunk.frames * run->tokens, seen * run->tokens, positions);
    }
    return flops;
}

static double run_flops(const Run *run) {
    const Model *m = run->model;
    double flops = passes_flops(run, run->prompts[0].n + 1) +
                   vae_decoder_flops(&m->vae, run->shown, run->H, run->W);
    for (int i = 0; i < run->prompt_count; i++) flops += text_encoder_flops(&m->text_encoder, run->prompts[i].n);
    if (run->guided)
        flops += text_encoder_flops(&m->text_encoder, run->negative.n) + passes_flops(run, run->negative.n + 1);
    return flops;
}

static void estimate(const Run *run) {
    const Settings *s = run->settings;
    size_t bytes = run_memory(run), available = memory_available();
    int longest = model_frames(run->model);
    if (bytes > available)
        die(STATUS_RESOURCE, "%dx%d with %d frames needs %.1f GiB of memory and %.1f GiB can be had",
            s->width, s->height, s->frames, bytes / 0x1p30, available / 0x1p30);
    if (s->frames > longest && !(run->recipe->chunk_frames && s->window))
        warn("%d frames: the model made clips of %d, and beyond them motion tends to repeat", s->frames,
             longest);
    const Prompt *last = &run->prompts[run->prompt_count - 1];
    if (last->time > chunk_time(run, chunk_at(run, run->chunks - 1)))
        warn("the prompt at %g s is never heard: the clip's last chunk begins at %.3g s", last->time,
             chunk_time(run, chunk_at(run, run->chunks - 1)));
    progress_note("%dx%d, %d frames, %d steps: %.4g TFLOP in %s, %.2f GiB of memory beside the weights",
                  s->width, s->height, s->frames, s->steps, run_flops(run) * 1e-12,
                  precision_name(run->model->precision), bytes / 0x1p30);
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
    Noise noise = noise_open(&run); /* before the prompts, whose reading takes time: its file may be wrong */
    for (int i = 0; i < run.prompt_count; i++) prompt_encode(model, &run.prompts[i]);
    if (run.guided) prompt_encode(model, &run.negative);
    scratch_free();
    make_clip(&run, &noise, &video);
    if (settings->noise) npy_free(&noise.file);
    run_free(&run);
    progress(NULL, 0, 0);
    video_close(&video);
}
