/* npy.c - reads and writes arrays in numpy's .npy format (numpy/lib/format.py).
 *
 *   "\x93NUMPY"  u8 major  u8 minor  u16 (u32 from version 2 on) length of the header
 *   header:  {'descr': '<f4', 'fortran_order': False, 'shape': (16, 2, 4, 6), }  spaces, "\n"
 *   the values
 *
 * It reads every type that numpy writes as plain numbers: floats of 2, 4 and 8 bytes, signed and unsigned integers of
 * 1 to 8 bytes, booleans; little or big endian; in C order (the last index varies fastest) or Fortran order (the first
 * does). The values stay in the mapped file, so a clip larger than memory can be compared. npy_get() converts some of
 * them at a time to doubles; this is exact except for integers beyond 2^53.
 *
 * The header is a Python dictionary literal. The parser accepts the one above, its keys in any order, with single or
 * double quotes. numpy and the libraries of other languages write nothing else.
 *
 * It writes little-endian f4 and i4 in C order. */
#include "engine/engine.h"

#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- shapes */

size_t shape_count(const Shape *shape) {
    size_t count = 1;
    for (int i = 0; i < shape->n; i++) count *= (size_t)shape->d[i];
    return count;
}

bool shape_equal(const Shape *a, const Shape *b) {
    return a->n == b->n && !memcmp(a->d, b->d, (size_t)a->n * sizeof *a->d);
}

char *shape_string(const Shape *shape, char buffer[64]) {
    int at = snprintf(buffer, 64, "[");
    for (int i = 0; i < shape->n; i++)
        at += snprintf(buffer + at, 64 - (size_t)at, "%s%d", i ? ", " : "", shape->d[i]);
    snprintf(buffer + at, 64 - (size_t)at, "]");
    return buffer;
}

/* ---------------------------------------------------------------- the header's dictionary */

typedef struct {
    const char *at, *end;
} Cursor;

enum { MAX_WORD = 24 }; /* bytes of the longest string that can be valid, with its 0 */

typedef struct {
    char descr[MAX_WORD];
    bool fortran_order, seen_descr, seen_order, seen_shape;
    Shape shape;
} Header;

static void skip_spaces(Cursor *text) {
    while (text->at < text->end && memchr(" \t\r\n", *text->at, 4)) text->at++;
}

/* Skips spaces, then `word` if it comes next; false if it does not. */
static bool accept(Cursor *text, const char *word) {
    size_t length = strlen(word);
    skip_spaces(text);
    if ((size_t)(text->end - text->at) < length || memcmp(text->at, word, length)) return false;
    text->at += length;
    return true;
}

/* Reads a string in single or double quotes; false if there is none or it is too long. */
static bool accept_string(Cursor *text, char out[MAX_WORD]) {
    const char *quote = accept(text, "'") ? "'" : "\"";
    if (*quote == '"' && !accept(text, quote)) return false;
    size_t n = 0;
    for (; text->at < text->end && *text->at != *quote && n < MAX_WORD - 1; text->at++) out[n++] = *text->at;
    out[n] = 0;
    if (text->at == text->end || *text->at != *quote) return false;
    text->at++;
    return true;
}

/* Reads a size: digits, and an L that Python 2 may have added. */
static bool accept_size(Cursor *text, int *out) {
    int64_t value = 0;
    skip_spaces(text);
    const char *start = text->at;
    for (; text->at < text->end && *text->at >= '0' && *text->at <= '9' && value <= INT_MAX; text->at++)
        value = 10 * value + (*text->at - '0');
    *out = (int)value;
    bool found = text->at > start && value <= INT_MAX;
    if (found && text->at < text->end && *text->at == 'L') text->at++;
    return found;
}

static const char *parse_descr(Cursor *text, Header *header) {
    header->seen_descr = true;
    if (accept_string(text, header->descr)) return NULL;
    return accept(text, "[") ? "the values are of a structured type, expected plain numbers"
                             : "the header's descr is not a string such as '<f4'";
}

static const char *parse_order(Cursor *text, Header *header) {
    header->seen_order = true;
    header->fortran_order = accept(text, "True");
    return header->fortran_order || accept(text, "False") ? NULL : "the header's fortran_order is not True or False";
}

/* A shape of more than MAX_DIMS sizes loses a leading 1, a batch axis that npy_fit() would remove. */
static bool add_size(Shape *shape, int size) {
    if (shape->n == MAX_DIMS && shape->d[0] == 1) {
        memmove(shape->d, shape->d + 1, (MAX_DIMS - 1) * sizeof *shape->d);
        shape->n--;
    }
    if (shape->n == MAX_DIMS) return false;
    shape->d[shape->n++] = size;
    return true;
}

