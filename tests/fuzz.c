/* fuzz.c - feeds mutated files and texts to every parser, in a build with sanitizers.
 *
 *   fuzz SECONDS [TARGET]   fuzzes each target, or TARGET, for SECONDS
 *   fuzz TARGET FILE        runs one input, such as one saved by an earlier run
 *
 * Compiled with -DLIBFUZZER (make libfuzzer), libFuzzer or AFL++ chooses the inputs of the target $FUZZ_TARGET, which
 * may not be one with `apart`.
 *
 * A parser fails if a sanitizer stops it, if it runs longer than MAX_SECONDS_EACH, or if it calls die(), which parsers
 * must not do. The input is then saved as fuzz-TARGET.input. Targets with `apart` may call die(): loading a model
 * reports a wrong shape that way. They run in a child process, where only a crash counts.
 *
 * The corpus starts with valid files. Accepted inputs are added to it, so mutations accumulate. The sanitizer limits
 * the size of one allocation: a parser must not allocate what a length in the file asks for without checking it. */
#include "tests/gguf_builder.h"
#include "sora.h"

#include <glob.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

const char *__asan_default_options(void), *__ubsan_default_options(void);
const char *__asan_default_options(void) {
    return "abort_on_error=1:allocator_may_return_null=1:max_allocation_size_mb=256:quarantine_size_mb=16";
}

const char *__ubsan_default_options(void) {
    return "abort_on_error=1:print_stacktrace=1";
}

enum { MAX_CORPUS = 512, MAX_INPUT = 8 << 20, MAX_SECONDS_EACH = 20, MAX_MEMORY = 64 << 20 };

typedef struct {
    uint8_t *data;
    size_t size;
} Input;

/* ---------------------------------------------------------------- random numbers */

static uint64_t state;

static uint64_t draw(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 2685821657736338717u;
}

static size_t below(size_t n) {
    return n ? (size_t)(draw() >> 11) % n : 0;
}

/* A random offset below or equal to n. Small offsets are more likely, since headers are at the start. */
static size_t place(size_t n) {
    return below((n >> below(16)) + 1);
}

/* ---------------------------------------------------------------- targets: true if the input is accepted */

static WeightFile *tokenizer_files[2];
static Tokenizer *tokenizers[2]; /* with the rules of tokenizers, and of sentencepiece */
static FILE *nowhere;

static void encode(const Tokenizer *tokenizer, Bytes text) {
    int32_t ids[64];
    int n = tokenizer_encode(tokenizer, text, ids, 64);
    if (n < 1 || n > 64) abort();
    for (int i = 0; i < n; i++)
        if (ids[i] < 0) abort();
}

static bool same_text(const Text *text, Bytes other) {
    return text->size == other.size && !memcmp(text->data, other.data, other.size);
}

/* A cleaned text must be valid UTF-8. Composing it twice must give the same as once. */
static void check_clean(Bytes clean) {
    Text text = {0};
    text_append_utf8(&text, clean);
    text_append(&text, "", 0);
    if (!same_text(&text, clean)) abort();
    text_compose(&text);
    Text again = {0};
    text_append(&again, text.data, text.size);
    text_compose(&again);
    if (!same_text(&again, text_bytes(&text))) abort();
    free(again.data);
    free(text.data);
}

/* Converted UTF-16 must be valid UTF-8. */
static void read_utf16(Bytes in) {
    Text text = {0}, again = {0};
    if (!text_append_utf16(&text, in)) return;
    text_append_utf8(&again, (Bytes){text.data, text.size});
    text_append(&again, "", 0);
    if (!same_text(&again, text_bytes(&text))) abort();
    free(text.data);
    free(again.data);
}

static bool run_text(Bytes in) {
    read_utf16(in);
    Bytes clean = prompt_clean(in);
    check_clean(clean);
    for (int i = 0; i < 2; i++) encode(tokenizers[i], clean);
    free((void *)clean.data);
    return true;
}

static bool run_weights(Bytes in) {
    static const char sample[] = "a \xe2\x96\x81 fox</s> \xff\xf0\x9f\xa6\x8a  <extra_id_0>";
    WeightFile *file;
    Tokenizer *tokenizer;
    if (weights_parse(in, "fuzz", &file)) return false;
    weights_print(file, nowhere);
    if (!tokenizer_load(file, &tokenizer))
        encode(tokenizer, (Bytes){(const uint8_t *)sample, sizeof sample - 1});
    tokenizer_free(tokenizer);
    weights_close(file);
    return true;
}

