/* test_weights.c - weights.c on files written by the gguf package, and on damaged files. */
#include "tests/gguf_builder.h"
#include "tests/test.h"
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---------------------------------------------------------------- helpers */

/* Parses a copy of exactly this size, so that AddressSanitizer detects any read beyond its end. */
static const char *parse_copy(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy) abort();
    memcpy(copy, data, size);
    WeightFile *file;
    const char *why = weights_parse((Bytes){copy, size}, "file", &file);
    weights_close(file);
    free(copy);
    return why;
}

static void expect_refused(const Builder *b, const char *what) {
    const char *why = parse_copy(b->data, b->size);
    CHECK(why && strstr(why, what), "expected \"%s\", the reason is \"%s\"", what, why ? why : "none");
}

/* A small valid file. */
static void build_good(Builder *b) {
    put_header(b, 2, 3);
    put_key(b, "a", 4, 7, 4);
    put_array(b, "words", 8, 2);
    put_string(b, "one");
    put_string(b, "two");
    put_key(b, "flag", 7, 1, 1);
    put_tensor(b, "x", 4, 3, TYPE_F32, 0);
    put_tensor(b, "y", 4, 1, TYPE_F32, 64);
    put_padding(b);
    for (uint32_t i = 0; i < 20; i++) put_u32(b, 0x3f800000);
}

/* ---------------------------------------------------------------- a file from gguf */

static void test_keys(const WeightFile *file) {
    CHECK(weights_int(file, "test.u8") == 200, "u8");
    CHECK(weights_int(file, "test.i8") == -100, "i8");
    CHECK(weights_int(file, "test.u16") == 60000, "u16");
    CHECK(weights_int(file, "test.i16") == -30000, "i16");
    CHECK(weights_int(file, "test.u32") == 4000000000, "u32");
    CHECK(weights_int(file, "test.i32") == -2000000000, "i32");
    CHECK(weights_int(file, "test.i64") == INT64_MIN, "i64");
    CHECK(weights_size(file, "test.u16", 60000) == 60000, "a size");
    CHECK(weights_size_or(file, "none", 9, 7) == 7, "no such size");
    CHECK(weights_double(file, "test.f32") == (double)0.1f, "f32");
    CHECK(weights_double(file, "test.f64") == 0.1, "f64");
    CHECK(weights_double(file, "test.i8") == -100, "an integer as a number");
    CHECK(weights_bool_or(file, "test.bool", false), "bool");
    CHECK(!strcmp(weights_string_or(file, "test.string", ""), "na\xc3\xafve"), "string");
    CHECK(weights_int_or(file, "test.none", 5) == 5, "no such integer");
    CHECK(weights_double_or(file, "test.none", 2.5) == 2.5, "no such number");
    CHECK(weights_bool_or(file, "test.none", true), "no such boolean");
    CHECK(!strcmp(weights_string_or(file, "test.none", "none"), "none"), "no such string");
}

static void test_arrays(const WeightFile *file) {
    static const char *const expected[] = {"", "\xe2\x96\x81the", "</s>"};
    WeightArray array;
    CHECK(!weights_array(file, "test.u8", &array), "a single value is read as an array");
    CHECK(weights_array(file, "test.words", &array) && array.count == 3, "array of strings");
    const uint8_t *cursor = array.data;
    for (int i = 0; i < 3; i++) {
        Bytes word = next_string(&cursor);
        CHECK(word.size == strlen(expected[i]) && !memcmp(word.data, expected[i], word.size), "word %d", i);
    }
    CHECK(weights_array(file, "test.scores", &array) && array.count == 2, "array of floats");
    CHECK(array_double(&array, 0) == -1.5 && array_double(&array, 1) == (double)-0.1f, "its elements");
    CHECK(weights_array(file, "test.numbers", &array) && array.count == 3, "array of integers");
    CHECK(array_int(&array, 0) == -1 && array_int(&array, 2) == 70000, "its elements");
}

