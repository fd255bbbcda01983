/* test_json.c - json.c: the exact text that it writes, and the values that it finds. */
#include "tests/test.h"
#include "engine/engine.h"

#include <math.h>
#include <string.h>

static void test_object(void) {
    Json json = {0};
    json_open(&json, NULL);
    json_string(&json, "tool", "sora");
    json_int(&json, "low", -9223372036854775807);
    json_unsigned(&json, "seed", UINT64_MAX);
    json_open(&json, "empty");
    json_close(&json);
    json_open(&json, "size");
    json_double(&json, "shift", 3);
    json_double(&json, "third", 1.0 / 3);
    json_double(&json, "tenth", 0.1);
    json_double(&json, "none", INFINITY);
    json_close(&json);
    json_bool(&json, "ok", true);
    json_close(&json);
    static const char expected[] =
        "{\n  \"tool\": \"sora\",\n  \"low\": -9223372036854775807,\n  \"seed\": 18446744073709551615,\n"
        "  \"empty\": {},\n"
        "  \"size\": {\n    \"shift\": 3,\n    \"third\": 0.3333333333333333,\n"
        "    \"tenth\": 0.1,\n    \"none\": null\n  },\n  \"ok\": true\n}\n";
    CHECK(!strcmp((char *)json.text.data, expected), "the object is\n%s", (char *)json.text.data);
    json_free(&json);
}

static void expect_string(const char *value, const char *expected) {
    Json json = {0};
    json_string(&json, NULL, value);
    CHECK(!strcmp((char *)json.text.data, expected), "the string is %s, expected %s",
          (char *)json.text.data, expected);
    json_free(&json);
}

#define REPLACED "\xef\xbf\xbd"

static void test_strings(void) {
    expect_string("", "\"\"");
    expect_string("a \"fox\" \\ /", "\"a \\\"fox\\\" \\\\ /\"");
    expect_string("\n\t\x01\x7f", "\"\\u000a\\u0009\\u0001\\u007f\"");
    expect_string("\xc3\xa9\xe4\xbd\xa0\xf0\x9f\xa6\x8a", "\"\xc3\xa9\xe4\xbd\xa0\xf0\x9f\xa6\x8a\"");
    expect_string("\xff|\x80|\xc3|\xe4\xbd|",
                  "\"" REPLACED "|" REPLACED "|" REPLACED "|" REPLACED "|\"");
    expect_string("\xc0\x80", "\"" REPLACED REPLACED "\"");              /* overlong */
    expect_string("\xed\xa0\x80", "\"" REPLACED REPLACED REPLACED "\""); /* a surrogate */
    expect_string("\xf4\x90\x80\x80", "\"" REPLACED REPLACED REPLACED REPLACED "\""); /* above U+10FFFF */
    expect_string("\xf4\x8f\xbf\xbf", "\"\xf4\x8f\xbf\xbf\"");
    expect_string("\xed\x9f\xbf\xee\x80\x80", "\"\xed\x9f\xbf\xee\x80\x80\"");
}

static void expect_found(const char *text, const char *key, const char *expected) {
    Bytes found = json_find((Bytes){(const uint8_t *)text, strlen(text)}, key);
    bool equal = expected ? found.data && found.size == strlen(expected) && !memcmp(found.data, expected, found.size)
                          : !found.data;
    CHECK(equal, "in %s, %s is '%.*s', expected %s", text, key, (int)found.size,
          found.data ? (const char *)found.data : "", expected ? expected : "nothing");
}

static void test_find(void) {
    const char *text = "{\"a\": {\"b\": \"inner\"}, \"text\": \"b\", \"c\" : [\"b\", 1],\n"
                       "\"b\":\"x\\\"y\", \"n\": -1.5e3}";
    expect_found(text, "b", "x\\\"y");
    expect_found(text, "n", "-1.5e3");
    expect_found(text, "text", "b");
    expect_found(text, "inner", NULL);
    expect_found(text, "d", NULL);
    expect_found("", "b", NULL);
    expect_found("{\"b\"", "b", NULL);
    expect_found("{\"b\":", "b", "");
    expect_found("{\"b\": \"never closed", "b", "never closed");
    expect_found("{\"b\\", "b\\", NULL);
}

void test_json(void) {
    test_object();
    test_find();
    test_strings();
}
