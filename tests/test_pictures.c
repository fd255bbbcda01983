/* test_pictures.c - models that start from pictures, and models with two experts. Clips are compared with diffusers'
 * tensors; the experts must serve the timesteps that the file says; damaged files must be refused by name. */
#include "sora.h"
#include "tests/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char text_model[] = "tests/goldens/model/model.gguf",
                  experts_model[] = "tests/goldens/pictures/model.gguf",
                  held_model[] = "tests/goldens/pictures/held/model.gguf";

/* ---------------------------------------------------------------- clips */

typedef struct {
    Source first, last;
    Settings settings;
} Pictures;

/* The settings of the goldens: three steps, of which the last belongs to the second expert. */
static Pictures *open_pictures(void) {
    Pictures *p = allocate(sizeof *p);
    const char *why = source_open("tests/goldens/pictures/first.y4m", &p->first);
    if (!why) why = source_open("tests/goldens/pictures/last.y4m", &p->last);
    if (why) die(STATUS_USAGE, "%s", why);
    Settings *s = &p->settings;
    *s = settings_new();
    s->prompt = "a red fox", s->negative = "the lazy dog", s->output = "/dev/null", s->width = 32, s->height = 16;
    s->frames = 9, s->steps = 3, s->guidance[0] = 3, s->guidance[1] = 2, s->shift = 3, s->sampler = UNIPC, s->seed = 7;
    s->image = s->last_image = "", s->source = &p->first, s->last_source = &p->last, s->quiet = true, s->record = false;
    return p;
}

static void close_pictures(Pictures *p) {
    source_close(&p->first), source_close(&p->last);
    free(p);
}

/* Dies unless a run's tensors are diffusers' in `folder`. */
static void compare(Model *model, const char *folder) {
    Pictures *p = open_pictures();
    if (model->expert_count < 2) p->settings.guidance[1] = -1;
    settings_complete(&p->settings, model);
    taps_open(NULL, NULL, folder, 1e-5, false);
    generate(model, &p->settings);
    if (!taps_report()) exit(STATUS_CHECK);
    close_pictures(p);
    model_free(model);
}

static void compare_planes(void *unused) {
    (void)unused;
    Model model = model_load(experts_model, F32);
    compare(&model, "tests/goldens/pictures/planes");
}

static void compare_held(void *unused) {
    (void)unused;
    Model model = model_load(held_model, F32);
    compare(&model, "tests/goldens/pictures/held");
}

static void expect(int wanted, const char *text, void (*run)(void *), void *argument) {
    char said[4096];
    int status = run_apart(run, argument, said);
    CHECK(status == wanted && strstr(said, text), "status %d, expected %d and \"%s\": %s", status, wanted, text, said);
}

/* ---------------------------------------------------------------- experts */

static Bytes make(Model *model, double first, double second) {
    Pictures *p = open_pictures();
    Bytes video = {0};
    char *path = temporary_path("experts.y4m");
    p->settings.output = path, p->settings.guidance[0] = first;
    if (model->expert_count > 1) p->settings.guidance[1] = second;
    else p->settings.guidance[1] = -1;
    settings_complete(&p->settings, model);
    generate(model, &p->settings);
    CHECK(!read_file(path, (size_t)1 << 20, &video), "the video cannot be read back");
    unlink(path);
    free(path);
    close_pictures(p);
    return video;
}

static bool same(Bytes a, Bytes b) { return a.size == b.size && !memcmp(a.data, b.data, a.size); }

/* The clip of two experts must be that of the one that serves all timesteps. */
static void check_experts(void) {
    Model both = model_load(experts_model, F32), first = both, second = both;
    CHECK(both.expert_count == 2 && fabs(both.experts[0].from - 700) < 1e-9, "%d experts, the first from %g",
          both.expert_count, both.experts[0].from);
    CHECK(model_expert(&both, 1000) == 0 && model_expert(&both, 701) == 0 && model_expert(&both, 699) == 1 &&
              model_expert(&both, 0) == 1, "the experts serve other timesteps");
    both.experts[0].from = 500;
    CHECK(model_expert(&both, 500) == 0 && model_expert(&both, 499) == 1, "the boundary belongs to the second expert");
    first.expert_count = second.expert_count = 1;
    second.experts[0] = both.experts[1];
    double froms[] = {700, 0, 2000};
    Bytes clips[3], alone[2] = {make(&first, 3, 3), make(&second, 2, 2)};
    for (int i = 0; i < 3; i++) {
        both.experts[0].from = froms[i];
        clips[i] = make(&both, 3, 2);
    }
    CHECK(same(clips[1], alone[0]), "the first expert serves all, and its clip is another");
    CHECK(same(clips[2], alone[1]), "the second expert serves all, and its clip is another");
    CHECK(!same(clips[0], alone[0]) && !same(clips[0], alone[1]), "two experts make the clip of one");
    for (int i = 0; i < 3; i++) free((void *)clips[i].data);
    for (int i = 0; i < 2; i++) free((void *)alone[i].data);
    model_free(&both);
}

/* Without guidance in the second expert, its step has no second pass. */
static void dump_unguided(void *folder) {
    Model model = model_load(experts_model, F32);
    Pictures *p = open_pictures();
    p->settings.guidance[1] = 1;
    settings_complete(&p->settings, &model);
    taps_open(folder, "step*.velocity", NULL, 0, false);
    generate(&model, &p->settings);
    close_pictures(p);
    model_free(&model);
}

