/* test_cli.c - runs cli.sh, which tests the command line, and writes the damaged weight files that it uses. The
 * program is $SORA, or ./sora. */
#include "tests/test.h"
#include "tests/gguf_builder.h"
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static Bytes model; /* tests/goldens/model/model.gguf */

static void write_bytes(const char *name, size_t size) {
    char *path = temporary_path(name);
    OutputFile out = output_open(path);
    output_write(&out, model.data, size);
    output_commit(&out);
    free(path);
}

/* Writes the model with one bit flipped, `offset` bytes after the start of `text`. */
static void write_changed(const char *name, const char *text, size_t offset) {
    uint8_t *data = (uint8_t *)model.data, *end = data + model.size - strlen(text), *at = data;
    while (at < end && memcmp(at, text, strlen(text))) at++;
    CHECK(at < end, "the model has no \"%s\"", text);
    at[offset] ^= 1;
    write_bytes(name, model.size);
    at[offset] ^= 1;
}

/* Writes the model with `by` added to one weight in the middle of a tensor. */
static void write_perturbed(const char *name, const char *tensor, int rows, int cols, float by) {
    WeightFile *file;
    const char *why = weights_parse(model, name, &file);
    CHECK(!why, "the model: %s", why ? why : "");
    if (why) return;
    float *values = (float *)weights_bind(file, rows, cols, "%s", tensor).data,
          *one = values + rows * cols / 2, before = *one;
    *one += by;
    write_bytes(name, model.size);
    *one = before;
    weights_close(file);
}

/* Writes the model with a default.precision. A second key makes the new keys 64 bytes long, so the tensors stay
 * aligned. */
static void write_precision(const char *name, const char *precision) {
    Builder keys;
    uint64_t count;
    memcpy(&count, model.data + 16, sizeof count);
    keys.size = 0;
    put(&keys, model.data, 16);
    put_u64(&keys, count + 2);
    put_string(&keys, "default.precision");
    put_u32(&keys, VALUE_STRING);
    put_string(&keys, precision);
    put_key(&keys, "test.extra", VALUE_U8, 0, 1);
    CHECK(keys.size == 24 + 64, "%s: %zu bytes of keys", name, keys.size - 24);
    char *path = temporary_path(name);
    OutputFile out = output_open(path);
    output_write(&out, keys.data, keys.size);
    output_write(&out, model.data + 24, model.size - 24);
    output_commit(&out);
    free(path);
}

static void write_models(void) {
    write_bytes("empty.gguf", 0);
    write_bytes("header.gguf", 1000);
    write_bytes("cut.gguf", model.size - 1000);
    write_changed("missing.gguf", "blocks.1.ffn.2.weight", 2);
    write_changed("shape.gguf", "wan.ffn_dim",
                  strlen("wan.ffn_dim") + 4); /* behind the name: type, then value */
    write_changed("tokenizer.gguf", "tokenizer.ggml.scores", 0);
    write_changed("version.gguf", "sora.format_version", strlen("sora.format_version") + 4);
    write_changed("layout.gguf", "O,T,Y,X,I", 0);
    write_perturbed("changed.gguf", "blocks.1.ffn.2.weight", 24, 40, 0.5f);
    write_perturbed("infinite.gguf", "blocks.1.ffn.2.weight", 24, 40, INFINITY);
    write_perturbed("overflow.gguf", "blocks.0.ffn.0.weight", 40, 24, 3e38f);
    write_perturbed("text.gguf", "enc.blk.0.ffn_up.weight", 40, 24, INFINITY);
    write_perturbed("decoder.gguf", "vae.conv2.weight", 4, 4, INFINITY);
    write_precision("int8.gguf", "int8");
    write_precision("fp16.gguf", "fp16");
}

/* Runs cli.sh. Each line that it prints is a claim. */
static void count_claims(const char *folder) {
    const char *sora = getenv("SORA");
    char *command = format_string("sh tests/cli.sh '%s' '%s'", sora ? sora : "./sora", folder), line[1024];
    FILE *claims = popen(command, "r");
    int count = 0;
    while (claims && fgets(line, sizeof line, claims)) {
        line[strcspn(line, "\n")] = 0;
        CHECK(!strncmp(line, "ok ", 3), "%s", line);
        count++;
    }
    CHECK(claims && pclose(claims) == 0 && count > 200, "cli.sh ended after %d claims", count);
    free(command);
}

void test_cli(void) {
    const char *why = read_file(test_path("goldens/model/model.gguf"), 1 << 24, &model);
    CHECK(!why, "the model: %s", why ? why : "");
    if (why) return;
    char *folder = temporary_path("cli.files");
    write_models();
    *strrchr(folder, '/') = 0;
    count_claims(folder);
    free(folder);
    free((void *)model.data);
}
