/* transformer.c - latents, text, time -> velocity: the diffusion transformer of Wan 2.1 (Wan Team, 2025).
 *
 * The latents [C,T,H,W] are cut into patches; each patch is a token, ordered (t, h, w). A block is
 *
 *   s1, c1, g1, s2, c2, g2 = modulation + time          (shift, scale, gate; twice)
 *   x += g1 * o(self attention(norm(x) * (1 + c1) + s1))     RoPE on queries and keys
 *   x += o(cross attention(norm3(x), text))
 *   x += g2 * ffn(norm(x) * (1 + c2) + s2)
 *
 * and the head is one more modulated norm and a linear layer back to patches. Follows WanTransformer3DModel
 * of diffusers and wan/modules/model.py of the original release, whose names the fields carry (the original's
 * norm3 is diffusers' norm2).
 *
 * Pitfalls. Queries and keys are normalised over all heads at once, before they are cut into heads. The text
 * is padded with zeros to 512 positions and no mask hides them: the padding takes part in cross attention.
 * Angles of RoPE are computed in double. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static AttentionLayers bind_attention(const WeightFile *file, const Transformer *t, int block,
                                      const char *name) {
    int D = t->dim;
    return (AttentionLayers){
        .q = linear_bind(file, t->precision, D, D, BIAS, "blocks.%d.%s.q", block, name),
        .k = linear_bind(file, t->precision, D, D, BIAS, "blocks.%d.%s.k", block, name),
        .v = linear_bind(file, t->precision, D, D, BIAS, "blocks.%d.%s.v", block, name),
        .o = linear_bind(file, t->precision, D, D, BIAS, "blocks.%d.%s.o", block, name),
        .norm_q = weights_floats(file, D, "blocks.%d.%s.norm_q.weight", block, name),
        .norm_k = weights_floats(file, D, "blocks.%d.%s.norm_k.weight", block, name),
    };
}

static TransformerBlock bind_block(const WeightFile *file, const Transformer *t, int i) {
    return (TransformerBlock){
        .self_attn = bind_attention(file, t, i, "self_attn"),
        .cross_attn = bind_attention(file, t, i, "cross_attn"),
        .ffn_0 = linear_bind(file, t->precision, t->ffn_dim, t->dim, BIAS, "blocks.%d.ffn.0", i),
        .ffn_2 = linear_bind(file, t->precision, t->dim, t->ffn_dim, BIAS, "blocks.%d.ffn.2", i),
        .norm3_weight = weights_floats(file, t->dim, "blocks.%d.norm3.weight", i),
        .norm3_bias = weights_floats(file, t->dim, "blocks.%d.norm3.bias", i),
        .modulation = weights_floats(file, 6 * t->dim, "blocks.%d.modulation", i),
    };
}

static int patch_volume(const Transformer *t) {
    return t->patch_size[0] * t->patch_size[1] * t->patch_size[2];
}

static void read_config(const WeightFile *file, Transformer *t) {
    t->dim = weights_size(file, "wan.dim", 1 << 16);
    t->ffn_dim = weights_size(file, "wan.ffn_dim", 1 << 18);
    t->freq_dim = weights_size(file, "wan.freq_dim", 1 << 16);
    t->in_dim = weights_size(file, "wan.in_dim", 1 << 12);
    t->out_dim = weights_size(file, "wan.out_dim", 1 << 12);
    t->num_heads = weights_size(file, "wan.num_heads", 1 << 10);
    t->num_layers = weights_size(file, "wan.num_layers", 1 << 10);
    t->text_len = weights_size(file, "wan.text_len", 1 << 12);
    t->text_dim = weights_size(file, "wan.text_dim", 1 << 16);
    t->eps = (float)weights_double(file, "wan.eps");
    weights_sizes(file, "wan.patch_size", 16, t->patch_size, 3);
    if (t->patch_size[0] != 1)
        weights_refuse(file, "wan.patch_size %d in time: only patches within a frame are run",
                       t->patch_size[0]);
    if (!weights_bool_or(file, "wan.cross_attn_norm", true))
        weights_refuse(file, "wan.cross_attn_norm is false: such blocks are not run");
    if (t->freq_dim % 2) weights_refuse(file, "wan.freq_dim %d is odd", t->freq_dim);
    if (t->dim % t->num_heads || t->dim / t->num_heads % 2)
        weights_refuse(file, "wan.dim %d is not wan.num_heads %d heads of even width", t->dim,
                       t->num_heads);
}

/* What is small next to the blocks stays in float32 whatever the precision:
 * both ends, and what they are told. */
