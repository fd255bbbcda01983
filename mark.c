/* mark.c - frames -> frames that carry an invisible mark, and back: is it there, and what does it say?
 *
 * Spread spectrum (Cox et al., 1997) in the plane of an 8x8 DCT. A tile of 64x64 pixels is 64 blocks of 8x8; in each
 * block eight coefficients of middle-low frequency have a sign, + or -, that only the key decides: 512 chips.
 *
 *   256 chips   presence: always the same
 *   256 chips   payload: 64 bits, four chips each, turned round where the bit is 0
 *
 *      +------+------+------+-        The tile is repeated over the frame, and every frame of the clip is given the
 *      | tile | tile | tile |         same. It is added to the luma in 8 bits: less than one grey level on average,
 *      +------+------+------+-        more where a block is busy and hides it.
 *
 * The reader averages the frames, which leaves the mark and blurs what moves; takes away what is smooth; divides by the
 * local deviation, so that an edge counts no more than a flat patch; and adds all tiles into one ("folding"). The sum
 * is correlated with the presence pattern at each of its 64x64 shifts: a cropped clip has a peak elsewhere. A scaled
 * clip is scaled back by each factor in turn. The peak's height in deviations of the other shifts is the verdict.
 *
 * The key stands below: the mark tells what is honest, it does not stop who wants to take it away. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = MARK_SIDE, BLOCK = 8, BLOCKS = SIDE / BLOCK, AREA = SIDE * SIDE };
enum { FREQUENCIES = 8, CHIPS = BLOCKS * BLOCKS * FREQUENCIES, PRESENCE = CHIPS / 2, BITS = 64 };

/* Zig-zag positions 3 to 10: (row, column) frequencies. */
static const uint8_t frequencies[FREQUENCIES][2] = {{0, 1}, {1, 0}, {2, 0}, {1, 1}, {0, 2}, {0, 3}, {1, 2}, {2, 1}};

/* cos(pi i / 16), written out: every libm then gives the same pixels. */
static const double cosines[17] = {
    1, 0.98078528040323043, 0.92387953251128674, 0.83146961230254524, 0.70710678118654752, 0.55557023301960218,
    0.38268343236508977, 0.19509032201612825, 0, -0.19509032201612825, -0.38268343236508977, -0.55557023301960218,
    -0.70710678118654752, -0.83146961230254524, -0.92387953251128674, -0.98078528040323043, -1};

/* cos(pi i / 16) of any i >= 0. */
static double cosine(int i) {
    i %= 32;
    return cosines[i > 16 ? 32 - i : i];
}

/* Pixel (y,x) of the block in which coefficient (u,v) of the orthonormal DCT is 1. */
static double basis(int u, int v, int y, int x) {
    double scale = (u ? 0.5 : 0.35355339059327376) * (v ? 0.5 : 0.35355339059327376);
    return scale * cosine((2 * y + 1) * u) * cosine((2 * x + 1) * v);
}

