/* panel.c - what the tiles multiply: packed rows and panels, in the layout of each precision.
 *
 * A tile multiplies R packed rows by the C columns of a panel (kernel_body.h). It reads a row one element at a
 * time and spreads that over a register; columns it reads a register at a time. So a panel holds the C elements
 * of one k side by side:
 *
 *           packed row                        panel
 *   F32     floats                            [k][C] floats
 *   BF16    floats, or pairs of bfloat16      [k][C] floats, or [k/2][C] pairs
 *   INT8    chunks: scale, bytes              chunks: [C] scales, [C] corrections, [k/4][C] four bytes
 *
 * Zeros fill k up to a multiple of the tile's step: a pair, four, or the 64 bytes of AMX.
 *
 * An INT8 chunk of 256 elements has a scale of its own in every row and every column: its largest magnitude / 127.
 * One scale for a whole row would be cheaper, but one outlier would take the resolution of all.
 *
 * Rows are narrowed once, to row operands in memory, and packed by each task that multiplies them. A row operand
 * is the same for every table of kernels; a packed row is what the chosen table's tiles read. Where both are the
 * same, tiles read whole rows in memory.
 *
 * Few processors multiply pairs of bfloat16 faster than two floats. On all others, tiles take BF16 as floats
 * that were rounded to bfloat16. Pairs lie in memory as AVX-512 and AMX read them, so weights of bfloat16 are only
 * transposed. Each adds products in an order of its own (engine.h, amx.c). */
#include "engine/engine.h"

#include <limits.h>
#include <string.h>

bool tiles_take_floats(Precision precision) {
    return precision == F32 || (precision == BF16 && kernels->order_of_bf16 == RISING);
}

bool tiles_take_operands(Precision precision) { return precision != BF16 || kernels->order_of_bf16 != RISING; }

/* ---------------------------------------------------------------- row operands */

size_t row_offset(Precision precision, int k) {
    if (precision == INT8) return (size_t)k / INT8_CHUNK * (SCALE_BYTES + INT8_CHUNK);
    return (size_t)k * (precision == F32 ? 4 : 2);
}

size_t row_bytes(Precision precision, int n) {
    int rest = n % INT8_CHUNK;
    if (precision != INT8) return row_offset(precision, n);
    return row_offset(INT8, n) + (rest ? SCALE_BYTES + (size_t)round_up(rest, 64) : 0);
}

/* A chunk of at most INT8_CHUNK elements: its bytes, filled up to fours, and their sum. Returns its scale. */
static float quantize(uint8_t *bytes, const float *x, int n, int *sum) {
    for (int k = n; k % 4; k++) bytes[k] = (uint8_t)kernels->byte_offset;
    return kernels->quantize(bytes, x, n, sum);
}

static void narrow_chunk(uint8_t *chunk, const float *x, int n) {
    int sum;
    float scale = quantize(chunk + SCALE_BYTES, x, n, &sum);
    memcpy(chunk, &scale, sizeof scale);
}

void narrow_row(Precision precision, void *row, const float *x, int n) {
    if (precision == F32) memcpy(row, x, sizeof(float) * (size_t)n);
    if (precision == BF16) kernels->to_bf16(row, x, (size_t)n);
    for (int k = 0; precision == INT8 && k < n; k += INT8_CHUNK)
        narrow_chunk((uint8_t *)row + row_offset(INT8, k), x + k, smaller(INT8_CHUNK, n - k));
}

/* ---------------------------------------------------------------- packed rows */

/* Whole cache lines, and one more: rows that lie a power of two apart would share a few sets of the cache. */
size_t packed_bytes(Precision precision, int n) {
    int filled = round_up(n, kernels->tile[precision].step);
    size_t bytes = tiles_take_floats(precision) ? sizeof(float) * (size_t)n : row_bytes(precision, filled);
    return CACHE_LINE + whole_lines(bytes);
}

size_t packed_offset(Precision precision, int k) {
    return tiles_take_floats(precision) ? sizeof(float) * (size_t)k : row_offset(precision, k);
}

void pack_piece(Precision precision, void *packed, const void *row, int n) {
    if (precision == BF16 && tiles_take_floats(BF16)) kernels->from_bf16(packed, row, (size_t)n);
    else memcpy(packed, row, row_bytes(precision, n));
}

