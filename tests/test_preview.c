/* test_preview.c - what the preview draws, to the letter, and that it stays within its room. */
#include "sora.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

static void check_colours(void) {
    /* Two pixels wide, two high: black, white / red, mid grey. */
    const float frame[] = {-1, 1, 1, 0, -1, 1, -1, 0, -1, 1, -1, 0};
    char text[512];
    size_t n = preview_render(frame, 2, 2, (PreviewSize){2, 1}, true, text);
    const char *expected = "\033[38;2;0;0;0m\033[48;2;255;0;0m\xe2\x96\x80"
                           "\033[38;2;255;255;255m\033[48;2;128;128;128m\xe2\x96\x80\033[0m\n";
    CHECK(n == strlen(expected) && !memcmp(text, expected, n), "24-bit colours are drawn as another text");
    n = preview_render(frame, 2, 2, (PreviewSize){2, 1}, false, text);
    expected = "\033[38;5;16m\033[48;5;196m\xe2\x96\x80\033[38;5;231m\033[48;5;145m\xe2\x96\x80\033[0m\n";
    CHECK(n == strlen(expected) && !memcmp(text, expected, n),
          "the colours of the cube are drawn as another text");
}

static void check_fit(void) {
    PreviewSize size = preview_fit(832, 480, 80, 22);
    CHECK(size.columns == 76 && size.rows == 22, "832x480 in 80x22 cells is %dx%d", size.columns, size.rows);
    size = preview_fit(64, 64, 200, 100);
    CHECK(size.columns == 64 && size.rows == 32, "64x64 in 200x100 cells is %dx%d", size.columns, size.rows);
    size = preview_fit(16384, 16, 2, 2);
    CHECK(size.columns == 2 && size.rows == 1, "a ribbon in 2x2 cells is %dx%d", size.columns, size.rows);
}

static void check_room(void) {
    for (int width = 1; width <= 40; width += 13)
        for (int height = 1; height <= 40; height += 13) {
            PreviewSize size = preview_fit(width, height, 30, 9);
            float *white = allocate(sizeof(float) * 3 * (size_t)(width * height));
            char *text = allocate(preview_room(size));
            for (int i = 0; i < 3 * width * height; i++) white[i] = 1;
            size_t n = preview_render(white, width, height, size, true, text);
            CHECK(n < preview_room(size), "%dx%d takes %zu bytes of %zu", width, height, n,
                  preview_room(size));
            free(white);
            free(text);
        }
}

void test_preview(void) {
    check_colours();
    check_fit();
    check_room();
}
