/* test_tap.c - tap.c: what --dump writes, --check compares; each kind of difference is found and named. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A run in small: ids, a block's output, latents, and a video that comes frame by frame. `fault` is what goes
 * wrong on the way. */
typedef enum { NOTHING, ID, BLOCK, NOT_A_NUMBER, SHAPED, FRAME_MISSING, FRAME, ALL_OTHER_NAMES } Fault;

enum { CHANNELS = 3, FRAMES = 5, PLANE = 4 * 6, COUNT = CHANNELS * FRAMES * PLANE };

typedef struct {
    const char *dump, *only, *check;
    Fault fault;
} Run;

static float value(size_t i) {
    return (float)sin((double)i);
}

static void tap_video(Fault fault) {
    float frame[CHANNELS * PLANE];
    for (int f = 0; f < (fault == FRAME_MISSING ? FRAMES - 1 : FRAMES); f++) {
        for (int c = 0; c < CHANNELS; c++)
            for (int i = 0; i < PLANE; i++)
                frame[c * PLANE + i] = value((size_t)((c * FRAMES + f) * PLANE + i));
        if (fault == FRAME && f == 3) frame[PLANE + 7] += 0.5f;
        tap_frame(frame, SHAPE(CHANNELS, FRAMES, 4, 6), f, "video");
    }
}

static void run_small(void *argument) {
    const Run *run = argument;
    Fault fault = run->fault;
    float x[COUNT];
    for (size_t i = 0; i < COUNT; i++) x[i] = value(i);
    taps_open(run->dump, run->only, run->check, 1e-4);
    if (fault == ALL_OTHER_NAMES) {
        tap(x, SHAPE(COUNT), "unknown");
        exit(!taps_report());
    }
    int32_t ids[4] = {1, 2, 3, fault == ID ? 5 : 4};
    tap_ids(ids, 4, "prompt.ids");
    if (fault == BLOCK) x[17] += 1e-3f;
    tap_scope("step%03d.%s.", 7, "cond");
    tap(x, SHAPE(CHANNELS, FRAMES, 4, 6), "block%02d", 3);
    tap_scope("%s", "");
    if (fault == BLOCK) x[18] += 1; /* what follows from the first difference */
    if (fault == NOT_A_NUMBER) x[20] = NAN;
    tap(x, fault == SHAPED ? SHAPE(3, 100) : SHAPE(3, 120), "latents");
    tap_video(fault);
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
    for (size_t i = 0; i < COUNT && right; i++) right = ((const float *)video.values)[i] == value(i);
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
    CHECK(strstr(output, "--dump-only block*: no tensor has such a name"), "no tensor: \"%s\"", output);
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
        {NOT_A_NUMBER, "is latents (this run's value at [0, 20] is no finite number)"},
        {SHAPED, "is latents (the reference has shape [3, 120])"},
        {FRAME_MISSING, "is video (frames are missing)"},
        {FRAME, "is video (5.00e-01 is beyond 0.0001)"},
        {ALL_OTHER_NAMES, "no file in"},
    };
    char output[4096];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int status = run_apart(run_small, &(Run){.check = folder, .fault = cases[i].fault}, output);
        CHECK(status == STATUS_CHECK && strstr(output, cases[i].expected), "expected \"%s\": status %d,\n%s",
              cases[i].expected, status, output);
    }
}

/* Name, shape, largest difference, relative, cosine and the index of the worst. */
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
    CHECK(status == STATUS_CHECK && strstr(output, "the reference: 72 bytes of values, expected 1440"),
          "a damaged reference: status %d,\n%s", status, output);
    free(path);
}

static void test_folders(const char *folder) {
    char output[4096], *missing = temporary_path("nowhere"), *below = temporary_path("nowhere/below");
    int status = run_apart(run_small, &(Run){.check = missing}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "No such file"), "--check without folder: %d, %s", status,
          output);
    status = run_apart(run_small, &(Run){.check = "/dev"}, output);
    CHECK(status == STATUS_USAGE && strstr(output, "holds no .npy"), "--check of no arrays: %d, %s", status,
          output);
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
    test_row(folder);
    test_folders(folder);
    test_damaged(folder);
    free(folder);
}
