/* engine.h - declares everything in engine/: memory, files, text, weight files, arithmetic. Nothing in engine/ knows
 * what a video model is.
 *
 *   base/        errors, memory, output files, clock, threads, hash table, profile, progress line
 *   text/        UTF-8, HTML character references, Unicode normalization, normalization for a tokenizer
 *   files/       GGUF weight files, .npy arrays, --dump, --check and --feed, SHA-256, JSON
 *   arithmetic/  number types, kernels, matrix products, attention, row operations, random numbers
 *
 * Below is one section for each .c file.
 *
 * Errors. A function that parses bytes from outside returns NULL on success, else the reason: one line, in a static
 * buffer that the next call of reason() overwrites. The caller adds the name of the file. Every other error calls
 * die(), which prints one line and exits. */
#ifndef ENGINE_H
#define ENGINE_H

#include <float.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* Weights and clips exceed 4 GiB. Numbers in mapped files are read in the machine's byte order. */
_Static_assert(SIZE_MAX >= UINT64_MAX, "a 64-bit machine is needed");
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian machine is needed"
#endif

/* Results are bit-exact, so every float operator must round once, to float32. This refuses the compiler options that
 * break this rule and that show in a macro. kernels_choose() tests for the others when the program starts. */
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compile without -ffast-math, -Ofast and their parts: they change results"
#endif
#if FLT_EVAL_METHOD != 0
#error "arithmetic of float must round to float: on x86, compile for SSE2"
#endif

/* ---------------------------------------------------------------- util.c: errors, memory, files */

enum { STATUS_OK = 0, STATUS_CHECK = 1, STATUS_USAGE = 2, STATUS_RESOURCE = 3, STATUS_INTERRUPTED = 130 };

#if defined(__GNUC__)
#define PRINTF_LIKE(string, rest) __attribute__((format(printf, string, rest)))
#else
#define PRINTF_LIKE(string, rest)
#endif
/* Prints "sora: MESSAGE" as one line on standard error, removes unfinished output files, exits with `status`. */
_Noreturn void die(int status, const char *format, ...) PRINTF_LIKE(2, 3);
void warn(const char *format, ...) PRINTF_LIKE(1, 2); /* "sora: warning: ..." on standard error */
/* Formats a reason into one static buffer and returns it. Control characters become '?'. An argument may be the
 * previous reason. */
const char *reason(const char *format, ...) PRINTF_LIKE(1, 2);

void *allocate(size_t bytes);              /* zeroed, 64-byte aligned; free() it; out of memory: dies */
void *reallocate(void *p, size_t bytes);   /* like realloc(), without that alignment; out of memory: dies */
char *format_string(const char *format, ...) PRINTF_LIKE(1, 2); /* a new string; free() it */

/* A memory region from which buffers are taken front to back and which is freed as a whole. An arena whose base is
 * NULL only counts bytes. The function that takes a stage's buffers runs on such an arena first: `used` is then the
 * size to open. */
typedef struct {
    char *base;
    size_t used, size;
} Arena;
void *arena_take(Arena *arena, size_t bytes); /* 64-byte aligned; NULL if base is NULL */
float *arena_floats(Arena *arena, size_t count);
Arena arena_open(size_t bytes); /* zeroed; out of memory: dies */
void arena_close(Arena *arena);

typedef struct {
    const uint8_t *data;
    size_t size;
} Bytes;
static inline Bytes tail(Bytes text, size_t from) { return (Bytes){text.data + from, text.size - from}; }
/* Maps a regular file, not empty, read-only. Returns NULL or the reason. */
const char *map_file(const char *path, Bytes *out);
void unmap_file(Bytes bytes);
/* Opens a file for reading; "-" is standard input. Returns NULL with errno set. */
FILE *input_open(const char *path);
/* Reads what input_open() opens, at most `limit` bytes. free() out->data. Returns NULL or the reason. */
const char *read_file(const char *path, size_t limit, Bytes *out);

bool same_file(const char *a, const char *b); /* both paths exist and are the same regular file or folder */

/* An output file. It is written as PATH.part and renamed to PATH when it is complete. Standard output ("-") and
 * paths that are not regular files (/dev/null) are written directly. A failed write dies with STATUS_RESOURCE, and so
 * does opening a file that another process is writing. */
typedef struct {
    FILE *stream;
    char *path, *temporary; /* temporary: the .part path; NULL if written directly */
} OutputFile;
OutputFile output_open(const char *path);
OutputFile output_continue(const char *path); /* with what an earlier run wrote, which is protected (outputs_note) */
void output_cut(OutputFile *out, size_t bytes); /* truncates it; what is written next follows; not for "-" */
void output_write(OutputFile *out, const void *data, size_t bytes);
void output_write_at(OutputFile *out, size_t offset, const void *data, size_t bytes); /* not to "-" */
void output_flush(OutputFile *out);
void output_sync(OutputFile *out); /* until it is on disk */
void output_commit(OutputFile *out);
void outputs_discard(bool all); /* removes the .part files, protected ones only with `all`; async-signal-safe */
/* Adds a file to those that die() and the signal handler remove, or changes its entry. A protected file stays, except
 * after STATUS_CHECK, when resuming would fail in the same way. The pointer is kept until outputs_forget(path). */
void outputs_note(char *path, bool protect);
void outputs_forget(const char *path);
void outputs_advise(const char *format, ...) PRINTF_LIKE(1, 2); /* appended to the last line of a run that fails */
/* Opens /dev/null in place of each closed standard stream, in the wrong direction: reading or writing the stream still
 * fails. Otherwise the next file opened would get descriptor 0, 1 or 2, and messages would be written into it. */
