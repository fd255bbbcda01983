/* html.c - decodes one HTML character reference at the start of a text: "&amp;", "&#38;" or "&#x26;".
 *
 * Upstream decodes references with two libraries, and their rules differ:
 *
 *                        html_reference: html.unescape (Python)   ftfy_reference: ftfy 6.3.1
 *   semicolon            optional after 106 old names and after   required
 *                        numbers: "&lt" is "<", "&ampere" "&ere"
 *   length               any                                      at most 24 letters and digits
 *   names in capitals    those of the standard                    also others: "&EACUTE;" is U+00C9
 *
 * The names are those of the HTML5 standard. They are in tables.h and go into a hash table on the first use.
 * A number from 0x80 to 0x9F is read as Windows-1252, a surrogate or a number above 0x10FFFF as U+FFFD, and control
 * characters and noncharacters are dropped, all as in html.unescape. */
#include "engine/engine.h"
#include "engine/text/tables.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- names */

/* A name, and the rest of its line in tables.h: "*=c1,...", or "=c1,..." if the name needs its semicolon. */
typedef struct {
    Bytes name;
    const char *value;
} Entity;
static Entity entities[NAMES];
static Index entity_index;

static void load_names(void) {
    if (entity_index.places) return;
    entity_index = index_new(NAMES, entities, sizeof(Entity));
    int32_t n = 0;
    for (const char *const *row = names; *row; row++)
        for (const char *at = *row; *at; at = strchr(at, ',') + 1) {
            size_t size = strcspn(at, "*=");
            entities[n] = (Entity){{(const uint8_t *)at, size}, at + size};
            index_add(&entity_index, n++);
        }
}

/* Whether the name is valid without a semicolon. */
static bool is_bare(int32_t entity) { return *entities[entity].value == '*'; }

/* Appends the characters of a name: the code points after '=' ("c1", "3d+20e5"). With `capital`, those after '^' if the
 * entry has a '^'. */
static void append_entity(Text *out, int32_t entity, bool capital) {
    const char *at = strchr(entities[entity].value, '=');
    if (capital && at[strcspn(at, "^,")] == '^') at = strchr(at, '^');
    do {
        char *end;
        text_append_character(out, (uint32_t)strtoul(at + 1, &end, 16));
        at = end;
    } while (*at == '+');
}

/* ---------------------------------------------------------------- numbers */

static bool is_letter(uint8_t c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; }

static bool is_alphanumeric(uint8_t c) { return is_letter(c) || (c >= '0' && c <= '9'); }

static int digit_value(uint8_t c, bool hex) {
    if (c >= '0' && c <= '9') return c - '0';
    return hex && is_letter(c) && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

uint32_t windows_1252(uint32_t code) {
    static const uint16_t table[32] = {0x20AC, 0x81,   0x201A, 0x192,  0x201E, 0x2026, 0x2020, 0x2021,
                                       0x2C6,  0x2030, 0x160,  0x2039, 0x152,  0x8D,   0x17D,  0x8F,
                                       0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2013, 0x2014,
                                       0x2DC,  0x2122, 0x161,  0x203A, 0x153,  0x9D,   0x17E,  0x178};
    return table[code - 0x80];
}

/* html._invalid_codepoints: html.unescape returns an empty string for these. */
static bool is_dropped(uint32_t code) {
    return (code < 0x20 && !strchr("\t\n\f\r", (int)code)) || code == 0x7F ||
           (code >= 0xFDD0 && code <= 0xFDEF) || (code & 0xFFFE) == 0xFFFE;
}

static void append_numbered(Text *out, uint32_t code) {
    bool invalid = code == 0 || (code >= 0xD800 && code <= 0xDFFF) || code > 0x10FFFF;
    if (code >= 0x80 && code <= 0x9F) text_append_character(out, windows_1252(code));
    else if (invalid) text_append_character(out, 0xFFFD);
    else if (!is_dropped(code)) text_append_character(out, code);
}

static size_t numeric_reference(Bytes text, Text *out) {
    bool hex = text.size > 2 && (text.data[2] | 32) == 'x';
    size_t first = hex ? 3 : 2, at = first;
    uint32_t code = 0;
    for (int digit; at < text.size && (digit = digit_value(text.data[at], hex)) >= 0; at++)
        if (code <= 0x10FFFF) code = code * (hex ? 16 : 10) + (uint32_t)digit;
    if (at == first) return 0;
    append_numbered(out, code);
    return at + (at < text.size && text.data[at] == ';');
}

/* ---------------------------------------------------------------- html.unescape and ftfy */

/* Takes the longest valid name: "&notin;" is U+2209, not "&not" and "in;". */
size_t html_reference(Bytes text, Text *out) {
    if (text.data[0] != '&') return 0;
    if (text.size > 1 && text.data[1] == '#') return numeric_reference(text, out);
    load_names();
    size_t taken = 0;
    int32_t best = -1;
    Prefixes walk = index_prefixes(&entity_index, tail(text, 1));
    for (int32_t entity; (entity = prefixes_next(&walk)) >= 0;) {
        size_t end = 1 + walk.size;
        bool closed = end < text.size && text.data[end] == ';';
        if (closed || is_bare(entity)) best = entity, taken = end + closed;
    }
    if (taken) append_entity(out, best, false);
    return taken;
}

/* Finds the small-letter name of "&NTILDE;": "ntilde". -1 if html.unescape decodes the reference or a prefix of it. */
static int32_t find_capitals(Bytes reference) {
    Text html = {0};
    char name[32] = {0};
    bool decoded = html_reference(reference, &html) > 0;
    free(html.data);
    for (size_t i = 0; i < reference.size - 2; i++) {
        uint8_t c = reference.data[1 + i];
        if (decoded || c >= 'a') return -1;
        name[i] = (char)(c >= 'A' ? c + 32 : c);
    }
    return index_find(&entity_index, (Bytes){(const uint8_t *)name, strlen(name)});
}

static size_t named_reference(Bytes reference, Text *out) {
    load_names();
    int32_t entity = index_find(&entity_index, (Bytes){reference.data + 1, reference.size - 2});
    bool capital = entity < 0;
    if (capital) entity = find_capitals(reference);
    if (entity < 0) return 0;
    append_entity(out, entity, capital);
    return reference.size;
}

size_t ftfy_reference(Bytes text, Text *out) {
    if (text.data[0] != '&') return 0;
    size_t first = text.size > 1 && text.data[1] == '#' ? 2 : 1, end = first, before = out->size;
    while (end < text.size && end - first <= 24 && is_alphanumeric(text.data[end])) end++;
    if (end == first || end - first > 24 || end == text.size || text.data[end] != ';') return 0;
    if (first == 1) return named_reference((Bytes){text.data, end + 1}, out);
    bool whole = numeric_reference(text, out) == end + 1;
    if (whole && !(out->size == before + 1 && out->data[before] == ';')) return end + 1;
    out->size = before; /* ftfy takes a semicolon in the result as a sign of an incomplete match: "&#65x;", "&#59;" */
    return 0;
}