static bool run_npy(Bytes in) {
    Npy array;
    if (npy_parse(in, &array)) return false;
    float *values = npy_floats(&array);
    double sum = 0;
    for (size_t i = 0; i < shape_count(&array.shape); i++) sum += values[i];
    fprintf(nowhere, "%g %s", sum, npy_fit(&array, &SHAPE(2, 1, 3)) ? "misfit" : "");
    free(values);
    npy_free(&array);
    return true;
}

/* A picture or a clip, as it is and scaled. */
static bool run_source(Bytes in) {
    enum { WIDTH = 7, HEIGHT = 5 };
    float scaled[3 * WIDTH * HEIGHT];
    Source source;
    if (source_parse(in, &source)) return false;
    int width = source.format.width, height = source.format.height;
    float *frame = allocate(3 * sizeof(float) * (size_t)width * (size_t)height);
    SourceReader *whole = source_reader_open(&source, width, height);
    SourceReader *small = source_reader_open(&source, WIDTH, HEIGHT);
    for (int i = 0; i < source.frames; i++) source_next(whole, frame);
    source_next(small, scaled);
    for (int i = 0; i < 3 * WIDTH * HEIGHT; i++)
        if (!(scaled[i] > -9 && scaled[i] < 9)) abort();
    source_reader_close(whole), source_reader_close(small);
    free(frame);
    return true;
}

/* What --verify reads of a clip: as a stream. */
static bool run_stream(Bytes in) {
    Y4mReader *reader;
    VideoFormat format;
    FILE *stream = in.size ? fmemopen((void *)in.data, in.size, "rb") : NULL;
    if (!stream) return false;
    MarkSum sum = {0};
    const char *why = y4m_open(stream, NULL, &reader, &format);
    float *frame = why ? NULL : allocate(3 * sizeof(float) * (size_t)format.width * (size_t)format.height);
    for (bool end = false; !why && !(why = y4m_next(reader, frame, &end)) && !end;) mark_gather(&sum, &format, frame);
    free(sum.luma);
    free(frame);
    y4m_close(reader);
    fclose(stream);
    return !why;
}

/* What --verify does with a record. */
static bool run_record(Bytes in) {
    const MarkFound mark = {.deviations = MARK_DEVIATIONS};
    return record_check(nowhere, in, "", &mark) || json_find(in, "tool").size;
}

static bool run_story(Bytes in) {
    Story story = {0};
    bool read = !story_parse(&story, in);
    for (int i = 0; i < story.count; i++) {
        double before = i ? story.lines[i - 1].time : -1;
        if (!(story.lines[i].time > before) || !*story.lines[i].text) abort();
    }
    story_free(&story);
    return read;
}

static bool run_recipe(Bytes in) {
    WeightFile *file;
    if (weights_parse(in, "fuzz", &file)) return false;
    Recipe r = recipe_load(file);
    if (r.window.size && r.window.size < r.window.sink + r.chunk_frames) abort();
    for (int i = 0; i < r.schedule.steps; i++)
        if (!(r.schedule.timesteps[i] > 0) || !(r.schedule.sigmas[i + 1] < r.schedule.sigmas[i])) abort();
    recipe_free(&r);
    weights_close(file);
    return true;
}

/* Two runs whose states are read: one in chunks, one that starts from pictures. */
static Model state_models[2];
static Settings state_settings[2];
static Source picture;

/* The input is a state's body. It gets its first line and a checksum that is right: otherwise nothing would be read. */
static bool run_state(Bytes in) {
    static const char magic[] = "sora state 1\n";
    Text file = {0};
    char hex[65];
    text_append(&file, magic, sizeof magic - 1);
    text_append(&file, in.data, in.size);
    sha256_of(file.data, file.size, hex);
    text_append(&file, "sha256 ", 7), text_append(&file, hex, 64), text_append(&file, "\n", 1);
    bool good = false;
    for (int i = 0; i < 2; i++) good |= !generate_read(&state_models[i], &state_settings[i], text_bytes(&file));
    free(file.data);
    return good;
}