void standard_streams_keep(void);
/* Installs the signal handlers. SIGINT, SIGTERM and SIGHUP: remove the .part files, exit with STATUS_INTERRUPTED.
 * SIGBUS (a mapped file became shorter): the same with STATUS_USAGE. SIGPIPE, SIGXFSZ: the write fails instead. */
void interrupts_catch(void);

/* For sizes and counts, far below the limits of their types. */
static inline int smaller(int a, int b) { return a < b ? a : b; }
static inline int larger(int a, int b) { return a > b ? a : b; }
static inline size_t larger_size(size_t a, size_t b) { return a > b ? a : b; }
static inline int ceiling(int a, int b) { return (a + b - 1) / b; } /* a / b, rounded up */
static inline int round_up(int a, int b) { return ceiling(a, b) * b; } /* to a multiple of b */
enum { CACHE_LINE = 64 }; /* bytes; the widest vector has as many */
/* Rounds up to whole cache lines. */
static inline size_t whole_lines(size_t bytes) { return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

/* ---------------------------------------------------------------- system.c: time, memory, processors */

double seconds(void);            /* of a monotonic clock */
size_t memory_available(void);   /* bytes this process can allocate without swapping; SIZE_MAX if unknown */
size_t memory_peak(void);        /* the most resident bytes so far, without mapped files */
void memory_note(void);          /* measures for memory_peak(); called before memory is freed */
int processors_available(void);  /* cores that this process may use, by its affinity mask and quota; at least 1 */
void system_root(const char *path); /* for tests: reads PATH/proc and PATH/sys instead */

/* ---------------------------------------------------------------- threads.c: parallel loops */

enum { MAX_THREADS = 512 };
int threads_default(void);     /* OMP_NUM_THREADS if it is set, else processors_available() */
void threads_set(int count);   /* starts the threads; dies with STATUS_RESOURCE if it cannot */
int threads_count(void);       /* 1 before threads_set() */
int thread_index(void);        /* of the calling thread, 0 to threads_count() - 1 */

/* PARALLEL_FOR (int l = 0; l < L; l++) statement
 * is a loop whose iterations run on all threads. They start in order, but no iteration may depend on another. Every
 * thread counts through the whole loop and runs the iterations that it claims: each claim is the first unclaimed one.
 * A PARALLEL_FOR inside another runs on the calling thread alone. */
#ifdef _OPENMP
typedef struct {
    size_t at, mine; /* iterations, counted from 1: the one this thread has reached; its latest claim */
} Turn;
size_t thread_claim(void);
static inline bool is_mine(Turn *turn) {
    if (turn->mine < turn->at) turn->mine = thread_claim();
    return turn->at++ == turn->mine;
}
#define PARALLEL_FOR(...)                                                                                             \
    _Pragma("omp parallel") for (Turn turn_ = {1, 0}; turn_.at; turn_.at = 0) for (__VA_ARGS__) if (is_mine(&turn_))
#else
#define PARALLEL_FOR(...) for (__VA_ARGS__)
#endif

/* PARALLEL_ROWS(l, L, n) statement
 * is PARALLEL_FOR (int l = 0; l < L; l++) for rows of n floats, of which a thread claims as many as make up a PIECE. */
enum { PIECE = 1 << 12 };
#define PARALLEL_ROWS(l, L, n)                                                                                        \
    PARALLEL_FOR (int first_ = 0, each_ = PIECE / (n) + 1, rows_ = (L); first_ < rows_; first_ += each_)              \
        for (int l = first_; l < smaller(first_ + each_, rows_); l++)

/* ---------------------------------------------------------------- index.c: a hash table of names */

/* Maps a name to the number of an entry. The entries are the caller's array: element i is at names + i*stride and
 * begins with its name as a Bytes. The array must not move. A place holds the number of an entry, or -1 if it is free.
 * free() the places. */
typedef struct {
    int32_t *places;
    size_t mask;
    const void *names;
    size_t stride, longest; /* longest: bytes of the longest name */
    bool crowded;           /* a name could not be added: too many have its hash */
} Index;
Index index_new(size_t count, const void *names, size_t stride); /* for at most `count` names */
int32_t index_add(Index *index, int32_t entry);     /* returns the entry of the same name that it replaces, or -1 */
int32_t index_find(const Index *index, Bytes name); /* -1: no such name */

/* Iterates over the names that a text begins with, the shortest first. */
typedef struct {
    const Index *index;
    Bytes text;
    size_t size; /* bytes of the latest name */
    uint64_t hash;
} Prefixes;
Prefixes index_prefixes(const Index *index, Bytes text);
int32_t prefixes_next(Prefixes *walk); /* the next name's entry; -1 after the last */
/* The longest name that a text begins with. Returns its entry, and its bytes in *size; -1 and 0 if there is none. */
int32_t index_longest(const Index *index, Bytes text, size_t *size);

/* ---------------------------------------------------------------- profile.c: time of each stage */

typedef enum { LOAD, TEXT_ENCODER, TRANSFORMER, SAMPLER, VAE_ENCODE, VAE_DECODE, OUTPUT, STAGES } Stage;
void profile_begin(Stage stage);
void profile_end(Stage stage);
void profile_resume(Stage stage); /* like begin, but does not count a new call: after another stage ran in between */
void profile_flops(double count); /* adds to the running stage */
void profile_left_out(int passes); /* of the transformer; printed unless it is 0 */
void profile_print(void);         /* prints the lines of --profile on standard error */

/* ---------------------------------------------------------------- progress.c: the progress line */

void progress_enable(bool wanted); /* has no effect if standard error is not a terminal */
/* Prints "step 3/20  0:41  2:10 left": `done` of `total` pieces of a stage are complete. NULL clears the line. */
void progress(const char *stage, int done, int total);
void progress_detail(const char *format, ...) PRINTF_LIKE(1, 2); /* added to the next progress line */
void progress_note(const char *format, ...) PRINTF_LIKE(1, 2); /* prints a permanent line above it */

/* ---------------------------------------------------------------- utf8.c: growable strings, UTF-8, digits */

/* A growable string. Initialize with {0}, free() the data. After each append, data[size] is 0. */
typedef struct {
    uint8_t *data;
    size_t size, room;
} Text;
void text_append(Text *text, const void *bytes, size_t size);
void text_append_utf8(Text *text, Bytes bytes);           /* invalid UTF-8 becomes U+FFFD */
void text_append_character(Text *text, uint32_t code);
/* Appends UTF-16 that begins with a byte order mark, but not the mark. No mark: returns false, appends nothing. */
bool text_append_utf16(Text *text, Bytes bytes);
bool starts_with(Bytes text, const char *prefix);
static inline Bytes text_bytes(const Text *text) { return (Bytes){text->data, text->size}; }
size_t utf8_decode(Bytes text, uint32_t *code); /* decodes the first character of valid UTF-8; returns its bytes */
size_t character_bytes(Bytes text); /* of the first character, judged by its first byte, at most text.size */
/* Whether a text, not empty, begins with a valid character that is no control character. *bytes: its bytes. */
bool is_printable(Bytes text, size_t *bytes);
/* Parses decimal digits at *text, and moves it past them. Returns -1 if there are none or they exceed `most`. */
int64_t take_digits(const char **text, int64_t most);

/* A rule may replace the start of a text (valid UTF-8, not empty). If it applies, it appends the replacement to `out`
 * and returns how many bytes of `text` it replaces. Otherwise it returns 0. */
typedef size_t Rule(Bytes text, Text *out);
void text_rewrite(Text *text, Rule *rule); /* applies it from left to right, copying characters that it leaves alone */

/* ---------------------------------------------------------------- html.c: HTML character references */

Rule html_reference; /* decodes "&amp;", "&#38;", "&lt" as Python's html.unescape does */
Rule ftfy_reference; /* as ftfy does: "&NTILDE;" too, but nothing without a semicolon */
uint32_t windows_1252(uint32_t code); /* the character of byte 0x80 to 0x9F; `code` itself if there is none */

/* ---------------------------------------------------------------- unicode.c: normalization form C */

void text_compose(Text *text); /* to Unicode Normalization Form C */
Rule usual_form; /* replaces Latin ligatures, full-width and half-width characters, as ftfy does */
bool is_digit(uint32_t code); /* a decimal digit of any script */
bool is_space(uint32_t code); /* white space as Python's str.strip() and \s define it */

/* ------------------------------------------------------------- normalizer.c: text -> form of a vocabulary */

#define SPACE_SYMBOL "\342\226\201" /* U+2581, which stands for a space in a vocabulary */
enum { SPACE_BYTES = 3 };

typedef struct WeightFile WeightFile; /* weights.c */

/* The normalization options of a vocabulary, from the weight file. */
typedef struct {
    enum { NEVER, FIRST, ALWAYS } prepend; /* whether each part gets a space in front; FIRST: only the first part */
    bool squeeze_spaces;                   /* tokenizers: a run of spaces becomes one */
    bool split_words; /* tokenizers: splits at spaces, drops them, and treats each word as a part */
    bool remove_extra_whitespaces, escape_whitespaces; /* sentencepiece */
    Bytes trie, replacements; /* sentencepiece's map: u32 units; 0-terminated strings */
} Normalizer;
const char *normalizer_load(const WeightFile *file, Normalizer *out);
/* tokenizers: normalizes a part of the text between added tokens. `first`: it begins the text. */
Text normalize_part(const Normalizer *normalizer, Bytes part, bool first);
/* sentencepiece: normalizes the whole text. `symbols` are not changed. */
Text normalize_whole(const Normalizer *normalizer, const Index *symbols, Bytes text);

/* -------------------------------------------------------------- weights.c: weight files (GGUF) */

/* Numbers as in ggml.h; types.c has the table of what they mean. */
typedef enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q8_0 = 8, TYPE_BF16 = 30 } Type;

