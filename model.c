/* model.c - a weight file -> a Model, and the settings that a user did not give.
 *
 * model_load() maps a GGUF file, checks its format, and binds tokenizer, text encoder, transformers and VAE to its
 * tensors. The weights are not copied.
 *
 * The file also says how to generate with them. Three groups of keys do, all optional:
 *
 *   default.*     size, frames, frame rate, steps, guidance, negative prompt, precision
 *   scheduler.*   sampler and shift; or, for distilled models, a fixed list of timesteps and a rule to follow it
 *   causal.*      for models that generate in chunks: frames in a chunk, attention window, positions
 *
 * scheduler.* and causal.* become the Recipe. settings_complete() fills what the command line left open from these
 * keys, and checks the result. A value out of range is refused in one line that names the key or the option. */
#include "sora.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { MAX_WINDOW = 1000000 }; /* latent frames */

/* ---------------------------------------------------------------- the model */

/* Refuses other format versions and memory layouts, which would load without an error and give garbage. */
static void check_format(const WeightFile *file) {
    static const char *const layouts[][2] = {{"wan.patch_embedding_layout", "O,I,T,Y,X"},
                                             {"vae.conv_layout", "O,T,Y,X,I"}};
    int64_t version = weights_int_or(file, "sora.format_version", -1);
    if (version < 0)
        weights_refuse(file, "a GGUF file of another program (general.architecture is \"%s\"), expected one that "
                       "export.py wrote", weights_string_or(file, "general.architecture", ""));
    if (version != FORMAT_VERSION)
        weights_refuse(file, "sora.format_version is %" PRId64 ", expected %d", version, FORMAT_VERSION);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        const char *key = layouts[i][0], *expected = layouts[i][1];
        const char *layout = weights_string_or(file, key, expected);
        if (strcmp(layout, expected)) weights_refuse(file, "%s is %s, expected %s", key, layout, expected);
    }
}

/* An image-to-video model reads the latents, a mask of temporal_stride channels, and an encoded picture. */
static void check_parts(const Model *m) {
    const Transformer *t = &m->experts->transformer;
    int z = m->vae.z_dim, channels = m->start == PICTURE ? 2 * z + m->vae.temporal_stride : z;
    if (t->text_dim != m->text_encoder.dim)
        weights_refuse(m->file, "the text encoder's width is %d, the transformer expects %d", m->text_encoder.dim,
                       t->text_dim);
    if (t->in_dim != channels || t->out_dim != z)
        weights_refuse(m->file, "the transformer maps %d channels to %d, expected %d to %d in a model of type %s",
                       t->in_dim, t->out_dim, channels, z, weights_string_or(m->file, "wan.model_type", "t2v"));
    if (m->recipe.chunk_frames && (m->expert_count > 1 || m->start != TEXT))
        weights_refuse(m->file, "causal.chunk_frames is %d, expected none in a model of type %s with %d experts",
                       m->recipe.chunk_frames, weights_string_or(m->file, "wan.model_type", "t2v"), m->expert_count);
}

static Start load_start(const WeightFile *file) {
    static const char *const types[] = {[TEXT] = "t2v", [TEXT_OR_PICTURE] = "ti2v", [PICTURE] = "i2v"};
    const char *type = weights_string_or(file, "wan.model_type", "t2v");
    for (int i = TEXT; i <= PICTURE; i++)
        if (!strcmp(type, types[i])) return (Start)i;
    weights_refuse(file, "wan.model_type is '%s', expected t2v, ti2v or i2v", type);
}

int model_train_timesteps(const WeightFile *file) {
    return weights_size_or(file, "scheduler.num_train_timesteps", 1 << 20, 1000);
}

/* One transformer; or two, if scheduler.boundary says at which noise level the second takes over. */
static void load_experts(Model *m) {
    double boundary = weights_double_or(m->file, "scheduler.boundary", 0);
    if (!(boundary >= 0 && boundary <= 1))
        weights_refuse(m->file, "scheduler.boundary is %g, expected 0 to 1", boundary);
    m->experts[0].transformer = transformer_load(m->file, m->precision, "");
    m->expert_count = 1;
    if (!weights_has(m->file, "scheduler.boundary")) {
        if (weights_has(m->file, "transformer_2.head.modulation"))
            weights_refuse(m->file, "there are two transformers, expected the key scheduler.boundary");
        return;
    }
    m->experts[0].from = boundary * model_train_timesteps(m->file);
    m->experts[1].transformer = transformer_load(m->file, m->precision, "transformer_2.");
    m->expert_count = 2;
}

