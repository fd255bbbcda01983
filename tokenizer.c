/* tokenizer.c - clean text -> ids: a unigram model (Kudo, 2018).
 *
 * Takes UTF-8, gives ids [n], the last of which is </s>. The vocabulary gives every piece a score, its log probability.
 * Of all ways to write the text as a sequence of pieces, the one with the largest sum of scores is taken. A Viterbi
 * pass from left to right keeps the best way to reach each position. For example, "a red" has two words, ▁a and ▁red
 * (U+2581 stands for a space). With umT5's pieces, ▁red goes (each number is rounded by itself):
 *
 *   position   ways to reach it                                                               best
 *   ▁          ▁ -3.20                                                                        -3.20
 *   ▁r         ▁r -9.35       ▁ + r: -3.20 - 6.97 = -10.16                                    -9.35
 *   ▁re        ▁re -9.04      ▁ + re: -3.20 - 7.72 = -10.92     ▁r + e: -9.35 - 5.57 = -14.93  -9.04
 *   ▁red       ▁red -10.80    ▁ + red: -14.21   ▁r + ed: -17.50   ▁re + d: -16.32            -10.80
 *
 * Then, from the end back, each position gives the last piece of its best way: "a red" is 289 4062, and 1 for </s>.
 * A character that no piece covers is the unknown piece, with the smallest score less 10. The time is linear in the
 * text, because pieces have a longest length.
 *
 * Released checkpoints have two tokenizer files that disagree in details. The weight file says which rules hold:
 *
 *   "tokenizers"      tokenizer.json, as Hugging Face's tokenizers 0.23.3 reads it. Added tokens such as
 *                     `<extra_id_0>` and `</s>` are cut out of the raw text first, leftmost and longest. Each word
 *                     (up to the next U+2581) is segmented by itself, in double precision. Any piece can match, even
 *                     `<0x41>`.
 *   "sentencepiece"   spiece.model, as sentencepiece 0.2.3 reads it. The whole text is segmented at once, in single
 *                     precision. Control, byte and unused pieces never match. A user-defined symbol of n bytes has
 *                     the score 0.1 (n - 1).
 *
 * In both, the first of two equal sums wins: the path whose last piece starts further left. A run of unknown characters
 * is one unknown id or, with byte fallback, one id for each byte. As in transformers, the ids end with </s>, and a text
 * beyond the limit is cut before it. Text is normalised in engine/text/normalizer.c. docs/upstreams.md says what
 * transformers makes of the two files.
 *
 * Loading is fast for 256,300 pieces (umT5): they are not copied, and an index (engine/base/index.c) finds all pieces
 * that a position begins with, in one step for each byte. */
#include "sora.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* tokenizer.ggml.token_type, as in llama.h. */
enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };
enum { MAX_PIECE = 8000, NONE = -1 };

struct Tokenizer {
    bool sentencepiece; /* the rules: sentencepiece, or else tokenizers */
    bool byte_fallback;
    Normalizer normalizer;
    int count;
    Bytes *pieces; /* [count]; they point into the file */
    WeightArray scores, types, added;
    int32_t unknown, end; /* ids */
    int32_t byte_ids[256];
    double unknown_score;
    Index vocabulary; /* pieces that can match */
    Index symbols;    /* matched before normalisation: added tokens, or user-defined symbols */
};

/* ---------------------------------------------------------------- segmentation */

/* The output. Ids that do not fit are dropped. */
typedef struct {
    int32_t *ids;
    int n, room; /* ids in it; ids that fit */
} Ids;

static void push(Ids *out, int32_t id) {
    if (out->n < out->room) out->ids[out->n++] = id;
}

/* A position in the text, and the best way to reach it. */
typedef struct {
    double score; /* of that way */
    size_t start; /* where its last piece starts */
    size_t next;  /* set on the way back: where the piece that starts here ends */
    int32_t id;   /* its last piece; NONE until a piece ends here */
} Node;

/* sentencepiece adds in float. (The double sum of two floats, rounded to float, is their float sum.) */
static double rounded(const Tokenizer *t, double score) { return t->sentencepiece ? (float)score : score; }

static double piece_score(const Tokenizer *t, int32_t id, size_t size) {
    bool symbol = t->sentencepiece && array_int(&t->types, (size_t)id) == USER_DEFINED;
    return symbol ? (float)(0.1 * ((int)size - 1)) : array_double(&t->scores, (size_t)id);
}

