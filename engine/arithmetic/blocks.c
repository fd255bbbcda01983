/* blocks.c - weights in ggml's blocks, as floats.
 *
 * A block holds 32 or 256 elements: small integers q, and what turns them into floats. Each formula below is
 * ggml's, and rounds where ggml rounds, so the floats are those of the gguf package to the bit:
 *
 *   q8_0 q4_0 q5_0   d * q              q is signed, or lies around 0 after 8 or 16 was taken off
 *   q4_1 q5_1        d * q + m
 *   q4_k q5_k q2_k   (d * s) * q - (dmin * m)     a scale s and a minimum m for each 32 or 16 elements
 *   q3_k q6_k        (d * s) * q
 *
 * d, m and dmin are half-precision numbers of the block; s and m of an inner block are integers of 4 to 8 bits.
 *
 * Bits lie so that one mask extracts many elements at once. Bytes of nibbles hold the first half of a run in their low
 * bits and the second half in their high bits: element j with element j + 16 (j + 32 in blocks of 256). A fifth bit
 * stands apart, in a field of its own. */
#include "engine/engine.h"

enum { BLOCK = 32, SUPER = 256 };

static float half_at(const uint8_t *bytes) { return float_of_f16((uint16_t)(bytes[0] | bytes[1] << 8)); }

void widen_f32(float *out, const uint8_t *in, size_t n) { memcpy(out, in, n * sizeof *out); }

void widen_f16(float *out, const uint8_t *in, size_t n) {
    kernels->from_f16(out, (const uint16_t *)(const void *)in, n);
}

void widen_bf16(float *out, const uint8_t *in, size_t n) {
    kernels->from_bf16(out, (const uint16_t *)(const void *)in, n);
}

/* ---------------------------------------------------------------- blocks of 32 */

/* d, 32 signed bytes. */
void widen_q8_0(float *out, const uint8_t *in, size_t n) {
    for (size_t i = 0; i < n; i += BLOCK, in += 34) {
        float d = half_at(in);
        for (int j = 0; j < BLOCK; j++) out[i + j] = d * (float)(int8_t)in[2 + j];
    }
}

/* d, 16 bytes of nibbles. */
void widen_q4_0(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= BLOCK, in += 18, out += BLOCK) {
        float d = half_at(in);
        for (int j = 0; j < 16; j++) {
            out[j] = d * (float)((in[2 + j] & 15) - 8);
            out[j + 16] = d * (float)((in[2 + j] >> 4) - 8);
        }
    }
}

/* d, m, 16 bytes of nibbles. */
void widen_q4_1(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= BLOCK, in += 20, out += BLOCK) {
        float d = half_at(in), m = half_at(in + 2);
        for (int j = 0; j < 16; j++) {
            out[j] = d * (float)(in[4 + j] & 15) + m;
            out[j + 16] = d * (float)(in[4 + j] >> 4) + m;
        }
    }
}

/* Element j of 32: a nibble, and bit j of the four bytes before the nibbles. */
static int five_bits(const uint8_t *fifth, int j) {
    int nibble = j < 16 ? fifth[4 + j] & 15 : fifth[4 + j - 16] >> 4;
    return nibble | (fifth[j / 8] >> j % 8 & 1) << 4;
}

/* d, 32 fifth bits, 16 bytes of nibbles. */
void widen_q5_0(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= BLOCK, in += 22, out += BLOCK) {
        float d = half_at(in);
        for (int j = 0; j < BLOCK; j++) out[j] = d * (float)(five_bits(in + 2, j) - 16);
    }
}

/* d, m, 32 fifth bits, 16 bytes of nibbles. */
void widen_q5_1(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= BLOCK, in += 24, out += BLOCK) {
        float d = half_at(in), m = half_at(in + 2);
        for (int j = 0; j < BLOCK; j++) out[j] = d * (float)five_bits(in + 4, j) + m;
    }
}

/* ---------------------------------------------------------------- blocks of 256 */

/* 16 bytes of a scale (low nibble) and a minimum (high nibble) for each 16 elements, 64 bytes of q, d, dmin. Byte j of
 * 32 holds two bits of elements j, j + 32, j + 64 and j + 96. */
