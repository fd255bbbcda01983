/* test_util.c - util.c: messages, memory, output files that appear only when complete, signals; also profile.c and
 * UTF-16 in utf8.c. */
#include "tests/test.h"
#include "engine/engine.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---------------------------------------------------------------- helpers */

static bool file_is(const char *path, const char *content) {
    Bytes bytes;
    if (read_file(path, 1 << 20, &bytes)) return false;
    bool same = bytes.size == strlen(content) && !memcmp(bytes.data, content, bytes.size);
    free((void *)bytes.data);
    return same;
}

static void write_text(const char *path, const char *content) {
    OutputFile out = output_open(path);
    output_write(&out, content, strlen(content));
    output_commit(&out);
}

/* Whether a file PATH.* exists, such as PATH.PID.part. */
static bool leftover_beside(const char *path) {
    char command[512];
    snprintf(command, sizeof command, "ls '%s'.* >/dev/null 2>&1", path);
    return system(command) == 0;
}

/* ---------------------------------------------------------------- messages and memory */

static void test_messages(void) {
    const char *inner = reason("bad byte %d", 7);
    const char *outer = reason("%s: %s", "file\n\x1b[2J", inner);
    CHECK(!strcmp(outer, "file??[2J: bad byte 7"), "a reason quoted in a reason is \"%s\"", outer);
    outer = reason("%s", "na\xc3\xafve \xc2\x9b" "31m \x9b" "31m \xe2\x82");
    CHECK(!strcmp(outer, "na\xc3\xafve ??31m ?31m ??"), "C1 controls and truncated characters give \"%s\"", outer);
    char *text = format_string("%s-%03d", "block", 7);
    CHECK(!strcmp(text, "block-007"), "format_string gives \"%s\"", text);
    free(text);
}

static void die_with_newline(void *unused) {
    (void)unused;
    die(STATUS_USAGE, "--size %s: no size", "3\nx4");
}

static void ask_for_too_much(void *unused) {
    (void)unused;
    allocate(SIZE_MAX / 2);
}

static void overrun_arena(void *unused) {
    (void)unused;
    Arena arena = {allocate(128), 0, 128};
    arena_take(&arena, 64);
    arena_take(&arena, 65);
}

static void test_deaths(void) {
    char output[4096];
    int status = run_apart(die_with_newline, NULL, output);
    CHECK(status == STATUS_USAGE, "die(2) exits with %d", status);
    CHECK(!strcmp(output, "sora: --size 3?x4: no size\n"), "die prints \"%s\"", output);
    status = run_apart(ask_for_too_much, NULL, output);
    CHECK(status == STATUS_RESOURCE && strstr(output, "out of memory"), "out of memory: status %d, \"%s\"",
          status, output);
    status = run_apart(overrun_arena, NULL, output);
    CHECK(status == STATUS_RESOURCE && strstr(output, "arena"), "arena overrun: status %d, \"%s\"", status,
          output);
}

static void test_memory(void) {
    uint8_t *p = allocate(1000);
    bool zero = true;
    for (int i = 0; i < 1000; i++) zero &= !p[i];
    CHECK(zero && (uintptr_t)p % 64 == 0, "allocate() is not zeroed or not aligned");
    free(p);
    Arena counting = {0}, arena = {allocate(64 + 128), 0, 64 + 128};
    CHECK(!arena_take(&counting, 1) && !arena_floats(&counting, 17), "an arena without base returns memory");
    CHECK(counting.used == arena.size, "an arena without base counts %zu bytes, expected %zu", counting.used,
          arena.size);
    char *first = arena_take(&arena, 1);
    float *second = arena_floats(&arena, 17);
    CHECK((char *)second == first + 64, "the second buffer does not follow the first");
    free(arena.base);
}

static void grow(void *unused) {
    (void)unused;
    enum { GROWTH = 64 << 20 };
    size_t before = memory_peak();
    char *p = allocate(GROWTH);
    memset(p, 1, GROWTH);
    fprintf(stderr, "%d", memory_peak() >= before + (GROWTH - (GROWTH >> 3)));
}

static void test_machine(void) {
    char output[4096];
    run_apart(grow, NULL, output);
    CHECK(!strcmp(output, "1"), "memory_peak() does not grow with 64 MiB of allocated memory");
    size_t available = memory_available();
    CHECK(available > 1 << 20, "memory_available() is %zu bytes", available);
    double start = seconds();
    usleep(2000);
    double elapsed = seconds() - start;
    CHECK(elapsed >= 0.002 && elapsed < 10, "2 ms took %g s", elapsed);
}

