/* prompt.c - what was typed, cleaned as the pipeline that trained users' habits cleans it.
 *
 * Upstream (diffusers, pipelines/wan/pipeline_wan.py):
 *
 *   text = ftfy.fix_text(text)                          where ftfy is installed
 *   text = html.unescape(html.unescape(text)).strip()
 *   text = re.sub(r"\s+", " ", text).strip()
 *
 * Of ftfy 6.3.1 this file does the two repairs that concern what people paste: `unescape_html` (entities with
 * their semicolon, to any depth, but not from the first line on that holds a '<') and `uncurl_quotes`. So the
 * result equals upstream's except for texts on which ftfy's other repairs act. Those are not done here:
 *   - mojibake: text once decoded in a wrong encoding (`fix_encoding` and its four helpers);
 *   - C1 control characters taken for Windows-1252 (U+0085 becomes an ellipsis there, a space here);
 *   - Latin ligatures (U+FB01 to "fi") and full-width and half-width forms, to their usual characters;
 *   - surrogates (U+FFFD here), terminal escapes and control characters, which it removes;
 *   - normalisation to NFC (`e` and U+0301 to one character).
 *
 * Bytes that are no UTF-8 become U+FFFD (engine/text/utf8.c). All that follows may rely on valid UTF-8. */
#include "sora.h"

#include <stdlib.h>
#include <string.h>

/* A pass writes a new text; it then takes the place of the old one. */
static void become(Text *text, Text next) {
    free(text->data);
    *text = next;
}

static Bytes rest_of(const Text *text, size_t at) { return (Bytes){text->data + at, text->size - at}; }

/* ---------------------------------------------------------------- character references */

typedef struct {
    const char *name, *text, *capital;
    int bare; /* counts without its semicolon too */
} Entity;

static const Entity entities[] = {
#include "engine/text/html_entities.h"
};

enum { LONGEST_ENTITY = 31, ENTITIES = sizeof entities / sizeof entities[0] };

static int compare_name(const void *name, const void *entity) {
    return strcmp(name, ((const Entity *)entity)->name);
}

/* The entity of this name, or NULL; with `lower`, of the name in small letters. */
static const Entity *find_entity(const uint8_t *name, size_t size, bool lower) {
    char key[LONGEST_ENTITY + 1] = {0};
    if (size > LONGEST_ENTITY) return NULL;
    for (size_t i = 0; i < size; i++)
        key[i] = (char)(lower && name[i] >= 'A' && name[i] <= 'Z' ? name[i] + 32 : name[i]);
    return bsearch(key, entities, ENTITIES, sizeof(Entity), compare_name);
}

static bool is_digit(uint8_t c) { return c >= '0' && c <= '9'; }

static bool is_letter(uint8_t c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; }

static bool is_alphanumeric(uint8_t c) { return is_letter(c) || is_digit(c); }

static int digit_value(uint8_t c, bool hex) {
    if (is_digit(c)) return c - '0';
    return hex && is_letter(c) && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
}

/* The code points that Python drops (html._invalid_codepoints). */
static bool is_dropped(uint32_t code) {
    return (code < 0x20 && !strchr("\t\n\f\r", (int)code)) || (code >= 0x7F && code <= 0x9F) ||
           (code >= 0xFDD0 && code <= 0xFDEF) || (code & 0xFFFE) == 0xFFFE;
}

/* The character that a number stands for: HTML reads 0x80 to 0x9F as Windows-1252. */
static void append_numbered(Text *out, uint32_t code) {
    static const uint16_t windows_1252[32] = {
        0x20AC, 0x81,   0x201A, 0x192,  0x201E, 0x2026, 0x2020, 0x2021, 0x2C6, 0x2030, 0x160,
        0x2039, 0x152,  0x8D,   0x17D,  0x8F,   0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022,
        0x2013, 0x2014, 0x2DC,  0x2122, 0x161,  0x203A, 0x153,  0x9D,   0x17E, 0x178};
    bool none = code == 0 || (code >= 0xD800 && code <= 0xDFFF) || code > 0x10FFFF;
    if (code >= 0x80 && code <= 0x9F) text_append_character(out, windows_1252[code - 0x80]);
    else if (none) text_append_character(out, 0xFFFD);
    else if (!is_dropped(code)) text_append_character(out, code);
}

/* Each of the following reads a reference at text[0] == '&', appends what it stands for and returns the bytes
 * that it takes, or returns 0. First "&#38;", "&#x26", as html.unescape reads them. */
static size_t numeric_reference(const uint8_t *text, size_t left, Text *out) {
    bool hex = left > 2 && (text[2] | 32) == 'x';
    size_t first = hex ? 3 : 2, at = first;
    uint32_t code = 0;
    for (int digit; at < left && (digit = digit_value(text[at], hex)) >= 0; at++)
        if (code <= 0x10FFFF) code = code * (hex ? 16 : 10) + (uint32_t)digit;
    if (at == first) return 0;
    append_numbered(out, code);
    return at + (at < left && text[at] == ';');
}

