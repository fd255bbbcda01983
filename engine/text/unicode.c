/* unicode.c - Unicode Normalization Form C (Unicode Standard Annex 15), and tests for digits and white space.
 *
 * "ộ" can be typed as one character, or as "o" and two combining marks in either order. Form C makes them equal:
 *
 *   input         o, circumflex U+0302 (combining class 230), dot below U+0323 (class 220)
 *   decompose     replace each character by its parts, recursively; here nothing changes
 *   order         sort each run of marks by combining class, stably: o, dot below, circumflex
 *   compose       o + dot below -> U+1ECD, U+1ECD + circumflex -> U+1ED9 "ộ"
 *
 * A mark composes with the last starter (a character of class 0) unless a mark of the same class stands between them.
 * Hangul syllables are computed. All other data is in tables.h, which is parsed on the first use. The tables are part
 * of the program, not of the weight files, so every weight file sees the same text for a prompt. */
#include "engine/engine.h"
#include "engine/text/tables.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- tables */

/* A character and its parts. */
typedef struct {
    uint32_t code, parts[PARTS]; /* 0 after the last part */
    bool composes; /* form C composes the parts to the character again */
} Form;

static Form canonical[DECOMPOSITIONS], usual[FORMS]; /* sorted by code */
static const Form *composed[DECOMPOSITIONS];         /* those that compose, sorted by parts */
static size_t num_composed;
static uint8_t classes_of[MARKS_END];

static uint32_t take_number(const char **at) {
    char *end;
    uint32_t number = (uint32_t)strtoul(*at, &end, 16);
    *at = end;
    return number;
}

/* Parses "c0=41+300,41+301,": U+00C0 has the parts U+0041 and U+0300. An item without a code has the next one. */
static void load_forms(const char *const *row, Form *form) {
    uint32_t code = 0;
    for (; *row; row++)
        for (const char *at = *row; *at; at++, form++) {
            uint32_t number = take_number(&at);
            code = *at == '=' ? number : code + 1;
            if (*at == '=') at++, number = take_number(&at);
            *form = (Form){code, {number}, *at == '+'};
            for (int i = 1; *at == '+'; i++) at++, form->parts[i] = take_number(&at);
            if (*at == '!') at++, form->composes = false;
        }
}

/* Parses "300-314=e6,315=e8,": the combining class of a range or of one character. */
static void load_classes(void) {
    for (const char *const *row = classes; *row; row++)
        for (const char *at = *row; *at; at++) {
            uint32_t first = take_number(&at), last = first;
            if (*at == '-') at++, last = take_number(&at);
            at++;
            memset(classes_of + first, (int)take_number(&at), last - first + 1);
        }
}

static int compare_code(const void *key, const void *form) {
    uint32_t a = *(const uint32_t *)key, b = ((const Form *)form)->code;
    return (a > b) - (a < b);
}

static int compare_parts(const void *a, const void *b) {
    const Form *x = *(const Form *const *)a, *y = *(const Form *const *)b;
    int part = x->parts[0] == y->parts[0];
    return (x->parts[part] > y->parts[part]) - (x->parts[part] < y->parts[part]);
}

static void load_tables(void) {
    if (num_composed) return;
    load_forms(forms, usual);
    load_forms(decompositions, canonical);
    load_classes();
    for (int i = 0; i < DECOMPOSITIONS; i++)
        if (canonical[i].composes) composed[num_composed++] = &canonical[i];
    qsort(composed, num_composed, sizeof *composed, compare_parts);
}

static const Form *find_form(uint32_t code, const Form *table, size_t count) {
    return bsearch(&code, table, count, sizeof *table, compare_code);
}

/* ---------------------------------------------------------------- Hangul (Unicode, section 3.12) */

/* A syllable is a leading consonant L, a vowel V and perhaps a trailing consonant T:
 * S_BASE + (l*VS + v)*TS + t, where t = 0 means no trailing consonant. */
enum { S_BASE = 0xAC00, L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11A7, LS = 19, VS = 21, TS = 28 };

static bool is_among(uint32_t code, uint32_t first, uint32_t count) { return code - first < count; }

/* The two parts of a syllable: LV and T, or L and V if it has no T. */
static Form hangul_parts(uint32_t code) {
    uint32_t s = code - S_BASE;
    if (s % TS) return (Form){code, {code - s % TS, T_BASE + s % TS}, true};
    return (Form){code, {L_BASE + s / TS / VS, V_BASE + s / TS % VS}, true};
}

