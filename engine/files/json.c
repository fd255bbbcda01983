/* json.c - writes JSON (RFC 8259) into a growable string, and finds the value of a key in a JSON text.
 *
 * A string may hold any bytes. Invalid UTF-8 becomes U+FFFD, and control characters are escaped. A double is written
 * with the fewest digits that read back as the same double. Infinity and NaN become null, since JSON has neither.
 *
 * json_find() scans the text for a key of the outermost object. It does not validate the text, and reads no byte beyond
 * its end. */
#include "engine/engine.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static void append(Json *json, const char *text) { text_append(&json->text, text, strlen(text)); }

static void PRINTF_LIKE(2, 3) append_format(Json *json, const char *format, ...) {
    char text[64];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    text_append(&json->text, text, (size_t)length);
}

static void append_string(Json *json, const char *string) {
    Text valid = {0};
    text_append_utf8(&valid, (Bytes){(const uint8_t *)string, strlen(string)});
    append(json, "\"");
    for (size_t i = 0; i < valid.size; i++) {
        uint8_t c = valid.data[i];
        if (c == '"' || c == '\\') append_format(json, "\\%c", c);
        else if (c < 0x20 || c == 0x7f) append_format(json, "\\u%04x", c);
        else text_append(&json->text, &c, 1);
    }
    append(json, "\"");
    free(valid.data);
}

/* Writes what precedes a value: a comma if it is not the first, a new line, the indentation, the key. */
static void begin_value(Json *json, const char *key) {
    if (json->text.size && !json->first) append(json, ",");
    if (json->text.size) append(json, "\n");
    for (int i = 0; i < json->depth; i++) append(json, "  ");
    json->first = false;
    if (!key) return;
    append_string(json, key);
    append(json, ": ");
}

static void open_value(Json *json, const char *key, const char *bracket) {
    begin_value(json, key);
    append(json, bracket);
    json->depth++;
    json->first = true;
}

static void close_value(Json *json, const char *bracket) {
    json->depth--;
    if (!json->first) append(json, "\n");
    for (int i = 0; i < json->depth && !json->first; i++) append(json, "  ");
    append(json, bracket);
    json->first = false;
    if (!json->depth) append(json, "\n");
}

void json_open(Json *json, const char *key) { open_value(json, key, "{"); }
void json_close(Json *json) { close_value(json, "}"); }
void json_open_array(Json *json, const char *key) { open_value(json, key, "["); }
void json_close_array(Json *json) { close_value(json, "]"); }

void json_string(Json *json, const char *key, const char *value) {
    begin_value(json, key);
    append_string(json, value);
}

void json_int(Json *json, const char *key, int64_t value) {
    begin_value(json, key);
    append_format(json, "%" PRId64, value);
}

void json_unsigned(Json *json, const char *key, uint64_t value) {
    begin_value(json, key);
    append_format(json, "%" PRIu64, value);
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
    free(json->text.data);
    *json = (Json){0};
}

/* ---------------------------------------------------------------- finding */

/* The index of the closing quote of the string whose opening quote is at `at`; text.size if there is none. */
static size_t string_end(Bytes text, size_t at) {
    for (at++; at < text.size && text.data[at] != '"'; at++)
        if (text.data[at] == '\\') at++;
    return at < text.size ? at : text.size;
}

static size_t skip_space(Bytes text, size_t at) {
    while (at < text.size && memchr(" \t\r\n", text.data[at], 4)) at++;
    return at;
}

/* The value that begins at `at`: a string without its quotes, a number, true, false or null. */
static Bytes value_at(Bytes text, size_t at) {
    size_t end = at;
    if (at < text.size && text.data[at] == '"') end = string_end(text, at++);
    else while (end < text.size && !memchr(",]} \t\r\n", text.data[end], 7)) end++;
    return (Bytes){text.data + at, end > at ? end - at : 0};
}

/* At depth 1, a string followed by a colon is a key. */
Bytes json_find(Bytes text, const char *key) {
    int depth = 0;
    for (size_t at = 0; at < text.size; at++) {
        uint8_t c = text.data[at];
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c != '"') continue;
        size_t end = string_end(text, at), next = skip_space(text, end + 1);
        bool named = end - at - 1 == strlen(key) && !memcmp(text.data + at + 1, key, strlen(key));
        if (named && depth == 1 && next < text.size && text.data[next] == ':')
            return value_at(text, skip_space(text, next + 1));
        at = end;
    }
    return (Bytes){NULL, 0};
}
