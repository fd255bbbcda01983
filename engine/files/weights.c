/* weights.c - reads weight files in the GGUF format. The file is mapped, and tensors are used in place.
 *
 *   "GGUF"  u32 version  u64 tensors  u64 keys
 *   keys:     string name, u32 type, value
 *   tensors:  string name, u32 n, u64 sizes[n] (innermost first), u32 type, u64 offset
 *   padding to `general.alignment`, then the data of each tensor, each padded likewise
 *   (string: u64 length, bytes; a value that is an array: u32 type, u64 count, elements)
 *
 * Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All numbers are little endian. Versions 2
 * and 3 are read; they have the same layout.
 *
 * The file is untrusted. weights_parse() checks everything; a file that has passed needs no further checks. Each count
 * is compared with the bytes that are left before memory is allocated, so a file of n bytes takes O(n) time and
 * memory. Tensors must follow each other without gaps, as every writer places them; this finds wrong sizes and offsets.
 * For --info, tensors of any type are accepted. weights_bind() refuses types that the kernels cannot read.
 *
 * A tensor is bound as a matrix (rows, cols). Its sizes are split at any point: the outer ones multiply to rows, the
 * inner ones to cols. A convolution kernel (O, I, t, h, w) is bound as (O, I*t*h*w). */
#include "engine/engine.h"

#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { OLDEST_VERSION = 2, VERSION = 3, DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 1 << 16 };

