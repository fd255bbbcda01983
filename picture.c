/* picture.c - files that a run begins from, as frames: pictures (PPM) and clips (y4m.c), scaled to the clip's size.
 *
 *   "P6\n832 480\n255\n", then 3 bytes a pixel: red, green, blue, row by row
 *
 * A picture of another size is scaled until it covers the frame, and cropped in the centre. The filter is Pillow's
 * BICUBIC with its box, in floating point: Keys' cubic with a = -0.5. It reaches two pixels to each side: pixels of the
 * source where it enlarges, of the result where it reduces. So a reduced picture is averaged, and does not alias. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SIDE = 32768, MAX_FRAMES = 1 << 24 };

/* ---------------------------------------------------------------- PPM */

/* The next number of a header, after blanks and comments; -1 if there is none, or a larger one. */
static int take_number(Bytes bytes, size_t *at, int most) {
    int64_t value = 0;
    for (; *at < bytes.size && strchr(" \t\r\n#", bytes.data[*at]) && bytes.data[*at]; ++*at)
        if (bytes.data[*at] == '#')
            while (*at + 1 < bytes.size && bytes.data[*at] != '\n' && bytes.data[*at] != '\r') ++*at;
    size_t start = *at;
    for (; *at < bytes.size && bytes.data[*at] >= '0' && bytes.data[*at] <= '9' && value <= most; ++*at)
        value = 10 * value + (bytes.data[*at] - '0');
    return *at > start && value <= most ? (int)value : -1;
}

static const char *parse_ppm(Bytes bytes, Source *out) {
    size_t at = 2;
    int width = take_number(bytes, &at, MAX_SIDE), height = take_number(bytes, &at, MAX_SIDE);
    int white = take_number(bytes, &at, 65535);
    if (width < 1 || height < 1) return "its size is not two numbers from 1 to 32768";
    if (white < 1) return "the header's third number, the value of white, is not from 1 to 65535";
    if (white > 255) return reason("16 bits a colour (white is %d), expected 8 (255)", white);
    if (at >= bytes.size || !strchr(" \t\r\n", bytes.data[at]) || !bytes.data[at]) return "the header does not end";
    size_t size = 3 * (size_t)width * (size_t)height, left = bytes.size - at - 1;
    if (left < size) return reason("the picture is cut off: %zu of %zu bytes", left, size);
    out->format = (VideoFormat){.width = width, .height = height, .chroma = 444};
    out->frames = 1, out->pixels = bytes.data + at + 1, out->white = white;
    return NULL;
}

size_t ppm_header(int width, int height, char out[32]) {
    return (size_t)snprintf(out, 32, "P6\n%d %d\n255\n", width, height);
}

void ppm_convert(int width, int height, const float *frame, uint8_t *out) {
    size_t pixels = (size_t)width * (size_t)height;
    for (size_t i = 0; i < pixels; i++)
        for (int c = 0; c < 3; c++) *out++ = byte_of((frame[c * pixels + i] + 1) * 127.5f);
}

/* ---------------------------------------------------------------- files */

static FILE *memory_stream(Bytes bytes) {
    FILE *stream = fmemopen((void *)bytes.data, bytes.size, "rb");
    if (!stream) die(STATUS_RESOURCE, "a stream of %zu bytes in memory cannot be opened", bytes.size);
    return stream;
}

/* The format of a file that is neither PPM nor Y4M, by its first bytes; NULL if it is not known. */
static const char *foreign(Bytes bytes) {
    static const struct {
        const char *start, *name;
    } formats[] = {{"\x89PNG", "a PNG"}, {"\xff\xd8\xff", "a JPEG"}, {"GIF8", "a GIF"}, {"RIFF", "a WebP or AVI"},
                   {"BM", "a BMP"}, {"P3", "a text PPM"}, {"P5", "a grey PGM"}, {"P7", "a PAM"}, {"P4", "a PBM"},
                   {"\x1a\x45\xdf\xa3", "a Matroska or WebM"}};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (starts_with(bytes, formats[i].start)) return formats[i].name;
    return bytes.size > 8 && !memcmp(bytes.data + 4, "ftyp", 4) ? "an MP4, MOV, HEIC or AVIF" : NULL;
}

/* A Y4M's format and number of frames; all of it is read once, so that a truncated file is found before the run. */
static const char *parse_y4m(Bytes bytes, Source *out) {
    Y4mReader *reader;
    bool end = false;
    FILE *stream = memory_stream(bytes);
    const char *why = y4m_open(stream, NULL, &reader, &out->format);
    for (out->frames = 0; !why && !(why = y4m_next(reader, NULL, &end)) && !end; out->frames++)
        if (out->frames == MAX_FRAMES) why = reason("more than %d frames", MAX_FRAMES);
    y4m_close(reader);
    fclose(stream);
    return why;
}

const char *source_parse(Bytes bytes, Source *out) {
    *out = (Source){.bytes = bytes};
    if (!bytes.size) return "the file is empty";
    if (starts_with(bytes, "P6")) return parse_ppm(bytes, out);
    if (starts_with(bytes, "YUV4MPEG2 ")) return parse_y4m(bytes, out);
    const char *name = foreign(bytes);
    return name ? reason("this is %s file, expected a PPM (P6) or a Y4M; convert it: ffmpeg -i FILE picture.ppm (or "
                         "clip.y4m)", name)
                : "expected a PPM (P6) or a Y4M";
}

