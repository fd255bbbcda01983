/* sora.c - the command line: parses options into Settings, loads a model, and generates one video.
 *
 * `./sora --help` lists the options; docs/options.md says more. The order of work:
 *
 *   parse() -> choose kernels -> --help, --version, or run():
 *     check what can be checked without the model -> --info, or load the model -> --tokenize, or generate()
 *
 * An error is one line on standard error and a non-zero status (die()). */
#include "sora.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- the options */

/* The order is that of --help. */
typedef enum {
    MODEL, PROMPT, PROMPT_FILE, NEGATIVE, EMBEDS, NEGATIVE_EMBEDS, OUTPUT_FILE, RESUME, NO_STATE,
    IMAGE, LAST_IMAGE, VIDEO_FILE, STRENGTH, EXTEND,
    SIZE, FRAMES, SECONDS, FPS, CHROMA,
    STEPS, GUIDANCE, GUIDANCE_2, SHIFT, SAMPLER_NAME, SEED, NOISE, EASYCACHE,
    AT, STORY, WINDOW, SINK, POSITIONS,
    THREADS, PRECISION, ISA, DECODER_NAME,
    PREVIEW, DRIFT, PROFILE, QUIET,
    RECORD_PROMPT, NO_RECORD, LABEL, MARK, PRODUCER, PRODUCE_ID,
    DUMP, DUMP_ONLY, CHECK, TOLERANCE, FEED,
    INFO, TOKENIZE, SAVE_EMBEDS, VERIFY, HELP, VERSION, OPTIONS
} Option;