static const char *parse_shape(Cursor *text, Header *header) {
    int size;
    header->seen_shape = true;
    header->shape.n = 0;
    if (!accept(text, "(")) return "the header's shape is not a tuple";
    while (!accept(text, ")")) {
        if (!accept_size(text, &size)) return "the header's shape is not a tuple of sizes";
        if (!add_size(&header->shape, size)) return "the array has more than 5 dimensions";
        if (!accept(text, ",") && (text->at == text->end || *text->at != ')'))
            return "the header's shape is not a tuple of sizes";
    }
    return NULL;
}

/* Parses one "key: value" of the dictionary. */
static const char *parse_item(Cursor *text, Header *header) {
    char key[MAX_WORD];
    if (!accept_string(text, key) || !accept(text, ":")) return "the header is not a dictionary";
    if (!strcmp(key, "descr")) return parse_descr(text, header);
    if (!strcmp(key, "fortran_order")) return parse_order(text, header);
    if (!strcmp(key, "shape")) return parse_shape(text, header);
    return reason("the header has an unknown key, '%s'", key);
}

static const char *parse_header(Cursor text, Header *header) {
    const char *why = NULL;
    if (!accept(&text, "{")) return "the header is not a dictionary";
    while (!why && !accept(&text, "}")) {
        why = parse_item(&text, header);
        if (!why && !accept(&text, ",") && (text.at == text.end || *text.at != '}'))
            why = "the header is not a dictionary";
    }
    skip_spaces(&text);
    if (!why && text.at != text.end) why = "the header has text after its dictionary";
    if (!why && !(header->seen_descr && header->seen_order && header->seen_shape))
        why = "the header lacks descr, fortran_order or shape";
    return why;
}

/* ---------------------------------------------------------------- values */

/* Parses "<f4": byte order, kind, bytes. */
static const char *parse_type(const char *descr, Npy *out) {
    static const char *const known[] = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"};
    bool ordered = *descr && strchr("<>=|", *descr);
    for (size_t i = 0; ordered && i < sizeof known / sizeof *known; i++) {
        if (strcmp(descr + 1, known[i])) continue;
        *out = (Npy){.kind = known[i][0], .width = known[i][1] - '0', .big_endian = *descr == '>'};
        return NULL;
    }
    const char *what = !ordered           ? ""
                       : descr[1] == 'V' ? " (bfloat16? numpy does not name it in a file)"
                       : descr[1] == 'O' ? " (pickled objects)"
                       : descr[1] == 'c' ? " (complex numbers)"
                                         : "";
    return reason("the values are of type '%s'%s, expected floats of 2, 4 or 8 bytes, integers or booleans", descr,
                  what);
}

static const char *check_values(const Header *header, Bytes data, Npy *out) {
    const char *why = parse_type(header->descr, out);
    if (why) return why;
    uint64_t expected = (uint64_t)out->width;
    for (int i = 0; i < header->shape.n; i++) {
        uint64_t size = (uint64_t)header->shape.d[i];
        if (size && expected > SIZE_MAX / size) return "the shape has more bytes than 64 bits can count";
        expected *= size;
    }
    if (data.size != expected)
        return reason("the file holds %zu bytes of values, expected %" PRIu64 " for its shape", data.size, expected);
    out->shape = header->shape;
    out->fortran_order = header->fortran_order;
    out->data = data.data;
    return NULL;
}

const char *npy_parse(Bytes bytes, Npy *out) {
    *out = (Npy){0};
    const uint8_t *p = bytes.data;
    if (bytes.size >= 4 && !memcmp(p, "PK\3\4", 4)) return "this is an .npz archive: save each array with numpy.save";
    if (bytes.size < 12 || memcmp(p, "\x93NUMPY", 6)) return "this is not an .npy file";
    int major = p[6];
    if (major < 1 || major > 3) return reason(".npy version %d.%d, expected 1.0 to 3.0", major, p[7]);
    size_t start = major == 1 ? 10 : 12, length = p[8] | p[9] << 8;
    if (major > 1) length |= (size_t)p[10] << 16 | (size_t)p[11] << 24;
    if (length > bytes.size - start) return "the file ends inside its header";
    Header header = {0};
    const char *text = (const char *)p + start;
    const char *why = parse_header((Cursor){text, text + length}, &header);
    return why ? why : check_values(&header, (Bytes){p + start + length, bytes.size - start - length}, out);
}

const char *npy_read(const char *path, Npy *out) {
    Bytes bytes;
    *out = (Npy){0};
    const char *why = map_file(path, &bytes);
    if (why) return why;
    why = npy_parse(bytes, out);
    if (why) unmap_file(bytes);
    else out->mapping = bytes;
    return why;
}

void npy_free(Npy *array) {
    unmap_file(array->mapping);
    *array = (Npy){0};
}

/* The index in the file of the element with index `flat` in C order. */
static size_t place_of(const Npy *array, size_t flat) {
    size_t place = 0, size = shape_count(&array->shape);
    if (!array->fortran_order) return flat;
    for (int i = array->shape.n; i-- > 0; flat /= (size_t)array->shape.d[i]) {
        size /= (size_t)array->shape.d[i]; /* stride of index i in Fortran order */
        place += flat % (size_t)array->shape.d[i] * size;
    }
    return place;
}