/* Every row must equal the result of gguf's own dequantization. */
static void test_tensor(const WeightFile *file, const char *name, Type type) {
    Npy expected;
    char path[64];
    float row[512];
    snprintf(path, sizeof path, "goldens/weights/%s.npy", name);
    const char *why = npy_read(test_path(path), &expected);
    CHECK(!why, "%s: %s", path, why);
    if (why) return;
    int rows = expected.shape.d[0], cols = expected.shape.d[1];
    Weight weight = weights_bind(file, rows, cols, "%s", name);
    float *values = npy_floats(&expected);
    const float *all = weights_floats(file, rows * cols, "%s", name);
    CHECK(weight.type == type, "%s is of type %s", name, weight_type(weight.type)->name);
    CHECK(!memcmp(all, values, (size_t)(rows * cols) * sizeof *all), "weights_floats of %s differs", name);
    for (int r = 0; r < rows; r++) {
        weight_row(&weight, r, row);
        CHECK(!memcmp(row, all + r * cols, (size_t)cols * sizeof *row), "row %d of %s differs", r, name);
    }
    weight_part(&weight, (size_t)cols - 5, 40, row);
    CHECK(!memcmp(row, all + cols - 5, 40 * sizeof *row), "parts of %s's blocks differ", name);
    free(values);
    npy_free(&expected);
}

static void test_shapes(const WeightFile *file) {
    Weight weight = weights_bind(file, 6, 9, "conv.weight");
    CHECK(weight.rows == 6 && weight.cols == 9, "conv as (6,9)");
    weights_bind(file, 1, 54, "conv.weight");
    const float *vector = weights_floats(file, 5, "vector");
    CHECK((const void *)vector == weights_bind(file, 1, 5, "vector").data, "an f32 tensor is copied");
}

static void bind_wrong_shape(void *file) {
    weights_bind(file, 9, 6, "%s", "conv.weight");
}

static void bind_across_rows(void *file) {
    weights_bind(file, 3, 18, "conv.weight");
}

static void bind_missing(void *file) {
    weights_bind(file, 1, 1, "blocks.%d.q", 3);
}

static void count_wrong(void *file) {
    weights_floats(file, 6, "vector");
}

static void key_missing(void *file) {
    weights_int(file, "test.none");
}

static void size_too_large(void *file) {
    weights_size(file, "test.u16", 59999);
}

static void size_negative(void *file) {
    weights_size_or(file, "test.i8", 100, 1);
}

static void sizes_wrong_count(void *file) {
    int sizes[2];
    weights_sizes(file, "test.numbers", 100, sizes, 2);
}

static void sizes_wrong_value(void *file) {
    int sizes[3];
    weights_sizes(file, "test.numbers", 100000, sizes, 3);
}

static void key_wrong_type(void *file) {
    weights_int(file, "test.string");
}

static void integer_wrong_type(void *file) { weights_int_or(file, "test.f64", 5); }
static void number_wrong_type(void *file) { weights_double_or(file, "test.string", 2.5); }
static void bool_wrong_type(void *file) { weights_bool_or(file, "test.u8", true); }
static void string_wrong_type(void *file) { weights_string_or(file, "test.u8", "none"); }

/* run(file) must die with one line that names the file and holds `expected`. */
static void expect_death(void (*run)(void *), WeightFile *file, const char *expected) {
    char output[4096];
    int status = run_apart(run, file, output);
    CHECK(status == STATUS_USAGE && strstr(output, expected), "expected \"%s\": status %d, \"%s\"", expected, status,
          output);
    CHECK(strstr(output, ".gguf: "), "the file is not named in \"%s\"", output);
}

