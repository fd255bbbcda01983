/* test_tap.c - tap.c: --dump writes tensors, --check finds and names each kind of difference, --feed replaces the
 * tensors. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A small run taps ids, a block's output, latents, and a video frame by frame. `fault` is the error that it makes. A
 * wrong block makes the latents wrong too. */
typedef enum { NOTHING, ID, BLOCK, NOT_A_NUMBER, SHAPED, FRAME_MISSING, FRAME, ALL_OTHER_NAMES, MORE_NAMES } Fault;

enum { CHANNELS = 3, FRAMES = 5, PLANE = 4 * 6, COUNT = CHANNELS * FRAMES * PLANE };

typedef struct {
    const char *dump, *only, *check;
    Fault fault;
    bool feed;
} Run;

static float value(size_t i) {
    return (float)sin((double)i);
}

static void tap_video(const Run *run) {
    Fault fault = run->fault;
    float frame[CHANNELS * PLANE];
    for (int f = 0; f < (fault == FRAME_MISSING ? FRAMES - 1 : FRAMES); f++) {
        for (int c = 0; c < CHANNELS; c++)
            for (int i = 0; i < PLANE; i++)
                frame[c * PLANE + i] = value((size_t)((c * FRAMES + f) * PLANE + i));
        if (fault == FRAME && f == 3) frame[PLANE + 7] += 0.5f;
        tap_frame(frame, SHAPE(CHANNELS, FRAMES, 4, 6), f, "video");
        if (run->feed && frame[PLANE + 7] != value((FRAMES + f) * PLANE + 7)) exit(STATUS_USAGE);
    }
}

static void run_small(void *argument) {
    const Run *run = argument;
    Fault fault = run->fault;
    float x[COUNT];
    for (size_t i = 0; i < COUNT; i++) x[i] = value(i);
    taps_open(run->dump, run->only, run->check, 1e-4, run->feed);
    if (fault == ALL_OTHER_NAMES) {
        tap(x, SHAPE(COUNT), "unknown");
        exit(!taps_report());
    }
    int32_t ids[4] = {1, 2, 3, fault == ID ? 5 : 4};
    int n = tap_ids(ids, 4, 4, 100, "prompt.ids");
    if (run->feed && (n != 4 || ids[3] != 4)) exit(STATUS_USAGE);
    if (fault == BLOCK) x[17] += 1e-3f;
    tap_scope("step%03d.%s.", 7, "cond");
    tap(x, SHAPE(CHANNELS, FRAMES, 4, 6), "block%02d", 3);
    for (int i = 4; i < 7 && fault == MORE_NAMES; i++) tap(x, SHAPE(COUNT), "block%02d", i);
    tap_scope("%s", "");
    if (fault == MORE_NAMES) tap(x, SHAPE(COUNT), "noise");
    if (fault == NOT_A_NUMBER) x[20] = NAN;
    tap(x, fault == SHAPED ? SHAPE(3, 100) : SHAPE(3, 120), "latents");
    if (run->feed && fault != SHAPED && x[20] != value(20)) exit(STATUS_USAGE);
    tap_video(run);
    exit(!taps_report());
}

/* ---------------------------------------------------------------- --dump */

static void test_dump(const char *folder) {
    char output[4096];
    CHECK(!run_apart(run_small, &(Run){.dump = folder}, output), "--dump fails: %s", output);
    char *path = format_string("%s/video.npy", folder);
    Npy video;
    const char *why = npy_read(path, &video);
    CHECK(!why && shape_equal(&video.shape, &SHAPE(CHANNELS, FRAMES, 4, 6)), "the dumped video: %s",
          why ? why : "another shape");
    bool right = !why;
    float *values = npy_floats(&video);
    for (size_t i = 0; i < COUNT && right; i++) right = values[i] == value(i);
    free(values);
    CHECK(right, "the frames of the dumped video are not in their places");
    npy_free(&video);
    free(path);
}

static bool exists(const char *folder, const char *name) {
    char *path = format_string("%s/%s.npy", folder, name);
    bool found = !access(path, F_OK);
    free(path);
    return found;
}

static void test_dump_only(void) {
    char output[4096], *folder = temporary_path("only");
    run_apart(run_small, &(Run){.dump = folder, .only = "*.block0?"}, output);
    CHECK(exists(folder, "step007.cond.block03"), "--dump-only leaves out what matches");
    CHECK(!exists(folder, "latents") && !exists(folder, "video") && !exists(folder, "prompt.ids"),
          "--dump-only writes what does not match");
    run_apart(run_small, &(Run){.dump = folder, .only = "block*"}, output);
    CHECK(strstr(output, "--dump-only block*: no tensor's name matches"), "no tensor: \"%s\"", output);
    free(folder);
}

