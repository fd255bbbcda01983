/* json.c - writes JSON (RFC 8259), as much of it as a record of settings needs: objects of numbers, strings
 * and booleans, into text that grows.
 *
 * Strings may hold anything: JSON is UTF-8, so what is not becomes U+FFFD, the replacement character, and
 * control characters are escaped. Numbers are written with as many digits as it takes to read the same
 * number back; JSON has no infinities, they become null. */
#include "engine/engine.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static void append(Json *json, const char *text, size_t bytes) {
    if (json->size + bytes + 1 > json->capacity) {
        json->capacity = 2 * (json->size + bytes + 1);
        json->text = reallocate(json->text, json->capacity);
    }
    memcpy(json->text + json->size, text, bytes);
    json->size += bytes;
    json->text[json->size] = 0;
}

static void PRINTF_LIKE(2, 3) append_format(Json *json, const char *format, ...) {
    char text[64];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    append(json, text, (size_t)length);
}

/* Bytes of the character at s, of which `left` are there; 0 if they are no UTF-8 (RFC 3629: shortest forms
 * only, no surrogates, nothing beyond U+10FFFF). */
static size_t utf8_length(const uint8_t *s, size_t left) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t n = s[0] < 0x80 ? 1 : s[0] >> 5 == 6 ? 2 : s[0] >> 4 == 14 ? 3 : s[0] >> 3 == 30 ? 4 : 0;
    if (n == 0 || n > left) return 0;
    uint32_t code = n == 1 ? s[0] : s[0] & (0xffu >> (n + 1));
    for (size_t i = 1; i < n; i++) {
        if (s[i] >> 6 != 2) return 0;
        code = code << 6 | (s[i] & 0x3f);
    }
    bool valid = code >= least[n] && code <= 0x10ffff && code >> 11 != 0x1b;
    return valid ? n : 0;
}

static void append_string(Json *json, const char *string, size_t bytes) {
    const uint8_t *s = (const uint8_t *)string, *end = s + bytes;
    append(json, "\"", 1);
    for (size_t n; s < end; s += n ? n : 1) {
        n = utf8_length(s, (size_t)(end - s));
        if (!n) append(json, "\xef\xbf\xbd", 3);
        else if (*s == '"' || *s == '\\') append_format(json, "\\%c", *s);
        else if (*s < 0x20 || *s == 0x7f) append_format(json, "\\u%04x", *s);
        else append(json, (const char *)s, n);
    }
    append(json, "\"", 1);
}

/* What comes before a value: a comma after an earlier one, a line of its own, and its key, if it has one. */
static void begin_value(Json *json, const char *key) {
    if (json->size && !json->first) append(json, ",", 1);
    if (json->size) append(json, "\n", 1);
    for (int i = 0; i < json->depth; i++) append(json, "  ", 2);
    json->first = false;
    if (!key) return;
    append_string(json, key, strlen(key));
    append(json, ": ", 2);
}

void json_open(Json *json, const char *key) {
    begin_value(json, key);
    append(json, "{", 1);
    json->depth++;
    json->first = true;
}

void json_close(Json *json) {
    json->depth--;
    if (!json->first) append(json, "\n", 1);
    for (int i = 0; i < json->depth && !json->first; i++) append(json, "  ", 2);
    append(json, "}", 1);
    json->first = false;
    if (!json->depth) append(json, "\n", 1);
}

void json_string(Json *json, const char *key, const char *value) {
    begin_value(json, key);
    append_string(json, value, strlen(value));
}

void json_int(Json *json, const char *key, int64_t value) {
    begin_value(json, key);
    append_format(json, "%" PRId64, value);
}

void json_bool(Json *json, const char *key, bool value) {
    begin_value(json, key);
    append_format(json, "%s", value ? "true" : "false");
}

void json_double(Json *json, const char *key, double value) {
    char text[32];
    begin_value(json, key);
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    append_format(json, "%s", isfinite(value) ? text : "null");
}

void json_free(Json *json) {
    free(json->text);
    *json = (Json){0};
}
