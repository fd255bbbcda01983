/* npy.c - arrays in files, in numpy's format (numpy/lib/format.py).
 *
 *   "\x93NUMPY"  u8 major  u8 minor  u16 (u32 from version 2 on) length of the header
 *   header:  {'descr': '<f4', 'fortran_order': False, 'shape': (16, 2, 4, 6), }  spaces, "\n"
 *   the values, C order
 *
 * Read are little endian floats and integers of 4 or 8 bytes, in C order, with at most 5 dimensions; 8 bytes
 * are narrowed to 4. Values of 4 bytes stay where they lie in the mapped file, so that a clip longer than
 * memory can be compared. The header is Python source text; what is accepted of it is the dictionary above
 * with its keys in any order, which is all that numpy writes. */
#include "engine/engine.h"

#include <inttypes.h>
#include <limits.h>
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

typedef struct {
    char descr[8];
    bool fortran_order, seen_descr, seen_order, seen_shape;
    Shape shape;
} Header;

static void skip_spaces(Cursor *text) {
    while (text->at < text->end && (*text->at == ' ' || *text->at == '\n')) text->at++;
}

/* Takes a word or sign if it comes next, after spaces. */
static bool accept(Cursor *text, const char *word) {
    size_t length = strlen(word);
    skip_spaces(text);
    if ((size_t)(text->end - text->at) < length || memcmp(text->at, word, length)) return false;
    text->at += length;
    return true;
}

static bool accept_size(Cursor *text, int *out) {
    int64_t value = 0;
    skip_spaces(text);
    const char *start = text->at;
    for (; text->at < text->end && *text->at >= '0' && *text->at <= '9' && value <= INT_MAX; text->at++)
        value = 10 * value + (*text->at - '0');
    *out = (int)value;
    return text->at > start && value <= INT_MAX;
}

static const char *parse_descr(Cursor *text, Header *header) {
    size_t n = 0;
    if (!accept(text, "'")) return "the header's descr is no string";
    for (; text->at < text->end && *text->at != '\'' && n < sizeof header->descr - 1; text->at++)
        header->descr[n++] = *text->at;
    header->descr[n] = 0;
    header->seen_descr = true;
    return accept(text, "'") ? NULL : "the header's descr is no string that is known here";
}

static const char *parse_order(Cursor *text, Header *header) {
    header->seen_order = true;
    header->fortran_order = accept(text, "True");
    return header->fortran_order || accept(text, "False") ? NULL : "the header's fortran_order is no boolean";
}

static const char *parse_shape(Cursor *text, Header *header) {
    Shape *shape = &header->shape;
    header->seen_shape = true;
    shape->n = 0;
    if (!accept(text, "(")) return "the header's shape is no tuple";
    while (!accept(text, ")")) {
        if (shape->n == MAX_DIMS) return "more than 5 dimensions";
        if (!accept_size(text, &shape->d[shape->n++])) return "the header's shape is no tuple of sizes";
        if (!accept(text, ",") && (text->at == text->end || *text->at != ')'))
            return "the header's shape is no tuple of sizes";
    }
    return NULL;
}

static const char *parse_header(Cursor text, Header *header) {
    const char *why = NULL;
    if (!accept(&text, "{")) return "the header is no dictionary";
    while (!why && !accept(&text, "}")) {
        if (accept(&text, "'descr':")) why = parse_descr(&text, header);
        else if (accept(&text, "'fortran_order':")) why = parse_order(&text, header);
        else if (accept(&text, "'shape':")) why = parse_shape(&text, header);
        else return "the header has an unknown key";
        if (!why && !accept(&text, ",") && (text.at == text.end || *text.at != '}'))
            why = "the header is no dictionary";
    }
    skip_spaces(&text);
    if (!why && text.at != text.end) why = "the header goes on after its dictionary";
    if (!why && !(header->seen_descr && header->seen_order && header->seen_shape))
        why = "the header lacks descr, fortran_order or shape";
    return why;
}

/* ---------------------------------------------------------------- values */

