/* tap.c - named tensors out of the running program: --dump writes them, --check compares them.
 *
 * The stages hand over whatever the interface names; this file alone knows whether anybody listens. A name
 * is the scope ("step003.cond.") and what the stage adds ("block07"). A tensor is checked if the folder
 * holds a file of its name; files that no tensor of the run asked for are listed at the end.
 *
 * The measure is the largest difference over the largest magnitude of the reference: one small entry among
 * large ones may be off by much of itself, and that is rounding. The cosine beside it tells a wrong scale
 * from a wrong direction. Token ids have to be equal.
 *
 * The decoded video may be larger than memory, so tap_frame() takes it frame by frame: into its places in
 * the dump, and against its places in the mapped reference. */
#include "engine/engine.h"

#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

bool taps_on;

enum { MAX_NAME = 128 };

/* A line of the table; `why` is NULL if the tensor agrees. */
typedef struct {
    char *name, *why;
    Shape shape;
    bool measured; /* the numbers below are known */
    double absolute, relative, cosine;
    size_t worst; /* flat index */
} Row;

/* A comparison in progress. */
typedef struct {
    double absolute, magnitude, dot, actual_squares, expected_squares;
    size_t worst;
    const char *bad; /* whose number at `worst` is not finite; NULL if all are */
} Difference;

/* A tensor that arrives in frames; one at a time does. */
typedef struct {
    OutputFile file;
    Npy reference;
    Difference difference;
    int row; /* its place in the table, -1 if it is not checked */
} Stream;

static struct {
    const char *dump_dir, *only, *check_dir;
    double tolerance;
    char scope[MAX_NAME];
    int dumped;
    char **files; /* of check_dir, without .npy */
    bool *compared;
    int file_count;
    Row *rows;
    int row_count;
    Stream stream;
} taps;

/* ---------------------------------------------------------------- folders */

