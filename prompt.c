/* prompt.c - typed text -> clean text: what upstream does before its tokenizer.
 *
 * Takes the bytes that a user typed, gives valid UTF-8. Follows wan/modules/tokenizers.py of Wan2.1 and
 * pipelines/wan/pipeline_wan.py of diffusers (with ftfy installed):
 *
 *   text = ftfy.fix_text(text)
 *   text = html.unescape(html.unescape(text)).strip()
 *   text = re.sub(r"\s+", " ", text).strip()
 *
 * ftfy 6.3.1 normalises text from web pages, word processors and phones. It applies a list of repairs to each line, and
 * repeats them until nothing changes. An example:
 *
 *   typed         a cafe&amp;#769;,  “Ｏｐｅｎ”<CR><LF>
 *   first round   a cafe&#769;,  "Open"<LF>      outer reference, width, quotes, line break
 *   second        a café,  "Open"<LF>            inner reference; e and U+0301 are composed
 *   third         a café,  "Open"<LF>            nothing changes
 *   white space   a café, "Open"
 *
 * It matters in practice: the full-width commas of the released models' own negative prompt become ASCII commas.
 *
 * Left out: ftfy's fix_encoding, which guesses that text was decoded with a wrong encoding ("cafÃ©") and decodes it
 * again. For all text that fix_encoding leaves unchanged, the result equals upstream's.
 *
 * Bytes that are not UTF-8 become U+FFFD first (engine/text/utf8.c), so the rules below read valid UTF-8. Character
 * references are decoded in engine/text/html.c. Ligatures, widths and composition are in engine/text/unicode.c. */
#include "sora.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- ftfy's repairs of single characters */

/* Each of these is a Rule (engine.h): it returns the bytes that it replaces, or 0, and appends the replacement. */

/* U+0080 to U+009F -> the characters that Windows-1252 has at these codes: quotes, dashes, an ellipsis. */
static size_t c1_control(Bytes text, Text *out) {
    uint32_t code;
    size_t bytes = utf8_decode(text, &code);
    if (code < 0x80 || code > 0x9F) return 0;
    text_append_character(out, windows_1252(code));
    return bytes;
}

static size_t curly_quote(Bytes text, Text *out) {
    uint32_t code;
    size_t bytes = utf8_decode(text, &code);
    if (code == 0x2BC || (code >= 0x2018 && code <= 0x201B)) text_append(out, "'", 1);
    else if (code >= 0x201C && code <= 0x201F) text_append(out, "\"", 1);
    else return 0;
    return bytes;
}

static size_t line_break(Bytes text, Text *out) {
    uint32_t code;
    size_t bytes = utf8_decode(text, &code);
    if (code != '\r' && code != 0x2028 && code != 0x2029) return 0;
    text_append(out, "\n", 1);
    return bytes + starts_with(text, "\r\n");
}

/* Removes "ESC[1;31m" and the like: digits of any script and semicolons, then a letter. */
static size_t terminal_escape(Bytes text, Text *out) {
    (void)out;
    uint32_t code = ';';
    size_t at = 2;
    if (!starts_with(text, "\033[")) return 0;
    for (size_t bytes = 0; at < text.size; at += bytes) {
        bytes = utf8_decode(tail(text, at), &code);
        if (code != ';' && !is_digit(code)) break;
    }
    return at < text.size && (code | 32) >= 'a' && (code | 32) <= 'z' ? at + 1 : 0;
}

/* Removes control codes other than white space, the byte order mark U+FEFF, and annotation marks. */
static size_t control_character(Bytes text, Text *out) {
    (void)out;
    uint32_t code;
    size_t bytes = utf8_decode(text, &code);
    bool spaces = code == '\t' || code == '\n' || code == '\f' || code == '\r';
    bool none = (code < 0x20 && !spaces) || code == 0x7F || (code >= 0x206A && code <= 0x206F) ||
                code == 0xFEFF || (code >= 0xFFF9 && code <= 0xFFFC);
    return none ? bytes : 0;
}

/* ---------------------------------------------------------------- ftfy.fix_text */

static void repair(Text *text) {
    static Rule *const repairs[] = {c1_control, usual_form,      curly_quote,
                                    line_break, terminal_escape, control_character};
    for (size_t i = 0; i < sizeof repairs / sizeof *repairs; i++) text_rewrite(text, repairs[i]);
    text_compose(text);
}

/* Decodes the reference that the text ends with, and repairs the result. False if it ends with none. */
static bool decode_end(Text *text) {
    enum { LONGEST = 27 }; /* "&#", 24 letters or digits, ";" */
    size_t start = text->size, first = text->size > LONGEST ? text->size - LONGEST : 0;
    if (!text->size || text->data[text->size - 1] != ';') return false;
    while (start > first && text->data[start] != '&') start--;
    Text decoded = {0};
    bool found = ftfy_reference(tail(text_bytes(text), start), &decoded) > 0;
    if (found) {
        repair(&decoded);
        text->size = start;
        text_append(text, decoded.data, decoded.size);
    }
    free(decoded.data);
    return found;
}

/* Decodes references at every depth: "&amp;amp;lt;" and "&l&#116;;" become "<". */
static void decode_nested(Text *text) {
    Text out = {0};
    for (size_t i = 0; i < text->size; i++) {
        text_append(&out, text->data + i, 1);
        while (decode_end(&out)) continue;
    }
    text_append(&out, "", 0); /* data is never NULL */
    free(text->data);
    *text = out;
}

/* ftfy.fix_and_explain. ftfy decodes one level of nested references in a round, and "&amp;amp;amp;..." has up to
 * 16000 levels in 64 KB. Here only the first round does so, because it removes every ESC. After that the order of
 * the repairs does not change the result, so all levels are decoded at once. */
static void fix_line(Text *line, bool references) {
    Text before;
    bool same;
    if (references) text_rewrite(line, ftfy_reference);
    do {
        before = (Text){0};
        text_append(&before, line->data, line->size);
        repair(line);
        if (references) decode_nested(line);
        same = line->size == before.size && !memcmp(line->data, before.data, before.size);
        free(before.data);
    } while (!same);
}

/* ftfy takes a line with a '<' for markup, and keeps the character references of it and of all later lines. (ftfy also
 * begins a new line after a million characters.) */
static void fix_text(Text *text) {
    Text out = {0};
    bool markup = false;
    for (Bytes rest = text_bytes(text); rest.size;) {
        const uint8_t *newline = memchr(rest.data, '\n', rest.size);
        size_t size = newline ? (size_t)(newline - rest.data) + 1 : rest.size;
        Text line = {0};
        text_append(&line, rest.data, size);
        markup |= memchr(line.data, '<', size) != NULL;
        fix_line(&line, !markup);
        text_append(&out, line.data, line.size);
        free(line.data);
        rest = tail(rest, size);
    }
    free(text->data);
    *text = out;
}

/* ---------------------------------------------------------------- white space */

/* A run of white space becomes one space; at the ends it is removed. */
static size_t white_space(Bytes text, Text *out) {
    uint32_t code;
    size_t at = 0;
    for (size_t bytes; at < text.size; at += bytes) {
        bytes = utf8_decode(tail(text, at), &code);
        if (!is_space(code)) break;
    }
    if (at > 0 && at < text.size && out->size > 0) text_append(out, " ", 1);
    return at;
}

Bytes prompt_clean(Bytes prompt) {
    Text text = {0};
    text_append_utf8(&text, prompt);
    fix_text(&text);
    text_rewrite(&text, html_reference);
    text_rewrite(&text, html_reference);
    text_rewrite(&text, white_space);
    return text_bytes(&text);
}