void fill_up(Precision precision, void *packed, int n) {
    int filled = round_up(n, kernels->tile[precision].step);
    if (precision == BF16 && !tiles_take_floats(BF16))
        memset((uint16_t *)packed + n, 0, sizeof(uint16_t) * (size_t)(filled - n));
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

void pack_floats(Precision precision, void *packed, const float *x, int n) {
    if (precision == F32) {
        memcpy(packed, x, sizeof(float) * (size_t)n);
    } else if (!tiles_take_floats(BF16)) {
        kernels->to_bf16(packed, x, (size_t)n);
        fill_up(precision, packed, n);
    } else {
        round_row(packed, x, n);
    }
}

/* ---------------------------------------------------------------- panels */

size_t panel_bytes(Precision precision, int n) {
    size_t C = (size_t)kernels->tile_cols;
    int step = kernels->tile[precision].step, rest = n % INT8_CHUNK;
    if (tiles_take_floats(precision)) return 4 * C * (size_t)n;
    if (precision == BF16) return 2 * C * (size_t)round_up(n, step);
    return C * (size_t)(n / INT8_CHUNK * (8 + INT8_CHUNK) + (rest ? 8 + round_up(rest, step) : 0));
}

Ahead panel_ahead(Precision precision, const char *next, int n, int tile) {
    size_t share = panel_bytes(precision, n) / TILES_AHEAD;
    size_t round = panel_bytes(precision, kernels->tile[precision].step);
    return (Ahead){next + (size_t)(tile % TILES_AHEAD) * share, round / TILES_AHEAD, 0, INT_MAX};
}

/* Each tile fetches a few rows of w, each row in a run of its own. */
Ahead weights_ahead(Precision precision, const Weight *w, int first, int from, int n, int tile, int tiles) {
    int rows = ceiling(kernels->tile_cols, tiles), rounds = n / kernels->tile[precision].step;
    int run = rounds > rows ? rounds / rows : 1;
    size_t stride = type_bytes(w->type, (size_t)w->cols), bytes = type_bytes(w->type, (size_t)n) / (size_t)run;
    const char *row = (const char *)w->data + (size_t)(first + tile * rows) * stride;
    return (Ahead){row + type_bytes(w->type, (size_t)from), bytes, stride - (size_t)run * bytes, run};
}

/* A chunk of a column as bytes; *scale and *correction are its own in the panel's first two lines. */
static void pack_bytes(Word *bytes, const float *column, int n, float *scale, int32_t *correction) {
    int sum;
    *scale = quantize((uint8_t *)bytes, column, n, &sum);
    for (int k = 0; k < ceiling(n, 4); k++) bytes[k] ^= 0x80808080u * (kernels->byte_offset != 0);
    *correction = -kernels->byte_offset * sum;
}

/* At most INT8_CHUNK of a column, from element `at` of w, as words.
 * `line` is its place in the panel's first line. */
static void pack_column(Precision precision, Word *words, const Weight *w, size_t at, int n, Word *line) {
    float column[INT8_CHUNK];
    bool floats = tiles_take_floats(precision);
    weight_part(w, at, n, floats ? (float *)words : column);
    if (precision == INT8) pack_bytes(words, column, n, (float *)line, (int32_t *)line + kernels->tile_cols);
    else if (!floats) pack_floats(precision, words, column, n);
    else if (precision == BF16 && w->type != TYPE_BF16) round_row((float *)words, (float *)words, n);
}

/* Whether rows of weights are rows of words already. */
static bool holds_pairs(const Weight *w) {
    return w->type == TYPE_BF16 && !tiles_take_floats(BF16) && w->cols % 2 == 0;
}

/* At most INT8_CHUNK of k: columns as rows of words, which are then transposed.
 * Columns past the last are zero. */
static void pack_slice(Precision precision, Word *panel, const Weight *w, int first, int from, int n) {
    enum { WORDS = INT8_CHUNK };
    Word words[MAX_TILE_COLS * WORDS];
    int C = kernels->tile_cols, cols = smaller(C, w->rows - first);
    size_t at = (size_t)first * w->cols + from, length = panel_bytes(precision, n) / sizeof(Word) / (size_t)C;
    bool filled = n % kernels->tile[precision].step == 0; /* else the last words are zeros */
    if (precision == F32 && w->type == TYPE_F32 && cols == C) {
        kernels->transpose(panel, (size_t)C, (const Word *)w->data + at, (size_t)w->cols, C, n);
        return;
    }
    if (precision == BF16 && holds_pairs(w) && cols == C && filled && at % 2 == 0) {
        kernels->transpose(panel, (size_t)C, (const Word *)w->data + at / 2, (size_t)w->cols / 2, C, n / 2);
        return;
    }
    if (cols < C || !filled) memset(words, 0, sizeof words[0] * WORDS * (size_t)C);
    if (precision == INT8) memset(panel, 0, 2 * sizeof *panel * (size_t)C), length -= 2;
    for (int j = 0; j < cols; j++)
        pack_column(precision, words + j * WORDS, w, at + (size_t)j * w->cols, n, panel + j);
    kernels->transpose(precision == INT8 ? panel + 2 * C : panel, (size_t)C, words, WORDS, C, (int)length);
}

void pack_panel(Precision precision, void *panel, const Weight *w, int first, int from, int n) {
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
    for (size_t j = 0; j < C; j++) panel[2 * j] = narrow[0][j], panel[2 * j + 1] = narrow[1][j];
}

void pack_columns(Precision precision, void *panel, const float *w, size_t stride, int cols, int n) {
    size_t C = (size_t)kernels->tile_cols;
    float row[2][MAX_TILE_COLS] = {{0}};
    bool floats = tiles_take_floats(precision);
    for (int k = 0; k < round_up(n, kernels->tile[precision].step); k++) {
        float *line = row[k % 2];
        if (k < n) memcpy(line, w + k * stride, sizeof(float) * (size_t)cols);
        else memset(line, 0, sizeof row[0]);
        if (floats) pack_floats(precision, (float *)panel + (size_t)k * C, line, (int)C);
        else if (k % 2) pair_up((uint16_t *)panel + (size_t)(k / 2) * 2 * C, row[0], row[1]);
    }
}
