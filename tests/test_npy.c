/* test_npy.c - npy.c on files written by numpy, on headers of other writers, and on damaged files. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The arrays of make_goldens.py: elements 0, 1, 2, ... of each type in each shape. */
static const struct {
    const char *name;
    Shape shape;
} shapes[] = {
    {"scalar", {0, {0}}},
    {"3", {1, {3}}},
    {"0x2", {2, {0, 2}}},
    {"2x1x3", {3, {2, 1, 3}}},
    {"1x2x3x2x1", {5, {1, 2, 3, 2, 1}}},
    {"long", {5, {0, 1234567890, 1234567890, 1234567890, 1234}}}, /* the header only */
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static char *golden(const char *type, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "goldens/npy/%s%s.npy", type, name);
    return format_string("%s", test_path(path));
}

static bool counts_up(const Npy *array) {
    float *values = npy_floats(array);
    bool right = true;
    for (size_t i = 0; i < shape_count(&array->shape); i++) right &= values[i] == (float)i;
    free(values);
    return right;
}

static void test_reading(const char *type) {
    for (int s = 0; s < SHAPES - 1; s++) {
        char *path = golden(type, shapes[s].name), text[64];
        Npy array;
        const char *why = npy_read(path, &array);
        CHECK(!why, "%s: %s", path, why);
        if (!why) {
            CHECK(array.kind == type[0], "%s is of kind %c", path, array.kind);
            CHECK(shape_equal(&array.shape, &shapes[s].shape), "%s has shape %s", path,
                  shape_string(&array.shape, text));
            CHECK(counts_up(&array), "the values of %s are wrong", path);
        }
        npy_free(&array);
        free(path);
    }
}

/* Element i of the [2,3,4] arrays of make_goldens.py: negative values if the type has them, the high bits if unsigned.
 * */
static double expected_element(const char *type, int i) {
    if (type[0] == 'f') return (i - 11) / 4.0;
    if (type[0] == 'i') return i - 11;
    return type[0] == 'u' ? ldexp(i, 8 * (type[1] - '0') - 5) : i % 2;
}

/* Reads every type, in the given byte or index order, whole and in part. */
static void test_types(const char *order) {
    static const char *const types[] = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"};
    for (size_t t = 0; t < sizeof types / sizeof *types; t++) {
        char *path = golden(order, types[t]);
        double all[24] = {0}, some[5];
        Npy array;
        const char *why = npy_read(path, &array);
        CHECK(!why && shape_equal(&array.shape, &SHAPE(2, 3, 4)), "%s: %s", path, why ? why : "another shape");
        if (!why) npy_get(&array, 0, 24, all), npy_get(&array, 10, 5, some);
        for (int i = 0; i < 24 && !why; i++)
            CHECK(all[i] == expected_element(types[t], i), "%s: element %d is %.17g", path, i, all[i]);
        CHECK(why || !memcmp(some, all + 10, sizeof some), "%s: elements 10 to 14 differ if read alone", path);
        npy_free(&array);
        free(path);
    }
}

/* npy_header() must write the same bytes as numpy. */
static void test_header(const char *type) {
    for (int s = 0; s < SHAPES; s++) {
        char *path = golden(type, shapes[s].name), header[256];
        Bytes file;
        const char *why = map_file(path, &file);
        size_t size = npy_header(header, sizeof header, &shapes[s].shape, type[0]);
        size_t expected = file.size - 4 * shape_count(&shapes[s].shape);
        CHECK(!why && size == expected && !memcmp(header, file.data, size), "the header of %s differs", path);
        unmap_file(file);
        free(path);
    }
}

static void test_version(const char *name) {
    char *path = golden("", name);
    Npy array;
    const char *why = npy_read(path, &array);
    CHECK(!why && array.shape.n == 2 && counts_up(&array), "%s: %s", path, why ? why : "other values");
    npy_free(&array);
    free(path);
}

