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

/* What comes before a value: a comma after an earlier one, a line of its own, and its key, if it has one. */
static void begin_value(Json *json, const char *key) {
    if (json->text.size && !json->first) append(json, ",");
    if (json->text.size) append(json, "\n");
    for (int i = 0; i < json->depth; i++) append(json, "  ");
    json->first = false;
    if (!key) return;
    append_string(json, key);
    append(json, ": ");
}

void json_open(Json *json, const char *key) {
    begin_value(json, key);
    append(json, "{");
    json->depth++;
    json->first = true;
}

void json_close(Json *json) {
    json->depth--;
    if (!json->first) append(json, "\n");
    for (int i = 0; i < json->depth && !json->first; i++) append(json, "  ");
    append(json, "}");
    json->first = false;
    if (!json->depth) append(json, "\n");
}

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