static bool run_model(Bytes in) {
    Model model = {0};
    Settings settings = settings_new();
    if (weights_parse(in, "fuzz", &model.file)) return false;
    if (tokenizer_load(model.file, &model.tokenizer)) return false;
    model_bind(&model);
    bool small = below(2);
    settings.prompt = "a red fox", settings.width = settings.height = small ? 32 : 16 << below(11);
    settings.output = "/dev/null", settings.quiet = true, settings.record = false, settings.frames = small ? 9 : 0;
    if (model.start != TEXT) settings.image = "", settings.source = &picture;
    if (model.start != TEXT && below(2)) settings.last_image = "", settings.last_source = &picture;
    settings_complete(&settings, &model);
    if (generate_memory(&model, &settings) <= MAX_MEMORY && small) generate(&model, &settings);
    return true;
}

typedef struct {
    const char *name;
    bool (*run)(Bytes in);
    bool apart; /* runs in a child process, where it may call die() */
    Input corpus[MAX_CORPUS];
    int count;
} Target;

static Target targets[] = {
    {.name = "weights", .run = run_weights},
    {.name = "npy", .run = run_npy},
    {.name = "source", .run = run_source},
    {.name = "stream", .run = run_stream},
    {.name = "record", .run = run_record},
    {.name = "text", .run = run_text},
    {.name = "story", .run = run_story},
    {.name = "state", .run = run_state},
    {.name = "recipe", .run = run_recipe, .apart = true},
    {.name = "model", .run = run_model, .apart = true},
};
enum { WEIGHTS, NUMPY, VIDEO, STREAM, RECORD, WORDS, STORY, STATE, RECIPE, WHOLE_MODEL, TARGETS };

/* ---------------------------------------------------------------- running one input */

static const Target *running;
static Input current;
static bool replaying;

/* Saves the current input. Called from signal handlers too. */
static void save_current(const char *what) {
    char path[64];
    const Target *target = running;
    running = NULL;
    snprintf(path, sizeof path, "fuzz-%s.input", target->name);
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(current.data, 1, current.size, file) != current.size || fclose(file)) perror(path);
    fprintf(stderr, "fuzz: %s %s on %zu bytes, saved as %s\n", target->name, what, current.size, path);
}

static void on_signal(int number) {
    if (running) save_current(number == SIGALRM ? "hangs" : "crashes");
    signal(number, SIG_DFL);
    raise(number == SIGALRM ? SIGKILL : number);
}

static void on_exit_inside(void) {
    if (!running) return;
    save_current("ends the program");
    _exit(1);
}

/* Runs the target in a child process, where exit by die() is allowed. */
static bool run_apart(const Target *target, Bytes in) {
    int status;
    pid_t child = fork();
    if (!child) {
        running = NULL;
        if (!replaying && !freopen("/dev/null", "w", stderr)) _exit(STATUS_RESOURCE);
        signal(SIGABRT, SIG_DFL);
        signal(SIGALRM, SIG_DFL);
        alarm(MAX_SECONDS_EACH);
        _exit(target->run(in) ? STATUS_OK : STATUS_USAGE);
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        die(STATUS_RESOURCE, "cannot start a process for %s", target->name);
    int answer = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    if (answer < STATUS_OK || answer > STATUS_RESOURCE) abort();
    return answer == STATUS_OK;
}

static bool run(const Target *target, Input input) {
    running = target;
    current = input;
    Bytes in = {input.data, input.size};
    alarm(MAX_SECONDS_EACH);
    bool accepted = target->apart ? run_apart(target, in) : target->run(in);
    alarm(0);
    running = NULL;
    return accepted;
}

/* ---------------------------------------------------------------- inputs */

/* Adds the input, which the corpus then owns. If the corpus is full, it replaces a random one other than the first. */
static void corpus_add(Target *target, Input input) {
    int at = target->count < MAX_CORPUS ? target->count++ : 1 + (int)below(MAX_CORPUS - 1);
    free(target->corpus[at].data);
    target->corpus[at] = input;
}

static Input input_copy(const void *data, size_t size) {
    Input input = {malloc(size ? size : 1), size};
    if (!input.data) abort();
    memcpy(input.data, data, size);
    return input;
}

static void seed_files(Target *target, const char *pattern) {
    glob_t found;
    if (glob(pattern, 0, NULL, &found)) return;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        Bytes bytes;
        if (read_file(found.gl_pathv[i], MAX_INPUT, &bytes)) continue;
        corpus_add(target, (Input){(uint8_t *)bytes.data, bytes.size});
    }
    globfree(&found);
}