static const struct {
    const char *name;
    char letter;
    const char *argument; /* NULL: a switch */
    const char *help;
    const char *heading;  /* printed above the first option of a group */
} options[OPTIONS] = {
    [MODEL] = {"model", 'm', "FILE", "weight file that export.py wrote (default: the bundled demo model)",
              "Input and output"},
    [PROMPT] = {"prompt", 'p', "TEXT", "what the video shows; the same as the argument \"prompt\"", NULL},
    [PROMPT_FILE] = {"prompt-file", 0, "FILE", "read the prompt from FILE; - is standard input", NULL},
    [NEGATIVE] = {"negative", 'n', "TEXT", "what the video should not show", NULL},
    [EMBEDS] = {"embeds", 0, "FILE", "embeds of the prompt from a .npy file: the text encoder is not run", NULL},
    [NEGATIVE_EMBEDS] = {"negative-embeds", 0, "FILE", "the same for what the video should not show", NULL},
    [OUTPUT_FILE] = {"output", 'o', "FILE",
                     "Y4M video (default: out.y4m), or PPM picture with -f 1; - is standard output", NULL},
    [RESUME] = {"resume", 0, NULL, "continue an interrupted run from OUTPUT.state", NULL},
    [NO_STATE] = {"no-state", 0, NULL, "do not write OUTPUT.state during long runs", NULL},

    [IMAGE] = {"image", 0, "FILE", "the first frame: a PPM, or a Y4M's first frame; - is standard input",
              "Beginning with a picture or a clip"},
    [LAST_IMAGE] = {"last-image", 0, "FILE", "the last frame, with --image or --extend; - is standard input", NULL},
    [VIDEO_FILE] = {"video", 0, "FILE", "a Y4M, for one of the next two options; - is standard input", NULL},
    [STRENGTH] = {"strength", 0, "S", "make it anew from that much noise, from more than 0 to 1", NULL},
    [EXTEND] = {"extend", 0, NULL, "continue it by so many frames or seconds", NULL},

    [SIZE] = {"size", 's', "WxH", "width and height in pixels: multiples of 16 (TI2V-5B: 32; demo model: 24)",
             "Video"},
    [FRAMES] = {"frames", 'f', "N", "number of frames: a multiple of 4, plus 1", NULL},
    [SECONDS] = {"seconds", 0, "S", "length in seconds, instead of --frames", NULL},
    [FPS] = {"fps", 0, "RATE", "frames per second: 24, 23.976, 30000/1001 or 30000:1001", NULL},
    [CHROMA] = {"chroma", 0, "420|444", "chroma subsampling of the video (default: 420)", NULL},

    [STEPS] = {"steps", 0, "N", "number of denoising steps", "Sampling"},
    [GUIDANCE] = {"guidance", 'g', "G", "classifier-free guidance scale; 1 or less turns it off", NULL},
    [GUIDANCE_2] = {"guidance-2", 0, "G", "the same for the second expert of Wan 2.2 A14B", NULL},
    [SHIFT] = {"shift", 0, "S", "shift of the noise schedule", NULL},
    [SAMPLER_NAME] = {"sampler", 0, "NAME", "unipc, euler or dpm++", NULL},
    [SEED] = {"seed", 0, "N", "seed of the noise, the same as torch's on a CPU (default: random, printed)", NULL},
    [NOISE] = {"noise", 0, "FILE", "initial noise [C,T,H,W] from a .npy file, instead of the seed's", NULL},
    [EASYCACHE] = {"easycache", 0, "X", "leave out steps while the change that is missed stays below X, as 0.05", NULL},

    [AT] = {"at", 0, "\"TIME TEXT\"", "change the prompt to TEXT at TIME (12, 12.5 or 1:05); may be repeated",
            "Only for models that generate in chunks"},
    [STORY] = {"story", 0, "FILE", "read lines of TIME TEXT from FILE; - is standard input; time 0 is the prompt",
               NULL},
    [WINDOW] = {"window", 0, "N", "latent frames that attention sees, the current chunk included; 0 is all", NULL},
    [SINK] = {"sink", 0, "N", "how many of them are always the first frames of the video", NULL},
    [POSITIONS] = {"positions", 0, "NAME", "RoPE positions in the video (absolute) or in the window (relative)", NULL},

    [THREADS] = {"threads", 't', "N", "number of threads (default: all available cores)", "Speed"},
    [PRECISION] = {"precision", 0, "TYPE", "arithmetic of the large matrix products: f32, bf16 or int8", NULL},
    [ISA] = {"isa", 0, "NAME", "instruction set: auto, naive, generic, avx2, avx512[vnni|bf16], amx, neon[dotprod]",
             NULL},
    [DECODER_NAME] = {"decoder", 0, "full|tiny", "VAE decoder; tiny is faster and coarser, if the model has one", NULL},

    [PREVIEW] = {"preview", 0, NULL, "draw the frames in a colour terminal as they are decoded", "Reports"},
    [DRIFT] = {"drift", 0, NULL, "print for each chunk how colours, sharpness and motion have changed", NULL},
    [PROFILE] = {"profile", 0, NULL, "print time and operations of each stage, and peak memory", NULL},
    [QUIET] = {"quiet", 'q', NULL, "print no progress and no notes", NULL},

    [RECORD_PROMPT] = {"record-prompt", 0, NULL, "write the prompt into OUTPUT.json, not only its SHA-256",
                       "Where the video comes from"},
    [NO_RECORD] = {"no-record", 0, NULL, "do not write OUTPUT.json, the settings that made the video", NULL},
    [LABEL] = {"label", 0, NULL, "draw a visible label into the first two seconds of every minute", NULL},
    [MARK] = {"mark", 0, NULL, "add an invisible mark to the pixels", NULL},
    [PRODUCER] = {"producer", 0, "TEXT", "who made the video, for the AIGC label in OUTPUT.json", NULL},
    [PRODUCE_ID] = {"produce-id", 0, "TEXT", "the producer's own number of the video, for the same label", NULL},

    [DUMP] = {"dump", 0, "DIR", "write every named tensor to DIR as .npy",
             "Validation against a reference implementation"},
    [DUMP_ONLY] = {"dump-only", 0, "GLOB", "only tensors whose names match, such as 'step000.*'", NULL},
    [CHECK] = {"check", 0, "DIR", "compare tensors with the .npy files in DIR; exit with 1 if one differs", NULL},
    [TOLERANCE] = {"tolerance", 0, "X", "largest relative difference that --check accepts (default: 1e-4)", NULL},
    [FEED] = {"feed", 0, NULL, "after comparing a tensor, continue with the one in DIR", NULL},

    [INFO] = {"info", 0, NULL, "the model's configuration and tensors", "Print and exit"},
    [TOKENIZE] = {"tokenize", 0, NULL, "the prompt's token ids", NULL},
    [SAVE_EMBEDS] = {"save-embeds", 0, "FILE", "write the prompt's embeds to FILE (.npy), for --embeds", NULL},
    [VERIFY] = {"verify", 0, "FILE", "whether a Y4M (- is standard input) carries a mark and agrees with FILE.json",
                NULL},
    [HELP] = {"help", 'h', NULL, "this text", NULL},
    [VERSION] = {"version", 0, NULL, "the version, and the instruction set that is used on this machine", NULL},
};