static int compare_strings(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The names of the .npy files in the folder, sorted. */
static void list_files(const char *dir) {
    DIR *folder = opendir(dir);
    if (!folder) die(STATUS_USAGE, "--check %s: %s", dir, strerror(errno));
    for (struct dirent *entry; (entry = readdir(folder));) {
        size_t length = strlen(entry->d_name);
        if (length <= 4 || strcmp(entry->d_name + length - 4, ".npy")) continue;
        taps.files = reallocate(taps.files, (size_t)(taps.file_count + 1) * sizeof *taps.files);
        taps.files[taps.file_count++] = format_string("%.*s", (int)length - 4, entry->d_name);
    }
    closedir(folder);
    if (!taps.file_count) die(STATUS_USAGE, "--check %s: the folder holds no .npy file", dir);
    qsort(taps.files, (size_t)taps.file_count, sizeof *taps.files, compare_strings);
    taps.compared = allocate((size_t)taps.file_count * sizeof *taps.compared);
}

static void make_folder(const char *dir) {
    struct stat status;
    if (mkdir(dir, 0777) && errno != EEXIST) die(STATUS_RESOURCE, "--dump %s: %s", dir, strerror(errno));
    if (stat(dir, &status) || !S_ISDIR(status.st_mode)) die(STATUS_USAGE, "--dump %s: not a folder", dir);
}

void taps_open(const char *dump_dir, const char *only_glob, const char *check_dir, double tolerance) {
    taps.dump_dir = dump_dir;
    taps.only = only_glob;
    taps.check_dir = check_dir;
    taps.tolerance = tolerance;
    taps_on = dump_dir || check_dir;
    if (dump_dir) make_folder(dump_dir);
    if (check_dir) list_files(check_dir);
    if (dump_dir && check_dir && same_file(dump_dir, check_dir))
        die(STATUS_USAGE, "--dump and --check name the same folder, %s", check_dir);
}

void tap_scope(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(taps.scope, sizeof taps.scope, format, arguments);
    va_end(arguments);
}

/* ---------------------------------------------------------------- --dump */

static bool dump_wants(const char *name) {
    return taps.dump_dir && (!taps.only || !fnmatch(taps.only, name, 0));
}

static OutputFile dump_open(const char *name, const Shape *shape, char kind) {
    char header[256], *path = format_string("%s/%s.npy", taps.dump_dir, name);
    OutputFile file = output_open(path);
    output_write(&file, header, npy_header(header, sizeof header, shape, kind));
    free(path);
    taps.dumped++;
    return file;
}

static void dump(const char *name, const void *values, const Shape *shape, char kind) {
    OutputFile file = dump_open(name, shape, kind);
    output_write(&file, values, 4 * shape_count(shape));
    output_commit(&file);
}

/* ---------------------------------------------------------------- --check */

static Row *row_add(const char *name, const Shape *shape) {
    taps.rows = reallocate(taps.rows, (size_t)(taps.row_count + 1) * sizeof *taps.rows);
    Row *row = &taps.rows[taps.row_count++];
    *row = (Row){.name = format_string("%s", name), .shape = *shape};
    return row;
}

/* Opens the reference of a tensor and begins its row; NULL if there is none to compare with, or it differs in
 * kind or shape, which the row then says. */
static Row *check_open(const char *name, const Shape *shape, char kind, Npy *reference) {
    int i = 0;
    while (i < taps.file_count && strcmp(taps.files[i], name)) i++;
    if (i == taps.file_count) return NULL;
    taps.compared[i] = true;
    Row *row = row_add(name, shape);
    char buffer[64], *path = format_string("%s/%s.npy", taps.check_dir, name);
    const char *why = npy_read(path, reference);
    free(path);
    if (why) row->why = format_string("the reference: %s", why);
    else if (reference->kind != kind)
        row->why = format_string("the reference holds %s", kind == 'i' ? "floats" : "integers");
    else if (!shape_equal(shape, &reference->shape))
        row->why = format_string("the reference has shape %s", shape_string(&reference->shape, buffer));
    if (row->why && !why) npy_free(reference);
    return row->why ? NULL : row;
}

/* Adds n elements, the first of which has flat index `first`. */
static void compare(Difference *d, const float *actual, const float *expected, size_t n, size_t first) {
    for (size_t i = 0; i < n && !d->bad; i++) {
        double a = actual[i], e = expected[i], absolute = fabs(a - e);
        if (!isfinite(a) || !isfinite(e)) d->bad = isfinite(a) ? "the reference's" : "this run's";
        if (absolute > d->absolute || d->bad) {
            d->absolute = absolute;
            d->worst = first + i;
        }
        d->magnitude = fmax(d->magnitude, fabs(e));
        d->dot += a * e;
        d->actual_squares += a * a;
        d->expected_squares += e * e;
    }
}

/* "[3, 0, 17]": the place of a flat index. */
static char *place_string(const Shape *shape, size_t flat, char buffer[64]) {
    Shape place = *shape;
    for (int i = shape->n; i-- > 0;) {
        size_t size = shape->d[i] ? (size_t)shape->d[i] : 1;
        place.d[i] = (int)(flat % size);
        flat /= size;
    }
    return shape_string(&place, buffer);
}

static void conclude(const Difference *d, Row *row) {
    char place[64];
    double norms = sqrt(d->actual_squares) * sqrt(d->expected_squares);
    row->worst = d->worst;
    row->measured = !d->bad;
    row->absolute = d->absolute;
    row->relative = d->absolute == 0 ? 0 : d->absolute / d->magnitude; /* infinite if all of it should be 0 */
    row->cosine = norms > 0 ? d->dot / norms : d->absolute == 0;
    if (d->bad)
        row->why = format_string("%s value at %s is no finite number", d->bad,
                                 place_string(&row->shape, row->worst, place));
    else if (row->relative > taps.tolerance)
        row->why = format_string("%.2e is beyond %g", row->relative, taps.tolerance);
}

static void check_floats(const char *name, const float *values, const Shape *shape) {
    Npy reference;
    Row *row = check_open(name, shape, 'f', &reference);
    if (!row) return;
    Difference difference = {0};
    compare(&difference, values, reference.values, shape_count(shape), 0);
    conclude(&difference, row);
    npy_free(&reference);
}

static void check_ids(const char *name, const int32_t *ids, const Shape *shape) {
    Npy reference;
    Row *row = check_open(name, shape, 'i', &reference);
    if (!row) return;
    const int32_t *expected = reference.values;
    size_t i = 0, n = shape_count(shape);
    while (i < n && ids[i] == expected[i]) i++;
    row->measured = i == n;
    row->cosine = 1;
    if (i < n)
        row->why = format_string("id %zu is %d, the reference has %d", i, (int)ids[i], (int)expected[i]);
    npy_free(&reference);
}

/* ---------------------------------------------------------------- taps */

static void scoped_name(char name[2 * MAX_NAME], const char *format, va_list arguments) {
    size_t scope = strlen(strcpy(name, taps.scope));
    vsnprintf(name + scope, 2 * MAX_NAME - scope, format, arguments);
}

void tap_floats(const float *values, Shape shape, const char *format, ...) {
    char name[2 * MAX_NAME];
    va_list arguments;
    va_start(arguments, format);
    scoped_name(name, format, arguments);
    va_end(arguments);
    if (dump_wants(name)) dump(name, values, &shape, 'f');
    if (taps.check_dir) check_floats(name, values, &shape);
}

void tap_ids(const int32_t *ids, int n, const char *format, ...) {
    if (!taps_on) return;
    char name[2 * MAX_NAME];
    va_list arguments;
    va_start(arguments, format);
    scoped_name(name, format, arguments);
    va_end(arguments);
    if (dump_wants(name)) dump(name, ids, &SHAPE(n), 'i');
    if (taps.check_dir) check_ids(name, ids, &SHAPE(n));
}

static void stream_open(Stream *stream, const char *name, const Shape *shape) {
    *stream = (Stream){.row = -1};
    if (dump_wants(name)) stream->file = dump_open(name, shape, 'f');
    Row *row = taps.check_dir ? check_open(name, shape, 'f', &stream->reference) : NULL;
    if (row) {
        stream->row = (int)(row - taps.rows);
        row->why = format_string("frames are missing");
    }
}

static void stream_close(Stream *stream) {
    if (stream->file.stream) output_commit(&stream->file);
    if (stream->row >= 0) {
        Row *row = &taps.rows[stream->row];
        free(row->why);
        row->why = NULL;
        conclude(&stream->difference, row);
        npy_free(&stream->reference);
    }
}

/* A frame's plane of channel c starts at element (c*F + index)*H*W of the whole. */
void tap_frame(const float *frame, Shape shape, int index, const char *name) {
    if (!taps_on) return;
    Stream *stream = &taps.stream;
    if (index == 0) stream_open(stream, name, &shape);
    size_t plane = (size_t)shape.d[2] * (size_t)shape.d[3];
    const float *expected = stream->reference.values;
    char header[256];
    size_t header_bytes = npy_header(header, sizeof header, &shape, 'f');
    for (int c = 0; c < shape.d[0]; c++) {
        size_t first = ((size_t)c * (size_t)shape.d[1] + (size_t)index) * plane;
        const float *values = frame + (size_t)c * plane;
        if (stream->file.stream) output_write_at(&stream->file, header_bytes + 4 * first, values, 4 * plane);
        if (stream->row >= 0)
            compare(&stream->difference, values, expected + first, plane, first);
    }
    if (index == shape.d[1] - 1) stream_close(stream);
}

/* ---------------------------------------------------------------- the report */

static void print_row(const Row *row) {
    char shape[64], place[64];
    fprintf(stderr, "%-26s %-19s ", row->name, shape_string(&row->shape, shape));
    if (row->measured)
        fprintf(stderr, "%-8.2e %-8.2e %11.8f  %-17s ", row->absolute, row->relative, row->cosine,
                place_string(&row->shape, row->worst, place));
    fprintf(stderr, "%s%s\n", row->why ? "FAILED: " : "ok", row->why ? row->why : "");
}

static int print_rows(void) {
    int failed = 0;
    fprintf(stderr, "%-26s %-19s %-8s %-8s %11s  %s\n", "tensor", "shape", "max abs", "relative", "cosine",
            "worst");
    for (int i = 0; i < taps.row_count; i++) {
        print_row(&taps.rows[i]);
        failed += taps.rows[i].why != NULL;
    }
    for (int i = 0; i < taps.file_count; i++)
        if (!taps.compared[i])
            fprintf(stderr, "%s\n",
                    reason("%-26s not compared: this run has no tensor of that name", taps.files[i]));
    return failed;
}

static const Row *first_failure(void) {
    for (int i = 0; i < taps.row_count; i++)
        if (taps.rows[i].why) return &taps.rows[i];
    return NULL;
}

bool taps_report(void) {
    if (taps.only && !taps.dumped) warn("--dump-only %s: no tensor has such a name", taps.only);
    if (!taps.check_dir) return true;
    int failed = print_rows();
    if (!taps.row_count) {
        fprintf(stderr, "check failed: no file in %s has the name of a tensor of this run\n", taps.check_dir);
        return false;
    }
    const Row *first = first_failure();
    if (first)
        fprintf(stderr, "check failed: %d of %d tensors, the first in order of data flow is %s (%s)\n",
                failed, taps.row_count, first->name, first->why);
    else if (taps.file_count > taps.row_count)
        fprintf(stderr, "check passed: %d tensors within %g, but %d more in %s were not compared\n",
                taps.row_count, taps.tolerance, taps.file_count - taps.row_count, taps.check_dir);
    else fprintf(stderr, "check passed: %d tensors within %g\n", taps.row_count, taps.tolerance);
    return !first;
}