static void test_deaths(WeightFile *file) {
    static const struct {
        void (*run)(void *);
        const char *expected;
    } cases[] = {
        {bind_wrong_shape, "tensor \"conv.weight\" has shape [2, 3, 3, 3], expected [9, 6]"},
        {bind_across_rows, "tensor \"conv.weight\" has shape [2, 3, 3, 3], expected [3, 18]"},
        {bind_missing, "tensor \"blocks.3.q\" is missing"},
        {count_wrong, "tensor \"vector\" has shape [5], expected 6 elements"},
        {key_missing, "key \"test.none\" is missing"},
        {key_wrong_type, "key \"test.string\" is not an integer"},
        {integer_wrong_type, "key \"test.f64\" is not an integer"},
        {number_wrong_type, "key \"test.string\" is not a number"},
        {bool_wrong_type, "key \"test.u8\" is not a boolean"},
        {string_wrong_type, "key \"test.u8\" is not a string"},
        {size_too_large, "key \"test.u16\" is 60000, expected 1 to 59999"},
        {size_negative, "key \"test.i8\" is -100, expected 1 to 100"},
        {sizes_wrong_count, "key \"test.numbers\" is not an array of 2 integers"},
        {sizes_wrong_value, "key \"test.numbers\" is -1, expected 1 to 100000"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) expect_death(cases[i].run, file, cases[i].expected);
}

static void print_info(void *file) {
    weights_print(file, stderr);
}

static void test_info(WeightFile *file) {
    static const char *const expected[] = {"test.i8",       "-100",
                                           "na\xc3\xafve",  "3: \"\", \"\xe2\x96\x81the\", \"</s>\"",
                                           "q8_0    [3, 64]", "f32     [2, 3, 3, 3]",
                                           "16 tensors"};
    char output[4096];
    run_apart(print_info, file, output);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        CHECK(strstr(output, expected[i]), "--info lacks \"%s\":\n%s", expected[i], output);
}

/* ---------------------------------------------------------------- files of other programs */

/* --info must print the name of every type that gguf can store. */
static void test_foreign(const WeightFile *file) {
    static const char *const types[] = {
        "f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs",
        "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs", "i8", "i16", "i32", "i64", "f64", "iq1_m",
        "bf16", "tq1_0", "tq2_0", "mxfp4", "nvfp4", "q1_0"};
    enum { COUNT = sizeof types / sizeof *types };
    char output[4096], line[256];
    run_apart(print_info, (void *)file, output);
    for (size_t i = 0; i < COUNT; i++) {
        char name[32];
        snprintf(name, sizeof name, "of.%s", types[i]);
        snprintf(line, sizeof line, "\n%-60s %-7s [1, 256]\n", name, types[i]);
        CHECK(strstr(output, line), "--info lacks \"%s\":\n%s", line + 1, output);
    }
    memset(line, 'n', 127);
    strcpy(line + 127, " f16     [4]\n");
    CHECK(strstr(output, line), "--info lacks a name of 127 bytes:\n%s", output);
    CHECK(strstr(output, " f32     [2, 3, 1, 2, 2]\n"), "--info lacks five dimensions:\n%s", output);
    snprintf(line, sizeof line, "%-60s f32     [1]\n", "scale");
    CHECK(strstr(output, line), "--info lacks a single number:\n%s", output);
    snprintf(line, sizeof line, "%d tensors,", COUNT + 3);
    CHECK(strstr(output, line), "--info lacks the count \"%s\":\n%s", line, output);
}

static void bind_foreign(void *file) { weights_bind(file, 1, 256, "of.iq4_xs"); }

static void read_foreign(void *file) { weights_floats(file, 256, "of.i8"); }

/* A tensor of an unknown type extends to the next tensor, or to the end of the file. */
static void test_unknown_type(void) {
    char output[4096];
    Builder b;
    put_header(&b, 3, 0);
    put_tensor(&b, "new", 7, 3, 99, 0);
    put_tensor(&b, "old", 4, 1, TYPE_F32, 64);
    put_tensor(&b, "newer", 7, 3, 100, 96);
    put_padding(&b);
    b.size += 64 + 32 + 5;
    WeightFile *file;
    const char *why = weights_parse((Bytes){b.data, b.size}, "new.gguf", &file);
    CHECK(!why, "unknown types: %s", why);
    if (why) return;
    run_apart(print_info, file, output);
    CHECK(strstr(output, " type 99 [3, 7]\n") && strstr(output, " type 100 [3, 7]\n"), "unknown types:\n%s", output);
    CHECK(weights_bind(file, 1, 4, "old").data == b.data + b.size - 37,
          "the tensor after one of unknown type is at the wrong place");
    weights_close(file);
}

/* ---------------------------------------------------------------- damaged files */

static void test_every_prefix(void) {
    Builder b;
    build_good(&b);
    CHECK(!parse_copy(b.data, b.size), "a good file is refused: %s", parse_copy(b.data, b.size));
    for (size_t size = 0; size < b.size; size++)
        CHECK(parse_copy(b.data, size), "a file cut off at %zu of %zu bytes is accepted", size, b.size);
}

static void test_headers(void) {
    Builder b;
    put_header(&b, 0, 0);
    CHECK(!parse_copy(b.data, b.size), "an empty file is refused");
    b.data[0] = 'g';
    expect_refused(&b, "not a GGUF file");
    put_header(&b, 0, 0);
    b.data[4] = 2;
    CHECK(!parse_copy(b.data, b.size), "version 2 is refused");
    b.data[4] = 1;
    expect_refused(&b, "version 1, expected 3");
    b.data[4] = 0, b.data[7] = 3;
    expect_refused(&b, "(big-endian), expected 3");
    put_header(&b, UINT64_MAX, 0);
    expect_refused(&b, "do not fit into the file");
    put_header(&b, 0, UINT64_MAX / 14);
    expect_refused(&b, "do not fit into the file");
}

static void key_refused(uint32_t type, uint64_t bits, size_t bytes, const char *what) {
    Builder b;
    put_header(&b, 0, 1);
    put_key(&b, "key", type, bits, bytes);
    put_padding(&b);
    expect_refused(&b, what);
}

static void array_refused(uint32_t type, uint64_t count, const char *what) {
    Builder b;
    put_header(&b, 0, 1);
    put_array(&b, "key", type, count);
    put_string(&b, "only");
    expect_refused(&b, what);
}

static void test_bad_keys(void) {
    key_refused(7, 2, 1, "boolean that is neither 0 nor 1");
    key_refused(13, 0, 8, "\"key\" is of an unknown type");
    key_refused(8, UINT64_MAX, 8, "longer than the file");
    key_refused(8, 1000, 8, "longer than the file");
    array_refused(9, 1, "unknown type");
    array_refused(8, 2, "longer than the file");
    array_refused(10, UINT64_MAX / 8 + 1, "more elements than the file");
    array_refused(10, 2, "is longer than the file");
    array_refused(0, 13, "more elements than the file");
    Builder b;
    put_header(&b, 0, 2);
    put_key(&b, "twice", 4, 1, 4);
    put_key(&b, "twice", 4, 2, 4);
    expect_refused(&b, "key \"twice\" appears twice");
    put_header(&b, 0, 1);
    put_key(&b, "", 4, 1, 4);
    expect_refused(&b, "has a name that is");
    put_header(&b, 0, 1);
    put_key(&b, "general.alignment", 4, 24, 4);
    expect_refused(&b, "power of two");
}

static void tensor_refused(uint64_t cols, uint64_t rows, uint32_t type, uint64_t offset, const char *what) {
    Builder b;
    put_header(&b, 1, 0);
    put_tensor(&b, "x", cols, rows, type, offset);
    put_padding(&b);
    b.size += 64;
    expect_refused(&b, what);
}

static void test_bad_tensors(void) {
    tensor_refused(0, 1, TYPE_F32, 0, "size of 0");
    tensor_refused(1, (uint64_t)1 << 31, TYPE_F32, 0, "above 2147483647");
    tensor_refused(INT32_MAX, INT32_MAX, TYPE_F32, 0, "more elements than a file can hold");
    tensor_refused(17, 1, TYPE_F32, 0, "needs 68 bytes, and 64 are left");
    tensor_refused(16, 2, TYPE_Q8_0, 0, "is q8_0 with rows of no multiple of 32");
    tensor_refused(128, 2, 12, 0, "is q4_k with rows of no multiple of 256");
    tensor_refused(256, 1, 12, 0, "needs 144 bytes, and 64 are left");
    tensor_refused(8, 1, 99, 32, "at offset 32, expected at 0");
    tensor_refused(8, 1, TYPE_F32, 32, "at offset 32, expected at 0");
    tensor_refused(8, 1, TYPE_F32, UINT64_MAX, "expected at 0");
    Builder b;
    put_header(&b, 2, 0);
    put_tensor(&b, "x", 1, 1, TYPE_F32, 0);
    put_tensor(&b, "x", 1, 1, TYPE_F32, 32);
    put_padding(&b);
    b.size += 64;
    expect_refused(&b, "tensor \"x\" appears twice");
    put_header(&b, 2, 0);
    put_tensor(&b, "x", 1, 1, TYPE_F32, 0);
    put_tensor(&b, "y", 1, 1, TYPE_F32, 0);
    put_padding(&b);
    b.size += 64;
    expect_refused(&b, "tensor \"y\" is at offset 0, expected at 32");
    put_header(&b, 1, 0);
    put_string(&b, "x");
    put_u32(&b, 6);
    b.size += 64;
    expect_refused(&b, "more than 5");
    put_header(&b, 2, 0);
    put_tensor(&b, "x", 1, 1, 99, 0);
    put_tensor(&b, "y", 1, 1, TYPE_F32, 1000);
    put_padding(&b);
    b.size += 64;
    expect_refused(&b, "tensor \"x\" needs 1000 bytes, and 64 are left");
}

/* The hash table must find each of 300 names, and none of 300 others. */
static void test_many_names(void) {
    enum { COUNT = 300 };
    Builder b;
    char name[16];
    int right = 0;
    put_header(&b, 0, COUNT);
    for (int i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "n%d", i);
        put_key(&b, name, 5, (uint64_t)i, 4);
    }
    WeightFile *file;
    const char *why = weights_parse((Bytes){b.data, b.size}, "many", &file);
    CHECK(!why, "%s", why);
    if (why) return;
    for (int i = 0; i < 2 * COUNT; i++) {
        snprintf(name, sizeof name, "n%d", i);
        right += weights_int_or(file, name, -1) == (i < COUNT ? i : -1);
    }
    CHECK(right == 2 * COUNT, "%d of %d lookups are right", right, 2 * COUNT);
    weights_close(file);
}

