/* record.c - OUTPUT.json beside the video: how it was made. And --verify: whether video, mark and record agree.
 *
 * The record says that the video was generated, by which program and model, and holds every setting that is needed to
 * make the same file again. It is a C2PA manifest definition and holds the AIGC label of GB 45438-2025, too.
 *
 * A prompt may be private. Unless --record-prompt is given, its SHA-256 is written instead, with which somebody who
 * knows the prompt can confirm it. The model is named by the hash that its weight file claims: export.py computed it
 * from the tensors, and computing it again would read all weights. Two settings are left out because they change no
 * bit: the number of threads, and in float32 the instruction set. */
#include "sora.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* KEY: text, or KEY_sha256: its hash */
static void write_text(Json *json, const char *key, const char *text, bool in_full) {
    if (in_full) {
        json_string(json, key, text);
        return;
    }
    char hex[65], *name = format_string("%s_sha256", key);
    sha256_of(text, strlen(text), hex);
    json_string(json, name, hex);
    free(name);
}

/* A distilled model's own timesteps, which the hash of its tensors does not cover. */
static void write_timesteps(Json *json, const Recipe *recipe) {
    char *steps = schedule_string(&recipe->schedule), *first = schedule_string(&recipe->first);
    json_string(json, "timesteps", steps);
    if (strcmp(steps, first)) json_string(json, "first_timesteps", first);
    free(steps), free(first);
}

/* Settings of models that generate in chunks. */
static void write_chunks(Json *json, const Settings *s) {
    json_int(json, "window", s->window);
    json_int(json, "sink", s->sink);
    json_string(json, "positions", s->positions);
    for (int i = 0; i < s->story.count; i++) {
        char *key = format_string("prompt%02d", i + 1), *time = format_string("%s_at", key);
        json_double(json, time, s->story.lines[i].time);
        write_text(json, key, s->story.lines[i].text, s->record_prompt);
        free(key), free(time);
    }
}

/* Settings of models with two experts. The hash of their tensors does not cover the timestep at which they change. */
static void write_experts(Json *json, const Model *model, const Settings *s) {
    json_double(json, "guidance_2", s->guidance[1]);
    json_double(json, "boundary_timestep", model->experts[0].from);
}

/* What the clip began from. */
static void write_source(Json *json, const Settings *s, const InputHashes *inputs) {
    json_string(json, s->image ? "image_sha256" : "video_sha256", inputs->source);
    if (s->last_source) json_string(json, "last_image_sha256", inputs->last_source);
    if (s->strength >= 0) json_double(json, "strength", s->strength);
    if (s->extend) json_int(json, "frames_kept", s->source_frames);
}

static void write_settings(Json *json, const Model *model, const Settings *s, const InputHashes *inputs) {
    json_open(json, "settings");
    json_int(json, "width", s->width);
    json_int(json, "height", s->height);
    json_int(json, "frames", s->frames);
    json_int(json, "fps_num", s->fps_num);
    json_int(json, "fps_den", s->fps_den);
    json_string(json, "sampler", sampler_name(s->sampler));
    json_int(json, "steps", s->steps);
    if (model->recipe.schedule.steps) write_timesteps(json, &model->recipe);
    if (model->recipe.chunk_frames) write_chunks(json, s);
    json_double(json, "guidance", s->guidance[0]);
    if (model->expert_count > 1) write_experts(json, model, s);
    if (s->easycache) json_double(json, "easycache", s->easycache);
    if (s->decoder == TINY) json_string(json, "decoder", "tiny");
    json_double(json, "shift", s->shift);
    if (*inputs->embeds) json_string(json, "embeds_sha256", inputs->embeds);
    if (*inputs->negative_embeds) json_string(json, "negative_embeds_sha256", inputs->negative_embeds);
    if (s->noise) json_string(json, "noise_sha256", inputs->noise);
    if (s->source) write_source(json, s, inputs);
    if (!s->noise || s->sampler == RENOISE) json_unsigned(json, "seed", s->seed);
    json_string(json, "precision", precision_name(model->precision));
    if (model->precision != F32) json_string(json, "isa", kernels->name);
    json_int(json, "chroma", s->chroma);
    VideoFormat format = {.width = s->width, .height = s->height};
    json_string(json, "matrix", y4m_is_bt709(&format) ? "BT.709" : "BT.601");
    if (s->feed) json_bool(json, "fed_by_check", true); /* the settings alone do not make these frames */
    json_bool(json, "label", s->label);
    json_bool(json, "mark", s->mark);
    json_close(json);
}

