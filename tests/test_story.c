/* test_story.c - story.c: the times and texts that it reads, and the lines that it refuses. */
#include "sora.h"
#include "tests/test.h"

#include <string.h>

static Bytes bytes_of(const char *text) { return (Bytes){(const uint8_t *)text, strlen(text)}; }

static void check_time(const char *line, double time, const char *text) {
    Story story = {0};
    const char *why = story_add(&story, bytes_of(line));
    CHECK(!why && story.count == 1, "'%s' is refused: %s", line, why);
    if (story.count == 1) {
        CHECK(story.lines[0].time == time, "'%s' is at %.17g", line, story.lines[0].time);
        CHECK(!strcmp(story.lines[0].text, text), "'%s' has the text '%s'", line, story.lines[0].text);
    }
    story_free(&story);
}

static void check_refused(const char *file, const char *expected) {
    Story story = {0};
    const char *why = story_parse(&story, bytes_of(file));
    CHECK(why && strstr(why, expected), "'%s' gives '%s', not '%s'", file, why ? why : "no reason", expected);
    story_free(&story);
}

void test_story(void) {
    check_time("12 a", 12, "a");
    check_time("  12.5\ta red  fox \r", 12.5, "a red  fox");
    check_time("1:05 x", 65, "x");
    check_time("0:0.25 x", 0.25, "x");
    check_time("1:02:03.5 x", 3723.5, "x");
    check_time("90:00 x", 5400, "x");
    check_time("8.8125 x", 8.8125, "x"); /* when a chunk begins: no later */
    check_time("15.8125 x", 15.8125, "x");
    check_time("0.3 x", 0.3, "x");
    check_refused("12", "line 1: no prompt follows the time '12'");
    check_refused("a red fox", "does not begin with a time");
    check_refused("-1 x", "does not begin with a time");
    check_refused("1e3 x", "does not begin with a time");
    check_refused(". x", "does not begin with a time");
    check_refused("1.5.2 x", "does not begin with a time");
    check_refused("1:60 x", "does not begin with a time");
    check_refused("1.5:30 x", "does not begin with a time");
    check_refused("1:2:3:4 x", "does not begin with a time");
    check_refused("nan x", "does not begin with a time");
    check_refused("99999999999999999999 x", "does not begin with a time");
    check_refused("3 a\n\n# c\n2.5 b\n", "line 4: time 2.5 s is not after 3 s");
    check_refused("3 a\n3 b\n", "line 2: time 3 s is not after 3 s");

    Story story = {0};
    const char *why = story_parse(&story, bytes_of("\xef\xbb\xbf# a story\r\n\r\n0 one\r\n  # aside\n"
                                                   "12.5 two # not a comment\n1:05  three"));
    CHECK(!why && story.count == 3, "a story of %d lines: %s", story.count, why ? why : "");
    if (story.count == 3) {
        CHECK(story.lines[1].time == 12.5 && !strcmp(story.lines[1].text, "two # not a comment"),
              "the second line of a story differs");
        CHECK(story.lines[2].time == 65 && !strcmp(story.lines[2].text, "three"), "the third line of a story differs");
    }
    why = story_add(&story, bytes_of("60 four"));
    CHECK(why != NULL, "a line with an earlier time is accepted");
    story_free(&story);
}
