/* test_causal.c - generation in chunks: which frames the KV cache holds, and runs that must give the same bits. cli.sh
 * compares the values with upstream's model (tests/goldens/causal), reference_causal.py with diffusers under a mask. */
#include "sora.h"
#include "tests/gguf_builder.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char model_path[] = "tests/goldens/causal/model.gguf", whole_path[] = "tests/goldens/model/model.gguf";

/* ---------------------------------------------------------------- keys of the weight file */

/* Builds a file from "name=value name=value". The type of a value: "3" u32, "3.0" f32, "3,4," array of f32, else a
 * string. */
static void put_keys(Builder *b, const char *keys) {
    char text[512], *rest = NULL;
    snprintf(text, sizeof text, "%s", keys);
    uint64_t count = 0;
    for (const char *p = keys; *p; p++) count += *p == '=';
    put_header(b, 0, count);
    for (char *key = strtok_r(text, " ", &rest); key; key = strtok_r(NULL, " ", &rest)) {
        char *value = strchr(key, '='), *comma;
        *value++ = 0;
        if (strspn(value, "-.,0123456789") < strlen(value)) {
            put_string(b, key), put_u32(b, VALUE_STRING), put_string(b, value);
        } else if (strchr(value, ',')) {
            uint64_t elements = 0;
            for (const char *p = value; *p; p++) elements += *p == ',';
            put_array(b, key, VALUE_F32, elements);
            for (; (comma = strchr(value, ',')); value = comma + 1) put(b, &(float){strtof(value, NULL)}, 4);
        } else if (strchr(value, '.')) {
            put_string(b, key), put_u32(b, VALUE_F32), put(b, &(float){strtof(value, NULL)}, 4);
        } else {
            put_string(b, key), put_u32(b, VALUE_U32), put_u32(b, (uint32_t)strtoul(value, NULL, 10));
        }
    }
}

static void load_recipe(void *argument) {
    Recipe recipe = recipe_load(argument);
    recipe_free(&recipe);
}

/* Keys that must be refused with a line that holds `expected`, or accepted if it is NULL. */
static void check_keys(const char *keys, const char *expected) {
    static Builder b;
    WeightFile *file;
    char output[4096];
    put_keys(&b, keys);
    const char *why = weights_parse((Bytes){b.data, b.size}, "keys", &file);
    CHECK(!why, "%s: %s", keys, why ? why : "");
    if (why) return;
    int status = run_apart(load_recipe, file, output);
    CHECK(status == (expected ? STATUS_USAGE : STATUS_OK), "%s: status %d, %s", keys, status, output);
    if (expected) CHECK(strstr(output, expected), "%s: '%s', expected '%s'", keys, output, expected);
    weights_close(file);
}

#define LIST "scheduler.rule=renoise scheduler.timesteps=1000,937.5,833.3333,625, "
#define CHUNKS_OF_3 LIST "causal.chunk_frames=3 "

