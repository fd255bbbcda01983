/* record.c - OUTPUT.json beside the video: that it was generated, by what,
 * and all that makes the same file again.
 *
 * A prompt can be private, so it stands there only on request; otherwise its SHA-256 does, by which whoever
 * knows the prompt can confirm it. The model is named by the hash that its file claims to have: export.py took it of
 * the tensors, and to take it again would mean to read them all. The other hashes are taken here. Threads
 * are left out, and so is the instruction set in float32: they change nothing. */
#include "sora.h"

#include <stdlib.h>
#include <string.h>

/* "prompt": text, or "prompt_sha256": its hash. */
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

/* The model's own steps, since the hash of its tensors says nothing of them. */
static void write_list(Json *json, const Recipe *recipe) {
    char *steps = schedule_string(&recipe->schedule), *first = schedule_string(&recipe->first);
    json_string(json, "timesteps", steps);
    if (strcmp(steps, first)) json_string(json, "first_timesteps", first);
    free(steps), free(first);
}

/* What only models that generate in chunks have. */
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

static void write_settings(Json *json, const Model *model, const Settings *s, const char *noise_sha256) {
    json_open(json, "settings");
    json_int(json, "width", s->width);
    json_int(json, "height", s->height);
    json_int(json, "frames", s->frames);
    json_int(json, "fps_num", s->fps_num);
    json_int(json, "fps_den", s->fps_den);
    json_string(json, "sampler", sampler_name(s->sampler));
    json_int(json, "steps", s->steps);
    if (model->recipe.schedule.steps) write_list(json, &model->recipe);
    if (model->recipe.chunk_frames) write_chunks(json, s);
    json_double(json, "guidance", s->guidance);
    json_double(json, "shift", s->shift);
    if (s->noise) json_string(json, "noise_sha256", noise_sha256);
    if (!s->noise || s->sampler == RENOISE) json_unsigned(json, "seed", s->seed);
    json_string(json, "precision", precision_name(model->precision));
    if (model->precision != F32) json_string(json, "isa", kernels->name);
    json_int(json, "chroma", s->chroma);
    json_string(json, "matrix", y4m_is_bt709(&(VideoFormat){.width = s->width, .height = s->height}) ? "BT.709" : "BT.601");
    if (s->feed) json_bool(json, "fed_by_check", true); /* frames are the reference's, and no settings make them */
    json_close(json);
}

char *record_path(const Settings *s) {
    return format_string("%s.json", s->output);
}

void record_write(OutputFile *file, const Model *model, const Settings *s, const char *noise_sha256,
                  const char *y4m_sha256) {
    Json json = {0};
    json_open(&json, NULL);
    json_bool(&json, "generated", true);
    json_string(&json, "digital_source_type", "trainedAlgorithmicMedia"); /* IPTC's word for it */
    json_string(&json, "tool", "sora.c");
    json_string(&json, "version", SORA_VERSION);
    json_string(&json, "model", weights_string_or(model->file, "general.name", ""));
    json_string(&json, "model_tensors_sha256_claimed", weights_string_or(model->file, "sora.tensors_sha256", ""));
    write_text(&json, "prompt", s->prompt, s->record_prompt);
    write_text(&json, "negative_prompt", s->negative, s->record_prompt);
    write_settings(&json, model, s, noise_sha256);
    json_string(&json, "y4m_sha256", y4m_sha256);
    json_close(&json);
    output_write(file, json.text.data, json.text.size);
    output_commit(file);
    json_free(&json);
}
