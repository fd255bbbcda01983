/* pipeline.c - runs the stages: prompts -> embeds, noise -> latents (the denoising loop), latents -> frames -> file.
 *
 * A clip is generated chunk by chunk. Most models generate the whole clip as one chunk and follow diffusers'
 * WanPipeline; models that generate in chunks follow Self-Forcing's CausalInferencePipeline. make_clip() is the
 * whole loop:
 *
 *   for each chunk:  x = noise, or latents of a source, or a mixture     (frames,C,H,W)
 *     for each step: the expert that serves the timestep: Wan 2.2 A14B has two transformers, others have one
 *                    v = transformer(x, timestep, prompt)
 *                    v = u + guidance * (v - u), u = transformer(x, timestep, negative prompt)
 *                    (or v and u without the transformer: easycache.c)
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
 * A source (--image, --video) adds the VAE's encoder: to the maximum if one chunk is encoded, to the sum if more are.
 * A story adds the text encoder to the sum: later prompts are encoded when they take effect.
 *
 * With several chunks and a window (--window), the peak does not depend on the clip's length. Weights are read from the
 * mapped file and are not counted. run_memory() in plan.c computes the peak before the run, with the functions that
 * allocate the buffers. */
#include "pipeline.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- buffers, the KV cache, one step */

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
    int left_out;                        /* passes of the transformer, by --easycache */
    Encoding encoding;                   /* of the source */
    Arena arena;
    TransformerState state;
    Branch cond, uncond;
    History history;
    EasyCache easy;   /* set with --easycache */
    int prompt;       /* index of the current prompt */
    int expert;       /* index of the expert for which the branches' text contexts are; negative: for none */
    float *latents;   /* (frames,C,H,W) of the chunk; allocated by itself, outlives the arena */
    float *velocity, *unconditional, *noise; /* (frames,C,H,W); the last two only if they are needed */
    float *timesteps; /* [frames] of the current pass */
    float *recent;    /* (run->recached,C,H,W): the latest finished latents, for RECACHE */
} Sampling;

static void take_buffers(Arena *arena, const Run *run, Sampling *s) {
    const Transformer *t = &run->model->experts->transformer;
    size_t elements = run->chunk_frames * run->frame_size, longest = longest_pass(run) * run->frame_size;
    int room = cache_capacity(run), seen = larger(room, run->chunk_frames);
    Type type = run->model->precision == F32 ? TYPE_F32 : TYPE_BF16;
    s->state = transformer_state_take(arena, t, longest_pass(run), seen, run->H, run->W);
    s->cond.cache = kv_cache_take(arena, t, run->window, room, run->tokens, type);
    s->uncond.cache = kv_cache_take(arena, t, run->window, run->guided ? room : 0, run->tokens, type);
    s->history = history_take(arena, elements);
    if (run->settings->easycache) s->easy = easycache_take(arena, elements, run->guided);
    s->velocity = arena_floats(arena, longest);
    s->unconditional = arena_floats(arena, run->guided ? elements : 0);
    s->noise = arena_floats(arena, run_renoises(run) ? elements : 0);
    s->timesteps = arena_floats(arena, longest_pass(run));
    s->recent = arena_floats(arena, run->recached * run->frame_size);
}

size_t sampling_memory(const Run *run) {
    Arena count = {0};
    take_buffers(&count, run, &(Sampling){0});
    return count.used;
}

/* The branch's text context from a prompt's embeds. */
static void load_context(const Run *run, const Transformer *t, Branch *branch, const Prompt *prompt) {
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
    s->arena = arena_open(sampling_memory(run));
    take_buffers(&s->arena, run, s);
    s->expert = -1;
}

/* Frees all but the latents, which are still to be decoded. */
static void sampling_close(Sampling *s) {
    arena_close(&s->arena);
    arena_close(&s->cond.arena);
    arena_close(&s->uncond.arena);
    scratch_free();
}