/* A tokenizer of seven pieces and all bytes, with an empty normalization map. */
static void build_tokenizer(Builder *b, bool sentencepiece) {
    static const char *const words[] = {"<pad>", "</s>",        "<unk>", "\xe2\x96\x81", "\xe2\x96\x81\x61",
                                        "fox",   "<extra_id_0>"};
    enum { WORD_COUNT = sizeof words / sizeof *words, COUNT = WORD_COUNT + 256 };
    static const uint8_t map[4 + 1024 + 1] = {0, 4};
    char byte[8];
    put_header(b, 1, 8);
    put_array(b, "tokenizer.ggml.tokens", 8, COUNT);
    for (int i = 0; i < WORD_COUNT; i++) put_string(b, words[i]);
    for (int i = 0; i < 256; i++) {
        snprintf(byte, sizeof byte, "<0x%02X>", (unsigned)i);
        put_string(b, byte);
    }
    put_array(b, "tokenizer.ggml.scores", 6, COUNT);
    for (int i = 0; i < COUNT; i++) put(b, &(float){-(float)i}, 4);
    put_array(b, "tokenizer.ggml.token_type", 5, COUNT);
    for (uint32_t i = 0; i < COUNT; i++)
        put_u32(b, i >= WORD_COUNT ? 6 : i == 2 ? 2 : i < 2 ? 3 : i == 6 ? 4 : 1);
    put_key(b, "tokenizer.ggml.unknown_token_id", 4, 2, 4);
    put_key(b, "tokenizer.ggml.eos_token_id", 4, 1, 4);
    put_string(b, "sora.tokenizer.rules"), put_u32(b, 8);
    put_string(b, sentencepiece ? "sentencepiece" : "tokenizers");
    put_string(b, "sora.tokenizer.prepend_scheme"), put_u32(b, 8), put_string(b, "always");
    if (sentencepiece) {
        put_array(b, "tokenizer.ggml.precompiled_charsmap", 0, sizeof map);
        put(b, map, sizeof map);
    } else {
        put_array(b, "sora.tokenizer.added_ids", 5, 2);
        put_u32(b, 1), put_u32(b, 6);
    }
    put_tensor(b, "x", 32, 2, TYPE_Q8_0, 0);
    put_padding(b);
    b->size += 68;
}

/* The tokenizers are seeds of the target `weights`. The target `text` encodes with them. */
static void seed_tokenizers(void) {
    static Builder builders[2];
    for (int i = 0; i < 2; i++) {
        Builder *b = &builders[i];
        build_tokenizer(b, i);
        const char *why = weights_parse((Bytes){b->data, b->size}, "fuzz", &tokenizer_files[i]);
        if (!why) why = tokenizer_load(tokenizer_files[i], &tokenizers[i]);
        if (why) die(STATUS_CHECK, "the tokenizer to fuzz with: %s", why);
        corpus_add(&targets[WEIGHTS], input_copy(b->data, b->size));
    }
}

static void seed_videos(void) {
    static const char *const chromas[] = {"420jpeg", "422", "444", "mono"};
    for (int i = 0; i < 4; i++) {
        uint8_t file[256] = {0};
        int size = snprintf((char *)file, sizeof file,
                            "YUV4MPEG2 W5 H3 F30000:1001 Ip A1:1 C%s XFUZZ\nFRAME\n", chromas[i]);
        VideoFormat format = {5, 3, 25, 1, i == 0 ? 420 : i == 1 ? 422 : i == 2 ? 444 : 400};
        size += (int)y4m_frame_bytes(&format);
        memcpy(file + size, "FRAME\n", 6), size += 6 + (int)y4m_frame_bytes(&format);
        corpus_add(&targets[VIDEO], input_copy(file, (size_t)size));
        corpus_add(&targets[STREAM], input_copy(file, (size_t)size));
    }
}

static void seed_pictures(void) {
    static const char *const headers[] = {"P6\n5 3\n255\n", "P6 #5 3\n# white\n5\t3 100\r", "P6\n3 5\n65535\n"};
    for (int i = 0; i < 3; i++) {
        uint8_t file[128] = {0};
        size_t size = strlen(headers[i]);
        memcpy(file, headers[i], size);
        for (size_t j = 0; j < 45; j++) file[size + j] = (uint8_t)(37 * j);
        corpus_add(&targets[VIDEO], input_copy(file, size + 45));
    }
}