Transformer transformer_load(const WeightFile *file, Precision precision) {
    Transformer t = {.precision = precision};
    read_config(file, &t);
    int D = t.dim, patch = patch_volume(&t);
    t.patch_embedding = linear_bind(file, F32, D, t.in_dim * patch, BIAS, "patch_embedding");
    t.text_embedding_0 = linear_bind(file, F32, D, t.text_dim, BIAS, "text_embedding.0");
    t.text_embedding_2 = linear_bind(file, F32, D, D, BIAS, "text_embedding.2");
    t.time_embedding_0 = linear_bind(file, F32, D, t.freq_dim, BIAS, "time_embedding.0");
    t.time_embedding_2 = linear_bind(file, F32, D, D, BIAS, "time_embedding.2");
    t.time_projection_1 = linear_bind(file, F32, 6 * D, D, BIAS, "time_projection.1");
    t.blocks = allocate(sizeof *t.blocks * (size_t)t.num_layers);
    for (int i = 0; i < t.num_layers; i++) t.blocks[i] = bind_block(file, &t, i);
    t.head = linear_bind(file, F32, t.out_dim * patch, D, BIAS, "head.head");
    t.head_modulation = weights_floats(file, 2 * D, "head.modulation");
    return t;
}

void transformer_free(Transformer *transformer) {
    free(transformer->blocks);
}

/* ---------------------------------------------------------------- the prompt, once */

TextContext text_context_take(Arena *arena, const Transformer *t, int n) {
    TextContext context = {.positions = n < t->text_len ? n + 1 : n};
    size_t size = (size_t)t->num_layers * context.positions * t->dim;
    context.bias = arena_floats(arena, context.positions); /* zeros */
    context.keys = arena_floats(arena, size);
    context.values = arena_floats(arena, size);
    if (arena->base && n < t->text_len) context.bias[n] = (float)log(t->text_len - n);
    return context;
}

void transformer_read(const Transformer *t, const float *embeds, int n, TextContext *context) {
    int D = t->dim, positions = context->positions;
    float *text = allocate(sizeof(float) * (size_t)positions * t->text_dim);
    float *hidden = allocate(sizeof(float) * (size_t)positions * D);
    float *embedded = allocate(sizeof(float) * (size_t)positions * D);
    memcpy(text, embeds, sizeof(float) * (size_t)n * t->text_dim);
    linear(hidden, text, positions, &t->text_embedding_0);
    gelu(hidden, hidden, (size_t)positions * D);
    linear(embedded, hidden, positions, &t->text_embedding_2);
    for (int i = 0; i < t->num_layers; i++) {
        const AttentionLayers *attn = &t->blocks[i].cross_attn;
        size_t at = (size_t)i * positions * D;
        linear(context->keys + at, embedded, positions, &attn->k);
        rms_norm(context->keys + at, context->keys + at, positions, D, attn->norm_k, t->eps);
        linear(context->values + at, embedded, positions, &attn->v);
    }
    free(text);
    free(hidden);
    free(embedded);
}

/* ---------------------------------------------------------------- positions and time */

/* Angles of one axis: pos / 10000^(2i/dim), i < dim/2, into columns [0, dim/2) of a row. With Wan's heads,
 * which are 128 wide, every C library gives the same floats up to position 849 in time (3,397 frames) and 1023 in
 * space (tests/test_libm.c). At 850 one cosine is -5e-7, whose last bits are those of the power. */
static void rope_axis(float *cosine, float *sine, int pos, int dim) {
    for (int i = 0; i < dim / 2; i++) {
        double angle = pos / pow(10000.0, 2.0 * i / dim);
        cosine[i] = (float)cos(angle);
        sine[i] = (float)sin(angle);
    }
}

/* The pairs of a head are shared out to the axes: a third each for h and w, what is left for t. */
static void rope_table(const Transformer *t, TransformerState *s) {
    int d = t->dim / t->num_heads, spatial = 2 * (d / 6), temporal = d - 2 * spatial;
    int rows = s->H / t->patch_size[1], columns = s->W / t->patch_size[2];
    for (int l = 0; l < s->L; l++) {
        float *c = s->cosine + (size_t)l * (d / 2), *si = s->sine + (size_t)l * (d / 2);
        rope_axis(c, si, l / (rows * columns), temporal);
        rope_axis(c + temporal / 2, si + temporal / 2, l / columns % rows, spatial);
        rope_axis(c + (temporal + spatial) / 2, si + (temporal + spatial) / 2, l % columns, spatial);
    }
}