/* The expert that serves a timestep. Its text contexts are computed when it takes over from another. */
static const Transformer *use_expert(const Run *run, Sampling *s, float timestep) {
    int expert = model_expert(run->model, timestep);
    const Transformer *t = &run->model->experts[expert].transformer;
    if (expert == s->expert) return t;
    s->expert = expert;
    load_context(run, t, &s->cond, &run->prompts[s->prompt]);
    if (run->guided) load_context(run, t, &s->uncond, &run->negative);
    return t;
}

/* velocity (frames,C,H,W) of the chunk's latents. All frames have the same timestep, except that held ones have 0. */
static void run_transformer(const Run *run, Sampling *s, Branch *branch, Chunk chunk, float timestep,
                            const float *latents, float *velocity) {
    const Transformer *t = use_expert(run, s, timestep);
    Planes input[] = {{run->C, latents}, {run->condition_channels, s->encoding.condition}};
    for (int f = 0; f < chunk.frames; f++) s->timesteps[f] = is_held(run, chunk.first + f) ? 0 : timestep;
    chunk.timesteps = s->timesteps;
    profile_begin(TRANSFORMER);
    transformer_forward(t, &s->state, &branch->text, &branch->cache, &chunk, input, velocity);
    profile_end(TRANSFORMER);
}

/* One more pass of finished latents in each branch, whose keys and values stay in the cache. Taps are called
 * NAME.blockBB in the first branch, NAME.uncond.blockBB in the second. */
