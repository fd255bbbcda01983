/* main.c - runs the suites named on the command line, or all; closes with "N passed, N failed". */
#include "tests/test.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* One line a suite, in the order of data flow; each is the function test_NAME in test_NAME.c. */
#define SUITES(X) X(sampler)

#define DECLARE(name) void test_##name(void);
SUITES(DECLARE)
#define ENTRY(name) {#name, test_##name},
static const struct { const char *name; void (*run)(void); } suites[] = {SUITES(ENTRY){NULL, NULL}};

static int passed, failed;

void check(bool claim, const char *file, int line, const char *format, ...) {
    if (claim) {
        passed++;
        return;
    }
    failed++;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: FAILED: ", file, line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

double relative_error(const float *actual, const float *expected, size_t n) {
    double worst = 0, largest = 0;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)actual[i] - expected[i]);
        if (!(difference <= worst)) worst = isfinite(difference) ? difference : INFINITY;
        largest = fmax(largest, fabs((double)expected[i]));
    }
    return largest > 0 ? worst / largest : worst;
}

const char *test_path(const char *name) {
    static char path[1024];
    snprintf(path, sizeof path, "tests/%s", name);
    return path;
}

int main(int argc, char **argv) {
    for (int s = 0; suites[s].name; s++) {
        bool chosen = argc < 2;
        for (int i = 1; i < argc; i++) chosen |= !strcmp(argv[i], suites[s].name);
        if (!chosen) continue;
        int before = passed, failures = failed;
        suites[s].run();
        printf("%-14s %5d passed, %d failed\n", suites[s].name, passed - before, failed - failures);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
