/* panel.c - what the tiles multiply: row operands and panels, in the layout of each precision.
 *
 * A tile multiplies R rows by the C columns of a panel (kernels.c). Rows are read one element at a time and
 * spread over a register, columns a register at a time, so a panel holds the C elements of one k
 * side by side:
 *
 *   F32    row: floats                       panel: [k][C] floats
 *   BF16   row: bfloat16, in pairs of k      panel: [k/2][C] pairs
 *   INT8   row: chunks of a scale and bytes  panel: chunks of [C] scales, [C] corrections, and
 *                                                   [k/4][C] four bytes
 *
 * The last pair or four is filled with zeros. A chunk of 256 has a scale of its own in every row and every
 * column: largest magnitude / 127. One scale a row would be cheaper still, but then one outlier takes the
 * resolution of all.
 *
 * Few processors multiply pairs of bfloat16 faster than two floats. On all others BF16 is float32's
 * arithmetic on rounded numbers: rows are kept as bfloat16, which takes half the memory, but panels and the
 * rows that a tile reads are floats. The dot product of a pair adds its second product first; there pairs are
 * kept the other way round, so that a sum runs over k in rising order everywhere. */
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

/* A chunk of at most INT8_CHUNK elements: its bytes, filled up to fours, and their sum. Returns its scale. */
static float quantize(uint8_t *bytes, const float *x, int n, int *sum) {
    for (int k = n; k % 4; k++) bytes[k] = (uint8_t)kernels->byte_offset;
    return kernels->quantize(bytes, x, n, sum);
}

static void narrow_chunk(uint8_t *row, const float *x, int n) {
    int sum;
    float scale = quantize(row + sizeof scale, x, n, &sum);
    memcpy(row, &scale, sizeof scale);
}

static void trade_places(uint16_t *pairs, int n) {
    for (int k = 0; k < n; k += 2) {
        uint16_t first = pairs[k];
        pairs[k] = pairs[k + 1];
        pairs[k + 1] = first;
    }
}

void narrow_row(Precision precision, void *row, const float *x, int n) {
    if (precision == F32) {
        memcpy(row, x, sizeof(float) * (size_t)n);
    } else if (precision == BF16) {
        kernels->to_bf16(row, x, (size_t)n);
        if (n % 2) ((uint16_t *)row)[n] = 0;
        if (kernels->pairs) trade_places(row, n);
    } else {
        for (int k = 0; k < n; k += INT8_CHUNK)
            narrow_chunk((uint8_t *)row + row_offset(INT8, k), x + k, smaller(INT8_CHUNK, n - k));
    }
}

void narrow_rows(Precision precision, void *rows, const float *x, size_t stride, int L, int n) {
    size_t bytes = row_bytes(precision, n);
    PARALLEL_FOR (int l = 0; l < L; l++)
        narrow_row(precision, (char *)rows + l * bytes, x + l * stride, n);
}

Precision tile_type(Precision precision) {
    return precision == BF16 && !kernels->pairs ? F32 : precision;
}

/* y = x as bfloat16 and back; y may be x. */
static void round_row(float *y, const float *x, int n) {
    uint16_t narrow[INT8_CHUNK];
    for (int k = 0; k < n; k += INT8_CHUNK) {
        size_t count = (size_t)smaller(INT8_CHUNK, n - k);
        kernels->to_bf16(narrow, x + k, count);
        kernels->from_bf16(y + k, narrow, count);
    }
}

void tile_row(Precision precision, void *row, const float *x, int n) {
    if (tile_type(precision) == precision) narrow_row(precision, row, x, n);
    else round_row(row, x, n);
}

size_t panel_bytes(Precision precision, int n) {
    size_t C = (size_t)kernels->tile_cols, rest = (size_t)(n % INT8_CHUNK);
    if (tile_type(precision) == F32) return 4 * C * (size_t)n;
    if (precision == BF16) return 2 * C * (size_t)round_up(n, 2);
    return (size_t)(n / INT8_CHUNK) * C * (8 + INT8_CHUNK) +
           (rest ? C * (8 + (size_t)round_up((int)rest, 4)) : 0);
}

