/* test_pipeline.c - generates clips with a small model. Every instruction set and number of threads must give the same
 * bytes; bf16 and int8 must be close to f32; the decoder must give the first frames without the later ones. cli.sh
 * compares the tensors with those of diffusers. */
#include "sora.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char model_path[] = "tests/goldens/model/model.gguf";

/* ---------------------------------------------------------------- whole runs */

typedef struct {
    const char *isa;
    int threads;
    Precision precision;
    int frames;
} Variant;

/* Runs the pipeline into a file and reads it back. */
static Bytes make(Model *model, Settings s) {
    Bytes video = {0};
    char *path = temporary_path("pipeline.y4m");
    s.prompt = "a red fox", s.output = path, s.chroma = 444, s.quiet = true, s.record = false;
    settings_complete(&s, model);
    generate(model, &s);
    CHECK(!read_file(path, (size_t)1 << 24, &video), "the video cannot be read back");
    unlink(path);
    free(path);
    return video;
}

static Settings settings_of(int frames) {
    Settings s = settings_new();
    s.negative = "", s.width = 48, s.height = 32, s.frames = frames;
    s.steps = 2, s.guidance[0] = 3, s.shift = 3, s.sampler = UNIPC, s.seed = 5;
    return s;
}

static Bytes run(Variant v) {
    int threads = threads_count();
    kernels_choose(v.isa);
    threads_set(v.threads);
    Model model = model_load(model_path, v.precision);
    Bytes video = make(&model, settings_of(v.frames));
    model_free(&model);
    kernels_choose("auto");
    threads_set(threads);
    return video;
}

static bool same(Bytes a, Bytes b) { return a.size == b.size && !memcmp(a.data, b.data, a.size); }

static void check_bits(Precision precision) {
    Bytes expected = run((Variant){"naive", 2, precision, 9});
    FOR_TABLES(isa) {
        /* INT8 decodes in BF16. */
        if (!strcmp(isa, "naive") || (precision != F32 && kernels->order_of_bf16 != RISING)) continue;
        for (int threads = 1; threads <= 3; threads += 2) {
            Bytes video = run((Variant){isa, threads, precision, 9});
            CHECK(same(video, expected), "%s: the video of %s kernels with %d threads differs from naive",
                  precision_name(precision), isa, threads);
            free((void *)video.data);
        }
    }
    free((void *)expected.data);
}

/* A model must generate the same clip again after another clip. */
static void check_again(const char *path, Settings one, Settings other) {
    Model model = model_load(path, F32);
    Bytes first = make(&model, one), between = make(&model, other), again = make(&model, one);
    CHECK(same(first, again), "%s: the same clip, generated again after another one, differs", path);
    CHECK(!same(first, between), "%s: other settings give the same clip", path);
    free((void *)first.data), free((void *)between.data), free((void *)again.data);
    model_free(&model);
}

static double psnr(Bytes a, Bytes b) {
    double sum = 0;
    for (size_t i = 0; i < a.size; i++)
        sum += ((double)a.data[i] - b.data[i]) * ((double)a.data[i] - b.data[i]);
    return 10 * log10(255.0 * 255.0 * (double)a.size / sum);
}

/* The PSNR of bf16 or int8 against f32 must be at least `least` dB. The model has random weights. */
static void check_narrow(Precision precision, double least) {
    Bytes exact = run((Variant){"auto", 2, F32, 9}), narrow = run((Variant){"auto", 2, precision, 9});
    double found = psnr(exact, narrow); /* infinite if the clips are equal: then the precision was ignored */
    CHECK(exact.size == narrow.size && isfinite(found) && found >= least, "%s: PSNR against f32 is %.1f dB",
          precision_name(precision), found);
    free((void *)exact.data), free((void *)narrow.data);
}

static void check_image(void) {
    Bytes image = run((Variant){"auto", 2, F32, 1});
    const uint8_t *frame = memchr(image.data, '\n', image.size);
    size_t rest = image.size - (size_t)(frame - image.data) - 1;
    CHECK(rest == 6 + 3 * 48 * 32, "one frame leaves %zu bytes after the header", rest);
    free((void *)image.data);
}

/* ---------------------------------------------------------------- the decoder as a stream */

enum { T = 4, H = 4, W = 8 };

typedef struct {
    float *frames; /* [F][3,Y,X] */
    size_t size;   /* floats of one frame */
    int count;
} Collected;

static void collect(void *to, float *frame) {
    Collected *c = to;
    memcpy(c->frames + c->count++ * c->size, frame, c->size * sizeof(float));
}

/* Decodes the first t latent frames (t,C,H,W). */
static Collected decode(const Vae *vae, VaeHalf half, const float *latents, int t) {
    Collected c = {.size = (size_t)3 * H * W * vae->spatial_stride * vae->spatial_stride};
    c.frames = allocate(sizeof(float) * c.size * (size_t)(1 + (t - 1) * vae->temporal_stride));
    VaeStream *stream = vae_open(vae, half, H, W, collect, &c);
    for (int i = 0; i < t; i++) vae_push(stream, latents + (size_t)i * vae->z_dim * H * W);
    vae_close(stream);
    return c;
}