/* What a state keeps of an option. Only an option OF_CALL may be given with --resume. */
static const enum {
    AS_GIVEN, /* the text that was given */
    AS_VALUE, /* the value that the run settled on */
    OF_CALL,  /* nothing: it belongs to one call of the program */
    NOT_KEPT  /* nothing */
} kept[OPTIONS] = {
    [MODEL] = AS_VALUE, [PROMPT] = AS_VALUE, [AT] = AS_VALUE, [NOISE] = AS_VALUE, [SEED] = AS_VALUE,
    [PRECISION] = AS_VALUE, [ISA] = AS_VALUE, [EMBEDS] = AS_VALUE, [NEGATIVE_EMBEDS] = AS_VALUE,
    [IMAGE] = AS_VALUE, [LAST_IMAGE] = AS_VALUE, [VIDEO_FILE] = AS_VALUE,
    [OUTPUT_FILE] = OF_CALL, [RESUME] = OF_CALL, [THREADS] = OF_CALL, [PREVIEW] = OF_CALL, [PROFILE] = OF_CALL,
    [QUIET] = OF_CALL, [HELP] = OF_CALL, [VERSION] = OF_CALL,
    [PROMPT_FILE] = NOT_KEPT, [STORY] = NOT_KEPT, [NO_STATE] = NOT_KEPT, [DUMP] = NOT_KEPT, [DUMP_ONLY] = NOT_KEPT,
    [CHECK] = NOT_KEPT, [TOLERANCE] = NOT_KEPT, [FEED] = NOT_KEPT, [INFO] = NOT_KEPT, [TOKENIZE] = NOT_KEPT,
    [VERIFY] = NOT_KEPT, [SAVE_EMBEDS] = NOT_KEPT,
};

static void print_help(void) {
    puts("Usage: sora [options] \"prompt\"\n"
         "Generates a video from text, on the CPU. The model's own defaults replace options that are not given.");
    for (int i = 0; i < OPTIONS; i++) {
        char left[64];
        if (options[i].heading) printf("\n%s:\n", options[i].heading);
        snprintf(left, sizeof left, "%c%c%c --%s %s", options[i].letter ? '-' : ' ',
                 options[i].letter ? options[i].letter : ' ', options[i].letter ? ',' : ' ', options[i].name,
                 options[i].argument ? options[i].argument : "");
        printf("  %-26s %s\n", left, options[i].help);
    }
    puts("\nExit status: 0 done; 1 a check failed, or a value is NaN or infinity; 2 bad usage or input;\n"
         "3 out of memory, disk or other resources; 130 interrupted.");
}

static void print_version(int threads) {
#ifdef _OPENMP
    printf("sora %s, %s kernels, %d threads\n", SORA_VERSION, kernels->name, threads);
#else
    (void)threads;
    printf("sora %s, %s kernels, built without OpenMP\n", SORA_VERSION, kernels->name);
#endif
}

/* ---------------------------------------------------------------- values of options */

static long long parse_integer(Option option, const char *text, long long least, long long most) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (!*text || *end || errno || value < least || value > most)
        die(STATUS_USAGE, "--%s: '%s' is not a whole number from %lld to %lld", options[option].name, text,
            least, most);
    return value;
}

static double parse_number(Option option, const char *text, double least, double most) {
    char *end;
    double value = strtod(text, &end);
    if (!*text || *end || !(value >= least && value <= most))
        die(STATUS_USAGE, "--%s: '%s' is not a number from %g to %g", options[option].name, text,
            least, most);
    return value;
}

/* "WxH" */
static void parse_size(const char *text, int *width, int *height) {
    const char *at = text;
    int64_t w = take_digits(&at, 16384), h = *at == 'x' ? at++, take_digits(&at, 16384) : -1;
    if (*at || w < 1 || h < 1) die(STATUS_USAGE, "--size: '%s' is not WxH, two whole numbers from 1 to 16384", text);
    *width = (int)w;
    *height = (int)h;
}

static int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

/* value / parts as a fraction in lowest terms. A rounded NTSC rate gives the exact one, N * 1000/1001: 23.976 and 23.98
 * are 24000/1001. */
static void decimal_rate(int64_t value, int64_t parts, int64_t *num, int64_t *den) {
    static const int ntsc[] = {12, 15, 24, 30, 48, 60, 120};
    int64_t divisor = common_divisor(value, parts);
    *num = value / divisor;
    *den = parts / divisor;
    for (size_t i = 0; i < sizeof ntsc / sizeof *ntsc && parts >= 100; i++) {
        if (llround(ntsc[i] * 1000 / 1001.0 * (double)parts) != value) continue;
        *num = ntsc[i] * 1000;
        *den = 1001;
    }
}