static void check_guidance(void) {
    char *folder = temporary_path("guidance");
    expect(STATUS_OK, "", dump_unguided, folder);
    for (int step = 0; step < 3; step++) {
        char *path = format_string("%s/step%03d.uncond.velocity.npy", folder, step);
        CHECK(!access(path, F_OK) == (step < 2), "step %d with guidance %d", step, step < 2 ? 3 : 1);
        free(path);
    }
    free(folder);
}

/* ---------------------------------------------------------------- settings that are refused */

typedef struct {
    const char *model, *message;
    Start start;
    bool image, last_image, extend;
    int frames;
} Refused;

static void complete(void *of) {
    const Refused *r = of;
    Model model = model_load(r->model, F32);
    Pictures *p = open_pictures();
    Settings *s = &p->settings;
    model.start = r->start;
    if (!r->image) s->source = NULL, s->image = NULL;
    if (!r->last_image) s->last_source = NULL, s->last_image = NULL;
    if (model.expert_count < 2) s->guidance[1] = -1;
    s->frames = r->frames, s->extend = r->extend;
    settings_complete(s, &model);
}

static void check_settings(void) {
    static const Refused refused[] = {
        {experts_model, "--image: not given, and this model (Wan) makes a clip from a picture", PICTURE, false, false,
         false, 9},
        {text_model, "--extend: needs a model that generates in chunks, or Wan 2.2's", TEXT, false, false, true, 8},
        {text_model, "--last-image: needs a model such as", TEXT, false, true, false, 9},
        {text_model, "--image: needs a model that generates in chunks, or Wan 2.2's", TEXT, true, false, false, 9},
        {text_model, "--frames 1: with --image that frame is given", TEXT_OR_PICTURE, true, true, false, 1},
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        expect(STATUS_USAGE, refused[i].message, complete, (void *)&refused[i]);
}

/* ---------------------------------------------------------------- damaged files */

/* A weight file in which the first `from` is overwritten, `after` bytes behind its end or in its place. */
typedef struct {
    const char *from, *to;
    int size, after; /* bytes of `to`; negative: in place of `from` */
} Edit;

typedef struct {
    const char *message;
    Edit edits[2];
} Damage;

static const double two = 2, below_zero = -0.5, not_a_number = NAN;
static const int16_t three = 3;
static const Damage damages[] = {
    {"tensor \"transformer_2.head.modulation\" is missing",
     {{"transformer_2.head.modulation", "transformer_2.head.modulatiox", 29, -1}}},
    {"tensor \"transformer_2.blocks.1.ffn.0.bias\" is missing",
     {{"transformer_2.blocks.1.ffn.0.bias", "transformer_3.blocks.1.ffn.0.bias", 33, -1}}},
    {"", {{0}}}, /* the file is whole */
    {"wan.model_type is 's2v', expected t2v, ti2v or i2v", {{"i2v", "s2v", 3, -1}}},
    {"the transformer maps 12 channels to 4, expected 4 to 4 in a model of type t2v", {{"i2v", "t2v", 3, -1}}},
    {"there are two transformers, expected the key scheduler.boundary",
     {{"scheduler.boundary", "scheduler.boundarx", 18, -1}}},
    {"scheduler.boundary is 2, expected 0 to 1", {{"scheduler.boundary", (const char *)&two, 8, 4}}},
    {"scheduler.boundary is -0.5, expected 0 to 1", {{"scheduler.boundary", (const char *)&below_zero, 8, 4}}},
    {"scheduler.boundary is ", {{"scheduler.boundary", (const char *)&not_a_number, 8, 4}}},
    {"vae.dim_mult has no shortcuts past level 0: 3 of 8, or 2 of 6 values",
     {{"vae.is_residual", "\1", 1, 4}, {"vae.dim_mult", (const char *)&three, 2, 16}}},
};

static uint8_t *find(Bytes bytes, const char *text) {
    size_t length = strlen(text);
    for (size_t i = 0; i + length <= bytes.size; i++)
        if (!memcmp(bytes.data + i, text, length)) return (uint8_t *)bytes.data + i;
    return NULL;
}

static void load_damaged(void *of) {
    const Damage *d = of;
    Model model = {0};
    Bytes bytes;
    if (read_file(experts_model, (size_t)1 << 24, &bytes)) abort();
    for (const Edit *e = d->edits; e < d->edits + 2 && e->from; e++) {
        uint8_t *at = find(bytes, e->from);
        if (!at) abort();
        memcpy(at + (e->after < 0 ? 0 : strlen(e->from) + (size_t)e->after), e->to, (size_t)e->size);
    }
    const char *why = weights_parse(bytes, "damaged", &model.file);
    if (why) die(STATUS_USAGE, "%s", why);
    model_bind(&model);
}

static void bind_long_name(void *unused) {
    char name[300];
    Model model = model_load(unused ? experts_model : text_model, F32);
    memset(name, 'x', sizeof name - 1), name[sizeof name - 1] = 0;
    weights_bind(model.file, 1, 1, "%s.weight", name);
}

static void check_damages(void) {
    for (size_t i = 0; i < sizeof damages / sizeof *damages; i++)
        expect(damages[i].edits->from ? STATUS_USAGE : STATUS_OK, damages[i].message, load_damaged,
               (void *)&damages[i]);
    expect(STATUS_USAGE, ": a name of 306 bytes, expected less than 256", bind_long_name, NULL);
}

void test_pictures(void) {
    expect(STATUS_OK, "check passed: 25 tensors", compare_planes, NULL);
    expect(STATUS_OK, "check passed: 24 tensors", compare_held, NULL);
    check_experts();
    check_guidance();
    check_settings();
    check_damages();
}
