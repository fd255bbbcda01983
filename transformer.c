/* transformer.c - latents, text, timestep -> velocity: the diffusion transformer of Wan 2.1 and 2.2 (Wan Team, 2025).
 *
 * Takes a chunk's latents (frames,in_dim,H,W), a timestep for each frame, and a prompt as a TextContext. Gives the
 * velocity (frames,out_dim,H,W). An image-to-video model reads more channels than it gives: the latents, then a mask
 * and an encoded picture. Latents are cut into patches of 1 x ph x pw; a patch is a token. Tokens are ordered (t, h,
 * w), and L = frames * H/ph * W/pw.
 *
 *   e0 = time_embedding(sinusoids(timestep))              (frames,D)      linear, silu, linear
 *   e  = time_projection(silu(e0))                        (frames,6,D)
 *   x  = patch_embedding(patches)                         (L,D)
 *   each block:
 *     s1, c1, g1, s2, c2, g2 = modulation + e             shift, scale, gate: of self attention, of the FFN
 *     x += g1 * o(self attention(norm(x) * (1 + c1) + s1))     RoPE on q and k; the cache holds earlier frames
 *     x += o(cross attention(norm3(x), text))
 *     x += g2 * ffn(norm(x) * (1 + c2) + s2)                   linear, gelu, linear
 *   s, c = head_modulation + e0
 *   velocity = unpatch(head(norm(x) * (1 + c) + s))
 *
 * Follows WanTransformer3DModel of diffusers and wan/modules/model.py of the original release. Fields have the
 * original's names (its norm3 is diffusers' norm2).
 *
 * Pitfalls:
 *   - q and k are RMS-normalised over all D channels at once, before they are cut into heads.
 *   - The text is padded with zeros to text_len positions (512), and cross attention reads the padding, too.
 *   - RoPE angles are computed in double.
 *   - norm is a LayerNorm without weights; norm3 has weight and bias. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static AttentionLayers bind_attention(const WeightFile *file, const Transformer *t, const char *block,
                                      const char *name) {
    int D = t->dim;
    return (AttentionLayers){
        .q = linear_bind(file, t->precision, D, D, BIAS, "%s.%s.q", block, name),
        .k = linear_bind(file, t->precision, D, D, BIAS, "%s.%s.k", block, name),
        .v = linear_bind(file, t->precision, D, D, BIAS, "%s.%s.v", block, name),
        .o = linear_bind(file, t->precision, D, D, BIAS, "%s.%s.o", block, name),
        .norm_q = weights_floats(file, D, "%s.%s.norm_q.weight", block, name),
        .norm_k = weights_floats(file, D, "%s.%s.norm_k.weight", block, name),
    };
}

static TransformerBlock bind_block(const WeightFile *file, const Transformer *t, const char *prefix, int i) {
    char *name = format_string("%sblocks.%d", prefix, i);
    TransformerBlock block = {
        .self_attn = bind_attention(file, t, name, "self_attn"),
        .cross_attn = bind_attention(file, t, name, "cross_attn"),
        .ffn_0 = linear_bind(file, t->precision, t->ffn_dim, t->dim, BIAS, "%s.ffn.0", name),
        .ffn_2 = linear_bind(file, t->precision, t->dim, t->ffn_dim, BIAS, "%s.ffn.2", name),
        .norm3_weight = weights_floats(file, t->dim, "%s.norm3.weight", name),
        .norm3_bias = weights_floats(file, t->dim, "%s.norm3.bias", name),
        .modulation = weights_floats(file, 6 * t->dim, "%s.modulation", name),
    };
    free(name);
    return block;
}

static int patch_volume(const Transformer *t) {
    return t->patch_size[0] * t->patch_size[1] * t->patch_size[2];
}

static void read_config(const WeightFile *file, Transformer *t) {
    t->dim = weights_size(file, "wan.dim", MAX_WIDTH);
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
        weights_refuse(file, "wan.patch_size is %d in time, expected 1", t->patch_size[0]);
    if (!weights_bool_or(file, "wan.cross_attn_norm", true))
        weights_refuse(file, "wan.cross_attn_norm is false, expected true");
    if (t->freq_dim % 2) weights_refuse(file, "wan.freq_dim is %d, expected an even number", t->freq_dim);
    if (t->dim % t->num_heads || t->dim / t->num_heads % 2)
        weights_refuse(file, "wan.dim is %d, expected wan.num_heads (%d) times an even number", t->dim, t->num_heads);
}

/* The embeddings and the head stay in float32 at every precision: they are a small share of the operations. */
Transformer transformer_load(const WeightFile *file, Precision precision, const char *prefix) {
    Transformer t = {.precision = precision};
    read_config(file, &t);
    int D = t.dim, patch = patch_volume(&t);
    t.patch_embedding = linear_bind(file, F32, D, t.in_dim * patch, BIAS, "%spatch_embedding", prefix);
    t.text_embedding_0 = linear_bind(file, F32, D, t.text_dim, BIAS, "%stext_embedding.0", prefix);
    t.text_embedding_2 = linear_bind(file, F32, D, D, BIAS, "%stext_embedding.2", prefix);
    t.time_embedding_0 = linear_bind(file, F32, D, t.freq_dim, BIAS, "%stime_embedding.0", prefix);
    t.time_embedding_2 = linear_bind(file, F32, D, D, BIAS, "%stime_embedding.2", prefix);
    t.time_projection_1 = linear_bind(file, F32, 6 * D, D, BIAS, "%stime_projection.1", prefix);
    t.blocks = allocate(sizeof *t.blocks * (size_t)t.num_layers);
    for (int i = 0; i < t.num_layers; i++) t.blocks[i] = bind_block(file, &t, prefix, i);
    t.head = linear_bind(file, F32, t.out_dim * patch, D, BIAS, "%shead.head", prefix);
    t.head_modulation = weights_floats(file, 2 * D, "%shead.modulation", prefix);
    return t;
}