/* html.unescape's: any name with its semicolon, else the longest that counts without: "&amplify" is
 * "&lify". */
static size_t html_reference(const uint8_t *text, size_t left, Text *out) {
    if (left > 1 && text[1] == '#') return numeric_reference(text, left, out);
    size_t size = 0;
    while (size < LONGEST_ENTITY && size + 1 < left && is_alphanumeric(text[1 + size])) size++;
    bool closed = size + 1 < left && text[1 + size] == ';';
    for (; size > 0; size--, closed = false) {
        const Entity *entity = find_entity(text + 1, size, false);
        if (!entity || !(closed || entity->bare)) continue;
        text_append(out, entity->text, strlen(entity->text));
        return 1 + size + closed;
    }
    return 0;
}

static const char *ftfy_entity(const uint8_t *name, size_t size) {
    const Entity *entity = find_entity(name, size, false);
    if (entity) return entity->text;
    for (size_t i = 0; i < size; i++)
        if (name[i] >= 'a' && name[i] <= 'z') return NULL;
    entity = find_entity(name, size, true);
    return entity ? entity->capital : NULL;
}

/* ftfy's: only up to 24 letters and digits with their semicolon, and not "&#59;", which is a semicolon. */
static size_t ftfy_reference(const uint8_t *text, size_t left, Text *out) {
    size_t first = left > 1 && text[1] == '#' ? 2 : 1, end = first, before = out->size;
    while (end < left && end - first <= 24 && is_alphanumeric(text[end])) end++;
    if (end == first || end - first > 24 || end == left || text[end] != ';') return 0;
    if (first == 1) {
        const char *entity = ftfy_entity(text + 1, end - 1);
        if (entity) text_append(out, entity, strlen(entity));
        return entity ? end + 1 : 0;
    }
    bool whole = numeric_reference(text, left, out) == end + 1;
    if (whole && !(out->size == before + 1 && out->data[before] == ';')) return end + 1;
    out->size = before;
    return 0;
}

/* Replaces every reference of one kind, from left to right; false if there was none. */
static bool unescape(Text *text, size_t (*reference)(const uint8_t *, size_t, Text *)) {
    Text out = {0};
    bool found = false;
    for (size_t at = 0; at < text->size;) {
        const uint8_t *p = text->data + at;
        size_t taken = *p == '&' ? reference(p, text->size - at, &out) : 0;
        if (!taken) text_append(&out, p, 1);
        found |= taken > 0;
        at += taken ? taken : 1;
    }
    become(text, out);
    return found;
}

/* ---------------------------------------------------------------- quotes, white space, all of it */

static void uncurl_quotes(Text *text) {
    Text out = {0};
    uint32_t code;
    for (size_t at = 0, bytes; at < text->size; at += bytes) {
        bytes = utf8_decode(rest_of(text, at), &code);
        if (code == 0x2BC || (code >= 0x2018 && code <= 0x201B)) text_append(&out, "'", 1);
        else if (code >= 0x201C && code <= 0x201F) text_append(&out, "\"", 1);
        else text_append(&out, text->data + at, bytes);
    }
    become(text, out);
}

/* ftfy.fix_text with no repair but unescape_html="auto" and uncurl_quotes. A line that holds a '<' is taken
 * for markup, whose entities mean something, and so is all that follows it. */
static void ftfy_repairs(Text *text) {
    Text out = {0};
    bool markup = false;
    for (size_t at = 0, end; at < text->size; at = end) {
        const uint8_t *newline = memchr(text->data + at, '\n', text->size - at);
        end = newline ? (size_t)(newline - text->data) + 1 : text->size;
        Text line = {0};
        text_append(&line, text->data + at, end - at);
        markup |= memchr(line.data, '<', line.size) != NULL;
        while (!markup && unescape(&line, ftfy_reference)) continue;
        uncurl_quotes(&line);
        text_append(&out, line.data, line.size);
        free(line.data);
    }
    become(text, out);
}

/* What Python's \s matches and str.strip() strips. */
static bool is_space(uint32_t code) {
    return (code >= 9 && code <= 13) || (code >= 0x1C && code <= 0x20) || code == 0x85 || code == 0xA0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
           code == 0x202F || code == 0x205F || code == 0x3000;
}

/* One space for every run of white space, none at the ends. */
static void squeeze_white_space(Text *text) {
    Text out = {0};
    bool pending = false;
    uint32_t code;
    for (size_t at = 0, bytes; at < text->size; at += bytes) {
        bytes = utf8_decode(rest_of(text, at), &code);
        bool space = is_space(code);
        if (!space && pending && out.size) text_append(&out, " ", 1);
        if (!space) text_append(&out, text->data + at, bytes);
        pending = space;
    }
    text_append(&out, "", 0); /* never NULL, even if nothing is left */
    become(text, out);
}

Bytes prompt_clean(Bytes prompt) {
    Text text = {0};
    text_append_utf8(&text, prompt);
    ftfy_repairs(&text);
    unescape(&text, html_reference);
    unescape(&text, html_reference);
    squeeze_white_space(&text);
    return (Bytes){text.data, text.size};
}