int model_expert(const Model *m, double timestep) {
    int i = 0;
    while (i + 1 < m->expert_count && timestep < m->experts[i].from) i++;
    return i;
}

/* default.precision if the file has it. Else by the type of the transformer's first attention weight and by what is
 * fast on this processor:
 *
 *   f32 -> f32      q8_0 -> int8, bf16 or f32      f16, bf16 -> bf16 or f32 */
static Precision default_precision(const WeightFile *file) {
    Precision own;
    const char *name = weights_string_or(file, "default.precision", NULL);
    if (name && precision_parse(name, &own)) return own;
    if (name) weights_refuse(file, "default.precision is '%s', expected f32, bf16 or int8", name);
    int dim = weights_size(file, "wan.dim", MAX_WIDTH);
    Type type = weights_bind(file, dim, dim, "blocks.0.self_attn.q.weight").type;
    for (int p = weight_type(type)->suits; p > F32; p--)
        if (kernels->fast[p]) return (Precision)p;
    return F32;
}

/* ---------------------------------------------------------------- the recipe: scheduler.* and causal.* */

/* A new array of strictly decreasing numbers in (0, most]; NULL if the file does not have the key. */
static float *load_descending(const WeightFile *file, const char *key, double most, int *count) {
    WeightArray array;
    if (!weights_has(file, key)) return NULL;
    if (!weights_array(file, key, &array) || !array_is_number(&array) || array.count < 1 || array.count > 1000)
        weights_refuse(file, "%s is not an array of 1 to 1000 numbers", key);
    *count = (int)array.count;
    float *list = allocate(sizeof(float) * array.count);
    for (size_t i = 0; i < array.count; i++) {
        double value = array_double(&array, i);
        list[i] = (float)value;
        if (!(value > 0 && value <= most))
            weights_refuse(file, "%s holds %g, expected more than 0 and at most %g", key, value, most);
        if (i > 0 && !(list[i] < list[i - 1]))
            weights_refuse(file, "%s does not decrease: %g follows %g", key, list[i], list[i - 1]);
    }
    return list;
}

/* The schedule in scheduler.PREFIXtimesteps and scheduler.PREFIXsigmas; sigmas default to timestep / train_timesteps.
 * The result has 0 steps if there are no timesteps. */
static Schedule load_schedule(const WeightFile *file, Sampler rule, const char *prefix) {
    char key[64];
    int steps = 0, count = 0, train = model_train_timesteps(file);
    snprintf(key, sizeof key, "scheduler.%stimesteps", prefix);
    float *timesteps = load_descending(file, key, train, &steps);
    if (timesteps && rule == SAMPLERS)
        weights_refuse(file, "%s needs scheduler.rule renoise or euler, found multistep", key);
    snprintf(key, sizeof key, "scheduler.%ssigmas", prefix);
    float *sigmas = load_descending(file, key, 1, &count);
    if (sigmas && count != steps)
        weights_refuse(file, "%s has %d elements, expected %d, one a timestep", key, count, steps);
    if (!sigmas) {
        sigmas = allocate(sizeof(float) * (size_t)steps);
        for (int i = 0; i < steps; i++) sigmas[i] = (float)((double)timesteps[i] / train);
    }
    Schedule schedule = {0};
    if (timesteps) schedule = schedule_of(rule, steps, timesteps, sigmas);
    free(timesteps), free(sigmas);
    return schedule;
}

static void load_schedules(const WeightFile *file, Recipe *r) {
    const char *rule = weights_string_or(file, "scheduler.rule", "multistep");
    bool renoise = !strcmp(rule, "renoise"), euler = !strcmp(rule, "euler");
    if (!renoise && !euler && strcmp(rule, "multistep"))
        weights_refuse(file, "scheduler.rule is '%s', expected multistep, renoise or euler", rule);
    Sampler sampler = renoise ? RENOISE : euler ? EULER : SAMPLERS;
    r->schedule = load_schedule(file, sampler, "");
    r->first = load_schedule(file, sampler, "first_");
    if (sampler != SAMPLERS && !r->schedule.steps)
        weights_refuse(file, "scheduler.timesteps is missing, and scheduler.rule %s needs it", rule);
    if (r->first.steps && !r->chunk_frames)
        weights_refuse(file, "scheduler.first_timesteps needs causal.chunk_frames, which is missing");
    if (!r->first.steps && r->schedule.steps)
        r->first = schedule_of(sampler, r->schedule.steps, r->schedule.timesteps, r->schedule.sigmas);
    double scale = weights_double_or(file, "scheduler.noise_scale", 1);
    if (!(scale > 0 && scale <= 10))
        weights_refuse(file, "scheduler.noise_scale is %g, expected more than 0 and at most 10", scale);
    r->noise_scale = (float)scale;
    r->noise_frames_first = weights_bool_or(file, "scheduler.noise_frames_first", r->chunk_frames > 0);
}

