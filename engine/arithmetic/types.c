/* types.c - the arithmetic that multiplies, by name; the types of weights, and what they are as floats. */
#include "engine/engine.h"

/* ---------------------------------------------------------------- precisions */

static const char *const precision_names[PRECISIONS] = {"f32", "bf16", "int8"};

const char *precision_name(Precision precision) { return precision_names[precision]; }

bool precision_parse(const char *name, Precision *out) {
    for (int p = 0; p < PRECISIONS; p++)
        if (!strcmp(name, precision_names[p])) {
            *out = (Precision)p;
            return true;
        }
    return false;
}

/* ---------------------------------------------------------------- narrow weights */

/* Both halves of the range by one multiplication each: a subnormal half is its bits times 2^-24. */
static float half_to_float(uint16_t half) {
    uint32_t exponent = half >> 10 & 31, mantissa = half & 1023;
    float value = (float)mantissa * 0x1p-24f;
    if (exponent) value = float_from_bits((exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
    return half >> 15 ? -value : value;
}

static float half_at(const uint8_t *bytes) {
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    return half_to_float(half);
}

static void widen_f32(float *out, const uint8_t *in, size_t n) { memcpy(out, in, n * 4); }

static void widen_f16(float *out, const uint8_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = half_at(in + 2 * i);
}

static void widen_bf16(float *out, const uint8_t *in, size_t n) {
    kernels->from_bf16(out, (const uint16_t *)(const void *)in, n);
}

/* Blocks of 32: a half-precision scale, then 32 signed bytes (ggml's block_q8_0). */
static void widen_q8_0(float *out, const uint8_t *in, size_t n) {
    for (size_t i = 0; i < n; i += 32, in += 34) {
        float scale = half_at(in);
        for (int j = 0; j < 32; j++) out[i + j] = scale * (float)(int8_t)in[2 + j];
    }
}

/* ---------------------------------------------------------------- the types of weights */

/* Every type of ggml.h by its number. One without widen() is known to --info by name, and no product reads it. */
static const WeightType types[] = {
    [TYPE_F32] = {"f32", 1, 4, widen_f32, F32},
    [TYPE_F16] = {"f16", 1, 2, widen_f16, BF16},
    [2] = {"q4_0", 32, 18, NULL, INT8},
    [3] = {"q4_1", 32, 20, NULL, INT8},
    [6] = {"q5_0", 32, 22, NULL, INT8},
    [7] = {"q5_1", 32, 24, NULL, INT8},
    [TYPE_Q8_0] = {"q8_0", 32, 34, widen_q8_0, INT8},
    [9] = {"q8_1", 32, 36, NULL, INT8},
    [10] = {"q2_k", 256, 84, NULL, INT8},
    [11] = {"q3_k", 256, 110, NULL, INT8},
    [12] = {"q4_k", 256, 144, NULL, INT8},
    [13] = {"q5_k", 256, 176, NULL, INT8},
    [14] = {"q6_k", 256, 210, NULL, INT8},
    [15] = {"q8_k", 256, 292, NULL, INT8},
    [16] = {"iq2_xxs", 256, 66, NULL, INT8},
    [17] = {"iq2_xs", 256, 74, NULL, INT8},
    [18] = {"iq3_xxs", 256, 98, NULL, INT8},
    [19] = {"iq1_s", 256, 50, NULL, INT8},
    [20] = {"iq4_nl", 32, 18, NULL, INT8},
    [21] = {"iq3_s", 256, 110, NULL, INT8},
    [22] = {"iq2_s", 256, 82, NULL, INT8},
    [23] = {"iq4_xs", 256, 136, NULL, INT8},
    [24] = {"i8", 1, 1, NULL, F32},
    [25] = {"i16", 1, 2, NULL, F32},
    [26] = {"i32", 1, 4, NULL, F32},
    [27] = {"i64", 1, 8, NULL, F32},
    [28] = {"f64", 1, 8, NULL, F32},
    [29] = {"iq1_m", 256, 56, NULL, INT8},
    [TYPE_BF16] = {"bf16", 1, 2, widen_bf16, BF16},
    [34] = {"tq1_0", 256, 54, NULL, INT8},
    [35] = {"tq2_0", 256, 66, NULL, INT8},
    [39] = {"mxfp4", 32, 17, NULL, INT8},
    [40] = {"nvfp4", 64, 36, NULL, INT8},
    [41] = {"q1_0", 128, 18, NULL, INT8},
};

const WeightType *weight_type(Type type) {
    return (size_t)type < sizeof types / sizeof *types && types[type].name ? &types[type] : NULL;
}

size_t type_bytes(Type type, size_t n) { return n / (size_t)types[type].block * (size_t)types[type].bytes; }

void convert_to_floats(float *out, const void *in, Type type, size_t n) { types[type].widen(out, in, n); }

/* Part of a block is widened whole, then cut out. */
void weight_part(const Weight *w, size_t at, int n, float *out) {
    const WeightType *type = &types[w->type];
    size_t block = (size_t)type->block, skip = at % block, count = (size_t)n;
    const char *data = (const char *)w->data + type_bytes(w->type, at);
    if (skip == 0 && count % block == 0) {
        convert_to_floats(out, data, w->type, count);
        return;
    }
    float whole[MAX_BLOCK];
    for (size_t piece; count; out += piece, count -= piece, data += type->bytes, skip = 0) {
        piece = block - skip < count ? block - skip : count;
        convert_to_floats(whole, data, w->type, block);
        memcpy(out, whole + skip, sizeof *out * piece);
    }
}