/* "24", "23.976", "30000/1001", "30000:1001" */
static void parse_rate(const char *text, int *rate_num, int *rate_den) {
    enum { MOST = 1000000 };
    const char *at = text;
    int64_t num = take_digits(&at, MOST), den = 1, parts = 1;
    if (*at == ':' || *at == '/') {
        at++;
        den = take_digits(&at, MOST);
    } else if (*at == '.' && num >= 0) {
        for (at++; *at >= '0' && *at <= '9' && parts < MOST; at++, parts *= 10) num = 10 * num + (*at - '0');
        if (num > 0) decimal_rate(num, parts, &num, &den);
    }
    if (*at || num < 1 || den < 1 || num > MOST)
        die(STATUS_USAGE, "--fps: '%s' is not a rate such as 24, 23.976, 30000/1001 or 30000:1001, of numbers from 1 "
            "to %d", text, MOST);
    *rate_num = (int)num;
    *rate_den = (int)den;
}

/* The range of torch's manual_seed(): a negative seed is the unsigned one with the same 64 bits. */
static uint64_t parse_seed(const char *text) {
    char *end;
    errno = 0;
    uint64_t seed = *text == '-' ? (uint64_t)strtoll(text, &end, 10) : strtoull(text, &end, 10);
    if (!*text || *end || errno)
        die(STATUS_USAGE, "--seed: '%s' is not a whole number from -2^63 to 2^64-1", text);
    return seed;
}

/* Reads an option's file of at most `most` bytes, in UTF-8, or in UTF-16 with a byte order mark. Returns UTF-8. */
static Text read_text(Option option, const char *path, size_t most) {
    Bytes bytes;
    Text text = {0};
    const char *why = read_file(path, most, &bytes);
    if (why) die(STATUS_USAGE, "--%s %s: %s", options[option].name, path, why);
    if (!text_append_utf16(&text, bytes)) text_append(&text, bytes.data, bytes.size);
    free((void *)bytes.data);
    const uint8_t *zero = memchr(text.data, 0, text.size);
    if (zero)
        die(STATUS_USAGE, "--%s %s: byte %zu is 0, expected text in UTF-8, or UTF-16 with a byte order mark",
            options[option].name, path, (size_t)(zero - text.data));
    return text;
}

static char *read_prompt(const char *path) {
    return (char *)read_text(PROMPT_FILE, path, 1 << 16).data; /* far more than 512 tokens */
}

static void read_story(Story *story, const char *path) {
    Text text = read_text(STORY, path, 1 << 20);
    const char *why = story_parse(story, text_bytes(&text));
    if (why) die(STATUS_USAGE, "--story %s: %s", path, why);
    free(text.data);
}

static void add_line(Story *story, const char *line) {
    const char *why = story_add(story, (Bytes){(const uint8_t *)line, strlen(line)});
    if (why) die(STATUS_USAGE, "--at: %s", why);
}

/* ---------------------------------------------------------------- the command line */

typedef struct {
    Settings settings;
    StoryLine opening; /* the prompt, if it was the story's line at time 0 */
    Text stored;       /* the command line of a state, to which settings point */
    Text given;        /* the AS_GIVEN options, each "--name=value" and a 0 byte */
    Option fixed;      /* the first option that --resume does not allow; OPTIONS: none */
    Source source, last_source; /* --image or --video; --last-image */
    const char *model, *prompt_file, *story_file, *isa, *dump, *dump_only, *check, *verify, *save_embeds;
    int threads;
    double tolerance; /* negative: not given */
    Precision precision;
    bool profile, info, tokenize, no_state, help, version;
    bool seeded;      /* --seed was given */
} Command;

static void set_prompt(Command *c, const char *text) {
    if (c->settings.prompt)
        die(STATUS_USAGE, "two prompts: '%s' and '%s', expected one, in quotes if it has spaces", c->settings.prompt,
            text);
    c->settings.prompt = text;
}