/* ---------------------------------------------------------------- input */

static void test_input(void) {
    char *path = temporary_path("input"), *missing = temporary_path("missing");
    Bytes bytes;
    write_text(path, "12345");
    CHECK(!map_file(path, &bytes) && bytes.size == 5 && !memcmp(bytes.data, "12345", 5),
          "map_file gives other content");
    unmap_file(bytes);
    CHECK(!read_file(path, 5, &bytes) && bytes.size == 5, "read_file refuses a file as long as its limit");
    free((void *)bytes.data);
    const char *why = read_file(path, 4, &bytes);
    CHECK(why && strstr(why, "longer than 4 bytes") && !bytes.data, "read_file beyond its limit: %s", why);
    why = map_file(missing, &bytes);
    CHECK(why && !strcmp(why, "No such file or directory"), "map_file of a missing file: %s", why);
    why = map_file("/tmp", &bytes);
    CHECK(why && strstr(why, "not a regular file"), "map_file of a folder: %s", why);
    CHECK(!mkfifo(missing, 0600), "mkfifo fails");
    alarm(10);
    why = map_file(missing, &bytes);
    alarm(0);
    CHECK(why && strstr(why, "not a regular file"), "map_file of a FIFO without a writer: %s", why);
    unlink(missing);
    write_text(path, "");
    why = map_file(path, &bytes);
    CHECK(why && strstr(why, "empty"), "map_file of an empty file: %s", why);
    free(path);
    free(missing);
}

/* ---------------------------------------------------------------- output */

static void test_commit(void) {
    char *path = temporary_path("output"), *link = temporary_path("link");
    OutputFile out = output_open(path);
    output_write(&out, "one", 3);
    output_flush(&out);
    CHECK(access(path, F_OK), "an incomplete file has its final name");
    output_commit(&out);
    CHECK(file_is(path, "one") && !leftover_beside(path), "a committed file differs from what was written");
    CHECK(!symlink(path, link), "no symbolic link could be made");
    write_text(link, "two");
    struct stat status;
    CHECK(file_is(path, "two") && !lstat(link, &status) && S_ISLNK(status.st_mode),
          "a link was not followed");
    out = output_open(path);
    output_write(&out, "......", 6);
    output_write_at(&out, 2, "ab", 2);
    output_commit(&out);
    CHECK(file_is(path, "..ab.."), "output_write_at wrote elsewhere");
    free(path);
    free(link);
}

/* Checks that a FIFO is written to and not replaced by a file. If it is replaced, the test of /dev/full is skipped, so
 * that the device is not replaced too. */
static bool keeps_special_files(void) {
    char *path = temporary_path("fifo"), got[5] = "";
    struct stat status;
    int reader = mkfifo(path, 0600) ? -1 : open(path, O_RDONLY | O_NONBLOCK);
    write_text(path, "three");
    bool kept = !stat(path, &status) && S_ISFIFO(status.st_mode);
    CHECK(kept && read(reader, got, 5) == 5 && !memcmp(got, "three", 5), "a FIFO was replaced by a file");
    close(reader);
    free(path);
    return kept;
}

static void die_while_writing(void *path) {
    OutputFile out = output_open(path);
    output_write(&out, "half", 4);
    output_flush(&out);
    die(STATUS_CHECK, "something else failed");
}

static void interrupt_while_writing(void *path) {
    interrupts_catch();
    OutputFile out = output_open(path);
    output_flush(&out);
    raise(SIGINT);
}

static void fill_disk(void *path) {
    OutputFile out = output_open(path);
    output_write(&out, "x", 1);
    output_commit(&out);
}

static void write_to_closed_pipe(void *unused) {
    (void)unused;
    int ends[2];
    interrupts_catch();
    if (pipe(ends) || dup2(ends[1], STDOUT_FILENO) < 0) return;
    close(ends[0]);
    OutputFile out = output_open("-");
    output_write(&out, "x", 1);
    output_flush(&out);
}

