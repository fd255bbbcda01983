/* test_preview.c - preview.c: the exact bytes of a drawn frame, its size, and how it is redrawn on a pseudo-terminal.
 * */
#define _XOPEN_SOURCE 700 /* posix_openpt */
#include "sora.h"
#include "tests/test.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void check_colours(void) {
    /* Two pixels wide, two high: black, white / red, mid grey. */
    const float frame[] = {-1, 1, 1, 0, -1, 1, -1, 0, -1, 1, -1, 0};
    char text[512];
    size_t n = preview_render(frame, 2, 2, (PreviewSize){2, 1}, true, text);
    const char *expected = "\033[38;2;0;0;0m\033[48;2;255;0;0m\xe2\x96\x80"
                           "\033[38;2;255;255;255m\033[48;2;128;128;128m\xe2\x96\x80\033[0m\n";
    CHECK(n == strlen(expected) && !memcmp(text, expected, n), "24-bit colours give other bytes");
    n = preview_render(frame, 2, 2, (PreviewSize){2, 1}, false, text);
    expected = "\033[38;5;16m\033[48;5;196m\xe2\x96\x80\033[38;5;231m\033[48;5;145m\xe2\x96\x80\033[0m\n";
    CHECK(n == strlen(expected) && !memcmp(text, expected, n),
          "256 colours give other bytes");
}

static void check_fit(void) {
    PreviewSize size = preview_fit(832, 480, 80, 22);
    CHECK(size.columns == 76 && size.rows == 22, "832x480 in 80x22 cells is %dx%d", size.columns, size.rows);
    size = preview_fit(64, 64, 200, 100);
    CHECK(size.columns == 64 && size.rows == 32, "64x64 in 200x100 cells is %dx%d", size.columns, size.rows);
    size = preview_fit(16384, 16, 2, 2);
    CHECK(size.columns == 2 && size.rows == 1, "16384x16 in 2x2 cells is %dx%d", size.columns, size.rows);
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

/* Redirects standard error to a pseudo-terminal with colours. Returns its master end, and the old descriptor in *kept.
 * */
static int open_terminal(int *kept) {
    setenv("TERM", "xterm", 1);
    unsetenv("NO_COLOR");
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    bool ready = master >= 0 && !grantpt(master) && !unlockpt(master);
    int slave = ready ? open(ptsname(master), O_RDWR | O_NOCTTY) : -1;
    *kept = dup(STDERR_FILENO);
    if (slave >= 0) {
        dup2(slave, STDERR_FILENO);
        close(slave);
    }
    return slave >= 0 ? master : -1;
}

static void close_terminal(int master, int kept) {
    dup2(kept, STDERR_FILENO);
    close(kept);
    close(master);
}

static void resize(int master, int columns, int rows) {
    struct winsize window = {.ws_col = (unsigned short)columns, .ws_row = (unsigned short)rows};
    ioctl(master, TIOCSWINSZ, &window);
}

/* What has been written to the terminal since the last call. */
static char *written(int master) {
    static char text[4096];
    fprintf(stderr, "|"); /* marks the end for the loop below */
    size_t size = 0;
    while (size < sizeof text - 1 && !memchr(text, '|', size) && read(master, text + size, 1) == 1) size++;
    text[size] = 0;
    return text;
}

/* Draws a frame in a window of columns x rows. Returns the escape sequences written before the frame. */
static const char *escapes_before(Preview *preview, int master, int columns, int rows, int index) {
    static const float frame[3 * 8 * 8];
    VideoFormat format = {8, 8, 50, 1, 420};
    resize(master, columns, rows);
    preview_frame(preview, &format, frame, index);
    char *text = written(master);
    char *picture = strstr(text, "\033[38;");
    if (picture) *picture = 0;
    return text;
}

static void check_terminal(void) {
    int kept, master = open_terminal(&kept);
    resize(master, 80, 3);
    Preview preview = preview_open();
    bool told = strstr(written(master), "--preview: the window has 80 columns and 3 rows, expected at least 2 and 4");
    double start = seconds();
    const char *steps[] = {"\r\033[K", "\r\033[K\033[4A", "\r\033[K\033[4A\033[J", "|"};
    const int windows[][2] = {{80, 24}, {80, 24}, {6, 24}, {80, 3}};
    bool same[4];
    for (int i = 0; i < 4; i++)
        same[i] = !strcmp(escapes_before(&preview, master, windows[i][0], windows[i][1], i), steps[i]);
    double elapsed = seconds() - start;
    close_terminal(master, kept);
    CHECK(master >= 0 && preview.enabled, "a pseudo-terminal cannot be drawn on");
    CHECK(told, "a window of three rows: no warning");
    CHECK(same[0] && same[1], "a frame is not drawn over the previous one");
    CHECK(same[2], "after a change of the window's size the old frame is not cleared");
    CHECK(same[3], "a frame is drawn in a window of three rows");
    CHECK(elapsed >= 0.039 && elapsed < 5, "three frames of 20 ms, the first at once, took %.3f s", elapsed);
}

/* Whether the preview is enabled on a terminal with colours if this environment variable is set. */
static bool draws_with(const char *name, const char *value) {
    int kept, master = open_terminal(&kept);
    setenv(name, value, 1);
    Preview preview = preview_open();
    close_terminal(master, kept);
    unsetenv("NO_COLOR");
    return preview.enabled;
}

static void check_wishes(void) {
    CHECK(draws_with("NO_COLOR", ""), "an empty NO_COLOR stops the preview");
    CHECK(!draws_with("NO_COLOR", "1"), "NO_COLOR does not stop the preview");
    CHECK(!draws_with("TERM", "dumb"), "the preview draws on a dumb terminal");
}

void test_preview(void) {
    check_colours();
    check_fit();
    check_room();
    check_terminal();
    check_wishes();
}
