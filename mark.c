/* mark.c - frames -> frames with an invisible mark of 64 bits (--mark), and frames -> the mark (--verify).
 *
 * Spread spectrum (Cox et al., 1997) on 8x8 DCT coefficients:
 *
 *   a tile, 64x64 pixels          one of its 8x8 blocks          The tile is repeated across the frame, the same in
 *   +--+--+--+--+--+--+--+--+          v 0 1 2 3 ...             every frame.
 *   |##|  |##|  |##|  |##|  |        u 0 . . + .
 *   +--+--+--+--+--+--+--+--+          1 . . - .                 In every second block (#), four coefficients get a
 *   |  |##|  |##|  |##|  |##|          2 - + . .                 sign, + or -, from the key: 128 chips. Fewer, larger
 *   +--+--+--+--+--+--+--+--+          3 . . . .                 coefficients outlive an encoder better: it rounds
 *   |   ... 8 rows of 8     |          ...                       small ones to 0.
 *   +--+--+--+--+--+--+--+--+
 *                                     64 chips   presence: always the same
 *                                     64 chips   payload: one a bit, negated if the bit is 0
 *
 *   tile(y,x) = gain * (presence(y,x) + sum over bits b of (b ? 1 : -1) * chip_b(y,x))
 *
 * with a root mean square of STRENGTH grey levels; it is added to the 8-bit luma.
 *
 * Reading:
 *   1. a = average of the frames: the mark stays, moving content blurs
 *   2. r = (a - its local mean) / its local standard deviation: edges count no more than flat areas
 *   3. f(y,x) = sum of r over all tiles ("folding")
 *   4. F(k,l) = DFT(f) / (|DFT(f)|^2 averaged over the 3x3 frequencies around)^0.35: pictures are strongest in low
 *      frequencies, and this lets all frequencies count about the same
 *   5. c = inverse DFT(F * conj(DFT(presence))): the correlation at all 64x64 shifts (a cropped clip is shifted)
 *   6. if no peak of c is high enough, scale the clip back by each of 279 factors from 1/2 to 2 and repeat 2 to 5; then
 *      the same in finer steps around the best factor
 * A mark is found if the peak is MARK_DEVIATIONS standard deviations above the mean of all shifts. The signs of the
 * payload's correlations at that shift are its bits.
 *
 * The key is public (below), so whoever wants to remove the mark can. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = MARK_SIDE, BLOCK = 8, BLOCKS = SIDE / BLOCK, AREA = SIDE * SIDE };
enum { FREQUENCIES = 4, BITS = 64, PRESENCE = 64, CHIPS = PRESENCE + BITS };

/* (u,v): low enough for an encoder to keep, high enough for pictures to be weak there */
static const uint8_t frequencies[FREQUENCIES][2] = {{0, 2}, {2, 0}, {1, 2}, {2, 1}};

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
        int row = block / (BLOCKS / 2), column = block % (BLOCKS / 2) * 2 + row % 2; /* as on a chessboard */
        int top = row * BLOCK, left = column * BLOCK;
        float *tile = order[chip] < PRESENCE ? tiles->presence : tiles->bits[order[chip] - PRESENCE];
        float sign = next_random(&key) >> 63 ? 1.0f : -1.0f;
        for (int y = 0; y < BLOCK; y++)
            for (int x = 0; x < BLOCK; x++)
                tile[(top + y) * SIDE + left + x] += sign * (float)basis(u, v, y, x);
    }
    return tiles;
}

/* ---------------------------------------------------------------- writing */

enum { KEY = 0x534f5241 }; /* "SORA" */
#define STRENGTH 1.7f /* grey levels, root mean square */

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