static void test_failures(void) {
    char output[4096], *path = temporary_path("failed"), *nowhere = temporary_path("no-folder/file");
    int status = run_apart(die_while_writing, path, output);
    CHECK(status == STATUS_CHECK && access(path, F_OK) && !leftover_beside(path), "die() leaves a file");
    status = run_apart(interrupt_while_writing, path, output);
    CHECK(status == STATUS_INTERRUPTED && !strcmp(output, "sora: interrupted\n"), "SIGINT: status %d, \"%s\"",
          status, output);
    CHECK(access(path, F_OK) && !leftover_beside(path), "an interrupt leaves a file");
    status = run_apart(fill_disk, nowhere, output);
    CHECK(status == STATUS_RESOURCE && strstr(output, "no-folder/file: cannot write: No such file"),
          "missing folder: status %d, \"%s\"", status, output);
    struct stat full;
    if (keeps_special_files() && !stat("/dev/full", &full) && S_ISCHR(full.st_mode)) {
        status = run_apart(fill_disk, "/dev/full", output);
        CHECK(status == STATUS_RESOURCE && strstr(output, "/dev/full: cannot write: No space left"),
              "full disk: status %d, \"%s\"", status, output);
    }
    status = run_apart(write_to_closed_pipe, NULL, output);
    CHECK(status == STATUS_RESOURCE && !strcmp(output, "sora: standard output: the reader closed the pipe\n"),
          "closed pipe: status %d, \"%s\"", status, output);
    free(path);
    free(nowhere);
}

/* ---------------------------------------------------------------- profile.c */

static void profile_two_stages(void *unused) {
    (void)unused;
    Arena arena = arena_open(32 << 20);
    for (int i = 0; i < 2; i++) {
        profile_begin(TRANSFORMER);
        profile_flops(3e9);
        usleep(2000);
        profile_end(TRANSFORMER);
    }
    profile_flops(1e12); /* no stage runs, so this is not counted */
    arena_close(&arena);
    profile_begin(OUTPUT);
    profile_end(OUTPUT);
    profile_print();
}

static void test_profile(void) {
    char output[4096];
    run_apart(profile_two_stages, NULL, output);
    double duration = 0, rate = 0, total = 0;
    int peak = 0, end = 0;
    sscanf(output,
           "transformer\t2\t%lf\t6.000\t%lf\noutput\t1\t%*f\t0.000\t0.0\ntotal\t1\t%lf\t6.000\t%*f\n"
           "peak_memory_mib\t%d\n%n",
           &duration, &rate, &total, &peak, &end);
    CHECK(end && !output[end], "--profile prints \"%s\"", output);
    CHECK(duration >= 0.004 && total >= duration && rate <= 1500 && peak >= 32, "--profile prints \"%s\"",
          output);
}

/* ---------------------------------------------------------------- UTF-16 */

/* As Python's bytes.decode("utf-16", errors="replace"). */
static void test_utf16(void) {
    static const struct {
        const char *bytes;
        size_t size;
        const char *expected; /* NULL: no byte order mark */
    } cases[] = {
        {"\xff\xfe" "a\0\xe9\0\x3e\xd8\x8a\xdd", 10, "a\xc3\xa9\xf0\x9f\xa6\x8a"},
        {"\xfe\xff\0a\0\xe9\xd8\x3e\xdd\x8a", 10, "a\xc3\xa9\xf0\x9f\xa6\x8a"},
        {"\xff\xfe\x3e\xd8" "a\0", 6, "\xef\xbf\xbd" "a"},             /* a high surrogate alone */
        {"\xff\xfe\x8a\xdd" "a\0", 6, "\xef\xbf\xbd" "a"},             /* a low surrogate alone */
        {"\xff\xfe\x3e\xd8\x3e\xd8\x8a\xdd", 8, "\xef\xbf\xbd\xf0\x9f\xa6\x8a"},
        {"\xff\xfe\x3e\xd8", 4, "\xef\xbf\xbd"},
        {"\xff\xfe" "a\0b", 5, "a\xef\xbf\xbd"},                       /* an odd byte at the end */
        {"\xff\xfe\xff\xfe" "a\0", 6, "\xef\xbb\xbf" "a"},             /* a second byte order mark is a character */
        {"\xff\xfe", 2, ""},
        {"\xff", 1, NULL},
        {"", 0, NULL},
        {"\xef\xbb\xbf" "a", 4, NULL},
        {"a\0b\0", 4, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text text = {0};
        bool marked = text_append_utf16(&text, (Bytes){(const uint8_t *)cases[i].bytes, cases[i].size});
        const char *expected = cases[i].expected;
        CHECK(marked == (expected != NULL), "UTF-16 case %zu is %s", i, marked ? "accepted" : "refused");
        CHECK(expected ? !strcmp((char *)text.data, expected) : !text.data, "UTF-16 case %zu gives \"%s\"", i,
              text.data ? (char *)text.data : "none");
        free(text.data);
    }
}

void test_util(void) {
    test_utf16();
    test_messages();
    test_deaths();
    test_memory();
    test_machine();
    test_input();
    test_commit();
    test_failures();
    test_profile();
}
