/* text_encoder.c - ids -> embeds: the encoder of umT5 (Chung et al., UniMax, 2023; T5: Raffel et al., 2020).
 *
 * Takes ids [n], gives embeds (n,E).
 *
 *   x = token_embedding[ids]                                            (n,E)
 *   in each block:  x += o(attention(norm1(x)))
 *                   x += fc2(gelu(gate(norm2(x))) * fc1(norm2(x)))
 *   embeds = norm(x)
 *
 * Follows UMT5EncoderModel of transformers and wan/modules/t5.py of Wan2.1. It differs from other encoders in four
 * ways. Norms are RMS norms. No layer has a bias. Attention scores are not divided by sqrt(d). Positions enter as a
 * bias on the scores that depends on key - query only: T5 has one table of it for all blocks, umT5 one in each.
 *
 * Scores are large, because they are not divided, and rounding errors in them matter. So attention is always float32,
 * and linear layers are bfloat16 at least, even with --precision int8.
 *
 * Upstream pads prompts to 512 tokens and masks the padding. Computing only the n tokens gives the same. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>

TextEncoder text_encoder_load(const WeightFile *file, Precision precision) {
    TextEncoder e = {
        .precision = precision_of_floats(precision),
        .vocab_size = weights_size(file, "t5encoder.vocab_size", 1 << 24),
        .dim = weights_size(file, "t5encoder.embedding_length", 1 << 16),
        .ffn_dim = weights_size(file, "t5encoder.feed_forward_length", 1 << 18),
        .num_heads = weights_size(file, "t5encoder.attention.head_count", 1 << 10),
        .head_dim = weights_size(file, "t5encoder.attention.key_length", 1 << 10),
        .num_layers = weights_size(file, "t5encoder.block_count", 1 << 10),
        .num_buckets = weights_size_or(file, "t5encoder.attention.relative_buckets_count", 1 << 10, 32),
        .max_distance = weights_size_or(file, "t5encoder.attention.relative_max_distance", 1 << 16, 128),
        .eps = (float)weights_double_or(file, "t5encoder.attention.layer_norm_rms_epsilon", 1e-6),
    };
    int inner = e.num_heads * e.head_dim;
    if (e.num_buckets % 4 || e.max_distance <= e.num_buckets / 4)
        weights_refuse(file, "relative positions have %d buckets up to distance %d, expected a multiple of 4 and a "
                       "distance above a quarter of it", e.num_buckets, e.max_distance);
    e.token_embedding = weights_bind(file, e.vocab_size, e.dim, "token_embd.weight");
    e.blocks = allocate(sizeof *e.blocks * (size_t)e.num_layers);
    for (int i = 0; i < e.num_layers; i++)
        e.blocks[i] = (TextBlock){
            .norm1 = weights_floats(file, e.dim, "enc.blk.%d.attn_norm.weight", i),
            .q = linear_bind(file, e.precision, inner, e.dim, NO_BIAS, "enc.blk.%d.attn_q", i),
            .k = linear_bind(file, e.precision, inner, e.dim, NO_BIAS, "enc.blk.%d.attn_k", i),
            .v = linear_bind(file, e.precision, inner, e.dim, NO_BIAS, "enc.blk.%d.attn_v", i),
            .o = linear_bind(file, e.precision, e.dim, inner, NO_BIAS, "enc.blk.%d.attn_o", i),
            .pos_embedding =
                weights_floats(file, e.num_buckets * e.num_heads, "enc.blk.%d.attn_rel_b.weight", i),
            .norm2 = weights_floats(file, e.dim, "enc.blk.%d.ffn_norm.weight", i),
            .gate = linear_bind(file, e.precision, e.ffn_dim, e.dim, NO_BIAS, "enc.blk.%d.ffn_gate", i),
            .fc1 = linear_bind(file, e.precision, e.ffn_dim, e.dim, NO_BIAS, "enc.blk.%d.ffn_up", i),
            .fc2 = linear_bind(file, e.precision, e.dim, e.ffn_dim, NO_BIAS, "enc.blk.%d.ffn_down", i),
        };
    e.norm = weights_floats(file, e.dim, "enc.output_norm.weight");
    return e;
}

void text_encoder_free(TextEncoder *encoder) {
    free(encoder->blocks);
}

/* Bucket of a distance, key - query. Half of the buckets are for each sign. With 32 buckets and max_distance 128:
 *
 *   |distance|   0 1 2 ... 7 | 8 ..... 11 | 12 .. 15 | 16 .. 22 | ... | 91 and above
 *   bucket       0 1 2 ... 7 | 8          | 9        | 10       | ... | 15            plus 16 for distance > 0
 *
 * From 8 on the scale is logarithmic. Follows UMT5Attention._relative_position_bucket of transformers, in its float
 * arithmetic. */