static void apply(Command *c, Option option, const char *value) {
    Settings *s = &c->settings;
    switch (option) {
    case MODEL: c->model = value; break;
    case PROMPT: set_prompt(c, value); break;
    case PROMPT_FILE: set_prompt(c, read_prompt(c->prompt_file = value)); break;
    case NEGATIVE: s->negative = value; break;
    case EMBEDS: s->embeds = value; break;
    case NEGATIVE_EMBEDS: s->negative_embeds = value; break;
    case SAVE_EMBEDS: c->save_embeds = value; break;
    case OUTPUT_FILE: s->output = value; break;
    case IMAGE: s->image = value; break;
    case LAST_IMAGE: s->last_image = value; break;
    case VIDEO_FILE: s->video = value; break;
    case STRENGTH: s->strength = parse_number(STRENGTH, value, 0, 1); break;
    case EXTEND: s->extend = true; break;
    case SIZE: parse_size(value, &s->width, &s->height); break;
    case FRAMES: s->frames = (int)parse_integer(FRAMES, value, 1, 1000001); break;
    case SECONDS: s->seconds = parse_number(SECONDS, value, 0, 1e5); break;
    case FPS: parse_rate(value, &s->fps_num, &s->fps_den); break;
    case STEPS: s->steps = (int)parse_integer(STEPS, value, 1, 1000); break;
    case GUIDANCE: s->guidance[0] = parse_number(GUIDANCE, value, 0, 1000); break;
    case GUIDANCE_2: s->guidance[1] = parse_number(GUIDANCE_2, value, 0, 1000); break;
    case SHIFT: s->shift = parse_number(SHIFT, value, 1e-3, 1000); break;
    case SAMPLER_NAME:
        if (!sampler_parse(value, &s->sampler))
            die(STATUS_USAGE, "--sampler: '%s' is not unipc, euler or dpm++", value);
        break;
    case EASYCACHE: s->easycache = parse_number(EASYCACHE, value, 0, 1e9); break;
    case SEED: s->seed = parse_seed(value); c->seeded = true; break;
    case THREADS: c->threads = (int)parse_integer(THREADS, value, 1, MAX_THREADS); break;
    case PRECISION:
        if (!precision_parse(value, &c->precision))
            die(STATUS_USAGE, "--precision: '%s' is not f32, bf16 or int8", value);
        break;
    case ISA: c->isa = value; break;
    case DECODER_NAME:
        if (strcmp(value, "full") && strcmp(value, "tiny"))
            die(STATUS_USAGE, "--decoder: '%s' is not full or tiny", value);
        s->decoder = !strcmp(value, "tiny") ? TINY : DECODER;
        break;
    case NOISE: s->noise = value; break;
    case AT: add_line(&s->story, value); break;
    case STORY:
        if (c->story_file) die(STATUS_USAGE, "two stories: '%s' and '%s'", c->story_file, value);
        read_story(&s->story, c->story_file = value);
        break;
    case WINDOW: s->window = (int)parse_integer(WINDOW, value, 0, 1000000); break;
    case SINK: s->sink = (int)parse_integer(SINK, value, 0, 1000000); break;
    case POSITIONS:
        if (strcmp(value, "absolute") && strcmp(value, "relative"))
            die(STATUS_USAGE, "--positions: '%s' is not absolute or relative", value);
        s->positions = value;
        break;
    case DRIFT: s->drift = true; break;
    case DUMP: c->dump = value; break;
    case DUMP_ONLY: c->dump_only = value; break;
    case CHECK: c->check = value; break;
    case FEED: s->feed = true; break;
    case TOLERANCE: c->tolerance = parse_number(TOLERANCE, value, 0, 1e9); break;
    case CHROMA:
        if (strcmp(value, "420") && strcmp(value, "444")) die(STATUS_USAGE, "--chroma: '%s' is not 420 or 444", value);
        s->chroma = atoi(value);
        break;
    case RECORD_PROMPT: s->record_prompt = true; break;
    case NO_RECORD: s->record = false; break;
    case LABEL: s->label = true; break;
    case MARK: s->mark = true; break;
    case VERIFY: c->verify = value; break;
    case PRODUCER: s->producer = value; break;
    case PRODUCE_ID: s->produce_id = value; break;
    case PROFILE: c->profile = true; break;
    case INFO: c->info = true; break;
    case TOKENIZE: c->tokenize = true; break;
    case PREVIEW: s->preview = true; break;
    case RESUME: s->resume = true; break;
    case NO_STATE: c->no_state = true; break;
    case QUIET: s->quiet = true; break;
    case HELP: c->help = true; break;
    case VERSION: c->version = true; break;
    case OPTIONS: break;
    }
}

/* Parses "--name", "--name=value" or "-x". *value is NULL unless it follows a "=". */
static Option find_option(const char *text, const char **value) {
    *value = NULL;
    for (int i = 0; i < OPTIONS; i++) {
        size_t length = strlen(options[i].name);
        if (text[1] != '-' && text[1] == options[i].letter && !text[2]) return (Option)i;
        if (text[1] != '-' || strncmp(text + 2, options[i].name, length)) continue;
        if (text[2 + length] == '=') *value = text + 3 + length;
        if (*value || !text[2 + length]) return (Option)i;
    }
    die(STATUS_USAGE, "unknown option '%s'; see --help", text);
}

/* "--name=value", or "--name" for a switch, and a 0 byte. */
static void append_argument(Text *arguments, Option option, const char *value) {
    const char *name = options[option].name;
    char *text = value ? format_string("--%s=%s", name, value) : format_string("--%s", name);
    text_append(arguments, text, strlen(text) + 1);
    free(text);
}