char *record_path(const char *output) {
    return format_string("%s.json", output);
}

/* The implicit label of GB 45438-2025. Label "1": the content was made by a machine. */
static void write_aigc(Json *json, const Settings *s) {
    json_open(json, "AIGC");
    json_string(json, "Label", "1");
    json_string(json, "ContentProducer", s->producer ? s->producer : "");
    json_string(json, "ProduceID", s->produce_id ? s->produce_id : "");
    json_string(json, "ReservedCode1", "");
    json_string(json, "ContentPropagator", "");
    json_string(json, "PropagateID", "");
    json_string(json, "ReservedCode2", "");
    json_close(json);
}

static void write_software(Json *json, const char *key) {
    json_open(json, key);
    json_string(json, "name", "sora.c");
    json_string(json, "version", SORA_VERSION);
    json_close(json);
}

/* The keys of a C2PA manifest definition, which c2patool signs into the encoded video. */
static void write_c2pa(Json *json) {
    json_open_array(json, "claim_generator_info");
    write_software(json, NULL);
    json_close_array(json);
    json_open_array(json, "assertions");
    json_open(json, NULL);
    json_string(json, "label", "c2pa.actions.v2");
    json_open(json, "data");
    json_open_array(json, "actions");
    json_open(json, NULL);
    json_string(json, "action", "c2pa.created");
    json_string(json, "digitalSourceType", "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia");
    write_software(json, "softwareAgent");
    json_close(json);
    json_close_array(json);
    json_close(json);
    json_close(json);
    json_close_array(json);
}

/* The part of the record that is known before the run. The outermost object is still open. */
static Json describe(const Model *model, const Settings *s, const InputHashes *inputs) {
    Json json = {0};
    json_open(&json, NULL);
    json_bool(&json, "generated", true);
    json_string(&json, "digital_source_type", "trainedAlgorithmicMedia"); /* IPTC's term */
    json_string(&json, "tool", "sora.c");
    json_string(&json, "version", SORA_VERSION);
    json_string(&json, "model", weights_string_or(model->file, "general.name", ""));
    json_string(&json, "model_tensors_sha256_claimed", weights_string_or(model->file, "sora.tensors_sha256", ""));
    if (s->prompt) write_text(&json, "prompt", s->prompt, s->record_prompt);
    if (s->negative) write_text(&json, "negative_prompt", s->negative, s->record_prompt);
    write_settings(&json, model, s, inputs);
    write_aigc(&json, s);
    write_c2pa(&json);
    return json;
}

uint64_t record_bits(const Model *model, const Settings *settings, const InputHashes *inputs) {
    Json json = describe(model, settings, inputs);
    char hex[65];
    sha256_of(json.text.data, json.text.size, hex);
    json_free(&json);
    hex[16] = 0;
    return strtoull(hex, NULL, 16);
}

void record_write(OutputFile *file, const Model *model, const Settings *settings, const InputHashes *inputs,
                  const char *y4m_sha256, int passes_left_out) {
    Json json = describe(model, settings, inputs);
    char hex[65];
    sha256_of(json.text.data, json.text.size, hex);
    json_string(&json, "record_sha256", hex); /* of the text before this key */
    json_string(&json, "y4m_sha256", y4m_sha256);
    if (settings->easycache) json_int(&json, "passes_left_out", passes_left_out);
    json_close(&json);
    output_write(file, json.text.data, json.text.size);
    output_commit(file);
    json_free(&json);
}

/* ---------------------------------------------------------------- --verify */

static bool equals(Bytes text, const char *string) {
    return text.data && text.size == strlen(string) && !memcmp(text.data, string, text.size);
}

/* Prints at most 80 bytes of a record's value, each control character as '?': anybody may have written the record. */
static void print_claim(FILE *out, const char *before, Bytes claim) {
    Text text = {0};
    text_append_utf8(&text, (Bytes){claim.data, claim.size < 80 ? claim.size : 80});
    text_append(&text, "", 0);
    fprintf(out, "%s", before);
    for (size_t i = 0; i < text.size; i++) {
        bool c1 = text.data[i] == 0xc2 && i + 1 < text.size && text.data[i + 1] < 0xa0;
        fputc(text.data[i] < 32 || text.data[i] == 127 || c1 ? '?' : text.data[i], out);
        i += c1;
    }
    free(text.data);
}

static bool print_agreement(FILE *out, const char *what, bool agrees) {
    fprintf(out, "record: %s %s\n", what, agrees ? "agrees" : "DIFFERS");
    return agrees;
}