static void test_refused(void) {
    static const char *const cases[][2] = {
        {"complex",
         "the values are of type '<c8' (complex numbers), expected floats of 2, 4 or 8 bytes, integers or booleans"},
        {"text", "'<U9', expected"},
        {"bytes", "'|V2' (bfloat16? numpy does not name it in a file)"},
        {"fields", "the values are of a structured type, expected plain numbers"},
        {"objects", "'|O' (pickled objects)"},
        {"archive", "this is an .npz archive: save each array with numpy.save"},
        {"dimensions", "more than 5 dimensions"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *path = golden("bad_", cases[i][0]);
        Npy array;
        const char *why = npy_read(path, &array);
        CHECK(why && strstr(why, cases[i][1]), "expected \"%s\", the reason is \"%s\"", cases[i][1],
              why ? why : "none");
        CHECK(!array.mapping.data, "%s: the file is still mapped", path);
        free(path);
    }
}

/* ---------------------------------------------------------------- shapes that differ */

static void test_fit(void) {
    const struct {
        Shape found, expected;
        const char *why; /* NULL: it fits */
    } cases[] = {
        {SHAPE(4, 2, 8, 6), SHAPE(4, 2, 8, 6), NULL},
        {SHAPE(1, 4, 2, 8, 6), SHAPE(4, 2, 8, 6), NULL},
        {SHAPE(1, 1, 3), SHAPE(3), NULL},
        {SHAPE(1, 3), SHAPE(1, 3), NULL},
        {SHAPE(2, 4, 2, 8, 6), SHAPE(4, 2, 8, 6),
         "shape [2, 4, 2, 8, 6], expected [4, 2, 8, 6]: a batch, expected a single element of it"},
        {SHAPE(512, 24), SHAPE(6, 24),
         "shape [512, 24], expected [6, 24]: it has more rows, perhaps padding; expected only the first"},
        {SHAPE(1, 512, 24), SHAPE(6, 24), "expected [6, 24]: it has more rows"},
        {SHAPE(512), SHAPE(6), "shape [512], expected [6]: it has more rows"},
        {SHAPE(2, 4, 8, 6), SHAPE(4, 2, 8, 6), "expected [4, 2, 8, 6]: its axes are in another order"},
        {SHAPE(1, 5, 8, 6, 3), SHAPE(3, 5, 8, 6), "shape [1, 5, 8, 6, 3], expected [3, 5, 8, 6]: its axes"},
        {SHAPE(2), SHAPE(3), "shape [2], expected [3]"},
        {{0, {0}}, SHAPE(3), "shape [], expected [3]"},
        {SHAPE(0), SHAPE(2), "shape [0], expected [2]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Npy array = {.shape = cases[i].found};
        const char *why = npy_fit(&array, &cases[i].expected), *wanted = cases[i].why;
        CHECK(wanted ? why && strstr(why, wanted) : !why, "shapes %zu: expected \"%s\", the reason is \"%s\"", i,
              wanted ? wanted : "none", why ? why : "none");
        CHECK(shape_equal(&array.shape, wanted ? &cases[i].found : &cases[i].expected),
              "shapes %zu: the shape after npy_fit() is wrong", i);
    }
}

/* A shape of six sizes, of which the first four are 1. */
static void test_batch(void) {
    Npy array;
    const char *why = npy_read(test_path("goldens/npy/batch.npy"), &array);
    if (!why) why = npy_fit(&array, &SHAPE(2, 3));
    CHECK(!why && counts_up(&array), "batch.npy: %s", why ? why : "other values");
    npy_free(&array);
}

/* ---------------------------------------------------------------- damage, and headers of other writers */

static const char *parse_copy(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1);
    Npy array;
    if (!copy) abort();
    memcpy(copy, data, size);
    const char *why = npy_parse((Bytes){copy, size}, &array);
    npy_free(&array);
    free(copy);
    return why;
}

static void test_every_prefix(void) {
    char *path = golden("f4_", "2x1x3");
    Bytes file;
    CHECK(!map_file(path, &file), "%s is missing", path);
    for (size_t size = 0; size < file.size; size++)
        CHECK(parse_copy(file.data, size), "a file cut off at %zu bytes is accepted", size);
    unmap_file(file);
    free(path);
}

/* Parses a version 1 file of this header and four bytes of values. Returns NULL or the reason. */
static const char *parse_text(const char *header) {
    uint8_t file[256] = "\x93NUMPY\x01";
    size_t length = strlen(header);
    file[8] = (uint8_t)length;
    memcpy(file + 10, header, length);
    return parse_copy(file, 10 + length + 4);
}

/* Headers that numpy does not write but accepts. */
static void test_other_headers(void) {
    static const char *const cases[] = {
        "{\"descr\": \"<f4\", \"fortran_order\": False, \"shape\": (1, 1)}",
        "{'descr':'<f4','fortran_order':False,'shape':(1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1L, 1L), }\n",
        "{'descr': '=f4', 'fortran_order': False, 'shape': ()}",
        "{'descr': '|f4', 'fortran_order': False, 'shape': ()}",
        "{'descr':\t'<f4',\t'fortran_order': True,\r\n'shape': (1,)}  \t",
        "{'shape': (2,), 'fortran_order': False, 'descr': '>i2'}",
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *why = parse_text(cases[i]);
        CHECK(!why, "header %s: %s", cases[i], why ? why : "");
    }
}

/* Invalid headers. */
static void test_bad_headers(void) {
    static const char *const cases[][2] = {
        {"{'descr': '<f4', 'fortran_order': False}", "lacks"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}", "unknown key, 'more'"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "not a tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1 1)}", "not a tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (L,)}", "not a tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1LL,)}", "not a tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,", "not a tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}", "not a tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2147483647,2147483647,2147483647)}",
         "more bytes than 64 bits can count"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", "4 bytes of values, expected 8"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': ()} x", "has text after"},
        {"{'descr': '<f4', 'fortran_order': 0, 'shape': ()}", "not True or False"},
        {"{'descr': ['<f4'], 'fortran_order': False, 'shape': ()}", "structured"},
        {"{'descr': 4, 'fortran_order': False, 'shape': ()}", "not a string"},
        {"{'descr': '<f4\", 'fortran_order': False, 'shape': ()}", "not a dictionary"},
        {"{'descr': '<f4", "descr is not a string"},
        {"{'descr': '<f4aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', 'fortran_order': False, 'shape': ()}",
         "descr is not a string"},
        {"{'descr': '', 'fortran_order': False, 'shape': ()}", "values are of type ''"},
        {"{'descr': '<', 'fortran_order': False, 'shape': ()}", "values are of type '<'"},
        {"{'descr': 'f4', 'fortran_order': False, 'shape': ()}", "values are of type 'f4'"},
        {"{'descr': '<f3', 'fortran_order': False, 'shape': ()}", "values are of type '<f3'"},
        {"{'descr': '<f16', 'fortran_order': False, 'shape': ()}", "values are of type '<f16'"},
        {"{'descr' '<f4', 'fortran_order': False, 'shape': ()}", "not a dictionary"},
        {"'descr'", "not a dictionary"},
        {"", "not a dictionary"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *why = parse_text(cases[i][0]);
        CHECK(why && strstr(why, cases[i][1]), "header %s: expected \"%s\", the reason is \"%s\"",
              cases[i][0], cases[i][1], why ? why : "none");
    }
}

/* A header of version 2 may be longer than 65535 bytes. No bytes may follow the values. */
static void test_long_files(void) {
    static const char text[] = "{'descr': '<f4', 'fortran_order': False, 'shape': ()}";
    static uint8_t file[12 + 0x12345 + 5] = "\x93NUMPY\x02\0\x45\x23\x01";
    memset(file + 12, ' ', 0x12345);
    memcpy(file + 12, text, strlen(text));
    const char *why = parse_copy(file, sizeof file - 1);
    CHECK(!why, "a long header: %s", why ? why : "");
    why = parse_copy(file, sizeof file);
    CHECK(why && strstr(why, "5 bytes of values, expected 4"), "one byte after the values: %s", why ? why : "accepted");
}

void test_npy(void) {
    test_reading("f4_");
    test_reading("f8_");
    test_reading("i4_");
    test_reading("i8_");
    test_types("types/little_");
    test_types("types/big_");
    test_types("types/fortran_");
    test_header("f4_");
    test_header("i4_");
    test_version("v2");
    test_version("v3");
    test_refused();
    test_fit();
    test_batch();
    test_long_files();
    test_every_prefix();
    test_other_headers();
    test_bad_headers();
}
