/* util.c - error messages, memory, input files, output files and signals.
 *
 * Output files. An output file NAME is written as NAME.part. output_commit() renames it to NAME. die() and the
 * signal handler remove every .part file, except those that --resume needs (outputs_note), so a failed run leaves no
 * incomplete result. NAME.part is locked (flock) while a process writes it: a second process with the same output is
 * refused. The .part file of a killed process is not locked and is reused. Two kinds of output are written directly:
 * standard output, and a path that is not a regular file (/dev/null, a FIFO), because rename() would replace the
 * device. A symbolic link stays; its target is replaced.
 *
 * Closed pipe. SIGPIPE is ignored, so that write() fails with EPIPE. The failure is reported like a full disk: one
 * line, status 3. If SIGPIPE ended the process, the .part files would stay.
 *
 * Signals. The handler may run at any time. It uses only async-signal-safe functions (POSIX.1-2008, 2.4.3): unlink(),
 * write(), _exit(). It reads a fixed table of paths, which is changed only while signals are blocked. Only the main
 * thread receives signals (threads.c). */
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
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---------------------------------------------------------------- errors */

/* Replaces control characters and invalid UTF-8 by '?'. A message may quote a file or a prompt; it stays one line and
 * cannot send escape sequences to the terminal. */
static void replace_controls(char *text) {
    size_t n;
    for (Bytes rest = {(const uint8_t *)text, strlen(text)}; rest.size; rest.data += n, rest.size -= n, text += n)
        if (!is_printable(rest, &n)) memset(text, '?', n);
}

static void print_line(const char *prefix, const char *format, va_list arguments, const char *advice) {
    char text[1024];
    vsnprintf(text, sizeof text, format, arguments);
    replace_controls(text);
    progress(NULL, 0, 0); /* clears the progress line */
    fprintf(stderr, "%s%s%s\n", prefix, text, advice);
}

/* The end of the last line of a run that fails or is interrupted. The signal handler reads it: it is replaced as a
 * whole. */
static const char *volatile advice = "";

void outputs_advise(const char *format, ...) {
    static char texts[2][512];
    char *text = advice == texts[0] ? texts[1] : texts[0];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof texts[0], format, arguments);
    va_end(arguments);
    replace_controls(text);
    advice = text;
}

void die(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_line("sora: ", format, arguments, status == STATUS_CHECK ? "" : advice);
    va_end(arguments);
    outputs_discard(status == STATUS_CHECK);
    exit(status);
}

void warn(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_line("sora: warning: ", format, arguments, "");
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

/* Large blocks ask for pages of 2 MiB: a processor finds them faster, and the kernel clears them faster. */
void *allocate(size_t bytes) {
    enum { LARGE_PAGE = 1 << 21, LARGE_BLOCK = 4 * LARGE_PAGE };
    size_t size = whole_lines(bytes ? bytes : 1), page = CACHE_LINE;
#ifdef MADV_HUGEPAGE
    if (size >= LARGE_BLOCK) page = LARGE_PAGE;
#endif
    size_t whole = (size + page - 1) / page * page; /* aligned_alloc() wants a multiple; the rest is not touched */
    void *p = whole >= bytes ? aligned_alloc(page, whole) : NULL;
    if (!p) die(STATUS_RESOURCE, "out of memory: cannot allocate %.1f MiB", bytes / 1048576.0);
#ifdef MADV_HUGEPAGE
    if (page == LARGE_PAGE) madvise(p, size / page * page, MADV_HUGEPAGE); /* if it fails, all is the same but slower */
#endif
    return memset(p, 0, size);
}

void *reallocate(void *p, size_t bytes) {
    void *q = realloc(p, bytes ? bytes : 1);
    if (!q) die(STATUS_RESOURCE, "out of memory: cannot allocate %.1f MiB", bytes / 1048576.0);
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
    arena->used += whole_lines(bytes);
    if (!arena->base) return NULL;
    if (arena->used > arena->size)
        die(STATUS_RESOURCE, "an arena of %zu bytes is too small: %zu were requested (a bug)", arena->size,
            arena->used);
    return arena->base + at;
}

float *arena_floats(Arena *arena, size_t count) {
    return arena_take(arena, count * sizeof(float));
}

Arena arena_open(size_t bytes) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 17); /* glibc raises it up to 32 MiB; then freed arenas are not unmapped */
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
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* or open() would wait for the writer of a FIFO */
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