/* ---------------------------------------------------------------- files that are made to be slow or large */

/* Names whose hashes, by index.c's FNV-1a, all choose the same of 2048 places; `next` is where the search goes on. */
static void colliding_name(char name[16], uint32_t *next) {
    for (uint64_t hash = 1;; ++*next) {
        int length = sprintf(name, "k%u", *next);
        hash = 14695981039346656037u;
        for (int i = 0; i < length; i++) hash = (hash ^ (uint8_t)name[i]) * 1099511628211u;
        if (!((hash ^ hash >> 32) & 2047)) break;
    }
    ++*next;
}

static void test_collisions(void) {
    char name[16];
    Builder b;
    for (int crowded = 0; crowded < 2; crowded++) {
        uint32_t next = 0;
        put_header(&b, 0, 600);
        for (int i = 0; i < 600; i++) {
            if (i < (crowded ? 257 : 100)) colliding_name(name, &next);
            else sprintf(name, "other%d", i);
            put_key(&b, name, VALUE_U8, 1, 1);
        }
        if (crowded) expect_refused(&b, "have equal hashes");
        else CHECK(!parse_copy(b.data, b.size), "100 names of one hash are refused: %s", parse_copy(b.data, b.size));
    }
}

/* A file of 1 GiB without a byte on disk behind its header, which counts as many tensors as would fit. */
static void test_sparse(void) {
    char *path = temporary_path("sparse.gguf");
    FILE *stream = fopen(path, "wb");
    WeightFile *file = NULL;
    Builder b;
    put_header(&b, 30000000, 0);
    bool made = stream && fwrite(b.data, 1, b.size, stream) == b.size && !fflush(stream) &&
                !ftruncate(fileno(stream), 1LL << 30);
    if (stream) fclose(stream);
    if (made) {
        memory_note();
        size_t before = memory_peak();
        const char *why = weights_open(path, &file);
        memory_note();
        CHECK(why && strstr(why, "tensor 1 has a name that is"), "a sparse file: %s", why ? why : "opened");
        CHECK(memory_peak() - before < 16 << 20, "a sparse file takes %zu bytes of memory", memory_peak() - before);
    }
    weights_close(file);
    remove(path);
    free(path);
}

