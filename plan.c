/* plan.c - what a run will do: its prompts, the sizes of its tensors, its chunks, and what it costs in memory and
 * operations. The plan is made before anything is computed, so that a bad setting is reported at once. */
#include "pipeline.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- prompts */

int prompt_ids(const Model *m, const char *prompt, int32_t *ids) {
    Bytes clean = prompt_clean((Bytes){(const uint8_t *)prompt, strlen(prompt)});
    int n = tokenizer_encode(m->tokenizer, clean, ids, m->experts->transformer.text_len);
    free((void *)clean.data);
    return n;
}

static Prompt prompt_new(const Model *m, const char *name, double time, const char *text) {
    Prompt p = {.time = time, .ids = allocate(sizeof(int32_t) * (size_t)m->experts->transformer.text_len)};
    snprintf(p.name, sizeof p.name, "%s", name);
    p.n = prompt_ids(m, text, p.ids);
    return p;
}

/* Embeds of --embeds or --negative-embeds in the place of a prompt. A file may have axes of 1 in front. */
static Prompt prompt_read(const Model *m, const char *name, const char *option, const char *path, char sha256[65]) {
    Npy file;
    int most = m->experts->transformer.text_len, dim = m->text_encoder.dim;
    const char *why = npy_read(path, &file);
    if (why) die(STATUS_USAGE, "%s %s: %s", option, path, why);
    Shape shape = SHAPE(file.shape.n > 1 ? file.shape.d[file.shape.n - 2] : 1, dim);
    why = npy_fit(&file, &shape);
    if (!why) why = npy_finite(&file);
    if (why) die(STATUS_USAGE, "%s %s: %s", option, path, why);
    if (shape.d[0] < 1 || shape.d[0] > most)
        die(STATUS_USAGE, "%s %s: %d tokens, expected 1 to %d", option, path, shape.d[0], most);
    Prompt p = {.n = shape.d[0], .embeds = npy_floats(&file)};
    snprintf(p.name, sizeof p.name, "%s", name);
    sha256_of(file.mapping.data, file.mapping.size, sha256);
    npy_free(&file);
    return p;
}

void require_finite(const Model *m, const float *values, size_t count, const char *what) {
    size_t i = 0;
    while (i < count && isfinite(values[i])) i++;
    if (i == count) return;
    taps_report();
    die(STATUS_CHECK, "%s: NaN or infinity, expected finite values; try another --precision (this is %s), --shift or "
        "--steps, or check the weights", what, precision_name(m->precision));
}

