/* test_picture.c - files that a run begins from: pictures as they are, and scaled as Pillow scales them
 * (tests/goldens/images), what is refused, and pictures written. */
#include "sora.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

static Bytes text(const char *bytes, size_t size) { return (Bytes){(const uint8_t *)bytes, size}; }

static void read_first(const Source *source, int width, int height, float *frame) {
    SourceReader *reader = source_reader_open(source, width, height);
    source_next(reader, frame);
    source_reader_close(reader);
}

static void check_scaled(const Source *source, const char *name) {
    Npy array;
    const char *why = npy_read(test_path(reason("goldens/images/%s.npy", name)), &array);
    CHECK(!why, "%s.npy: %s", name, why);
    if (why) return;
    int height = array.shape.d[1], width = array.shape.d[2];
    float *expected = npy_floats(&array), *frame = allocate(sizeof(float) * 3 * (size_t)height * (size_t)width);
    read_first(source, width, height, frame);
    double error = relative_error(frame, expected, shape_count(&array.shape));
    CHECK(error < 1e-6, "a picture in %dx%d is off from Pillow's by %.1e", width, height, error);
    free(frame), free(expected);
    npy_free(&array);
}

static void check_pillow(void) {
    static const char *const names[] = {"same", "smaller", "larger", "narrower"};
    Source source;
    const char *why = source_open(test_path("goldens/images/picture.ppm"), &source);
    CHECK(!why && source.format.width == 23 && source.format.height == 17 && source.frames == 1, "picture.ppm: %s",
          why ? why : "another size");
    if (why) return;
    for (int i = 0; i < 4; i++) check_scaled(&source, names[i]);
    source_close(&source);
}

/* What is written is what is read again. */
static void check_identity(void) {
    uint8_t pixels[3 * 256], again[3 * 256];
    float frame[3 * 256];
    char file[32 + sizeof pixels];
    for (int i = 0; i < 3 * 256; i++) pixels[i] = (uint8_t)(i * 7);
    size_t size = ppm_header(16, 16, file);
    memcpy(file + size, pixels, sizeof pixels);
    Source source;
    const char *why = source_parse(text(file, size + sizeof pixels), &source);
    CHECK(!why, "a picture that was written: %s", why);
    if (why) return;
    read_first(&source, 16, 16, frame);
    ppm_convert(16, 16, frame, again);
    CHECK(!memcmp(pixels, again, sizeof pixels), "a picture that is read and written is another");
}

/* One colour stays that colour in any size, at the edges too. */
static void check_flat(void) {
    static const int sizes[][2] = {{1, 1}, {1, 9}, {3, 2}, {40, 50}};
    float frame[3 * 40 * 50];
    Source source;
    const char *picture = "P6#a\r2 3 100 " "d2\0d2\0d2\0\xff" "2\0d2\0d2\0"; /* 255 is 100, too */
    if (source_parse(text(picture, 13 + 18), &source)) abort();
    for (int i = 0; i < 4; i++) {
        int pixels = sizes[i][0] * sizes[i][1];
        read_first(&source, sizes[i][0], sizes[i][1], frame);
        for (int p = 0; p < pixels; p++)
            CHECK(frame[p] > 0.99999f && frame[p] < 1.00001f && frame[pixels + p] > -1e-5f &&
                  frame[pixels + p] < 1e-5f && frame[2 * pixels + p] < -0.99999f, "%dx%d: pixel %d is %g %g %g",
                  sizes[i][0], sizes[i][1], p, frame[p], frame[pixels + p], frame[2 * pixels + p]);
    }
}

static void check_refused(void) {
    static const struct {
        const char *bytes;
        size_t size;
        const char *expected;
    } cases[] = {
#define CASE(bytes, expected) {bytes, sizeof bytes - 1, expected}
        CASE("", "the file is empty"),
        CASE("P6\n2 2\n255\n12345678901", "the picture is cut off: 11 of 12 bytes"),
        CASE("P6\n2 2\n255", "the header does not end"),
        CASE("P6\n2 2\n65535\n", "16 bits a colour (white is 65535), expected 8 (255)"),
        CASE("P6\n2 2\n0\n", "the value of white, is not from 1 to 65535"),
        CASE("P6\n0 2\n255\n", "its size is not two numbers"),
        CASE("P6\n2 99999\n255\n", "its size is not two numbers"),
        CASE("P6 # 2 2", "its size is not two numbers"),
        CASE("P6", "its size is not two numbers"),
        CASE("P3\n2 2\n255\n", "this is a text PPM file, expected a PPM (P6) or a Y4M; convert it: ffmpeg -i"),
        CASE("\x89PNG\r\n", "this is a PNG file, expected"),
        CASE("\xff\xd8\xff\xe0", "this is a JPEG file"),
        CASE("\0\0\0\x20" "ftypmp42", "this is an MP4, MOV, HEIC or AVIF file"),
        CASE("hello", "expected a PPM (P6) or a Y4M"),
        CASE("YUV4MPEG2 W2 H2 C420p10\n", "chroma 420p10, expected"),
        CASE("YUV4MPEG2 W2 H2 It\n", "interlaced video (It)"),
        CASE("YUV4MPEG2 W2 H2\nFRAME\n123456FRAME\n12345", "the last frame is cut off"),
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Source source;
        const char *why = source_parse(text(cases[i].bytes, cases[i].size), &source);
        CHECK(why && strstr(why, cases[i].expected), "case %zu: expected \"%s\", the reason is \"%s\"", i,
              cases[i].expected, why ? why : "none");
    }
}

void test_picture(void) {
    check_pillow();
    check_identity();
    check_flat();
    check_refused();
}