/* Reaches `end` from `start` by a piece, if that is the best way so far. */
static void relax(const Tokenizer *t, Node *nodes, size_t start, size_t end, int32_t id, double score) {
    double sum = rounded(t, nodes[start].score + score);
    if (nodes[end].id == NONE || sum > nodes[end].score) nodes[end] = (Node){sum, start, 0, id};
}

/* sentencepiece subtracts an offset from the scores in long texts, which changes their rounding. */
static void rebase(const Tokenizer *t, Node *nodes, size_t start, size_t frontier) {
    double offset = nodes[start].score;
    if (!t->sentencepiece || fabs(offset) <= 100000) return;
    for (size_t i = start; i <= frontier; i++)
        if (i == start || nodes[i].id != NONE) nodes[i].score = rounded(t, nodes[i].score - offset);
}

/* The Viterbi pass over nodes [size + 1], which begin empty. Follows EncodeOptimized in sentencepiece's
 * unigram_model.cc and encode_optimized in tokenizers' unigram/model.rs. */
static void find_best_path(const Tokenizer *t, Bytes text, Node *nodes) {
    size_t frontier = 0;
    for (size_t start = 0, bytes; start < text.size; start += bytes) {
        Bytes rest = tail(text, start);
        bytes = character_bytes(rest);
        rebase(t, nodes, start, frontier);
        bool spanned = false;
        Prefixes walk = index_prefixes(&t->vocabulary, rest);
        for (int32_t id; (id = prefixes_next(&walk)) != NONE; spanned |= walk.size == bytes) {
            relax(t, nodes, start, start + walk.size, id, piece_score(t, id, walk.size));
            if (start + walk.size > frontier) frontier = start + walk.size;
        }
        if (!spanned) relax(t, nodes, start, start + bytes, t->unknown, t->unknown_score);
        if (start + bytes > frontier) frontier = start + bytes;
    }
}

/* Ids of a run of unknown characters: bytes if byte fallback has all of them, else one unknown id. tokenizers looks the
 * run up as a piece first; this can succeed with scores above 0 and for the text "<unk>". */
static void push_unknown(const Tokenizer *t, Bytes run, Ids *out) {
    size_t size;
    int32_t id = t->sentencepiece ? NONE : index_longest(&t->vocabulary, run, &size);
    if (id != NONE && size == run.size) {
        push(out, id);
        return;
    }
    bool bytes = t->byte_fallback;
    for (size_t i = 0; bytes && i < run.size; i++) bytes = t->byte_ids[run.data[i]] != NONE;
    if (!bytes) push(out, t->unknown);
    for (size_t i = 0; bytes && i < run.size; i++) push(out, t->byte_ids[run.data[i]]);
}

/* Appends the ids of a part of normalised text; nodes [size + 1] is work space. */
static void segment(const Tokenizer *t, Bytes text, Node *nodes, Ids *out) {
    for (size_t i = 0; i <= text.size; i++) nodes[i] = (Node){0, 0, 0, NONE};
    find_best_path(t, text, nodes);
    for (size_t end = text.size; end > 0; end = nodes[end].start) nodes[nodes[end].start].next = end;
    for (size_t at = 0, end; at < text.size && out->n < out->room; at = end) {
        end = nodes[at].next;
        int32_t id = nodes[end].id;
        while (id == t->unknown && end < text.size && nodes[nodes[end].next].id == id) end = nodes[end].next;
        if (id == t->unknown) push_unknown(t, (Bytes){text.data + at, end - at}, out);
        else push(out, id);
    }
}

/* ---------------------------------------------------------------- the rules of tokenizers */

/* Length in bytes of the first word, which ends before the next U+2581. */
static size_t word_bytes(Bytes text) {
    for (size_t i = 1; i < text.size; i++)
        if (starts_with(tail(text, i), SPACE_SYMBOL)) return i;
    return text.size;
}

static void encode_part(const Tokenizer *t, Bytes part, bool first, Ids *out) {
    if (part.size == 0) return;
    Text text = normalize_part(&t->normalizer, part, first);
    Node *nodes = allocate((text.size + 1) * sizeof *nodes);
    for (Bytes rest = text_bytes(&text); rest.size && out->n < out->room;) {
        Bytes word = {rest.data, word_bytes(rest)};
        segment(t, word, nodes, out);
        rest = tail(rest, word.size);
    }
    free(nodes);
    free(text.data);
}

