/* tap.c - taps: named tensors of the running program. --dump writes them to files, --check compares them with reference
 * files, --feed replaces them by the reference.
 *
 * Each stage calls tap() with the tensors that it computes. A name is the scope ("step003.cond.") plus the stage's own
 * name ("block07"). A tensor is compared if the folder of --check holds NAME.npy. The report lists the files that no
 * tensor matched and the tensors that have no file.
 *
 *   relative = max |run - reference| / max |reference|      must not exceed the tolerance
 *   cosine   = run . reference / (|run| |reference|)        1 with a large `relative`: only the scale is wrong
 *
 * The difference is relative to the whole tensor, not to each element: a small element among large ones may have a
 * large relative rounding error. For a float16 reference, the rounding to float16 (2^-11 of an element) is subtracted
 * from each difference. Token ids must be equal.
 *
 * With --feed, a tensor is overwritten by its reference after the comparison. So each stage gets the inputs that the
 * reference's stage had, and the error of one stage does not add to the next one's. A stage must therefore read a
 * tensor from the memory that it tapped, after the tap. A sampler's history of earlier steps has no name and is not
 * replaced; the run computes it from replaced tensors.
 *
 * The decoded video may be larger than memory. tap_frame() takes one frame at a time, and writes or compares it at its
 * place in the file. */
#include "engine/engine.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

bool taps_on;

enum { MAX_NAME = 128, PART = 1024 /* elements compared at a time */ };

/* A line of --check's table. `why` is the reason for a failure, or NULL. */
typedef struct {
    char *name, *why;
    Shape shape;
    bool measured; /* whether the numbers below are set */
    double absolute, relative, cosine;
    size_t worst; /* flat index */
} Row;

/* A comparison in progress. */
typedef struct {
    double rounding; /* relative rounding error of a float16 reference; 0 for other types */
    double absolute, magnitude, dot, actual_squares, expected_squares, actual_sum, expected_sum;
    size_t count, worst;
    const char *bad; /* "this run's" or "the reference's": whose value at `worst` is not finite; NULL: none */
} Difference;

/* A group of tensors without a reference whose names differ only in digits: block00 to block29. */
typedef struct {
    char *first, *last;
    int count;
} Lack;

/* A tensor that arrives frame by frame. */
typedef struct {
    char *name; /* NULL: free */
    OutputFile file;
    Npy reference;
    Difference difference;
    int row; /* index in taps.rows; -1 if it is not compared */
} Stream;

static struct {
    const char *dump_dir, *only, *check_dir;
    double tolerance;
    bool feed;
    char scope[MAX_NAME];
    int dumped;
    char **files; /* names of the .npy files in check_dir, without .npy */
    bool *compared;
    int file_count;
    Row *rows;
    int row_count;
    Lack *lacks;
    int lack_count;
    Stream streams[4];
} taps;

/* ---------------------------------------------------------------- folders */

static int compare_strings(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Sets taps.files, sorted. */
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
    if (!taps.file_count) die(STATUS_USAGE, "--check %s: the folder contains no .npy file", dir);
    qsort(taps.files, (size_t)taps.file_count, sizeof *taps.files, compare_strings);
    taps.compared = allocate((size_t)taps.file_count * sizeof *taps.compared);
}

static void make_folder(const char *dir) {
    struct stat status;
    if (mkdir(dir, 0777) && errno != EEXIST) die(STATUS_RESOURCE, "--dump %s: %s", dir, strerror(errno));
    if (stat(dir, &status) || !S_ISDIR(status.st_mode)) die(STATUS_USAGE, "--dump %s: not a folder", dir);
}

