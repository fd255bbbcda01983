/* shim.c - faults on demand: a library that is loaded before the C library (LD_PRELOAD) and counts the calls by which a
 * program writes, renames and removes files. At call number FAULT_AT it does what FAULT says:
 *
 *   kill   ends the process by SIGKILL before the call
 *   torn   the same in the middle of it: half of the bytes are in the file
 *   full   the call fails with ENOSPC, and so does every later call that needs space
 *
 * FAULT_COUNT=FILE writes how many calls there were when the process ends. FAULT_CLOCK=1 sets the clock of the day back
 * by an hour at every look at it. test_faults.c is its user. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static long calls;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static const char *fault(void) {
    const char *name = getenv("FAULT");
    return name ? name : "";
}

static long fault_at(void) {
    const char *at = getenv("FAULT_AT");
    return at ? atol(at) : -1;
}

/* Counts a call. Whether it is to fail for lack of space. */
static int fails(void) {
    calls++;
    if (calls == fault_at() && !strcmp(fault(), "kill")) raise(SIGKILL);
    if (strcmp(fault(), "full") || calls < fault_at()) return 0;
    errno = ENOSPC;
    return 1;
}

size_t fwrite(const void *data, size_t size, size_t n, FILE *stream) {
    typedef size_t Fwrite(const void *, size_t, size_t, FILE *);
    Fwrite *real = (Fwrite *)next("fwrite");
    if (stream == stderr || stream == stdout) return real(data, size, n, stream);
    if (fails()) return 0;
    if (calls == fault_at() && !strcmp(fault(), "torn")) {
        int (*flush)(FILE *) = (int (*)(FILE *))next("fflush");
        real(data, 1, size * n / 2, stream);
        flush(stream);
        raise(SIGKILL);
    }
    return real(data, size, n, stream);
}

int fflush(FILE *stream) {
    int (*real)(FILE *) = (int (*)(FILE *))next("fflush");
    return stream && stream != stderr && stream != stdout && fails() ? EOF : real(stream);
}

int fclose(FILE *stream) {
    int (*real)(FILE *) = (int (*)(FILE *))next("fclose");
    int failed = fails(), result = real(stream);
    if (failed) errno = ENOSPC;
    return failed ? EOF : result;
}

int fsync(int file) {
    int (*real)(int) = (int (*)(int))next("fsync");
    return fails() ? -1 : real(file);
}

int ftruncate(int file, off_t size) {
    int (*real)(int, off_t) = (int (*)(int, off_t))next("ftruncate");
    return fails() && size ? -1 : real(file, size);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))next("rename");
    fails(); /* takes no space */
    return real(from, to);
}

int unlink(const char *path) {
    int (*real)(const char *) = (int (*)(const char *))next("unlink");
    fails();
    return real(path);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static long back;
    int (*real)(clockid_t, struct timespec *) = (int (*)(clockid_t, struct timespec *))next("clock_gettime");
    int result = real(clock, time);
    if (clock == CLOCK_REALTIME && getenv("FAULT_CLOCK")) time->tv_sec -= back += 3600;
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    char text[32];
    int file = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
    if (file < 0) return;
    ssize_t written = write(file, text, (size_t)snprintf(text, sizeof text, "%ld\n", calls));
    (void)written;
    close(file);
}