static const uint8_t value_bytes[VALUE_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

typedef struct {
    Bytes name;
    uint32_t type;
    WeightArray value; /* a single value is an array of 1 element */
} Key;

typedef struct {
    Bytes name;
    Type type;
    Shape shape;
    size_t bytes;
    const uint8_t *data;
} Tensor;

struct WeightFile {
    char *path;
    Bytes bytes;
    bool mapped;        /* false: the bytes are the caller's */
    struct stat opened; /* at the time of weights_open() */
    Key *keys;
    Tensor *tensors;
    size_t key_count, tensor_count, alignment;
    Index key_index, tensor_index;
    void **copies; /* made by weights_floats() and weights_string_or() */
    size_t copy_count;
};

/* ---------------------------------------------------------------- names */

static const Key *find_key(const WeightFile *file, const char *name) {
    Bytes bytes = {(const uint8_t *)name, strlen(name)};
    int32_t at = index_find(&file->key_index, bytes);
    return at < 0 ? NULL : &file->keys[at];
}

static const Tensor *find_tensor(const WeightFile *file, const char *name) {
    Bytes bytes = {(const uint8_t *)name, strlen(name)};
    int32_t at = index_find(&file->tensor_index, bytes);
    return at < 0 ? NULL : &file->tensors[at];
}

/* ---------------------------------------------------------------- parsing */

/* The bytes that are left to read. Each take_ function reads a value from the front; if too few bytes are left, it
 * returns false and reads nothing. */
typedef struct {
    const uint8_t *at;
    size_t left;
} Reader;

static bool take(Reader *reader, size_t bytes, const uint8_t **out) {
    if (bytes > reader->left) return false;
    *out = reader->at;
    reader->at += bytes;
    reader->left -= bytes;
    return true;
}

static uint64_t little_endian(const uint8_t *p, int bytes) {
    uint64_t value = 0;
    for (int i = bytes; i-- > 0;) value = value << 8 | p[i];
    return value;
}

static bool take_u32(Reader *reader, uint32_t *out) {
    const uint8_t *p;
    if (!take(reader, 4, &p)) return false;
    *out = (uint32_t)little_endian(p, 4);
    return true;
}

static bool take_u64(Reader *reader, uint64_t *out) {
    const uint8_t *p;
    if (!take(reader, 8, &p)) return false;
    *out = little_endian(p, 8);
    return true;
}

static bool take_string(Reader *reader, Bytes *out) {
    uint64_t length;
    Reader before = *reader;
    if (take_u64(reader, &length) && length <= reader->left && take(reader, (size_t)length, &out->data)) {
        out->size = (size_t)length;
        return true;
    }
    *reader = before;
    return false;
}

/* The two arguments of "%.*s" that print a name, cut to MAX_TENSOR_NAME bytes. */
#define NAMED(bytes) (int)((bytes).size < MAX_TENSOR_NAME ? (bytes).size : MAX_TENSOR_NAME), (const char *)(bytes).data

/* A name has 1 to MAX_TENSOR_NAME - 1 bytes, all printable: it stays on one line and sends no escape sequence. */
#define BAD_NAME "empty, longer than 255 bytes or not printable"
static bool good_name(Bytes name) {
    if (name.size == 0 || name.size >= MAX_TENSOR_NAME) return false;
    for (size_t n; name.size; name.data += n, name.size -= n)
        if (!is_printable(name, &n)) return false;
    return true;
}

static const char *take_elements(Reader *reader, WeightArray *out) {
    const uint8_t *start = reader->at;
    uint8_t size = value_bytes[out->type];
    if (size && out->count > reader->left / size) return "is longer than the file";
    if (size) take(reader, out->count * size, &out->data);
    for (size_t i = 0; !size && i < out->count; i++) {
        Bytes string;
        if (!take_string(reader, &string)) return "has a string that is longer than the file";
    }
    out->data = start;
    for (size_t i = 0; out->type == VALUE_BOOL && i < out->count; i++)
        if (start[i] > 1) return "is a boolean that is neither 0 nor 1";
    return NULL;
}

static const char *take_value(Reader *reader, Key *key) {
    uint64_t count = 1;
    if (!take_u32(reader, &key->type)) return "is cut off";
    uint32_t type = key->type;
    if (type == VALUE_ARRAY && (!take_u32(reader, &type) || !take_u64(reader, &count))) return "is cut off";
    if (type >= VALUE_TYPES || type == VALUE_ARRAY) return "is of an unknown type";
    if (count > reader->left) return "has more elements than the file has bytes";
    key->value = (WeightArray){NULL, type, (size_t)count};
    return take_elements(reader, &key->value);
}

#define CROWDED "more than 256 names have equal hashes: the file was made to be slow to open"

/* Checks the keys and, if there is an array for them, stores them. */
static const char *parse_keys(WeightFile *file, Reader *reader) {
    for (size_t i = 0; i < file->key_count; i++) {
        Key only_checked, *key = file->keys ? &file->keys[i] : &only_checked;
        if (!take_string(reader, &key->name))
            return reason("key %zu of %zu is cut off", i + 1, file->key_count);
        if (!good_name(key->name)) return reason("key %zu has a name that is " BAD_NAME, i + 1);
        const char *why = take_value(reader, key);
        if (why) return reason("key \"%.*s\" %s", NAMED(key->name), why);
        if (!file->keys) continue;
        if (index_add(&file->key_index, (int32_t)i) >= 0)
            return reason("key \"%.*s\" appears twice", NAMED(key->name));
        if (file->key_index.crowded) return CROWDED;
    }
    return NULL;
}

#define MAX_ELEMENTS (SIZE_MAX / 65536) /* so that no later product with a few bytes overflows */

/* Reverses the sizes: in the file the innermost is first, in a Shape the outermost. The bytes of an unknown type follow
 * from the offset of the next tensor, so place_tensors() sets them. */
static const char *check_sizes(Tensor *tensor, const uint64_t *sizes) {
    Shape *shape = &tensor->shape;
    uint64_t count = 1;
    for (int d = 0; d < shape->n; d++) {
        if (sizes[d] == 0 || sizes[d] > INT_MAX) return "has a size of 0 or above 2147483647";
        if (sizes[d] > MAX_ELEMENTS / count) return "has more elements than a file can hold";
        count *= sizes[d];
        shape->d[shape->n - 1 - d] = (int)sizes[d];
    }
    const WeightType *type = weight_type(tensor->type);
    if (!type) return NULL;
    if (sizes[0] % (uint64_t)type->block)
        return reason("is %s with rows of no multiple of %d", type->name, type->block);
    tensor->bytes = type_bytes(tensor->type, (size_t)count);
    return NULL;
}

static const char *take_tensor(Reader *reader, Tensor *tensor, uint64_t *offset) {
    uint32_t n, type;
    uint64_t sizes[MAX_DIMS];
    if (!take_u32(reader, &n)) return "is cut off";
    if (n > MAX_DIMS) return "has more than 5 dimensions";
    for (uint32_t d = 0; d < n; d++)
        if (!take_u64(reader, &sizes[d])) return "is cut off";
    if (!take_u32(reader, &type) || !take_u64(reader, offset)) return "is cut off";
    if (n == 0) sizes[n++] = 1; /* a single number */
    tensor->shape.n = (int)n;
    tensor->type = (Type)type;
    return check_sizes(tensor, sizes);
}

/* Offsets count from the start of the data, which is known after the last tensor's name. They are kept until then. */
static const char *parse_tensors(WeightFile *file, Reader *reader, uint64_t *offsets) {
    for (size_t i = 0; i < file->tensor_count; i++) {
        uint64_t offset;
        Tensor only_checked, *tensor = offsets ? &file->tensors[i] : &only_checked;
        if (!take_string(reader, &tensor->name))
            return reason("tensor %zu of %zu is cut off", i + 1, file->tensor_count);
        if (!good_name(tensor->name)) return reason("tensor %zu has a name that is " BAD_NAME, i + 1);
        const char *why = take_tensor(reader, tensor, offsets ? &offsets[i] : &offset);
        if (why) return reason("tensor \"%.*s\" %s", NAMED(tensor->name), why);
        if (!offsets) continue;
        if (index_add(&file->tensor_index, (int32_t)i) >= 0)
            return reason("tensor \"%.*s\" appears twice", NAMED(tensor->name));
        if (file->tensor_index.crowded) return CROWDED;
    }
    return NULL;
}

static bool skip_padding(Reader *reader, const uint8_t *start, size_t alignment) {
    size_t past = (size_t)(reader->at - start) % alignment;
    const uint8_t *padding;
    return take(reader, past ? alignment - past : 0, &padding);
}

static const char *place_tensors(WeightFile *file, Reader *reader, const uint8_t *start,
                                 const uint64_t *offsets) {
    if (file->tensor_count && !skip_padding(reader, start, file->alignment))
        return "the file ends before the tensors' data";
    const uint8_t *base = reader->at;
    for (size_t i = 0; i < file->tensor_count; i++) {
        Tensor *tensor = &file->tensors[i];
        uint64_t expected = (uint64_t)(reader->at - base);
        if (offsets[i] != expected)
            return reason("tensor \"%.*s\" is at offset %" PRIu64 ", expected at %" PRIu64,
                          NAMED(tensor->name), offsets[i], expected);
        bool last = i + 1 == file->tensor_count;
        if (!weight_type(tensor->type)) tensor->bytes = last ? reader->left : (size_t)(offsets[i + 1] - offsets[i]);
        if (!take(reader, tensor->bytes, &tensor->data))
            return reason("tensor \"%.*s\" needs %zu bytes, and %zu are left: the file is cut off or damaged",
                          NAMED(tensor->name), tensor->bytes, reader->left);
        if (!last && !skip_padding(reader, start, file->alignment))
            return reason("the file ends after tensor \"%.*s\"", NAMED(tensor->name));
    }
    return NULL;
}

static const char *read_alignment(WeightFile *file) {
    const Key *key = find_key(file, "general.alignment");
    file->alignment = DEFAULT_ALIGNMENT;
    if (!key) return NULL;
    uint64_t value = key->type == VALUE_U32 ? little_endian(key->value.data, 4) : 0;
    if (value < 8 || value > MAX_ALIGNMENT || value & (value - 1))
        return "key \"general.alignment\" is not a u32 that is a power of two from 8 to 65536";
    file->alignment = (size_t)value;
    return NULL;
}

/* The reason for refusing a file that is not GGUF: what it is instead. */
static const char *what_it_is(Reader start) {
    static const char *const kinds[][2] = {
        {"PK\3\4", "a PyTorch file (.pth): convert it with export.py"},
        {"\x80\2", "a PyTorch file (.pth): convert it with export.py"},
        {"version https://git-lfs", "a Git LFS pointer: git lfs pull fetches the file itself"},
        {"<!DOCTYPE", "an HTML page"},
        {"<html", "an HTML page"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        size_t length = strlen(kinds[i][0]);
        if (start.left >= length && !memcmp(start.at, kinds[i][0], length)) return reason("this is %s", kinds[i][1]);
    }
    uint64_t header;
    if (take_u64(&start, &header) && header && header <= start.left && *start.at == '{')
        return "this is a safetensors file: convert it with export.py";
    return "this is not a GGUF file; export.py converts a checkpoint to one";
}

/* A key has at least 14 bytes, a tensor at least 33. Counts that need more bytes than the file has are refused. */
static const char *take_header(WeightFile *file, Reader *reader) {
    const uint8_t *magic;
    uint32_t version;
    uint64_t tensors, keys;
    Reader start = *reader;
    if (!take(reader, 4, &magic) || memcmp(magic, "GGUF", 4)) return what_it_is(start);
    if (!take_u32(reader, &version)) return "the file is cut off";
    if (version < OLDEST_VERSION || version > VERSION)
        return reason("GGUF version %" PRIu32 "%s, expected 3", version, version << 16 ? "" : " (big-endian)");
    if (!take_u64(reader, &tensors) || !take_u64(reader, &keys)) return "the file is cut off";
    if (tensors > reader->left / 33 || keys > reader->left / 14 || tensors > INT32_MAX || keys > INT32_MAX)
        return reason("%" PRIu64 " tensors and %" PRIu64 " keys do not fit into the file", tensors, keys);
    file->tensor_count = (size_t)tensors;
    file->key_count = (size_t)keys;
    return NULL;
}

static const char *parse(WeightFile *file, Bytes bytes) {
    Reader reader = {bytes.data, bytes.size};
    const char *why = take_header(file, &reader);
    Reader checked = reader; /* memory is allocated only for names that are there */
    if (!why) why = parse_keys(file, &checked);
    if (!why) why = parse_tensors(file, &checked, NULL);
    if (why) return why;
    file->keys = allocate(file->key_count * sizeof(Key));
    file->tensors = allocate(file->tensor_count * sizeof(Tensor));
    file->key_index = index_new(file->key_count, file->keys, sizeof(Key));
    file->tensor_index = index_new(file->tensor_count, file->tensors, sizeof(Tensor));
    uint64_t *offsets = allocate(file->tensor_count * sizeof *offsets);
    why = parse_keys(file, &reader);
    if (!why) why = read_alignment(file);
    if (!why) why = parse_tensors(file, &reader, offsets);
    if (!why) why = place_tensors(file, &reader, bytes.data, offsets);
    free(offsets);
    return why;
}

const char *weights_parse(Bytes bytes, const char *path, WeightFile **out) {
    WeightFile *file = allocate(sizeof *file);
    file->path = format_string("%s", path);
    file->bytes = bytes;
    const char *why = parse(file, bytes);
    *out = why ? NULL : file;
    if (why) weights_close(file);
    return why;
}

const char *weights_open(const char *path, WeightFile **out) {
    Bytes bytes;
    struct stat status;
    *out = NULL;
    if (!stat(path, &status) && S_ISDIR(status.st_mode)) return "this is a folder: convert it with export.py";
    const char *why = map_file(path, &bytes);
    if (why) return why;
    why = weights_parse(bytes, path, out);
    if (why) {
        unmap_file(bytes);
        return why;
    }
    (*out)->mapped = true;
    if (stat(path, &(*out)->opened)) (*out)->opened = (struct stat){.st_size = 0};
    return NULL;
}

/* If the path names another file by now (another inode), nothing is wrong: the mapped one still exists. */
void weights_require_unchanged(const WeightFile *file) {
    struct stat now;
    const struct stat *then = &file->opened;
    if (!file->mapped || stat(file->path, &now) || now.st_dev != then->st_dev || now.st_ino != then->st_ino) return;
    if (now.st_size != then->st_size || now.st_mtim.tv_sec != then->st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != then->st_mtim.tv_nsec)
        weights_refuse(file, "it was written to while it was read");
}

void weights_digest(const WeightFile *file, char hex[65]) {
    const Tensor *first = file->tensor_count ? file->tensors : NULL;
    size_t header = first ? (size_t)(first->data - file->bytes.data) : file->bytes.size;
    Sha256 sha;
    sha256_start(&sha);
    sha256_add(&sha, &file->bytes.size, sizeof file->bytes.size);
    sha256_add(&sha, file->bytes.data, header);
    sha256_finish(&sha, hex);
}

void weights_close(WeightFile *file) {
    if (!file) return;
    for (size_t i = 0; i < file->copy_count; i++) free(file->copies[i]);
    free(file->copies);
    free(file->key_index.places);
    free(file->tensor_index.places);
    free(file->keys);
    free(file->tensors);
    free(file->path);
    if (file->mapped) unmap_file(file->bytes);
    free(file);
}

/* ---------------------------------------------------------------- tensors */

/* Whether some of the inner sizes multiply to cols and the others to rows. */
static bool splits_into(const Tensor *tensor, int rows, int cols) {
    const Shape *shape = &tensor->shape;
    int d = shape->n - 1;
    size_t inner = (size_t)shape->d[d];
    while (d > 0 && inner < (size_t)cols) inner *= (size_t)shape->d[--d];
    return inner == (size_t)cols && shape_count(shape) == (size_t)rows * (size_t)cols;
}

void weights_refuse(const WeightFile *file, const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    die(STATUS_USAGE, "%s: %s", file->path, text);
}

void tensor_name(char name[MAX_TENSOR_NAME], const char *format, va_list arguments) {
    int length = vsnprintf(name, MAX_TENSOR_NAME, format, arguments);
    if (length >= MAX_TENSOR_NAME)
        die(STATUS_USAGE, "tensor \"%.60s...\": a name of %d bytes, expected less than %d", name, length,
            MAX_TENSOR_NAME);
}

#define FORMAT_NAME(name, format)             \
    char name[MAX_TENSOR_NAME];               \
    do {                                      \
        va_list arguments;                    \
        va_start(arguments, format);          \
        tensor_name(name, format, arguments); \
        va_end(arguments);                    \
    } while (0)

static const Tensor *need_tensor(const WeightFile *file, const char *name) {
    const Tensor *tensor = find_tensor(file, name);
    if (!tensor) weights_refuse(file, "tensor \"%s\" is missing", name);
    const WeightType *type = weight_type(tensor->type);
    if (!type || !type->widen)
        weights_refuse(file, "tensor \"%s\" is %s, expected %s", name,
                       type ? type->name : "of an unknown type", types_read());
    return tensor;
}

/* Adds a copy to those that weights_close() frees. The cast removes const: the file's content does not change. */
static void *keep_copy(const WeightFile *file, void *copy) {
    WeightFile *owner = (WeightFile *)file;
    owner->copies = reallocate(owner->copies, (owner->copy_count + 1) * sizeof(void *));
    return owner->copies[owner->copy_count++] = copy;
}

Weight weights_bind(const WeightFile *file, int rows, int cols, const char *format, ...) {
    FORMAT_NAME(name, format);
    const Tensor *tensor = need_tensor(file, name);
    char shape[64];
    if (!splits_into(tensor, rows, cols))
        weights_refuse(file, "tensor \"%s\" has shape %s, expected [%d, %d]", name,
            shape_string(&tensor->shape, shape), rows, cols);
    return (Weight){tensor->data, tensor->type, rows, cols};
}

const float *weights_floats(const WeightFile *file, int count, const char *format, ...) {
    FORMAT_NAME(name, format);
    const Tensor *tensor = need_tensor(file, name);
    char shape[64];
    if (shape_count(&tensor->shape) != (size_t)count)
        weights_refuse(file, "tensor \"%s\" has shape %s, expected %d elements", name,
            shape_string(&tensor->shape, shape), count);
    if (tensor->type == TYPE_F32) return (const float *)(const void *)tensor->data;
    float *copy = keep_copy(file, allocate((size_t)count * sizeof(float)));
    weight_row(&(Weight){tensor->data, tensor->type, 1, count}, 0, copy);
    return copy;
}

void weight_row(const Weight *weight, int row, float *out) {
    weight_part(weight, (size_t)row * (size_t)weight->cols, weight->cols, out);
}

/* ---------------------------------------------------------------- keys */

static const uint8_t *element(const WeightArray *array, size_t index) {
    return array->data + index * value_bytes[array->type];
}

static bool is_integer(uint32_t type) {
    return type <= VALUE_I32 || type == VALUE_U64 || type == VALUE_I64;
}

static bool is_number(uint32_t type) {
    return is_integer(type) || type == VALUE_F32 || type == VALUE_F64;
}

static bool is_bool(uint32_t type) { return type == VALUE_BOOL; }

static bool is_string(uint32_t type) { return type == VALUE_STRING; }

bool array_is_number(const WeightArray *array) { return is_number(array->type); }

int64_t array_int(const WeightArray *array, size_t index) {
    int bytes = value_bytes[array->type];
    if (!is_integer(array->type)) return 0;
    uint64_t value = little_endian(element(array, index), bytes);
    bool is_signed = array->type == VALUE_I8 || array->type == VALUE_I16 || array->type == VALUE_I32;
    uint64_t sign = (uint64_t)1 << (8 * bytes - 1);
    return (int64_t)(is_signed ? (value ^ sign) - sign : value);
}

double array_double(const WeightArray *array, size_t index) {
    uint64_t bits = little_endian(element(array, index), value_bytes[array->type]);
    uint32_t half = (uint32_t)bits;
    float single;
    double value;
    memcpy(&single, &half, sizeof single);
    memcpy(&value, &bits, sizeof value);
    if (array->type == VALUE_F32) return single;
    return array->type == VALUE_F64 ? value : (double)array_int(array, index);
}

Bytes next_string(const uint8_t **cursor) {
    Bytes string = {*cursor + 8, (size_t)little_endian(*cursor, 8)};
    *cursor = string.data + string.size;
    return string;
}

/* Returns the key, or NULL if it is missing. Dies if its type is wrong. */
static const Key *typed_key(const WeightFile *file, const char *name, bool (*fits)(uint32_t type),
                            const char *what) {
    const Key *key = find_key(file, name);
    if (key && !fits(key->type)) weights_refuse(file, "key \"%s\" is not %s", name, what);
    return key;
}

static const Key *integer_key(const WeightFile *file, const char *name) {
    return typed_key(file, name, is_integer, "an integer");
}

static const Key *number_key(const WeightFile *file, const char *name) {
    return typed_key(file, name, is_number, "a number");
}

/* Returns the key. Dies if it is missing. */
static const Key *needed(const WeightFile *file, const char *name, const Key *key) {
    if (!key) weights_refuse(file, "key \"%s\" is missing", name);
    return key;
}

int64_t weights_int(const WeightFile *file, const char *name) {
    return array_int(&needed(file, name, integer_key(file, name))->value, 0);
}

int64_t weights_int_or(const WeightFile *file, const char *name, int64_t fallback) {
    const Key *key = integer_key(file, name);
    return key ? array_int(&key->value, 0) : fallback;
}

static int check_size(const WeightFile *file, const char *name, int64_t size, int most) {
    if (size < 1 || size > most)
        weights_refuse(file, "key \"%s\" is %" PRId64 ", expected 1 to %d", name, size, most);
    return (int)size;
}

int weights_size(const WeightFile *file, const char *name, int most) {
    return check_size(file, name, weights_int(file, name), most);
}

int weights_size_or(const WeightFile *file, const char *name, int most, int fallback) {
    const Key *key = integer_key(file, name);
    return key ? check_size(file, name, array_int(&key->value, 0), most) : fallback;
}

void weights_sizes(const WeightFile *file, const char *name, int most, int *out, int count) {
    WeightArray array;
    if (!weights_array(file, name, &array) || !is_integer(array.type) || array.count != (size_t)count)
        weights_refuse(file, "key \"%s\" is not an array of %d integers", name, count);
    for (int i = 0; i < count; i++) out[i] = check_size(file, name, array_int(&array, (size_t)i), most);
}

double weights_double(const WeightFile *file, const char *name) {
    return array_double(&needed(file, name, number_key(file, name))->value, 0);
}

double weights_double_or(const WeightFile *file, const char *name, double fallback) {
    const Key *key = number_key(file, name);
    return key ? array_double(&key->value, 0) : fallback;
}

bool weights_bool_or(const WeightFile *file, const char *name, bool fallback) {
    const Key *key = typed_key(file, name, is_bool, "a boolean");
    return key ? key->value.data[0] != 0 : fallback;
}

const char *weights_string_or(const WeightFile *file, const char *name, const char *fallback) {
    const Key *key = typed_key(file, name, is_string, "a string");
    if (!key) return fallback;
    const uint8_t *cursor = key->value.data;
    Bytes string = next_string(&cursor);
    char *copy = keep_copy(file, allocate(string.size + 1));
    memcpy(copy, string.data, string.size);
    return copy;
}

bool weights_has(const WeightFile *file, const char *name) { return find_key(file, name) || find_tensor(file, name); }

bool weights_array(const WeightFile *file, const char *name, WeightArray *out) {
    const Key *key = find_key(file, name);
    if (!key || key->type != VALUE_ARRAY) return false;
    *out = key->value;
    return true;
}

/* ---------------------------------------------------------------- --info */

/* Prints a string from the file in quotes, on one line, cut after 100 bytes: it may be a whole tokenizer. */
static void print_text(Bytes text, FILE *out) {
    enum { SHOWN = 100 };
    size_t n, shown = 0;
    fputc('"', out);
    for (; text.size && shown < SHOWN; text.data += n, text.size -= n, shown += n) {
        if (is_printable(text, &n)) fwrite(text.data, 1, n, out);
        else fputc(' ', out);
    }
    fputs(text.size ? "...\"" : "\"", out);
}

static void print_element(const WeightArray *array, size_t index, const uint8_t **cursor, FILE *out) {
    if (array->type == VALUE_STRING) print_text(next_string(cursor), out);
    else if (array->type == VALUE_BOOL) fputs(array->data[index] ? "true" : "false", out);
    else if (is_integer(array->type)) fprintf(out, "%" PRId64, array_int(array, index));
    else fprintf(out, "%.9g", array_double(array, index));
}

static void print_key(const Key *key, FILE *out) {
    enum { SHOWN = 16 };
    const uint8_t *cursor = key->value.data;
    fprintf(out, "%-44.*s ", NAMED(key->name));
    if (key->type == VALUE_ARRAY) fprintf(out, "%zu: ", key->value.count);
    for (size_t i = 0; i < key->value.count && i < SHOWN; i++) {
        if (i) fputs(", ", out);
        print_element(&key->value, i, &cursor, out);
    }
    fputs(key->value.count > SHOWN ? ", ...\n" : "\n", out);
}

void weights_print(const WeightFile *file, FILE *out) {
    double elements = 0, bytes = 0;
    char shape[64];
    for (size_t i = 0; i < file->key_count; i++) print_key(&file->keys[i], out);
    for (size_t i = 0; i < file->tensor_count; i++) {
        const Tensor *tensor = &file->tensors[i];
        const WeightType *type = weight_type(tensor->type);
        fprintf(out, "%-60.*s %-7s %s\n", NAMED(tensor->name),
                type ? type->name : reason("type %d", (int)tensor->type), shape_string(&tensor->shape, shape));
        elements += (double)shape_count(&tensor->shape);
        bytes += (double)tensor->bytes;
    }
    fprintf(out, "%zu keys, %zu tensors, %.0f parameters, %.1f MiB\n", file->key_count, file->tensor_count,
            elements, bytes / 1048576);
}
