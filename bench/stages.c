/* stages.c - whole stages of sora at the released models' shapes, on random weights made in memory.
 *
 * A model of 30 equal blocks costs what its ends cost and 30 times a block, so one block and none are
 * measured and the rest is arithmetic. */
#include "bench/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PROMPT = 40 }; /* tokens of a prompt */

/* ---------------------------------------------------------------- transformer */

static AttentionLayers random_attention(Precision precision, int D) {
    return (AttentionLayers){
        .q = random_linear(precision, D, D), .k = random_linear(precision, D, D),
        .v = random_linear(precision, D, D), .o = random_linear(precision, D, D),
        .norm_q = random_floats((size_t)D), .norm_k = random_floats((size_t)D)};
}

static TransformerBlock random_block(Precision precision, int D, int ffn_dim) {
    return (TransformerBlock){
        .self_attn = random_attention(precision, D), .cross_attn = random_attention(precision, D),
        .norm3_weight = random_floats((size_t)D), .norm3_bias = random_floats((size_t)D),
        .ffn_0 = random_linear(precision, ffn_dim, D), .ffn_2 = random_linear(precision, D, ffn_dim),
        .modulation = random_floats(6 * (size_t)D)};
}

/* Wan 2.1 1.3B with `layers` blocks. */
static Transformer random_transformer(Precision precision, int layers) {
    enum { D = 1536, FFN = 8960, FREQ = 256, TEXT_DIM = 4096, CHANNELS = 16, PATCH = 4 };
    Transformer t = {
        .dim = D, .ffn_dim = FFN, .freq_dim = FREQ, .in_dim = CHANNELS, .out_dim = CHANNELS, .num_heads = 12,
        .num_layers = layers, .text_len = 512, .text_dim = TEXT_DIM, .patch_size = {1, 2, 2}, .eps = 1e-6f,
        .precision = precision,
        .patch_embedding = random_linear(F32, D, CHANNELS * PATCH),
        .text_embedding_0 = random_linear(F32, D, TEXT_DIM), .text_embedding_2 = random_linear(F32, D, D),
        .time_embedding_0 = random_linear(F32, D, FREQ), .time_embedding_2 = random_linear(F32, D, D),
        .time_projection_1 = random_linear(F32, 6 * D, D),
        .blocks = hold(sizeof(TransformerBlock) * (size_t)(layers + 1)),
        .head = random_linear(F32, CHANNELS * PATCH, D), .head_modulation = random_floats(2 * (size_t)D)};
    for (int i = 0; i < layers; i++) t.blocks[i] = random_block(precision, D, FFN);
    return t;
}

typedef struct {
    Transformer t;
    TransformerState state;
    TextContext context;
    KvCache cache;
    Chunk chunk;
    const float *latents;
    float *velocity;
} Forward;

static void lay_out(Forward *f, Arena *arena, int T, int seen, int H, int W) {
    Type type = f->t.precision == F32 ? TYPE_F32 : TYPE_BF16;
    f->state = transformer_state_take(arena, &f->t, T, seen, H, W);
    f->cache = kv_cache_take(arena, &f->t, (Window){.size = seen}, seen > T ? seen : 0, f->state.tokens, type);
    f->cache.frames = seen - T;
    f->context = text_context_take(arena, &f->t, PROMPT);
}

static void run_forward(void *with) {
    Forward *f = with;
    Planes planes = {f->t.in_dim, f->latents};
    transformer_forward(&f->t, &f->state, &f->context, &f->cache, &f->chunk, &planes, f->velocity);
}

/* Seconds of one forward pass through `layers` blocks on latents of T x H x W, which are the last of `seen` frames:
 * the cache holds the others. */
static double bench_transformer(Precision precision, int layers, int T, int seen, int H, int W, int threads) {
    Forward f = {.t = random_transformer(precision, layers)};
    size_t n = (size_t)f.t.in_dim * T * H * W;
    Arena count = {0};
    lay_out(&f, &count, T, seen, H, W);
    Arena arena = arena_open(count.used);
    lay_out(&f, &arena, T, seen, H, W);
    text_context_fill(&f.t, random_floats((size_t)PROMPT * f.t.text_dim), PROMPT, &f.context);
    float *timesteps = hold(sizeof(float) * (size_t)T);
    for (int i = 0; i < T; i++) timesteps[i] = 500;
    f.chunk = (Chunk){seen - T, T, timesteps};
    f.latents = random_floats(n);
    f.velocity = hold(n * sizeof(float));
    static const char *const names[] = {"transformer, no block", "transformer, 1 block",
                                        "transformer, 2 blocks"};
    double flops = transformer_flops(&f.t, T * f.state.tokens, seen * f.state.tokens, f.context.positions);
    double duration = measure(&(Job){"stage", names[layers], precision, T * f.state.tokens, threads, flops, 0,
                                     run_forward, &f});
    arena_close(&arena);
    release();
    return duration;
}

/* ---------------------------------------------------------------- text encoder */

