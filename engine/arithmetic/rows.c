/* rows.c - what is done row by row or element by element between the large products:
 * norms, activations, sums.
 *
 * Rows and pieces are handed to the threads here; norms and activations are the kernels' (naive.c). What
 * remains is plain C, one rounding an operation; the compiler vectorises it without changing a bit.
 *
 * What a product reads next is narrowed in the same pass: memory is read and written once, not twice. */
#include "engine/engine.h"

void rms_norm(float *y, const float *x, int L, int n, const float *gain, float eps) {
    PARALLEL_ROWS(l, L, n)
        kernels->rms_norm_row(y + (size_t)l * n, x + (size_t)l * n, n, gain, eps);
}

void l2_norm(float *y, const float *x, int L, int n, const float *gain) {
    PARALLEL_ROWS(l, L, n)
        kernels->l2_norm_row(y + (size_t)l * n, x + (size_t)l * n, n, gain);
}

#define FOR_PIECES(n, start, length)                                                                         \
    PARALLEL_FOR (size_t start = 0; start < (n); start += PIECE)                                             \
        for (size_t length = (n) - start < PIECE ? (n) - start : PIECE; length; length = 0)

void silu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) kernels->silu(y + start, x + start, length);
}

void relu(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] = x[i] < 0 ? 0 : x[i];
}

void add(float *y, const float *x, size_t n) {
    FOR_PIECES(n, start, length) for (size_t i = start; i < start + length; i++) y[i] += x[i];
}

void add_gated(float *y, const float *x, int L, int n, const float *gate, int each) {
    PARALLEL_ROWS(l, L, n) {
        const float *row = x + (size_t)l * n, *g = gate + (size_t)(l / each) * n;
        float *out = y + (size_t)l * n;
        for (int i = 0; i < n; i++) out[i] += row[i] * g[i];
    }
}

/* ---------------------------------------------------------------- what a product reads next */

/* Element k of row l, a multiple of INT8_CHUNK. */
static void *element(const Rows *y, int l, int k) {
    return (char *)y->of + l * y->stride + row_offset(y->precision, k);
}

/* Where row l, from element k on, is computed: in its place if it is float32, else in `buffer`, from which finish()
 * narrows it. */
static float *computed_at(const Rows *y, int l, int k, float *buffer) {
    return y->precision == F32 ? element(y, l, k) : buffer;
}

static void finish(const Rows *y, int l, int k, const float *x, int n) {
    void *to = element(y, l, k);
    if (to != x) narrow_row(y->precision, to, x, n);
}

void narrow_rows(Rows y, const float *x) {
    if (y.of == x) return;
    PARALLEL_ROWS(l, y.rows, y.n) finish(&y, l, 0, x + (size_t)l * y.n, y.n);
}

void l2_norm_silu(Rows y, const float *x, const float *gain) {
    PARALLEL_ROWS(l, y.rows, y.n) {
        float buffer[MAX_WIDTH], *row = computed_at(&y, l, 0, buffer);
        kernels->l2_norm_row(row, x + (size_t)l * y.n, y.n, gain);
        kernels->silu(row, row, (size_t)y.n);
        finish(&y, l, 0, row, y.n);
    }
}

void layer_norm(Rows y, const float *x, float eps, const float *scale, const float *shift, int each) {
    PARALLEL_ROWS(l, y.rows, y.n) {
        float buffer[MAX_WIDTH], *row = computed_at(&y, l, 0, buffer);
        size_t group = (size_t)(l / each) * y.n;
        kernels->layer_norm_row(row, x + (size_t)l * y.n, y.n, eps, scale + group, shift + group);
        finish(&y, l, 0, row, y.n);
    }
}

void gelu(Rows y, const float *x, const float *factor) {
    PARALLEL_ROWS(l, y.rows, y.n)
        for (int k = 0, n; k < y.n; k += n) {
            float buffer[PIECE], *row = computed_at(&y, l, k, buffer);
            size_t at = (size_t)l * y.n + k;
            n = smaller(PIECE, y.n - k);
            kernels->gelu(row, x + at, (size_t)n);
            for (int i = 0; factor && i < n; i++) row[i] *= factor[at + i];
            finish(&y, l, k, row, n);
        }
}

/* ---------------------------------------------------------------- positions */

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
