/* y4m.c - frames <-> YUV4MPEG2, an uncompressed video file that ffmpeg, mpv and every encoder read.
 *
 *   "YUV4MPEG2 W832 H480 F16:1 Ip A1:1 C420jpeg\n", then for each frame "FRAME\n" and the planes Y, Cb, Cr
 *
 * Frames are floats [3,Y,X] (red, green, blue) in [-1,1]. The file has 8 bits in limited range:
 *
 *   y  = 0.299 r + 0.587 g + 0.114 b         Y = 125.5 + 109.5 y    16..235 for y in [-1,1]
 *   cb = (b - y) / 1.772                     Cb = 128 + 112 cb      16..240
 *   cr = (r - y) / 1.402                     Cr = 128 + 112 cr      16..240
 *
 * This is BT.601. For BT.709 the weights are 0.2126, 0.7152, 0.0722, and the divisors 1.8556 and 1.5748. (A divisor is
 * 2 (1 - weight) of its colour.) The file does not name the matrix. Players assume BT.709 for frames of 1280 or more
 * columns or more than 576 lines, and BT.601 for smaller ones; so does this file, in both directions.
 *
 * 4:2:0 chroma is sited at the centre of 2x2 pixels ("jpeg", as in MPEG-1). A chroma sample is the average of its four
 * pixels, or of those that exist at an odd right or lower edge.
 *
 * The reader takes a stream, which may be a pipe, and holds one frame of it. It gives each pixel the chroma sample that
 * covers it, which inverts the average: reading and writing again gives the same bytes. Its floats may leave [-1,1],
 * because some Y, Cb, Cr are outside of RGB. 420mpeg2, 420paldv and 422 are sited up to half a pixel elsewhere, and are
 * read as if centred. */
#include "sora.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_HEADER = 79, MAX_SIDE = 32768, MAX_LINE = 1024 };

/* Pixels per chroma sample, across and down. */
typedef struct {
    int dx, dy;
} Subsampling;

static Subsampling subsampling(int chroma) {
    return (Subsampling){chroma == 420 || chroma == 422 ? 2 : 1, chroma == 420 ? 2 : 1};
}

static size_t luma_bytes(const VideoFormat *format) {
    return (size_t)format->width * (size_t)format->height;
}

/* Bytes of one chroma plane; 0 in mono. */
static size_t chroma_bytes(const VideoFormat *format) {
    Subsampling s = subsampling(format->chroma);
    if (format->chroma == 400) return 0;
    return (size_t)ceiling(format->width, s.dx) * (size_t)ceiling(format->height, s.dy);
}

size_t y4m_frame_bytes(const VideoFormat *format) {
    return luma_bytes(format) + 2 * chroma_bytes(format);
}

typedef struct {
    float red, green, blue; /* weights of luma */
    float cb, cr;           /* divisors of b - y and r - y */
} Matrix;

bool y4m_is_bt709(const VideoFormat *format) { return format->width >= 1280 || format->height > 576; }

static Matrix matrix(const VideoFormat *format) {
    return y4m_is_bt709(format) ? (Matrix){0.2126f, 0.7152f, 0.0722f, 1.8556f, 1.5748f}
                                : (Matrix){0.299f, 0.587f, 0.114f, 1.772f, 1.402f};
}

/* ---------------------------------------------------------------- writing */

/* Drops the last tags if the header would be longer than 79 bytes. Without them it has at most 74. */
size_t y4m_header(const VideoFormat *format, char out[80]) {
    static const char *const tags[] = {" XCOLORRANGE=LIMITED XAIGEN=sora.c", " XCOLORRANGE=LIMITED", ""};
    int length = MAX_HEADER + 1;
    for (size_t i = 0; i < sizeof tags / sizeof *tags && length > MAX_HEADER; i++)
        length = snprintf(out, MAX_HEADER + 1, "YUV4MPEG2 W%d H%d F%d:%d Ip A1:1 C%s%s\n", format->width,
                          format->height, format->rate_num, format->rate_den,
                          format->chroma == 444 ? "444" : "420jpeg", tags[i]);
    return (size_t)length;
}

static float luma(Matrix m, float r, float g, float b) { return m.red * r + m.green * g + m.blue * b; }

uint8_t byte_of(float x) {
    x += 0.5f;
    return (uint8_t)(x > 0 ? x < 255 ? x : 255 : 0);
}

/* Average over the pixels of a plane (Y,X) that chroma sample (row, column) covers. */
static float box_average(const float *plane, const VideoFormat *format, Subsampling s, int row, int column) {
    float sum = 0;
    int count = 0;
    for (int y = row * s.dy; y < (row + 1) * s.dy && y < format->height; y++) {
        for (int x = column * s.dx; x < (column + 1) * s.dx && x < format->width; x++) {
            sum += plane[(size_t)y * (size_t)format->width + (size_t)x];
            count++;
        }
    }
    return sum / (float)count;
}