/* A number of frames from 0 to MAX_WINDOW; 0 if the key is missing. */
static int load_frames(const WeightFile *file, const char *key) {
    int64_t frames = weights_int_or(file, key, 0);
    if (frames < 0 || frames > MAX_WINDOW)
        weights_refuse(file, "key \"%s\" is %" PRId64 ", expected 0 to %d", key, frames, MAX_WINDOW);
    return (int)frames;
}

static PromptChange load_prompt_change(const WeightFile *file) {
    static const char *const names[] = {[KEEP] = "keep", [FLUSH] = "flush", [RECACHE] = "recache"};
    const char *name = weights_string_or(file, "causal.prompt_change", NULL);
    if (!name) return BY_POSITIONS;
    for (int i = KEEP; i <= RECACHE; i++)
        if (!strcmp(name, names[i])) return (PromptChange)i;
    weights_refuse(file, "causal.prompt_change is '%s', expected keep, flush or recache", name);
}

/* Returns NULL if the window fits the chunks, else the error. */
static const char *check_window(const Recipe *r) {
    Window w = r->window;
    if (w.size && w.size < r->chunk_frames)
        return reason("the window is %d frames, expected at least a chunk of %d, or 0 for all frames", w.size,
                      r->chunk_frames);
    if (w.size && w.sink > w.size - r->chunk_frames)
        return reason("the sink is %d frames, expected at most %d, which is the window of %d less a chunk of %d",
                      w.sink, w.size - r->chunk_frames, w.size, r->chunk_frames);
    if (!w.size && w.sink)
        return reason("the sink is %d frames, expected 0 without a window, because no frame is dropped then", w.sink);
    return NULL;
}

static void load_chunks(const WeightFile *file, Recipe *r) {
    r->chunk_frames = weights_size(file, "causal.chunk_frames", 4096);
    r->independent_first_frame = weights_bool_or(file, "causal.independent_first_frame", false);
    const char *positions = weights_string_or(file, "causal.positions", "absolute");
    if (strcmp(positions, "absolute") && strcmp(positions, "relative"))
        weights_refuse(file, "causal.positions is '%s', expected absolute or relative", positions);
    r->window = (Window){load_frames(file, "causal.window"), load_frames(file, "causal.sink"),
                         !strcmp(positions, "relative")};
    const char *why = check_window(r);
    if (why) weights_refuse(file, "causal.window and causal.sink: %s", why);
    double noise = weights_double_or(file, "causal.context_noise", 0);
    int train = model_train_timesteps(file);
    if (!(noise >= 0 && noise <= train))
        weights_refuse(file, "causal.context_noise is %g, expected 0 to %d", noise, train);
    r->context_noise = (float)noise;
    r->prompt_change = load_prompt_change(file);
    r->recache_sink = weights_bool_or(file, "causal.recache_sink", false);
}

Recipe recipe_load(const WeightFile *file) {
    Recipe r = {0};
    if (weights_int_or(file, "causal.chunk_frames", 0)) load_chunks(file, &r);
    load_schedules(file, &r);
    return r;
}

void recipe_free(Recipe *r) {
    schedule_free(&r->schedule);
    schedule_free(&r->first);
}

/* ---------------------------------------------------------------- the whole model */

void model_bind(Model *m) {
    m->text_encoder = text_encoder_load(m->file, m->precision);
    load_experts(m);
    m->vae = vae_load(m->file, m->precision);
    m->start = load_start(m->file);
    m->recipe = recipe_load(m->file);
    check_parts(m);
}