static Command parse(int argc, char **argv) {
    Command c = {.settings = settings_new(), .isa = "auto", .threads = threads_default(), .tolerance = -1,
                 .precision = AUTOMATIC, .fixed = OPTIONS};
    bool only_prompts = false; /* after "--" */
    for (int i = 1; i < argc; i++) {
        if (only_prompts || argv[i][0] != '-' || !argv[i][1]) {
            set_prompt(&c, argv[i]);
            c.fixed = PROMPT;
        } else if (!strcmp(argv[i], "--")) {
            only_prompts = true;
        } else {
            const char *value;
            Option option = find_option(argv[i], &value);
            if (value && !options[option].argument)
                die(STATUS_USAGE, "--%s takes no value", options[option].name);
            if (!value && options[option].argument) value = argv[++i];
            if (!value && options[option].argument)
                die(STATUS_USAGE, "--%s: %s is missing", options[option].name, options[option].argument);
            apply(&c, option, value);
            if (kept[option] == AS_GIVEN) append_argument(&c.given, option, value);
            if (kept[option] != OF_CALL && c.fixed == OPTIONS) c.fixed = option;
        }
    }
    return c;
}

/* ---------------------------------------------------------------- the command line in a state */

/* An absolute path, because --resume may run in another folder. */
static void append_path(Text *arguments, Option option, const char *path) {
    char *absolute = realpath(path, NULL);
    append_argument(arguments, option, absolute ? absolute : path);
    free(absolute);
}

/* The command line that makes the same video again. Reading it gives the same text. */
static void append_arguments(Text *arguments, const Command *c, const Model *model, const char *path) {
    const Settings *s = &c->settings;
    char seed[24];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)s->seed);
    append_path(arguments, MODEL, path);
    if (s->prompt) append_argument(arguments, PROMPT, s->prompt);
    for (int i = 0; i < s->story.count; i++) append_argument(arguments, AT, s->story.lines[i].line);
    if (s->noise) append_path(arguments, NOISE, s->noise);
    if (s->embeds) append_path(arguments, EMBEDS, s->embeds);
    if (s->negative_embeds) append_path(arguments, NEGATIVE_EMBEDS, s->negative_embeds);
    if (s->image) append_path(arguments, IMAGE, s->image);
    if (s->last_image) append_path(arguments, LAST_IMAGE, s->last_image);
    if (s->video) append_path(arguments, VIDEO_FILE, s->video);
    append_argument(arguments, SEED, seed);
    append_argument(arguments, PRECISION, precision_name(model->precision));
    if (model->precision != F32) append_argument(arguments, ISA, kernels->name);
    text_append(arguments, c->given.data, c->given.size);
}

/* The command line of OUTPUT.state, followed by this call's. */
static Command parse_resumed(const Command *c, int argc, char **argv) {
    char *path = state_path(c->settings.output);
    Text stored = {0};
    if (c->fixed != OPTIONS)
        die(STATUS_USAGE, "--%s: cannot be given with --resume, which takes it from %s", options[c->fixed].name, path);
    const char *why = state_arguments(path, &stored), *value;
    if (why) die(STATUS_USAGE, "--resume: %s: %s", path, why);
    char **joined = allocate(sizeof *joined * (stored.size + (size_t)argc + 1));
    int count = 0;
    joined[count++] = argv[0];
    for (char *at = (char *)stored.data, *end = at + stored.size; at < end; at += strlen(at) + 1) {
        if (strncmp(at, "--", 2) || kept[find_option(at, &value)] > AS_VALUE)
            die(STATUS_USAGE, "--resume: %s: '%s' is not an option of a state", path, at);
        joined[count++] = at;
    }
    for (int i = 1; i < argc; i++) joined[count++] = argv[i];
    Command resumed = parse(count, joined);
    resumed.stored = stored;
    free(joined), free(path);
    return resumed;
}

/* ---------------------------------------------------------------- defaults: model, seed */

/* models/demo.gguf beside the program (a checkout), or PREFIX/share/sora/demo.gguf (installed). */
static const char *bundled_model(void) {
    static char path[4096];
    static const char *const places[] = {"models/demo.gguf", "../share/sora/demo.gguf"};
    char program[2048];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    program[length < 0 ? 0 : length] = 0;
    char *slash = strrchr(program, '/');
    int folder = slash ? (int)(slash - program) : 1;
    if (!slash) strcpy(program, ".");
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%.*s/%s", folder, program, places[i]);
        if (access(path, R_OK) == 0) return path;
    }
    die(STATUS_USAGE, "--model: not given, and there is no models/demo.gguf beside the program");
}