/* umT5-XXL with one block and few tokens to choose from. */
static TextEncoder random_text_encoder(Precision precision) {
    enum { E = 4096, FFN = 10240, HEADS = 64, BUCKETS = 32, VOCABULARY = 1000 };
    TextEncoder e = {.vocab_size = VOCABULARY, .dim = E, .ffn_dim = FFN, .num_heads = HEADS,
                     .head_dim = E / HEADS, .num_layers = 1, .num_buckets = BUCKETS, .max_distance = 128,
                     .eps = 1e-6f, .precision = precision,
                     .token_embedding = random_linear(precision, VOCABULARY, E).weight,
                     .blocks = hold(sizeof(TextBlock)), .norm = random_floats(E)};
    e.blocks[0] = (TextBlock){
        .norm1 = random_floats(E), .norm2 = random_floats(E),
        .q = random_linear(precision, E, E), .k = random_linear(precision, E, E),
        .v = random_linear(precision, E, E), .o = random_linear(precision, E, E),
        .pos_embedding = random_floats(BUCKETS * HEADS),
        .gate = random_linear(precision, FFN, E), .fc1 = random_linear(precision, FFN, E),
        .fc2 = random_linear(precision, E, FFN)};
    return e;
}

typedef struct {
    TextEncoder encoder;
    int32_t *ids;
    int n;
    float *embeds;
} Encoding;

static void run_encoding(void *with) {
    Encoding *e = with;
    text_encode(&e->encoder, e->ids, e->n, e->embeds);
}

static void bench_text_encoder(Precision precision, int n, int threads) {
    Encoding e = {.encoder = random_text_encoder(precision), .n = n};
    e.ids = hold(sizeof(int32_t) * (size_t)n);
    e.embeds = hold(sizeof(float) * (size_t)n * e.encoder.dim);
    for (int i = 0; i < n; i++) e.ids[i] = i % e.encoder.vocab_size;
    double parameters = (double)e.encoder.dim * (4.0 * e.encoder.dim + 3.0 * e.encoder.ffn_dim);
    measure(&(Job){"stage", "text encoder, 1 block", precision, n, threads, text_encoder_flops(&e.encoder, n),
                   parameters * (precision == F32 ? 4 : 2), run_encoding, &e});
    release();
}

/* ---------------------------------------------------------------- VAE */

static Conv random_conv(Precision precision, int O, int I, int kt, int k) {
    return (Conv){.layer = random_linear(precision, O, kt * k * k * I), .kt = kt, .kh = k, .kw = k,
                  .in = I, .out = O, .up = 1, .stride = 1};
}

/* A residual layer if the kernel is 3x3x3 twice, else one with a single convolution. */
static VaeLayer random_layer(Precision precision, VaeLayerKind kind, int O, int I, int kt, int k) {
    VaeLayer layer = {.kind = kind, .conv1 = random_conv(precision, O, I, kt, k)};
    if (kind == RESIDUAL || kind == ATTENTION) layer.norm1 = random_floats((size_t)I);
    if (kind == RESIDUAL) {
        layer.norm2 = random_floats((size_t)O);
        layer.conv2 = random_conv(precision, O, O, kt, k);
        if (I != O) layer.shortcut = random_conv(precision, O, I, 1, 1);
    }
    if (kind == ATTENTION) layer.conv2 = random_conv(precision, I, I, kt, k);
    return layer;
}

/* The decoder of Wan 2.1: four levels of 384, 384, 192 and 96 channels; the first two
 * double the frame rate. */
static Vae random_vae(Precision precision) {
    enum { LEVELS = 4, BLOCKS = 3, Z = 16, TOP = 384, MOST = 32 };
    static const int channels[LEVELS] = {384, 384, 192, 96};
    Vae vae = {.z_dim = Z, .patch_size = 1, .temporal_stride = 4, .spatial_stride = 8, .precision = precision,
               .latents_mean = random_floats(Z), .latents_std = random_floats(Z)};
    VaeLayers *list = &vae.halves[DECODER];
    list->layers = hold(sizeof(VaeLayer) * MOST);
#define ADD(...) list->layers[list->count++] = random_layer(precision, __VA_ARGS__)
    ADD(CONVOLUTION, Z, Z, 1, 1);
    ADD(CONVOLUTION, TOP, Z, 3, 3);
    ADD(RESIDUAL, TOP, TOP, 3, 3);
    ADD(ATTENTION, 3 * TOP, TOP, 1, 1);
    ADD(RESIDUAL, TOP, TOP, 3, 3);
    for (int i = 0, in = TOP; i < LEVELS; i++) {
        int out = channels[i];
        for (int j = 0; j < BLOCKS; j++, in = out) ADD(RESIDUAL, out, in, 3, 3);
        if (i == LEVELS - 1) break;
        if (i < 2) ADD(UPSAMPLE_TIME, 2 * out, out, 3, 1);
        ADD(CONVOLUTION, in = out / 2, out, 1, 3);
        list->layers[list->count - 1].conv1.up = 2;
    }
    ADD(CONVOLUTION, 3, channels[LEVELS - 1], 3, 3);
#undef ADD
    list->layers[list->count - 1].norm1 = random_floats((size_t)channels[LEVELS - 1]);
    return vae;
}