/* A matrix (rows, cols), row-major, in the mapped file. A vector has one row. */
typedef struct {
    const void *data;
    Type type;
    int rows, cols;
} Weight;

/* Maps a file and checks all of it. Returns NULL, or the reason why it is not valid. weights_parse() does the same with
 * bytes in memory, which must outlive *out; `path` is for messages. */
const char *weights_open(const char *path, WeightFile **out);
const char *weights_parse(Bytes bytes, const char *path, WeightFile **out);
/* Dies if the file was written to since it was opened: the weights would be a mixture. */
void weights_require_unchanged(const WeightFile *file);
/* SHA-256 of the file's size and of everything before its tensors, which includes export.py's hash of the tensors. */
void weights_digest(const WeightFile *file, char hex[65]);
void weights_close(WeightFile *file); /* unmaps the file; NULL is allowed */
/* Dies with STATUS_USAGE and "PATH: MESSAGE". */
_Noreturn void weights_refuse(const WeightFile *file, const char *format, ...) PRINTF_LIKE(2, 3);

enum { MAX_TENSOR_NAME = 256 }; /* with a 0 at its end; a file with a longer name is refused */
/* Prints a name. Dies if it is too long for any tensor. */
void tensor_name(char name[MAX_TENSOR_NAME], const char *format, va_list arguments);
/* Binds a tensor as a matrix (rows, cols): its inner sizes multiply to cols, its outer sizes to rows. rows = 1 binds a
 * vector. Dies if the tensor is missing, has another shape, or has a type that no product reads. */