static int bucket_of(const TextEncoder *e, int distance) {
    int half = e->num_buckets / 2, exact = half / 2, n = abs(distance), bucket = n;
    if (n >= exact) {
        float span = (float)log((double)e->max_distance / exact);
        bucket = exact + (int)((float)log((float)n / (float)exact) / span * (float)(half - exact));
        if (bucket > half - 1) bucket = half - 1;
    }
    return distance > 0 ? half + bucket : bucket;
}

typedef struct {
    float *x, *y;             /* (n,E): residual stream; its norm, then a layer's output */
    float *q, *k, *v, *mixed; /* (n, heads*d); mixed is attention's output */
    float *gate, *up;         /* (n, ffn_dim) */
    void *narrow;             /* gelu(gate) * up, unless in float32 */
    float *bias;              /* (heads, 2n-1): at key - query + n-1 */
} Buffers;

static Buffers lay_out(Arena *arena, const TextEncoder *e, int n) {
    size_t inner = (size_t)n * e->num_heads * e->head_dim, E = (size_t)n * e->dim,
           ffn = (size_t)n * e->ffn_dim;
    return (Buffers){arena_floats(arena, E),     arena_floats(arena, E),     arena_floats(arena, inner),
                     arena_floats(arena, inner), arena_floats(arena, inner), arena_floats(arena, inner),
                     arena_floats(arena, ffn),   arena_floats(arena, ffn),
                     arena_take(arena, rows_memory(e->blocks->fc2.precision, n, e->ffn_dim)),
                     arena_floats(arena, (size_t)e->num_heads * (2 * n - 1))};
}

size_t text_encoder_memory(const TextEncoder *encoder, int n) {
    Arena count = {0};
    lay_out(&count, encoder, n);
    return count.used;
}

size_t text_encoder_scratch(const TextEncoder *e, int n) {
    const TextBlock *block = e->blocks;
    size_t products = larger_size(linear_memory(&block->q, n), linear_memory(&block->o, n));
    products = larger_size(products, larger_size(linear_memory(&block->gate, n), product_memory(&block->fc2, n)));
    return larger_size(products, attention_memory(F32, n, e->num_heads, e->head_dim));
}

double text_encoder_flops(const TextEncoder *e, int n) {
    double inner = (double)e->num_heads * e->head_dim;
    return e->num_layers * (2.0 * n * e->dim * (4 * inner + 3.0 * e->ffn_dim) + 4.0 * n * n * inner);
}

static void attend(const TextEncoder *e, const TextBlock *block, Buffers *b, int n) {
    for (int h = 0; h < e->num_heads; h++)
        for (int distance = 1 - n; distance < n; distance++)
            b->bias[h * (2 * n - 1) + distance + n - 1] =
                block->pos_embedding[bucket_of(e, distance) * e->num_heads + h];
    rms_norm(b->y, b->x, n, e->dim, block->norm1, e->eps);
    linear(b->q, b->y, n, &block->q);
    linear(b->k, b->y, n, &block->k);
    linear(b->v, b->y, n, &block->v);
    size_t stride = (size_t)e->num_heads * e->head_dim;
    attention(&(Attention){.precision = F32, .q = b->q, .k = b->k, .v = b->v, .out = b->mixed, .queries = n,
                           .keys = n, .heads = e->num_heads, .d = e->head_dim, .q_stride = stride,
                           .kv_stride = stride, .out_stride = stride, .scale = 1.0f,
                           .bias = b->bias + n - 1, .bias_head = 2 * n - 1, .bias_query = -1});
    linear(b->y, b->mixed, n, &block->o);
    add(b->x, b->y, (size_t)n * e->dim);
}

static void feed_forward(const TextEncoder *e, const TextBlock *block, Buffers *b, int n) {
    Rows hidden = rows_of(block->fc2.precision, b->gate, b->narrow, n, e->ffn_dim);
    rms_norm(b->y, b->x, n, e->dim, block->norm2, e->eps);
    linear(b->gate, b->y, n, &block->gate);
    linear(b->up, b->y, n, &block->fc1);
    gelu(hidden, b->gate, b->up);
    product(b->x, hidden, &block->fc2, ACCUMULATE);
}

void text_encode(const TextEncoder *encoder, const int32_t *ids, int n, float *embeds) {
    Arena arena = arena_open(text_encoder_memory(encoder, n));
    Buffers b = lay_out(&arena, encoder, n);
    for (int i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= encoder->vocab_size)
            die(STATUS_USAGE, "token id %d, expected 0 to %d, the text encoder's vocabulary", (int)ids[i],
                encoder->vocab_size - 1);
        weight_row(&encoder->token_embedding, ids[i], b.x + (size_t)i * encoder->dim);
    }
    for (int i = 0; i < encoder->num_layers; i++) {
        attend(encoder, &encoder->blocks[i], &b, n);
        feed_forward(encoder, &encoder->blocks[i], &b, n);
    }
    rms_norm(embeds, b.x, n, encoder->dim, encoder->norm, encoder->eps);
    arena_close(&arena);
}