/* out (height,width) = the middle of the average frame, made smaller by the factor `scale`, bilinear */
static void scale_back(float *out, int width, int height, const MarkSum *sum, double scale) {
    float gain = 109.5f / (float)sum->frames; /* to grey levels */
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            double v = fmax(0, sum->height * 0.5 + (y + 0.5 - height * 0.5) * scale - 0.5);
            double u = fmax(0, sum->width * 0.5 + (x + 0.5 - width * 0.5) * scale - 0.5);
            int top = smaller((int)v, sum->height - 1), left = smaller((int)u, sum->width - 1);
            int below = smaller(top + 1, sum->height - 1), right = smaller(left + 1, sum->width - 1);
            float fy = (float)(v - top), fx = (float)(u - left);
            const float *a = sum->luma + (size_t)top * sum->width, *b = sum->luma + (size_t)below * sum->width;
            out[(size_t)y * width + x] = gain * ((1 - fy) * ((1 - fx) * a[left] + fx * a[right]) +
                                                 fy * ((1 - fx) * b[left] + fx * b[right]));
        }
}

enum { MOST = 1024 }; /* of larger frames only the middle MOST x MOST pixels are read */

/* As even or odd as the side, so that the middle begins at a whole pixel. */
static int pixels_read(int side) { return smaller(side, MOST + side % 2); }

/* folded (SIDE,SIDE): steps 2 and 3 */
static void fold(float folded[AREA], const MarkSum *sum, double scale) {
    int width = (int)(pixels_read(sum->width) / scale + 0.5), height = (int)(pixels_read(sum->height) / scale + 0.5);
    size_t pixels = (size_t)width * (size_t)height;
    float *x = allocate(3 * pixels * sizeof *x), *means = x + pixels, *squares = means + pixels;
    double *line = allocate(((size_t)larger(width, height) + 1) * sizeof *line);
    scale_back(x, width, height, sum, scale);
    box_means(means, x, width, height, 2, line);
    for (size_t i = 0; i < pixels; i++) x[i] -= means[i], means[i] = x[i] * x[i];
    box_means(squares, means, width, height, 4, line);
    memset(folded, 0, AREA * sizeof *folded);
    for (size_t i = 0; i < pixels; i++) {
        float value = x[i] / (sqrtf(squares[i] > 0 ? squares[i] : 0) + 0.3f);
        size_t row = i / (size_t)width % SIDE, column = i % (size_t)width % SIDE;
        folded[row * SIDE + column] += value > 2.5f ? 2.5f : value < -2.5f ? -2.5f : value;
    }
    free(line);
    free(x);
}

/* A complex tile, or its spectrum. */
typedef struct {
    float re[SIDE][SIDE], im[SIDE][SIDE];
} Complex;

static Complex complex_of(const float re[AREA]) {
    Complex x = {0};
    memcpy(x.re, re, sizeof x.re);
    return x;
}

/* The DFT of columns, then of rows: x(k,l) = sum of x(y,x) e^(-2 pi j (ky + lx) / SIDE); its inverse if direction is
 * -1, but for the factor 1 / AREA. */
static void transform(Complex *x, float direction) {
    float cosine_of[SIDE], sine_of[SIDE];
    for (int i = 0; i < SIDE; i++) {
        cosine_of[i] = (float)cos(2 * 3.14159265358979324 * i / SIDE);
        sine_of[i] = -direction * (float)sin(2 * 3.14159265358979324 * i / SIDE);
    }
    for (int pass = 0; pass < 2; pass++) { /* each turns rows into columns */
        Complex turned;
        for (int k = 0; k < SIDE; k++) {
            float re[SIDE] = {0}, im[SIDE] = {0};
            for (int y = 0; y < SIDE; y++) {
                float c = cosine_of[y * k % SIDE], s = sine_of[y * k % SIDE];
                for (int i = 0; i < SIDE; i++) re[i] += c * x->re[y][i] - s * x->im[y][i];
                for (int i = 0; i < SIDE; i++) im[i] += c * x->im[y][i] + s * x->re[y][i];
            }
            for (int i = 0; i < SIDE; i++) turned.re[i][k] = re[i], turned.im[i][k] = im[i];
        }
        *x = turned;
    }
}

/* |x|^2 averaged over a frequency and its eight neighbours */
static float power_around(const Complex *x, int k, int l) {
    float sum = 0;
    for (int i = 0; i < 9; i++) {
        int row = (k + i / 3 + SIDE - 1) % SIDE, column = (l + i % 3 + SIDE - 1) % SIDE;
        sum += x->re[row][column] * x->re[row][column] + x->im[row][column] * x->im[row][column];
    }
    return sum / 9;
}