static const char *narrow_integers(const uint8_t *in, size_t count, int32_t *out) {
    for (size_t i = 0; i < count; i++) {
        int64_t value;
        memcpy(&value, in + 8 * i, sizeof value);
        if (value < INT32_MIN || value > INT32_MAX)
            return reason("%" PRId64 " at index %zu does not fit into 32 bits", value, i);
        out[i] = (int32_t)value;
    }
    return NULL;
}

static void narrow_floats(const uint8_t *in, size_t count, float *out) {
    for (size_t i = 0; i < count; i++) {
        double value;
        memcpy(&value, in + 8 * i, sizeof value);
        out[i] = (float)value;
    }
}

static const char *take_values(const uint8_t *data, int width, Npy *out) {
    size_t count = shape_count(&out->shape);
    out->values = data;
    if (width == 4 && (uintptr_t)data % 4 == 0) return NULL;
    out->values = out->owned = allocate(4 * count);
    if (width == 4) memcpy(out->owned, data, 4 * count);
    else if (out->kind == 'i') return narrow_integers(data, count, out->owned);
    else narrow_floats(data, count, out->owned);
    return NULL;
}

static const char *check_values(const Header *header, Bytes data, Npy *out) {
    const char *type = header->descr;
    bool known = !strcmp(type, "<f4") || !strcmp(type, "<f8") || !strcmp(type, "<i4") || !strcmp(type, "<i8");
    if (!known) return reason("values of type '%s', expected <f4, <f8, <i4 or <i8", type);
    if (header->fortran_order) return "values in Fortran order, expected C order";
    int width = type[2] - '0';
    uint64_t expected = (uint64_t)width;
    for (int i = 0; i < header->shape.n; i++) {
        uint64_t size = (uint64_t)header->shape.d[i];
        if (size && expected > SIZE_MAX / size) return "the shape is larger than memory";
        expected *= size;
    }
    if (data.size != expected)
        return reason("%zu bytes of values, expected %" PRIu64 " for the shape", data.size, expected);
    out->kind = type[1];
    out->shape = header->shape;
    return take_values(data.data, width, out);
}

const char *npy_parse(Bytes bytes, Npy *out) {
    *out = (Npy){0};
    const uint8_t *p = bytes.data;
    if (bytes.size < 12 || memcmp(p, "\x93NUMPY", 6)) return "this is not an .npy file";
    int major = p[6];
    if (major < 1 || major > 3) return reason(".npy version %d.%d, expected 1.0 to 3.0", major, p[7]);
    size_t start = major == 1 ? 10 : 12, length = p[8] | p[9] << 8;
    if (major > 1) length |= (size_t)p[10] << 16 | (size_t)p[11] << 24;
    if (length > bytes.size - start) return "the header is cut off";
    Header header = {0};
    const char *text = (const char *)p + start;
    const char *why = parse_header((Cursor){text, text + length}, &header);
    if (!why) why = check_values(&header, (Bytes){p + start + length, bytes.size - start - length}, out);
    if (why) npy_free(out);
    return why;
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
    free(array->owned);
    unmap_file(array->mapping);
    *array = (Npy){0};
}

/* ---------------------------------------------------------------- writing */

/* numpy leaves room for the first size to grow to 21 digits in place, and then pads to a multiple of 64. */
size_t npy_header(char *out, size_t size, const Shape *shape, char kind) {
    char sizes[64] = "", first[16] = "";
    shape_string(shape, sizes);
    sizes[strlen(sizes) - 1] = 0; /* the brackets go */
    if (shape->n) snprintf(first, sizeof first, "%d", shape->d[0]);
    int growth = shape->n ? 21 - (int)strlen(first) : 0;
    int length = snprintf(out, size,
                          "%cNUMPY%c%c__{'descr': '<%c4', 'fortran_order': False, 'shape': (%s%s), }%*s",
                          0x93, 1, 0, kind, sizes + 1, shape->n == 1 ? "," : "", growth, "");
    size_t total = ((size_t)length + 1 + 63) / 64 * 64;
    if (total > size) die(STATUS_RESOURCE, "an .npy header of %zu bytes in %zu (a bug)", total, size);
    memset(out + length, ' ', total - (size_t)length - 1);
    out[total - 1] = '\n';
    out[8] = (char)((total - 10) & 255);
    out[9] = (char)((total - 10) >> 8);
    return total;
}
