/* tokenizer.c - text to ids: a unigram model (Kudo 2018), by the rules of the library that made it.
 *
 * A vocabulary gives every piece a score, its log probability. Of all ways to write the text as a sequence
 * of pieces the one with the largest sum wins; where no piece spans a character, the unknown piece does, at
 * the smallest score less 10. One pass from left to right (Viterbi) keeps, for each byte position, the best
 * way to get there; pieces have a longest length, so the time is linear in the text.
 *
 * Released checkpoints carry their tokenizer twice, and the two do not agree. The file says whose rules hold:
 *
 *   "tokenizers" (tokenizer.json, as Hugging Face's tokenizers 0.23.3 reads it): added tokens such as
 *     `<extra_id_0>` and `</s>` are cut out of the raw text, leftmost and longest first. In what lies
 *     between, runs of spaces become one, a space becomes U+2581, one more is put in front, and each word,
 *     from one U+2581 to the next, is segmented by itself in double precision. Every piece can match, even
 *     `<0x41>`. (transformers 4.57.1 uses the file as it is. Its 5.23.0 rebuilds T5's tokenizer from the
 *     vocabulary alone, which gives other ids where a character is unknown (2, whatever the file says) and
 *     where a space stands beside an added token.)
 *
 *   "sentencepiece" (spiece.model alone, as sentencepiece 0.2.3 reads it): the text runs through the model's
 *     own normaliser, a double-array trie from strings to strings, which passes over user-defined symbols;
 *     then it is segmented whole, in single precision. Control, byte and unused pieces never match. A
 *     user-defined symbol of n bytes scores 0.1 (n - 1). (transformers 5.23.0 turns such a model, too, into
 *     one for tokenizers, without its byte fallback and with `<extra_id_N>` added at the end.)
 *
 * Both keep, of two equal sums, the path that was found first, which is the one whose last piece starts
 * further left; a run of unknown characters is one unknown id, or, with byte fallback, the ids of its bytes.
 * As in transformers, `</s>` closes the ids, and a text beyond the limit loses its end, not its `</s>`.
 *
 * The vocabulary (256,300 pieces for umT5) has to be ready at once: pieces stay where they lie in the file,
 * and one open-addressing table finds them by a hash that grows byte by byte, so a walk over the prefixes at
 * a position costs one step each. */
#include "sora.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* tokenizer.ggml.token_type, as in llama.h. */
enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };
enum { MAX_PIECE = 8000, NONE = -1 };

/* Ids by their pieces. */
typedef struct {
    Index index;
    size_t longest; /* bytes of the longest piece */
} PieceSet;

struct Tokenizer {
    bool sentencepiece; /* whose rules */
    bool byte_fallback, remove_extra_whitespaces, escape_whitespaces, squeeze_spaces;
    enum { NEVER, FIRST, ALWAYS } prepend;
    int count;
    Bytes *pieces; /* [count], in the file */
    WeightArray scores, types, added;
    int32_t unknown, end; /* ids */
    int32_t byte_ids[256];
    double unknown_score;
    PieceSet vocabulary; /* what the segmentation may use */
    PieceSet symbols;    /* what is cut out or passed over first: added tokens, user-defined symbols */
    Bytes trie, replacements; /* the normaliser's map: u32 units, 0-terminated strings */
};

static const char SPACE_SYMBOL[] = "\342\226\201"; /* U+2581 */
enum { SPACE_BYTES = 3 };

/* ---------------------------------------------------------------- sets of pieces */

/* Adds a piece, or gives an equal one the new id; returns the old id or NONE. */
static int32_t set_add(const Tokenizer *t, PieceSet *set, int32_t id) {
    Bytes piece = t->pieces[id];
    int32_t *place = index_place(&set->index, piece), old = *place;
    *place = id;
    if (piece.size > set->longest) set->longest = piece.size;
    return old;
}

/* Walks over the prefixes of a text that are in the set, from the shortest on. */
typedef struct {
    const PieceSet *set;
    Bytes text;
    size_t size; /* of the prefix found last */
    uint64_t hash;
} Walk;

static Walk walk_start(const PieceSet *set, Bytes text) {
    if (text.size > set->longest) text.size = set->longest;
    return (Walk){set, text, 0, HASH_START};
}

