/* preview.c - frames -> a colour terminal, as they are decoded (--preview).
 *
 * A character cell is about twice as high as wide. An upper half block (U+2580) in one colour on a background of
 * another shows two square pixels:
 *
 *   row 2r      foreground colour      +---+
 *   row 2r + 1  background colour      | ▀ |
 *
 * A frame is averaged down to the window, never enlarged, and drawn over the previous one. A frame that is decoded
 * before it is due waits. Colours are 24 bits if COLORTERM says so, else the 6x6x6 cube of 256 colours. The preview
 * goes to standard error, because standard output may carry the video. */
#include "sora.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* Average over columns [x0,x1) and rows [y0,y1) of one colour's plane, as a byte. */
static int shade(const float *plane, int width, int x0, int x1, int y0, int y1) {
    float sum = 0;
    for (int y = y0; y < y1; y++)
        for (int x = x0; x < x1; x++) sum += plane[(size_t)y * width + x];
    return byte_of((sum / (float)((x1 - x0) * (y1 - y0)) + 1.0f) * 127.5f);
}

/* A byte as a coordinate of the colour cube, 0 to 5. */
static int cube(int byte) { return (byte * 5 + 127) / 255; }

/* Writes the escape sequence that sets the foreground (38) or background (48). Returns its length. */
static int set_colour(char *out, int ground, const int rgb[3], bool true_colour) {
    if (true_colour) return sprintf(out, "\033[%d;2;%d;%d;%dm", ground, rgb[0], rgb[1], rgb[2]);
    return sprintf(out, "\033[%d;5;%dm", ground, 16 + 36 * cube(rgb[0]) + 6 * cube(rgb[1]) + cube(rgb[2]));
}

PreviewSize preview_fit(int width, int height, int columns, int rows) {
    double scale = (double)columns / width, vertical = 2.0 * rows / height;
    if (vertical < scale) scale = vertical;
    if (scale > 1) scale = 1;
    PreviewSize size = {(int)(width * scale), (int)(height * scale) / 2};
    if (size.columns < 1) size.columns = 1;
    if (size.rows < 1) size.rows = 1;
    return size;
}

/* A cell has two colours of at most 19 bytes and a block of 3. A row adds a reset and a newline, 5 bytes. */
size_t preview_room(PreviewSize size) { return (size_t)size.rows * ((size_t)size.columns * 41 + 5) + 1; }

size_t preview_render(const float *frame, int width, int height, PreviewSize size, bool true_colour,
                      char *out) {
    char *start = out;
    for (int row = 0; row < size.rows; row++) {
        for (int column = 0; column < size.columns; column++) {
            int x0 = column * width / size.columns, x1 = (column + 1) * width / size.columns;
            for (int half = 0; half < 2; half++) {
                int y = 2 * row + half, rgb[3];
                int y0 = y * height / (2 * size.rows), y1 = (y + 1) * height / (2 * size.rows);
                if (y1 == y0) y1++;
                for (int c = 0; c < 3; c++)
                    rgb[c] = shade(frame + (size_t)c * width * height, width, x0, x1, y0, y1);
                out += set_colour(out, half ? 48 : 38, rgb, true_colour);
            }
            out += sprintf(out, "\xe2\x96\x80");
        }
        out += sprintf(out, "\033[0m\n");
    }
    return (size_t)(out - start);
}

static const char *variable(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

/* Whether a picture fits into the window. */
static bool window_of_terminal(struct winsize *window) {
    return !ioctl(STDERR_FILENO, TIOCGWINSZ, window) && window->ws_col >= 2 && window->ws_row >= 4;
}

Preview preview_open(void) {
    Preview preview = {0};
    struct winsize window = {0};
    const char *terminal = variable("TERM"), *colours = variable("COLORTERM");
    if (!isatty(STDERR_FILENO)) warn("--preview: standard error is not a terminal");
    else if (!*terminal || !strcmp(terminal, "dumb"))
        warn("--preview: TERM is '%s', expected a colour terminal", terminal);
    else if (*variable("NO_COLOR")) warn("--preview: the environment variable NO_COLOR is set");
    else preview.enabled = true;
    if (preview.enabled && !window_of_terminal(&window))
        warn("--preview: the window has %d columns and %d rows, expected at least 2 and 4", window.ws_col,
             window.ws_row);
    preview.true_colour = strstr(colours, "truecolor") || strstr(colours, "24bit");
    return preview;
}

/* Sleeps until `when` by the clock of seconds(). */
static void wait_until(double when) {
    double rest = when - seconds();
    if (rest <= 0) return;
    struct timespec time = {(time_t)rest, (long)((rest - (double)(time_t)rest) * 1e9)};
    nanosleep(&time, NULL);
}

/* Moves the cursor to the top of the last picture, and clears it if the new one has another size. */
static void move_to_start(PreviewSize drawn, PreviewSize size) {
    fprintf(stderr, "\r\033[K");
    if (drawn.rows) fprintf(stderr, "\033[%dA", drawn.rows);
    if (drawn.rows && (drawn.rows != size.rows || drawn.columns != size.columns)) fprintf(stderr, "\033[J");
}

/* The largest picture for the window; 0 rows if nothing is to be drawn. */
static PreviewSize size_now(const Preview *preview, const VideoFormat *format) {
    struct winsize window = {0};
    if (!preview->enabled || !window_of_terminal(&window)) return (PreviewSize){0};
    return preview_fit(format->width, format->height, window.ws_col, window.ws_row - 2);
}

static void draw(Preview *preview, const VideoFormat *format, const float *frame, PreviewSize size) {
    char *text = allocate(preview_room(size));
    size_t length = preview_render(frame, format->width, format->height, size, preview->true_colour, text);
    move_to_start(preview->drawn, size);
    fwrite(text, 1, length, stderr);
    free(text);
    preview->drawn = size;
}

void preview_frame(Preview *preview, const VideoFormat *format, const float *frame, int index) {
    PreviewSize size = size_now(preview, format);
    if (!size.rows) return;
    double time = (double)index * format->rate_den / format->rate_num;
    if (!preview->plays) preview->start = seconds() - time;
    preview->plays = true;
    wait_until(preview->start + time);
    draw(preview, format, frame, size);
}

void preview_guess(Preview *preview, const VideoFormat *format, const float *frame) {
    PreviewSize size = size_now(preview, format);
    if (size.rows) draw(preview, format, frame, size);
}