Model model_load(const char *path, Precision precision) {
    Model m = {0};
    const char *why = weights_open(path, &m.file);
    if (why) die(STATUS_USAGE, "%s: %s", path, why);
    check_format(m.file);
    why = tokenizer_load(m.file, &m.tokenizer);
    if (why) die(STATUS_USAGE, "%s: %s", path, why);
    m.precision = precision == AUTOMATIC ? default_precision(m.file) : precision;
    model_bind(&m);
    return m;
}

void model_free(Model *m) {
    recipe_free(&m->recipe);
    vae_free(&m->vae);
    for (int i = 0; i < m->expert_count; i++) transformer_free(&m->experts[i].transformer);
    text_encoder_free(&m->text_encoder);
    tokenizer_free(m->tokenizer);
    weights_close(m->file);
}

/* ---------------------------------------------------------------- settings */

/* Both: a setting that was not given takes the value of the file's key, or `otherwise` if there is no such key. */
static void set_default(int *setting, const Model *m, const char *key, int most, int otherwise) {
    if (*setting == 0) *setting = weights_size_or(m->file, key, most, otherwise);
}

static void set_default_number(double *setting, const Model *m, const char *key, double least,
                                double otherwise) {
    if (*setting >= 0) return;
    *setting = weights_double_or(m->file, key, otherwise);
    if (!(*setting >= least && *setting <= 1000))
        weights_refuse(m->file, "key \"%s\" is %g, expected %g to 1000", key, *setting, least);
}

static void check_size(const char *option, int pixels, int multiple) {
    int below = pixels / multiple * multiple;
    if (below == pixels) return;
    if (!below) die(STATUS_USAGE, "--size: %s is %d, expected a multiple of %d", option, pixels, multiple);
    die(STATUS_USAGE, "--size: %s is %d, expected a multiple of %d, such as %d or %d", option, pixels, multiple, below,
        below + multiple);
}

static void check_frames(int frames, int stride) {
    int below = (frames - 1) / stride * stride + 1;
    if (below < frames)
        die(STATUS_USAGE, "--frames: %d is not a multiple of %d plus 1, such as %d or %d", frames, stride, below,
            below + stride);
}

int model_frames(const Model *m) {
    return weights_size_or(m->file, "default.frames", 1000001, 81);
}

Settings settings_new(void) {
    return (Settings){.output = "out.y4m", .chroma = 420, .seconds = -1, .guidance = {-1, -1}, .shift = -1,
                      .sampler = SAMPLERS, .decoder = DECODER, .window = -1, .sink = -1, .strength = -1,
                      .state_seconds = 30, .record = true};
}

static void check_source(const Settings *s, const Model *m) {
    if (m->start == PICTURE && s->strength >= 0)
        die(STATUS_USAGE, "--strength: needs another model; this one (%s) begins with a picture: --image or --extend",
            weights_string_or(m->file, "general.name", "i2v"));
    if (m->start == PICTURE && !s->image && !s->extend)
        die(STATUS_USAGE, "--image: not given, and this model (%s) makes a clip from a picture and a prompt",
            weights_string_or(m->file, "general.name", "i2v"));
    if ((s->image || s->extend) && m->start == TEXT && !m->recipe.chunk_frames)
        die(STATUS_USAGE, "--%s: needs a model that generates in chunks, or Wan 2.2's TI2V-5B or I2V-A14B; this one "
            "generates a whole clip from text", s->image ? "image" : "extend");
    if (s->last_image && m->start == TEXT)
        die(STATUS_USAGE,
            "--last-image: needs a model such as Wan 2.2's I2V-A14B or TI2V-5B; this one does not take one");
}

/* Checks that the model can use the source. A clip gives size and frame rate, unless they were given. */
static void complete_source(Settings *s, const Model *m) {
    check_source(s, m);
    if (!s->source) return;
    const VideoFormat *format = &s->source->format;
    const int *patch = m->experts->transformer.patch_size;
    int stride = m->vae.temporal_stride, spatial = m->vae.spatial_stride, frames = s->source->frames;
    s->source_frames = s->image ? 1 : (frames - 1) / stride * stride + 1;
    if (s->extend && m->start != TEXT) s->source_frames = frames; /* the last one alone is encoded */
    if (s->image) return;
    if (!s->width && format->width % (spatial * patch[2]) == 0 && format->height % (spatial * patch[1]) == 0)
        s->width = format->width, s->height = format->height;
    if (!s->fps_num) s->fps_num = format->rate_num, s->fps_den = format->rate_den;
    if (s->source_frames < frames && (s->extend || !s->frames))
        warn("--video %s: %d of its %d frames are used, a multiple of %d plus 1", s->video, s->source_frames, frames,
             stride);
}