Weight weights_bind(const WeightFile *file, int rows, int cols, const char *name, ...) PRINTF_LIKE(4, 5);
/* The `count` elements of a tensor of any shape as floats. An f32 tensor is used in place; else it is a converted copy,
 * which weights_close() frees. Dies like weights_bind(). */
const float *weights_floats(const WeightFile *file, int count, const char *name, ...) PRINTF_LIKE(3, 4);

/* Value types of keys, as in gguf.h. */
enum {
    VALUE_U8, VALUE_I8, VALUE_U16, VALUE_I16, VALUE_U32, VALUE_I32, VALUE_F32, VALUE_BOOL, VALUE_STRING,
    VALUE_ARRAY, VALUE_U64, VALUE_I64, VALUE_F64, VALUE_TYPES
};

/* The value of a key. Dies if the key has another type. If it is missing, the _or functions return `fallback`, the
 * others die. */
int64_t weights_int(const WeightFile *file, const char *key);
int64_t weights_int_or(const WeightFile *file, const char *key, int64_t fallback);
/* An integer, or `count` integers. They also die unless 1 <= value <= most, so that products of a few sizes cannot
 * overflow. */
int weights_size(const WeightFile *file, const char *key, int most);
int weights_size_or(const WeightFile *file, const char *key, int most, int fallback);
void weights_sizes(const WeightFile *file, const char *key, int most, int *out, int count);
double weights_double(const WeightFile *file, const char *key);
double weights_double_or(const WeightFile *file, const char *key, double fallback);
bool weights_bool_or(const WeightFile *file, const char *key, bool fallback);
/* A 0-terminated copy, which weights_close() frees. */
const char *weights_string_or(const WeightFile *file, const char *key, const char *fallback);
typedef struct {
    const uint8_t *data; /* elements, little endian, unaligned; a string is u64 length, then bytes */
    uint32_t type;       /* of the elements */
    size_t count;
} WeightArray;
bool weights_has(const WeightFile *file, const char *name); /* a key or a tensor */
bool weights_array(const WeightFile *file, const char *key, WeightArray *out); /* false: missing, or no array */
int64_t array_int(const WeightArray *array, size_t index); /* 0 if the elements are not integers */
double array_double(const WeightArray *array, size_t index);
bool array_is_number(const WeightArray *array);
/* The next string of an array of strings. Set *cursor to array->data before the first call. */
Bytes next_string(const uint8_t **cursor);
void weights_print(const WeightFile *file, FILE *out); /* --info: the keys, then the tensors with type and shape */

void weight_row(const Weight *weight, int row, float *out); /* converts row `row` to floats: out (cols) */

/* -------------------------------------------------- types.c: how numbers are multiplied and widened */

/* Arithmetic of the large products. What is multiplied is float32, bfloat16, or bytes with a scale for each
 * 256; what is summed is float32 (for bytes: exact integers, then float32). */
typedef enum { F32, BF16, INT8, PRECISIONS, AUTOMATIC } Precision;
bool precision_parse(const char *name, Precision *out); /* "f32", "bf16" or "int8"; false for any other */
Precision precision_of_floats(Precision precision); /* BF16 in place of INT8: for what has no arithmetic in bytes */
const char *precision_name(Precision precision);

/* What a type of weight is. */
typedef struct {
    const char *name;
    int block, bytes;     /* a block's elements, and its bytes */
    void (*widen)(float *out, const uint8_t *in, size_t n); /* exactly, whole blocks; NULL: no product reads it */
    Precision suits;      /* the arithmetic that AUTOMATIC takes, where the processor is fast at it */
} WeightType;
enum { MAX_BLOCK = 256 };
const WeightType *weight_type(Type type); /* NULL if it is unknown */
size_t type_bytes(Type type, size_t n);   /* of n elements, whole blocks of a known type */
void convert_to_floats(float *out, const void *in, Type type, size_t n); /* whole blocks */
const char *types_read(void); /* the names of those that have widen(): "f32, f16, ... or bf16" */
void weight_part(const Weight *w, size_t at, int n, float *out); /* elements [at, at+n), row after row */

/* ---------------------------------------------------------------- blocks.c: ggml's blocks as floats */

void widen_f32(float *out, const uint8_t *in, size_t n);
void widen_f16(float *out, const uint8_t *in, size_t n);
void widen_bf16(float *out, const uint8_t *in, size_t n);
void widen_q8_0(float *out, const uint8_t *in, size_t n);
void widen_q4_0(float *out, const uint8_t *in, size_t n);
void widen_q4_1(float *out, const uint8_t *in, size_t n);
void widen_q5_0(float *out, const uint8_t *in, size_t n);
void widen_q5_1(float *out, const uint8_t *in, size_t n);
void widen_q2_k(float *out, const uint8_t *in, size_t n);
void widen_q3_k(float *out, const uint8_t *in, size_t n);
void widen_q4_k(float *out, const uint8_t *in, size_t n);
void widen_q5_k(float *out, const uint8_t *in, size_t n);
void widen_q6_k(float *out, const uint8_t *in, size_t n);