static void check_recipes(void) {
    check_keys("", NULL);
    check_keys("scheduler.rule=multistep", NULL);
    check_keys(LIST, NULL);
    check_keys(CHUNKS_OF_3 "causal.window=12 causal.sink=3 causal.positions=relative causal.prompt_change=recache",
               NULL);
    check_keys(CHUNKS_OF_3 "scheduler.first_timesteps=1000,500, causal.context_noise=100.5", NULL);
    check_keys("scheduler.rule=heun", "scheduler.rule is 'heun', expected multistep, renoise or euler");
    check_keys("scheduler.rule=euler", "scheduler.timesteps is missing, and scheduler.rule euler needs it");
    check_keys("scheduler.timesteps=1000,",
               "scheduler.timesteps needs scheduler.rule renoise or euler, found multistep");
    check_keys("scheduler.rule=renoise scheduler.timesteps=500,750,", "does not decrease: 750 follows 500");
    check_keys("scheduler.rule=renoise scheduler.timesteps=500,500,", "does not decrease: 500 follows 500");
    check_keys("scheduler.rule=renoise scheduler.timesteps=1001,", "holds 1001, expected more than 0 and at most 1000");
    check_keys("scheduler.rule=renoise scheduler.timesteps=5,0,", "holds 0, expected more than 0");
    check_keys("scheduler.rule=renoise scheduler.timesteps=1000",
               "scheduler.timesteps is not an array of 1 to 1000 numbers");
    check_keys(LIST "scheduler.sigmas=1", "scheduler.sigmas is not an array of 1 to 1000 numbers");
    check_keys(CHUNKS_OF_3 "scheduler.first_timesteps=1000", "scheduler.first_timesteps is not an array of 1 to 1000");
    check_keys(LIST "scheduler.sigmas=1,0.5,", "scheduler.sigmas has 2 elements, expected 4, one a timestep");
    check_keys(LIST "scheduler.sigmas=1,0.5,0.7,0.1,", "scheduler.sigmas does not decrease");
    check_keys(LIST "scheduler.first_timesteps=1000,",
               "scheduler.first_timesteps needs causal.chunk_frames, which is missing");
    check_keys(LIST "scheduler.noise_scale=0.0", "scheduler.noise_scale is 0, expected more than 0");
    check_keys("causal.chunk_frames=5000", "key \"causal.chunk_frames\" is 5000, expected 1 to 4096");
    check_keys(CHUNKS_OF_3 "causal.window=2", "the window is 2 frames, expected at least a chunk of 3, or 0");
    check_keys(CHUNKS_OF_3 "causal.window=9 causal.sink=7", "the sink is 7 frames, expected at most 6, which is the "
               "window of 9 less a chunk of 3");
    check_keys(CHUNKS_OF_3 "causal.sink=1", "the sink is 1 frames, expected 0 without a window");
    check_keys(CHUNKS_OF_3 "causal.window=2000000", "key \"causal.window\" is 2000000, expected 0 to 1000000");
    check_keys(CHUNKS_OF_3 "causal.positions=left", "causal.positions is 'left', expected absolute or relative");
    check_keys(CHUNKS_OF_3 "causal.prompt_change=forget", "causal.prompt_change is 'forget'");
    check_keys(CHUNKS_OF_3 "causal.context_noise=1000.5", "causal.context_noise is 1000.5, expected 0 to 1000");
}

/* ---------------------------------------------------------------- frames in the cache */

enum { D = 4 };

/* The keys or values of a frame. */
static void fill_frame(float values[D], int number) {
    for (int i = 0; i < D; i++) values[i] = (float)(10 * number + i);
}

static void pass_chunk(KvCache *cache, Chunk chunk) {
    float keys[16 * D], values[16 * D];
    kv_cache_make_room(cache, chunk.frames);
    for (int f = 0; f < chunk.frames; f++) fill_frame(keys + f * D, -1), fill_frame(values + f * D, -1);
    kv_cache_write(cache, 0, keys, values, chunk.frames); /* a noisy pass */
    for (int f = 0; f < chunk.frames; f++) {
        fill_frame(keys + f * D, chunk.first + f);
        fill_frame(values + f * D, -chunk.first - f);
    }
    kv_cache_write(cache, 0, keys, values, chunk.frames);
    kv_cache_keep(cache, &chunk);
}

/* After chunks of `each` frames up to frame `end`, the cache must hold the frames numbers[0..count-1]. */
static void check_held(Window rule, int each, int end, const int *numbers, int count) {
    Transformer t = {.num_layers = 1, .dim = D};
    Arena arena = arena_open(1 << 12);
    KvCache cache = kv_cache_take(&arena, &t, rule, rule.size, 1, TYPE_F32);
    float keys[16 * D], values[16 * D], expected[D];
    for (int first = 0; first < end; first += each) pass_chunk(&cache, (Chunk){.first = first, .frames = each});
    Chunk next = {.first = end, .frames = each};
    kv_cache_make_room(&cache, each);
    kv_cache_read(&cache, 0, keys, values);
    CHECK(cache.frames == count, "window %d, sink %d: %d frames are held, expected %d", rule.size, rule.sink,
          cache.frames, count);
    for (int j = 0; j < smaller(cache.frames, count); j++) {
        fill_frame(expected, numbers[j]);
        int position = rule.relative ? j : numbers[j];
        CHECK(cache.frame_numbers[j] == numbers[j],
              "place %d holds frame %d, expected %d", j, cache.frame_numbers[j], numbers[j]);
        CHECK(!memcmp(keys + j * D, expected, sizeof expected), "place %d holds the keys of another frame", j);
        CHECK(kv_cache_position(&cache, &next, j) == position, "place %d is at position %d", j,
              kv_cache_position(&cache, &next, j));
    }
    int last = kv_cache_position(&cache, &next, count + each - 1);
    CHECK(last == (rule.relative ? count + each - 1 : end + each - 1),
          "the chunk's last frame is at position %d", last);
    arena_close(&arena);
}