static void encode_tokenizers(const Tokenizer *t, Bytes text, Ids *out) {
    size_t part = 0, at = 0;
    while (at < text.size && out->n < out->room) {
        size_t size;
        int32_t id = index_longest(&t->symbols, tail(text, at), &size);
        if (id == NONE) {
            at++;
            continue;
        }
        encode_part(t, (Bytes){text.data + part, at - part}, part == 0, out);
        push(out, id);
        part = at += size;
    }
    encode_part(t, tail(text, part), part == 0, out);
}

/* ---------------------------------------------------------------- the rules of sentencepiece */

static void encode_sentencepiece(const Tokenizer *t, Bytes text, Ids *out) {
    Text normal = normalize_whole(&t->normalizer, &t->symbols, text);
    Node *nodes = allocate((normal.size + 1) * sizeof *nodes);
    segment(t, text_bytes(&normal), nodes, out);
    free(nodes);
    free(normal.data);
}

int tokenizer_encode(const Tokenizer *tokenizer, Bytes text, int32_t *ids, int limit) {
    Ids out = {ids, 0, limit - 1};
    if (tokenizer->sentencepiece) encode_sentencepiece(tokenizer, text, &out);
    else encode_tokenizers(tokenizer, text, &out);
    out.room = limit;
    push(&out, tokenizer->end);
    return out.n;
}

/* ---------------------------------------------------------------- loading */

static const char *load_arrays(Tokenizer *t, const WeightFile *file, WeightArray *tokens) {
    if (!weights_array(file, "tokenizer.ggml.tokens", tokens) || tokens->type != VALUE_STRING)
        return "the file has no tokenizer (no array of strings \"tokenizer.ggml.tokens\")";
    if (tokens->count == 0 || tokens->count > INT32_MAX / 4)
        return reason("\"tokenizer.ggml.tokens\" has %zu pieces, expected 1 to %d", tokens->count, INT32_MAX / 4);
    if (!weights_array(file, "tokenizer.ggml.scores", &t->scores) || t->scores.count != tokens->count ||
        (t->scores.type != VALUE_F32 && t->scores.type != VALUE_F64))
        return "\"tokenizer.ggml.scores\" is missing or wrong, expected an f32 or f64 for each piece";
    if (!weights_array(file, "tokenizer.ggml.token_type", &t->types) || t->types.count != tokens->count ||
        t->types.type != VALUE_I32)
        return "\"tokenizer.ggml.token_type\" is missing or wrong, expected an i32 for each piece";
    if (weights_array(file, "sora.tokenizer.added_ids", &t->added) && t->added.type != VALUE_I32)
        return "\"sora.tokenizer.added_ids\" has another type, expected i32";
    t->count = (int)tokens->count;
    return NULL;
}

static const char *load_rules(Tokenizer *t, const WeightFile *file) {
    const char *rules = weights_string_or(file, "sora.tokenizer.rules", "");
    t->sentencepiece = !strcmp(rules, "sentencepiece");
    if (!t->sentencepiece && strcmp(rules, "tokenizers"))
        return reason("\"sora.tokenizer.rules\" is \"%s\", expected tokenizers or sentencepiece", rules);
    t->byte_fallback = weights_bool_or(file, "sora.tokenizer.byte_fallback", false);
    const char *why = normalizer_load(file, &t->normalizer);
    if (why) return why;
    if (t->normalizer.trie.size && !t->sentencepiece)
        return "\"tokenizer.ggml.precompiled_charsmap\" needs \"sora.tokenizer.rules\" sentencepiece, found tokenizers";
    return NULL;
}