const char *source_open(const char *path, Source *out) {
    Bytes bytes;
    bool mapped = strcmp(path, "-") != 0;
    const char *why = mapped ? map_file(path, &bytes) : read_file(path, (size_t)1 << 36, &bytes);
    if (why) return why;
    why = source_parse(bytes, out);
    out->mapped = mapped;
    if (why) source_close(out);
    return why;
}

void source_close(Source *s) {
    if (s->mapped) unmap_file(s->bytes);
    else free((void *)s->bytes.data);
}

/* ---------------------------------------------------------------- scaling */

/* One axis: pixel i that comes out is the sum of `taps` pixels from first[i] on, with weights [i*taps]. */
typedef struct {
    int taps;
    int *first;
    double *weights;
} Axis;

static double cubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* From the `in` pixels, those in [from, from + step * out), to `out`. */
static Axis axis_new(int in, double from, double step, int out) {
    double wide = step > 1 ? step : 1; /* of a pixel in the larger raster */
    Axis axis = {.taps = 2 * (int)ceil(2 * wide) + 1};
    axis.first = allocate(sizeof(int) * (size_t)out);
    axis.weights = allocate(sizeof(double) * (size_t)out * (size_t)axis.taps);
    for (int i = 0; i < out; i++) {
        double centre = from + (i + 0.5) * step, sum = 0, *w = axis.weights + (size_t)i * axis.taps;
        int first = (int)fmax(0, centre - 2 * wide + 0.5), end = smaller((int)(centre + 2 * wide + 0.5), in);
        axis.first[i] = first;
        for (int j = first; j < end; j++) sum += w[j - first] = cubic((j - centre + 0.5) / wide);
        for (int j = first; j < end; j++) w[j - first] /= sum;
    }
    return axis;
}

static void axis_free(Axis *axis) {
    free(axis->first);
    free(axis->weights);
}

/* Pixel i of a line whose pixels are `stride` apart, of which there are `in`. */
static float weigh(const Axis *axis, int i, const float *line, size_t stride, int in) {
    const double *w = axis->weights + (size_t)i * axis->taps;
    double sum = 0;
    for (int j = 0; j < axis->taps && axis->first[i] + j < in; j++) sum += w[j] * line[(axis->first[i] + j) * stride];
    return (float)sum;
}

/* Planes [3,h,w] to [3,Y,X]: columns first, then rows. */
static void scale(const float *planes, int w, int h, float *out, int width, int height) {
    double step = fmin((double)w / width, (double)h / height); /* the larger of the two scales covers */
    Axis across = axis_new(w, (w - step * width) / 2, step, width);
    Axis down = axis_new(h, (h - step * height) / 2, step, height);
    float *narrow = allocate(sizeof(float) * 3 * (size_t)h * (size_t)width);
    PARALLEL_FOR (int row = 0; row < 3 * h; row++)
        for (int x = 0; x < width; x++)
            narrow[(size_t)row * width + x] = weigh(&across, x, planes + (size_t)row * w, 1, w);
    PARALLEL_FOR (int row = 0; row < 3 * height; row++)
        for (int x = 0; x < width; x++)
            out[(size_t)row * width + x] =
                weigh(&down, row % height, narrow + (size_t)(row / height) * h * width + x, (size_t)width, h);
    free(narrow);
    axis_free(&across), axis_free(&down);
}

/* ---------------------------------------------------------------- reading a source */

struct SourceReader {
    const Source *source;
    int width, height; /* of the frames that it gives */
    FILE *stream;
    Y4mReader *y4m;
    float *planes;     /* [3,h,w], if frames are scaled */
};

static bool fits(const Source *s, int width, int height) {
    return s->format.width == width && s->format.height == height;
}

SourceReader *source_reader_open(const Source *s, int width, int height) {
    SourceReader *r = allocate(sizeof *r);
    *r = (SourceReader){.source = s, .width = width, .height = height};
    if (!fits(s, width, height))
        r->planes = allocate(sizeof(float) * 3 * (size_t)s->format.width * (size_t)s->format.height);
    if (s->pixels) return r;
    VideoFormat format;
    r->stream = memory_stream(s->bytes);
    const char *why = y4m_open(r->stream, NULL, &r->y4m, &format);
    if (why) die(STATUS_USAGE, "a clip that is being read: %s", why);
    return r;
}

static void read_frame(SourceReader *r, float *frame) {
    const Source *s = r->source;
    size_t pixels = (size_t)s->format.width * (size_t)s->format.height;
    bool end = false;
    const char *why = s->pixels ? NULL : y4m_next(r->y4m, frame, &end);
    if (why || end) die(STATUS_USAGE, "a clip that is being read: %s", why ? why : "it has become shorter");
    for (size_t i = 0; s->pixels && i < pixels; i++)
        for (int c = 0; c < 3; c++)
            frame[c * pixels + i] = 2 * ((float)smaller(s->pixels[3 * i + c], s->white) / (float)s->white) - 1;
}

void source_next(SourceReader *r, float *frame) {
    read_frame(r, r->planes ? r->planes : frame);
    if (r->planes) scale(r->planes, r->source->format.width, r->source->format.height, frame, r->width, r->height);
}

void source_reader_close(SourceReader *r) {
    if (!r) return;
    y4m_close(r->y4m);
    if (r->stream) fclose(r->stream);
    free(r->planes);
    free(r);
}

size_t source_reader_memory(const Source *s, int width, int height) {
    size_t planes = s->pixels ? 0 : y4m_frame_bytes(&s->format);
    if (fits(s, width, height)) return planes;
    return planes + sizeof(float) * 3 * (size_t)s->format.height * ((size_t)s->format.width + (size_t)width);
}