/* The id of the next prefix, whose size is then walk->size; NONE after the last. */
static int32_t walk_next(Walk *walk) {
    while (walk->size < walk->text.size) {
        walk->hash = hash_next(walk->hash, walk->text.data[walk->size++]);
        int32_t id = *index_hashed(&walk->set->index, (Bytes){walk->text.data, walk->size}, walk->hash);
        if (id != NONE) return id;
    }
    return NONE;
}

/* The longest prefix in the set: its id, and its size in *size; NONE and 0 if there is none. */
static int32_t longest_prefix(const PieceSet *set, Bytes text, size_t *size) {
    int32_t best = NONE;
    Walk walk = walk_start(set, text);
    *size = 0;
    for (int32_t id; (id = walk_next(&walk)) != NONE; best = id) *size = walk.size;
    return best;
}

static Bytes tail(Bytes text, size_t from) { return (Bytes){text.data + from, text.size - from}; }

static bool starts_with(Bytes text, const char *prefix, size_t size) {
    return text.size >= size && !memcmp(text.data, prefix, size);
}

/* ---------------------------------------------------------------- segmentation */

/* Ids as they come; what does not fit is dropped. */
typedef struct {
    int32_t *ids;
    int n, room;
} Ids;

static void push(Ids *out, int32_t id) {
    if (out->n < out->room) out->ids[out->n++] = id;
}

/* The best way to the position that the node stands for: its last piece and where that starts. On the way
 * back, `next` becomes where the piece that starts here ends. */
typedef struct {
    double score;
    size_t start, next;
    int32_t id; /* NONE until some piece ends here */
} Node;

/* sentencepiece keeps its sums in float. (The float of the double sum of two floats is their float sum.) */
static double rounded(const Tokenizer *t, double score) { return t->sentencepiece ? (float)score : score; }

static double piece_score(const Tokenizer *t, int32_t id, size_t size) {
    bool symbol = t->sentencepiece && array_int(&t->types, (size_t)id) == USER_DEFINED;
    return symbol ? (float)(0.1 * ((int)size - 1)) : array_double(&t->scores, (size_t)id);
}

static void relax(const Tokenizer *t, Node *nodes, size_t start, size_t end, int32_t id, double score) {
    double sum = rounded(t, nodes[start].score + score);
    if (nodes[end].id == NONE || sum > nodes[end].score) nodes[end] = (Node){sum, start, 0, id};
}

/* sentencepiece keeps sums small on long texts, which changes how they round. */
static void rebase(const Tokenizer *t, Node *nodes, size_t start, size_t frontier) {
    double offset = nodes[start].score;
    if (!t->sentencepiece || fabs(offset) <= 100000) return;
    for (size_t i = start; i <= frontier; i++)
        if (i == start || nodes[i].id != NONE) nodes[i].score = rounded(t, nodes[i].score - offset);
}

/* Bytes of the character that starts the text, by its first byte alone, as both libraries count. */
static size_t character_bytes(Bytes text) {
    size_t bytes = (size_t)"\1\1\1\1\1\1\1\1\1\1\1\1\2\2\3\4"[text.data[0] >> 4];
    return bytes < text.size ? bytes : text.size;
}

/* Fills nodes[0..size], all of them blank before. (EncodeOptimized in sentencepiece's unigram_model.cc,
 * encode_optimized in tokenizers' unigram/model.rs.) */
static void find_best_path(const Tokenizer *t, Bytes text, Node *nodes) {
    size_t frontier = 0;
    for (size_t start = 0, bytes; start < text.size; start += bytes) {
        Bytes rest = tail(text, start);
        bytes = character_bytes(rest);
        rebase(t, nodes, start, frontier);
        bool spanned = false;
        Walk walk = walk_start(&t->vocabulary, rest);
        for (int32_t id; (id = walk_next(&walk)) != NONE; spanned |= walk.size == bytes) {
            relax(t, nodes, start, start + walk.size, id, piece_score(t, id, walk.size));
            if (start + walk.size > frontier) frontier = start + walk.size;
        }
        if (!spanned) relax(t, nodes, start, start + bytes, t->unknown, t->unknown_score);
        if (start + bytes > frontier) frontier = start + bytes;
    }
}

/* A run of unknown characters. That it is a piece after all takes scores above 0, or the text "<unk>". */
static void push_unknown(const Tokenizer *t, Bytes run, Ids *out) {
    size_t size;
    int32_t id = t->sentencepiece ? NONE : longest_prefix(&t->vocabulary, run, &size);
    if (id != NONE && size == run.size) {
        push(out, id);
        return;
    }
    bool bytes = t->byte_fallback;
    for (size_t i = 0; bytes && i < run.size; i++) bytes = t->byte_ids[run.data[i]] != NONE;
    if (!bytes) push(out, t->unknown);
    for (size_t i = 0; bytes && i < run.size; i++) push(out, t->byte_ids[run.data[i]]);
}