FILE *input_open(const char *path) { return strcmp(path, "-") ? fopen(path, "rbe") : stdin; }

const char *read_file(const char *path, size_t limit, Bytes *out) {
    *out = (Bytes){NULL, 0};
    FILE *stream = input_open(path);
    if (!stream) return strerror(errno);
    Text text = {0};
    static uint8_t part[1 << 16];
    for (size_t got = 1; got > 0 && text.size <= limit; text_append(&text, part, got))
        got = fread(part, 1, sizeof part, stream);
    int error = ferror(stream) ? errno : 0;
    if (stream != stdin) fclose(stream);
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

/* The paths of the .part files. An entry changes only while signals are blocked, so the handler never sees it
 * half-written. */
enum { MAX_UNFINISHED = 16 };
static struct {
    char *volatile path;
    volatile bool kept; /* when the run fails */
} unfinished[MAX_UNFINISHED];

static void signals_block(sigset_t *before) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, before);
}

static void unfinished_replace(const char *old, char *new, bool kept) {
    sigset_t before;
    signals_block(&before);
    int i = 0;
    while (i < MAX_UNFINISHED && unfinished[i].path != old) i++;
    if (i < MAX_UNFINISHED) unfinished[i].path = new, unfinished[i].kept = kept;
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (i == MAX_UNFINISHED) die(STATUS_RESOURCE, "more than %d output files are open (a bug)", MAX_UNFINISHED);
}

void outputs_note(char *path, bool protect) {
    int i = 0;
    while (i < MAX_UNFINISHED && unfinished[i].path != path) i++;
    unfinished_replace(i < MAX_UNFINISHED ? path : NULL, path, protect);
}

void outputs_forget(const char *path) { unfinished_replace(path, NULL, false); }

void outputs_discard(bool all) {
    for (int i = 0; i < MAX_UNFINISHED; i++) {
        if (unfinished[i].path && (all || !unfinished[i].kept)) unlink(unfinished[i].path);
        unfinished[i].path = NULL;
    }
}

static _Noreturn void die_writing(const char *path) {
    if (!strcmp(path, "-")) path = "standard output";
    if (errno == EPIPE) die(STATUS_RESOURCE, "%s: the reader closed the pipe", path);
    die(STATUS_RESOURCE, "%s: cannot write: %s", path, strerror(errno));
}

/* The target if `path` is a symbolic link, else `path`. A new string. */
static char *resolve(const char *path) {
    struct stat status;
    char *target = realpath(path, NULL);
    int error = target ? 0 : errno;
    if (!target && !lstat(path, &status) && S_ISLNK(status.st_mode))
        die(STATUS_RESOURCE, "%s: a symbolic link that leads to no file: %s", path, strerror(error));
    return target ? target : format_string("%s", path);
}

/* Opens and locks the .part file. If its last owner has renamed or removed it meanwhile, it is opened again. A file
 * system without locks is used without them. */
