/* test_npy.c - npy.c against files that numpy wrote. */
#include "tests/test.h"
#include "engine/engine.h"

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
    {"long", {5, {0, 1234567890, 1234567890, 1234567890, 1234}}}, /* a header alone */
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static char *golden(const char *type, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "goldens/npy/%s%s.npy", type, name);
    return format_string("%s", test_path(path));
}

static bool counts_up(const Npy *array) {
    bool right = true;
    for (size_t i = 0; i < shape_count(&array->shape); i++)
        right &= array->kind == 'f' ? ((const float *)array->values)[i] == (float)i
                                    : ((const int32_t *)array->values)[i] == (int32_t)i;
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

/* The header that is written is numpy's, byte for byte. */
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

static void test_refused(void) {
    static const char *const cases[][2] = {
        {"bad_fortran", "Fortran order"},
        {"bad_type", "'<f2'"},
        {"bad_endian", "'>f4'"},
        {"bad_dimensions", "more than 5 dimensions"},
        {"bad_range", "2147483648 at index 1 does not fit"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *path = golden("", cases[i][0]);
        Npy array;
        const char *why = npy_read(path, &array);
        CHECK(why && strstr(why, cases[i][1]), "expected \"%s\", the reason is \"%s\"", cases[i][1],
              why ? why : "none");
        CHECK(!array.values && !array.owned, "%s left something behind", path);
        free(path);
    }
}

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

/* Headers that numpy would not write. */
static void test_bad_headers(void) {
    static const char *const cases[][2] = {
        {"{'descr': '<f4', 'fortran_order': False}", "lacks"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}", "unknown key"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "no tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1 1)}", "no tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,", "no tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}", "no tuple of sizes"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2147483647,2147483647,2147483647)}",
         "larger than memory"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", "4 bytes of values, expected 8"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': ()} x", "goes on"},
        {"{'descr': '<f4', 'fortran_order': 0, 'shape': ()}", "no boolean"},
        {"{'descr': ['<f4'], 'fortran_order': False, 'shape': ()}", "no string"},
        {"{'descr': '<f4aaaaaaaaaa', 'fortran_order': False, 'shape': ()}", "no string that is known"},
        {"'descr'", "no dictionary"},
        {"", "no dictionary"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t file[256] = "\x93NUMPY\x01";
        size_t length = strlen(cases[i][0]);
        file[8] = (uint8_t)length;
        memcpy(file + 10, cases[i][0], length);
        const char *why = parse_copy(file, 10 + length + 4);
        CHECK(why && strstr(why, cases[i][1]), "header %s: expected \"%s\", the reason is \"%s\"",
              cases[i][0], cases[i][1], why ? why : "none");
    }
}

/* From version 2 on a header may be longer than 65535 bytes; values may not be followed by anything. */
static void test_long_files(void) {
    static const char text[] = "{'descr': '<f4', 'fortran_order': False, 'shape': ()}";
    static uint8_t file[12 + 0x12345 + 5] = "\x93NUMPY\x02\0\x45\x23\x01";
    memset(file + 12, ' ', 0x12345);
    memcpy(file + 12, text, strlen(text));
    const char *why = parse_copy(file, sizeof file - 1);
    CHECK(!why, "a long header: %s", why ? why : "");
    why = parse_copy(file, sizeof file);
    CHECK(why && strstr(why, "5 bytes of values, expected 4"), "a byte too many: %s", why ? why : "accepted");
}

void test_npy(void) {
    test_reading("f4_");
    test_reading("f8_");
    test_reading("i4_");
    test_reading("i8_");
    test_header("f4_");
    test_header("i4_");
    Npy array;
    const char *why = npy_read(test_path("goldens/npy/v2.npy"), &array);
    CHECK(!why && array.shape.n == 2 && counts_up(&array), "version 2: %s", why);
    npy_free(&array);
    test_refused();
    test_long_files();
    test_every_prefix();
    test_bad_headers();
}