/* A chunk of a column as bytes; *scale and *correction are its own in the panel's first two lines. */
static void pack_bytes(Word *bytes, const float *column, int n, float *scale, int32_t *correction) {
    int sum;
    *scale = quantize((uint8_t *)bytes, column, n, &sum);
    for (int k = 0; k < (n + 3) / 4; k++) bytes[k] ^= 0x80808080u * (kernels->byte_offset != 0);
    *correction = -kernels->byte_offset * sum;
}

/* At most INT8_CHUNK of a column, from element `at` of w, as words.
 * `line` is its place in the panel's first line. */
static void pack_column(Precision precision, Word *words, const Weight *w, size_t at, int n, Word *line) {
    const char *data = (const char *)w->data + type_bytes(w->type, at);
    float column[INT8_CHUNK];
    if (tile_type(precision) == F32) {
        convert_to_floats((float *)words, data, w->type, n);
        if (precision == BF16 && w->type != TYPE_BF16) round_row((float *)words, (float *)words, n);
        return;
    }
    convert_to_floats(column, data, w->type, n);
    if (precision == BF16) narrow_row(BF16, words, column, n);
    else pack_bytes(words, column, n, (float *)line, (int32_t *)line + kernels->tile_cols);
}

/* At most INT8_CHUNK of k: columns as rows of words, which are then transposed.
 * Columns past the last are zero. */
static void pack_slice(Precision precision, Word *panel, const Weight *w, int first, int from, int n) {
    enum { WORDS = INT8_CHUNK };
    Word words[MAX_TILE_COLS * WORDS];
    int C = kernels->tile_cols, cols = smaller(C, w->rows - first);
    size_t at = (size_t)first * w->cols + from, length = panel_bytes(precision, n) / sizeof(Word) / (size_t)C;
    if (precision == F32 && w->type == TYPE_F32 && cols == C) {
        kernels->transpose(panel, (size_t)C, (const Word *)w->data + at, (size_t)w->cols, C, n);
        return;
    }
    memset(words, 0, sizeof words[0] * WORDS * (size_t)C * (cols < C));
    if (precision == INT8) memset(panel, 0, 2 * sizeof *panel * (size_t)C), length -= 2;
    for (int j = 0; j < cols; j++)
        pack_column(precision, words + j * WORDS, w, at + (size_t)j * w->cols, n, panel + j);
    kernels->transpose(precision == INT8 ? panel + 2 * C : panel, (size_t)C, words, WORDS, C, (int)length);
}

void pack_rows(Precision precision, void *panel, const Weight *w, int first, int from, int n) {
    for (int k = 0; k < n; k += INT8_CHUNK) {
        int count = smaller(INT8_CHUNK, n - k);
        pack_slice(precision, panel, w, first, from + k, count);
        panel = (char *)panel + panel_bytes(precision, count);
    }
}

/* One line of a panel from the rows of two k. */
static void pair_up(uint16_t *panel, const float *first, const float *second) {
    uint16_t narrow[2][MAX_TILE_COLS];
    size_t C = (size_t)kernels->tile_cols;
    kernels->to_bf16(narrow[0], first, C);
    kernels->to_bf16(narrow[1], second, C);
    for (size_t j = 0; j < C; j++) panel[2 * j] = narrow[1][j], panel[2 * j + 1] = narrow[0][j];
}

/* The same from w (n, stride) as it lies: its first `cols` columns. F32 and BF16 only. */
void pack_columns(Precision precision, void *panel, const float *w, size_t stride, int cols, int n) {
    size_t C = (size_t)kernels->tile_cols;
    float row[2][MAX_TILE_COLS] = {{0}};
    for (int k = 0; k < n; k++) {
        memcpy(row[k % 2], w + k * stride, sizeof(float) * (size_t)cols);
        if (tile_type(precision) == F32) {
            tile_row(precision, (float *)panel + (size_t)k * C, row[k % 2], (int)C);
        } else if (k % 2 || k + 1 == n) {
            if (k % 2 == 0) memset(row[1], 0, sizeof row[1]);
            pair_up((uint16_t *)panel + (size_t)(k / 2) * 2 * C, row[0], row[1]);
        }
    }
}