static void check_windows(void) {
    check_held((Window){9, 1, false}, 3, 12, (int[]){0, 7, 8, 9, 10, 11}, 6); /* the drawing in cache.c */
    check_held((Window){9, 1, true}, 3, 12, (int[]){0, 7, 8, 9, 10, 11}, 6);
    check_held((Window){9, 0, false}, 3, 12, (int[]){6, 7, 8, 9, 10, 11}, 6);
    check_held((Window){6, 3, false}, 3, 15, (int[]){0, 1, 2}, 3);
    check_held((Window){3, 0, true}, 3, 9, NULL, 0);
    check_held((Window){4, 2, true}, 1, 10, (int[]){0, 1, 9}, 3);
    check_held((Window){12, 3, false}, 3, 6, (int[]){0, 1, 2, 3, 4, 5}, 6);
}

/* ---------------------------------------------------------------- passes of the transformer */

enum { CHUNKS = 5, FRAMES = 2, H = 4, W = 6 };

typedef struct {
    Window window;
    Type type;
    int noisy; /* noisy passes of each chunk before the clean one, whose keys stay in the cache */
} Passes;

/* The velocity of the last chunk, after passes of all chunks before it. */
static float *run_passes(const Model *m, const float *latents, Passes p) {
    const Transformer *t = &m->experts->transformer;
    static const float clean[FRAMES], noisy[FRAMES] = {700, 700};
    size_t n = (size_t)FRAMES * t->in_dim * H * W;
    float *velocity = allocate(sizeof(float) * n), *embeds = allocate(sizeof(float) * 2 * (size_t)t->text_dim);
    int room = p.window.size;
    Arena arena = arena_open((size_t)16 << 20);
    TransformerState state = transformer_state_take(&arena, t, FRAMES, room, H, W);
    KvCache cache = kv_cache_take(&arena, t, p.window, room, state.tokens, p.type);
    TextContext text = text_context_take(&arena, t, 2);
    for (int i = 0; i < 2 * t->text_dim; i++) embeds[i] = (float)sin(i);
    text_context_fill(t, embeds, 2, &text);
    for (int c = 0; c < CHUNKS; c++) {
        Chunk chunk = {c * FRAMES, FRAMES, noisy};
        bool last = c + 1 == CHUNKS;
        Planes input = {t->in_dim, latents + (last ? c : c + 1) * n}; /* the others' latents as noise */
        for (int i = 0; i < (last ? 1 : p.noisy); i++)
            transformer_forward(t, &state, &text, &cache, &chunk, &input, velocity);
        if (last) break;
        chunk.timesteps = clean;
        transformer_forward(t, &state, &text, &cache, &chunk, &(Planes){t->in_dim, latents + c * n}, velocity);
        kv_cache_keep(&cache, &chunk);
    }
    arena_close(&arena);
    free(embeds);
    return velocity;
}

static double difference(const Model *m, const float *latents, Passes a, Passes b) {
    size_t n = (size_t)FRAMES * m->experts->transformer.in_dim * H * W;
    float *x = run_passes(m, latents, a), *y = run_passes(m, latents, b);
    double error = relative_error(x, y, n);
    bool same = !memcmp(x, y, sizeof(float) * n);
    free(x), free(y);
    return same ? 0 : error;
}

static void check_passes(void) {
    Model m = model_load(model_path, F32);
    size_t n = (size_t)CHUNKS * FRAMES * m.experts->transformer.in_dim * H * W;
    float *latents = allocate(sizeof(float) * n);
    Generator generator;
    generator_seed(&generator, 3);
    generator_randn(&generator, latents, n);
    Window all = {10, 0, false}, some = {5, 1, false}, relative = {5, 1, true}, one = {10, 0, true};
    Window rules[] = {all, some, relative, {2, 0, false}};
    for (int i = 0; i < 4; i++)
        CHECK(difference(&m, latents, (Passes){rules[i], TYPE_F32, 3}, (Passes){rules[i], TYPE_F32, 0}) == 0,
              "rule %d: noisy passes change the cache", i);
    CHECK(difference(&m, latents, (Passes){all, TYPE_F32, 0}, (Passes){one, TYPE_F32, 0}) == 0,
          "relative positions differ although no frame was dropped");
    CHECK(difference(&m, latents, (Passes){all, TYPE_F32, 0}, (Passes){{20, 0, false}, TYPE_F32, 0}) == 0,
          "a window longer than the clip changes the result");
    CHECK(difference(&m, latents, (Passes){all, TYPE_F32, 0}, (Passes){some, TYPE_F32, 0}) > 1e-4,
          "a shorter window does not change the result");
    CHECK(difference(&m, latents, (Passes){some, TYPE_F32, 0}, (Passes){relative, TYPE_F32, 0}) > 1e-4,
          "relative positions do not change the result");
    double narrow = difference(&m, latents, (Passes){some, TYPE_F32, 0}, (Passes){some, TYPE_BF16, 0});
    CHECK(narrow > 0 && narrow < 1e-2, "a bf16 cache has a relative error of %.1e", narrow);
    free(latents);
    model_free(&m);
}