static void check_stream(const char *path, VaeHalf half) {
    Model model = model_load(path, F32);
    size_t n = (size_t)model.vae.z_dim * T * H * W;
    float *latents = allocate(sizeof(float) * n);
    Generator generator;
    generator_seed(&generator, 1);
    generator_randn(&generator, latents, n);
    Collected whole = decode(&model.vae, half, latents, T), begun = decode(&model.vae, half, latents, 2);
    CHECK(whole.count == 1 + (T - 1) * model.vae.temporal_stride, "%d latent frames became %d frames", T,
          whole.count);
    CHECK(!memcmp(whole.frames, begun.frames, sizeof(float) * begun.size * (size_t)begun.count),
          "the first frames of a clip depend on later ones");
    free(whole.frames), free(begun.frames), free(latents);
    model_free(&model);
}

/* ---------------------------------------------------------------- the encoder as a stream */

enum { FRAMES = 9 };

/* The latents of the first frames of a clip [3,F,Y,X], with the frames that the decoder makes of them at once. */
typedef struct {
    Collected latents, frames;
    VaeStream *decoder;
} Coded;

static void decode_at_once(void *to, float *latents) {
    Coded *coded = to;
    collect(&coded->latents, latents);
    vae_push(coded->decoder, latents);
}

static Coded encode(const Vae *vae, const float *clip, int frames) {
    size_t pixels = (size_t)H * W * vae->spatial_stride * vae->spatial_stride;
    Coded coded = {.latents.size = (size_t)vae->z_dim * H * W, .frames.size = 3 * pixels};
    coded.latents.frames = allocate(sizeof(float) * coded.latents.size * FRAMES);
    coded.frames.frames = allocate(sizeof(float) * coded.frames.size * FRAMES);
    coded.decoder = vae_open(vae, DECODER, H, W, collect, &coded.frames);
    VaeStream *encoder = vae_open(vae, ENCODER, H, W, decode_at_once, &coded);
    float *frame = allocate(sizeof(float) * 3 * pixels);
    for (int f = 0; f < frames; f++) {
        for (int c = 0; c < 3; c++)
            memcpy(frame + c * pixels, clip + ((size_t)c * FRAMES + f) * pixels, sizeof(float) * pixels);
        vae_push(encoder, frame);
    }
    vae_close(encoder), vae_close(coded.decoder);
    free(frame);
    return coded;
}

static float *golden(const char *name, size_t expected) {
    Npy array;
    const char *why = npy_read(test_path(reason("goldens/images/anew/%s.npy", name)), &array);
    if (why || shape_count(&array.shape) != expected) abort();
    float *values = npy_floats(&array);
    npy_free(&array);
    return values;
}

/* By frames, and as a whole; against diffusers' mean, which lies by channels. */
static void check_encoder(void) {
    Model model = model_load(model_path, F32);
    const Vae *vae = &model.vae;
    size_t plane = (size_t)4 * 8, n = (size_t)vae->z_dim * plane;
    float *clip = golden("source", 3 * FRAMES * 16 * 32), *expected = golden("encoded", 3 * n), found[3 * 4 * 4 * 8];
    Coded whole = encode(vae, clip, FRAMES), begun = encode(vae, clip, FRAMES - 1);
    CHECK(whole.latents.count == 3 && begun.latents.count == 2, "%d and %d frames became %d and %d latent ones", FRAMES,
          FRAMES - 1, whole.latents.count, begun.latents.count);
    CHECK(!memcmp(whole.latents.frames, begun.latents.frames, sizeof(float) * n * 2),
          "the first latents depend on later frames");
    for (int f = 0; f < 3; f++)
        for (int c = 0; c < vae->z_dim; c++)
            memcpy(found + ((size_t)c * 3 + f) * plane, whole.latents.frames + f * n + c * plane,
                   sizeof(float) * plane);
    double error = relative_error(found, expected, 3 * n);
    CHECK(error < 1e-5, "the encoder's latents are off from diffusers' by %.1e", error);
    Collected later = decode(vae, DECODER, whole.latents.frames, 3);
    CHECK(whole.frames.count == FRAMES && later.count == FRAMES &&
              !memcmp(whole.frames.frames, later.frames, sizeof(float) * later.size * FRAMES),
          "decoded while it is encoded, a clip is another");
    free(whole.latents.frames), free(whole.frames.frames), free(begun.latents.frames), free(begun.frames.frames);
    free(later.frames), free(clip), free(expected);
    model_free(&model);
}

void test_pipeline(void) {
    for (int p = 0; p < PRECISIONS; p++) check_bits((Precision)p);
    Settings other = settings_of(13), chunks = settings_new(), other_chunks;
    other.width = 32, other.sampler = DPM, other.steps = 3, other.guidance[0] = 1, other.seed = 6;
    chunks.width = 48, chunks.height = 32, chunks.frames = 17, other_chunks = chunks;
    other_chunks.height = 48, other_chunks.frames = 29, other_chunks.window = 5, other_chunks.sink = 1;
    check_again(model_path, settings_of(9), other);
    check_again("tests/goldens/causal/model.gguf", chunks, other_chunks);
    check_narrow(BF16, 40);
    check_narrow(INT8, 30);
    check_image();
    check_stream(model_path, DECODER);
    check_stream("tests/goldens/tiny/model.gguf", DECODER);
    check_stream("tests/goldens/tiny/model.gguf", TINY);
    check_encoder();
}