void transformer_free(Transformer *transformer) {
    free(transformer->blocks);
}

/* ---------------------------------------------------------------- text: once a prompt */

TextContext text_context_take(Arena *arena, const Transformer *t, int n) {
    TextContext context = {.positions = n < t->text_len ? n + 1 : n};
    size_t size = (size_t)t->num_layers * context.positions * t->dim;
    context.bias = arena_floats(arena, context.positions); /* arenas are zeroed */
    context.keys = arena_floats(arena, size);
    context.values = arena_floats(arena, size);
    if (arena->base && n < t->text_len) context.bias[n] = (float)log(t->text_len - n);
    return context;
}

void text_context_fill(const Transformer *t, const float *embeds, int n, TextContext *context) {
    int D = t->dim, positions = context->positions;
    float *text = allocate(sizeof(float) * (size_t)positions * t->text_dim); /* (positions, text_dim): zeros after n */
    float *hidden = allocate(sizeof(float) * (size_t)positions * D);         /* (positions, D) */
    float *embedded = allocate(sizeof(float) * (size_t)positions * D);       /* (positions, D) */
    memcpy(text, embeds, sizeof(float) * (size_t)n * t->text_dim);
    linear(hidden, text, positions, &t->text_embedding_0);
    gelu(rows_of(F32, hidden, NULL, positions, D), hidden, NULL);
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

size_t text_context_fill_memory(const Transformer *t, int n) {
    return sizeof(float) * (size_t)smaller(n + 1, t->text_len) * (t->text_dim + 2 * t->dim);
}

size_t text_context_fill_scratch(const Transformer *t, int n) {
    int positions = smaller(n + 1, t->text_len);
    size_t products = larger_size(linear_memory(&t->text_embedding_0, positions),
                                  linear_memory(&t->text_embedding_2, positions));
    return larger_size(products, linear_memory(&t->blocks->cross_attn.k, positions));
}

/* ---------------------------------------------------------------- positions and timesteps */

/* Angle i is pos / 10000^(i/pairs). With Wan's head width of 128, every C library gives the same float32 values up to
 * position 849 in time (3,397 video frames) and 1023 in space (tests/test_libm.c). At position 850 one cosine is -5e-7,
 * where the rounding of pow() shows. */
void rope_angles(float *angles, int pos, int pairs) {
    for (int i = 0; i < pairs; i++) {
        double angle = pos / pow(10000.0, 2.0 * i / (2 * pairs)); /* as upstream's 2i/dim */
        angles[i] = (float)cos(angle);
        angles[pairs + i] = (float)sin(angle);
    }
}

/* A head has d/2 pairs (x[2i], x[2i+1]). RoPE rotates them by the token's position on one of three axes:
 *
 *   pair   0 ............ 21 | 22 ...... 42 | 43 ...... 63        d = 128: 22 pairs for t, 21 for h, 21 for w
 *   axis          t          |      h       |      w */
static Rope rope_take(Arena *arena, const Transformer *t, int frames, int H, int W) {
    int pairs = t->dim / t->num_heads / 2;
    Rope r = {.rows = H / t->patch_size[1], .columns = W / t->patch_size[2], .spatial = pairs / 3};
    r.temporal = pairs - 2 * r.spatial;
    r.time = arena_floats(arena, 2 * (size_t)frames * r.temporal);
    r.row = arena_floats(arena, 2 * (size_t)r.rows * r.spatial);
    r.column = arena_floats(arena, 2 * (size_t)r.columns * r.spatial);
    if (!arena->base) return r;
    for (int i = 0; i < r.rows; i++) rope_angles(r.row + 2 * i * r.spatial, i, r.spatial);
    for (int i = 0; i < r.columns; i++) rope_angles(r.column + 2 * i * r.spatial, i, r.spatial);
    return r;
}

TransformerState transformer_state_take(Arena *arena, const Transformer *t, int frames, int seen, int H, int W) {
    int D = t->dim, channels = t->in_dim > t->out_dim ? t->in_dim : t->out_dim;
    TransformerState s = {.H = H, .W = W, .rope = rope_take(arena, t, seen, H, W)};
    s.tokens = s.rope.rows * s.rope.columns;
    size_t L = (size_t)frames * s.tokens, keys = (size_t)seen * s.tokens;
    size_t wide = larger_size(larger_size(L * D + 2 * keys * D, L * t->ffn_dim), L * channels * patch_volume(t));
    s.x = arena_floats(arena, L * D);
    s.y = arena_floats(arena, L * D);
    s.wide = arena_floats(arena, larger_size(wide, (size_t)frames * t->freq_dim));
    s.narrow = arena_take(arena, rows_memory(t->precision, (int)L, larger(D, t->ffn_dim)));
    s.time = arena_floats(arena, (size_t)frames * D);
    s.modulation = arena_floats(arena, 6 * (size_t)frames * D);
    s.e = arena_floats(arena, 6 * (size_t)frames * D);
    return s;
}

/* Frequency i is 10000^(-i/half). Angles are rounded to float32, as in diffusers' get_timestep_embedding. The original
 * release computes them in double; at t = 1000 they differ by 3e-5, which changes the velocity by 1e-5 of its range. */
void timestep_sinusoids(float *out, int freq_dim, float timestep) {
    int half = freq_dim / 2;
    for (int i = 0; i < half; i++) {
        float frequency = (float)exp(-(float)log(10000.0) * (float)i / (float)half);
        float angle = timestep * frequency;
        out[i] = (float)cos(angle);
        out[half + i] = (float)sin(angle);
    }
}

/* time (frames,D) and modulation (frames,6,D) from the timesteps [frames] */
static void embed_time(const Transformer *t, TransformerState *s, const Chunk *chunk) {
    int D = t->dim, frames = chunk->frames;
    float *sinusoids = s->wide, *hidden = s->y;
    for (int f = 0; f < frames; f++)
        timestep_sinusoids(sinusoids + f * t->freq_dim, t->freq_dim, chunk->timesteps[f]);
    linear(hidden, sinusoids, frames, &t->time_embedding_0);
    silu(hidden, hidden, (size_t)frames * D);
    linear(s->time, hidden, frames, &t->time_embedding_2);
    silu(hidden, s->time, (size_t)frames * D);
    linear(s->modulation, hidden, frames, &t->time_projection_1);
}

/* ---------------------------------------------------------------- the forward pass */

/* Index in latents (frames,channels,H,W) of one element of token l's patch; element = row * pw + column */
static size_t patch_offset(const Transformer *t, const TransformerState *s, int channels, int channel, int l,
                           int element) {
    int columns = s->rope.columns;
    size_t row = l / columns % s->rope.rows * t->patch_size[1] + element / t->patch_size[2];
    size_t column = l % columns * t->patch_size[2] + element % t->patch_size[2];
    return (((size_t)(l / s->tokens) * channels + channel) * s->H + row) * s->W + column;
}

/* x (L,D) from planes: patches are flattened as (in_dim,ph,pw) */
static void embed_patches(const Transformer *t, TransformerState *s, int L, const Planes *input) {
    float *out = s->wide;
    for (int l = 0; l < L; l++)
        for (int p = 0, left = t->in_dim; left > 0; left -= input[p++].channels)
            for (int c = 0; c < input[p].channels; c++)
                for (int i = 0; i < patch_volume(t); i++)
                    *out++ = input[p].values[patch_offset(t, s, input[p].channels, c, l, i)];
    linear(s->x, s->wide, L, &t->patch_embedding);
}

/* velocity from the head's patches (L, ph*pw*C): here channels are innermost, (ph,pw,C) */
static void unpatch(const Transformer *t, const TransformerState *s, int L, const float *patches, float *velocity) {
    for (int l = 0; l < L; l++)
        for (int i = 0; i < patch_volume(t); i++)
            for (int c = 0; c < t->out_dim; c++) velocity[patch_offset(t, s, t->out_dim, c, l, i)] = *patches++;
}

enum { SHIFT, SCALE, GATE, FFN_SHIFT, FFN_SCALE, FFN_GATE, MODULATIONS };

/* e (count,frames,D) = table (count,D) + time, where frame f's row j begins at time[f*per_frame + j*per_row]. Adds 1 to
 * scales. */
static void modulate(float *e, const float *table, int count, int frames, int D, const float *time, int per_frame,
                     int per_row) {
    for (int j = 0; j < count; j++)
        for (int f = 0; f < frames; f++, e += D)
            for (int i = 0; i < D; i++) {
                e[i] = table[j * D + i] + time[(size_t)f * per_frame + j * per_row + i];
                if (j % 3 == SCALE) e[i] += 1.0f;
            }
}

void transformer_forward(const Transformer *t, TransformerState *s, const TextContext *text, KvCache *cache,
                         const Chunk *chunk, const Planes *input, float *velocity) {
    int D = t->dim, d = D / t->num_heads, frames = chunk->frames, tokens = s->tokens;
    kv_cache_make_room(cache, frames);
    int L = frames * tokens, past = cache->frames * tokens;   /* tokens of the chunk; cached tokens */
    float *x = s->x, *y = s->y;                               /* (L,D): residual stream; a layer's input or output */
    float *q = s->wide, *k = q + (size_t)L * D, *v = k + (size_t)(past + L) * D; /* (L,D), (past+L,D), (past+L,D) */
    float *new_k = k + (size_t)past * D, *new_v = v + (size_t)past * D;          /* (L,D): the chunk's rows of k, v */
    float *e = s->e;                                          /* (6,frames,D): the block's shifts, scales and gates */
    float *wide = s->wide;                                    /* (L,D) or (L,ffn_dim), over q, k, v after their use */
    Rows rows = rows_of(t->precision, y, s->narrow, L, D);    /* (L,D): y as products read it */
    Rows hidden = rows_of(t->precision, wide, s->narrow, L, t->ffn_dim); /* (L,ffn_dim): wide, likewise */
#define E(which) (e + (size_t)(which) * frames * D)
    Rope rope_k = s->rope, rope_q = rope_k;
    for (int f = 0; f < cache->frames + frames; f++)
        rope_angles(rope_k.time + 2 * f * rope_k.temporal, kv_cache_position(cache, chunk, f), rope_k.temporal);
    rope_q.time += 2 * cache->frames * rope_k.temporal;
    Attention attend = {.precision = t->precision, .q = q, .out = y, .queries = L, .heads = t->num_heads, .d = d,
                        .q_stride = D, .kv_stride = D, .out_stride = D, .scale = 1.0f / sqrtf((float)d)};

    embed_time(t, s, chunk);
    embed_patches(t, s, L, input);
    for (int i = 0; i < t->num_layers; i++) {
        const TransformerBlock *block = &t->blocks[i];
        const AttentionLayers *self = &block->self_attn, *cross = &block->cross_attn;
        modulate(e, block->modulation, MODULATIONS, frames, D, s->modulation, MODULATIONS * D, D);

        /* self attention */
        layer_norm(rows, x, t->eps, E(SCALE), E(SHIFT), tokens);
        product(q, rows, &self->q, REPLACE);
        product(new_k, rows, &self->k, REPLACE);
        product(new_v, rows, &self->v, REPLACE);
        rms_norm(q, q, L, D, self->norm_q, t->eps);
        rms_norm(new_k, new_k, L, D, self->norm_k, t->eps);
        kv_cache_read(cache, i, k, v);
        kv_cache_write(cache, i, new_k, new_v, frames);
        rope(q, L, t->num_heads, &rope_q);
        rope(k, past + L, t->num_heads, &rope_k);
        attend.k = k, attend.v = v, attend.keys = past + L, attend.bias = NULL;
        attention(&attend);
        narrow_rows(rows, y);
        product(wide, rows, &self->o, REPLACE);
        add_gated(x, wide, L, D, E(GATE), tokens);

        /* cross attention */
        layer_norm(rows, x, t->eps, block->norm3_weight, block->norm3_bias, L);
        product(q, rows, &cross->q, REPLACE);
        rms_norm(q, q, L, D, cross->norm_q, t->eps);
        size_t at = (size_t)i * text->positions * D;
        attend.k = text->keys + at, attend.v = text->values + at, attend.keys = text->positions;
        attend.bias = text->bias;
        attention(&attend);
        narrow_rows(rows, y);
        product(x, rows, &cross->o, ACCUMULATE);

        /* feed-forward network */
        layer_norm(rows, x, t->eps, E(FFN_SCALE), E(FFN_SHIFT), tokens);
        product(wide, rows, &block->ffn_0, REPLACE);
        gelu(hidden, wide, NULL);
        product(y, hidden, &block->ffn_2, REPLACE);
        add_gated(x, y, L, D, E(FFN_GATE), tokens);
        tap(x, SHAPE(L, D), "block%02d", i);
    }
    modulate(e, t->head_modulation, 2, frames, D, s->time, D, 0);
    layer_norm(rows_of(F32, y, NULL, L, D), x, t->eps, E(SCALE), E(SHIFT), tokens);
    linear(wide, y, L, &t->head);
    unpatch(t, s, L, wide, velocity);
    tap_frames(velocity, SHAPE(t->out_dim, frames, s->H, s->W), "velocity");
#undef E
}

size_t transformer_scratch(const Transformer *t, int frames, int L, int keys, int positions) {
    const TransformerBlock *block = t->blocks;
    const struct {
        const Linear *layer;
        int rows;
    } products[] = {{&t->time_embedding_0, frames}, {&t->time_projection_1, frames}, {&t->patch_embedding, L},
                    {&block->self_attn.q, L},       {&block->ffn_0, L},              {&block->ffn_2, L}, {&t->head, L}};
    int d = t->dim / t->num_heads;
    size_t most = attention_memory(t->precision, larger(keys, positions), t->num_heads, d);
    for (size_t i = 0; i < sizeof products / sizeof *products; i++)
        most = larger_size(most, product_memory(products[i].layer, products[i].rows));
    return most;
}

double transformer_flops(const Transformer *t, int L, int keys, int positions) {
    double D = t->dim, patch = patch_volume(t);
    double block = 2.0 * L * D * (6 * D + 2.0 * t->ffn_dim) + 4.0 * L * D * (keys + positions);
    return t->num_layers * block + 2.0 * L * D * patch * (t->in_dim + t->out_dim);
}