/* ---------------------------------------------------------------- --check */

static void test_faults(const char *folder) {
    static const struct {
        Fault fault;
        const char *expected;
    } cases[] = {
        {ID, "of 4 tensors, the first in order of data flow is prompt.ids (id 3 is 5, the reference has 4)"},
        {BLOCK, "check failed: 2 of 4 tensors, the first in order of data flow is step007.cond.block03"},
        {NOT_A_NUMBER, "is latents (this run's value at [0, 20] is not finite)"},
        {SHAPED, "is latents (the reference: shape [3, 120], expected [3, 100])"},
        {FRAME_MISSING, "is video (frames are missing)"},
        {FRAME, "is video (relative difference 5.00e-01 exceeds 0.0001)"},
        {ALL_OTHER_NAMES, "no file in"},
    };
    char output[4096];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int status = run_apart(run_small, &(Run){.check = folder, .fault = cases[i].fault}, output);
        CHECK(status == STATUS_CHECK && strstr(output, cases[i].expected), "expected \"%s\": status %d,\n%s",
              cases[i].expected, status, output);
    }
}

/* With --feed the run must go on with the ids, latents and frames of the reference; run_small() checks this. */
static void test_feed(const char *folder) {
    static const struct {
        Fault fault;
        const char *expected;
    } cases[] = {
        {NOTHING, "check passed: 4 tensors"},
        {ID, "check failed: 1 of 4 tensors, the first in order of data flow is prompt.ids (id 3 is 5"},
        {BLOCK, "check failed: 1 of 4 tensors, the first in order of data flow is step007.cond.block03"},
        {NOT_A_NUMBER, "check failed: 1 of 4 tensors, the first in order of data flow is latents (this run's"},
        {SHAPED, "check failed: 1 of 4 tensors, the first in order of data flow is latents (the reference: shape"},
        {FRAME, "check failed: 1 of 4 tensors, the first in order of data flow is video"},
    };
    char output[4096];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Run run = {.check = folder, .fault = cases[i].fault, .feed = true};
        int status = run_apart(run_small, &run, output);
        CHECK(status == (cases[i].fault ? STATUS_CHECK : STATUS_OK) && strstr(output, cases[i].expected),
              "--feed, expected \"%s\": status %d,\n%s", cases[i].expected, status, output);
    }
}

/* Tensors without a reference are listed. Names that differ only in digits share a line. */
static void test_lacking(const char *folder) {
    char output[4096];
    int status = run_apart(run_small, &(Run){.check = folder, .fault = MORE_NAMES}, output);
    CHECK(status == STATUS_OK && strstr(output,
          "check passed: 4 tensors within 0.0001; 4 tensors of this run had no reference\n"),
          "tensors without reference: status %d,\n%s", status, output);
    CHECK(strstr(output, "\nnoise                      has no reference\n") &&
              strstr(output, "\nstep007.cond.block04       to step007.cond.block06: 3 without a reference\n"),
          "what has no reference is not listed:\n%s", output);
}

/* ---------------------------------------------------------------- references of other types */

typedef struct {
    const char *name;
    double scale, offset; /* the run's values are scale * reference + offset */
    bool feed, ids;
} Reference;

/* A run of one tensor [2,3,4]. Its reference in goldens/npy/types is (i - 11) / 4 if its type is a float, else i - 11.
 * */
static void run_other(void *argument) {
    const Reference *r = argument;
    bool fraction = strstr(r->name, "_f");
    float x[24], expected[24];
    for (int i = 0; i < 24; i++) {
        expected[i] = (float)(fraction ? (i - 11) / 4.0 : i - 11);
        x[i] = (float)(r->scale * expected[i] + r->offset);
    }
    taps_open(NULL, NULL, test_path("goldens/npy/types"), 1e-4, r->feed);
    tap(x, SHAPE(2, 3, 4), "%s", r->name);
    if (r->feed && memcmp(x, expected, sizeof x)) exit(STATUS_USAGE);
    exit(!taps_report());
}