static void seed_records(void) {
    Json json = {0};
    char hex[65];
    json_open(&json, NULL);
    json_string(&json, "tool", "sora.c");
    json_string(&json, "version", SORA_VERSION);
    json_open(&json, "settings");
    json_string(&json, "model", "\"\\\t\xe4\xbd\xa0");
    json_close(&json);
    sha256_of(json.text.data, json.text.size, hex);
    json_string(&json, "record_sha256", hex);
    json_string(&json, "y4m_sha256", "");
    json_close(&json);
    corpus_add(&targets[RECORD], input_copy(json.text.data, json.text.size));
    json_free(&json);
}

static void seed_texts(void) {
    static const char *const texts[] = {
        "",
        "A red fox jumps over 12 lazy dogs.",
        "  \t\xc2\xa0\xe3\x80\x80 spaces\r\n\xe2\x80\xa8",
        "&amp;amp; &lt;b&gt; &#233;&#x1F98A; &nbsp;&notin;&no;&#0;&#x110000;&;&&amp",
        "\xe2\x80\x9c curly\xe2\x80\x9d \xe2\x80\x98quotes\xe2\x80\x99",
        "\xe4\xbd\xa0\xe5\xa5\xbd \xd8\xb3\xd9\x84\xd8\xa7\xd9\x85 e\xcc\x81",
        "\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x91\xa7",
        "\xff\xfe\x3e\xd8\x8a\xdd\x60\x4f\x3e\xd8\x01",
        "\xfe\xff\xd8\x3e\xdd\x8a\x4f\x60\xdd\x8a\xff\xfe",
        "\xff\xc0\x80\xed\xa0\x80\xf4\x90\x80\x80\xe2\x82",
        "\xef\xbb\xbf\xef\xbc\xa1\xef\xbd\xb6\xef\xbe\x9e \xef\xac\x83 \xc2\x85\x1b[1;\xd9\xa3m \xe2\x80\xa8",
        "o\xcc\x82\xcc\xa3 \xe1\xbb\x99 \xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8 \xea\xb0\x80\xe1\x86\xa8 \xef\xac\xab",
        "&NTILDE; &AMP; &gtcc;&GTCC; &bne;",
        "a</s>b<extra_id_0> <pad><unk>",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        corpus_add(&targets[WORDS], input_copy(texts[i], strlen(texts[i])));
}

static void seed_stories(void) {
    static const char *const stories[] = {"", "0 a red ball\n# c\n\n12.5 it stops\r\n1:05  it jumps\n1:02:03 night\n",
                                          "\xef\xbb\xbf 3 x\n2 y", "1:60 x", "999999 x\n"};
    for (size_t i = 0; i < sizeof stories / sizeof *stories; i++)
        corpus_add(&targets[STORY], input_copy(stories[i], strlen(stories[i])));
}

static void put_list(Builder *b, const char *key, float first) {
    put_array(b, key, VALUE_F32, 4);
    for (int i = 0; i < 4; i++) put(b, &(float){first * (4 - (float)i) / 4}, 4);
}

static void put_name(Builder *b, const char *key, const char *value) {
    put_string(b, key), put_u32(b, VALUE_STRING), put_string(b, value);
}

static void put_float(Builder *b, const char *key, float value) {
    put_string(b, key), put_u32(b, VALUE_F32), put(b, &value, 4);
}

/* Every key that recipe_load() reads. */
static void seed_recipes(void) {
    static Builder b;
    put_header(&b, 0, 16);
    put_name(&b, "scheduler.rule", "renoise");
    put_list(&b, "scheduler.timesteps", 1000);
    put_list(&b, "scheduler.sigmas", 1);
    put_list(&b, "scheduler.first_timesteps", 900);
    put_list(&b, "scheduler.first_sigmas", 0.9f);
    put_float(&b, "scheduler.noise_scale", 0.98f);
    put_key(&b, "scheduler.noise_frames_first", VALUE_BOOL, 1, 1);
    put_key(&b, "scheduler.num_train_timesteps", VALUE_U32, 1000, 4);
    put_key(&b, "causal.chunk_frames", VALUE_U32, 3, 4);
    put_key(&b, "causal.independent_first_frame", VALUE_BOOL, 1, 1);
    put_key(&b, "causal.window", VALUE_U32, 12, 4);
    put_key(&b, "causal.sink", VALUE_U32, 3, 4);
    put_name(&b, "causal.positions", "relative");
    put_float(&b, "causal.context_noise", 0.5f);
    put_name(&b, "causal.prompt_change", "recache");
    put_key(&b, "causal.recache_sink", VALUE_BOOL, 1, 1);
    corpus_add(&targets[RECIPE], input_copy(b.data, b.size));
}

/* The state of a run that ends, in a process of its own, when its video may not grow beyond `most` bytes. */
static void seed_state(Model *model, Settings *s, rlim_t most) {
    static char output[] = "/tmp/sora-fuzz-XXXXXX";
    strcpy(output + sizeof output - 7, "XXXXXX");
    int file = mkstemp(output);
    char *path = state_path(output), *part = format_string("%s.part", output);
    Bytes bytes = {NULL, 0};
    s->prompt = "a red fox", s->output = output, s->seed = 1, s->width = s->height = 16, s->frames = 401;
    s->state_seconds = 0, s->record = false;
    settings_complete(s, model);
    fflush(NULL);
    if (file >= 0 && !fork()) {
        running = NULL;
        signal(SIGXFSZ, SIG_IGN);
        if (!freopen("/dev/null", "w", stderr) || setrlimit(RLIMIT_FSIZE, &(struct rlimit){most, most})) _exit(1);
        generate(model, s);
        _exit(0);
    }
    wait(NULL);
    if (read_file(path, MAX_INPUT, &bytes) || bytes.size < 100) die(STATUS_CHECK, "no state to fuzz with");
    corpus_add(&targets[STATE], input_copy(bytes.data + 13, bytes.size - 13 - 72));
    free((void *)bytes.data);
    unlink(output), unlink(path), unlink(part);
    free(path), free(part);
}

static void seed_states(void) {
    Settings *chunks = &state_settings[0], *pictures = &state_settings[1];
    *chunks = *pictures = settings_new();
    chunks->window = 6, chunks->sink = 1, chunks->arguments = (Bytes){(const uint8_t *)"--seed=1", 9};
    pictures->steps = 2, pictures->chroma = 444, pictures->arguments = (Bytes){(const uint8_t *)"--seed=2", 9};
    pictures->image = pictures->last_image = "", pictures->source = pictures->last_source = &picture;
    state_models[0] = model_load("tests/goldens/causal/model.gguf", F32);
    state_models[1] = model_load("tests/goldens/pictures/model.gguf", F32);
    seed_state(&state_models[0], chunks, 120000);
    seed_state(&state_models[1], pictures, 250000);
}

/* only: the one target that is fuzzed, or NULL */
static void seed_all(const char *only) {
    const char *why = source_open("tests/goldens/images/picture.ppm", &picture);
    if (why) die(STATUS_CHECK, "the picture to fuzz with: %s", why);
    if (!only || !strcmp(only, "state")) seed_states(); /* takes a while */
    seed_tokenizers();
    seed_videos();
    seed_pictures();
    seed_records();
    seed_texts();
    seed_stories();
    seed_recipes();
    seed_files(&targets[WEIGHTS], "tests/goldens/weights/*.gguf");
    seed_files(&targets[NUMPY], "tests/goldens/npy/*.npy");
    seed_files(&targets[NUMPY], "tests/goldens/npy/types/*.npy");
    seed_files(&targets[WHOLE_MODEL], "tests/goldens/model/*.gguf");
    seed_files(&targets[WHOLE_MODEL], "tests/goldens/causal/*.gguf");
    seed_files(&targets[WHOLE_MODEL], "tests/goldens/pictures/*.gguf");
    seed_files(&targets[WHOLE_MODEL], "tests/goldens/pictures/held/*.gguf");
    seed_files(&targets[WHOLE_MODEL], "tests/goldens/tiny/*.gguf");
}

/* ---------------------------------------------------------------- mutations */

/* Replaces `cut` bytes at `at` by `size` others. */
static void splice(Input *input, size_t at, size_t cut, const uint8_t *data, size_t size) {
    size_t total = input->size - cut + size;
    uint8_t *copy = malloc(total ? total : 1);
    if (!copy) abort();
    memcpy(copy, input->data, at);
    if (size) memcpy(copy + at, data, size);
    memcpy(copy + at + size, input->data + at + cut, input->size - at - cut);
    free(input->data);
    *input = (Input){copy, total};
}

static void put_number(Input *input, size_t at, size_t width) {
    static const uint64_t numbers[] = {0,          1,          2,          31,          32,
                                       33,         255,        256,        65535,       65536,
                                       0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, 0x7fffffffffffffff,
                                       UINT64_MAX};
    uint64_t number = numbers[below(sizeof numbers / sizeof *numbers)] + below(3) - 1;
    if (at + width <= input->size) memcpy(input->data + at, &number, width);
}

static bool value_begins(const uint8_t *p) {
    return p[0] >= 'a' && p[0] <= 'z' && p[1] >= 4 && p[1] <= 6 && !p[2] && !p[3] && !p[4];
}

/* Changes the value of a random key of type u32, i32 or f32 in a weight file. */
static void put_value(Input *input) {
    size_t at = place(input->size);
    while (at + 9 <= input->size && !value_begins(input->data + at)) at++;
    put_number(input, at + 5, 4);
}

static void mutate(Input *input, const Input *other) {
    size_t at = place(input->size), length = place(input->size - at), from;
    uint8_t bytes[16];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)draw();
    switch (below(9)) {
    case 0:
        if (at < input->size) input->data[at] ^= (uint8_t)(1u << below(8));
        break;
    case 1:
        if (at < input->size) input->data[at] = bytes[0];
        break;
    case 2: put_number(input, at, (size_t)1 << below(4)); break;
    case 3: splice(input, at, length, NULL, 0); break;
    case 4: splice(input, at, 0, bytes, below(sizeof bytes)); break;
    case 5: input->size = input->size - place(input->size); break;
    case 6:
        if (at < input->size) input->data[at] = (uint8_t)("0123456789 \n&;<>xCFWH"[below(21)]);
        break;
    case 7: put_value(input); break;
    case 8:
        from = place(other->size);
        splice(input, at, below(2) ? length : 0, other->data + from, place(other->size - from));
        break;
    }
}