TransformerState transformer_state_take(Arena *arena, const Transformer *t, int T, int H, int W) {
    int D = t->dim, L = T * H * W / patch_volume(t);
    size_t angles = (size_t)L * (D / t->num_heads / 2);
    int channels = t->in_dim > t->out_dim ? t->in_dim : t->out_dim;
    size_t wide = larger(larger(3 * D, t->ffn_dim), channels * patch_volume(t));
    TransformerState s = {.T = T, .H = H, .W = W, .L = L};
    s.cosine = arena_floats(arena, angles);
    s.sine = arena_floats(arena, angles);
    s.x = arena_floats(arena, (size_t)L * D);
    s.y = arena_floats(arena, (size_t)L * D);
    s.wide = arena_floats(arena, larger((size_t)L * wide, t->freq_dim));
    s.time = arena_floats(arena, D);
    s.modulation = arena_floats(arena, 6 * (size_t)D);
    s.e = arena_floats(arena, 6 * (size_t)D);
    if (arena->base) rope_table(t, &s);
    return s;
}

/* The angles are rounded to float32 as in diffusers' get_timestep_embedding; the original release computes
 * them in double, which at t = 1000 differs by 3e-5 and shows in the velocity as 1e-5 of its range. */
void timestep_sinusoids(float *out, int freq_dim, float timestep) {
    int half = freq_dim / 2;
    for (int i = 0; i < half; i++) {
        float frequency = (float)exp(-(float)log(10000.0) * (float)i / (float)half);
        float angle = timestep * frequency;
        out[i] = (float)cos(angle);
        out[half + i] = (float)sin(angle);
    }
}

/* time (D) and modulation (6,D) from a timestep: sinusoids, an MLP, and its projection. */
static void embed_time(const Transformer *t, TransformerState *s, float timestep) {
    int D = t->dim;
    float *sinusoid = s->wide, *hidden = s->y;
    timestep_sinusoids(sinusoid, t->freq_dim, timestep);
    linear(hidden, sinusoid, 1, &t->time_embedding_0);
    silu(hidden, hidden, D);
    linear(s->time, hidden, 1, &t->time_embedding_2);
    silu(hidden, s->time, D);
    linear(s->modulation, hidden, 1, &t->time_projection_1);
}

/* ---------------------------------------------------------------- the forward pass */

/* Offset in one channel [T,H,W] of the latents of an element (pt,ph,pw) of token l's patch. */
static size_t patch_offset(const Transformer *t, const TransformerState *s, int l, int element) {
    const int *p = t->patch_size;
    int rows = s->H / p[1], columns = s->W / p[2];
    int frame = l / (rows * columns) * p[0] + element / (p[1] * p[2]);
    int row = l / columns % rows * p[1] + element / p[2] % p[1];
    return ((size_t)frame * s->H + row) * s->W + l % columns * p[2] + element % p[2];
}

/* Patches are embedded as a convolution's rows, (C,pt,ph,pw), ... */
static void embed_patches(const Transformer *t, TransformerState *s, const float *latents) {
    size_t channel = (size_t)s->T * s->H * s->W;
    float *out = s->wide;
    for (int l = 0; l < s->L; l++)
        for (int c = 0; c < t->in_dim; c++)
            for (int i = 0; i < patch_volume(t); i++)
                *out++ = latents[c * channel + patch_offset(t, s, l, i)];
    linear(s->x, s->wide, s->L, &t->patch_embedding);
}

/* ... and come out of the head as (pt,ph,pw,C), channels innermost. */
static void unpatch(const Transformer *t, const TransformerState *s, const float *patches, float *velocity) {
    size_t channel = (size_t)s->T * s->H * s->W;
    for (int l = 0; l < s->L; l++)
        for (int i = 0; i < patch_volume(t); i++)
            for (int c = 0; c < t->out_dim; c++)
                velocity[c * channel + patch_offset(t, s, l, i)] = *patches++;
}

