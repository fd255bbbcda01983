/* util.c - errors, memory and files.
 *
 * Output files. A file appears under its name only when it is complete: it is written beside its place as
 * NAME.PID.part and renamed by output_commit(). die() and an interrupt remove what was not committed, so a
 * failed run leaves nothing that looks like a result. Two kinds of output are written straight: standard
 * output, and a path that is not a regular file (/dev/null, a FIFO), since renaming over a device would replace
 * the device. A symbolic link is followed: the link survives, its target changes.
 *
 * A closed pipe. SIGPIPE is ignored and the failed write is reported like a full disk: one line, status 3.
 * This is what ffmpeg does; dying by the signal would leave unfinished files beside the output.
 *
 * Interrupts. The handler runs at any instant, so it touches only what POSIX lists as async-signal-safe:
 * unlink(), write(), _exit(), and a fixed table of paths that is changed with signals blocked. It runs in the
 * main thread alone (threads.c). */
#include "engine/engine.h"

#include <errno.h>
#include <fcntl.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---------------------------------------------------------------- errors */

/* Whatever a file or a prompt contains, a message stays one line and cannot steer the terminal. */
static void replace_controls(char *text) {
    size_t n;
    for (Bytes rest = {(const uint8_t *)text, strlen(text)}; rest.size; rest.data += n, rest.size -= n, text += n)
        if (!is_printable(rest, &n)) memset(text, '?', n);
}

static void print_line(const char *prefix, const char *format, va_list arguments) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    replace_controls(text);
    progress(NULL, 0, 0); /* clears its line */
    fprintf(stderr, "%s%s\n", prefix, text);
}

void die(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_line("sora: ", format, arguments);
    va_end(arguments);
    outputs_discard();
    exit(status);
}

void warn(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_line("sora: warning: ", format, arguments);
    va_end(arguments);
}

const char *reason(const char *format, ...) {
    static char buffer[1024];
    char text[sizeof buffer]; /* an argument may be the previous reason */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    replace_controls(text);
    return strcpy(buffer, text);
}

/* ---------------------------------------------------------------- memory */

enum { ALIGNMENT = 64 }; /* a cache line, and the widest vector */

static size_t aligned(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

void *allocate(size_t bytes) {
    size_t size = aligned(bytes ? bytes : 1);
    void *p = size >= bytes ? aligned_alloc(ALIGNMENT, size) : NULL;
    if (!p) die(STATUS_RESOURCE, "out of memory: %.1f MiB could not be had", bytes / 1048576.0);
    return memset(p, 0, size);
}

void *reallocate(void *p, size_t bytes) {
    void *q = realloc(p, bytes ? bytes : 1);
    if (!q) die(STATUS_RESOURCE, "out of memory: %.1f MiB could not be had", bytes / 1048576.0);
    return q;
}

char *format_string(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    char *text = reallocate(NULL, (size_t)length + 1);
    va_start(arguments, format);
    vsnprintf(text, (size_t)length + 1, format, arguments);
    va_end(arguments);
    return text;
}

void *arena_take(Arena *arena, size_t bytes) {
    size_t at = arena->used;
    arena->used += aligned(bytes);
    if (!arena->base) return NULL;
    if (arena->used > arena->size)
        die(STATUS_RESOURCE, "an arena of %zu bytes was asked for %zu (a bug)", arena->size, arena->used);
    return arena->base + at;
}

float *arena_floats(Arena *arena, size_t count) {
    return arena_take(arena, count * sizeof(float));
}

Arena arena_open(size_t bytes) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 17); /* else it grows, and freed arenas of up to 32 MiB stay with the process */
#endif
    return (Arena){.base = allocate(bytes), .size = bytes};
}

void arena_close(Arena *arena) {
    memory_note();
    free(arena->base);
    *arena = (Arena){0};
}

/* ---------------------------------------------------------------- input files */

const char *map_file(const char *path, Bytes *out) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status)) {
        int error = errno;
        if (file >= 0) close(file);
        return strerror(error);
    }
    void *data = MAP_FAILED;
    const char *why = NULL;
    if (!S_ISREG(status.st_mode)) why = "not a regular file";
    else if (status.st_size == 0) why = "the file is empty";
    else if ((data = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0)) == MAP_FAILED)
        why = reason("cannot be mapped into memory: %s", strerror(errno));
    close(file);
    *out = why ? (Bytes){NULL, 0} : (Bytes){data, (size_t)status.st_size};
    return why;
}

void unmap_file(Bytes bytes) {
    if (bytes.data) munmap((void *)bytes.data, bytes.size);
}

const char *read_file(const char *path, size_t limit, Bytes *out) {
    bool standard = !strcmp(path, "-");
    *out = (Bytes){NULL, 0};
    FILE *stream = standard ? stdin : fopen(path, "rbe");
    if (!stream) return strerror(errno);
    Text text = {0};
    static uint8_t part[1 << 16];
    for (size_t got = 1; got > 0 && text.size <= limit; text_append(&text, part, got))
        got = fread(part, 1, sizeof part, stream);
    int error = ferror(stream) ? errno : 0;
    if (!standard) fclose(stream);
    if (!error && text.size <= limit) {
        *out = (Bytes){text.data, text.size};
        return NULL;
    }
    free(text.data);
    return error ? strerror(error) : reason("longer than %zu bytes", limit);
}

