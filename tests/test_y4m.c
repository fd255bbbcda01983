/* test_y4m.c - y4m.c: the exact header, known colours, and that reading and writing a file gives the same bytes. */
#include "tests/test.h"
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static FILE *stream; /* that is being read */

static const char *open_bytes(const void *data, size_t size, Y4mReader **reader, VideoFormat *format) {
    stream = fmemopen((void *)data, size, "rb");
    if (!stream) abort();
    return y4m_open(stream, NULL, reader, format);
}

static void close_bytes(Y4mReader *reader) {
    y4m_close(reader);
    fclose(stream);
}

/* ---------------------------------------------------------------- writing */

static void expect_header(VideoFormat format, const char *expected) {
    char header[80];
    size_t size = y4m_header(&format, header);
    CHECK(size == strlen(expected) && !memcmp(header, expected, size), "the header is %.*s", (int)size,
          header);
    CHECK(size <= 79, "a header of %zu bytes", size);
}

static void test_headers(void) {
    expect_header((VideoFormat){832, 480, 16, 1, 420},
                  "YUV4MPEG2 W832 H480 F16:1 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED XAIGEN=sora.c\n");
    expect_header((VideoFormat){48, 32, 16, 1, 444},
                  "YUV4MPEG2 W48 H32 F16:1 Ip A1:1 C444 XCOLORRANGE=LIMITED XAIGEN=sora.c\n");
    expect_header((VideoFormat){1280, 720, 30000, 1001, 420},
                  "YUV4MPEG2 W1280 H720 F30000:1001 Ip A1:1 C420jpeg XCOLORRANGE=LIMITED\n");
    expect_header((VideoFormat){32768, 32768, 2147483647, 2147483647, 420},
                  "YUV4MPEG2 W32768 H32768 F2147483647:2147483647 Ip A1:1 C420jpeg\n");
}

/* Colour bars in RGB, and their 8-bit Y'CbCr by ITU-R BT.601 and BT.709. */
static const struct {
    float rgb[3];
    uint8_t bt601[3], bt709[3];
} bars[] = {
    {{1, 1, 1}, {235, 128, 128}, {235, 128, 128}}, {{-1, -1, -1}, {16, 128, 128}, {16, 128, 128}},
    {{1, -1, -1}, {81, 90, 240}, {63, 102, 240}},  {{-1, 1, -1}, {145, 54, 34}, {173, 42, 26}},
    {{-1, -1, 1}, {41, 240, 110}, {32, 240, 118}}, {{1, 1, -1}, {210, 16, 146}, {219, 16, 138}},
    {{-1, 1, 1}, {170, 166, 16}, {188, 154, 16}},  {{1, -1, 1}, {106, 202, 222}, {78, 214, 230}},
};
enum { BARS = sizeof bars / sizeof *bars };

/* Writes and reads frames of one colour. `bt709`: the matrix that this size must get. */
static void expect_bars(VideoFormat format, bool bt709) {
    size_t pixels = (size_t)format.width * (size_t)format.height;
    float *frame = malloc(3 * pixels * sizeof *frame);
    char header[80], *file = malloc(sizeof header + 6 + 3 * pixels);
    if (!frame || !file) abort();
    size_t start = y4m_header(&format, header) + 6;
    snprintf(file, sizeof header + 6, "%sFRAME\n", header);
    uint8_t *out = (uint8_t *)file + start;
    CHECK(y4m_is_bt709(&format) == bt709, "%dx%d: wrong matrix", format.width, format.height);
    for (int i = 0; i < BARS; i++) {
        const uint8_t *expected = bt709 ? bars[i].bt709 : bars[i].bt601;
        for (size_t p = 0; p < 3 * pixels; p++) frame[p] = bars[i].rgb[p / pixels];
        y4m_convert(&format, frame, out);
        CHECK(out[0] == expected[0] && out[pixels] == expected[1] && out[2 * pixels] == expected[2],
              "%dx%d: bar %d is %d %d %d", format.width, format.height, i, out[0], out[pixels], out[2 * pixels]);
        Y4mReader *reader;
        VideoFormat found;
        bool end = false;
        const char *why = open_bytes(file, start + 3 * pixels, &reader, &found);
        if (!why) why = y4m_next(reader, frame, &end);
        float read[3] = {frame[0], frame[pixels], frame[2 * pixels]};
        CHECK(!why && relative_error(read, bars[i].rgb, 3) < 0.01, "%dx%d: bar %d is read as %g %g %g", format.width,
              format.height, i, read[0], read[1], read[2]);
        close_bytes(reader);
    }
    free(frame), free(file);
}

