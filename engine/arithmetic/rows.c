/* rows.c - what is done row by row or element by element between the large products:
 * norms, activations, sums.
 *
 * Rows and pieces are handed to the threads here; norms and activations are the kernels' (naive.c). What
 * remains is plain C, one rounding an operation; the compiler vectorises it without changing a bit. */
#include "engine/engine.h"

void rms_norm(float *y, const float *x, int L, int n, const float *gain, float eps) {
    PARALLEL_ROWS(l, L, n)
        kernels->rms_norm_row(y + (size_t)l * n, x + (size_t)l * n, n, gain, eps);
}

void l2_norm(float *y, const float *x, int L, int n, const float *gain) {
    PARALLEL_ROWS(l, L, n)
        kernels->l2_norm_row(y + (size_t)l * n, x + (size_t)l * n, n, gain);
}

void l2_norm_silu(Precision precision, void *rows, const float *x, int L, int n, const float *gain) {
    size_t bytes = row_bytes(precision, n);
    PARALLEL_ROWS(l, L, n) {
        float row[MAX_CHANNELS];
        kernels->l2_norm_row(row, x + (size_t)l * n, n, gain);
        kernels->silu(row, row, (size_t)n);
        narrow_row(precision, (char *)rows + l * bytes, row, n);
    }
}

void layer_norm(float *y, const float *x, int L, int n, float eps, const float *scale, const float *shift,
                int each) {
    PARALLEL_ROWS(l, L, n) {
        size_t at = (size_t)l * n, group = (size_t)(l / each) * n;
        kernels->layer_norm_row(y + at, x + at, n, eps, scale + group, shift + group);
    }
}

#define FOR_PIECES(n, start, length)                                                                         \
    PARALLEL_FOR (size_t start = 0; start < (n); start += PIECE)                                             \
        for (size_t length = (n) - start < PIECE ? (n) - start : PIECE; length; length = 0)

void silu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) kernels->silu(y + start, x + start, length);
}

void gelu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) kernels->gelu(y + start, x + start, length);
}

void relu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] = x[i] < 0 ? 0 : x[i];
}

void add(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] += x[i];
}

void multiply(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] *= x[i];
}

void add_gated(float *y, const float *x, int L, int n, const float *gate, int each) {
    PARALLEL_ROWS(l, L, n) {
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
    int n = heads * 2 * (temporal + 2 * spatial);
    PARALLEL_ROWS(l, L, n) {
        float *head = x + (size_t)l * n;
        for (int h = 0; h < heads; h++) {
            head = rotate(head, rope->time + (size_t)(l / (rows * columns)) * 2 * temporal, temporal);
            head = rotate(head, rope->row + (size_t)(l / columns % rows) * 2 * spatial, spatial);
            head = rotate(head, rope->column + (size_t)(l % columns) * 2 * spatial, spatial);
        }
    }
}