typedef struct {
    Vae vae;
    const float *latents;
    int T, H, W;
} Decoding;

static void forget(void *to, float *frame) {
    (void)to, (void)frame;
}

static void run_decoding(void *with) {
    Decoding *d = with;
    VaeStream *stream = vae_open(&d->vae, DECODER, d->H, d->W, forget, NULL);
    for (int t = 0; t < d->T; t++) vae_push(stream, d->latents + (size_t)t * d->vae.z_dim * d->H * d->W);
    vae_close(stream);
}

/* Seconds of T latent frames of H x W: 4T-3 frames of 8H x 8W pixels. With a length, those of a clip of so many latent
 * frames, at the same operations a second. */
static double bench_vae(Precision precision, int T, int H, int W, int threads, int length) {
    Decoding d = {.vae = random_vae(precision), .T = T, .H = H, .W = W};
    d.latents = random_floats((size_t)d.vae.z_dim * T * H * W);
    double flops = vae_flops(&d.vae, DECODER, T, H, W);
    double duration = measure(&(Job){"stage", "VAE decode", precision, 4 * T - 3, threads, flops, 0, run_decoding, &d});
    if (length) duration *= vae_flops(&d.vae, DECODER, length, H, W) / flops;
    release();
    return duration;
}

/* ---------------------------------------------------------------- what is measured */

static void bench_on(int threads) {
    for (Precision p = F32; p < PRECISIONS; p++) {
        bench_transformer(p, 0, 5, 5, 32, 32, threads);
        bench_transformer(p, 1, 5, 5, 32, 32, threads);
        if (p == INT8) break;
        bench_text_encoder(p, PROMPT, threads);
        bench_vae(p, 2, 8, 8, threads, 0);
    }
}

void bench_stages(void) {
    bench_on(1);
    if (threads_count() > 1) bench_on(threads_count());
}

/* Tokens double up to those of 81 frames at 480x832; frames of the decoder are 128x128 pixels. */
void bench_growth(void) {
    static const int sizes[][3] = {{1, 32, 32}, {2, 32, 32}, {4, 32, 32}, {5, 44, 44}, {5, 60, 104},
                                   {10, 60, 104}, {21, 60, 104}};
    for (Precision p = F32; p < PRECISIONS; p++)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            for (int layers = 0; layers <= 1; layers++)
                bench_transformer(p, layers, sizes[i][0], sizes[i][0], sizes[i][1], sizes[i][2], 0);
    for (Precision p = F32; p <= BF16; p++)
        for (int T = 1; T <= 5; T++) bench_vae(p, T, 16, 16, 0, 0);
    for (int threads = 1; threads <= threads_count(); threads++)
        for (Precision p = F32; p < PRECISIONS; p++) bench_transformer(p, 1, 5, 5, 32, 32, threads);
}

/* A minute made in chunks of 3 latent frames, in f32: 961 frames, 241 latent ones, 81 chunks of 5 passes each (4 steps,
 * and the one that fills the cache). Each pass sees 12 latent frames, as in LongLive. One pass through one block and
 * through none is measured, and the decoder on 5 frames of the smaller size; the rest is arithmetic. */
void bench_minute(void) {
    enum { CHUNK = 3, WINDOW = 12, BLOCKS = 30, PASSES = 5, CHUNKS = 81, LATENT_FRAMES = 241, W = 52, H = 30 };
    double decoding = bench_vae(F32, 2, H, W, 0, LATENT_FRAMES);
    for (int scale = 1; scale <= 2; scale++) {
        double ends = bench_transformer(F32, 0, CHUNK, WINDOW, scale * H, scale * W, 0),
               pass = ends + BLOCKS * (bench_transformer(F32, 1, CHUNK, WINDOW, scale * H, scale * W, 0) - ends),
               decoded = scale * scale * decoding;
        printf("%dx%d: a pass %.1f s; a chunk %.0f s, decoding it %.0f s; a minute %.1f h, %.1f h of them decoding\n",
               scale * 8 * W, scale * 8 * H, pass, PASSES * pass, decoded / CHUNKS,
               (CHUNKS * PASSES * pass + decoded) / 3600, decoded / 3600);
    }
}

void bench_stage(const char *name, Precision precision, const char *size, int threads) {
    int width = atoi(size), height = width;
    sscanf(size, "%dx%d", &width, &height);
    if (!strcmp(name, "transformer")) bench_transformer(precision, 2, 5, 5, height / 8, width / 8, threads);
    else if (!strcmp(name, "text_encoder")) bench_text_encoder(precision, width, threads);
    else if (!strcmp(name, "attention")) bench_attention(precision, width, width, threads);
    else if (!strcmp(name, "vae_decode")) bench_vae(precision, 2, height / 8, width / 8, threads, 0);
    else die(STATUS_USAGE, "'%s' is no stage", name);
}