static void test_colours(void) {
    expect_bars((VideoFormat){1, 1, 16, 1, 444}, false);
    expect_bars((VideoFormat){1279, 576, 16, 1, 444}, false);
    expect_bars((VideoFormat){1280, 1, 16, 1, 444}, true);
    expect_bars((VideoFormat){1, 577, 16, 1, 444}, true);
    VideoFormat format = {1, 1, 16, 1, 444};
    uint8_t out[3];
    y4m_convert(&format, (float[]){NAN, 3, -INFINITY}, out);
    CHECK(out[0] == 0, "NaN becomes %d", out[0]);
    y4m_convert(&format, (float[]){9, 9, 9}, out);
    CHECK(out[0] == 255, "values beyond the range are not clamped");
}

/* 3x3 pixels have 2x2 chroma samples. Those at the right and lower edge cover 2, 2 and 1 pixels. */
static void test_odd_sizes(void) {
    VideoFormat format = {3, 3, 16, 1, 420};
    float frame[27];
    for (int i = 0; i < 9; i++) frame[i] = frame[9 + i] = -1, frame[18 + i] = i % 3 == 2 || i >= 6 ? -1 : 1;
    frame[18 + 2] = frame[18 + 7] = 0; /* one of the two pixels of each edge sample */
    uint8_t out[9 + 8];
    CHECK(y4m_frame_bytes(&format) == 17, "3x3 pixels take %zu bytes", y4m_frame_bytes(&format));
    y4m_convert(&format, frame, out);
    /* Cb = 128 + 112 b' with b' the average blue in [0,1]: 1, 1/4, 1/4, 0. */
    static const uint8_t cb[] = {240, 156, 156, 128};
    CHECK(!memcmp(out + 9, cb, 4), "Cb %d %d %d %d", out[9], out[10], out[11], out[12]);
}

/* ---------------------------------------------------------------- reading */

static uint8_t *make_file(const VideoFormat *format, const char *header, int frames, size_t *size) {
    size_t length = strlen(header), one = y4m_frame_bytes(format);
    uint8_t *file = malloc(length + (size_t)frames * (6 + one)), *p = file;
    if (!file) abort();
    memcpy(p, header, length), p += length;
    uint32_t noise = 1;
    for (int f = 0; f < frames; f++) {
        memcpy(p, "FRAME\n", 6), p += 6;
        for (size_t i = 0; i < one; i++) *p++ = (uint8_t)((noise = noise * 1664525 + 1013904223) >> 24);
    }
    *size = (size_t)(p - file);
    return file;
}

/* Reads frames of random bytes and writes them again. The bytes must be the same. */
static void expect_identity(const char *header, VideoFormat expected) {
    size_t size, one = y4m_frame_bytes(&expected);
    uint8_t *file = make_file(&expected, header, 3, &size), *again = malloc(one);
    float *frame = malloc(3 * sizeof(float) * (size_t)expected.width * (size_t)expected.height);
    Y4mReader *reader;
    VideoFormat format;
    const char *why = open_bytes(file, size, &reader, &format);
    CHECK(!why && !memcmp(&format, &expected, sizeof format), "%s: %s", header, why ? why : "another format");
    bool end = why != NULL;
    int frames = 0;
    for (const uint8_t *p = file + strlen(header) + 6; !end; p += one + 6) {
        why = y4m_next(reader, frame, &end);
        CHECK(!why, "frame %d: %s", frames, why);
        if (why || end) break;
        if (format.chroma == 420 || format.chroma == 444) {
            y4m_convert(&format, frame, again);
            CHECK(!memcmp(p, again, one), "%s: frame %d is written as other bytes", header, frames);
        }
        frames++;
    }
    CHECK(frames == 3, "%s: %d frames of 3", header, frames);
    close_bytes(reader);
    free(file), free(again), free(frame);
}