/* The byte of a piece such as `<0x41>`, or NONE. */
static int piece_byte(Bytes piece) {
    static const char digits[] = "0123456789ABCDEF";
    if (piece.size != 6 || !starts_with(piece, "<0x") || piece.data[5] != '>') return NONE;
    const char *high = memchr(digits, piece.data[3], 16), *low = memchr(digits, piece.data[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : NONE;
}

/* Checks one piece and adds it to the vocabulary, the symbols or the bytes. Lowers *smallest to its score if the piece
 * counts towards the unknown score. */
static const char *load_piece(Tokenizer *t, int32_t id, double *smallest) {
    Bytes piece = t->pieces[id];
    double score = array_double(&t->scores, (size_t)id);
    int64_t type = array_int(&t->types, (size_t)id);
    int byte = piece_byte(piece);
    if (type < NORMAL || type > BYTE)
        return reason("piece %d of the tokenizer has type %d, expected 1 to 6", id, (int)type);
    if (!isfinite(score))
        return reason("piece %d of the tokenizer has score %g, expected a finite number", id, score);
    if (piece.size >= MAX_PIECE)
        return reason("piece %d of the tokenizer has %zu bytes, expected less than %d", id, piece.size, MAX_PIECE);
    if (t->sentencepiece && !piece.size) return reason("piece %d of the tokenizer is empty", id);
    if (type == UNUSED) return NULL;
    if (t->sentencepiece && type != NORMAL && type != USER_DEFINED) {
        if (type == BYTE && byte == NONE)
            return reason("piece %d of the tokenizer has type byte, expected a name like <0x41>", id);
        if (type == BYTE) t->byte_ids[byte] = id;
        return NULL;
    }
    if (!t->sentencepiece && byte != NONE) t->byte_ids[byte] = id;
    if (score < *smallest && (!t->sentencepiece || type == NORMAL)) *smallest = score;
    bool twice = piece.size && index_add(&t->vocabulary, id) != NONE;
    if (twice && t->sentencepiece) return reason("piece %d of the tokenizer appears twice", id);
    if (t->sentencepiece && type == USER_DEFINED) index_add(&t->symbols, id);
    return NULL;
}

/* An upper bound on the number of symbols. */
static size_t count_symbols(const Tokenizer *t) {
    size_t count = 0;
    if (!t->sentencepiece) return t->added.count;
    for (size_t i = 0; i < t->types.count; i++) count += array_int(&t->types, i) == USER_DEFINED;
    return count;
}

static const char *load_pieces(Tokenizer *t, const WeightArray *tokens) {
    const uint8_t *cursor = tokens->data;
    double smallest = t->sentencepiece ? FLT_MAX : DBL_MAX;
    t->pieces = allocate(tokens->count * sizeof *t->pieces);
    t->vocabulary = index_new(tokens->count, t->pieces, sizeof(Bytes));
    t->symbols = index_new(count_symbols(t), t->pieces, sizeof(Bytes));
    memset(t->byte_ids, 0xff, sizeof t->byte_ids);
    for (int32_t id = 0; id < t->count; id++) {
        t->pieces[id] = next_string(&cursor);
        const char *why = load_piece(t, id, &smallest);
        if (!why && t->vocabulary.crowded) why = "the tokenizer's pieces have equal hashes";
        if (why) return why;
    }
    t->unknown_score = rounded(t, smallest - 10);
    return t->vocabulary.longest ? NULL : "the tokenizer has no piece that can match";
}

static const char *load_ids(Tokenizer *t, const WeightFile *file) {
    int64_t unknown = weights_int_or(file, "tokenizer.ggml.unknown_token_id", NONE);
    int64_t end = weights_int_or(file, "tokenizer.ggml.eos_token_id", NONE);
    if (end < 0 || end >= t->count)
        return reason("\"tokenizer.ggml.eos_token_id\" is missing or not below the number of pieces, %d", t->count);
    if (unknown < 0 || unknown >= t->count)
        return reason("\"tokenizer.ggml.unknown_token_id\" is missing or not below the number of pieces, %d", t->count);
    t->unknown = (int32_t)unknown;
    t->end = (int32_t)end;
    for (int byte = 0; t->sentencepiece && t->byte_fallback && byte < 256; byte++)
        if (t->byte_ids[byte] == NONE)
            return reason("the tokenizer has no piece <0x%02X>, which byte fallback needs", (unsigned)byte);
    for (size_t i = 0; !t->sentencepiece && i < t->added.count; i++) {
        int64_t id = array_int(&t->added, i);
        if (id < 0 || id >= t->count)
            return reason("\"sora.tokenizer.added_ids\" holds %d, expected 0 to %d", (int)id, t->count - 1);
        if (t->pieces[id].size) index_add(&t->symbols, (int32_t)id);
    }
    return t->symbols.crowded ? "the tokenizer's pieces have equal hashes" : NULL;
}

const char *tokenizer_load(const WeightFile *file, Tokenizer **out) {
    Tokenizer *t = allocate(sizeof *t);
    WeightArray tokens;
    *out = NULL;
    const char *why = load_arrays(t, file, &tokens);
    if (!why) why = load_rules(t, file);
    if (!why) why = load_pieces(t, &tokens);
    if (!why) why = load_ids(t, file);
    if (why) tokenizer_free(t);
    else *out = t;
    return why;
}

void tokenizer_free(Tokenizer *tokenizer) {
    if (!tokenizer) return;
    free(tokenizer->pieces);
    free(tokenizer->vocabulary.places);
    free(tokenizer->symbols.places);
    free(tokenizer);
}