/* The key: a permutation of the chips, and a sign for each. */
static uint64_t next_random(uint64_t *state) { /* splitmix64 (Steele et al., 2014) */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

typedef struct {
    float presence[AREA];
    float bits[BITS][AREA];
} MarkTiles;

static MarkTiles *tiles_make(uint64_t key) {
    MarkTiles *tiles = allocate(sizeof *tiles);
    int order[CHIPS];
    for (int i = 0; i < CHIPS; i++) {
        int j = (int)(next_random(&key) % (uint64_t)(i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    for (int chip = 0; chip < CHIPS; chip++) {
        int block = chip / FREQUENCIES, u = frequencies[chip % FREQUENCIES][0], v = frequencies[chip % FREQUENCIES][1];
        int place = order[chip], top = block / BLOCKS * BLOCK, left = block % BLOCKS * BLOCK;
        float *tile = place < PRESENCE ? tiles->presence : tiles->bits[place % BITS];
        float sign = next_random(&key) >> 63 ? 1.0f : -1.0f;
        for (int y = 0; y < BLOCK; y++)
            for (int x = 0; x < BLOCK; x++)
                tile[(top + y) * SIDE + left + x] += sign * (float)basis(u, v, y, x);
    }
    return tiles;
}

/* ---------------------------------------------------------------- writing */

enum { KEY = 0x534f5241 }; /* "SORA" */
#define STRENGTH 1.25f /* grey levels, root mean square */

/* Presence and payload share the energy; every pixel of the tile is a sum of the same 512 chips. */
Mark mark_make(uint64_t payload) {
    Mark mark;
    MarkTiles *tiles = tiles_make(KEY);
    double energy = 0;
    for (int i = 0; i < AREA; i++) {
        float sum = tiles->presence[i];
        for (int b = 0; b < BITS; b++) sum += payload >> b & 1 ? tiles->bits[b][i] : -tiles->bits[b][i];
        mark.tile[i] = sum;
        energy += (double)sum * sum;
    }
    float gain = STRENGTH / (float)sqrt(energy / AREA);
    for (int i = 0; i < AREA; i++) mark.tile[i] *= gain;
    free(tiles);
    return mark;
}

void mark_add(const Mark *mark, const VideoFormat *format, uint8_t *planes) {
    for (int y = 0; y < format->height; y++)
        for (int x = 0; x < format->width; x++, planes++) {
            float marked = (float)*planes + mark->tile[y % SIDE * SIDE + x % SIDE] + 0.5f;
            *planes = (uint8_t)(marked < 16 ? 16 : marked > 235 ? 235 : marked);
        }
}

/* ---------------------------------------------------------------- reading */

void mark_gather(MarkSum *sum, const VideoFormat *format, const float *frame) {
    size_t pixels = (size_t)format->width * (size_t)format->height;
    if (!sum->luma) *sum = (MarkSum){format->width, format->height, 0, allocate(pixels * sizeof(float))};
    const float *red = frame, *green = red + pixels, *blue = green + pixels;
    for (size_t i = 0; i < pixels; i++) sum->luma[i] += 0.299f * red[i] + 0.587f * green[i] + 0.114f * blue[i];
    sum->frames++;
}

/* out (H,W): the means of x over squares of 2*radius+1, cut off at the edges; `line` has room for larger(H,W)+1. */
static void box_means(float *out, const float *x, int W, int H, int radius, double *line) {
    for (int pass = 0; pass < 2; pass++) { /* along rows, then along columns of the result */
        int lines = pass ? W : H, length = pass ? H : W;
        size_t step = pass ? (size_t)W : 1, next = pass ? 1 : (size_t)W;
        const float *in = pass ? out : x;
        for (int l = 0; l < lines; l++) {
            line[0] = 0;
            for (int i = 0; i < length; i++) line[i + 1] = line[i] + in[l * next + i * step];
            for (int i = 0; i < length; i++) {
                int from = i > radius ? i - radius : 0, to = smaller(i + radius + 1, length);
                out[l * next + i * step] = (float)((line[to] - line[from]) / (to - from));
            }
        }
    }
}

/* The average frame, scaled back: out (height,width), bilinear. */
static void scale_back(float *out, int width, int height, const MarkSum *sum, double scale) {
    float gain = 109.5f / (float)sum->frames; /* to grey levels */
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            double v = fmax(0, (y + 0.5) * scale - 0.5), u = fmax(0, (x + 0.5) * scale - 0.5);
            int top = smaller((int)v, sum->height - 1), left = smaller((int)u, sum->width - 1);
            int below = smaller(top + 1, sum->height - 1), right = smaller(left + 1, sum->width - 1);
            float fy = (float)(v - top), fx = (float)(u - left);
            const float *a = sum->luma + (size_t)top * sum->width, *b = sum->luma + (size_t)below * sum->width;
            out[(size_t)y * width + x] = gain * ((1 - fy) * ((1 - fx) * a[left] + fx * a[right]) +
                                                 fy * ((1 - fx) * b[left] + fx * b[right]));
        }
}

/* What is left of the average frame beside the picture, all tiles in one: folded (SIDE,SIDE). */
static void fold(float folded[AREA], const MarkSum *sum, double scale) {
    int width = (int)(sum->width / scale + 0.5), height = (int)(sum->height / scale + 0.5);
    size_t pixels = (size_t)width * (size_t)height;
    float *x = allocate(3 * pixels * sizeof *x), *means = x + pixels, *squares = means + pixels;
    double *line = allocate((larger((size_t)width, (size_t)height) + 1) * sizeof *line);
    scale_back(x, width, height, sum, scale);
    box_means(means, x, width, height, 4, line);
    for (size_t i = 0; i < pixels; i++) x[i] -= means[i], means[i] = x[i] * x[i];
    box_means(squares, means, width, height, 8, line);
    memset(folded, 0, AREA * sizeof *folded);
    for (size_t i = 0; i < pixels; i++) {
        float value = x[i] / (sqrtf(fmaxf(squares[i], 0)) + 0.7f);
        size_t row = i / (size_t)width % SIDE, column = i % (size_t)width % SIDE;
        folded[row * SIDE + column] += fmaxf(-2.5f, fminf(2.5f, value));
    }
    free(line);
    free(x);
}

/* sum over the tile of pattern times what was folded, shifted by (dy,dx); `twice` (SIDE,2*SIDE) is it beside itself. */
static float correlate(const float pattern[AREA], const float twice[2 * AREA], int dy, int dx) {
    float lanes[LANES] = {0};
    for (int y = 0; y < SIDE; y++) {
        const float *p = pattern + y * SIDE, *f = twice + (y + dy) % SIDE * 2 * SIDE + dx;
        for (int x = 0; x < SIDE; x += LANES)
            for (int i = 0; i < LANES; i++) lanes[i] += p[x + i] * f[x + i];
    }
    return lanes_sum(lanes);
}

/* The highest of all shifts, in deviations from their mean; what it says, if it stands out. */
static MarkFound search_shifts(const MarkTiles *tiles, const MarkSum *sum, double scale) {
    float folded[AREA], twice[2 * AREA], highest = -INFINITY;
    double total = 0, squares = 0;
    MarkFound found = {.scale = scale};
    fold(folded, sum, scale);
    for (int i = 0; i < 2 * AREA; i++) twice[i] = folded[i / (2 * SIDE) * SIDE + i % SIDE];
    for (int shift = 0; shift < AREA; shift++) {
        float value = correlate(tiles->presence, twice, shift / SIDE, shift % SIDE);
        total += value;
        squares += (double)value * value;
        if (value > highest) highest = value, found.y = shift / SIDE, found.x = shift % SIDE;
    }
    double mean = total / AREA, variance = squares / AREA - mean * mean;
    found.deviations = variance > 0 ? (highest - mean) / sqrt(variance) : 0;
    for (int b = 0; b < BITS && found.deviations >= MARK_DEVIATIONS; b++)
        if (correlate(tiles->bits[b], twice, found.y, found.x) > 0) found.payload |= (uint64_t)1 << b;
    return found;
}

enum { SCALES = 279 }; /* from 1/2 to 2 in steps of half a per cent */

static MarkFound search_scales(const MarkTiles *tiles, const MarkSum *sum) {
    MarkFound found[SCALES], best = {0};
    PARALLEL_FOR (int i = 0; i < SCALES; i++)
        found[i] = search_shifts(tiles, sum, exp(log(2) * (2.0 * i / (SCALES - 1) - 1)));
    for (int i = 0; i < SCALES; i++)
        if (found[i].deviations > best.deviations) best = found[i];
    return best;
}

/* Most clips have the size that they were made in. */
MarkFound mark_find(const MarkSum *sum) {
    MarkTiles *tiles = tiles_make(KEY);
    MarkFound found = search_shifts(tiles, sum, 1);
    if (found.deviations < MARK_DEVIATIONS) found = search_scales(tiles, sum);
    free(tiles);
    return found;
}
