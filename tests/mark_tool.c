/* mark_tool.c - marks any Y4M, and asks how often chance finds a mark; for tests/reference_trust.py.
 *
 *   mark_tool mark BITS IN OUT     adds the mark to IN's luma; prints the PSNR and the mean change
 *   mark_tool chance KEYS IN       looks for the marks of so many other keys (an even number): prints the deviations,
 *                                  one a line */
#include "mark.c"

#include <errno.h>

static float *frame;
static VideoFormat format;

static Y4mReader *open_clip(const char *path) {
    Y4mReader *reader;
    FILE *stream = input_open(path);
    const char *why = stream ? y4m_open(stream, NULL, &reader, &format) : strerror(errno);
    if (why) die(STATUS_USAGE, "%s: %s", path, why);
    frame = allocate(3 * sizeof *frame * (size_t)format.width * (size_t)format.height);
    return reader;
}

static bool next(Y4mReader *reader) {
    bool end;
    const char *why = y4m_next(reader, frame, &end);
    if (why) die(STATUS_USAGE, "%s", why);
    return !end;
}

static void mark_clip(uint64_t bits, const char *in, const char *out) {
    Y4mReader *reader = open_clip(in);
    Mark mark = mark_make(bits);
    OutputFile file = output_open(out);
    char header[80];
    double squares = 0, sum = 0, count = 0;
    size_t bytes = (format.chroma = 420, y4m_frame_bytes(&format));
    uint8_t *before = allocate(bytes), *after = allocate(bytes);
    output_write(&file, header, y4m_header(&format, header));
    while (next(reader)) {
        y4m_convert(&format, frame, before);
        memcpy(after, before, bytes);
        mark_add(&mark, &format, after);
        for (int i = 0; i < format.width * format.height; i++) {
            int change = after[i] - before[i];
            squares += change * change, sum += abs(change), count++;
        }
        output_write(&file, "FRAME\n", 6);
        output_write(&file, after, bytes);
    }
    output_commit(&file);
    printf("%.2f %.3f\n", 10 * log10(255.0 * 255 * count / squares), sum / count);
}

/* Each scale is looked at once, for all keys. */
static const Complex *look_once(const MarkSum *sum, int step) {
    static Complex *looks[2 * (COARSE + 1) * FINE];
    Complex **place = &looks[step + (COARSE + 1) * FINE];
    if (!*place) {
        *place = allocate(sizeof **place);
        **place = whitened_spectrum(sum, scale_of(step));
    }
    return *place;
}

static Peak higher(Peak a, Peak b) { return b.deviations > a.deviations ? b : a; }

/* mark_find() for two keys at once: the real part of the correlation is the first's, the imaginary part, turned round,
 * the second's. */
static void search_pair(const MarkSum *sum, const Complex *pair, int first, int last, int stride, Peak best[2]) {
    for (int step = first; step <= last; step += stride) {
        Complex c = correlate(look_once(sum, step), pair);
        for (int i = 0; i < AREA; i++) c.im[i / SIDE][i % SIDE] *= -1;
        best[0] = higher(best[0], find_peak((const float(*)[SIDE])c.re, step));
        best[1] = higher(best[1], find_peak((const float(*)[SIDE])c.im, step));
    }
}

static void chance(int keys, const char *in) {
    MarkSum sum = {0};
    for (Y4mReader *reader = open_clip(in); next(reader);) mark_gather(&sum, &format, frame);
    for (int k = 1; k <= keys; k += 2) {
        MarkTiles *one = tiles_make(KEY + (uint64_t)k), *other = tiles_make(KEY + (uint64_t)k + 1);
        Complex pair = complex_of(one->presence);
        memcpy(pair.im, other->presence, sizeof pair.im);
        transform(&pair, 1);
        Peak best[2] = {{.step = 0}, {.step = 0}};
        search_pair(&sum, &pair, -COARSE * FINE, COARSE * FINE, FINE, best);
        for (int i = 0; i < 2; i++) {
            Peak fine[2] = {best[i], best[i]};
            search_pair(&sum, &pair, best[i].step - FINE + 1, best[i].step + FINE - 1, 1, fine);
            printf("%.3f\n", fine[i].deviations);
        }
        free(one), free(other);
    }
}

int main(int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], "mark")) mark_clip(strtoull(argv[2], NULL, 16), argv[3], argv[4]);
    else if (argc == 4 && !strcmp(argv[1], "chance")) chance(atoi(argv[2]), argv[3]);
    else die(STATUS_USAGE, "usage: mark_tool mark BITS IN OUT | mark_tool chance KEYS IN");
    return STATUS_OK;
}