/* Steps 2 to 4: the clip's whitened spectrum at one scale. */
static Complex whitened_spectrum(const MarkSum *sum, double scale) {
    float folded[AREA];
    fold(folded, sum, scale);
    Complex x = complex_of(folded), white;
    transform(&x, 1);
    for (int k = 0; k < SIDE; k++)
        for (int l = 0; l < SIDE; l++) {
            float gain = (float)pow(power_around(&x, k, l) + 1e-12, -0.35);
            white.re[k][l] = gain * x.re[k][l], white.im[k][l] = gain * x.im[k][l];
        }
    return white;
}

/* Step 5: the real part at (y,x) is the correlation with the pattern, given as its spectrum, at that shift. */
static Complex correlate(const Complex *clip, const Complex *pattern) {
    Complex c;
    for (int k = 0; k < SIDE; k++)
        for (int l = 0; l < SIDE; l++) {
            float a = clip->re[k][l], b = clip->im[k][l], p = pattern->re[k][l], q = -pattern->im[k][l];
            c.re[k][l] = a * p - b * q, c.im[k][l] = a * q + b * p;
        }
    transform(&c, -1);
    return c;
}

typedef struct {
    double deviations; /* its height, in standard deviations, above the mean of all shifts */
    int step, y, x;    /* the scale, as in scale_of(); the shift */
} Peak;

static Peak find_peak(const float c[SIDE][SIDE], int step) {
    Peak peak = {.step = step};
    double sum = 0, squares = 0;
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++) {
            sum += c[y][x], squares += (double)c[y][x] * c[y][x];
            if (c[y][x] > c[peak.y][peak.x]) peak.y = y, peak.x = x;
        }
    double mean = sum / AREA, variance = squares / AREA - mean * mean;
    peak.deviations = variance > 0 ? (c[peak.y][peak.x] - mean) / sqrt(variance) : 0;
    return peak;
}

/* From scale 1 to 2 there are COARSE steps of 0.5 %, each divided into FINE. */
enum { COARSE = 139, FINE = 8 };
static double scale_of(int step) { return exp(log(2) * step / (COARSE * FINE)); }

/* The highest peak of `count` scales, `stride` steps apart, with `step` in the middle. */
static Peak search(const MarkSum *sum, const Complex *presence, int step, int count, int stride) {
    Peak peaks[2 * COARSE + 1], best = {0};
    PARALLEL_FOR (int i = 0; i < count; i++) {
        int at = step + (i - count / 2) * stride;
        Complex clip = whitened_spectrum(sum, scale_of(at)), c = correlate(&clip, presence);
        peaks[i] = find_peak((const float(*)[SIDE])c.re, at);
    }
    for (int i = 0; i < count; i++)
        if (peaks[i].deviations > best.deviations) best = peaks[i];
    return best;
}

static uint64_t read_payload(const MarkTiles *tiles, const MarkSum *sum, Peak peak) {
    Complex clip = whitened_spectrum(sum, scale_of(peak.step));
    uint64_t payload = 0;
    transform(&clip, -1);
    for (int b = 0; b < BITS; b++) {
        float c = 0;
        for (int i = 0; i < AREA; i++)
            c += tiles->bits[b][i] * clip.re[(i / SIDE + peak.y) % SIDE][(i % SIDE + peak.x) % SIDE];
        payload |= (uint64_t)(c > 0) << b;
    }
    return payload;
}

/* Tries scale 1 first, because most clips keep their size. */
MarkFound mark_find(const MarkSum *sum) {
    MarkTiles *tiles = tiles_make(KEY);
    Complex presence = complex_of(tiles->presence);
    transform(&presence, 1);
    Peak peak = search(sum, &presence, 0, 1, 1);
    if (peak.deviations < MARK_DEVIATIONS) {
        peak = search(sum, &presence, 0, 2 * COARSE + 1, FINE);
        peak = search(sum, &presence, peak.step, 2 * FINE - 1, 1);
    }
    MarkFound found = {.deviations = peak.deviations, .scale = scale_of(peak.step), .x = peak.x, .y = peak.y};
    if (peak.deviations >= MARK_DEVIATIONS) found.payload = read_payload(tiles, sum, peak);
    free(tiles);
    return found;
}