static void test_types(void) {
    static const struct {
        Reference reference;
        const char *failure; /* NULL: it passes */
    } cases[] = {
        {{.name = "little_f2", .scale = 1}, NULL},
        {{.name = "big_f4", .scale = 1}, NULL},
        {{.name = "fortran_f8", .scale = 1}, NULL},
        {{.name = "fortran_i1", .scale = 1}, NULL},
        {{.name = "little_i8", .scale = 1}, NULL},
        {{.name = "fortran_f2", .scale = 1.0005}, NULL}, /* within the rounding of float16 */
        {{.name = "fortran_f4", .scale = 1.0005}, "exceeds 0.0001)"},
        {{.name = "fortran_f2", .scale = 1.001}, "exceeds 0.0001)"},
        {{.name = "little_f4", .scale = 0.5}, "exceeds 0.0001: the reference is 2 times this run's)"},
        {{.name = "little_f4", .scale = 2, .offset = 4},
         "exceeds 0.0001: the reference is 0.5 times this run's, minus 2)"},
        {{.name = "little_i4", .scale = 1, .offset = 0.25}, "exceeds 0.0001"},
        {{.name = "little_f2", .scale = 3, .feed = true}, "exceeds 0.0001"},
        {{.name = "fortran_i2", .scale = 3, .feed = true}, "exceeds 0.0001"},
    };
    char output[4096];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *name = cases[i].reference.name, *failure = cases[i].failure;
        int status = run_apart(run_other, (void *)&cases[i].reference, output);
        CHECK(status == (failure ? STATUS_CHECK : STATUS_OK) && strstr(output, failure ? failure : "check passed: 1 "),
              "%s at %g: status %d,\n%s", name, cases[i].reference.scale, status, output);
    }
}

/* The file NAME.npy of `count` float16 numbers: one is 0x3c00, infinity 0x7c00, NaN 0x7e00. */
static void write_halves(const char *folder, const char *name, const uint16_t *halves, int count) {
    char *path = format_string("%s/%s.npy", folder, name);
    char *text = format_string("{'descr': '<f2', 'fortran_order': False, 'shape': (%d,)}", count);
    OutputFile file = output_open(path);
    output_write(&file, "\x93NUMPY\1", 8);
    output_write(&file, &(uint16_t){(uint16_t)strlen(text)}, 2);
    output_write(&file, text, strlen(text));
    output_write(&file, halves, 2 * (size_t)count);
    output_commit(&file);
    free(text);
    free(path);
}

/* Values of the reference that are not finite are not copied by --feed. */
static void run_unfinished(void *folder) {
    float x[4] = {1, 2, 3, 4};
    taps_open(NULL, NULL, folder, 1e-4, true);
    tap(x, SHAPE(4), "x");
    if (x[0] != 1 || x[1] != 2 || x[2] != 1 || x[3] != 4) exit(STATUS_USAGE);
    exit(!taps_report());
}

static void run_zeros(void *folder) {
    taps_open(NULL, NULL, folder, 1e-4, false);
    tap(((float[]){0, 1, 0, 0}), SHAPE(4), "x");
    exit(!taps_report());
}

/* --feed of a reference with more ids: accepted if it ends with </s>, refused if it is padded. */
static void run_longer_ids(void *folder) {
    int32_t ids[8] = {5, 6, 1};
    taps_open(NULL, NULL, folder, 1e-4, true);
    int trimmed = tap_ids(ids, 3, 8, 100, "trimmed.ids");
    if (trimmed != 4 || ids[0] != 7 || ids[2] != 9 || ids[3] != 1) exit(STATUS_USAGE);
    ids[0] = 5, ids[1] = 6, ids[2] = 1;
    int padded = tap_ids(ids, 3, 8, 100, "padded.ids"), long_ones = tap_ids(ids, 3, 3, 100, "trimmed.ids");
    int unknown = tap_ids(ids, 3, 8, 8, "trimmed.ids");
    if (padded != 3 || long_ones != 3 || unknown != 3 || ids[0] != 5 || ids[1] != 6 || ids[2] != 1) exit(STATUS_USAGE);
    exit(!taps_report());
}

static void test_unusual_feeds(void) {
    char output[4096], *folder = temporary_path("halves");
    run_apart(run_small, &(Run){.dump = folder}, output); /* makes the folder */
    write_halves(folder, "x", (uint16_t[]){0x7c00, 0x7e00, 0x3c00, 0x7c00}, 4);
    int status = run_apart(run_unfinished, folder, output);
    CHECK(status == STATUS_CHECK && strstr(output, "(the reference's value at [0] is not finite)"),
          "infinite references: status %d,\n%s", status, output);
    write_halves(folder, "x", (uint16_t[4]){0}, 4);
    status = run_apart(run_zeros, folder, output);
    CHECK(status == STATUS_CHECK && strstr(output, "(the reference is 0 everywhere)"), "zeros: status %d,\n%s", status,
          output);
    write_halves(folder, "trimmed.ids", (uint16_t[]){0x4700, 0x4800, 0x4880, 0x3c00}, 4);
    write_halves(folder, "padded.ids", (uint16_t[]){0x4500, 0x4600, 0x3c00, 0, 0}, 5);
    status = run_apart(run_longer_ids, folder, output);
    CHECK(status == STATUS_CHECK && strstr(output, "shape [5], expected [3]: it has more rows"),
          "padded ids: status %d,\n%s", status, output);
    CHECK(strstr(output, "FAILED: 3 ids, the reference has 4\n"), "ids of another number:\n%s", output);
    free(folder);
}

