/* model.c - a weight file as the model that it holds, and what it says of how to use it: the settings of a run that
 * were not given are its own. */
#include "sora.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <string.h>

/* ---------------------------------------------------------------- the model */

/* A later format, or weights that lie in another order, would load and give garbage. */
static void check_format(const WeightFile *file) {
    static const char *const layouts[][2] = {{"wan.patch_embedding_layout", "O,I,T,Y,X"},
                                             {"vae.conv_layout", "O,T,Y,X,I"}};
    int64_t version = weights_int_or(file, "sora.format_version", -1);
    if (version < 0)
        weights_refuse(file, "a GGUF file of another program (general.architecture is \"%s\"): convert it with export.py",
                       weights_string_or(file, "general.architecture", ""));
    if (version != FORMAT_VERSION)
        weights_refuse(file, "sora.format_version is %" PRId64 ", expected %d", version, FORMAT_VERSION);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        const char *key = layouts[i][0], *expected = layouts[i][1];
        const char *layout = weights_string_or(file, key, expected);
        if (strcmp(layout, expected)) weights_refuse(file, "%s is %s, expected %s", key, layout, expected);
    }
}

static void check_parts(const Model *m) {
    if (m->transformer.text_dim != m->text_encoder.dim)
        weights_refuse(m->file, "the text encoder is %d wide, the transformer expects %d",
                       m->text_encoder.dim, m->transformer.text_dim);
    if (m->transformer.in_dim != m->vae.z_dim || m->transformer.out_dim != m->vae.z_dim)
        weights_refuse(m->file,
                       "the transformer maps %d channels to %d, the VAE has %d: not a text-to-video model",
                       m->transformer.in_dim, m->transformer.out_dim, m->vae.z_dim);
}

/* The arithmetic that the file asks for; else the one that suits the weights of the transformer's large
 * products on this processor. */
static Precision suited(const WeightFile *file) {
    Precision own;
    const char *name = weights_string_or(file, "default.precision", NULL);
    if (name && precision_parse(name, &own)) return own;
    if (name) weights_refuse(file, "default.precision is '%s', expected f32, bf16 or int8", name);
    int dim = weights_size(file, "wan.dim", 1 << 16);
    switch (weights_bind(file, dim, dim, "blocks.0.self_attn.q.weight").type) {
    case TYPE_F32: return F32;
    case TYPE_Q8_0:
        if (kernels->fast[INT8]) return INT8;
        break;
    default: break;
    }
    return kernels->fast[BF16] ? BF16 : F32;
}

Model model_load(const char *path, Precision precision) {
    Model m = {0};
    const char *why = weights_open(path, &m.file);
    if (why) die(STATUS_USAGE, "%s: %s", path, why);
    check_format(m.file);
    why = tokenizer_load(m.file, &m.tokenizer);
    if (why) die(STATUS_USAGE, "%s: %s", path, why);
    m.precision = precision == AUTOMATIC ? suited(m.file) : precision;
    m.text_encoder = text_encoder_load(m.file, m.precision);
    m.transformer = transformer_load(m.file, m.precision);
    m.vae = vae_load(m.file, m.precision);
    check_parts(&m);
    return m;
}

void model_free(Model *m) {
    vae_free(&m->vae);
    transformer_free(&m->transformer);
    text_encoder_free(&m->text_encoder);
    tokenizer_free(m->tokenizer);
    weights_close(m->file);
}

/* ---------------------------------------------------------------- settings */

static void take_default(int *setting, const Model *m, const char *key, int most, int otherwise) {
    if (*setting == 0) *setting = weights_size_or(m->file, key, most, otherwise);
}

static void take_default_number(double *setting, const Model *m, const char *key, double least,
                                double otherwise) {
    if (*setting >= 0) return;
    *setting = weights_double_or(m->file, key, otherwise);
    if (!(*setting >= least && *setting <= 1000))
        weights_refuse(m->file, "key \"%s\" is %g, expected %g to 1000", key, *setting, least);
}

static void check_size(const char *option, int pixels, int multiple) {
    int below = pixels / multiple * multiple;
    if (below == pixels) return;
    if (!below) die(STATUS_USAGE, "--size: %s %d is not a multiple of %d", option, pixels, multiple);
    die(STATUS_USAGE, "--size: %s %d is not a multiple of %d: %d or %d", option, pixels, multiple, below,
        below + multiple);
}

static void check_frames(int frames, int stride) {
    int below = (frames - 1) / stride * stride + 1;
    if (below < frames)
        die(STATUS_USAGE, "--frames: %d is not %dk+1: %d or %d", frames, stride, below, below + stride);
}

int model_frames(const Model *m) {
    return weights_size_or(m->file, "default.frames", 1000001, 81);
}

void settings_complete(Settings *s, const Model *m) {
    const Vae *vae = &m->vae;
    const int *patch = m->transformer.patch_size;
    take_default(&s->width, m, "default.width", 16384, 832);
    take_default(&s->height, m, "default.height", 16384, 480);
    take_default(&s->fps_num, m, "default.fps_num", 1000000, 16);
    take_default(&s->fps_den, m, "default.fps_den", 1000000, 1);
    take_default(&s->steps, m, "default.steps", 1000, 50);
    if (s->seconds >= 0) {
        double chunks = s->seconds * s->fps_num / s->fps_den / vae->temporal_stride;
        if (chunks > 1e6)
            die(STATUS_USAGE, "--seconds: %g is more than can be counted in frames", s->seconds);
        s->frames = (int)floor(chunks + 0.5) * vae->temporal_stride + 1;
    }
    if (s->frames == 0) s->frames = model_frames(m);
    take_default_number(&s->guidance, m, "default.guidance", 0, 5.0);
    take_default_number(&s->shift, m, "scheduler.shift", 1e-3, 3.0);
    if (s->guidance < 1) warn("guidance %g is taken as 1, which is none: diffusers guides above 1 only", s->guidance);
    if (s->sampler == SAMPLERS &&
        !sampler_parse(weights_string_or(m->file, "scheduler.sampler", "unipc"), &s->sampler))
        weights_refuse(m->file, "scheduler.sampler '%s' is unknown; give --sampler",
                       weights_string_or(m->file, "scheduler.sampler", ""));
    if (!s->negative) s->negative = weights_string_or(m->file, "default.negative_prompt", "");
    check_size("width", s->width, vae->spatial_stride * patch[2]);
    check_size("height", s->height, vae->spatial_stride * patch[1]);
    check_frames(s->frames, vae->temporal_stride);
    double positions = (double)s->width * s->height / vae->spatial_stride / vae->spatial_stride;
    if (positions * (s->frames / vae->temporal_stride + 1) > INT_MAX)
        die(STATUS_USAGE, "--size %dx%d with --frames %d is more than 2^31 latent positions", s->width,
            s->height, s->frames);
}
