/* test_trust.c - label.c and mark.c: the label's pixels, and that the mark is found after scaling and cropping.
 *
 * The clips are computed: smooth waves that move, a checkerboard, and noise in every frame. reference_trust.py tests
 * the mark after H.264 compression. */
#include "tests/test.h"
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { W = 256, H = 128, FRAMES = 9 };
static const VideoFormat format = {W, H, 16, 1, 420};
static const uint64_t payload = 0x0123456789abcdefu;

static uint8_t *picture(int index) {
    uint8_t *planes = allocate(y4m_frame_bytes(&format));
    uint32_t noise = 12345u + (uint32_t)index;
    for (int y = 0; y < H; y++)
        for (int x = 0; x < W; x++) {
            noise = noise * 1664525u + 1013904223u;
            double value = 120 + 60 * sin((x + 2 * index) / 23.0) * cos(y / 31.0) + (x / 40 + y / 24) % 2 * 25;
            planes[y * W + x] = (uint8_t)(value + (noise >> 29));
        }
    memset(planes + W * H, 128, W * H / 2);
    return planes;
}

/* Searches for the mark in a clip that is cropped at (left, top) and scaled. With `mark` NULL the clip is unmarked. */
static MarkFound look(const Mark *mark, double scale, int left, int top) {
    int width = (int)((W - left) * scale), height = (int)((H - top) * scale);
    VideoFormat seen = {width, height, 16, 1, 420};
    float *frame = allocate(3 * sizeof *frame * (size_t)width * (size_t)height);
    MarkSum sum = {0};
    for (int i = 0; i < FRAMES; i++) {
        uint8_t *planes = picture(i);
        if (mark) mark_add(mark, &format, planes);
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++) { /* bilinear */
                double v = fmax(0, (y + 0.5) / scale - 0.5) + top, u = fmax(0, (x + 0.5) / scale - 0.5) + left;
                int y0 = (int)v, x0 = (int)u, y1 = smaller(y0 + 1, H - 1), x1 = smaller(x0 + 1, W - 1);
                double fy = v - y0, fx = u - x0;
                double luma = (1 - fy) * ((1 - fx) * planes[y0 * W + x0] + fx * planes[y0 * W + x1]) +
                              fy * ((1 - fx) * planes[y1 * W + x0] + fx * planes[y1 * W + x1]);
                for (int c = 0; c < 3; c++)
                    frame[((size_t)c * height + y) * width + x] = (float)((luma - 125.5) / 109.5);
            }
        mark_gather(&sum, &seen, frame);
        free(planes);
    }
    MarkFound found = mark_find(&sum);
    free(sum.luma);
    free(frame);
    return found;
}

static void expect_mark(const char *what, MarkFound found, double scale, int x, int y) {
    CHECK(found.deviations >= MARK_DEVIATIONS, "%s: %.1f deviations", what, found.deviations);
    CHECK(fabs(found.scale / scale - 1) < 0.006, "%s: scale %.4f, expected %.4f", what, found.scale, scale);
    CHECK(found.payload == payload, "%s: bits %016llx", what, (unsigned long long)found.payload);
    CHECK(x < 0 || (found.x == x && found.y == y), "%s: shifted by %d,%d", what, found.x, found.y);
}

static void test_find(void) {
    Mark mark = mark_make(payload);
    MarkFound none = look(NULL, 1, 0, 0);
    CHECK(none.deviations < MARK_DEVIATIONS, "a clip without a mark: %.1f deviations", none.deviations);
    expect_mark("unchanged", look(&mark, 1, 0, 0), 1, 0, 0);
    expect_mark("cropped", look(&mark, 1, 19, 10), 1, MARK_SIDE - 19, MARK_SIDE - 10);
    expect_mark("scaled by 0.75", look(&mark, 0.75, 0, 0), 0.75, -1, -1);
    expect_mark("scaled by 1.5", look(&mark, 1.5, 0, 0), 1.5, -1, -1);
}