static void self_attention(const Transformer *t, TransformerState *s, const AttentionLayers *attn) {
    int D = t->dim, d = D / t->num_heads, L = s->L;
    float *q = s->wide, *k = q + (size_t)L * D, *v = k + (size_t)L * D;
    linear(q, s->y, L, &attn->q);
    linear(k, s->y, L, &attn->k);
    linear(v, s->y, L, &attn->v);
    rms_norm(q, q, L, D, attn->norm_q, t->eps);
    rms_norm(k, k, L, D, attn->norm_k, t->eps);
    rope(q, L, t->num_heads, d, s->cosine, s->sine);
    rope(k, L, t->num_heads, d, s->cosine, s->sine);
    attention(&(Attention){.precision = t->precision, .q = q, .k = k, .v = v, .out = s->y, .queries = L,
                           .keys = L, .heads = t->num_heads, .d = d, .q_stride = D, .kv_stride = D,
                           .out_stride = D, .scale = 1.0f / sqrtf((float)d)});
    linear(q, s->y, L, &attn->o); /* into wide, where queries were */
}

static void cross_attention(const Transformer *t, TransformerState *s, const AttentionLayers *attn,
                            const TextContext *context, int block) {
    int D = t->dim, d = D / t->num_heads, L = s->L;
    size_t at = (size_t)block * context->positions * D;
    float *q = s->wide;
    linear(q, s->y, L, &attn->q);
    rms_norm(q, q, L, D, attn->norm_q, t->eps);
    attention(&(Attention){.precision = t->precision, .q = q, .k = context->keys + at,
                           .v = context->values + at, .out = s->y, .queries = L,
                           .keys = context->positions, .heads = t->num_heads, .d = d, .q_stride = D,
                           .kv_stride = D, .out_stride = D, .scale = 1.0f / sqrtf((float)d),
                           .bias = context->bias});
    linear(q, s->y, L, &attn->o);
}

static void forward_block(const Transformer *t, TransformerState *s, const TextContext *context, int i) {
    const TransformerBlock *block = &t->blocks[i];
    int D = t->dim, L = s->L;
    float *e = s->e;
    for (int j = 0; j < 6 * D; j++) e[j] = block->modulation[j] + s->modulation[j];
    for (int j = 0; j < D; j++) {
        e[D + j] += 1.0f; /* the scales */
        e[4 * D + j] += 1.0f;
    }

    layer_norm(s->y, s->x, L, D, t->eps, e + D, e);
    self_attention(t, s, &block->self_attn);
    add_gated(s->x, s->wide, L, D, e + 2 * D);

    layer_norm(s->y, s->x, L, D, t->eps, block->norm3_weight, block->norm3_bias);
    cross_attention(t, s, &block->cross_attn, context, i);
    add(s->x, s->wide, (size_t)L * D);

    layer_norm(s->y, s->x, L, D, t->eps, e + 4 * D, e + 3 * D);
    linear(s->wide, s->y, L, &block->ffn_0);
    gelu(s->wide, s->wide, (size_t)L * t->ffn_dim);
    linear(s->y, s->wide, L, &block->ffn_2);
    add_gated(s->x, s->y, L, D, e + 5 * D);
}

void transformer_forward(const Transformer *t, TransformerState *s, const TextContext *context,
                         const float *latents, float timestep, float *velocity) {
    int D = t->dim;
    embed_time(t, s, timestep);
    embed_patches(t, s, latents);
    for (int i = 0; i < t->num_layers; i++) {
        forward_block(t, s, context, i);
        tap(s->x, SHAPE(s->L, D), "block%02d", i);
    }
    for (int j = 0; j < D; j++) {
        s->e[j] = t->head_modulation[j] + s->time[j];
        s->e[D + j] = t->head_modulation[D + j] + s->time[j] + 1.0f;
    }
    layer_norm(s->y, s->x, s->L, D, t->eps, s->e + D, s->e);
    linear(s->wide, s->y, s->L, &t->head);
    unpatch(t, s, s->wide, velocity);
    tap(velocity, SHAPE(t->out_dim, s->T, s->H, s->W), "velocity");
}

double transformer_flops(const Transformer *t, int L, int positions) {
    double D = t->dim, patch = patch_volume(t);
    double block = 2.0 * L * D * (6 * D + 2.0 * t->ffn_dim) + 4.0 * L * D * (L + positions);
    return t->num_layers * block + 2.0 * L * D * patch * (t->in_dim + t->out_dim);
}