/* ---------------------------------------------------------------- the table */

/* The columns: name, shape, largest difference, relative difference, cosine, index of the worst element. */
static void test_row(const char *folder) {
    char output[4096];
    run_apart(run_small, &(Run){.check = folder, .fault = FRAME}, output);
    const char *row = strstr(output, "\nvideo ");
    double absolute = 0, relative = 0, cosine = 0;
    int end = 0;
    if (row)
        sscanf(row, " video [3, 5, 4, 6] %lf %lf %lf [1, 3, 1, 1] FAILED:%n", &absolute, &relative, &cosine,
               &end);
    CHECK(end, "the row of the video is not as expected:\n%s", output);
    double largest = 0, squares = 0, dot = 0;
    for (size_t i = 0; i < COUNT; i++) {
        largest = fmax(largest, fabs((double)value(i)));
        squares += (double)value(i) * value(i);
    }
    size_t changed = (1 * FRAMES + 3) * PLANE + 7;
    dot = squares + 0.5 * value(changed);
    double other = squares + 2 * 0.5 * value(changed) + 0.25;
    CHECK(fabs(absolute - 0.5) < 0.005 && fabs(relative - 0.5 / largest) < 0.005, "errors %g, %g", absolute,
          relative);
    CHECK(fabs(cosine - dot / sqrt(squares * other)) < 1e-7, "cosine %.9f, expected %.9f", cosine,
          dot / sqrt(squares * other));
}

static void test_check(const char *folder) {
    char output[4096], *extra = format_string("%s/reencoded.npy", folder);
    int status = run_apart(run_small, &(Run){.check = folder}, output);
    CHECK(status == STATUS_OK && strstr(output, "check passed: 4 tensors"), "equal runs: status %d,\n%s",
          status, output);
    CHECK(!strstr(output, "not compared"), "a file seems to be left over:\n%s", output);
    OutputFile file = output_open(extra);
    output_write(&file, "not .npy", 8);
    output_commit(&file);
    status = run_apart(run_small, &(Run){.check = folder}, output);
    CHECK(status == STATUS_OK && strstr(output, "reencoded                  not compared"),
          "a file of another name: status %d,\n%s", status, output);
    remove(extra);
    free(extra);
}

static void test_damaged(const char *folder) {
    char output[4096], *path = format_string("%s/latents.npy", folder);
    CHECK(!truncate(path, 200), "latents.npy could not be cut off");
    int status = run_apart(run_small, &(Run){.check = folder}, output);
    CHECK(status == STATUS_CHECK && strstr(output, "the reference: the file holds 72 bytes of values, expected 1440"),
          "a damaged reference: status %d,\n%s", status, output);
    free(path);
}

static void test_folders(const char *folder) {
    char output[4096], *missing = temporary_path("nowhere"), *below = temporary_path("nowhere/below");
    int status = run_apart(run_small, &(Run){.check = missing}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "No such file"), "--check without folder: %d, %s", status,
          output);
    status = run_apart(run_small, &(Run){.check = "/dev"}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "contains no .npy"),
          "--check of a folder without arrays: %d, %s", status,
          output);
    status = run_apart(run_small, &(Run){.check = "Makefile"}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "--check Makefile: Not a directory"), "--check of a file: %d, %s",
          status, output);
    status = run_apart(run_small, &(Run){.dump = below}, output);
    CHECK(status == STATUS_RESOURCE && strstr(output, "--dump "), "--dump nowhere: %d, %s", status, output);
    status = run_apart(run_small, &(Run){.dump = "/dev/null"}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "not a folder"), "--dump to a file: %d, %s", status,
          output);
    status = run_apart(run_small, &(Run){.dump = folder, .check = folder}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "the same folder"), "one folder twice: %d, %s", status,
          output);
    free(missing);
    free(below);
}

void test_tap(void) {
    char *folder = temporary_path("dump");
    test_dump(folder);
    test_dump_only();
    test_check(folder);
    test_faults(folder);
    test_feed(folder);
    test_lacking(folder);
    test_types();
    test_unusual_feeds();
    test_row(folder);
    test_folders(folder);
    test_damaged(folder);
    free(folder);
}