void widen_q2_k(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= SUPER, in += 84, out += SUPER) {
        float d = half_at(in + 80), dmin = half_at(in + 82);
        for (int i = 0; i < 16; i++) { /* 16 elements each */
            const uint8_t *q = in + 16 + i / 8 * 32 + i % 2 * 16;
            float scale = d * (float)(in[i] & 15), minimum = dmin * (float)(in[i] >> 4);
            for (int j = 0; j < 16; j++)
                out[16 * i + j] = scale * (float)(q[j] >> i / 2 % 4 * 2 & 3) - minimum;
        }
    }
}

/* 32 bytes of third bits (bit i of byte j: element 32 i + j; 0 takes 4 off), 64 bytes of q as in q2_k, 12 bytes of
 * scales of six bits, d. */
void widen_q3_k(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= SUPER, in += 110, out += SUPER) {
        const uint8_t *scales = in + 96;
        float d = half_at(in + 108);
        for (int i = 0; i < 16; i++) {
            const uint8_t *q = in + 32 + i / 8 * 32 + i % 2 * 16, *third = in + i % 2 * 16;
            int low = i < 8 ? scales[i] & 15 : scales[i - 8] >> 4, high = scales[8 + i % 4] >> i / 4 * 2 & 3;
            float scale = d * (float)((low | high << 4) - 32);
            for (int j = 0; j < 16; j++)
                out[16 * i + j] = scale * (float)((q[j] >> i / 2 % 4 * 2 & 3) - (third[j] >> i / 2 & 1 ? 0 : 4));
        }
    }
}

/* Six bits each of the scale and the minimum of inner block i of 8. The 12 bytes hold, of those from 4 on, the low four
 * bits at the end and the high two above the others. */
static void six_bits(const uint8_t *bytes, int i, int *scale, int *minimum) {
    *scale = i < 4 ? bytes[i] & 63 : (bytes[i + 4] & 15) | (bytes[i - 4] >> 2 & 48);
    *minimum = i < 4 ? bytes[i + 4] & 63 : bytes[i + 4] >> 4 | (bytes[i] >> 2 & 48);
}

/* d, dmin, 12 bytes of scales and minima, 128 bytes of nibbles. */
void widen_q4_k(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= SUPER, in += 144, out += SUPER)
        for (int i = 0, s, m; i < 8; i++) { /* 32 elements each */
            six_bits(in + 4, i, &s, &m);
            const uint8_t *q = in + 16 + i / 2 * 32;
            float scale = half_at(in) * (float)s, minimum = half_at(in + 2) * (float)m;
            for (int j = 0; j < 32; j++) out[32 * i + j] = scale * (float)(q[j] >> i % 2 * 4 & 15) - minimum;
        }
}

/* The same, with 32 bytes of fifth bits before the nibbles: bit i of byte j is of element 32 i + j. */
void widen_q5_k(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= SUPER, in += 176, out += SUPER)
        for (int i = 0, s, m; i < 8; i++) {
            six_bits(in + 4, i, &s, &m);
            const uint8_t *fifth = in + 16, *q = in + 48 + i / 2 * 32;
            float scale = half_at(in) * (float)s, minimum = half_at(in + 2) * (float)m;
            for (int j = 0; j < 32; j++)
                out[32 * i + j] =
                    scale * (float)((q[j] >> i % 2 * 4 & 15) | (fifth[j] >> i & 1) << 4) - minimum;
        }
}

/* 128 bytes of low nibbles, 64 bytes of the two high bits (as in q2_k), 16 signed scales, d. Byte j of 64 holds the
 * nibbles of elements j and j + 64. */
void widen_q6_k(float *out, const uint8_t *in, size_t n) {
    for (; n; n -= SUPER, in += 210, out += SUPER) {
        float d = half_at(in + 208);
        for (int i = 0; i < 16; i++) { /* 16 elements each */
            const uint8_t *low = in + i / 8 * 64 + i % 4 * 16, *high = in + 128 + i / 8 * 32 + i % 2 * 16;
            float scale = d * (float)(int8_t)in[192 + i];
            for (int j = 0; j < 16; j++)
                out[16 * i + j] = scale * (float)(((low[j] >> i / 4 % 2 * 4 & 15) |
                                                   (high[j] >> i / 2 % 4 * 2 & 3) << 4) - 32);
        }
    }
}
