/* video.c - latents -> frames -> the video file and its record. The decoder gives one frame after another; each is
 * converted, marked if that is asked for, written and flushed at once. */
#include "pipeline.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

VideoFormat video_format(const Settings *s) {
    return (VideoFormat){s->width, s->height, s->fps_num, s->fps_den, s->chroma};
}

static void write_bytes(Video *video, const void *data, size_t bytes) {
    output_write(&video->file, data, bytes);
    sha256_add(&video->sha, data, bytes);
}

void show_progress(const Video *video, const char *stage, int done, int total) {
    const Run *run = video->run;
    if (!run->recipe->chunk_frames) {
        progress(stage, done, total);
        return;
    }
    double second = (double)run->settings->fps_num / run->settings->fps_den, taken = seconds() - video->started;
    progress_detail("%s %d/%d, %.1f s of video, speed %.2fx", stage, done, total, video->index / second,
                    taken > 0 ? (video->index - video->resumed) / second / taken : 0);
    progress("chunk", video->chunk, run->chunks);
}

static void write_header(Video *video) {
    char header[80];
    const VideoFormat *f = &video->format;
    bool ppm = video->run->settings->ppm;
    write_bytes(video, header, ppm ? ppm_header(f->width, f->height, header) : y4m_header(f, header));
}

/* planes = the pixels of a PPM, which has the same size: chroma is 444 */
static void planes_to_pixels(Video *video) {
    const VideoFormat *format = &video->format;
    float *frame = allocate(sizeof(float) * y4m_frame_bytes(format));
    y4m_to_floats(format, false, video->planes, frame);
    ppm_convert(format->width, format->height, frame, video->planes);
    free(frame);
}

static void write_planes(Video *video) {
    if (video->run->settings->ppm) planes_to_pixels(video);
    else write_bytes(video, "FRAME\n", 6);
    write_bytes(video, video->planes, y4m_frame_bytes(&video->format));
    output_flush(&video->file);
}

/* Counts the signs of a failed run whose numbers are all finite: frames of one colour, values clamped to -1 or 1. */
static void inspect_frame(Video *video, const float *frame) {
    size_t pixels = (size_t)video->format.width * (size_t)video->format.height, same = 0;
    for (int c = 0; c < 3; c++, frame += pixels)
        for (size_t i = 0; i < pixels; i++) {
            same += frame[i] == frame[0];
            video->clamped += frame[i] == -1 || frame[i] == 1;
        }
    video->values += 3 * pixels;
    video->constant += same == 3 * pixels;
}

/* Why a run most likely failed, from its settings. */
static const char *likely_cause(const Run *run) {
    const Settings *s = run->settings;
    double guidance = fmax(s->guidance[0], s->guidance[1]);
    if (guidance > 15) return reason("--guidance %g is more than most models bear", guidance);
    if (!run->recipe->schedule.steps && (s->steps <= 8 || guidance <= 1))
        return reason("%d steps with guidance %g suit distilled weights only, and those need their own schedule in the "
                      "file (export.py --recipe)", s->steps, guidance);
    if (run->model->precision != F32)
        return reason("numbers beyond the range of %s; try --precision f32", precision_name(run->model->precision));
    return "a schedule or guidance that does not suit the weights, or damaged weights";
}

static void warn_of_failure(const Video *video) {
    double clamped = (double)video->clamped / (double)video->values;
    if (video->constant)
        warn("%d of %d frames have one colour only; likely cause: %s", video->constant, video->index,
             likely_cause(video->run));
    else if (clamped >= 0.9)
        warn("%.0f %% of the clip's values are at the ends of their range; likely cause: %s", 100 * clamped,
             likely_cause(video->run));
}

/* Converts, writes and flushes one frame. With --extend the source's frames are written as they are, in place of the
 * decoder's, without label and mark. */
static void write_frame(Video *video, float *frame) {
    const Settings *s = video->run->settings;
    bool kept = s->extend && video->index < s->source_frames;
    profile_begin(OUTPUT);
    if (kept) source_next(video->source, frame);
    tap_frame(frame, SHAPE(3, s->frames, s->height, s->width), video->index, "video");
    require_finite(video->run->model, frame, video_frame_values(s),
                   reason("frame %d of %d", video->index + 1, s->frames));
    if (!kept) inspect_frame(video, frame);
    y4m_convert(&video->format, frame, video->planes);
    if (s->mark && !kept) mark_add(&video->mark, &video->format, video->planes);
    if (s->label && !kept && label_is_due(&video->format, video->index)) label_draw(&video->format, video->planes);
    write_planes(video);
    profile_end(OUTPUT);
    if (s->drift) drift_frame(video->drift, frame);
    preview_frame(&video->preview, &video->format, frame, video->index); /* may sleep: timed in no stage */
    video->index++;
    show_progress(video, "frame", video->index, s->frames);
}

/* The decoder's FrameSink. */
static void take_decoded(void *to, float *frame) {
    profile_end(VAE_DECODE);
    write_frame(to, frame);
    profile_resume(VAE_DECODE);
}

/* The source's frames that come before all that are decoded. */
static void write_ahead(const Run *run, Video *video) {
    float *frame = allocate(sizeof(float) * video_frame_values(run->settings));
    while (video->index < run->ahead) write_frame(video, frame);
    free(frame);
}

/* Opens both files before the work begins, so that a file that cannot be written is reported at once. There is no
 * record and no state beside standard output, a device or a FIFO (files without a temporary name). A new run does not
 * replace another run's state. */