/* The bits of a float32 and back. */
static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* bfloat16 is the upper half of a float32: the nearest to x, ties to even; NaN stays NaN. */
static inline uint16_t bf16_of(float x) {
    uint32_t bits = bits_of(x);
    return x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}
static inline float float_of_bf16(uint16_t x) { return float_from_bits((uint32_t)x << 16); }

/* A half-precision number, exactly. Without a branch, so that compilers do several at once. */
static inline float float_of_f16(uint16_t x) {
    uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    uint32_t normal = magnitude + (112u << 23); /* exponents are 15 more in x, and 127 more in a float */
    uint32_t subnormal = bits_of(float_from_bits(magnitude + (113u << 23)) - 0x1p-14f);
    uint32_t infinite = magnitude | 255u << 23; /* or NaN */
    return float_from_bits(sign | (magnitude < 1u << 23 ? subnormal : magnitude < 31u << 23 ? normal : infinite));
}

/* ---------------------------------------------------------------- panel.c: what the tiles multiply */

enum { INT8_CHUNK = 256 }; /* elements under one scale */

/* A row operand of n elements, as it lies in memory: floats; bfloat16; or chunks of a scale and bytes. */
enum { SCALE_BYTES = 64 }; /* a scale has a cache line of its own, so that bytes begin with one */
size_t row_bytes(Precision precision, int n);
size_t row_offset(Precision precision, int k); /* of element k; for INT8 where a chunk starts */
void narrow_row(Precision precision, void *row, const float *x, int n);

/* A packed row, which a tile reads: elements side by side, of bfloat16 filled up with zeros to the tile's step. Its
 * bytes are also the stride from one packed row to the next. */
size_t packed_bytes(Precision precision, int n);
size_t packed_offset(Precision precision, int k); /* of element k; for INT8 where a chunk starts */
bool tiles_take_floats(Precision precision);   /* with F32; with BF16 where tiles do not multiply pairs */
bool tiles_take_operands(Precision precision); /* a row operand is a packed row already */
void pack_piece(Precision precision, void *packed, const void *row, int n); /* n elements of a row operand */
void fill_up(Precision precision, void *packed, int n); /* n elements with zeros, up to a whole step */
/* A packed row from n floats, not INT8. */
void pack_floats(Precision precision, void *packed, const float *x, int n);

/* A panel: C columns of n elements, the elements of one k (pairs: of two; INT8: of four) side by side. */
size_t panel_bytes(Precision precision, int n);
/* From elements [from, from+n) of rows [first, first+C) of w; or from the first `cols` columns of w (n, stride),
 * not INT8. */
void pack_panel(Precision precision, void *panel, const Weight *w, int first, int from, int n);
void pack_columns(Precision precision, void *panel, const float *w, size_t stride, int cols, int n);

/* What a tile prefetches while it multiplies. A round is `step` of k (Tile), and each prefetches what lies at `at`. */
typedef struct {
    const char *at;
    size_t bytes; /* by which `at` moves on in a round */
    size_t skip;  /* by which it moves on besides, after every `run` rounds */
    int run;      /* rounds; INT8's tiles ignore run and skip */
} Ahead;

/* What tile `tile` of those that multiply a panel of n elements fetches: its share of the next panel; or, where that is
 * not yet packed, of the weights that pack_panel() reads for it. */
Ahead panel_ahead(Precision precision, const char *next, int n, int tile);
Ahead weights_ahead(Precision precision, const Weight *w, int first, int from, int n, int tile, int tiles);

/* ---------------------------------------------------------------- product.c: the large products */

/* One region that a product or an attention uses while it runs, and nobody keeps. Grows until it is freed. */
void *scratch(size_t bytes);
void scratch_free(void);

/* A layer as checkpoints hold it, NAME.weight and NAME.bias, and the arithmetic to use on it. */
typedef struct {
    Weight weight;     /* (O,I) */
    const float *bias; /* (O), or NULL */
    Precision precision;
} Linear;
enum { NO_BIAS, BIAS };
Linear linear_bind(const WeightFile *file, Precision precision, int O, int I, int with_bias,
                   const char *name, ...) PRINTF_LIKE(6, 7);

/* y (L,O) = x (L,I) @ weight^T + bias */
void linear(float *y, const float *x, int L, const Linear *layer);
size_t linear_memory(const Linear *layer, int L); /* bytes of scratch that it takes */

/* Where a segment of a row lies. The same segment of the rows after it, `rows` in all and at least 1, follows `stride`
 * bytes apart. */
typedef struct {
    const char *at;
    size_t stride;
    int rows;
} Segment;

/* Row operands that a product reads where they lie: a row of x is `segments` runs of n elements, narrowed to
 * the layer's precision; locate() says where they are, of at most `rows` rows. A convolution has a segment for each tap
 * (Dukhan, The Indirect Convolution Algorithm, 2019). A linear layer has one, and no locate(): its rows lie `stride`
 * bytes apart at `of`. INT8 takes one segment. */
enum { MAX_SEGMENTS = 27 }; /* taps of a 3x3x3 convolution */
typedef struct {
    int rows, segments, n;
    /* Segments before these that are zeros: their weights are left out, which changes no bit of a sum. */
    int skip;
    Segment (*locate)(const void *of, int row, int rows, int segment);
    const void *of;
    size_t stride;
    Precision precision; /* of what rows.c writes there; a product takes its layer's */
    bool whole_tiles; /* the memory behind the last row can be read up to a whole tile; its contents do not matter */
} Rows;
Segment rows_locate(const Rows *x, int row, int rows, int segment); /* whichever way it is said */