/* With --extend, frames are added to the source's; with --strength, they are the source's. */
static void complete_source_length(Settings *s, const Model *m) {
    int stride = m->vae.temporal_stride, below = larger(s->frames / stride * stride, stride);
    if (s->extend) {
        if (below != s->frames)
            die(STATUS_USAGE, "--frames: %d more frames with --extend is not a multiple of %d, such as %d or %d",
                s->frames, stride, below, below + stride);
        s->frames += s->source_frames;
    } else if (s->strength >= 0) {
        if (s->frames > s->source_frames)
            die(STATUS_USAGE, "--frames %d: %s has %d that can be used", s->frames, s->video, s->source_frames);
        s->source_frames = s->frames;
    } else if (s->source && s->frames == 1) {
        die(STATUS_USAGE, "--frames 1: with --image that frame is given, expected at least %d", 1 + stride);
    }
}

/* Frame rate and number of frames; --seconds picks the nearest number of the form stride*k + 1, or stride*k more. */
static void complete_length(Settings *s, const Model *m) {
    int stride = m->vae.temporal_stride, first = !s->extend;
    set_default(&s->fps_num, m, "default.fps_num", 1000000, 16);
    set_default(&s->fps_den, m, "default.fps_den", 1000000, 1);
    if (s->seconds >= 0) {
        double steps = s->seconds * s->fps_num / s->fps_den / stride;
        if (steps > 1e6)
            die(STATUS_USAGE, "--seconds: %g is %.4g frames, expected at most %d", s->seconds, steps * stride,
                1000000 * stride + 1);
        s->frames = (int)floor(steps + 0.5) * stride + first;
        if (!s->frames) die(STATUS_USAGE, "--seconds: %g more with --extend is no frame", s->seconds);
    }
    if (s->frames == 0) s->frames = s->strength >= 0 ? s->source_frames : model_frames(m) - !first;
    if (first) check_frames(s->frames, stride);
    complete_source_length(s, m);
}

/* Steps, shift and sampler. A model with its own list of steps takes no others. */
static void complete_schedule(Settings *s, const Model *m) {
    const Schedule *fixed = &m->recipe.schedule;
    const char *given = NULL;
    if (s->steps && s->steps != fixed->steps) given = "--steps";
    else if (s->shift >= 0) given = "--shift";
    else if (s->sampler != SAMPLERS && s->sampler != fixed->sampler) given = "--sampler";
    if (fixed->steps && given) {
        char *list = schedule_string(fixed);
        die(STATUS_USAGE, "%s: this model has a fixed schedule and takes no other: %d steps of %s at timesteps %s",
            given, fixed->steps, sampler_name(fixed->sampler), list);
    }
    if (fixed->steps) {
        s->steps = fixed->steps;
        s->sampler = fixed->sampler;
    }
    set_default(&s->steps, m, "default.steps", 1000, 50);
    set_default_number(&s->shift, m, "scheduler.shift", 1e-3, 3.0);
    if (s->sampler == SAMPLERS &&
        !sampler_parse(weights_string_or(m->file, "scheduler.sampler", "unipc"), &s->sampler))
        weights_refuse(m->file, "scheduler.sampler is '%s', expected unipc, euler or dpm++; --sampler overrides it",
                       weights_string_or(m->file, "scheduler.sampler", ""));
    int steps = m->recipe.first.steps ? smaller(m->recipe.first.steps, s->steps) : s->steps;
    if (s->strength >= 0 && !steps_in_part(steps, s->strength))
        die(STATUS_USAGE, "--strength: %g of %d steps is none, expected at least %.4g", s->strength, steps,
            1.0 / steps);
}

/* Steps are left out only of a schedule that is long enough, in a model that makes the whole clip at once. */
static void check_easycache(const Settings *s, const Model *m) {
    if (!s->easycache) return;
    if (m->recipe.chunk_frames)
        die(STATUS_USAGE,
            "--easycache: needs a model that generates the whole clip at once, this one generates chunks");
    if (m->recipe.schedule.steps)
        die(STATUS_USAGE, "--easycache: needs a schedule of any length, this model has a fixed one");
    int steps = s->strength >= 0 ? steps_in_part(s->steps, s->strength) : s->steps;
    if (steps < EASYCACHE_FIRST + 2)
        die(STATUS_USAGE, "--easycache: the first %d steps and the last are always computed, expected at least %d "
            "steps, found %d", EASYCACHE_FIRST, EASYCACHE_FIRST + 2, steps);
}

