/* types.c - the names of the arithmetic that multiplies, and narrow weights as floats. */
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

void convert_to_floats(float *out, const void *in, Type type, size_t n) {
    static void (*const widen[])(float *, const uint8_t *, size_t) = {
        [TYPE_F32] = widen_f32, [TYPE_F16] = widen_f16, [TYPE_Q8_0] = widen_q8_0, [TYPE_BF16] = widen_bf16};
    widen[type](out, in, n);
}