static void fill_cache(const Run *run, Sampling *s, int index, const char *name, Chunk chunk, const float *latents) {
    Branch *branches[] = {&s->cond, &s->uncond};
    for (int i = 0; i <= run->guided; i++) {
        tap_scope_chunk(run, index, i ? reason("%s.%s.", name, branches[i]->name) : reason("%s.", name));
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
    s->expert = -1;
    if (prompt_change(run) == RECACHE) recache(run, s, index, chunk.first);
    if (prompt_change(run) == FLUSH) flush_cache(run, s);
}

/* One denoising step of the current chunk: the transformer, guidance, the sampler. */
static void denoise_step(const Run *run, Sampling *s, Noise *noise, Video *video) {
    int index = s->chunk, step = s->step;
    Chunk chunk = chunk_at(run, index);
    const Schedule *schedule = chunk_schedule(run, index);
    float timestep = schedule->timesteps[step];
    int expert = model_expert(run->model, timestep);
    float guidance = (float)run->settings->guidance[expert];
    double most = run->settings->easycache;
    float *x = s->latents, *v = s->velocity, *u = guidance > 1 ? s->unconditional : NULL; /* (frames,C,H,W) */
    if (step && expert != model_expert(run->model, schedule->timesteps[step - 1]))
        s->easy.known = 0; /* the new expert has no velocities yet */
    if (most && easycache_leaves_out(&s->easy, most, step, schedule->steps, x)) {
        easycache_velocity(&s->easy, x, v, u);
        s->left_out += u ? 2 : 1;
    } else {
        tap_scope_chunk(run, index, reason("step%03d.cond.", step));
        run_transformer(run, s, &s->cond, chunk, timestep, x, v);
        tap_scope_chunk(run, index, reason("step%03d.uncond.", step));
        if (u) run_transformer(run, s, &s->uncond, chunk, timestep, x, u);
        if (most) easycache_keep(&s->easy, x, v, u);
    }
    for (size_t i = 0; u && i < chunk.frames * run->frame_size; i++) v[i] = u[i] + guidance * (v[i] - u[i]);
    tap_scope_chunk(run, index, reason("step%03d.", step));
    tap_frames(v, latent_shape(run, chunk.frames), "velocity");
    video_guess(run, video, x, v, schedule->sigmas[step]);
    if (sampler_needs_noise(schedule, step)) fresh_noise(run, noise, chunk, s->noise);
    profile_begin(SAMPLER);
    sampler_step(schedule, step, v, x, &s->history, s->noise);
    hold_frames(run, &s->encoding, chunk, x);
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
    if (!state_same(f, "last_source", run->inputs.last_source, sizeof run->inputs.last_source))
        state_refuse(f, "the run was begun with another --last-image file");
    if (!state_same(f, "negative_embeds", run->inputs.negative_embeds, sizeof run->inputs.negative_embeds))
        state_refuse(f, "the run was begun with another --negative-embeds file");
    for (int i = 0; i < run->prompt_count + run->guided; i++) {
        const Prompt *prompt = run_prompt(run, i);
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
    s->left_out = (int)state_number(f, "left_out", s->left_out, 0, 2 * s->step);
    s->frame = (int)state_number(f, "frame", s->frame, 0, s->step == steps ? frames : 0);
    s->prompt = (int)state_number(f, "prompt", s->prompt, 0, run->prompt_count - 1);
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
        if (decoded) video_begin(run, video);
    }
    s->history.n = chunk.frames * run->frame_size;
    state_item(f, "latents", s->latents, sizeof(float) * s->history.n);
    noise_state(noise, f);
    if (run->settings->source) encoding_state(run, &s->encoding, f);
    if (!sampling_done(run, s)) {
        history_state(&s->history, f);
        if (run->settings->easycache) easycache_state(&s->easy, run->guided, f);
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

/* Writes the state if it is due: state_seconds after the run began (a short run writes none), then state_seconds after
 * the last one. If writing took more than 1.5 seconds, the next pause is longer in proportion. Before the last chunk is
 * decoded (`urgent`), only the age of the run counts. */
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

/* state: NULL for a new run. The encoder keeps the address of s->encoding. */
static void sampling_begin(const Run *run, Sampling *s, Noise *noise, Video *video, StateFile *state) {
    *s = (Sampling){.cond.name = "cond", .uncond.name = "uncond"};
    video->started = seconds();
    video->next = video->started + run->settings->state_seconds;
    s->latents = allocate(sizeof(float) * run->chunk_frames * run->frame_size);
    if (!state) return;
    run_state(run, s, noise, video, state);
    const char *why = state_close(state);
    if (why) die(STATUS_USAGE, "%s: %s", video->state, why);
    video->chunk = s->chunk;
    video->resumed = video->index;
    note_state(video);
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
        denoise_step(run, s, noise, video);
        save_state(run, s, noise, video, last && s->step == steps);
    }
    if (generated && run->recipe->chunk_frames) {
        tap_scope_chunk(run, s->chunk, "");
        tap_frames(s->latents, latent_shape(run, chunk.frames), "latents");
    }
    tap_clip(run, chunk, s->latents, 0, "latents");
    keep_recent_latents(run, s, chunk);
    if (last) sampling_close(s);
}

/* Decodes and writes the chunk's frames, from the frame it has reached, except those past the clip's end. */
static void decode_chunk(const Run *run, Sampling *s, Noise *noise, Video *video) {
    int frames = chunk_decoded(run, chunk_at(run, s->chunk));
    if (!video->decoder) video_begin(run, video);
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
    Sampling s;
    sampling_begin(run, &s, noise, video, state);
    for (; s.chunk < run->chunks; s.chunk++, s.step = s.frame = 0) {
        if (s.frame == 0) make_chunk(run, &s, noise, video);
        decode_chunk(run, &s, noise, video);
        if (s.chunk + 1 == run->chunks) break;
        show_progress(video, "cache", 0, 1);
        /* Last, so that the frames do not wait for it. */
        fill_cache(run, &s, s.chunk, "cache", chunk_at(run, s.chunk), s.latents);
    }
    video->left_out = s.left_out;
    profile_left_out(video->left_out);
    free(s.latents);
    encoding_free(&s.encoding);
    vae_close(video->decoder);
    scratch_free();
}

void generate(Model *model, const Settings *settings) {
    Run run = run_plan(model, settings);
    run_estimate(&run);
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
    Video video = {.run = &run, .format = video_format(settings)};
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
    encoding_free(&s.encoding);
    vae_close(video.decoder);
    if (settings->noise) npy_free(&noise.file);
    run_free(&run);
    return why;
}
