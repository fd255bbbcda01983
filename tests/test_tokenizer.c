/* test_tokenizer.c - prompt.c and tokenizer.c against goldens that ftfy, tokenizers and sentencepiece wrote
 * (reference_tokenizer.py), and on damaged files. */
#include "tests/gguf_builder.h"
#include "tests/test.h"
#include "sora.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LIMIT = 512 };

/* The two arguments of "%.*s". */
#define SHOWN(bytes) (int)(bytes).size, (const char *)(bytes).data

/* ---------------------------------------------------------------- goldens */

static int hex_digit(uint8_t c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

/* Replaces each "\xNN" by its byte, in place. */
static Bytes unescape(uint8_t *text, size_t size) {
    size_t n = 0;
    for (size_t i = 0; i < size; i++) {
        bool escaped = text[i] == '\\';
        text[n++] = escaped ? (uint8_t)(hex_digit(text[i + 2]) << 4 | hex_digit(text[i + 3])) : text[i];
        i += escaped ? 3 : 0;
    }
    return (Bytes){text, n};
}

/* Calls `test` with the two fields of each line of a file, which a tab separates. Returns the number of lines. */
typedef void LineTest(Bytes first, Bytes second, const void *context);
static int for_each_line(const char *name, LineTest *test, const void *context) {
    Bytes file;
    char path[64];
    snprintf(path, sizeof path, "goldens/tokenizer/%s.txt", name);
    const char *why = read_file(test_path(path), 1 << 22, &file);
    CHECK(!why, "%s", why);
    if (why) return 0;
    int lines = 0;
    uint8_t *at = (uint8_t *)file.data, *past = at + file.size;
    for (uint8_t *end; at < past; at = end + 1, lines++) {
        end = memchr(at, '\n', (size_t)(past - at));
        uint8_t *tab = memchr(at, '\t', (size_t)(end - at));
        *end = 0;
        Bytes second = {tab + 1, (size_t)(end - tab) - 1};
        test(unescape(at, (size_t)(tab - at)), second, context);
    }
    free((void *)file.data);
    return lines;
}

static void test_ids(Bytes text, Bytes expected, const void *tokenizer) {
    int32_t ids[LIMIT];
    int n = tokenizer_encode(tokenizer, text, ids, LIMIT);
    const char *at = (const char *)expected.data;
    char *next;
    for (int i = 0; i < n; i++, at = next) {
        long id = strtol(at, &next, 10);
        if (next == at || id != ids[i]) {
            CHECK(false, "\"%.*s\": id %d is %d, not %ld", SHOWN(text), i, (int)ids[i], id);
            return;
        }
    }
    CHECK(*at == 0, "\"%.*s\": there are more than %d ids", SHOWN(text), n);
}

static Tokenizer *load_golden(const char *name, WeightFile **file) {
    Tokenizer *tokenizer = NULL;
    char path[64];
    snprintf(path, sizeof path, "goldens/tokenizer/%s.gguf", name);
    const char *why = weights_open(test_path(path), file);
    if (!why) why = tokenizer_load(*file, &tokenizer);
    CHECK(!why, "%s: %s", path, why);
    return tokenizer;
}

static void test_golden(const char *name) {
    WeightFile *file;
    Tokenizer *tokenizer = load_golden(name, &file);
    if (tokenizer) CHECK(for_each_line(name, test_ids, tokenizer) > 100, "%s.txt is short", name);
    tokenizer_free(tokenizer);
    weights_close(file);
}

static void test_clean(Bytes prompt, Bytes expected, const void *context) {
    (void)context;
    expected = unescape((uint8_t *)expected.data, expected.size);
    Bytes clean = prompt_clean(prompt);
    bool same = clean.size == expected.size;
    if (same && clean.size) same = !memcmp(clean.data, expected.data, clean.size);
    CHECK(same, "\"%.*s\" becomes \"%.*s\", not \"%.*s\"", SHOWN(prompt), SHOWN(clean), SHOWN(expected));
    free((void *)clean.data);
}

static size_t put_character(char *out, uint32_t code) {
    Text text = {0};
    text_append_character(&text, code);
    memcpy(out, text.data, text.size);
    free(text.data);
    return text.size;
}

/* Cleans 4096 characters, each after a letter, followed by two combining marks and itself. Compares the SHA-256. */
static void test_characters(Bytes first, Bytes expected, const void *context) {
    (void)context;
    static char text[0x1000 * 16];
    char digest[65];
    size_t size = 0;
    uint32_t code = (uint32_t)strtoul((const char *)first.data, NULL, 16);
    for (uint32_t end = code + 0x1000; code < end; code++) {
        if (code >= 0xD800 && code < 0xE000) continue;
        if (size) text[size++] = '\n';
        text[size++] = 'a';
        size += put_character(text + size, code);
        size += put_character(text + size, 0x323);
        size += put_character(text + size, 0x301);
        size += put_character(text + size, code);
    }
    Bytes clean = prompt_clean((Bytes){(const uint8_t *)text, size});
    sha256_of(clean.data, clean.size, digest);
    CHECK(!strcmp(digest, (const char *)expected.data), "4096 characters from U+%.*s on differ", SHOWN(first));
    free((void *)clean.data);
}

/* 64 KB of references inside references. The expected text is what ftfy 6.3.1 gives for 1 to 11 levels. */
static void test_nested(const char *opening, const char *core, const char *closing, const char *expected) {
    enum { LIMIT_BYTES = 1 << 16 };
    Text prompt = {0};
    size_t levels = (LIMIT_BYTES - strlen(core) - 1) / (strlen(opening) + strlen(closing));
    if (!*closing) text_append(&prompt, "&", 1);
    for (size_t i = 0; i < levels; i++) text_append(&prompt, opening, strlen(opening));
    text_append(&prompt, core, strlen(core));
    for (size_t i = 0; i < levels; i++) text_append(&prompt, closing, strlen(closing));
    Bytes clean = prompt_clean(text_bytes(&prompt));
    CHECK(clean.size == strlen(expected) && !memcmp(clean.data, expected, clean.size),
          "%zu levels of \"%s\" become %zu bytes, not \"%s\"", levels, opening, clean.size, expected);
    free((void *)clean.data);
    free(prompt.data);
}

/* With a limit of n ids, the result is the first n - 1 ids and </s>. */
static void test_limits(void) {
    WeightFile *file;
    Tokenizer *tokenizer = load_golden("umt5_like", &file);
    Bytes text = {(const uint8_t *)"the red fox </s> jumps", 22};
    int32_t all[LIMIT], ids[LIMIT];
    int n = tokenizer_encode(tokenizer, text, all, LIMIT);
    for (int limit = 1; limit <= n + 1; limit++) {
        int kept = tokenizer_encode(tokenizer, text, ids, limit);
        CHECK(kept == (limit < n ? limit : n), "limit %d keeps %d ids", limit, kept);
        CHECK(ids[kept - 1] == all[n - 1], "limit %d loses the last id", limit);
        CHECK(!memcmp(ids, all, (size_t)(kept - 1) * sizeof *ids), "limit %d changes ids before it", limit);
    }
    tokenizer_free(tokenizer);
    weights_close(file);
}

/* ---------------------------------------------------------------- damaged files */

/* The content of a small file. Each test changes one part. */
enum { PIECES = 4, MAP_BYTES = 1030 };
typedef struct {
    const char *rules, *prepend, *pieces[PIECES];
    float scores[PIECES];
    int32_t types[PIECES];
    uint32_t count, types_count, score_type, unknown, end, added, fallback;
    uint32_t map_bytes, trie_bytes;
    uint8_t last;
} TokenizerRecipe;

static TokenizerRecipe good_recipe(const char *rules) {
    return (TokenizerRecipe){rules, "always", {"<unk>", "</s>", "\342\226\201a", "b"}, {0, 0, -1, -2}, {2, 3, 1, 1},
                   PIECES, PIECES, 6, 0, 1, 1, 0, 0, 1024, 0};
}

static void build(Builder *b, const TokenizerRecipe *m) {
    put_header(b, 0, 9 + (m->map_bytes > 0));
    put_array(b, "tokenizer.ggml.tokens", 8, m->count);
    for (uint32_t i = 0; i < m->count; i++) put_string(b, m->pieces[i]);
    put_array(b, "tokenizer.ggml.scores", m->score_type, m->count);
    put(b, m->scores, m->count * sizeof(float));
    put_array(b, "tokenizer.ggml.token_type", 5, m->types_count);
    put(b, m->types, m->types_count * sizeof(int32_t));
    put_array(b, "sora.tokenizer.added_ids", 5, 1);
    put_u32(b, m->added);
    put_key(b, "tokenizer.ggml.unknown_token_id", 4, m->unknown, 4);
    put_key(b, "tokenizer.ggml.eos_token_id", 4, m->end, 4);
    put_key(b, "sora.tokenizer.byte_fallback", 7, m->fallback, 1);
    put_string(b, "sora.tokenizer.rules");
    put_u32(b, 8);
    put_string(b, m->rules);
    put_string(b, "sora.tokenizer.prepend_scheme");
    put_u32(b, 8);
    put_string(b, m->prepend);
    if (!m->map_bytes) return;
    uint8_t map[MAP_BYTES] = {(uint8_t)m->trie_bytes, (uint8_t)(m->trie_bytes >> 8)};
    map[m->map_bytes - 1] = m->last;
    put_array(b, "tokenizer.ggml.precompiled_charsmap", 0, m->map_bytes);
    put(b, map, m->map_bytes);
}

/* Loads a tokenizer and encodes a text. Returns NULL, or the reason why it cannot be loaded. */
static const char *try_bytes(Bytes bytes) {
    WeightFile *file;
    Tokenizer *tokenizer = NULL;
    int32_t ids[LIMIT];
    const char *why = weights_parse(bytes, "file", &file);
    if (!why) why = tokenizer_load(file, &tokenizer);
    const char *text = "ab <unk>b\357\274\241 \360\237\246\212</s>  red fox, <extra_id_0>";
    if (tokenizer) tokenizer_encode(tokenizer, (Bytes){(const uint8_t *)text, strlen(text)}, ids, LIMIT);
    tokenizer_free(tokenizer);
    weights_close(file);
    return why;
}

static void expect(TokenizerRecipe m, const char *reason_part) {
    static Builder b;
    build(&b, &m);
    const char *why = try_bytes((Bytes){b.data, b.size});
    if (!reason_part) CHECK(!why, "a good file: %s", why);
    else CHECK(why && strstr(why, reason_part), "expected \"%s\": %s", reason_part, why ? why : "it loads");
}

#define BAD(rules, change, reason)     \
    do {                               \
        TokenizerRecipe m = good_recipe(rules);   \
        change;                        \
        expect(m, reason);             \
    } while (0)

static void test_refusals(void) {
    expect(good_recipe("sentencepiece"), NULL);
    expect(good_recipe("tokenizers"), NULL);
    BAD("tokenizers", m.count = m.types_count = 0, "has 0 pieces");
    BAD("tokenizers", m.score_type = 5, "scores");
    BAD("tokenizers", m.types_count = 3, "token_type");
    BAD("bpe", (void)m, "rules");
    BAD("tokenizers", m.prepend = "sometimes", "prepend_scheme");
    BAD("tokenizers", m.unknown = 4, "unknown_token_id");
    BAD("tokenizers", m.end = 4, "eos_token_id");
    BAD("tokenizers", m.added = 4, "added_ids");
    BAD("tokenizers", m.added = 0xffffffff, "added_ids");
    BAD("tokenizers", m.types[2] = 7, "type");
    BAD("tokenizers", m.scores[2] = -1 / 0.0f, "finite");
    BAD("sentencepiece", m.scores[2] = 0 / 0.0f, "finite");
    BAD("sentencepiece", m.pieces[3] = m.pieces[2], "twice");
    BAD("tokenizers", m.pieces[3] = m.pieces[2], NULL);
    BAD("sentencepiece", m.pieces[3] = "", "empty");
    BAD("sentencepiece", m.types[3] = 6, "expected a name like <0x41>");
    BAD("sentencepiece", m.fallback = 1, "<0x00>");
    BAD("sentencepiece", m.types[2] = m.types[3] = 5, "no piece that can match");
    BAD("sentencepiece", m.map_bytes = MAP_BYTES, NULL);
    BAD("tokenizers", m.map_bytes = MAP_BYTES, "precompiled_charsmap");
    BAD("sentencepiece", m.map_bytes = MAP_BYTES; m.trie_bytes = 1026, "precompiled_charsmap");
    BAD("sentencepiece", m.map_bytes = 3, "precompiled_charsmap");
    BAD("sentencepiece", m.map_bytes = 1028, "precompiled_charsmap");
    BAD("sentencepiece", m.map_bytes = MAP_BYTES; m.last = 'x', "precompiled_charsmap");
}

/* 200 damaged copies of a golden: each is refused or can be used. The sanitizer builds detect accesses out of bounds.
 * */
static void test_damage(const char *name) {
    Bytes file;
    char path[64];
    snprintf(path, sizeof path, "goldens/tokenizer/%s.gguf", name);
    const char *why = read_file(test_path(path), 1 << 22, &file);
    CHECK(!why, "%s", why);
    if (why) return;
    Generator generator;
    generator_seed(&generator, 3);
    uint8_t *copy = malloc(file.size);
    int refused = 0;
    for (int round = 0; round < 200; round++) {
        memcpy(copy, file.data, file.size);
        int changes = 1 << generator_next(&generator) % 12;
        for (int i = 0; i < changes; i++)
            copy[generator_next(&generator) % file.size] = (uint8_t)generator_next(&generator);
        refused += try_bytes((Bytes){copy, file.size}) != NULL;
    }
    CHECK(refused > 0 && refused < 200, "%s: of 200 damaged copies %d were refused", name, refused);
    free(copy);
    free((void *)file.data);
}

void test_tokenizer(void) {
    static const char *const goldens[] = {"nmt_nfkc",  "byte_fallback", "spaces_kept", "dense_float",
                                          "umt5_like", "json_bytes",    "dense_double", "resaved"};
    for (int i = 0; i < 8; i++) test_golden(goldens[i]);
    for (int i = 0; i < 8; i++) test_damage(goldens[i]);
    CHECK(for_each_line("clean", test_clean, NULL) == 600, "clean.txt is short");
    CHECK(for_each_line("characters", test_characters, NULL) == 48, "characters.txt is short");
    test_nested("amp;", "lt;", "", "<");
    test_nested("&#x3", "4", ";", "4");        /* "&#x34;" is "4" */
    test_nested("&#7&#xFEF", "F", ";0;", "F"); /* U+FEFF is removed, "&#70;" is "F" */
    test_nested("&#52&#89", "4", ";", "4");    /* U+037E becomes ";", "&#52;" is "4" */
    test_limits();
    test_refusals();
}
