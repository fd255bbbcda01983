/* mark.c - frames -> frames with an invisible mark of 64 bits (--mark), and frames -> the mark (--verify).
 *
 * Spread spectrum (Cox et al., 1997) on 8x8 DCT coefficients. A tile of 64x64 pixels has 64 blocks of 8x8. In each
 * block eight coefficients of low to middle frequency get a sign, + or -, from the key: 512 chips.
 *
 *   256 chips   presence: always the same
 *   256 chips   payload: 64 bits, four chips each, negated if the bit is 0
 *
 *      +------+------+------+-
 *      | tile | tile | tile |         The tile is repeated across the frame, the same in every frame, and added to the
 *      +------+------+------+-        8-bit luma with a root mean square of STRENGTH grey levels.
 *
 * Reading:
 *   1. average the frames: the mark stays, moving content blurs
 *   2. subtract the local mean, divide by the local standard deviation: edges count no more than flat areas
 *   3. add all tiles into one ("folding")
 *   4. correlate with the presence pattern at all 64x64 shifts (a cropped clip is shifted)
 *   5. if no peak is high enough, scale the clip back by each of 279 factors from 1/2 to 2, and repeat 2 to 4
 * A mark is found if the peak is MARK_DEVIATIONS standard deviations above the mean of all shifts. The signs of the
 * payload's correlations at that shift are its bits.
 *
 * The key is public (below), so whoever wants to remove the mark can. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = MARK_SIDE, BLOCK = 8, BLOCKS = SIDE / BLOCK, AREA = SIDE * SIDE };
enum { FREQUENCIES = 8, CHIPS = BLOCKS * BLOCKS * FREQUENCIES, PRESENCE = CHIPS / 2, BITS = 64 };

/* Zig-zag positions 3 to 10: (row, column) frequencies. */
static const uint8_t frequencies[FREQUENCIES][2] = {{0, 1}, {1, 0}, {2, 0}, {1, 1}, {0, 2}, {0, 3}, {1, 2}, {2, 1}};

/* cos(pi i / 16) as constants, so that the pixels do not depend on libm. */
static const double cosines[17] = {
    1, 0.98078528040323043, 0.92387953251128674, 0.83146961230254524, 0.70710678118654752, 0.55557023301960218,
    0.38268343236508977, 0.19509032201612825, 0, -0.19509032201612825, -0.38268343236508977, -0.55557023301960218,
    -0.70710678118654752, -0.83146961230254524, -0.92387953251128674, -0.98078528040323043, -1};

/* cos(pi i / 16) for any i >= 0 */
static double cosine(int i) {
    i %= 32;
    return cosines[i > 16 ? 32 - i : i];
}

/* Pixel (y,x) of the block whose orthonormal DCT is 1 at (u,v) and 0 elsewhere. */
static double basis(int u, int v, int y, int x) {
    double scale = (u ? 0.5 : 0.35355339059327376) * (v ? 0.5 : 0.35355339059327376);
    return scale * cosine((2 * y + 1) * u) * cosine((2 * x + 1) * v);
}

/* splitmix64 (Steele et al., 2014) */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

typedef struct {
    float presence[AREA];
    float bits[BITS][AREA];
} MarkTiles;

/* The key gives a permutation of the chips, and a sign for each. */
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

/* The sum of the presence tile and of all bits' tiles, scaled to STRENGTH. */
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

/* out (H,W) = means of x (H,W) over squares of side 2*radius+1, cut at the edges; line [max(H,W)+1] is work space */
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

/* out (height,width) = the average frame, made smaller by the factor `scale`, bilinear */
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

/* folded (SIDE,SIDE): steps 2 and 3 */
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

/* Dot product of the pattern with the folded tile, shifted cyclically by (dy,dx); twice (SIDE,2*SIDE) is that tile next
 * to itself. */
static float correlate(const float pattern[AREA], const float twice[2 * AREA], int dy, int dx) {
    float lanes[LANES] = {0};
    for (int y = 0; y < SIDE; y++) {
        const float *p = pattern + y * SIDE, *f = twice + (y + dy) % SIDE * 2 * SIDE + dx;
        for (int x = 0; x < SIDE; x += LANES)
            for (int i = 0; i < LANES; i++) lanes[i] += p[x + i] * f[x + i];
    }
    return lanes_sum(lanes);
}

/* The best candidate at one scale; its payload, if it counts as a mark. */
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

enum { SCALES = 279 }; /* from 1/2 to 2 in steps of 0.5 % */

static MarkFound search_scales(const MarkTiles *tiles, const MarkSum *sum) {
    MarkFound found[SCALES], best = {0};
    PARALLEL_FOR (int i = 0; i < SCALES; i++)
        found[i] = search_shifts(tiles, sum, exp(log(2) * (2.0 * i / (SCALES - 1) - 1)));
    for (int i = 0; i < SCALES; i++)
        if (found[i].deviations > best.deviations) best = found[i];
    return best;
}

/* Tries scale 1 first, because most clips keep their size. */
MarkFound mark_find(const MarkSum *sum) {
    MarkTiles *tiles = tiles_make(KEY);
    MarkFound found = search_shifts(tiles, sum, 1);
    if (found.deviations < MARK_DEVIATIONS) found = search_scales(tiles, sum);
    free(tiles);
    return found;
}