Video video_open(const Run *run) {
    const Settings *s = run->settings;
    Video video = {.run = run, .format = video_format(s)};
    video.state = state_path(s->output);
    if (!s->resume && !access(video.state, F_OK))
        die(STATUS_USAGE, "%s: an unfinished run of this output; resume it with --resume, or delete the file",
            video.state);
    video.file = s->resume ? output_continue(s->output) : output_open(s->output);
    if (video.file.temporary) {
        char *stale = format_string("%s.part", video.state);
        unlink(stale); /* left by a process that was killed while it wrote a state; the lock is ours */
        free(stale);
        char *record = record_path(s->output);
        if (s->record) video.record = output_open(record);
        else if (!access(record, F_OK))
            warn("%s is the record of an earlier video; --no-record leaves it unchanged", record);
        free(record);
    }
    if (!video.file.temporary || !s->arguments.size) {
        free(video.state);
        video.state = NULL;
    }
    if (s->preview) video.preview = preview_open();
    if (s->drift) video.drift = drift_open(&video.format);
    if (s->extend) video.source = source_reader_open(s->source, s->width, s->height);
    video.planes = allocate(y4m_frame_bytes(&video.format));
    sha256_start(&video.sha);
    return video;
}

void video_begin(const Run *run, Video *video) {
    if (!video->index) write_header(video);
    if (run->settings->mark) video->mark = mark_make(record_bits(run->model, run->settings, &run->inputs));
    show_progress(video, "frame", video->index, run->settings->frames);
    write_ahead(run, video);
    video->decoder = vae_open(&run->model->vae, run->settings->decoder, run->H, run->W, take_decoded, video);
}

static void draw_guess(void *to, float *frame) {
    Video *video = to;
    preview_guess(&video->preview, &video->format, frame);
}

void video_guess(const Run *run, Video *video, const float *x, const float *v, float sigma) {
    if (!video->preview.enabled || !run->model->vae.halves[TINY].count) return;
    float *guess = allocate(sizeof(float) * run->frame_size);
    size_t from = is_held(run, 0) ? run->frame_size : 0; /* a held frame is no guess */
    for (size_t i = 0; i < run->frame_size; i++) guess[i] = x[from + i] - sigma * v[from + i];
    VaeStream *decoder = vae_open(&run->model->vae, TINY, run->H, run->W, draw_guess, video);
    vae_push(decoder, guess);
    vae_close(decoder);
    free(guess);
}

/* Commits the video before the record: if the record fails, the video is there; if the video fails, an older video
 * keeps its own record. */
void video_close(Video *video) {
    const Run *run = video->run;
    char sha[65];
    sha256_finish(&video->sha, sha);
    weights_require_unchanged(run->model->file);
    if (video->kept) output_sync(&video->file);
    output_commit(&video->file);
    if (video->record.stream)
        record_write(&video->record, run->model, run->settings, &run->inputs, sha, video->left_out);
    if (video->kept) {
        unlink(video->state);
        outputs_forget(video->state);
        outputs_advise("%s", "");
    }
    drift_close(video->drift);
    source_reader_close(video->source);
    warn_of_failure(video);
    free(video->planes);
    free(video->state);
}

/* ---------------------------------------------------------------- the state of a video */

/* Finds the frames that are written already, and cuts off what follows them. They are in the .part file, or, if the
 * process was killed between renaming the video and removing the state, in the finished video, from which they are
 * copied. */
static void restore_video(Video *video, size_t bytes, const char *sha256, StateFile *f) {
    const char *places[] = {video->file.temporary, video->file.path};
    for (int i = 0; i < 2 && video->sha.length != bytes; i++) {
        Bytes there;
        char found[65] = "";
        if (map_file(places[i], &there)) continue;
        if (there.size >= bytes) sha256_of(there.data, bytes, found);
        bool equal = !strcmp(found, sha256);
        if (equal) sha256_add(&video->sha, there.data, bytes);
        if (equal && i == 1) output_write_at(&video->file, 0, there.data, bytes);
        unmap_file(there);
    }
    if (video->sha.length == bytes) output_cut(&video->file, bytes);
    else state_refuse(f, "%s does not begin with the %d frames that were written", places[0], video->index);
}

/* --extend: the source goes on behind the frames of it that are written. */
static void skip_kept(const Video *video) {
    const Settings *s = video->run->settings;
    float *frame = allocate(sizeof(float) * video_frame_values(s));
    source_skip(video->source, smaller(video->index, s->source_frames), frame);
    free(frame);
}

void video_state(Video *video, StateFile *f) {
    Sha256 written = video->sha;
    char hex[65];
    sha256_finish(&written, hex);
    if (state_is_read(f) && video->source) skip_kept(video);
    size_t bytes = (size_t)state_number(f, "video.bytes", (int64_t)video->sha.length, 0, INT64_MAX);
    state_item(f, "video.sha256", hex, 64);
    video->constant = (int)state_number(f, "video.constant", video->constant, 0, video->index);
    video->values = (size_t)state_number(f, "video.values", (int64_t)video->values, 0, INT64_MAX);
    video->clamped = (size_t)state_number(f, "video.clamped", (int64_t)video->clamped, 0, (int64_t)video->values);
    if (state_is_read(f) && !state_fault(f) && video->file.stream) restore_video(video, bytes, hex, f);
}