/* L rows of n elements that lie `stride` bytes apart. */
Rows rows_at(Precision precision, const void *of, size_t stride, int L, int n);
/* L rows of n elements, which rows.c writes: in float32 at x, side by side; else in `memory` (rows_memory() bytes),
 * spaced as tiles read them best. */
Rows rows_of(Precision precision, float *x, void *memory, int L, int n);
size_t rows_memory(Precision precision, int L, int n);

enum { REPLACE, ACCUMULATE };
/* y = or += x @ weight (O, segments*n) + bias */
void product(float *y, Rows x, const Linear *layer, int mode);
size_t product_memory(const Linear *layer, int rows); /* bytes of scratch that it takes */

/* ---------------------------------------------------------------- attention.c */

/* out (Lq, heads*d) = softmax(scale * q k^T + bias) v per head, with a memory that does not grow with Lq*Lk.
 * Row strides are in floats. bias, if any, is bias[head*bias_head + query*bias_query + key]; -infinity hides
 * a key from a query. A query from which all keys are hidden gets NaN. */
enum { TILE_KEYS = 128 }; /* keys after which the softmax rescales, a rounding: the same but on AMX in BF16 */
typedef struct {
    Precision precision; /* bytes are too coarse here: INT8 counts as BF16 */
    const float *q, *k, *v;
    float *out;
    int queries, keys, heads, d;
    size_t q_stride, kv_stride, out_stride;
    float scale; /* positive */
    const float *bias;
    ptrdiff_t bias_head, bias_query;
} Attention;
void attention(const Attention *attention);
size_t attention_memory(Precision precision, int keys, int heads, int d); /* bytes of scratch that it takes */

/* ---------------------------------------------------------------- rows.c: what is done row by row */

/* All work on L rows of n floats; y may be x. */
void rms_norm(float *y, const float *x, int L, int n, const float *gain, float eps);
/* x / |x| * sqrt(n) * gain (the VAE's) */
void l2_norm(float *y, const float *x, int L, int n, const float *gain);
void silu(float *y, const float *x, size_t n);
void relu(float *y, const float *x, size_t n); /* max(x, 0); NaN stays NaN */
void add(float *y, const float *x, size_t n);                                      /* y += x */
void add_gated(float *y, const float *x, int L, int n, const float *gate, int each); /* y += x * gate (L/each, n) */

/* These write what a product reads next: rows with one segment and no locate(). */
enum { MAX_WIDTH = 1 << 14 }; /* n, at most, of the norms: a row is computed on the stack, in 64 KiB */
void narrow_rows(Rows y, const float *x); /* x itself stays as it is if it is y */
void l2_norm_silu(Rows y, const float *x, const float *gain); /* silu(l2_norm(x)) */
/* scale, shift (L/each, n): row l uses row l / each of them. So it is with the gate of add_gated(). */
void layer_norm(Rows y, const float *x, float eps, const float *scale, const float *shift, int each);
void gelu(Rows y, const float *x, const float *factor); /* gelu(x) * factor; factor may be NULL */

/* RoPE of tokens ordered (t, h, w). The pairs (x[2i], x[2i+1]) of a head are split into three runs, for t, h and w.
 * Each run is rotated by the angles of the token's position on its axis. */
typedef struct {
    int rows, columns;     /* of tokens in a frame */
    int temporal, spatial; /* pairs in the run for t; in that for h, and in that for w */
    float *time;           /* (frames, 2, temporal): cosines, then sines */
    float *row, *column;   /* (rows, 2, spatial), (columns, 2, spatial) */
} Rope;
void rope(float *x, int L, int heads, const Rope *rope); /* x (L, heads*d), from the first frame of `time` on */

/* --------------------------------------------------------------- kernels.c: one table, chosen at start-up */

enum { LANES = 16 }; /* virtual lanes of every sum over a row, whatever the width of a register */
enum { MAX_TILE_ROWS = 32, MAX_TILE_COLS = 32, TILES_AHEAD = 8 };

/* 32 bits of a panel, whatever they were written as: a float, a pair of bfloat16, four bytes. */
#if defined(__GNUC__)
typedef uint32_t __attribute__((may_alias)) Word;
#else
typedef uint32_t Word;
#endif

/* Some k of a tile's R rows: where the first row's lie, and the bytes from one row to the next. */
typedef struct {
    const char *at;
    size_t stride;
    int n; /* of k */
} Span;

/* How a table multiplies R rows by the C columns of a panel. */
typedef struct {
    /* acc (R, C), rows ld floats apart, = (mode: REPLACE) or += (ACCUMULATE) R rows times a panel. k goes through
     * `count` spans; INT8 takes one. An element of F32 is one chain of fused multiply-adds in the order of k. */
    void (*multiply)(float *acc, int ld, int mode, const Span *spans, int count, const void *panel, Ahead ahead);
    int rows; /* R */
    int part;  /* of k for which rows are packed at once: a multiple of INT8_CHUNK and of the step */
    int slice; /* of k that multiply() is best given at once, likewise */
    int step; /* zeros fill packed rows and panels up to a multiple of so many k */
} Tile;

/* What is computed in a way of its own on each instruction set. naive.c defines every result to the bit. With F32 and
 * INT8 all tables give these bits. With BF16 the tables whose order is RISING do, too. The others multiply pairs and
 * add in the order of their instruction: PAIRS adds element k + 1 before element k, for every even k; AMX_TILES is in
 * amx.c, with an attention of its own in amx_attention.c. */