static double float_of(uint64_t bits, int width) {
    float narrow;
    double wide;
    if (width == 2) convert_to_floats(&narrow, &(uint16_t){(uint16_t)bits}, TYPE_F16, 1);
    else memcpy(&narrow, &(uint32_t){(uint32_t)bits}, sizeof narrow);
    memcpy(&wide, &bits, sizeof wide);
    return width == 8 ? wide : (double)narrow;
}

static double element(const Npy *array, size_t place) {
    const uint8_t *p = array->data + place * (size_t)array->width;
    uint64_t bits = 0, sign = (uint64_t)1 << (8 * array->width - 1);
    for (int i = 0; i < array->width; i++)
        bits |= (uint64_t)p[array->big_endian ? array->width - 1 - i : i] << 8 * i;
    if (array->kind == 'f') return float_of(bits, array->width);
    return array->kind == 'i' ? (double)(int64_t)((bits ^ sign) - sign) : (double)bits;
}

void npy_get(const Npy *array, size_t first, size_t n, double *out) {
    for (size_t i = 0; i < n; i++) out[i] = element(array, place_of(array, first + i));
}

float *npy_floats(const Npy *array) {
    size_t count = shape_count(&array->shape);
    float *values = allocate(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = (float)element(array, place_of(array, i));
    return values;
}

/* ---------------------------------------------------------------- shapes that differ */

static int compare_sizes(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static bool same_sizes_in_another_order(Shape a, Shape b) {
    qsort(a.d, (size_t)a.n, sizeof *a.d, compare_sizes);
    qsort(b.d, (size_t)b.n, sizeof *b.d, compare_sizes);
    return shape_equal(&a, &b);
}

/* The shape without its first size. */
static Shape inner_shape(const Shape *shape) {
    Shape inner = {.n = shape->n - 1};
    memcpy(inner.d, shape->d + 1, (size_t)inner.n * sizeof *inner.d);
    return inner;
}

/* The likely cause of a wrong shape, as text to append to a message; "" if there is no guess. */
static const char *misfit(const Shape *found, const Shape *expected) {
    if (found->n == 0 || expected->n == 0) return "";
    Shape inner = inner_shape(found), rows = inner_shape(expected);
    if (shape_equal(&inner, expected)) return ": a batch, expected a single element of it";
    if (found->n == expected->n + 1 && found->d[0] == 1) return misfit(&inner, expected);
    if (shape_equal(&inner, &rows) && found->d[0] > expected->d[0])
        return ": it has more rows, perhaps padding; expected only the first";
    return same_sizes_in_another_order(*found, *expected) ? ": its axes are in another order" : "";
}

const char *npy_fit(Npy *array, const Shape *expected) {
    char found[64], wanted[64];
    Shape shape = array->shape;
    while (shape.n > expected->n && shape.d[0] == 1) shape = inner_shape(&shape);
    if (!shape_equal(&shape, expected))
        return reason("shape %s, expected %s%s", shape_string(&array->shape, found), shape_string(expected, wanted),
                      misfit(&array->shape, expected));
    array->shape = shape;
    return NULL;
}

const char *npy_finite(const Npy *array) {
    for (size_t i = 0, count = shape_count(&array->shape); i < count; i++) {
        double value;
        npy_get(array, i, 1, &value);
        if (!isfinite((float)value))
            return reason("value %zu of %zu is NaN or infinity, expected finite values", i + 1, count);
    }
    return NULL;
}

/* ---------------------------------------------------------------- writing */

/* As numpy does, it pads the first size to 21 digits, so that the size can be changed in place, then the header to a
 * multiple of 64 bytes. */
size_t npy_header(char *out, size_t size, const Shape *shape, char kind) {
    char sizes[64] = "", first[16] = "";
    shape_string(shape, sizes);
    sizes[strlen(sizes) - 1] = 0; /* removes "]"; `sizes + 1` below skips "[" */
    if (shape->n) snprintf(first, sizeof first, "%d", shape->d[0]);
    int growth = shape->n ? 21 - (int)strlen(first) : 0;
    int length = snprintf(out, size,
                          "%cNUMPY%c%c__{'descr': '<%c4', 'fortran_order': False, 'shape': (%s%s), }%*s",
                          0x93, 1, 0, kind, sizes + 1, shape->n == 1 ? "," : "", growth, "");
    size_t total = ((size_t)length + 1 + 63) / 64 * 64;
    if (total > size) die(STATUS_RESOURCE, "an .npy header needs %zu bytes, there are %zu (a bug)", total, size);
    memset(out + length, ' ', total - (size_t)length - 1);
    out[total - 1] = '\n';
    out[8] = (char)((total - 10) & 255);
    out[9] = (char)((total - 10) >> 8);
    return total;
}
