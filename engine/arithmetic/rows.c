/* rows.c - what is done row by row or element by element between the large products:
 * norms, activations, sums.
 *
 * Sums over a row go through the kernels' virtual lanes. What remains is plain C, one rounding an operation;
 * the compiler vectorises it without changing a bit. */
#include "engine/engine.h"

#include <math.h>

void rms_norm(float *y, const float *x, int L, int n, const float *gain, float eps) {
    PARALLEL_FOR for (int l = 0; l < L; l++) {
        const float *row = x + (size_t)l * n;
        float *out = y + (size_t)l * n;
        float factor = 1.0f / sqrtf(kernels->sum_squares(row, n, 0.0f) / (float)n + eps);
        for (int i = 0; i < n; i++) out[i] = row[i] * factor * gain[i];
    }
}

/* torch's F.normalize divides by the norm, but by no less than 1e-12. */
static void l2_norm_row(float *y, const float *x, int n, const float *gain) {
    float factor = sqrtf((float)n) / fmaxf(sqrtf(kernels->sum_squares(x, n, 0.0f)), 1e-12f);
    for (int i = 0; i < n; i++) y[i] = x[i] * factor * gain[i];
}

void l2_norm(float *y, const float *x, int L, int n, const float *gain) {
    PARALLEL_FOR for (int l = 0; l < L; l++) l2_norm_row(y + (size_t)l * n, x + (size_t)l * n, n, gain);
}

void l2_norm_silu(Precision precision, void *rows, const float *x, int L, int n, const float *gain) {
    size_t bytes = row_bytes(precision, n);
    PARALLEL_FOR for (int l = 0; l < L; l++) {
        float row[MAX_CHANNELS];
        l2_norm_row(row, x + (size_t)l * n, n, gain);
        kernels->silu(row, row, (size_t)n);
        narrow_row(precision, (char *)rows + l * bytes, row, n);
    }
}

void layer_norm(float *y, const float *x, int L, int n, float eps, const float *scale, const float *shift, int each) {
    PARALLEL_FOR for (int l = 0; l < L; l++) {
        const float *row = x + (size_t)l * n, *c = scale + (size_t)(l / each) * n, *s = shift + (size_t)(l / each) * n;
        float *out = y + (size_t)l * n;
        float mean = kernels->sum(row, n) / (float)n;
        float factor = 1.0f / sqrtf(kernels->sum_squares(row, n, mean) / (float)n + eps);
        for (int i = 0; i < n; i++) out[i] = (row[i] - mean) * factor * c[i] + s[i];
    }
}

/* Elementwise work is handed out in pieces of this many floats. */
enum { PIECE = 1 << 14 };
#define FOR_PIECES(n, start, length)                                                                         \
    PARALLEL_FOR for (size_t start = 0; start < (n); start += PIECE)                                         \
        for (size_t length = (n) - start < PIECE ? (n) - start : PIECE; length; length = 0)

void silu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) kernels->silu(y + start, x + start, length);
}

void gelu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) kernels->gelu(y + start, x + start, length);
}

void add(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] += x[i];
}

void multiply(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] *= x[i];
}

void add_gated(float *y, const float *x, int L, int n, const float *gate, int each) {
    PARALLEL_FOR for (int l = 0; l < L; l++) {
        const float *row = x + (size_t)l * n, *g = gate + (size_t)(l / each) * n;
        float *out = y + (size_t)l * n;
        for (int i = 0; i < n; i++) out[i] += row[i] * g[i];
    }
}

/* Turns pairs of one axis by the angles of one position. */
static float *rotate(float *x, const float *angles, int pairs) {
    const float *cosine = angles, *sine = angles + pairs;
    for (int i = 0; i < pairs; i++, x += 2) {
        float a = x[0], b = x[1];
        x[0] = a * cosine[i] - b * sine[i];
        x[1] = a * sine[i] + b * cosine[i];
    }
    return x;
}

void rope(float *x, int L, int heads, const Rope *rope) {
    int rows = rope->rows, columns = rope->columns, spatial = rope->spatial, temporal = rope->temporal;
    PARALLEL_FOR for (int l = 0; l < L; l++) {
        float *head = x + (size_t)l * heads * 2 * (temporal + 2 * spatial);
        for (int h = 0; h < heads; h++) {
            head = rotate(head, rope->time + (size_t)(l / (rows * columns)) * 2 * temporal, temporal);
            head = rotate(head, rope->row + (size_t)(l / columns % rows) * 2 * spatial, spatial);
            head = rotate(head, rope->column + (size_t)(l % columns) * 2 * spatial, spatial);
        }
    }
}