typedef enum { RISING, PAIRS, AMX_TILES } Order;
typedef struct {
    const char *name;
    bool fast[PRECISIONS]; /* faster than whatever is more exact */

    /* The operations: the sections above say what they are, and rows.c hands them row by row. */
    void (*product)(float *y, const Rows *x, const Linear *layer, int mode, char *memory);
    void (*attention)(const Attention *attention);
    size_t (*attention_memory)(Precision precision, int keys, int heads, int d);
    void (*rms_norm_row)(float *y, const float *x, int n, const float *gain, float eps);
    void (*l2_norm_row)(float *y, const float *x, int n, const float *gain);
    void (*layer_norm_row)(float *y, const float *x, int n, float eps, const float *scale,
                           const float *shift);
    void (*silu)(float *y, const float *x, size_t n); /* x / (1 + exp(-x)) */
    void (*gelu)(float *y, const float *x, size_t n); /* the tanh form */
    void (*from_f16)(float *y, const uint16_t *x, size_t n);
    void (*from_bf16)(float *y, const uint16_t *x, size_t n);
    void (*to_bf16)(uint16_t *y, const float *x, size_t n);
    /* x, at most INT8_CHUNK, as bytes plus byte_offset; their sum without it. Returns their scale. */
    float (*quantize)(uint8_t *y, const float *x, int n, int *sum);

    /* What product.c and attention.c build them from, on all instruction sets; naive.c has none of it. */
    Tile tile[PRECISIONS];
    int tile_cols; /* C; it divides MAX_TILE_COLS */
    Order order_of_bf16;
    /* Added to each byte of an INT8 row operand: 128 where the dot-product instruction takes unsigned bytes, else 0. */
    int byte_offset;
    void (*enter)(void), (*leave)(void); /* around a thread's tiles; NULL: there is nothing to do */
    void (*transpose)(Word *out, size_t stride_out, const Word *in, size_t stride_in, int rows, int n);
    /* One row of one tile of an online softmax: scores [n], room for n rounded up to LANES, become
     * exp(scale*scores + bias - m), m the new running maximum, which is returned; sums [LANES] and *rescale
     * follow (what was summed under the old maximum is to be multiplied by *rescale). bias may be NULL. */
    float (*softmax_tile)(float *scores, int n, float scale, const float *bias, float maximum, float *sums,
                          float *rescale);

    /* y (rows, cols), rows y_stride floats apart, = or += sums (rows, C) + bias; bias may be NULL. `stream`: y will not
     * be read soon, so it need not be in a cache. */
    void (*write_sums)(float *y, size_t y_stride, int mode, const float *sums, int rows, int cols, const float *bias,
                       bool stream);

    float (*multiply_add)(float a, float b, float c); /* a * b + c, rounded twice; for kernels_choose() */
} Kernels;
extern const Kernels *kernels;

/* "auto", which takes the fastest that this processor has, or the name of one that it can run; NULL, or why
 * not. Dies if the program was built, or is run, so that arithmetic rounds otherwise than naive.c says. */
const char *kernels_choose(const char *isa);
const char *kernels_known(int i); /* the name of table i, in this build or another; NULL past the last */

/* Before and after a thread's calls of multiply(). */
static inline void tiles_enter(void) { if (kernels->enter) kernels->enter(); }
static inline void tiles_leave(void) { if (kernels->leave) kernels->leave(); }

void product_in_panels(float *y, const Rows *x, const Linear *layer, int mode, char *memory); /* product.c */
void attention_in_tiles(const Attention *attention); /* attention.c */
size_t tiles_attention_memory(Precision precision, int keys, int heads, int d);

/* ---------------------------------------------------------------- amx.c: tiles of 16 rows of 64 bytes */

enum { AMX_STEP = 32 }; /* k of bfloat16 that an instruction multiplies */
/* sum + a . b over n elements, in the order and with the roundings of TDPBF16PS: plain C, for the tests. */
float amx_dot(float sum, const uint16_t *a, const uint16_t *b, int n);
bool can_amx(void); /* asks the operating system for tiles */
void amx_enter(void);
void amx_leave(void);
void amx_tile_bf16(float *acc, int ld, int mode, const Span *spans, int count, const void *panel, Ahead ahead);
void amx_tile_int8(float *acc, int ld, int mode, const Span *spans, int count, const void *panel, Ahead ahead);

void amx_attention(const Attention *attention); /* amx_attention.c */
size_t amx_attention_memory(Precision precision, int keys, int heads, int d);

/* ---------------------------------------------------------------- naive.c: the operations as simple loops */

extern const Kernels naive_table;
float lanes_sum(const float lanes[LANES]); /* adds them pairwise: i and i + 8, then i + 4, i + 2, i + 1 */

/* ---------------------------------------------------------------- noise.c: torch.randn */

typedef struct {
    uint32_t state[624];
    int next;
    double spare; /* the second number of a Box-Muller pair, for n < 16 */
    bool has_spare;
} Generator;
void generator_seed(Generator *generator, uint64_t seed);   /* torch.Generator().manual_seed(seed) */
uint32_t generator_next(Generator *generator); /* the next 32 random bits */
void normal_16(float x[16]); /* turns 16 uniform numbers in [0,1), multiples of 2^-24, into normal numbers, in place */
/* torch.randn(n, generator=...) on the CPU */
void generator_randn(Generator *generator, float *out, size_t n);
void generator_skip(Generator *generator, size_t n); /* like generator_randn(n), but discards the numbers */

