/* progress.c - the progress line on standard error: stage, piece, time elapsed, time left. It is printed only if
 * standard error is a terminal.
 *
 *   time left = (time since the stage began) / (pieces done) * (pieces that remain)
 *
 * A new line overwrites the old one: "\r" goes to its start, "ESC[K" erases it. */
#include "engine/engine.h"

#include <stdarg.h>
#include <string.h>
#include <unistd.h>

static bool enabled;
static const char *current;
static char detail[96];
static double started, stage_started;
static int stage_first; /* the piece with which the stage began here */

void progress_enable(bool wanted) {
    enabled = wanted && isatty(STDERR_FILENO);
    started = seconds();
}

static void print_time(double t) {
    int s = (int)(t + 0.5);
    if (s >= 3600) fprintf(stderr, "  %d:%02d:%02d", s / 3600, s / 60 % 60, s % 60);
    else fprintf(stderr, "  %d:%02d", s / 60, s % 60);
}

void progress(const char *stage, int done, int total) {
    if (!enabled) return;
    fprintf(stderr, "\r\033[K");
    if (stage) {
        double now = seconds();
        if (!current || strcmp(stage, current)) stage_started = now, stage_first = done;
        fprintf(stderr, "%s %d/%d%s%s", stage, done, total, *detail ? ", " : "", detail);
        print_time(now - started);
        if (done > stage_first) {
            print_time((now - stage_started) / (done - stage_first) * (total - done));
            fprintf(stderr, " left");
        }
    }
    current = stage;
    *detail = 0;
    fflush(stderr);
}

void progress_detail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
}

void progress_note(const char *format, ...) {
    if (!enabled) return;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "\r\033[K");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}
