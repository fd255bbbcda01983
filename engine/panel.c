/* panel.c - what the tiles multiply: row operands and panels, in the layout of each precision.
 *
 * A tile multiplies R rows by the C columns of a panel (kernels.c). Rows are read one element at a time and spread over
 * a register, columns a register at a time, so a panel holds the C elements of one k side by side:
 *
 *   F32    row: floats                       panel: [k][C] floats
 *   BF16   row: bfloat16, in pairs of k      panel: [k/2][C] pairs
 *   INT8   row: chunks of a scale and bytes  panel: chunks of [C] scales, [C] corrections, and [k/4][C] four bytes
 *
 * The last pair or four is filled with zeros. A chunk of 256 has a scale of its own in every row and every column:
 * largest magnitude / 127. One scale a row would be cheaper still, but then one outlier takes the resolution of all. */
#include "engine/engine.h"

#include <math.h>
#include <string.h>

size_t row_offset(Precision precision, int k) {
    switch (precision) {
    case F32: return 4 * (size_t)k;
    case BF16: return 2 * (size_t)k;
    default: return (size_t)k / INT8_CHUNK * (4 + INT8_CHUNK);
    }
}

size_t row_bytes(Precision precision, int n) {
    int rest = n % INT8_CHUNK;
    if (precision == F32) return 4 * (size_t)n;
    if (precision == BF16) return 2 * (size_t)round_up(n, 2);
    return row_offset(INT8, n) + (rest ? 4 + (size_t)round_up(rest, 4) : 0);
}

/* A chunk of at most INT8_CHUNK elements: its bytes, filled up to fours; its scale and sum are told. */
static void quantize(uint8_t *bytes, const float *x, int n, float *scale, int *sum) {
    float largest = kernels->largest(x, n);
    *scale = largest / 127.0f;
    *sum = kernels->to_int8(bytes, x, n, largest > 0 ? 127.0f / largest : 0.0f);
    for (int k = n; k % 4; k++) bytes[k] = (uint8_t)kernels->byte_offset;
}

static void narrow_chunk(uint8_t *row, const float *x, int n) {
    float scale;
    int sum;
    quantize(row + sizeof scale, x, n, &scale, &sum);
    memcpy(row, &scale, sizeof scale);
}

void narrow_row(Precision precision, void *row, const float *x, int n) {
    if (precision == F32) {
        memcpy(row, x, sizeof(float) * (size_t)n);
    } else if (precision == BF16) {
        kernels->to_bf16(row, x, (size_t)n);
        if (n % 2) ((uint16_t *)row)[n] = 0;
    } else {
        for (int k = 0; k < n; k += INT8_CHUNK)
            narrow_chunk((uint8_t *)row + row_offset(INT8, k), x + k, smaller(INT8_CHUNK, n - k));
    }
}

void narrow_rows(Precision precision, void *rows, const float *x, size_t stride, int L, int n) {
    size_t bytes = row_bytes(precision, n);
    PARALLEL_FOR for (int l = 0; l < L; l++) narrow_row(precision, (char *)rows + l * bytes, x + l * stride, n);
}

size_t panel_bytes(Precision precision, int n) {
    size_t C = (size_t)kernels->tile_cols, rest = (size_t)(n % INT8_CHUNK);
    if (precision == F32) return 4 * C * (size_t)n;
    if (precision == BF16) return 2 * C * (size_t)round_up(n, 2);
    return (size_t)(n / INT8_CHUNK) * C * (8 + INT8_CHUNK) + (rest ? C * (8 + (size_t)round_up((int)rest, 4)) : 0);
}

/* At most INT8_CHUNK of k: the columns as rows of words, which are then transposed. Columns past `cols` are zero. */
static void pack_slice(Precision precision, Word *panel, const float *w, size_t stride, int cols, int n) {
    enum { WORDS = INT8_CHUNK };
    Word words[MAX_TILE_COLS * WORDS];
    int C = kernels->tile_cols, length = precision == F32 ? n : precision == BF16 ? (n + 1) / 2 : (n + 3) / 4;
    float *scales = (float *)panel; /* INT8's first two lines */
    int32_t *corrections = (int32_t *)panel + C;
    for (int j = 0; j < C; j++) {
        Word *column = words + j * WORDS;
        if (j >= cols) {
            memset(column, 0, sizeof(Word) * (size_t)length);
            if (precision == INT8) scales[j] = 0, corrections[j] = 0;
        } else if (precision == INT8) {
            int sum;
            quantize((uint8_t *)column, w + j * stride, n, &scales[j], &sum);
            for (int k = 0; k < length; k++) column[k] ^= 0x80808080u * (kernels->byte_offset != 0);
            corrections[j] = -kernels->byte_offset * sum;
        } else {
            narrow_row(precision, column, w + j * stride, n);
        }
    }
    kernels->transpose(precision == INT8 ? panel + 2 * C : panel, (size_t)C, words, WORDS, C, length);
}

void pack_rows(Precision precision, void *panel, const float *w, size_t stride, int cols, int n) {
    for (int k = 0; k < n; k += INT8_CHUNK) {
        int count = smaller(INT8_CHUNK, n - k);
        pack_slice(precision, panel, w + k, stride, cols, count);
        panel = (char *)panel + panel_bytes(precision, count);
    }
}

/* The same from w (n, stride) as it lies: its first `cols` columns. F32 and BF16 only. */
void pack_columns(Precision precision, void *panel, const float *w, size_t stride, int cols, int n) {
    int C = kernels->tile_cols;
    float row[2][MAX_TILE_COLS] = {{0}};
    uint16_t narrow[2][MAX_TILE_COLS];
    for (int k = 0; k < n; k++) {
        memcpy(row[k % 2], w + k * stride, sizeof(float) * (size_t)cols);
        if (precision == F32) {
            memcpy((float *)panel + (size_t)k * C, row[k % 2], sizeof(float) * (size_t)C);
        } else if (k % 2 || k + 1 == n) {
            uint16_t *out = (uint16_t *)panel + (size_t)(k / 2) * 2 * C;
            if (k % 2 == 0) memset(row[1], 0, sizeof row[1]);
            for (int i = 0; i < 2; i++) kernels->to_bf16(narrow[i], row[i], (size_t)C);
            for (int j = 0; j < C; j++) out[2 * j] = narrow[0][j], out[2 * j + 1] = narrow[1][j];
        }
    }
}
