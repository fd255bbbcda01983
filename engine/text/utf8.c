/* utf8.c - a growable string (Text), conversion to and from UTF-8 and UTF-16, decimal digits.
 *
 * The input is untrusted. Valid UTF-8 is what RFC 3629 allows: shortest forms, no surrogates, nothing above U+10FFFF.
 * Invalid bytes are replaced by U+FFFD, one for each maximal subpart of a character (Unicode Standard, section 3.9 and
 * table 3-7), as Python's bytes.decode(errors="replace") does. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

void text_append(Text *text, const void *bytes, size_t size) {
    if (size >= text->room - text->size) {
        text->room = 2 * text->size + size + 32;
        text->data = reallocate(text->data, text->room);
    }
    if (size) memcpy(text->data + text->size, bytes, size);
    text->size += size;
    text->data[text->size] = 0;
}

/* Returns the bytes of the first character of a text that is not empty. If it is invalid, the bytes that one U+FFFD
 * replaces. */
static size_t utf8_bytes(Bytes text, bool *valid) {
    uint8_t lead = text.data[0];
    size_t bytes = lead < 0x80 ? 1 : lead < 0xC2 || lead > 0xF4 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    size_t at = 1;
    for (; at < bytes && at < text.size && text.data[at] >= low && text.data[at] <= high; at++)
        low = 0x80, high = 0xBF;
    *valid = at == bytes;
    return at;
}

bool is_printable(Bytes text, size_t *bytes) {
    bool valid;
    *bytes = utf8_bytes(text, &valid);
    if (!valid) return false;
    return text.data[0] >= 0x20 && text.data[0] != 0x7F && (text.data[0] != 0xC2 || text.data[1] >= 0xA0);
}

void text_append_utf8(Text *text, Bytes bytes) {
    bool valid;
    for (size_t n; bytes.size; bytes.data += n, bytes.size -= n) {
        n = utf8_bytes(bytes, &valid);
        if (valid) text_append(text, bytes.data, n);
        else text_append(text, "\xef\xbf\xbd", 3);
    }
}

size_t utf8_decode(Bytes text, uint32_t *code) {
    bool valid;
    size_t bytes = utf8_bytes(text, &valid);
    *code = bytes == 1 ? text.data[0] : text.data[0] & (0x7F >> bytes);
    for (size_t i = 1; i < bytes; i++) *code = *code << 6 | (text.data[i] & 0x3F);
    return bytes;
}

void text_append_character(Text *text, uint32_t code) {
    uint8_t bytes[4];
    int n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = n; i-- > 1; code >>= 6) bytes[i] = 0x80 | (code & 0x3F);
    bytes[0] = (uint8_t)(n == 1 ? code : (0xF00 >> n) | code);
    text_append(text, bytes, (size_t)n);
}

static uint32_t utf16_unit(Bytes text, size_t at, bool big_endian) {
    return at + 1 < text.size ? (uint32_t)text.data[at + !big_endian] << 8 | text.data[at + big_endian] : 0;
}

/* An unpaired surrogate becomes U+FFFD, and so does an odd byte at the end. */
bool text_append_utf16(Text *text, Bytes bytes) {
    uint32_t mark = utf16_unit(bytes, 0, true);
    bool big_endian = mark == 0xFEFF;
    if (!big_endian && mark != 0xFFFE) return false;
    text_append(text, "", 0);
    for (size_t at = 2; at < bytes.size; at += 2) {
        uint32_t code = utf16_unit(bytes, at, big_endian), low = utf16_unit(bytes, at + 2, big_endian);
        if (code >= 0xD800 && code < 0xDC00 && low >= 0xDC00 && low < 0xE000) {
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            at += 2;
        }
        bool invalid = (code >= 0xD800 && code < 0xE000) || at + 1 == bytes.size;
        text_append_character(text, invalid ? 0xFFFD : code);
    }
    return true;
}

size_t character_bytes(Bytes text) {
    size_t bytes = (size_t)"\1\1\1\1\1\1\1\1\1\1\1\1\2\2\3\4"[text.data[0] >> 4];
    return bytes < text.size ? bytes : text.size;
}

bool starts_with(Bytes text, const char *prefix) {
    size_t size = strlen(prefix);
    return text.size >= size && !memcmp(text.data, prefix, size);
}

void text_rewrite(Text *text, Rule *rule) {
    Text out = {0};
    bool valid;
    for (Bytes rest = text_bytes(text); rest.size;) {
        size_t taken = rule(rest, &out);
        if (!taken) text_append(&out, rest.data, taken = utf8_bytes(rest, &valid));
        rest = tail(rest, taken);
    }
    text_append(&out, "", 0); /* data is never NULL */
    free(text->data);
    *text = out;
}

int64_t take_digits(const char **text, int64_t most) {
    int64_t value = 0;
    const char *start = *text;
    for (; **text >= '0' && **text <= '9' && value <= most; (*text)++) value = 10 * value + (**text - '0');
    return *text > start && value <= most ? value : -1;
}