/* Appends the ids of one stretch of normalised text; `nodes` has room for one more than its bytes. */
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

/* The normaliser and the Metaspace pre-tokenizer, on what lies between two added tokens. */
static void metaspace(const Tokenizer *t, Bytes part, bool first, Text *out) {
    bool starts = part.data[0] == ' ' || starts_with(part, SPACE_SYMBOL, SPACE_BYTES);
    if (!starts && (t->prepend == ALWAYS || (t->prepend == FIRST && first)))
        text_append(out, SPACE_SYMBOL, SPACE_BYTES);
    for (size_t i = 0; i < part.size; i++) {
        bool space = part.data[i] == ' ';
        if (space && t->squeeze_spaces && i > 0 && part.data[i - 1] == ' ') continue;
        text_append(out, space ? SPACE_SYMBOL : (const char *)part.data + i, space ? SPACE_BYTES : 1);
    }
}

/* Bytes of the first word: up to the next U+2581 that is not at its start. */
static size_t word_bytes(Bytes text) {
    for (size_t i = 1; i < text.size; i++)
        if (starts_with(tail(text, i), SPACE_SYMBOL, SPACE_BYTES)) return i;
    return text.size;
}

static void encode_part(const Tokenizer *t, Bytes part, bool first, Ids *out) {
    if (part.size == 0) return;
    Text text = {0};
    metaspace(t, part, first, &text);
    Node *nodes = allocate((text.size + 1) * sizeof *nodes);
    for (Bytes rest = {text.data, text.size}; rest.size && out->n < out->room;) {
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
        int32_t id = longest_prefix(&t->symbols, tail(text, at), &size);
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

static uint32_t trie_unit(const Tokenizer *t, size_t index) {
    const uint8_t *p = t->trie.data + 4 * index;
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Bits of a unit (darts-clone): 31 "is a value", 30..0 the value; else 31..10 the offset of the children, 9
 * "offset in steps of 256", 8 "has a value", 7..0 the byte that leads here. */
static size_t trie_offset(uint32_t unit) { return (size_t)(unit >> 10) << ((unit & 1u << 9) >> 6); }

/* The longest key of the map at the start of the text: its bytes (0: none) and what takes its place. The map
 * comes from the file as it is, so every step is held against its end. */
static size_t find_rule(const Tokenizer *t, Bytes text, Bytes *replacement) {
    size_t units = t->trie.size / 4, longest = 0;
    size_t at = units ? trie_offset(trie_unit(t, 0)) : 0;
    for (size_t i = 0; i < text.size; i++) {
        at ^= text.data[i];
        if (at >= units) break;
        uint32_t unit = trie_unit(t, at);
        if ((unit & (1u << 31 | 0xFF)) != text.data[i]) break;
        at ^= trie_offset(unit);
        if (!(unit & 1u << 8)) continue;
        size_t value = at < units ? trie_unit(t, at) & ~(1u << 31) : t->replacements.size;
        if (value >= t->replacements.size) break;
        *replacement = tail(t->replacements, value);
        longest = i + 1;
    }
    if (longest) replacement->size = strlen((const char *)replacement->data); /* one was seen at the end */
    return longest;
}

/* What the start of the text becomes, and how many bytes that takes: a user-defined symbol stays as it is, a
 * rule of the map is applied, else it is one character. */
static size_t normalize_prefix(const Tokenizer *t, Bytes text, Bytes *becomes) {
    size_t size;
    longest_prefix(&t->symbols, text, &size);
    if (size == 0) {
        size = find_rule(t, text, becomes);
        if (size) return size;
        size = character_bytes(text);
    }
    *becomes = (Bytes){text.data, size};
    return size;
}

/* Normalizer::Normalize in sentencepiece's normalizer.cc. */
static Text normalize(const Tokenizer *t, Bytes text) {
    Text out = {0};
    const char *space = t->escape_whitespaces ? SPACE_SYMBOL : " ";
    size_t space_bytes = strlen(space), taken;
    bool after_space = t->remove_extra_whitespaces;
    Bytes piece;
    while (t->remove_extra_whitespaces && text.size) {
        taken = normalize_prefix(t, text, &piece);
        if (piece.size != 1 || piece.data[0] != ' ') break;
        text = tail(text, taken);
    }
    if (text.size && t->prepend != NEVER) text_append(&out, space, space_bytes);
    for (; text.size; text = tail(text, taken)) {
        taken = normalize_prefix(t, text, &piece);
        while (after_space && piece.size && piece.data[0] == ' ') piece = tail(piece, 1);
        for (size_t i = 0; i < piece.size; i++)
            if (piece.data[i] == ' ') text_append(&out, space, space_bytes);
            else text_append(&out, piece.data + i, 1);
        if (piece.size) after_space = t->remove_extra_whitespaces && piece.data[piece.size - 1] == ' ';
    }
    while (t->remove_extra_whitespaces && out.size >= space_bytes &&
           !memcmp(out.data + out.size - space_bytes, space, space_bytes))
        out.size -= space_bytes;
    return out;
}

static void encode_sentencepiece(const Tokenizer *t, Bytes text, Ids *out) {
    Text normal = normalize(t, text);
    Node *nodes = allocate((normal.size + 1) * sizeof *nodes);
    segment(t, (Bytes){normal.data, normal.size}, nodes, out);
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
        return "the tokenizer has no pieces, or too many";
    if (!weights_array(file, "tokenizer.ggml.scores", &t->scores) || t->scores.count != tokens->count ||
        (t->scores.type != VALUE_F32 && t->scores.type != VALUE_F64))
        return "\"tokenizer.ggml.scores\" is not one f32 or f64 for each piece";
    if (!weights_array(file, "tokenizer.ggml.token_type", &t->types) || t->types.count != tokens->count ||
        t->types.type != VALUE_I32)
        return "\"tokenizer.ggml.token_type\" is not one i32 for each piece";
    if (weights_array(file, "sora.tokenizer.added_ids", &t->added) && t->added.type != VALUE_I32)
        return "\"sora.tokenizer.added_ids\" is not of type i32";
    t->count = (int)tokens->count;
    return NULL;
}

static const char *load_rules(Tokenizer *t, const WeightFile *file) {
    const char *rules = weights_string_or(file, "sora.tokenizer.rules", "");
    const char *prepend = weights_string_or(file, "sora.tokenizer.prepend_scheme", "");
    t->sentencepiece = !strcmp(rules, "sentencepiece");
    if (!t->sentencepiece && strcmp(rules, "tokenizers"))
        return reason("\"sora.tokenizer.rules\" is \"%s\", expected tokenizers or sentencepiece", rules);
    if (strcmp(prepend, "always") && strcmp(prepend, "first") && strcmp(prepend, "never"))
        return reason("\"sora.tokenizer.prepend_scheme\" is \"%s\", expected always, first or never",
                      prepend);
    t->prepend = !strcmp(prepend, "always") ? ALWAYS : !strcmp(prepend, "first") ? FIRST : NEVER;
    t->byte_fallback = weights_bool_or(file, "sora.tokenizer.byte_fallback", false);
    t->escape_whitespaces = weights_bool_or(file, "sora.tokenizer.escape_whitespaces", true);
    t->squeeze_spaces = weights_bool_or(file, "sora.tokenizer.squeeze_spaces", false);
    t->remove_extra_whitespaces = weights_bool_or(file, "tokenizer.ggml.remove_extra_whitespaces", false);
    return NULL;
}

/* The map: u32 bytes of the trie, the trie, the strings. The checks are sentencepiece's. */
static const char *load_map(Tokenizer *t, const WeightFile *file) {
    WeightArray map;
    if (!weights_array(file, "tokenizer.ggml.precompiled_charsmap", &map) || map.count == 0) return NULL;
    if (!t->sentencepiece) return "a precompiled_charsmap goes with the rules of sentencepiece only";
    if (map.type != VALUE_U8 || map.count < 5) return "\"tokenizer.ggml.precompiled_charsmap\" is broken";
    t->trie = (Bytes){map.data, 4};
    size_t bytes = trie_unit(t, 0), left = map.count - 4;
    if (bytes < 1024 || bytes % 1024 || bytes >= left || map.data[map.count - 1] != 0)
        return "\"tokenizer.ggml.precompiled_charsmap\" is broken";
    t->trie = (Bytes){map.data + 4, bytes};
    t->replacements = (Bytes){map.data + 4 + bytes, left - bytes};
    return NULL;
}

/* The byte that a piece `<0x41>` stands for, or NONE. */
static int piece_byte(Bytes piece) {
    static const char digits[] = "0123456789ABCDEF";
    if (piece.size != 6 || !starts_with(piece, "<0x", 3) || piece.data[5] != '>') return NONE;
    const char *high = memchr(digits, piece.data[3], 16), *low = memchr(digits, piece.data[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : NONE;
}

/* Enters one piece where its type belongs, and lowers `smallest` to its score if that counts. */
static const char *load_piece(Tokenizer *t, int32_t id, double *smallest) {
    Bytes piece = t->pieces[id];
    double score = array_double(&t->scores, (size_t)id);
    int64_t type = array_int(&t->types, (size_t)id);
    int byte = piece_byte(piece);
    if (type < NORMAL || type > BYTE) return reason("piece %d of the tokenizer is of no known type", id);
    if (!isfinite(score)) return reason("piece %d of the tokenizer has no finite score", id);
    if (piece.size >= MAX_PIECE) return reason("piece %d of the tokenizer has %zu bytes", id, piece.size);
    if (t->sentencepiece && !piece.size) return reason("piece %d of the tokenizer is empty", id);
    if (type == UNUSED) return NULL;
    if (t->sentencepiece && type != NORMAL && type != USER_DEFINED) {
        if (type == BYTE && byte == NONE) return reason("piece %d of the tokenizer is no byte", id);
        if (type == BYTE) t->byte_ids[byte] = id;
        return NULL;
    }
    if (!t->sentencepiece && byte != NONE) t->byte_ids[byte] = id;
    if (score < *smallest && (!t->sentencepiece || type == NORMAL)) *smallest = score;
    bool twice = piece.size && set_add(t, &t->vocabulary, id) != NONE;
    if (twice && t->sentencepiece) return reason("piece %d of the tokenizer appears twice", id);
    if (t->sentencepiece && type == USER_DEFINED) set_add(t, &t->symbols, id);
    return NULL;
}

/* How many pieces can enter the set of symbols. */
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
    t->vocabulary.index = index_new(tokens->count, t->pieces, sizeof(Bytes));
    t->symbols.index = index_new(count_symbols(t), t->pieces, sizeof(Bytes));
    memset(t->byte_ids, 0xff, sizeof t->byte_ids);
    for (int32_t id = 0; id < t->count; id++) {
        t->pieces[id] = next_string(&cursor);
        const char *why = load_piece(t, id, &smallest);
        if (why) return why;
    }
    t->unknown_score = rounded(t, smallest - 10);
    return t->vocabulary.longest ? NULL : "the tokenizer has no piece that could match";
}

static const char *load_ids(Tokenizer *t, const WeightFile *file) {
    int64_t unknown = weights_int_or(file, "tokenizer.ggml.unknown_token_id", NONE);
    int64_t end = weights_int_or(file, "tokenizer.ggml.eos_token_id", NONE);
    if (end < 0 || end >= t->count) return "\"tokenizer.ggml.eos_token_id\" names no piece";
    if (unknown < 0 || unknown >= t->count) return "\"tokenizer.ggml.unknown_token_id\" names no piece";
    t->unknown = (int32_t)unknown;
    t->end = (int32_t)end;
    for (int byte = 0; t->sentencepiece && t->byte_fallback && byte < 256; byte++)
        if (t->byte_ids[byte] == NONE) return reason("the tokenizer has no piece <0x%02X>", (unsigned)byte);
    for (size_t i = 0; !t->sentencepiece && i < t->added.count; i++) {
        int64_t id = array_int(&t->added, i);
        if (id < 0 || id >= t->count) return "\"sora.tokenizer.added_ids\" names no piece";
        if (t->pieces[id].size) set_add(t, &t->symbols, (int32_t)id);
    }
    return NULL;
}

const char *tokenizer_load(const WeightFile *file, Tokenizer **out) {
    Tokenizer *t = allocate(sizeof *t);
    WeightArray tokens;
    *out = NULL;
    const char *why = load_arrays(t, file, &tokens);
    if (!why) why = load_rules(t, file);
    if (!why) why = load_map(t, file);
    if (!why) why = load_pieces(t, &tokens);
    if (!why) why = load_ids(t, file);
    if (why) tokenizer_free(t);
    else *out = t;
    return why;
}

void tokenizer_free(Tokenizer *tokenizer) {
    if (!tokenizer) return;
    free(tokenizer->pieces);
    free(tokenizer->vocabulary.index.places);
    free(tokenizer->symbols.index.places);
    free(tokenizer);
}
