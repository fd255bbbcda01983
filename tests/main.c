/* main.c - runs the suites named on the command line, or all of them. The last line is "N passed, N failed". */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* The suites in the order in which they run. Suite NAME is the function test_NAME() in test_NAME.c. */
#define SUITES(X) \
    X(memory) X(util) X(system) X(weights) X(kernels) X(story) X(tokenizer) X(noise) X(sampler) X(easycache) X(state) \
    X(libm) X(y4m) X(picture) X(preview) X(pipeline) X(pictures) X(causal) X(digest) X(npy) X(tap) X(sha256) X(json) \
    X(trust) X(cli) X(faults)

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

static bool apart; /* whether this process is a child of run_apart() */

/* Called by LeakSanitizer. In a child it would report the memory of the parent's threads, which fork() did not copy. */
int __lsan_is_turned_off(void) { return apart; }

int run_apart(void (*run)(void *), void *argument, char output[4096]) {
    int ends[2], status = 0;
    size_t size = 0;
    if (pipe(ends)) abort();
    fflush(NULL);
    pid_t child = fork();
    if (!child) {
        apart = true;
        threads_set(1); /* fork() did not copy the others, and waking those that slept may block for ever */
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        run(argument);
        fflush(NULL);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got = 1; got > 0; size += (size_t)got) {
        got = read(ends[0], output + size, 4095 - size);
        if (got < 0) break;
    }
    output[size] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static char temporary[] = "/tmp/sora-tests-XXXXXX";

char *temporary_path(const char *name) {
    size_t size = sizeof temporary + strlen(name) + 1;
    char *path = malloc(size);
    if (!path) abort();
    snprintf(path, size, "%s/%s", temporary, name);
    return path;
}

static void remove_temporary(void) {
    char command[sizeof temporary + 16];
    snprintf(command, sizeof command, "rm -rf '%s'", temporary);
    if (system(command)) fprintf(stderr, "%s could not be removed\n", temporary);
}

int main(int argc, char **argv) {
    threads_set(threads_default());
    if (!mkdtemp(temporary)) abort();
    for (int s = 0; suites[s].name; s++) {
        bool chosen = argc < 2;
        for (int i = 1; i < argc; i++) chosen |= !strcmp(argv[i], suites[s].name);
        if (!chosen) continue;
        int before = passed, failures = failed;
        suites[s].run();
        printf("%-14s %5d passed, %d failed\n", suites[s].name, passed - before, failed - failures);
        fflush(stdout);
    }
    remove_temporary();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