void prompt_encode(const Model *m, Prompt *p) {
    if (p->embeds) {
        tap(p->embeds, SHAPE(p->n, m->text_encoder.dim), "%s.embeds", p->name);
        return;
    }
    p->n = tap_ids(p->ids, p->n, m->experts->transformer.text_len, m->text_encoder.vocab_size, "%s.ids", p->name);
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

/* With many steps and a large shift, neighbouring sigmas round to the same float32: this is refused. */
static Schedule make_schedule(const Model *m, const Settings *s) {
    Schedule schedule = schedule_make(s->sampler, s->steps, s->shift, model_train_timesteps(m->file));
    for (int i = 0; i < s->steps; i++)
        if (!(schedule.sigmas[i + 1] < schedule.sigmas[i]))
            die(STATUS_USAGE, "--steps %d with --shift %g: sigma does not decrease in step %d, expected fewer steps or "
                "a smaller shift", s->steps, s->shift, i + 1);
    return schedule;
}

/* All chunks have chunk_frames frames, except an independent first frame, and the last given chunk, which may be
 * shorter. The last generated chunk may reach past the clip's end. */
Chunk chunk_at(const Run *run, int index) {
    bool given = index < run->given_chunks;
    int n = run->chunk_frames, start = given ? 0 : run->given, i = given ? index : index - run->given_chunks;
    bool alone = run->recipe->independent_first_frame && start == 0;
    Chunk chunk = {.first = start + i * n - (alone && i ? n - 1 : 0), .frames = alone && !i ? 1 : n};
    if (given) chunk.frames = smaller(chunk.frames, run->given - chunk.first);
    return chunk;
}

/* Chunks of n frames that `frames` frames need. `alone`: the first frame is a chunk of its own. */
static int count_chunks(int frames, int n, bool alone) {
    return alone && frames ? 1 + ceiling(frames - 1, n) : ceiling(frames, n);
}

int chunk_decoded(const Run *run, Chunk chunk) { return smaller(chunk.frames, run->decoded - chunk.first); }

int video_frames(const Run *run, int latent) {
    return latent ? run->ahead + 1 + (latent - 1) * run->model->vae.temporal_stride : 0;
}

double chunk_time(const Run *run, Chunk chunk) {
    return (double)video_frames(run, chunk.first) * run->settings->fps_den / run->settings->fps_num;
}

static int latent_frames(const Run *run, int frames) { return (frames - 1) / run->model->vae.temporal_stride + 1; }

/* What the source becomes, see start.c. */
static void plan_source(Run *run) {
    const Settings *s = run->settings;
    Start start = run->model->start;
    if (!s->source) return;
    run->pictured = s->source_frames;
    if (s->strength >= 0) run->encoded = run->redrawn = latent_frames(run, s->source_frames);
    else if (start == TEXT) run->encoded = run->given = latent_frames(run, s->source_frames);
    else if (start == PICTURE) run->pictured = s->frames - run->ahead, run->encoded = run->decoded;
    else run->pictured = run->encoded = run->held = 1 + (s->last_source != NULL);
}

static void plan_chunks(Run *run) {
    const Recipe *r = run->recipe;
    const Settings *s = run->settings;
    int n = r->chunk_frames ? r->chunk_frames : run->decoded;
    bool alone = r->independent_first_frame;
    plan_source(run);
    run->chunk_frames = n;
    run->given_chunks = count_chunks(run->given, n, alone);
    run->chunks = run->given_chunks + count_chunks(run->decoded - run->given, n, alone && !run->given);
    Chunk last = chunk_at(run, run->chunks - 1);
    run->T = last.first + last.frames;
    if (run->redrawn && run->T > run->decoded)
        die(STATUS_USAGE, "--strength: the model generates chunks of %d latent frames, expected a number of frames "
            "that fills them, found %d", n, s->frames);
    run->window = (Window){s->window ? smaller(s->window, run->T) : run->T, s->sink, !strcmp(s->positions, "relative")};
    run->window.sink = smaller(run->window.sink, run->T);
}

PromptChange prompt_change(const Run *run) {
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

Run run_plan(Model *m, const Settings *s) {
    const Transformer *t = &m->experts->transformer;
    const int *patch = t->patch_size;
    Run run = {.model = m, .settings = s, .recipe = &m->recipe, .C = t->out_dim,
               .condition_channels = t->in_dim - t->out_dim};
    for (int i = 0; i < m->expert_count; i++) run.guided |= s->guidance[i] > 1;
    if (s->extend && m->start != TEXT) run.ahead = s->source_frames - 1;
    run.decoded = latent_frames(&run, s->frames - run.ahead);
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
    if (s->last_source) sha256_of(s->last_source->bytes.data, s->last_source->bytes.size, run.inputs.last_source);
    plan_chunks(&run);
    plan_prompts(&run);
    return run;
}

void run_free(Run *run) {
    schedule_free(&run->own);
    for (int i = 0; i < run->prompt_count; i++) prompt_free(&run->prompts[i]);
    prompt_free(&run->negative);
    free(run->prompts);
}

bool run_renoises(const Run *run) {
    return sampler_needs_noise(&run->first, 0) || sampler_needs_noise(&run->schedule, 0);
}

const Schedule *chunk_schedule(const Run *run, int index) {
    return index > run->given_chunks ? &run->schedule : &run->first;
}

Shape latent_shape(const Run *run, int frames) { return SHAPE(run->C, frames, run->H, run->W); }

void tap_scope_chunk(const Run *run, int chunk, const char *prefix) {
    if (chunk < run->given_chunks) tap_scope("given%03d.%s", chunk, prefix);
    else if (run->recipe->chunk_frames) tap_scope("chunk%03d.%s", chunk - run->given_chunks, prefix);
    else tap_scope("%s", prefix);
}

void tap_clip(const Run *run, Chunk chunk, float *latents, int from, const char *name) {
    tap_scope("%s", "");
    for (int f = 0; f < chunk.frames; f++)
        tap_frame(latents + f * run->frame_size, latent_shape(run, run->T - from), chunk.first - from + f, name);
}

/* ---------------------------------------------------------------- memory and operations of a run */

int longest_pass(const Run *run) { return larger(run->chunk_frames, run->recached); }

/* A clip of one chunk needs no cache. */
int cache_capacity(const Run *run) { return run->chunks > 1 ? run->window.size : 0; }

size_t text_context_memory(const Run *run, int n) {
    Arena count = {0};
    text_context_take(&count, &run->model->experts->transformer, n);
    return count.used;
}

/* Tokens of the longest prompt; of the longest one that the text encoder encodes, 0 if it encodes none. */
static int longest_prompt(const Run *run, bool encoded) {
    int n = 0;
    for (int i = 0; i < run->prompt_count + run->guided; i++) {
        const Prompt *p = run_prompt(run, i);
        if (p->ids || !encoded) n = larger(n, p->n);
    }
    return n;
}

/* Bytes of the VAE's encoder and of the readers of its sources; 0 without a source. */
static size_t source_stage_memory(const Run *run) {
    const Settings *s = run->settings;
    if (!s->source) return 0;
    size_t encoded = run->redrawn ? run->chunk_frames * run->frame_size : 0; /* in begin_chunk() */
    return vae_memory(&run->model->vae, ENCODER, run->H, run->W) +
           source_reader_memory(s->source, s->width, s->height) +
           (s->last_source ? source_reader_memory(s->last_source, s->width, s->height) : 0) +
           sizeof(float) * (video_frame_values(s) + encoded);
}

/* Private memory at its peak, in bytes: what is kept for the whole run, plus the largest stage (see the top of
 * pipeline.c). Scratch is the memory that linear layers and attention use for packed operands. */
static size_t run_memory(const Run *run) {
    const Settings *s = run->settings;
    const TextEncoder *e = &run->model->text_encoder;
    const Transformer *t = &run->model->experts->transformer;
    const Vae *vae = &run->model->vae;
    const VideoFormat format = video_format(s);
    int n = longest_prompt(run, false), encoded = longest_prompt(run, true), L = longest_pass(run) * run->tokens,
        keys = larger(cache_capacity(run), run->chunk_frames) * run->tokens;
    size_t latents = sizeof(float) * run->chunk_frames * run->frame_size,
           noise = latents, /* the copy in to_frame_major() */
           rest = 1 << 20, /* small: the C library's, open files, prompts, schedules */
           conditions = sizeof(float) * (run->held * run->frame_size + condition_size(run)),
           kept = latents + noise + conditions + y4m_frame_bytes(&format) + rest,
           reading = encoded ? text_encoder_memory(e, encoded) + text_encoder_scratch(e, encoded) : 0,
           encoding = source_stage_memory(run),
           encoding_scratch = encoding ? vae_scratch(vae, ENCODER, run->H, run->W) : 0,
           denoising = sampling_memory(run) + text_context_memory(run, n) + text_context_fill_memory(t, n) +
                       (run->guided ? text_context_memory(run, run->negative.n) : 0),
           denoising_scratch = larger_size(text_context_fill_scratch(t, n),
                                      transformer_scratch(t, longest_pass(run), L, keys, n + 1)),
           guessing = s->preview && vae->halves[TINY].count
                          ? vae_memory(vae, TINY, run->H, run->W) + sizeof(float) * run->frame_size : 0,
           guessing_scratch = guessing ? vae_scratch(vae, TINY, run->H, run->W) : 0,
           decoding = vae_memory(vae, s->decoder, run->H, run->W),
           decoding_scratch = vae_scratch(vae, s->decoder, run->H, run->W);
    denoising += guessing, denoising_scratch = larger_size(denoising_scratch, guessing_scratch);
    if (s->extend) kept += source_reader_memory(s->source, s->width, s->height);
    for (int i = 0; i < run->prompt_count; i++) kept += sizeof(float) * (size_t)run->prompts[i].n * e->dim;
    size_t before = larger_size(reading, encoding + encoding_scratch),
           apart = larger_size(denoising + denoising_scratch, decoding + decoding_scratch),
           together = denoising + decoding, scratch = larger_size(denoising_scratch, decoding_scratch);
    if (run->given_chunks > 1 || (run->redrawn && run->chunks > 1))
        together += encoding, scratch = larger_size(scratch, encoding_scratch);
    if (run->prompt_count > 1)
        together += text_encoder_memory(e, encoded), scratch = larger_size(scratch, text_encoder_scratch(e, encoded));
    return kept + larger_size(before, run->chunks > 1 ? together + scratch : apart);
}

/* Steps of a chunk that read the prompt; with `negative`, those that read the negative prompt, too. */
static int count_steps(const Run *run, int chunk, bool negative) {
    const Schedule *schedule = chunk_schedule(run, chunk);
    int count = 0;
    for (int i = 0; chunk >= run->given_chunks && i < schedule->steps; i++)
        count += !negative || run->settings->guidance[model_expert(run->model, schedule->timesteps[i])] > 1;
    return count;
}

/* All passes of all chunks, for one branch. */
static double passes_flops(const Run *run, int positions, bool negative) {
    const Transformer *t = &run->model->experts->transformer;
    double flops = 0;
    for (int i = 0; i < run->chunks; i++) {
        Chunk chunk = chunk_at(run, i);
        int seen = smaller(chunk.first + chunk.frames, run->window.size);
        int passes = count_steps(run, i, negative) + (i + 1 < run->chunks);
        flops += passes * transformer_flops(t, chunk.frames * run->tokens, seen * run->tokens, positions);
    }
    return flops;
}

static double run_flops(const Run *run) {
    const Model *m = run->model;
    double flops = passes_flops(run, run->prompts[0].n + 1, false) +
                   vae_flops(&m->vae, run->settings->decoder, run->decoded, run->H, run->W);
    if (run->settings->source) flops += vae_flops(&m->vae, ENCODER, run->pictured, run->H, run->W);
    for (int i = 0; i < run->prompt_count + run->guided; i++) {
        const Prompt *p = run_prompt(run, i);
        if (p->ids) flops += text_encoder_flops(&m->text_encoder, p->n);
    }
    if (run->guided) flops += passes_flops(run, run->negative.n + 1, true);
    return flops;
}

void run_estimate(const Run *run) {
    const Settings *s = run->settings;
    size_t bytes = run_memory(run), available = memory_available();
    int longest = model_frames(run->model);
    if (bytes > available)
        die(STATUS_RESOURCE, "--size %dx%d with --frames %d needs %.1f GiB of memory, %.1f GiB are available", s->width,
            s->height, s->frames, bytes / 0x1p30, available / 0x1p30);
    if (s->frames - run->ahead > longest && !(run->recipe->chunk_frames && s->window))
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