/* ---------------------------------------------------------------- whole runs */

typedef struct {
    const char *model, *isa;
    int threads, frames, window, sink;
    const char *positions, *change; /* change: a second prompt with its time */
    int whole_chunk; /* the chunk length to set in a model of whole clips; 0: none */
    Precision precision;
} Variant;

static Bytes run(Variant v) {
    Bytes video = {0};
    char *path = temporary_path("causal.y4m");
    int threads = threads_count();
    kernels_choose(v.isa ? v.isa : "auto");
    threads_set(v.threads ? v.threads : 2);
    Model model = model_load(v.model ? v.model : model_path, v.precision);
    model.recipe.chunk_frames += v.whole_chunk;
    Settings s = settings_new();
    s.prompt = "a red fox", s.output = path, s.width = 48, s.height = 32, s.frames = v.frames, s.seed = 5;
    s.chroma = 444, s.quiet = true, s.record = false, s.positions = v.positions;
    if (v.window) s.window = v.window, s.sink = v.sink;
    if (v.model) s.steps = 2, s.guidance[0] = 3;
    if (v.change) story_add(&s.story, (Bytes){(const uint8_t *)v.change, strlen(v.change)});
    settings_complete(&s, &model);
    generate(&model, &s);
    model_free(&model);
    story_free(&s.story);
    CHECK(!read_file(path, (size_t)1 << 24, &video), "the video cannot be read back");
    unlink(path);
    free(path);
    kernels_choose("auto");
    threads_set(threads);
    return video;
}

/* Whether two runs give the same bytes. */
static bool same(Variant a, Variant b) {
    Bytes x = run(a), y = run(b);
    bool equal = x.size == y.size && !memcmp(x.data, y.data, x.size);
    free((void *)x.data), free((void *)y.data);
    return equal;
}

static void check_runs(void) {
    Variant clip = {.frames = 29, .window = 5, .sink = 1}, other = clip;
    FOR_TABLES(isa) {
        for (int threads = 1; threads <= 3; threads += 2) {
            other.isa = isa, other.threads = threads;
            CHECK(same(clip, other), "the clip of %s kernels with %d threads differs", isa, threads);
        }
    }
    Variant whole = {.model = whole_path, .frames = 13}, chunk = whole;
    chunk.whole_chunk = 4;
    CHECK(same(whole, chunk), "a clip made as one chunk differs from the clip made as a whole");
    other = clip, other.change = "0.3 a red fox";
    CHECK(same(clip, other), "a change to the same prompt changes the clip");
    other.change = "0.3 a lazy dog";
    CHECK(!same(clip, other), "a change to another prompt does not change the clip");
    Variant narrow = {.frames = 29, .window = 5, .sink = 1, .precision = BF16};
    CHECK(!same(clip, narrow), "bf16 gives the same clip as f32");
}

/* One frame of 2^20 latent positions, in a model whose chunks have 4096 frames. */
static void complete_large_chunk(void *argument) {
    Model model = model_load(argument, F32);
    Settings s = settings_new();
    model.recipe.chunk_frames = 4096;
    s.width = s.height = 16384, s.frames = 1;
    settings_complete(&s, &model);
    model_free(&model);
}

static void check_large_chunk(void) {
    char output[4096];
    int status = run_apart(complete_large_chunk, (void *)model_path, output);
    CHECK(status == STATUS_USAGE && strstr(output, "latent positions, expected less than 2^31"),
          "a chunk of more than 2^31 latent positions: status %d, %s", status, output);
}

void test_causal(void) {
    check_large_chunk();
    check_recipes();
    check_windows();
    check_passes();
    check_runs();
}