/* Reads a frame of 2x2 pixels with known planes. */
static void expect_pixels(const char *header, const char *planes, size_t bytes, const float *expected) {
    char file[256];
    float frame[3 * 4];
    int length = snprintf(file, sizeof file, "%sFRAME\n", header);
    memcpy(file + length, planes, bytes);
    Y4mReader *reader;
    VideoFormat format;
    bool end;
    const char *why = open_bytes(file, (size_t)length + bytes, &reader, &format);
    CHECK(!why, "%s: %s", header, why);
    if (why) return;
    why = y4m_next(reader, frame, &end);
    CHECK(!why && !end && relative_error(frame, expected, 12) < 0.01, "%s gives other pixels", header);
    close_bytes(reader);
}

/* The pixels are black, white, black, white; or blue on the left and red on the right. */
static void test_layouts(void) {
    static const float grey[] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    static const float coloured[] = {-1, 1, -1, 1, -1, -1, -1, -1, 1, -1, 1, -1};
    expect_pixels("YUV4MPEG2 W2 H2 Cmono\n", "\x10\xeb\x10\xeb", 4, grey);
    expect_pixels("YUV4MPEG2 W2 H2 F0:0 C420paldv XCOLORRANGE=FULL\n", "\0\xff\0\xff\x80\x80", 6, grey);
    expect_pixels("YUV4MPEG2 W2 H2 C422\n", "\x10\xeb\x10\xeb\x80\x80\x80\x80", 8, grey);
    expect_pixels("YUV4MPEG2 W2 H2 C444\n", "\x29\x51\x29\x51\xf0\x5a\xf0\x5a\x6e\xf0\x6e\xf0", 12, coloured);
}

static void expect_refused(const char *text, size_t size, const char *what) {
    Y4mReader *reader;
    VideoFormat format;
    const char *why = open_bytes(text, size, &reader, &format);
    CHECK(why && strstr(why, what) && !reader, "%.60s: expected \"%s\", the reason is \"%s\"", text, what,
          why ? why : "none");
    close_bytes(reader);
}