static uint64_t random_seed(void) {
    uint32_t seed = (uint32_t)time(NULL) * 2654435761u ^ (uint32_t)getpid();
    FILE *source = fopen("/dev/urandom", "rb");
    if (source) {
        if (fread(&seed, sizeof seed, 1, source) != 1) seed ^= 0x5eed;
        fclose(source);
    }
    return seed;
}

/* ---------------------------------------------------------------- the run */

static void print_ids(const Model *model, const char *prompt) {
    int limit = model->experts->transformer.text_len;
    int32_t *ids = allocate(sizeof *ids * (size_t)limit);
    int n = prompt_ids(model, prompt, ids);
    for (int i = 0; i < n; i++) printf("%d%c", (int)ids[i], i + 1 < n ? ' ' : '\n');
    free(ids);
}

/* Reads only the header and the tensor list, so it works for models that cannot run, too. */
static int print_info(const char *path) {
    WeightFile *file;
    const char *why = weights_open(path, &file);
    if (why) die(STATUS_USAGE, "%s: %s", path, why);
    weights_print(file, stdout);
    weights_close(file);
    return STATUS_OK;
}

/* Refuses the extensions of other video and picture formats, and says how to convert the Y4M. Refuses .npy, too: the
 * file may be a tensor of --check, or one that --dump will write. */
static void check_output_name(const char *output) {
    static const char *const others[] = {"mp4", "m4v", "mov", "mkv", "webm", "avi", "gif", "webp", "apng", "png",
                                         "jpg", "jpeg", "mpg", "mpeg", "ts", "ogv", "wmv", "flv", "avif"};
    const char *dot = strrchr(output, '.');
    int stem = dot ? (int)(dot - output) : 0;
    if (dot && !strcmp(dot, ".npy"))
        die(STATUS_USAGE, "--output %s: the video is written as Y4M, expected another name; --dump writes .npy",
            output);
    for (size_t i = 0; dot && i < sizeof others / sizeof *others; i++)
        if (!strcasecmp(dot + 1, others[i]))
            die(STATUS_USAGE, "--output %s: the video is written as Y4M; for %s give -o %.*s.y4m, then: ffmpeg -i "
                "%.*s.y4m %s", output, others[i], stem, output, stem, output, output);
}

static void check_combinations(const Command *c) {
    const Settings *s = &c->settings;
    if (c->dump_only && !c->dump) die(STATUS_USAGE, "--dump-only: needs --dump DIR");
    if (c->tolerance >= 0 && !c->check) die(STATUS_USAGE, "--tolerance: needs --check DIR");
    if (s->feed && !c->check) die(STATUS_USAGE, "--feed: needs --check DIR");
    if (s->frames && s->seconds >= 0) die(STATUS_USAGE, "--frames and --seconds: expected one of them, found both");
    if (s->last_image && !s->image && !s->extend)
        die(STATUS_USAGE, "--last-image: needs --image FILE, or --video FILE with --extend");
    if (s->image && s->video) die(STATUS_USAGE, "--image and --video: expected one of them, found both");
    if (s->extend && s->strength >= 0) die(STATUS_USAGE, "--extend and --strength: expected one of them, found both");
    if (s->extend && !s->video) die(STATUS_USAGE, "--extend: needs --video FILE");
    if (s->strength >= 0 && !s->video) die(STATUS_USAGE, "--strength: needs --video FILE");
    if (s->video && !s->extend && s->strength < 0) die(STATUS_USAGE, "--video: needs --strength S or --extend");
    const char *inputs[] = {c->prompt_file, c->story_file, s->image, s->last_image, s->video};
    int standard = 0;
    for (int i = 0; i < 5; i++) standard += inputs[i] && !strcmp(inputs[i], "-");
    if (standard > 1) die(STATUS_USAGE, "standard input: %d options read it (-), expected one", standard);
}

/* Returns the source that an option names; NULL if it was not given. */
static const Source *open_source(Option option, const char *path, Source *source) {
    if (!path) return NULL;
    const char *why = source_open(path, source);
    if (!why && option == VIDEO_FILE && source->pixels) why = "this is a PPM, expected a Y4M; --image takes a PPM";
    if (why) die(STATUS_USAGE, "--%s %s: %s", options[option].name, path, why);
    return source;
}

/* Moves a story's line at time 0 from the story to the prompt. */
static void prompt_from_story(Command *c) {
    Story *story = &c->settings.story;
    if (!story->count || story->lines[0].time > 0) return;
    c->opening = story->lines[0];
    set_prompt(c, c->opening.text);
    memmove(story->lines, story->lines + 1, sizeof *story->lines * (size_t)--story->count);
}