/* Clips of any size can be looked at, and one without anything in it has no mark. */
static void test_sizes(void) {
    static const int sizes[][2] = {{1, 1}, {1, 70}, {131, 2}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        VideoFormat f = {sizes[i][0], sizes[i][1], 16, 1, 420};
        float *grey = allocate(3 * sizeof *grey * (size_t)f.width * (size_t)f.height);
        MarkSum sum = {0};
        mark_gather(&sum, &f, grey);
        MarkFound found = mark_find(&sum);
        CHECK(found.deviations == 0, "%dx%d of grey: %g deviations", f.width, f.height, found.deviations);
        free(sum.luma);
        free(grey);
    }
}

static void test_strength(void) {
    Mark mark = mark_make(payload);
    double squares = 0, sum = 0;
    uint8_t *before = picture(0), *after = picture(0);
    mark_add(&mark, &format, after);
    for (int i = 0; i < W * H; i++) {
        int change = after[i] - before[i];
        squares += change * change;
        sum += abs(change);
    }
    double psnr = 10 * log10(255.0 * 255 * W * H / squares);
    CHECK(psnr > 42, "the mark is %.1f dB from the picture", psnr);
    CHECK(sum / (W * H) < 1, "the mark changes %.2f grey levels on average", sum / (W * H));
    CHECK(!memcmp(before + W * H, after + W * H, W * H / 2), "the mark changes chroma");
    memset(after, 235, W * H);
    mark_add(&mark, &format, after);
    for (int i = 0; i < W * H; i++)
        if (after[i] > 235) {
            CHECK(false, "pixel %d of a white frame is %d", i, after[i]);
            break;
        }
    free(before);
    free(after);
}

static void test_label_time(void) {
    VideoFormat ntsc = {W, H, 24000, 1001, 420};
    CHECK(label_is_due(&format, 0) && label_is_due(&format, 31) && !label_is_due(&format, 32), "two seconds at 16");
    CHECK(!label_is_due(&format, 959) && label_is_due(&format, 960) && !label_is_due(&format, 992),
          "every minute at 16");
    CHECK(label_is_due(&ntsc, 47) && !label_is_due(&ntsc, 48), "two seconds at 23.976");
}

/* The label is white on black. Its letters are at least 5 % of the short side high. It stays inside the frame. */
static void test_label(void) {
    static const int sizes[][2] = {{16, 16}, {48, 32}, {96, 96}, {480, 272}, {833, 479}, {1280, 704}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        VideoFormat f = {sizes[i][0], sizes[i][1], 16, 1, i % 2 ? 420 : 444};
        size_t bytes = y4m_frame_bytes(&f), pixels = (size_t)f.width * (size_t)f.height;
        uint8_t *planes = allocate(bytes + 64);
        memset(planes, 100, bytes + 64);
        label_draw(&f, planes);
        int black = 0, white = 0, other = 0, tallest = 0;
        for (int x = 0; x < f.width; x++)
            for (int y = 0, run = 0; y < f.height; y++) {
                int value = planes[(size_t)y * (size_t)f.width + (size_t)x];
                black += value == 16;
                white += value == 235;
                other += value != 16 && value != 235 && value != 100;
                run = value == 235 ? run + 1 : 0;
                if (run > tallest) tallest = run;
            }
        CHECK(black && !other, "%dx%d: %d black pixels, %d of another grey", f.width, f.height, black, other);
        CHECK(f.width < 96 || (white && tallest * 20 >= smaller(f.width, f.height)), "%dx%d: letters of %d pixels",
              f.width, f.height, tallest);
        CHECK(planes[bytes] == 100 && planes[bytes + 63] == 100, "%dx%d: written beyond the frame", f.width, f.height);
        CHECK(planes[pixels] == 128 || planes[pixels] == 100, "%dx%d: chroma %d", f.width, f.height, planes[pixels]);
        free(planes);
    }
}

void test_trust(void) {
    test_find();
    test_sizes();
    test_strength();
    test_label_time();
    test_label();
}