static uint32_t hangul_composed(uint32_t a, uint32_t b) {
    if (is_among(a, L_BASE, LS) && is_among(b, V_BASE, VS))
        return S_BASE + ((a - L_BASE) * VS + b - V_BASE) * TS;
    bool without_t = is_among(a, S_BASE, LS * VS * TS) && (a - S_BASE) % TS == 0;
    return without_t && is_among(b, T_BASE + 1, TS - 1) ? a + b - T_BASE : 0;
}

/* ---------------------------------------------------------------- normal form C */

typedef struct {
    uint32_t code, at; /* at: index before sorting, which makes qsort() stable */
    uint8_t class;
} Character;

static void append_decomposed(Text *out, uint32_t code) {
    const Form *form = find_form(code, canonical, DECOMPOSITIONS);
    Form hangul;
    if (is_among(code, S_BASE, LS * VS * TS)) hangul = hangul_parts(code), form = &hangul;
    if (!form) text_append_character(out, code);
    for (int i = 0; form && i < 2 && form->parts[i]; i++) append_decomposed(out, form->parts[i]);
}

static size_t decompose(Bytes text, Text *out) {
    uint32_t code;
    size_t bytes = utf8_decode(text, &code);
    append_decomposed(out, code);
    return bytes;
}

static int compare_class(const void *a, const void *b) {
    const Character *x = a, *y = b;
    return x->class != y->class ? x->class - y->class : x->at < y->at ? -1 : 1;
}

/* Sorts every run of marks by combining class. */
static void order(Character *c, size_t n) {
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; c[i].class && end < n && c[end].class; end++) continue;
        if (end - i > 1) qsort(c + i, end - i, sizeof *c, compare_class);
    }
}

/* The character that a and b compose to; 0 if they do not. */
static uint32_t compose_pair(uint32_t a, uint32_t b) {
    const Form pair = {0, {a, b}, true}, *key = &pair;
    const Form **found = bsearch(&key, composed, num_composed, sizeof *composed, compare_parts);
    return found ? (*found)->code : hangul_composed(a, b);
}

/* Composes in place; returns how many are left. */
static size_t compose(Character *c, size_t n) {
    size_t starter = 0, kept = 0;
    int before = 256; /* the class of what was kept last; 256 until there is a starter */
    for (size_t i = 0; i < n; i++) {
        bool joins = before == 0 || before < c[i].class;
        uint32_t code = joins ? compose_pair(c[starter].code, c[i].code) : 0;
        if (code) {
            c[starter].code = code;
            continue;
        }
        if (c[i].class == 0) starter = kept;
        if (c[i].class == 0 || before < 256) before = c[i].class;
        c[kept++] = c[i];
    }
    return kept;
}

void text_compose(Text *text) {
    size_t n = 0, at = 0;
    while (at < text->size && text->data[at] < 0xCC) at++;
    if (at == text->size) return; /* all characters are below U+0300: already in form C */
    load_tables();
    text_rewrite(text, decompose);
    Character *c = allocate(text->size * sizeof *c);
    for (Bytes rest = text_bytes(text); rest.size; n++) {
        rest = tail(rest, utf8_decode(rest, &c[n].code));
        c[n].at = (uint32_t)n;
        c[n].class = c[n].code < MARKS_END ? classes_of[c[n].code] : 0;
    }
    order(c, n);
    n = compose(c, n);
    text->size = 0;
    for (size_t i = 0; i < n; i++) text_append_character(text, c[i].code);
    free(c);
}

/* ---------------------------------------------------------------- single characters */

size_t usual_form(Bytes text, Text *out) {
    uint32_t code;
    size_t bytes = utf8_decode(text, &code);
    if (code < 0x80) return 0;
    load_tables();
    const Form *form = find_form(code, usual, FORMS);
    for (int i = 0; form && i < PARTS && form->parts[i]; i++) text_append_character(out, form->parts[i]);
    return form ? bytes : 0;
}

bool is_digit(uint32_t code) {
    for (const char *const *row = zeros; *row; row++)
        for (const char *at = *row; *at; at++)
            if (is_among(code, take_number(&at), 10)) return true;
    return false;
}

bool is_space(uint32_t code) {
    static const uint16_t others[] = {0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (code == others[i]) return true;
    return is_among(code, 9, 5) || is_among(code, 0x1C, 5) || is_among(code, 0x2000, 11);
}