/* The numbers of torch.randn(n) with a new generator, drawn in parts, so that n floats need not fit in memory. */
typedef struct {
    Generator generator;
    size_t n, at;     /* all numbers; those already drawn */
    float block[16];
    int place;        /* index of the next number in block */
} Draw;
Draw draw_start(uint64_t seed, size_t n);
void draw_next(Draw *draw, float *out, size_t count); /* the next `count` numbers */

/* ---------------------------------------------------------------- npy.c: .npy files */

enum { MAX_DIMS = 5 };
typedef struct {
    int n;
    int d[MAX_DIMS];
} Shape;
#define SHAPE(...) \
    ((Shape){(int)(sizeof((int[]){__VA_ARGS__}) / sizeof(int)), {__VA_ARGS__}})
size_t shape_count(const Shape *shape);
bool shape_equal(const Shape *a, const Shape *b);
char *shape_string(const Shape *shape, char buffer[64]); /* "[16, 2, 4, 6]" */

typedef struct {
    Shape shape;
    char kind;          /* 'f' float, 'i' signed integer, 'u' unsigned integer, 'b' boolean */
    int width;          /* bytes of an element */
    bool big_endian, fortran_order;
    const uint8_t *data;
    Bytes mapping;      /* of the whole file, if npy_read() mapped it */
} Npy;
/* Read an array of numbers or booleans. Return NULL or the reason. npy_parse() keeps a pointer into `bytes`. */
const char *npy_read(const char *path, Npy *out);
const char *npy_parse(Bytes bytes, Npy *out);
void npy_free(Npy *array);
/* Removes leading axes of size 1 until the shape has as many axes as `expected`. Returns NULL if it then is `expected`,
 * else the reason, with a guess at the cause. */
const char *npy_fit(Npy *array, const Shape *expected);
/* NULL if all values are finite as floats, else a reason(). */
const char *npy_finite(const Npy *array);
/* npy_get() converts elements [first, first+n), counted in C order, to doubles; npy_floats() converts all of them to a
 * new array. */
void npy_get(const Npy *array, size_t first, size_t n, double *out);
float *npy_floats(const Npy *array);
/* Writes the header of a file of '<f4' or '<i4' values (kind 'f' or 'i') in C order. Returns its bytes. */
size_t npy_header(char *out, size_t size, const Shape *shape, char kind);

/* ---------------------------------------------------------------- tap.c: --dump, --check and --feed */

/* Sets what taps do. dump_dir: write the tensors whose names match only_glob. check_dir: compare tensors with the files
 * there. feed: then overwrite them with the files' values. NULL turns a part off. Dies if a folder cannot be used. */
void taps_open(const char *dump_dir, const char *only_glob, const char *check_dir, double tolerance, bool feed);
extern bool taps_on;
/* Sets the prefix of all names that follow, e.g. "step003.cond."; it is "" at the start. */
void tap_scope(const char *format, ...) PRINTF_LIKE(1, 2);
/* Passes a tensor with its name to tap_floats(). Costs one branch if taps are off. With --feed it changes values. */
#define tap(values, shape, ...) do { if (taps_on) tap_floats(values, shape, __VA_ARGS__); } while (0)
void tap_floats(float *values, Shape shape, const char *format, ...) PRINTF_LIKE(3, 4);
/* The same for values (F,C,H,W), which are dumped and compared as [C,F,H,W]. */
#define tap_frames(values, shape, ...) do { if (taps_on) tap_transposed(values, shape, __VA_ARGS__); } while (0)
void tap_transposed(float *values, Shape shape, const char *format, ...) PRINTF_LIKE(3, 4);
/* n token ids, in an array of `room`, each below `vocabulary`. --feed may change them; returns the new n. */
int tap_ids(int32_t *ids, int n, int room, int vocabulary, const char *format, ...) PRINTF_LIKE(5, 6);
/* Frame `index` (C,H,W) of a tensor [C,F,H,W] that is never in memory as a whole. Call it for 0 to F-1 in order. */
void tap_frame(float *frame, Shape shape, int index, const char *name);
/* Prints --check's table on standard error. If a tensor differs, names the first one in order of data flow and returns
 * false. */
bool taps_report(void);

/* ---------------------------------------------------------------- sha256.c: SHA-256; json.c: JSON */

typedef struct {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
} Sha256;
void sha256_start(Sha256 *sha);
void sha256_add(Sha256 *sha, const void *data, size_t bytes);
void sha256_finish(Sha256 *sha, char hex[65]); /* 64 hexadecimal digits and a 0 */
void sha256_of(const void *data, size_t bytes, char hex[65]); /* of one block of memory */

/* JSON text; begin with {0}. A key is NULL for the outermost object and in arrays. */
typedef struct {
    Text text;
    int depth;
    bool first; /* nothing yet in the innermost object */
} Json;
void json_open(Json *json, const char *key);
void json_close(Json *json);
void json_open_array(Json *json, const char *key); /* of values without keys */
void json_close_array(Json *json);
void json_string(Json *json, const char *key, const char *value);
void json_int(Json *json, const char *key, int64_t value);
void json_unsigned(Json *json, const char *key, uint64_t value);
void json_bool(Json *json, const char *key, bool value);
void json_double(Json *json, const char *key, double value);
void json_free(Json *json);
/* The value of a key of the outermost object as written in the text, a string without its quotes; {NULL, 0} if the key
 * is missing. The text is untrusted. */
Bytes json_find(Bytes text, const char *key);

#endif
