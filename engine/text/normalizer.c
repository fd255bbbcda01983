/* normalizer.c - turns clean text into the form that the pieces of a vocabulary have: "a fox" -> "▁a▁fox".
 *
 * U+2581 (▁) replaces each space, and one may be added in front. The options are those of the library that made the
 * vocabulary; the weight file stores them.
 *
 *   tokenizers (Hugging Face)  normalize_part():   the pre-tokenizer Metaspace and the normalizer Replace " {2,}"
 *   sentencepiece              normalize_whole():  Normalizer::Normalize() of normalizer.cc
 *
 * sentencepiece also replaces strings (full-width letters by ASCII, tabs by spaces). At each position it replaces the
 * longest key of a map. The map is a double-array trie (darts-clone) in the weight file. It is not trusted: each lookup
 * checks its index. */
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

/* A unit of the trie has 32 bits (darts-clone):
 *
 *   leaf: bit 31 is 1    30..0 value
 *   node: bit 31 is 0    30..10 offset of the children   9: offset * 256   8: has a leaf   7..0 label byte */
static size_t trie_offset(uint32_t unit) { return (size_t)(unit >> 10) << ((unit & 1u << 9) >> 6); }

/* Finds the longest key of the map that the text begins with. Returns its bytes, 0 if there is none, and sets
 * *replacement. */
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
    if (longest) replacement->size = strlen((const char *)replacement->data); /* load_map() checked the last 0 */
    return longest;
}

/* Normalizes the start of the text: a symbol, which stays, else a key of the map, else one character.
 * Returns how many bytes it took, and the result in *becomes. */
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

/* The map is u32 size, `size` bytes of trie, then 0-terminated replacements. The checks are those of sentencepiece. */
static const char *load_map(const WeightFile *file, Normalizer *n) {
    WeightArray map;
    if (!weights_array(file, "tokenizer.ggml.precompiled_charsmap", &map) || map.count == 0) return NULL;
    if (map.type != VALUE_U8 || map.count < 5)
        return "\"tokenizer.ggml.precompiled_charsmap\" is not an array of at least 5 u8";
    size_t bytes = trie_unit((Bytes){map.data, 4}, 0), left = map.count - 4;
    if (bytes < 1024 || bytes % 1024 || bytes >= left || map.data[map.count - 1] != 0)
        return reason("\"tokenizer.ggml.precompiled_charsmap\" is damaged: %zu bytes, of them %zu of trie, expected a "
                      "multiple of 1024 and a final 0", map.count, bytes);
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