/* Whether record_sha256 is the hash of the text before it. Copies it to `claimed`, or "" if there is none. */
static bool record_is_whole(Bytes record, char claimed[65]) {
    static const char key[] = ",\n  \"record_sha256\": \"";
    char hex[65];
    Bytes value = json_find(record, "record_sha256");
    *claimed = 0;
    if (value.size != 64 || (size_t)(value.data - record.data) < sizeof key - 1) return false;
    memcpy(claimed, value.data, 64), claimed[64] = 0;
    size_t before = (size_t)(value.data - record.data) - (sizeof key - 1);
    sha256_of(record.data, before, hex);
    return !memcmp(record.data + before, key, sizeof key - 1) && !strcmp(claimed, hex);
}

bool record_check(FILE *out, Bytes record, const char *y4m_sha256, const MarkFound *mark) {
    char claimed[65];
    Bytes tool = json_find(record, "tool");
    if (!equals(tool, "sora.c")) {
        fprintf(out, "record: not a record of sora.c\n");
        return false;
    }
    print_claim(out, "record: by sora.c ", json_find(record, "version"));
    print_claim(out, " with the model ", json_find(record, "model"));
    fputc('\n', out);
    bool fits = print_agreement(out, "its own SHA-256", record_is_whole(record, claimed));
    fits &= print_agreement(out, "the SHA-256 of the video", equals(json_find(record, "y4m_sha256"), y4m_sha256));
    if (mark->deviations < MARK_DEVIATIONS) return fits;
    claimed[16] = 0;
    uint64_t different = strtoull(claimed, NULL, 16) ^ mark->payload;
    int agree = 64;
    for (; different; different &= different - 1) agree--;
    fprintf(out, "record: %d of the mark's 64 bits agree, threshold %d\n", agree, MARK_AGREEING);
    return fits && agree >= MARK_AGREEING;
}

static int gather_picture(Source *picture, MarkSum *sum, char hex[65]) {
    const VideoFormat *format = &picture->format;
    float *frame = allocate(3 * sizeof *frame * (size_t)format->width * (size_t)format->height);
    SourceReader *reader = source_reader_open(picture, format->width, format->height);
    source_next(reader, frame);
    mark_gather(sum, format, frame);
    sha256_of(picture->bytes.data, picture->bytes.size, hex);
    source_reader_close(reader);
    source_close(picture);
    free(frame);
    return sum->frames;
}

/* Adds up the luma of the video's frames, and hashes its bytes. Returns the number of frames. */
static int gather(const char *path, MarkSum *sum, char hex[65]) {
    VideoFormat format;
    Y4mReader *reader;
    Sha256 sha;
    bool end = false;
    Source picture;
    FILE *stream = input_open(path);
    sha256_start(&sha);
    const char *why = stream ? y4m_open(stream, &sha, &reader, &format) : strerror(errno);
    if (why && strcmp(path, "-") && !source_open(path, &picture)) {
        if (stream) fclose(stream);
        return gather_picture(&picture, sum, hex);
    }
    if (why) die(STATUS_USAGE, "--verify %s: %s", path, why);
    float *frame = allocate(3 * sizeof *frame * (size_t)format.width * (size_t)format.height);
    while (!(why = y4m_next(reader, frame, &end)) && !end) mark_gather(sum, &format, frame);
    if (why) die(STATUS_USAGE, "--verify %s: %s", path, why);
    free(frame);
    y4m_close(reader);
    if (stream != stdin) fclose(stream);
    sha256_finish(&sha, hex);
    return sum->frames;
}

bool verify(const char *path) {
    Bytes record;
    char sha[65], *beside = record_path(path);
    MarkSum sum = {0};
    int frames = gather(path, &sum, sha);
    printf("video: %s, %d frames of %dx%d, SHA-256 %s\n", path, frames, sum.width, sum.height, sha);
    MarkFound mark = mark_find(&sum);
    free(sum.luma);
    bool marked = mark.deviations >= MARK_DEVIATIONS, fits = marked;
    printf("mark: %s, correlation peak at %.1f standard deviations, threshold %.1f", marked ? "found" : "none",
           mark.deviations, MARK_DEVIATIONS);
    if (marked) printf(", scale %.3f, bits %016" PRIx64, mark.scale, mark.payload);
    printf("\n");
    bool there = !access(beside, F_OK);
    const char *why = read_file(beside, 1 << 20, &record);
    if (why) {
        printf("record: %s: %s\n", beside, why);
        fits &= !there;
    } else {
        fits = record_check(stdout, record, sha, &mark);
        free((void *)record.data);
    }
    free(beside);
    return fits;
}