void taps_open(const char *dump_dir, const char *only_glob, const char *check_dir, double tolerance, bool feed) {
    taps.dump_dir = dump_dir;
    taps.only = only_glob;
    taps.check_dir = check_dir;
    taps.tolerance = tolerance;
    taps.feed = feed;
    taps.dumped = 0;
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

/* ---------------------------------------------------------------- --check and --feed */

static Row *row_add(const char *name, const Shape *shape) {
    taps.rows = reallocate(taps.rows, (size_t)(taps.row_count + 1) * sizeof *taps.rows);
    Row *row = &taps.rows[taps.row_count++];
    *row = (Row){.name = format_string("%s", name), .shape = *shape};
    return row;
}

static bool same_but_for_digits(const char *a, const char *b) {
    while (*a && (*a == *b || (isdigit((unsigned char)*a) && isdigit((unsigned char)*b)))) a++, b++;
    return *a == *b;
}

static void note_lack(const char *name) {
    int i = 0;
    while (i < taps.lack_count && !same_but_for_digits(taps.lacks[i].first, name)) i++;
    if (i == taps.lack_count) {
        taps.lacks = reallocate(taps.lacks, (size_t)++taps.lack_count * sizeof *taps.lacks);
        taps.lacks[i] = (Lack){.first = format_string("%s", name)};
    }
    free(taps.lacks[i].last);
    taps.lacks[i].last = format_string("%s", name);
    taps.lacks[i].count++;
}

/* Opens the reference of a tensor and adds its row; returns NULL if there is no reference. If the two cannot be
 * compared, row->why is set. The caller frees *reference. */
static Row *check_open(const char *name, const Shape *shape, Npy *reference) {
    int i = 0;
    while (i < taps.file_count && strcmp(taps.files[i], name)) i++;
    *reference = (Npy){0};
    if (i == taps.file_count) {
        note_lack(name);
        return NULL;
    }
    taps.compared[i] = true;
    Row *row = row_add(name, shape);
    char *path = format_string("%s/%s.npy", taps.check_dir, name);
    const char *why = npy_read(path, reference);
    if (!why) why = npy_fit(reference, shape);
    if (why) row->why = format_string("the reference: %s", why);
    free(path);
    return row;
}

/* Adds n elements to the comparison; the first has flat index `first`. */
static void compare(Difference *d, const float *actual, const double *expected, size_t n, size_t first) {
    for (size_t i = 0; i < n && !d->bad; i++) {
        double a = actual[i], e = expected[i], absolute = fmax(fabs(a - e) - d->rounding * fabs(e), 0);
        if (!isfinite(a) || !isfinite(e)) d->bad = isfinite(a) ? "the reference's" : "this run's";
        if (absolute > d->absolute || d->bad) {
            d->absolute = absolute;
            d->worst = first + i;
        }
        d->magnitude = fmax(d->magnitude, fabs(e));
        d->dot += a * e;
        d->actual_squares += a * a;
        d->expected_squares += e * e;
        d->actual_sum += a;
        d->expected_sum += e;
    }
    d->count += n;
}

/* --feed. A value of the reference that is not finite is not copied. */
static void feed(float *values, const double *expected, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (isfinite((float)expected[i])) values[i] = (float)expected[i];
}

/* Compares n elements of a tensor with their reference; the first has flat index `first`. */
static void check_part(Difference *d, float *values, const Npy *reference, size_t n, size_t first) {
    double expected[PART];
    for (size_t done = 0, part; done < n; done += part) {
        part = n - done < PART ? n - done : PART;
        npy_get(reference, first + done, part, expected);
        compare(d, values + done, expected, part, first + done);
        if (taps.feed) feed(values + done, expected, part);
    }
}

/* The indices of a flat index: "[3, 0, 17]". */
static char *place_string(const Shape *shape, size_t flat, char buffer[64]) {
    Shape place = *shape;
    for (int i = shape->n; i-- > 0;) {
        size_t size = shape->d[i] ? (size_t)shape->d[i] : 1;
        place.d[i] = (int)(flat % size);
        flat /= size;
    }
    return shape_string(&place, buffer);
}

static Difference difference_from(const Npy *reference) {
    return (Difference){.rounding = reference->kind == 'f' && reference->width == 2 ? 0x1p-11 : 0};
}

/* Fits reference = slope * run + offset by least squares. If it fits well, as for pixels in [0,1] instead of [-1,1],
 * returns a text for the message; else "". A new string. */
static char *linear_relation(const Difference *d) {
    double n = (double)d->count, covariance = d->dot - d->actual_sum * d->expected_sum / n;
    double actual = d->actual_squares - d->actual_sum * d->actual_sum / n;
    double expected = d->expected_squares - d->expected_sum * d->expected_sum / n;
    double slope = covariance / actual, offset = (d->expected_sum - slope * d->actual_sum) / n;
    bool scaled = fabs(slope - 1) > 0.01, shifted = fabs(offset) > 0.01 * d->magnitude;
    bool fits = d->count >= 16 && covariance * covariance > 0.9998 * actual * expected;
    if (!fits || !(scaled || shifted)) return format_string("%s", "");
    if (!shifted) return format_string(": the reference is %.4g times this run's", slope);
    return format_string(": the reference is %.4g times this run's, %s %.4g", slope, offset < 0 ? "minus" : "plus",
                         fabs(offset));
}

static void conclude(const Difference *d, Row *row) {
    char place[64];
    double norms = sqrt(d->actual_squares) * sqrt(d->expected_squares);
    row->worst = d->worst;
    row->measured = !d->bad;
    row->absolute = d->absolute;
    row->relative = d->absolute == 0 ? 0 : d->absolute / d->magnitude; /* infinite if the reference is all 0 */
    row->cosine = norms > 0 ? d->dot / norms : d->absolute == 0;
    if (!d->bad && row->relative <= taps.tolerance) return;
    char *relation = linear_relation(d);
    if (d->bad)
        row->why = format_string("%s value at %s is not finite", d->bad,
                                 place_string(&row->shape, row->worst, place));
    else if (isinf(row->relative)) row->why = format_string("the reference is 0 everywhere");
    else row->why = format_string("relative difference %.2e exceeds %g%s", row->relative, taps.tolerance, relation);
    free(relation);
}

static void check_floats(const char *name, float *values, const Shape *shape) {
    Npy reference;
    Row *row = check_open(name, shape, &reference);
    Difference difference = difference_from(&reference);
    if (row && !row->why) {
        check_part(&difference, values, &reference, shape_count(shape), 0);
        conclude(&difference, row);
    }
    npy_free(&reference);
}

/* Whether the reference ends with </s> as the run's ids do. If not, its ids are padded. */
static bool ends_alike(const int32_t *ids, int n, const double *expected, size_t count) {
    return count > 0 && expected[count - 1] == ids[n - 1];
}

/* --feed: replaces the run's n ids by the reference's, if they are valid ids. Returns the new number of ids. */
static int feed_ids(int32_t *ids, int n, int room, int vocabulary, const double *expected, size_t count) {
    bool fits = count <= (size_t)room && (count == (size_t)n || ends_alike(ids, n, expected, count));
    for (size_t i = 0; i < count && fits; i++)
        fits = expected[i] >= 0 && expected[i] < vocabulary && expected[i] == (int32_t)expected[i];
    for (size_t i = 0; i < count && fits; i++) ids[i] = (int32_t)expected[i];
    return fits ? (int)count : n;
}

static int check_ids(const char *name, int32_t *ids, int n, int room, int vocabulary) {
    Npy reference;
    Row *row = check_open(name, &SHAPE(n), &reference);
    size_t count = reference.data ? shape_count(&reference.shape) : 0, i = 0;
    double *expected = allocate(count * sizeof *expected);
    npy_get(&reference, 0, count, expected);
    if (row && !row->why) {
        while (i < count && ids[i] == expected[i]) i++;
        row->measured = i == count;
        row->cosine = 1;
        if (i < count)
            row->why = format_string("id %zu is %d, the reference has %.9g", i, (int)ids[i], expected[i]);
    } else if (row && ends_alike(ids, n, expected, count)) {
        free(row->why);
        row->why = format_string("%d ids, the reference has %zu", n, count);
    }
    if (taps.feed) n = feed_ids(ids, n, room, vocabulary, expected, count);
    free(expected);
    npy_free(&reference);
    return n;
}

/* ---------------------------------------------------------------- taps */

static void scoped_name(char name[2 * MAX_NAME], const char *format, va_list arguments) {
    size_t scope = strlen(strcpy(name, taps.scope));
    vsnprintf(name + scope, 2 * MAX_NAME - scope, format, arguments);
}

void tap_floats(float *values, Shape shape, const char *format, ...) {
    char name[2 * MAX_NAME];
    va_list arguments;
    va_start(arguments, format);
    scoped_name(name, format, arguments);
    va_end(arguments);
    if (dump_wants(name)) dump(name, values, &shape, 'f');
    if (taps.check_dir) check_floats(name, values, &shape);
}

/* Copies values (F,C,P) to clip (C,F,P); with `back`, clip to values. P is a plane, height * width. */
static void transpose_frames(float *clip, float *values, const Shape *shape, bool back) {
    size_t C = (size_t)shape->d[0], F = (size_t)shape->d[1], plane = (size_t)shape->d[2] * (size_t)shape->d[3];
    for (size_t c = 0; c < C; c++)
        for (size_t f = 0; f < F; f++) {
            float *outside = clip + (c * F + f) * plane, *inside = values + (f * C + c) * plane;
            if (back) memcpy(inside, outside, sizeof(float) * plane);
            else memcpy(outside, inside, sizeof(float) * plane);
        }
}

void tap_transposed(float *values, Shape shape, const char *format, ...) {
    char name[MAX_NAME];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    float *clip = allocate(sizeof(float) * shape_count(&shape));
    transpose_frames(clip, values, &shape, false);
    tap_floats(clip, shape, "%s", name);
    transpose_frames(clip, values, &shape, true); /* --feed may have changed clip */
    free(clip);
}

int tap_ids(int32_t *ids, int n, int room, int vocabulary, const char *format, ...) {
    if (!taps_on) return n;
    char name[2 * MAX_NAME];
    va_list arguments;
    va_start(arguments, format);
    scoped_name(name, format, arguments);
    va_end(arguments);
    if (dump_wants(name)) dump(name, ids, &SHAPE(n), 'i');
    return taps.check_dir ? check_ids(name, ids, n, room, vocabulary) : n;
}

static void stream_open(Stream *stream, const char *name, const Shape *shape) {
    *stream = (Stream){.name = format_string("%s", name), .row = -1};
    if (dump_wants(name)) stream->file = dump_open(name, shape, 'f');
    Row *row = taps.check_dir ? check_open(name, shape, &stream->reference) : NULL;
    if (row && !row->why) {
        stream->row = (int)(row - taps.rows);
        row->why = format_string("frames are missing");
        stream->difference = difference_from(&stream->reference);
    }
}

/* Moves the row to the end of the table: a tensor follows those that it was computed from. */
static void row_to_end(Stream *stream) {
    Row row = taps.rows[stream->row];
    int last = taps.row_count - 1;
    memmove(taps.rows + stream->row, taps.rows + stream->row + 1, sizeof row * (size_t)(last - stream->row));
    taps.rows[last] = row;
    for (size_t i = 0; i < sizeof taps.streams / sizeof *taps.streams; i++)
        taps.streams[i].row -= taps.streams[i].row > stream->row;
    stream->row = last;
}

static void stream_close(Stream *stream) {
    if (stream->file.stream) output_commit(&stream->file);
    if (stream->row >= 0) {
        row_to_end(stream);
        Row *row = &taps.rows[stream->row];
        free(row->why);
        row->why = NULL;
        conclude(&stream->difference, row);
    }
    npy_free(&stream->reference);
    free(stream->name);
    *stream = (Stream){0};
}

/* The stream of that name, or a free one. */
static Stream *find_stream(const char *name) {
    Stream *found = NULL;
    for (size_t i = 0; i < sizeof taps.streams / sizeof *taps.streams; i++) {
        Stream *stream = &taps.streams[i];
        if (stream->name && !strcmp(stream->name, name)) return stream;
        if (!stream->name) found = stream;
    }
    if (!found) die(STATUS_RESOURCE, "more than 4 tensors arrive frame by frame; no room for %s (a bug)", name);
    return found;
}

/* The plane of channel c in frame `index` starts at element (c*F + index)*H*W of the tensor. */
void tap_frame(float *frame, Shape shape, int index, const char *name) {
    if (!taps_on) return;
    Stream *stream = find_stream(name);
    if (index == 0) stream_open(stream, name, &shape);
    size_t plane = (size_t)shape.d[2] * (size_t)shape.d[3];
    char header[256];
    size_t header_bytes = npy_header(header, sizeof header, &shape, 'f');
    for (int c = 0; c < shape.d[0]; c++) {
        size_t first = ((size_t)c * (size_t)shape.d[1] + (size_t)index) * plane;
        float *values = frame + (size_t)c * plane;
        if (stream->file.stream) output_write_at(&stream->file, header_bytes + 4 * first, values, 4 * plane);
        if (stream->row >= 0) check_part(&stream->difference, values, &stream->reference, plane, first);
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

static void print_rows(void) {
    fprintf(stderr, "%-26s %-19s %-8s %-8s %11s  %s\n", "tensor", "shape", "max abs", "relative", "cosine",
            "worst");
    for (int i = 0; i < taps.row_count; i++) print_row(&taps.rows[i]);
}

/* Files without a tensor, and tensors without a file. */
static void print_unmatched(void) {
    for (int i = 0; i < taps.file_count; i++)
        if (!taps.compared[i])
            fprintf(stderr, "%s\n",
                    reason("%-26s not compared: this run has no tensor of that name", taps.files[i]));
    for (int i = 0; i < taps.lack_count; i++) {
        const Lack *lack = &taps.lacks[i];
        if (lack->count == 1) fprintf(stderr, "%-26s has no reference\n", lack->first);
        else fprintf(stderr, "%-26s to %s: %d without a reference\n", lack->first, lack->last, lack->count);
    }
}

static int count_failures(const Row **first) {
    int failed = 0;
    *first = NULL;
    for (int i = 0; i < taps.row_count; i++) {
        if (!taps.rows[i].why) continue;
        if (!failed++) *first = &taps.rows[i];
    }
    return failed;
}

bool taps_report(void) {
    if (taps.only && !taps.dumped) warn("--dump-only %s: no tensor's name matches", taps.only);
    if (!taps.check_dir) return true;
    print_rows();
    print_unmatched();
    const Row *first;
    int failed = count_failures(&first), left = taps.file_count - taps.row_count, lacking = 0;
    for (int i = 0; i < taps.lack_count; i++) lacking += taps.lacks[i].count;
    if (first)
        fprintf(stderr, "check failed: %d of %d tensors, the first in order of data flow is %s (%s)",
                failed, taps.row_count, first->name, first->why);
    else if (taps.row_count)
        fprintf(stderr, "check passed: %d tensors within %g", taps.row_count, taps.tolerance);
    else fprintf(stderr, "check failed: no file in %s is named after a tensor of this run", taps.check_dir);
    if (taps.row_count && left) fprintf(stderr, "; %d more files in %s were not compared", left, taps.check_dir);
    if (lacking > 0) fprintf(stderr, "; %d tensors of this run had no reference", lacking);
    fputc('\n', stderr);
    return taps.row_count && !first;
}