static void fuzz(Target *target, double duration) {
    long runs = 0, accepted = 0;
    for (double end = seconds() + duration; target->count && seconds() < end; runs++) {
        const Input *seed = &target->corpus[below((size_t)target->count)];
        Input input = input_copy(seed->data, seed->size);
        for (size_t i = below(target->apart ? 2 : 6) + 1; i > 0; i--)
            mutate(&input, &target->corpus[below((size_t)target->count)]);
        input.data = realloc(input.data, input.size ? input.size : 1); /* so that reads beyond its end are detected */
        bool good = input.size <= MAX_INPUT && run(target, input);
        accepted += good;
        if (good && below(8) == 0) corpus_add(target, input);
        else free(input.data);
    }
    printf("%-8s %9ld inputs, %ld accepted\n", target->name, runs, accepted);
    fflush(stdout);
}

#ifdef LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const Target *target;
    const char *name = getenv("FUZZ_TARGET");
    if (!target) {
        nowhere = fopen("/dev/null", "w");
        kernels_choose("auto");
        seed_all(name);
        for (int t = 0; t < TARGETS; t++)
            if (name && !strcmp(name, targets[t].name) && !targets[t].apart) target = &targets[t];
        if (!target)
            die(STATUS_USAGE, "FUZZ_TARGET: expected weights, npy, source, stream, record, text, story or state");
    }
    target->run((Bytes){data, size});
    return 0;
}
#else
int main(int argc, char **argv) {
    state = (uint64_t)time(NULL) * 0x9e3779b97f4a7c15 + (uint64_t)getpid();
    nowhere = fopen("/dev/null", "w");
    kernels_choose("auto");
    atexit(on_exit_inside);
    signal(SIGABRT, on_signal);
    signal(SIGALRM, on_signal);
    double duration = argc > 1 ? atof(argv[1]) : 20;
    replaying = duration <= 0;
    const char *only = replaying ? argv[1] : argc > 2 ? argv[2] : NULL;
    seed_all(only);
    for (int t = 0; t < TARGETS; t++) {
        Bytes bytes;
        if (only && strcmp(only, targets[t].name)) continue;
        if (!replaying) fuzz(&targets[t], duration);
        else if (argc > 2 && !read_file(argv[2], MAX_INPUT, &bytes))
            printf("%s\n",
                   run(&targets[t], (Input){(uint8_t *)bytes.data, bytes.size}) ? "accepted" : "refused");
    }
    return 0;
}
#endif