/* Refuses an output, record or dump that would overwrite a file that the run reads. */
static void protect_inputs(const Command *c, const char *model) {
    const Settings *s = &c->settings;
    const char *arrays[] = {s->noise, s->embeds, s->negative_embeds};
    const char *inputs[] = {model, s->noise, s->embeds, s->negative_embeds, c->prompt_file, c->story_file,
                            s->image, s->last_image, s->video};
    const char *output = c->save_embeds ? c->save_embeds : s->output, *lost = NULL;
    char *record = record_path(output), *state = state_path(output);
    const char *written[] = {output, record, state};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        for (int j = 0; inputs[i] && j < 3; j++)
            if (same_file(inputs[i], written[j])) lost = inputs[i];
    free(record), free(state);
    if (lost)
        die(STATUS_USAGE, "--%s %s: would overwrite the input file %s", c->save_embeds ? "save-embeds" : "output",
            output, lost);
    for (int i = 0; i < 3; i++) {
        if (!c->dump || !arrays[i]) continue;
        const char *slash = strrchr(arrays[i], '/');
        char *dumped = format_string("%s/%s", c->dump, slash ? slash + 1 : arrays[i]);
        bool inside = same_file(dumped, arrays[i]);
        free(dumped);
        if (inside) die(STATUS_USAGE, "--dump %s: could overwrite the input file %s", c->dump, arrays[i]);
    }
}

static int run(Command *c) {
    Settings *s = &c->settings;
    Text arguments = {0};
    const char *pause = getenv("SORA_STATE_SECONDS"); /* for tests */
    if (pause) s->state_seconds = atof(pause);
    check_combinations(c);
    check_output_name(s->output);
    const char *path = c->model ? c->model : bundled_model();
    if (c->info) return print_info(path);
    prompt_from_story(c);
    if (!s->prompt && s->story.count)
        die(STATUS_USAGE, "no prompt: the story's first line is at %g seconds, expected a prompt or a line at 0",
            s->story.lines[0].time);
    if (!s->prompt && (!s->embeds || c->tokenize || c->save_embeds))
        die(STATUS_USAGE, "no prompt, expected a sentence: sora \"a red star spins\"; see --help");
    protect_inputs(c, path);
    s->source = open_source(s->image ? IMAGE : VIDEO_FILE, s->image ? s->image : s->video, &c->source);
    s->last_source = open_source(LAST_IMAGE, s->last_image, &c->last_source);
    threads_set(c->threads);
    profile_begin(LOAD);
    Model model = model_load(path, c->precision);
    profile_end(LOAD);
    if (c->tokenize) {
        print_ids(&model, s->prompt);
    } else if (c->save_embeds) {
        embeds_write(&model, s->prompt, c->save_embeds);
    } else {
        settings_complete(s, &model);
        if (!c->seeded) s->seed = random_seed();
        if (!c->seeded && (!s->noise || s->sampler == RENOISE) && !s->quiet)
            fprintf(stderr, "seed %llu\n", (unsigned long long)s->seed);
        const char *sources[] = {s->image, s->last_image, s->video};
        bool again = true; /* they can be read */
        for (int i = 0; i < 3; i++) again &= !sources[i] || strcmp(sources[i], "-");
        if (!c->no_state && !c->dump && !c->check && again) append_arguments(&arguments, c, &model, path);
        s->arguments = text_bytes(&arguments);
        taps_open(c->dump, c->dump_only, c->check, c->tolerance < 0 ? 1e-4 : c->tolerance, s->feed);
        generate(&model, s);
    }
    free(arguments.data);
    model_free(&model);
    if (s->source) source_close(&c->source);
    if (s->last_source) source_close(&c->last_source);
    story_free(&s->story);
    free(c->opening.line);
    free(c->given.data), free(c->stored.data);
    if (c->profile) profile_print();
    return taps_report() ? STATUS_OK : STATUS_CHECK;
}

static int run_verify(const Command *c) {
    threads_set(c->threads);
    return verify(c->verify) ? STATUS_OK : STATUS_CHECK;
}

int main(int argc, char **argv) {
    standard_streams_keep();
    interrupts_catch();
    Command command = parse(argc, argv);
    if (command.settings.resume && !command.help && !command.version) command = parse_resumed(&command, argc, argv);
    const char *why = kernels_choose(command.isa);
    if (why) die(STATUS_USAGE, "--isa: %s", why);
    progress_enable(!command.settings.quiet);
    int status = STATUS_OK;
    if (command.help) print_help();
    else if (command.version) print_version(command.threads);
    else if (command.verify) status = run_verify(&command);
    else status = run(&command);
    if (fflush(stdout) || ferror(stdout)) die(STATUS_RESOURCE, "standard output: %s", strerror(errno));
    return status;
}