void test_weights(void) {
    WeightFile *file;
    int blocks = 0;
    const char *why = weights_open(test_path("goldens/weights/tiny.gguf"), &file);
    CHECK(!why, "tiny.gguf: %s", why);
    if (!why) {
        test_keys(file);
        test_arrays(file);
        test_tensor(file, "f32", TYPE_F32);
        test_tensor(file, "f16", TYPE_F16);
        test_tensor(file, "bf16", TYPE_BF16);
        test_tensor(file, "q8_0", TYPE_Q8_0);
        for (Type t = 0; t < TYPE_BF16; t++)
            if (weight_type(t) && weight_type(t)->widen && weight_type(t)->block > 1 && t != TYPE_Q8_0)
                test_tensor(file, weight_type(t)->name, t), blocks++;
        CHECK(blocks == 9, "%d types of blocks are read, expected 9", blocks);
        test_shapes(file);
        test_deaths(file);
        test_info(file);
    }
    weights_close(file);
    why = weights_open(test_path("goldens/weights/foreign.gguf"), &file);
    CHECK(!why, "foreign.gguf: %s", why);
    if (!why) {
        test_foreign(file);
        expect_death(bind_foreign, file, "tensor \"of.iq4_xs\" is iq4_xs, expected f32, f16, q4_0, q4_1, q5_0, q5_1, "
                                         "q8_0, q2_k, q3_k, q4_k, q5_k, q6_k or bf16");
        expect_death(read_foreign, file, "tensor \"of.i8\" is i8, expected f32, f16, q4_0");
    }
    weights_close(file);
    test_unknown_type();
    test_collisions();
    test_sparse();
    why = weights_open("tests/no-such-file", &file);
    CHECK(why && !strcmp(why, "No such file or directory") && !file, "a missing file: %s", why);
    test_every_prefix();
    test_headers();
    test_bad_keys();
    test_bad_tensors();
    test_many_names();
}