/* A PPM has one frame, with as much chroma as luma. */
static void complete_output(Settings *s) {
    const char *dot = strrchr(s->output, '.');
    s->ppm = dot && !strcasecmp(dot, ".ppm");
    if (!s->ppm) return;
    if (s->frames > 1)
        die(STATUS_USAGE, "--output %s: a PPM is one picture, and the clip has %d frames: give --frames 1, or "
            "-o %.*s.y4m", s->output, s->frames, (int)(dot - s->output), s->output);
    s->chroma = 444;
}

/* The second expert's guidance is its own, or that of the first if the user gave only that, as in diffusers. */
static void complete_guidance(Settings *s, const Model *m) {
    if (s->guidance[1] >= 0 && m->expert_count < 2)
        die(STATUS_USAGE, "--guidance-2: needs a model with two experts, this one has one transformer");
    if (s->guidance[0] < 0 && weights_has(m->file, "default.guidance_2"))
        set_default_number(&s->guidance[1], m, "default.guidance_2", 0, 0);
    set_default_number(&s->guidance[0], m, "default.guidance", 0, 5.0);
    if (s->guidance[1] < 0) s->guidance[1] = s->guidance[0];
    for (int i = 0; i < m->expert_count; i++)
        if (s->guidance[i] < 1)
            warn("guidance %g is taken as 1, which is no guidance, as in diffusers", s->guidance[i]);
}

/* Which earlier frames self attention sees. */
static void complete_window(Settings *s, const Model *m) {
    Recipe r = m->recipe;
    const char *given = s->window >= 0 ? "--window" : s->sink >= 0 ? "--sink" : s->positions ? "--positions" : NULL;
    const char *story = s->story.count ? "--at or --story" : given;
    if (story && !r.chunk_frames)
        die(STATUS_USAGE, "%s: needs a model that generates in chunks, this one generates the whole clip at once",
            story);
    if (s->window < 0) s->window = r.window.size;
    if (s->sink < 0) s->sink = s->window ? r.window.sink : 0;
    if (!s->positions) s->positions = r.window.relative ? "relative" : "absolute";
    r.window.size = s->window, r.window.sink = s->sink;
    const char *why = given ? check_window(&r) : NULL;
    if (why) die(STATUS_USAGE, "%s: %s", given, why);
}

/* Positions in the latents of all frames that self attention sees at once are counted in an int. These are the clip's,
 * rounded up to whole chunks, or those of the window, which is at least a chunk. */
static void check_positions(const Settings *s, const Model *m) {
    const Recipe *r = &m->recipe;
    int stride = m->vae.spatial_stride, frames = s->frames / m->vae.temporal_stride + 1;
    if (r->chunk_frames) frames = ceiling(frames, r->chunk_frames) * r->chunk_frames + r->independent_first_frame;
    if (r->chunk_frames && s->window) frames = smaller(frames, s->window);
    if ((double)s->width * s->height / stride / stride * frames > INT_MAX)
        die(STATUS_USAGE, "--size %dx%d with --frames %d is %.3g latent positions, expected less than 2^31", s->width,
            s->height, s->frames, (double)s->width * s->height / stride / stride * frames);
}

void settings_complete(Settings *s, const Model *m) {
    const Vae *vae = &m->vae;
    const int *patch = m->experts->transformer.patch_size;
    complete_source(s, m);
    set_default(&s->width, m, "default.width", 16384, 832);
    set_default(&s->height, m, "default.height", 16384, 480);
    complete_length(s, m);
    complete_schedule(s, m);
    complete_guidance(s, m);
    if (!s->negative && !s->negative_embeds) s->negative = weights_string_or(m->file, "default.negative_prompt", "");
    complete_window(s, m);
    check_easycache(s, m);
    if (s->decoder == TINY && !vae->halves[TINY].count)
        die(STATUS_USAGE, "--decoder tiny: the model file has none; export.py --vae-tiny FILE adds one");
    check_size("width", s->width, vae->spatial_stride * patch[2]);
    check_size("height", s->height, vae->spatial_stride * patch[1]);
    check_positions(s, m);
    complete_output(s);
}
