/* test_memory.c - compares the memory that generate_memory() predicts with the measured peak. Each run has its own
 * child process. This suite runs first, while the parent, which the child copies, has allocated little. */
#include "sora.h"
#include "tests/test.h"

#include <stdlib.h>
#include <string.h>

static const char demo[] = "models/demo.gguf", tiny[] = "tests/goldens/model/model.gguf",
                  causal[] = "tests/goldens/causal/model.gguf", pictures[] = "tests/goldens/pictures/model.gguf";

typedef struct {
    const char *model, *prompt;
    int width, height, frames, steps, window; /* steps 0: the model's default; window 0: no window */
    double guidance;
    Precision precision;
    const char *at; /* the prompt after 0.3 seconds, or NULL */
    int images;     /* the clip begins with one, and ends with another */
    Start start;    /* if there are images: what becomes of them */
} Variant;

enum { MIB = 1 << 20 };

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { MEASURED = 0 }; /* sanitizers keep freed memory */
#else
enum { MEASURED = 1 };
#endif

/* Dies unless measured <= predicted <= 1.05 * measured + 1.5 MiB. */
static void compare(const char *what, size_t expected, size_t before) {
    size_t taken = memory_peak() - before;
    if (taken > expected || (double)expected > 1.05 * (double)taken + 1.5 * MIB)
        die(STATUS_CHECK, "%s: predicted %.2f MiB, measured %.2f MiB", what, (double)expected / MIB,
            (double)taken / MIB);
}

static void run(void *of) {
    const Variant *v = of;
    Settings s = settings_new();
    s.prompt = v->prompt, s.output = "/dev/null", s.width = v->width, s.height = v->height, s.frames = v->frames;
    s.guidance[0] = v->guidance, s.steps = v->steps, s.quiet = true;
    if (v->window) s.window = v->window;
    char *line = format_string("0.3 %s", v->at ? v->at : "");
    if (v->at) story_add(&s.story, (Bytes){(const uint8_t *)line, strlen(line)});
    kernels_choose("auto");
    Model model = model_load(v->model, v->precision);
    Source image;
    if (v->images && source_open("tests/goldens/images/clip.y4m", &image)) abort();
    if (v->images) s.source = &image, s.image = "", model.start = v->start;
    if (v->images > 1) s.last_source = &image, s.last_image = "";
    settings_complete(&s, &model);
    size_t before = memory_peak(), expected = generate_memory(&model, &s);
    generate(&model, &s);
    compare(reason("%s, %dx%d, %d frames, %s", v->model, v->width, v->height, v->frames, precision_name(v->precision)),
            expected, before);
    model_free(&model);
    story_free(&s.story);
    free(line);
}

/* Runs one block of a text encoder alone. In the models above, later stages need more memory than the text encoder. */
static void encode(void *precision) {
    enum { N = 512, E = 512, FFN = 2048 };
    static float zeros[FFN * E], embeds[N * E];
    static int32_t ids[N];
    Precision p = *(Precision *)precision;
    Linear square = {{zeros, TYPE_F32, E, E}, NULL, p}, up = {{zeros, TYPE_F32, FFN, E}, NULL, p},
           down = {{zeros, TYPE_F32, E, FFN}, NULL, p};
    TextBlock block = {zeros, zeros, square, square, square, square, zeros, up, up, down};
    TextEncoder e = {.vocab_size = 1, .dim = E, .ffn_dim = FFN, .num_heads = 8, .head_dim = 64, .num_layers = 1,
                     .num_buckets = 32, .max_distance = 128, .eps = 1, .precision = p,
                     .token_embedding = {zeros, TYPE_F32, 1, E}, .blocks = &block, .norm = zeros};
    kernels_choose("auto");
    memset(embeds, 1, sizeof embeds);
    size_t before = memory_peak(), rest = MIB;
    text_encode(&e, ids, N, embeds);
    scratch_free();
    compare(reason("text encoder, %s", precision_name(p)),
            text_encoder_memory(&e, N) + text_encoder_scratch(&e, N) + rest, before);
}

/* Prints the peak of so many seconds of video, a frame a second. */
static void generate_long(void *of) {
    Settings s = settings_new();
    s.prompt = "a red star", s.output = "/dev/null", s.width = 16, s.height = 16, s.fps_num = 1, s.fps_den = 1;
    s.seconds = *(double *)of, s.window = 6, s.sink = 1, s.quiet = true;
    kernels_choose("auto");
    Model model = model_load(causal, F32);
    settings_complete(&s, &model);
    generate(&model, &s);
    fprintf(stderr, "%zu", memory_peak());
    model_free(&model);
}

static double peak_of(double seconds_of_video) {
    char said[4096];
    int status = run_apart(generate_long, &seconds_of_video, said);
    CHECK(status == STATUS_OK, "%g seconds: status %d: %s", seconds_of_video, status, said);
    return strtod(said, NULL);
}

static void expect(void (*what)(void *), void *argument) {
    char said[4096];
    int status = run_apart(what, argument, said);
    CHECK(status == STATUS_OK, "status %d: %s", status, said);
}

void test_memory(void) {
    if (!MEASURED) return;
    char longest[4 * 512 + 1] = "";
    for (int i = 0; i < 512; i++) strcat(longest, "a b ");
    Variant variants[] = {
        {demo, "a red star", 240, 240, 1, 1, 0, 3, F32, NULL, 0, TEXT},
        {demo, "a red star", 480, 480, 1, 1, 0, 1, BF16, NULL, 0, TEXT},
        {demo, "a red star", 48, 48, 201, 1, 0, 1, INT8, NULL, 0, TEXT},
        {demo, longest, 48, 48, 1, 1, 0, 3, BF16, NULL, 0, TEXT},
        {tiny, longest, 32, 32, 1, 1, 0, 3, F32, NULL, 0, TEXT},
        {causal, "a red star", 192, 192, 17, 0, 5, 1, F32, NULL, 0, TEXT},
        {causal, "a red star", 64, 64, 61, 0, 5, 3, BF16, NULL, 0, TEXT},
        {causal, "a red star", 48, 48, 33, 0, 5, 1, F32, longest, 0, TEXT},
        {pictures, "a red star", 128, 128, 33, 2, 0, 3, F32, NULL, 2, PICTURE},
        {pictures, longest, 64, 64, 81, 2, 0, 3, F32, NULL, 1, PICTURE},
        {demo, "a red star", 240, 240, 9, 1, 0, 3, F32, NULL, 2, TEXT_OR_PICTURE},
    };
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) expect(run, &variants[i]);
    for (Precision p = F32; p < PRECISIONS; p++) expect(encode, &p);
    double minute = peak_of(60), ten_minutes = peak_of(600);
    CHECK(minute > 0 && ten_minutes <= 1.01 * minute && minute <= 1.01 * ten_minutes,
          "60 seconds take %.0f bytes, 600 seconds %.0f", minute, ten_minutes);
}
