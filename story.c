/* story.c - prompts with start times: --at "TIME TEXT", and --story, a file of such lines.
 *
 *   # A comment. Blank lines are skipped.
 *   0      a red ball bounces on the grass
 *   12.5   the ball stops
 *   1:05   a green star walks in from the left
 *
 * A time is seconds, minutes:seconds or hours:minutes:seconds. Each line's time must be later than the one before. */
#include "sora.h"

#include <stdlib.h>
#include <string.h>

static bool is_blank(uint8_t c) { return c == ' ' || c == '\t' || c == '\r'; }

static Bytes trim(Bytes text) {
    while (text.size && is_blank(text.data[0])) text.data++, text.size--;
    while (text.size && is_blank(text.data[text.size - 1])) text.size--;
    return text;
}

/* Parses a number below 10^6; with `fraction`, it may have decimals. Returns -1 for anything else. The number is the
 * one nearest to the text, which a sum of digits times 0.1, 0.01 ... is not. */
static double parse_part(Bytes text, bool fraction) {
    double value = 0, scale = 1; /* all digits as an integer; 10 to the number of those after the point */
    size_t digits = 0;
    bool decimals = false;
    for (size_t i = 0; i < text.size; i++) {
        uint8_t c = text.data[i];
        if (c == '.' && fraction && !decimals) {
            decimals = true;
            continue;
        }
        if (c < '0' || c > '9') return -1;
        value = 10 * value + (c - '0');
        if (decimals) scale *= 10;
        digits++;
    }
    return digits > 0 && value / scale < 1e6 ? value / scale : -1;
}

/* "12", "12.5", "1:05" or "1:02:03" in seconds; -1 for anything else. */
static double parse_time(Bytes text) {
    double time = 0;
    for (int parts = 1; parts <= 3; parts++) {
        const uint8_t *colon = memchr(text.data, ':', text.size);
        Bytes part = {text.data, colon ? (size_t)(colon - text.data) : text.size};
        double value = parse_part(part, !colon);
        if (value < 0 || (parts > 1 && value >= 60)) return -1;
        time = 60 * time + value;
        if (!colon) return time;
        text = (Bytes){colon + 1, text.size - part.size - 1};
    }
    return -1;
}

const char *story_add(Story *story, Bytes line) {
    line = trim(line);
    Bytes time = line, shown;
    time.size = 0;
    while (time.size < line.size && !is_blank(line.data[time.size])) time.size++;
    Bytes text = trim((Bytes){line.data + time.size, line.size - time.size});
    double from = parse_time(time);
    shown = (Bytes){line.data, line.size < 40 ? line.size : 40};
    if (from < 0)
        return reason("'%.*s' does not begin with a time, expected one such as 12, 12.5 or 1:05", (int)shown.size,
                      shown.data);
    if (!text.size) return reason("no prompt follows the time '%.*s'", (int)time.size, time.data);
    if (story->count && from <= story->lines[story->count - 1].time)
        return reason("time %g s is not after %g s, the time of the prompt before it", from,
                      story->lines[story->count - 1].time);
    char *copy = allocate(line.size + 1);
    for (size_t i = 0; i < line.size; i++) copy[i] = line.data[i] ? (char)line.data[i] : ' ';
    story->lines = reallocate(story->lines, sizeof *story->lines * (size_t)(story->count + 1));
    story->lines[story->count++] = (StoryLine){from, copy, copy + (text.data - line.data)};
    return NULL;
}

const char *story_parse(Story *story, Bytes text) {
    static const uint8_t mark[] = {0xef, 0xbb, 0xbf};
    if (text.size >= 3 && !memcmp(text.data, mark, 3)) text.data += 3, text.size -= 3;
    for (int number = 1; text.size; number++) {
        const uint8_t *newline = memchr(text.data, '\n', text.size);
        Bytes line = {text.data, newline ? (size_t)(newline - text.data) : text.size};
        size_t taken = line.size + (newline != NULL);
        text.data += taken, text.size -= taken;
        line = trim(line);
        if (!line.size || line.data[0] == '#') continue;
        const char *why = story_add(story, line);
        if (why) return reason("line %d: %s", number, why);
    }
    return NULL;
}

void story_free(Story *story) {
    for (int i = 0; i < story->count; i++) free(story->lines[i].line);
    free(story->lines);
    *story = (Story){0};
}
