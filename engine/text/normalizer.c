/* normalizer.c - text as a vocabulary has it: U+2581 for spaces, one perhaps in front; the characters that it
 * knows. Each of the two libraries has its own rules, which the weight file names.
 *
 * tokenizers does no more than that. sentencepiece also has a map from strings to strings (full-width letters
 * to plain ones, tabs to spaces), a double-array trie whose longest key at a place is replaced. It comes from
 * the file as it is: every step is held against its end. */
#include "engine/engine.h"

#include <string.h>

/* ---------------------------------------------------------------- tokenizers */

Text normalize_part(const Normalizer *n, Bytes part, bool first) {
    Text out = {0};
    bool prepend = n->prepend == ALWAYS || (n->prepend == FIRST && first);
    for (size_t i = 0; i < part.size; i++) {
        bool space = part.data[i] == ' ', after_space = i > 0 && part.data[i - 1] == ' ';
        if (space && (n->split_words || (n->squeeze_spaces && after_space))) continue;
        bool begins = !space && (i == 0 || (n->split_words && after_space));
        if (begins && prepend && !starts_with(tail(part, i), SPACE_SYMBOL))
            text_append(&out, SPACE_SYMBOL, SPACE_BYTES);
        text_append(&out, space ? SPACE_SYMBOL : (const char *)part.data + i, space ? SPACE_BYTES : 1);
    }
    return out;
}

/* ---------------------------------------------------------------- sentencepiece */

static uint32_t trie_unit(Bytes trie, size_t index) {
    const uint8_t *p = trie.data + 4 * index;
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Bits of a unit (darts-clone): 31 "is a value", 30..0 the value; else 31..10 the offset of the children, 9
 * "offset in steps of 256", 8 "has a value", 7..0 the byte that leads here. */
static size_t trie_offset(uint32_t unit) { return (size_t)(unit >> 10) << ((unit & 1u << 9) >> 6); }

/* The longest key of the map at the start of the text: its bytes (0: none) and what takes its place. */
static size_t find_rule(const Normalizer *n, Bytes text, Bytes *replacement) {
    size_t units = n->trie.size / 4, longest = 0;
    size_t at = units ? trie_offset(trie_unit(n->trie, 0)) : 0;
    for (size_t i = 0; i < text.size; i++) {
        at ^= text.data[i];
        if (at >= units) break;
        uint32_t unit = trie_unit(n->trie, at);
        if ((unit & (1u << 31 | 0xFF)) != text.data[i]) break;
        at ^= trie_offset(unit);
        if (!(unit & 1u << 8)) continue;
        size_t value = at < units ? trie_unit(n->trie, at) & ~(1u << 31) : n->replacements.size;
        if (value >= n->replacements.size) break;
        *replacement = tail(n->replacements, value);
        longest = i + 1;
    }
    if (longest) replacement->size = strlen((const char *)replacement->data); /* one was seen at the end */
    return longest;
}

/* What the start of the text becomes, and how many bytes that takes: a symbol stays as it is, a rule of the
 * map is applied, else it is one character. */
static size_t normalize_prefix(const Normalizer *n, const Index *symbols, Bytes text, Bytes *becomes) {
    size_t size;
    index_longest(symbols, text, &size);
    if (size == 0) {
        size = find_rule(n, text, becomes);
        if (size) return size;
        size = character_bytes(text);
    }
    *becomes = (Bytes){text.data, size};
    return size;
}

/* Normalizer::Normalize in sentencepiece's normalizer.cc. */
Text normalize_whole(const Normalizer *n, const Index *symbols, Bytes text) {
    Text out = {0};
    const char *space = n->escape_whitespaces ? SPACE_SYMBOL : " ";
    size_t space_bytes = strlen(space), taken;
    bool after_space = n->remove_extra_whitespaces;
    Bytes piece;
    while (n->remove_extra_whitespaces && text.size) {
        taken = normalize_prefix(n, symbols, text, &piece);
        if (piece.size != 1 || piece.data[0] != ' ') break;
        text = tail(text, taken);
    }
    if (text.size && n->prepend != NEVER) text_append(&out, space, space_bytes);
    for (; text.size; text = tail(text, taken)) {
        taken = normalize_prefix(n, symbols, text, &piece);
        while (after_space && piece.size && piece.data[0] == ' ') piece = tail(piece, 1);
        for (size_t i = 0; i < piece.size; i++)
            if (piece.data[i] == ' ') text_append(&out, space, space_bytes);
            else text_append(&out, piece.data + i, 1);
        if (piece.size) after_space = n->remove_extra_whitespaces && piece.data[piece.size - 1] == ' ';
    }
    while (n->remove_extra_whitespaces && out.size >= space_bytes &&
           !memcmp(out.data + out.size - space_bytes, space, space_bytes))
        out.size -= space_bytes;
    return out;
}

/* ---------------------------------------------------------------- loading */

/* The map: u32 bytes of the trie, the trie, the strings. The checks are sentencepiece's. */
static const char *load_map(const WeightFile *file, Normalizer *n) {
    WeightArray map;
    if (!weights_array(file, "tokenizer.ggml.precompiled_charsmap", &map) || map.count == 0) return NULL;
    if (map.type != VALUE_U8 || map.count < 5) return "\"tokenizer.ggml.precompiled_charsmap\" is broken";
    size_t bytes = trie_unit((Bytes){map.data, 4}, 0), left = map.count - 4;
    if (bytes < 1024 || bytes % 1024 || bytes >= left || map.data[map.count - 1] != 0)
        return "\"tokenizer.ggml.precompiled_charsmap\" is broken";
    n->trie = (Bytes){map.data + 4, bytes};
    n->replacements = (Bytes){map.data + 4 + bytes, left - bytes};
    return NULL;
}

const char *normalizer_load(const WeightFile *file, Normalizer *out) {
    static const char *const schemes[] = {[NEVER] = "never", [FIRST] = "first", [ALWAYS] = "always"};
    const char *scheme = weights_string_or(file, "sora.tokenizer.prepend_scheme", "");
    *out = (Normalizer){.prepend = NEVER};
    while (out->prepend <= ALWAYS && strcmp(scheme, schemes[out->prepend])) out->prepend++;
    if (out->prepend > ALWAYS)
        return reason("\"sora.tokenizer.prepend_scheme\" is \"%s\", expected always, first or never", scheme);
    out->split_words = weights_bool_or(file, "sora.tokenizer.split_words", false);
    out->squeeze_spaces = weights_bool_or(file, "sora.tokenizer.squeeze_spaces", false);
    out->escape_whitespaces = weights_bool_or(file, "sora.tokenizer.escape_whitespaces", true);
    out->remove_extra_whitespaces = weights_bool_or(file, "tokenizer.ggml.remove_extra_whitespaces", false);
    return load_map(file, out);
}