void y4m_convert(const VideoFormat *format, const float *frame, uint8_t *out) {
    size_t pixels = luma_bytes(format);
    Matrix m = matrix(format);
    const float *red = frame, *green = frame + pixels, *blue = frame + 2 * pixels;
    for (size_t i = 0; i < pixels; i++) out[i] = byte_of(125.5f + 109.5f * luma(m, red[i], green[i], blue[i]));
    uint8_t *cb = out + pixels, *cr = cb + chroma_bytes(format);
    Subsampling s = subsampling(format->chroma);
    for (int row = 0; row * s.dy < format->height; row++) {
        for (int column = 0; column * s.dx < format->width; column++) {
            float r = box_average(red, format, s, row, column);
            float g = box_average(green, format, s, row, column);
            float b = box_average(blue, format, s, row, column);
            float y = luma(m, r, g, b);
            *cb++ = byte_of(128 + 112 * ((b - y) / m.cb));
            *cr++ = byte_of(128 + 112 * ((r - y) / m.cr));
        }
    }
}

/* ---------------------------------------------------------------- reading */

struct Y4mReader {
    FILE *stream;
    Sha256 *sha;     /* of the bytes read so far, or NULL */
    size_t at;       /* number of bytes read so far */
    VideoFormat format;
    bool full_range;
    bool ahead;      /* planes hold the first frame, which y4m_next() has not returned yet */
    size_t room;     /* capacity of planes in bytes, at most a frame */
    uint8_t *planes; /* of the frame that was read last */
};

static const struct {
    const char *name;
    int chroma;
} chromas[] = {
    {"420jpeg", 420}, {"420mpeg2", 420}, {"420paldv", 420}, {"420", 420},
    {"422", 422},     {"444", 444},      {"mono", 400},
};

static const char *parse_side(const char *text, int *out) {
    *out = (int)take_digits(&text, MAX_SIDE);
    return *out > 0 && !*text ? NULL : "the header's W or H is not a number from 1 to 32768";
}

/* "0:0" means unknown; it is read as 25, as ffmpeg does. */
static const char *parse_rate(const char *text, VideoFormat *format) {
    const char *start = text;
    int numerator = (int)take_digits(&text, INT32_MAX);
    int denominator = *text == ':' ? text++, (int)take_digits(&text, INT32_MAX) : -1;
    if (*text || numerator < 0 || denominator < 0 || !numerator != !denominator)
        return reason("the header's frame rate is %.40s, expected a fraction such as 25:1", start);
    format->rate_num = numerator ? numerator : 25;
    format->rate_den = numerator ? denominator : 1;
    return NULL;
}

static const char *parse_chroma(const char *text, int *out) {
    for (size_t i = 0; i < sizeof chromas / sizeof *chromas; i++) {
        *out = chromas[i].chroma;
        if (!strcmp(text, chromas[i].name)) return NULL;
    }
    return reason("chroma %.40s, expected 420jpeg, 420mpeg2, 420paldv, 420, 422, 444 or mono", text);
}

static const char *parse_tag(Y4mReader *reader, const char *tag) {
    switch (*tag) {
    case 'W': return parse_side(tag + 1, &reader->format.width);
    case 'H': return parse_side(tag + 1, &reader->format.height);
    case 'F': return parse_rate(tag + 1, &reader->format);
    case 'C': return parse_chroma(tag + 1, &reader->format.chroma);
    case 'I':
        if (!strcmp(tag, "Ip") || !strcmp(tag, "I?")) return NULL;
        return reason("interlaced video (%.40s), expected progressive (Ip)", tag);
    case 'A': return NULL; /* pixel aspect ratio: ignored */
    case 'X': reader->full_range |= !strcmp(tag, "XCOLORRANGE=FULL"); return NULL;
    default: return reason("the header has the unknown tag %.40s", tag);
    }
}

/* Counts and hashes bytes that were read. */
static void count(Y4mReader *reader, const void *bytes, size_t size) {
    reader->at += size;
    if (reader->sha) sha256_add(reader->sha, bytes, size);
}

/* Reads the next line, without its newline. Returns false if it has no newline, is too long, or contains a 0. */
static bool take_line(Y4mReader *reader, char line[MAX_LINE]) {
    size_t length = 0;
    int c = 0;
    while (length < MAX_LINE && c != '\n' && (c = getc(reader->stream)) > 0) line[length++] = (char)c;
    count(reader, line, length);
    if (c == '\n') line[length - 1] = 0;
    return c == '\n';
}