static int open_locked(const char *path, const char *temporary) {
    struct stat mine, there;
    for (;;) {
        int file = open(temporary, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
        if (file < 0 || fstat(file, &mine)) die_writing(path);
        if (!S_ISREG(mine.st_mode)) die(STATUS_RESOURCE, "%s: %s is not a regular file", path, temporary);
        if (flock(file, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
            die(STATUS_RESOURCE, "%s: another process is writing it (%s is locked)", path, temporary);
        if (!stat(temporary, &there) && same_inode(&mine, &there)) return file;
        close(file);
    }
}

static void open_unfinished(OutputFile *out, const char *path, bool goes_on) {
    sigset_t before;
    out->temporary = format_string("%s.part", out->path);
    signals_block(&before); /* the handler must know of the file */
    int file = open_locked(path, out->temporary);
    bool holds_frames = goes_on && lseek(file, 0, SEEK_END) > 0; /* an empty file is of no use to a later run */
    unfinished_replace(NULL, out->temporary, holds_frames);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (!goes_on && ftruncate(file, 0)) die_writing(path);
    out->stream = fdopen(file, "wb");
}

static OutputFile open_output(const char *path, bool goes_on) {
    if (!*path) die(STATUS_USAGE, "the name of an output file is empty");
    struct stat status, standard;
    bool exists = !stat(path, &status), regular = !exists || S_ISREG(status.st_mode);
    /* /dev/stdout, redirected to a file by the shell: rename() would replace that file, so write to stdout. */
    bool redirected = exists && regular && !fstat(STDOUT_FILENO, &standard) && same_inode(&status, &standard);
    if (!strcmp(path, "-") || redirected) return (OutputFile){stdout, format_string("-"), NULL};
    /* /dev/stdout and bash's >(command) may be links to pipes. realpath() cannot resolve these. */
    OutputFile out = {NULL, regular ? resolve(path) : format_string("%s", path), NULL};
    if (exists && access(out.path, W_OK)) die_writing(path);
    if (regular) open_unfinished(&out, path, goes_on);
    else out.stream = fopen(out.path, "wbe");
    if (!out.stream) die_writing(path);
    if (exists && regular) fchmod(fileno(out.stream), status.st_mode & 0777); /* keeps the file's permissions */
    return out;
}

OutputFile output_open(const char *path) { return open_output(path, false); }

OutputFile output_continue(const char *path) { return open_output(path, true); }

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

void output_cut(OutputFile *out, size_t bytes) {
    if (ftruncate(fileno(out->stream), (off_t)bytes) || fseeko(out->stream, (off_t)bytes, SEEK_SET))
        die_writing(out->path);
}

void output_sync(OutputFile *out) {
    output_flush(out);
    if (fsync(fileno(out->stream))) die_writing(out->path);
}

void output_commit(OutputFile *out) {
    output_flush(out);
    int lock = out->temporary ? dup(fileno(out->stream)) : -1; /* held until the file has its name */
    if (out->stream != stdout && fclose(out->stream)) die_writing(out->path);
    if (out->temporary) {
        int error = rename(out->temporary, out->path) ? errno : 0;
        bool complete = error && !access(out->temporary, F_OK);
        outputs_forget(out->temporary); /* the file is complete: keep it even if rename() failed */
        if (complete)
            die(STATUS_RESOURCE, "%s: cannot write: %s; the file is complete and stays as %s", out->path,
                strerror(error), out->temporary);
        errno = error;
        if (error) die_writing(out->path);
    }
    if (lock >= 0) close(lock);
    free(out->temporary);
    free(out->path);
    *out = (OutputFile){NULL, NULL, NULL};
}

/* ---------------------------------------------------------------- interrupts */

static volatile sig_atomic_t on_terminal; /* a progress line may be on the screen */

/* Called by signal handlers. Removes the .part files, prints the message and exits. `message` begins with a newline,
 * which ends the progress line. */
static _Noreturn void end_at_once(const char *message, int exit_status) {
    outputs_discard(false);
    const char *parts[] = {on_terminal ? message : message + 1, advice, "\n"};
    for (int i = 0; i < 3; i++) {
        ssize_t written = write(STDERR_FILENO, parts[i], strlen(parts[i]));
        (void)written;
    }
    _exit(exit_status);
}

static void interrupted(int signal_number) {
    (void)signal_number;
    end_at_once("\nsora: interrupted", STATUS_INTERRUPTED);
}

/* SIGBUS: a page of a mapped file cannot be read, because the file was truncated or its disk failed. */
static void unreadable(int signal_number) {
    (void)signal_number;
    end_at_once("\nsora: cannot read an input file: it was truncated while in use, or its disk failed", STATUS_USAGE);
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
        /* A signal that the caller ignores stays ignored (nohup, background jobs of a shell). */
        if (!sigaction(signals[i], NULL, &before) && before.sa_handler != SIG_IGN)
            sigaction(signals[i], &action, NULL);
    }
    action.sa_handler = unreadable;
    sigaction(SIGBUS, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* a write beyond the file size limit fails with EFBIG */
}
