/* test_digest.c - SHA-256 of the bundled model's latents and clips. Every table of kernels, compiler, processor and C
 * library must give the same bytes.
 *
 * The digests were computed by this program. They show that all builds agree, not that the result is right; cli.sh
 * checks that against tensors of diffusers (tests/goldens/demo). After an intended change of the arithmetic, copy the
 * new digests from the messages, and show with the goldens that the change is right. */
#include "sora.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

/* sora --seed 1 -m models/demo.gguf "a blue star bounces on the grass", with -s, -f and --steps if they are not 0. The
 * digests are those of --dump's latents.npy and of the clip. */
typedef struct {
    int size, frames, steps;
    const char *latents, *clip;
} Example;

static const Example shorter = {48, 5, 2, "67170f2f4cb0d862bbba4c9b3a68416d6fcd992d65a598e867945a64d5767ccb",
                                "a82a6812c9789d5fa180eae122ea8b088203fb74199728a7c5ba217314216414"};
static const Example whole = {0, 0, 0, "f560d846ad66eb7400ca0b9427d4a6ff8bcd67aa2e8ba70d8830de0233c1cdc8",
                              "e2c1087270efa5c2c31c19a19fb867d323f7792bb655fbc518c188a66ee018c8"};

static void check_file(const char *path, const char *expected) {
    Bytes bytes;
    char found[65];
    const char *why = read_file(path, (size_t)1 << 24, &bytes);
    CHECK(!why, "%s: %s", path, why ? why : "");
    if (why) return;
    sha256_of(bytes.data, bytes.size, found);
    CHECK(!strcmp(found, expected), "%s kernels: the digest of %s is %s, not %s", kernels->name,
          strrchr(path, '/') + 1, found, expected);
    free((void *)bytes.data);
}

static void check_example(const Example *example) {
    char *folder = temporary_path("digest"), *clip = format_string("%s/clip.y4m", folder),
         *latents = format_string("%s/latents.npy", folder);
    Model model = model_load("models/demo.gguf", AUTOMATIC);
    Settings s = settings_new();
    s.prompt = "a blue star bounces on the grass", s.seed = 1, s.output = clip, s.quiet = true, s.record = false;
    s.width = s.height = example->size, s.frames = example->frames, s.steps = example->steps;
    settings_complete(&s, &model);
    taps_open(folder, "latents", NULL, 0, false);
    generate(&model, &s);
    taps_open(NULL, NULL, NULL, 0, false);
    check_file(latents, example->latents);
    check_file(clip, example->clip);
    model_free(&model);
    free(folder), free(clip), free(latents);
}

void test_digest(void) {
    FOR_TABLES(name) check_example(&shorter);
    kernels_choose("auto");
    check_example(&whole);
}