/* Why reading stopped: the system's error, or else `why`, for the end of the file. */
static const char *stopped(const Y4mReader *reader, const char *why) {
    return ferror(reader->stream) ? strerror(errno) : why;
}

static const char *parse_stream_header(Y4mReader *reader) {
    char line[MAX_LINE] = "", *next = line;
    reader->format = (VideoFormat){.rate_num = 25, .rate_den = 1, .chroma = 420};
    bool ended = take_line(reader, line);
    if (strncmp(line, "YUV4MPEG2 ", 10)) return stopped(reader, "this is not a Y4M file");
    if (!ended) return stopped(reader, "the header is not one line of text");
    strtok_r(line, " ", &next);
    for (char *tag; (tag = strtok_r(NULL, " ", &next));) {
        const char *why = parse_tag(reader, tag);
        if (why) return why;
    }
    return reader->format.width && reader->format.height ? NULL : "the header gives no frame size";
}

/* Reads the planes of a frame. The buffer grows as bytes arrive, to at most twice their number, whatever size the
 * header claims. */
static const char *take_planes(Y4mReader *reader) {
    size_t size = y4m_frame_bytes(&reader->format), got = 0;
    while (got < size) {
        if (got == reader->room) {
            size_t room = larger_size(2 * got, 1 << 16);
            reader->room = room < size ? room : size;
            reader->planes = reallocate(reader->planes, reader->room);
        }
        size_t part = fread(reader->planes + got, 1, reader->room - got, reader->stream);
        if (!part) return stopped(reader, "the last frame is cut off");
        count(reader, reader->planes + got, part);
        got += part;
    }
    return NULL;
}

/* Reads the next FRAME line, whose tags are ignored, and its planes; or sets *end. */
static const char *take_frame(Y4mReader *reader, bool *end) {
    char line[MAX_LINE] = "";
    int c = getc(reader->stream);
    *end = c == EOF && !ferror(reader->stream);
    if (*end) return NULL;
    if (c != EOF) ungetc(c, reader->stream);
    if (!take_line(reader, line) || strncmp(line, "FRAME", 5) || (line[5] && line[5] != ' '))
        return stopped(reader, reason("no FRAME line at byte %zu", reader->at));
    return take_planes(reader);
}

const char *y4m_open(FILE *stream, Sha256 *sha, Y4mReader **out, VideoFormat *format) {
    Y4mReader *reader = allocate(sizeof *reader);
    *reader = (Y4mReader){.stream = stream, .sha = sha, .ahead = true};
    *out = NULL;
    bool end = false;
    const char *why = parse_stream_header(reader);
    if (!why) why = take_frame(reader, &end);
    if (end) why = "no frame follows the header";
    if (why) {
        y4m_close(reader);
        return why;
    }
    *format = reader->format;
    *out = reader;
    return NULL;
}

void y4m_to_floats(const VideoFormat *format, bool full_range, const uint8_t *planes, float *frame) {
    Subsampling s = subsampling(format->chroma);
    Matrix m = matrix(format);
    size_t pixels = luma_bytes(format), chroma_width = (size_t)ceiling(format->width, s.dx), i = 0;
    const uint8_t *blue = planes + pixels, *red = blue + chroma_bytes(format);
    float black = full_range ? 127.5f : 125.5f, gain = full_range ? 127.5f : 109.5f;
    float chroma_gain = full_range ? 127.5f : 112.0f;
    for (int row = 0; row < format->height; row++) {
        for (int column = 0; column < format->width; column++, i++) {
            size_t at = (size_t)(row / s.dy) * chroma_width + (size_t)(column / s.dx);
            float cb = format->chroma == 400 ? 0 : ((float)blue[at] - 128) / chroma_gain;
            float cr = format->chroma == 400 ? 0 : ((float)red[at] - 128) / chroma_gain;
            float y = ((float)planes[i] - black) / gain, r = y + m.cr * cr, b = y + m.cb * cb;
            frame[i] = r;
            frame[pixels + i] = (y - m.red * r - m.blue * b) / m.green;
            frame[2 * pixels + i] = b;
        }
    }
}

const char *y4m_next(Y4mReader *reader, float *frame, bool *end) {
    *end = false;
    const char *why = reader->ahead ? NULL : take_frame(reader, end);
    reader->ahead = false;
    if (!why && !*end && frame) y4m_to_floats(&reader->format, reader->full_range, reader->planes, frame);
    return why;
}

void y4m_close(Y4mReader *reader) {
    if (reader) free(reader->planes);
    free(reader);
}