static bool same_inode(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

bool same_file(const char *a, const char *b) {
    struct stat first, second;
    return !stat(a, &first) && !stat(b, &second) && (S_ISREG(first.st_mode) || S_ISDIR(first.st_mode)) &&
           same_inode(&first, &second);
}

/* ---------------------------------------------------------------- output files */

/* Paths of unfinished files. An entry changes with signals blocked, so the handler never sees half of it. */
enum { MAX_UNFINISHED = 16 };
static char *volatile unfinished[MAX_UNFINISHED];

static void unfinished_replace(const char *old, char *new) {
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    int i = 0;
    while (i < MAX_UNFINISHED && unfinished[i] != old) i++;
    if (i < MAX_UNFINISHED) unfinished[i] = new;
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (i == MAX_UNFINISHED) die(STATUS_RESOURCE, "more than %d output files open (a bug)", MAX_UNFINISHED);
}

void outputs_discard(void) {
    for (int i = 0; i < MAX_UNFINISHED; i++) {
        if (unfinished[i]) unlink(unfinished[i]);
        unfinished[i] = NULL;
    }
}

static _Noreturn void die_writing(const char *path) {
    if (!strcmp(path, "-")) path = "standard output";
    if (errno == EPIPE) die(STATUS_RESOURCE, "%s: closed by its reader", path);
    die(STATUS_RESOURCE, "%s: cannot write: %s", path, strerror(errno));
}

/* Where the bytes of `path` end up: the target of a symbolic link, else the path itself. A new string. */
static char *resolve(const char *path) {
    struct stat status;
    char *target = realpath(path, NULL);
    if (!target && !lstat(path, &status) && S_ISLNK(status.st_mode))
        die(STATUS_RESOURCE, "%s: a symbolic link whose target is not there", path);
    return target ? target : format_string("%s", path);
}

OutputFile output_open(const char *path) {
    if (!*path) die(STATUS_USAGE, "an output file without a name");
    struct stat status, standard;
    bool exists = !stat(path, &status), regular = !exists || S_ISREG(status.st_mode);
    /* /dev/stdout, where that is a file: replacing the file would leave the shell's own one empty. */
    bool redirected = exists && regular && !fstat(STDOUT_FILENO, &standard) && same_inode(&status, &standard);
    if (!strcmp(path, "-") || redirected) return (OutputFile){stdout, format_string("-"), NULL};
    /* /dev/stdout and a shell's >(command) may be links to pipes, which have no name to resolve to. */
    OutputFile out = {NULL, regular ? resolve(path) : format_string("%s", path), NULL};
    if (exists && access(out.path, W_OK)) die_writing(path);
    if (regular) {
        out.temporary = format_string("%s.%ld.part", out.path, (long)getpid());
        unfinished_replace(NULL, out.temporary);
    }
    out.stream = fopen(out.temporary ? out.temporary : out.path, "wbe");
    if (!out.stream) die_writing(path);
    if (exists && regular) fchmod(fileno(out.stream), status.st_mode & 0777); /* it keeps its permissions */
    return out;
}

void output_write(OutputFile *out, const void *data, size_t bytes) {
    if (bytes && fwrite(data, 1, bytes, out->stream) != bytes) die_writing(out->path);
}

void output_write_at(OutputFile *out, size_t offset, const void *data, size_t bytes) {
    if (fseeko(out->stream, (off_t)offset, SEEK_SET)) die_writing(out->path);
    output_write(out, data, bytes);
}

void output_flush(OutputFile *out) {
    if (fflush(out->stream)) die_writing(out->path);
}

void output_commit(OutputFile *out) {
    output_flush(out);
    if (out->stream != stdout && fclose(out->stream)) die_writing(out->path);
    if (out->temporary) {
        int error = rename(out->temporary, out->path) ? errno : 0;
        unfinished_replace(out->temporary, NULL); /* it is complete, and stays even if the rename failed */
        if (error)
            die(STATUS_RESOURCE, "%s: cannot write: %s; the file is complete and stays as %s", out->path,
                strerror(error), out->temporary);
    }
    free(out->temporary);
    free(out->path);
    *out = (OutputFile){NULL, NULL, NULL};
}

/* ---------------------------------------------------------------- interrupts */

static volatile sig_atomic_t on_terminal; /* there may be a progress line to end first */

/* The end of a run inside a signal's handler: nothing unfinished stays. The message begins with a newline. */
static _Noreturn void end_at_once(const char *message, int exit_status) {
    outputs_discard();
    const char *start = on_terminal ? message : message + 1;
    ssize_t written = write(STDERR_FILENO, start, strlen(start));
    (void)written;
    _exit(exit_status);
}

static void interrupted(int signal_number) {
    (void)signal_number;
    end_at_once("\nsora: interrupted\n", STATUS_INTERRUPTED);
}

/* A page of a mapped file cannot be read: the file was cut off meanwhile, or its disk failed. */
static void unreadable(int signal_number) {
    (void)signal_number;
    end_at_once("\nsora: a file that is being read was cut off, or its disk failed\n", STATUS_USAGE);
}

void standard_streams_keep(void) {
    for (int stream = 0; stream <= STDERR_FILENO; stream++)
        if (fcntl(stream, F_GETFD) < 0 && open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY) < 0)
            die(STATUS_RESOURCE, "/dev/null: %s", strerror(errno));
}

void interrupts_catch(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action = {.sa_handler = interrupted}, before;
    sigfillset(&action.sa_mask);
    on_terminal = isatty(STDERR_FILENO);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        /* What the caller ignores stays ignored: nohup, and a shell's background jobs. */
        if (!sigaction(signals[i], NULL, &before) && before.sa_handler != SIG_IGN)
            sigaction(signals[i], &action, NULL);
    }
    action.sa_handler = unreadable;
    sigaction(SIGBUS, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* likewise a limit on the size of files */
}
