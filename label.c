/* label.c - frames -> frames with a visible label that says that they were generated: "AI生成 · AI GENERATED" (--label).
 *
 * GB 45438-2025 asks for "AI" and "生成" in the opening frames, for at least two seconds, in letters of at least 5 % of
 * the frame's shorter side. The EU's code of practice asks for "AI GENERATED". The text is white on a black box.
 *
 *   +---------------------------+        +---------------+
 *   |                           |        |               |    one line if it fits, else two
 *   | AI生成 · AI GENERATED       |        | AI生成         |
 *   +---------------------------+        | AI GENERATED  |
 *                                        +---------------+
 *
 * The label is drawn into the 8-bit planes. --dump, --check and --preview see the frame without it. */
#include "sora.h"

#include <string.h>

enum { HEIGHT = 12, CAPITAL = 9, GAP = 3 }; /* in dots: height of a line, of its capitals; margin around a line */

static const char *const made[HEIGHT] = {
    "..................#............#.#...",
    "..............#...#............#..#..",
    "..##...####...#...#.......###########",
    ".####...##....#########...#....#.....",
    "##..##..##...#....#.......#....#..#..",
    "##..##..##...#....#.......####.#..#..",
    "##..##..##..#.....#.......#..#.#..#..",
    "######..##....#########...#..#.#.#...",
    "##..##..##........#.......#..#..##...",
    "##..##..##........#.......#.#..##..#.",
    "##..##.####.......#......#....#..#.#.",
    "............############.#..##....##.",
};

static const char *const generated[HEIGHT] = {
    "...............................................................................",
    "...............................................................................",
    "..##...####.......####..######.##..##.######.#####....##...######.######.####..",
    ".####...##.......##..##.##.....###.##.##.....##..##..####....##...##.....##.##.",
    "##..##..##.......##.....##.....###.##.##.....##..##.##..##...##...##.....##..##",
    "##..##..##.......##.....##.....######.##.....##..##.##..##...##...##.....##..##",
    "##..##..##.......##.###.#####..##.###.#####..#####..##..##...##...#####..##..##",
    "######..##.......##..##.##.....##.###.##.....####...######...##...##.....##..##",
    "##..##..##.......##..##.##.....##..##.##.....##.##..##..##...##...##.....##..##",
    "##..##..##.......##..##.##.....##..##.##.....##..##.##..##...##...##.....##.##.",
    "##..##.####.......####..######.##..##.######.##..##.##..##...##...######.####..",
    "...............................................................................",
};

typedef struct {
    uint8_t *samples;
    int width, height, dx, dy; /* in samples; pixels that a sample covers */
} Plane;

typedef struct {
    int left, top, width, height; /* in pixels */
} Box;

/* Sets all samples that cover a part of the box. */
static void fill(const Plane *plane, Box box, uint8_t value) {
    int right = smaller(ceiling(box.left + box.width, plane->dx), plane->width);
    int bottom = smaller(ceiling(box.top + box.height, plane->dy), plane->height);
    for (int y = box.top / plane->dy; y < bottom; y++)
        for (int x = box.left / plane->dx; x < right; x++) plane->samples[(size_t)y * plane->width + x] = value;
}

static void draw(const Plane *luma, const char *const line[HEIGHT], int left, int top, int dot) {
    for (int row = 0; row < HEIGHT; row++)
        for (int column = 0; line[row][column]; column++)
            if (line[row][column] == '#') fill(luma, (Box){left + column * dot, top + row * dot, dot, dot}, 235);
}

bool label_is_due(const VideoFormat *format, int index) {
    int64_t at = (int64_t)index * format->rate_den, second = format->rate_num;
    return at % (60 * second) < 2 * second;
}

void label_draw(const VideoFormat *format, uint8_t *planes) {
    int W = format->width, H = format->height, chroma = format->chroma == 420 ? 2 : 1;
    Plane luma = {planes, W, H, 1, 1};
    Plane blue = {planes + (size_t)W * (size_t)H, ceiling(W, chroma), ceiling(H, chroma), chroma, chroma}, red = blue;
    red.samples += (size_t)blue.width * (size_t)blue.height;

    int dot = ceiling(smaller(W, H), 20 * CAPITAL); /* side of a dot in pixels: capitals have 5 % of the frame */
    int first = (int)strlen(made[0]), second = (int)strlen(generated[0]), between = 4 * GAP;
    bool one_line = (first + between + second + 4 * GAP) * dot <= W;
    int columns = one_line ? first + between + second : second, rows = one_line ? HEIGHT : 2 * HEIGHT + GAP;
    Box box = {0, 0, (columns + 2 * GAP) * dot, (rows + 2 * GAP) * dot};
    box.left = W > box.width + 2 * GAP * dot ? GAP * dot : 0;
    box.top = H > box.height + 2 * GAP * dot ? H - box.height - GAP * dot : 0;

    fill(&luma, box, 16);
    fill(&blue, box, 128);
    fill(&red, box, 128);
    int left = box.left + GAP * dot, top = box.top + GAP * dot;
    draw(&luma, made, left, top, dot);
    if (one_line) {
        Box point = {left + (first + between / 2 - 1) * dot, top + (2 + CAPITAL / 2) * dot, 2 * dot, 2 * dot};
        fill(&luma, point, 235);
        draw(&luma, generated, left + (first + between) * dot, top, dot);
    } else {
        draw(&luma, generated, left, top + (HEIGHT + GAP) * dot, dot);
    }
}
