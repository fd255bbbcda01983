/* test_sha256.c - sha256.c on the examples of FIPS 180-4 and NIST's test vectors. */
#include "tests/test.h"
#include "engine/engine.h"

#include <string.h>

static void expect(const char *text, size_t times, const char *hex) {
    Sha256 sha;
    char digest[65];
    sha256_start(&sha);
    for (size_t i = 0; i < times; i++) sha256_add(&sha, text, strlen(text));
    sha256_finish(&sha, digest);
    CHECK(!strcmp(digest, hex), "%zu times \"%s\" gives %s", times, text, digest);
}

void test_sha256(void) {
    expect("", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    expect("abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    expect("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
           "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    expect(
        "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmn"
           "hijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrst"
        "nopqrstu",
        1, "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
    expect("a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    expect("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 12500,
           "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}
