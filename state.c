/* state.c - the state of a run on disk (OUTPUT.state), from which --resume continues.
 *
 *   sora state 1
 *   arguments 61
 *   --model=...\0--prompt=...\0...   61 bytes and a newline: an item with a name, a size and data
 *   step 12                         or a number with a name
 *   latents 294912
 *   ...
 *   sha256 5f0c...                  of everything before it
 *
 * Reading and writing share one list of items: functions such as kv_cache_state() call state_item() and state_number()
 * in order, which write to a file that was created and read from a file that was opened. pipeline.c's run_state() calls
 * all of them. Reading requires the same names and sizes in the same order, and numbers within their range. The first
 * mismatch ends it: later calls do nothing, and state_close() returns the reason.
 *
 * A state is written to OUTPUT.state.part, flushed with fsync() and renamed, so that OUTPUT.state is always complete. A
 * failure to write is only reported: the run can finish without a state. */
#include "sora.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static const char magic[] = "sora state 1\n";
enum { TRAILER = 7 + 64 + 1, LINE = 96 }; /* "sha256 ", 64 digits, newline */

struct StateFile {
    bool is_read;
    /* Writing. */
    FILE *stream; /* NULL if it could not be opened */
    char *path, *temporary;
    Sha256 sha;
    int error; /* the first errno */
    /* Reading. */
    Bytes mapping, rest; /* the mapped file, if it is one; the items not yet read */
    const char *why;     /* NULL, or `fault` */
    char fault[256];
};

char *state_path(const char *output) { return format_string("%s.state", output); }

bool state_is_read(const StateFile *f) { return f->is_read; }

void state_refuse(StateFile *f, const char *format, ...) {
    va_list arguments;
    if (f->why) return;
    va_start(arguments, format);
    vsnprintf(f->fault, sizeof f->fault, format, arguments);
    va_end(arguments);
    f->why = f->fault;
    f->rest.size = 0;
}

const char *state_fault(const StateFile *f) { return f->why; }

/* ---------------------------------------------------------------- items */

static void put(StateFile *f, const void *data, size_t bytes) {
    if (!bytes || !f->stream || f->error) return; /* of no bytes the address may be NULL, which fwrite() refuses */
    errno = 0;
    if (fwrite(data, 1, bytes, f->stream) != bytes) f->error = errno ? errno : EIO;
    sha256_add(&f->sha, data, bytes);
}

static Bytes take(StateFile *f, size_t bytes) {
    Bytes taken = {f->rest.data, bytes};
    f->rest = tail(f->rest, bytes);
    return taken;
}

/* Reads the line "name ...", without its newline. */
static bool take_line(StateFile *f, const char *name, char line[LINE]) {
    size_t length = strlen(name), size = 0;
    while (size < f->rest.size && size < LINE - 1 && f->rest.data[size] != '\n') size++;
    bool fits = size < f->rest.size && f->rest.data[size] == '\n' && size > length &&
                !memcmp(f->rest.data, name, length) && f->rest.data[length] == ' ';
    if (!fits) state_refuse(f, "expected the item \"%s\"", name);
    if (!fits) return false;
    memcpy(line, take(f, size + 1).data, size);
    line[size] = 0;
    return true;
}

int64_t state_number(StateFile *f, const char *name, int64_t value, int64_t least, int64_t most) {
    char line[LINE];
    if (!f->is_read) {
        put(f, line, (size_t)snprintf(line, sizeof line, "%s %" PRId64 "\n", name, value));
        return value;
    }
    if (f->why || !take_line(f, name, line)) return value;
    char *end, *digits = line + strlen(name) + 1;
    errno = 0;
    int64_t found = strtoll(digits, &end, 10);
    if (!*digits || *end || errno || found < least || found > most)
        state_refuse(f, "\"%s\" is %s, expected %" PRId64 " to %" PRId64, name, digits, least, most);
    return f->why ? value : found;
}

Bytes state_bytes(StateFile *f, const char *name, Bytes mine) {
    size_t size = (size_t)state_number(f, name, (int64_t)mine.size, 0, INT64_MAX);
    if (!f->is_read) {
        put(f, mine.data, mine.size);
        put(f, "\n", 1);
        return mine;
    }
    if (!f->why && (size >= f->rest.size || f->rest.data[size] != '\n'))
        state_refuse(f, "\"%s\" of %zu bytes is longer than the file", name, size);
    if (f->why) return (Bytes){(const uint8_t *)"", 0};
    Bytes found = take(f, size);
    take(f, 1);
    return found;
}

void state_item(StateFile *f, const char *name, void *data, size_t bytes) {
    Bytes found = state_bytes(f, name, (Bytes){data, bytes});
    if (!f->is_read || f->why) return;
    if (found.size == bytes) memcpy(data, found.data, bytes);
    else state_refuse(f, "\"%s\" has %zu bytes, expected %zu", name, found.size, bytes);
}

bool state_same(StateFile *f, const char *name, const void *mine, size_t bytes) {
    Bytes found = state_bytes(f, name, (Bytes){mine, bytes});
    return found.size == bytes && !memcmp(found.data, mine, bytes);
}

/* ---------------------------------------------------------------- reading */