static void test_refused(void) {
    static const char *const cases[][2] = {
        {"YUV4MPEG W2 H2\n", "not a Y4M"},
        {"YUV4MPEG2 W2 H2", "not one line"},
        {"YUV4MPEG2 W2\nFRAME\n", "no frame size"},
        {"YUV4MPEG2 W0 H2\nFRAME\n", "not a number from 1"},
        {"YUV4MPEG2 W2x H2\nFRAME\n", "not a number from 1"},
        {"YUV4MPEG2 W99999 H2\nFRAME\n", "not a number from 1"},
        {"YUV4MPEG2 W2 H2 F25\nFRAME\n", "expected a fraction"},
        {"YUV4MPEG2 W2 H2 F25:0\nFRAME\n", "expected a fraction"},
        {"YUV4MPEG2 W2 H2 C420p10\nFRAME\n", "chroma 420p10"},
        {"YUV4MPEG2 W2 H2 C444alpha\nFRAME\n", "chroma 444alpha"},
        {"YUV4MPEG2 W2 H2 C411\nFRAME\n", "chroma 411"},
        {"YUV4MPEG2 W2 H2 It\nFRAME\n", "interlaced video (It)"},
        {"YUV4MPEG2 W2 H2 Zx\nFRAME\n", "unknown tag Zx"},
        {"YUV4MPEG2 W2 H2\n", "no frame follows"},
        {"YUV4MPEG2 W2 H2\nFRAM", "no FRAME line at byte 20"},
        {"YUV4MPEG2 W2 H2 X\0\n", "not one line"},
        {"YUV4MPEG2 W2 H2\nFRAMES\n......", "no FRAME line"},
        {"YUV4MPEG2 W2 H2\nFRAME\n.....", "cut off"},
        {"YUV4MPEG2 W32768 H32768\nFRAME\n.....", "cut off"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_refused(cases[i][0], strlen(cases[i][0]), cases[i][1]);
}

/* If the second frame is truncated, reading it must fail. */
static void test_damaged_end(void) {
    VideoFormat format = {2, 2, 25, 1, 420};
    size_t size;
    uint8_t *file = make_file(&format, "YUV4MPEG2 W2 H2\n", 2, &size);
    float frame[12];
    for (size_t cut = 1; cut < 12; cut++) {
        Y4mReader *reader;
        bool end = false;
        const char *why = open_bytes(file, size - cut, &reader, &format);
        if (!why) why = y4m_next(reader, frame, &end);
        CHECK(!why && !end, "the first of two frames: %s", why);
        why = y4m_next(reader, frame, &end);
        CHECK(why && !end, "a file without its last %zu bytes is accepted", cut);
        close_bytes(reader);
    }
    free(file);
}

/* ---------------------------------------------------------------- at the other end of a pipe */

enum { PIPED = 9601 }; /* frames: 600 seconds, 16 a second */

/* Frame f is grey f % 256. */
static void write_frames(int pipe) {
    enum { LUMA = 48 * 32 };
    static uint8_t planes[LUMA * 3 / 2];
    FILE *out = fdopen(pipe, "wb");
    memset(planes, 128, sizeof planes);
    fputs("YUV4MPEG2 W48 H32 F16:1 C420jpeg\n", out);
    for (int f = 0; f < PIPED; f++) {
        memset(planes, f, LUMA);
        fputs("FRAME\n", out);
        fwrite(planes, 1, sizeof planes, out);
    }
    fclose(out);
}

/* Reads what another process writes meanwhile. Ends this one unless it is all there, and memory does not grow. */
static void read_pipe(void *unused) {
    static float frame[3 * 48 * 32];
    int ends[2], frames = 0;
    Y4mReader *reader;
    VideoFormat format;
    size_t early = 0;
    bool end;
    (void)unused;
    if (pipe(ends)) abort();
    if (!fork()) {
        close(ends[0]);
        write_frames(ends[1]);
        _exit(0);
    }
    close(ends[1]);
    FILE *in = fdopen(ends[0], "rb");
    const char *why = y4m_open(in, NULL, &reader, &format);
    for (; !why && !(why = y4m_next(reader, frame, &end)) && !end; frames++) {
        float grey = ((float)(frames % 256) - 125.5f) / 109.5f;
        if (fabsf(frame[0] - grey) > 1e-5f) die(STATUS_CHECK, "frame %d is %g, not %g", frames, frame[0], grey);
        if (frames == PIPED / 10) early = memory_peak();
    }
    if (why || frames != PIPED) die(STATUS_CHECK, "%d frames: %s", frames, why ? why : "no more");
    if (memory_peak() > early + (64 << 10))
        die(STATUS_CHECK, "%zu bytes after 60 seconds, %zu after 600", early, memory_peak());
    y4m_close(reader);
    fclose(in);
}

static void test_pipe(void) {
    char said[4096];
    int status = run_apart(read_pipe, NULL, said);
    CHECK(status == STATUS_OK, "a video in a pipe: status %d, %s", status, said);
}

void test_y4m(void) {
    test_headers();
    test_colours();
    test_odd_sizes();
    expect_identity("YUV4MPEG2 W16 H8 F16:1 Ip A1:1 C420jpeg XAIGEN=sora.c\n",
                    (VideoFormat){16, 8, 16, 1, 420});
    expect_identity("YUV4MPEG2 W5 H7 F30000:1001 C420mpeg2\n", (VideoFormat){5, 7, 30000, 1001, 420});
    expect_identity("YUV4MPEG2 H1 W1 C444 I?\n", (VideoFormat){1, 1, 25, 1, 444});
    expect_identity("YUV4MPEG2 W33 H17 C444\n", (VideoFormat){33, 17, 25, 1, 444});
    expect_identity("YUV4MPEG2 W5 H3 C422\n", (VideoFormat){5, 3, 25, 1, 422});
    expect_identity("YUV4MPEG2 W5 H3 Cmono\n", (VideoFormat){5, 3, 25, 1, 400});
    expect_identity("YUV4MPEG2 W6 H4\n", (VideoFormat){6, 4, 25, 1, 420});
    expect_identity("YUV4MPEG2 W1280 H7 C444\n", (VideoFormat){1280, 7, 25, 1, 444});
    expect_identity("YUV4MPEG2 W3 H577\n", (VideoFormat){3, 577, 25, 1, 420});
    test_layouts();
    test_refused();
    test_damaged_end();
    test_pipe();
}
