/* test_state.c - state.c: what is written is read, and nothing else is. */
#include "sora.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    int64_t number;
    float values[3];
} Thing;

static void walk(StateFile *f, Thing *thing) {
    thing->number = state_number(f, "number", thing->number, -5, 100);
    state_item(f, "values", thing->values, sizeof thing->values);
    if (!state_same(f, "word", "same", 4)) state_refuse(f, "the word is another");
}

static const char *write_thing(const char *path, Thing thing) {
    StateFile *f = state_create(path);
    walk(f, &thing);
    return state_commit(f);
}

static const char *read_thing(Bytes bytes, Thing *thing) {
    StateFile *f;
    *thing = (Thing){0};
    const char *why = state_parse(bytes, &f);
    if (why) return why;
    walk(f, thing);
    return state_close(f);
}

/* The text as a file's body, with its magic and its checksum. */
static Bytes file_of(const char *body, size_t size, uint8_t room[512]) {
    static const char magic[] = "sora state 1\n";
    char hex[65], *end = (char *)room + sizeof magic - 1 + size;
    memcpy(room, magic, sizeof magic - 1);
    memcpy(room + sizeof magic - 1, body, size);
    sha256_of(room, sizeof magic - 1 + size, hex);
    return (Bytes){room, sizeof magic - 1 + size + (size_t)sprintf(end, "sha256 %s\n", hex)};
}

static void check_refused(const char *body, size_t size, const char *expected) {
    uint8_t room[512];
    Thing thing;
    const char *why = read_thing(file_of(body, size, room), &thing);
    CHECK(why && strstr(why, expected), "'%s' is read: %s, expected '%s'", body, why ? why : "no fault", expected);
}

#define BODY(number, values, word) number "values " values "\nword " word "\n"
#define REFUSED(body, expected) check_refused(body, sizeof(body) - 1, expected)

static void check_bodies(void) {
    REFUSED("", "expected the item \"number\"");
    REFUSED("number 1", "expected the item");
    REFUSED("number \n", "\"number\" is , expected -5 to 100");
    REFUSED("number 1x\n", "\"number\" is 1x");
    REFUSED("number 101\n", "\"number\" is 101, expected -5 to 100");
    REFUSED("number -6\n", "\"number\" is -6");
    REFUSED("number 99999999999999999999\n", "expected -5 to 100");
    REFUSED("numbers 1\n", "expected the item");
    REFUSED("number 1\nvalues 11\n12345678901\n", "\"values\" has 11 bytes, expected 12");
    REFUSED("number 1\nvalues 12\n123456789012", "\"values\" of 12 bytes is longer than the file");
    REFUSED("number 1\nvalues 9223372036854775807\n1", "is longer than the file");
    REFUSED("number 1\nvalues -1\n1", "\"values\" is -1, expected 0");
    REFUSED(BODY("number 1\n", "12\n123456789012", "4\nSame"), "the word is another");
    REFUSED(BODY("number 1\n", "12\n123456789012", "4\nsame") "more", "4 bytes follow the last item");
}

/* Field by field: the padding is anything. */
static bool same(Thing a, Thing b) {
    return a.number == b.number && !memcmp(a.values, b.values, sizeof a.values);
}

static void check_damage(Bytes file, Thing written) {
    Thing thing;
    uint8_t *bytes = (uint8_t *)file.data;
    int wrong = 0;
    for (size_t size = 0; size < file.size; size++) wrong += !read_thing((Bytes){bytes, size}, &thing);
    CHECK(!wrong, "%d beginnings of a state are read", wrong);
    for (size_t i = 0; i < file.size; i++) {
        bytes[i] ^= 1;
        wrong += !read_thing(file, &thing);
        bytes[i] ^= 1;
    }
    CHECK(!wrong, "%d states with a changed bit are read", wrong);
    CHECK(!read_thing(file, &thing) && same(thing, written), "what was written is not what is read");
}

static void check_arithmetic(void) {
    char digests[PRECISIONS][65], again[65];
    for (int p = 0; p < PRECISIONS; p++) {
        kernels_choose("naive");
        arithmetic_digest((Precision)p, digests[p]);
        FOR_TABLES(name) {
            bool same_bits = p == F32 || kernels->order_of_bf16 == RISING; /* INT8's attention is in BF16 */
            arithmetic_digest((Precision)p, again);
            CHECK(!same_bits || !strcmp(again, digests[p]), "%s, %s kernels: another digest",
                  precision_name((Precision)p), name);
        }
    }
    kernels_choose("auto");
    CHECK(strcmp(digests[F32], digests[BF16]) && strcmp(digests[F32], digests[INT8]),
          "bf16 or int8 has the digest of f32");
}

void test_state(void) {
    char *path = temporary_path("thing.state"), *part = format_string("%s.part", path);
    char *nowhere = temporary_path("no/thing");
    Thing written = {7, {1, -2, 0.5f}}, thing;
    const char *why = write_thing(path, written);
    CHECK(!why, "a state cannot be written: %s", why ? why : "");
    CHECK(access(part, F_OK), "a state leaves a file beside it");
    Bytes file;
    why = read_file(path, 1 << 16, &file);
    CHECK(!why, "a state cannot be read");
    if (!why) check_damage(file, written);
    check_bodies();
    why = write_thing(nowhere, written);
    CHECK(why && !strcmp(why, "No such file or directory"), "a state without a folder: %s", why ? why : "");
    CHECK(!mkdir(part, 0700) && (why = write_thing(path, (Thing){8, {0}})), "a state is written over a folder");
    Bytes still;
    CHECK(!read_file(path, 1 << 16, &still) && !read_thing(still, &thing) && thing.number == 7,
          "a failed state took the old one's place");
    free((void *)still.data);
    rmdir(part);
    check_arithmetic();
    free((void *)file.data), free(path), free(part), free(nowhere);
}