const char *state_parse(Bytes bytes, StateFile **out) {
    char line[TRAILER + 1] = "sha256 ";
    size_t first = sizeof magic - 1;
    *out = NULL;
    if (bytes.size < first || memcmp(bytes.data, magic, first))
        return "not a state of this version of sora";
    if (bytes.size < first + TRAILER) return "truncated";
    size_t body = bytes.size - TRAILER;
    sha256_of(bytes.data, body, line + 7);
    line[TRAILER - 1] = '\n';
    if (memcmp(line, bytes.data + body, TRAILER)) return "truncated or damaged: its SHA-256 does not match";
    *out = allocate(sizeof **out);
    **out = (StateFile){.is_read = true, .rest = {bytes.data + first, body - first}};
    return NULL;
}

const char *state_open(const char *path, StateFile **out) {
    Bytes bytes;
    *out = NULL;
    const char *why = map_file(path, &bytes);
    if (why) return why;
    why = state_parse(bytes, out);
    if (why) unmap_file(bytes);
    else (*out)->mapping = bytes;
    return why;
}

const char *state_close(StateFile *f) {
    if (!f) return NULL;
    if (!f->why && f->rest.size) state_refuse(f, "%zu bytes follow the last item", f->rest.size);
    const char *why = f->why ? reason("%s", f->why) : NULL;
    unmap_file(f->mapping);
    free(f);
    return why;
}

const char *state_arguments(const char *path, Text *out) {
    StateFile *f;
    const char *why = state_open(path, &f);
    if (why) return why;
    Bytes found = state_bytes(f, "arguments", (Bytes){NULL, 0});
    text_append(out, found.data, found.size);
    if (!f->why && found.size && found.data[found.size - 1])
        state_refuse(f, "\"arguments\" does not end with a 0 byte");
    why = f->why ? reason("%s", f->why) : NULL;
    f->rest.size = 0;
    state_close(f);
    return why;
}

/* ---------------------------------------------------------------- writing */

StateFile *state_create(const char *path) {
    StateFile *f = allocate(sizeof *f);
    f->path = format_string("%s", path);
    f->temporary = format_string("%s.part", path);
    sha256_start(&f->sha);
    unlink(f->temporary); /* left by a killed process */
    int file = open(f->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600); /* private: it holds the prompt */
    f->stream = file < 0 ? NULL : fdopen(file, "wb");
    if (f->stream) {
        outputs_note(f->temporary, false);
    } else {
        f->error = errno;
        if (file >= 0) close(file), unlink(f->temporary);
    }
    put(f, magic, sizeof magic - 1);
    return f;
}

/* The rename is on disk once the folder is. The new state is there even if this fails. */
static void sync_folder(const char *path) {
    char *folder = format_string("%s", path), *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    int file = open(slash ? folder : ".", O_RDONLY | O_CLOEXEC);
    if (file >= 0) fsync(file), close(file);
    free(folder);
}

const char *state_commit(StateFile *f) {
    char hex[65], line[TRAILER + 1];
    sha256_finish(&f->sha, hex);
    put(f, line, (size_t)snprintf(line, sizeof line, "sha256 %s\n", hex));
    if (f->stream && !f->error && (fflush(f->stream) || fsync(fileno(f->stream)))) f->error = errno;
    if (f->stream && fclose(f->stream) && !f->error) f->error = errno;
    if (!f->error && rename(f->temporary, f->path)) f->error = errno;
    if (!f->error) sync_folder(f->path);
    else if (f->stream) unlink(f->temporary);
    if (f->stream) outputs_forget(f->temporary);
    const char *why = f->error ? reason("%s", strerror(f->error)) : NULL;
    free(f->path), free(f->temporary);
    free(f);
    return why;
}

/* ---------------------------------------------------------------- does this build compute the same bits? */

/* Pseudo-random numbers in [-1,1). */
static void fill(float *values, int count, uint32_t seed) {
    for (int i = 0; i < count; i++) {
        seed = seed * 1664525 + 1013904223;
        values[i] = (float)(int32_t)(seed >> 8) * 0x1p-23f - 1;
    }
}

void arithmetic_digest(Precision precision, char hex[65]) {
    enum { L = 24, D = 96, COUNT = L * D };
    static float x[COUNT], w[D * D], gain[D], y[5 * COUNT];
    fill(x, COUNT, 1), fill(w, D * D, 2), fill(gain, D, 3);
    Linear layer = {.weight = {w, TYPE_F32, D, D}, .bias = gain, .precision = precision};
    linear(y, x, L, &layer);
    attention(&(Attention){.precision = precision, .q = x, .k = x, .v = y, .out = y + COUNT, .queries = L, .keys = L,
                           .heads = 2, .d = D / 2, .q_stride = D, .kv_stride = D, .out_stride = D, .scale = 0.5f});
    rms_norm(y + 2 * COUNT, x, L, D, gain, 1e-6f);
    layer_norm(rows_of(F32, y + 3 * COUNT, NULL, L, D), x, 1e-6f, gain, gain, L);
    memcpy(y + 4 * COUNT, x, sizeof x);
    silu(y + 4 * COUNT, y + 4 * COUNT, COUNT / 2);
    gelu(rows_of(F32, y + 4 * COUNT + COUNT / 2, NULL, 1, COUNT / 2), x, NULL);
    sha256_of(y, sizeof y, hex);
}
