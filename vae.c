/* vae.c - latents -> frames: Wan 2.1's causal 3D VAE, one latent frame at a time.
 *
 * The decoder is a list of layers that a frame passes in order:
 *
 *   z -> conv2 (1x1x1) -> conv1 -> residual, attention, residual -> levels -> head -> frame
 *   level: residual blocks, then, but for the last level, twice the frames (if this level doubles them) and twice
 *          the height and width
 *
 * Causal means that a convolution over time sees a frame and the two before it, never one after. So the layers run as
 * a stream: each convolution keeps its last two input frames, a frame is pushed through the list, and where a layer
 * makes two frames of one, the first goes on by itself to the end before the second does. Memory does not depend on
 * the clip's length. The clip's first frame has no companion: it passes UPSAMPLE_TIME as it is, whose convolution starts
 * with an empty past at the second (upstream's "Rep"). With two levels that double, in time:
 *
 *   latent frames   0       1                2
 *   first doubling  0     1   2            3   4
 *   second          0    1 2 3 4          5 6 7 8      the clip's frames
 *
 * Frames are stored (pixels, channels), channels innermost, which makes a convolution a product whose rows
 * are runs of channels at shifted pixels (product.c). Neither padding nor the doubled image is ever built: they are
 * ways to find a row.
 *
 * Follows AutoencoderKLWan of diffusers (without residual shortcuts) and wan/modules/vae.py of the original release,
 * after which the weights are named. Its RMS_norm is F.normalize over channels, times sqrt(channels) and gamma. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- weights: a list of layers */

enum { MAX_LEVELS = 8 };

static Conv bind_conv(const WeightFile *file, Precision precision, int O, int I, int kt, int k,
                      const char *name) {
    Conv conv = {.kt = kt, .kh = k, .kw = k, .in = I, .out = O};
    if (I > MAX_CHANNELS)
        weights_refuse(file, "vae.%s reads %d channels, more than %d", name, I, MAX_CHANNELS);
    conv.layer = linear_bind(file, precision, O, kt * k * k * I, BIAS, "vae.%s", name);
    return conv;
}

static const float *config_floats(const WeightFile *file, const char *key, int count) {
    WeightArray array;
    if (!weights_array(file, key, &array) || array.count != (size_t)count || !array_is_number(&array))
        weights_refuse(file, "%s is not an array of %d numbers", key, count);
    float *values = allocate(sizeof(float) * (size_t)count);
    for (int i = 0; i < count; i++) values[i] = (float)array_double(&array, (size_t)i);
    return values;
}

/* Widths of the levels, finest first. */
static int read_dims(const WeightFile *file, int dims[MAX_LEVELS]) {
    WeightArray mult;
    if (!weights_array(file, "vae.dim_mult", &mult) || mult.count < 1 || mult.count > MAX_LEVELS)
        weights_refuse(file, "vae.dim_mult is not an array of 1 to %d", MAX_LEVELS);
    int base = weights_size(file, "vae.base_dim", MAX_CHANNELS);
    base = weights_size_or(file, "vae.decoder_base_dim", MAX_CHANNELS, base);
    weights_sizes(file, "vae.dim_mult", 64, dims, (int)mult.count);
    for (size_t i = 0; i < mult.count; i++) dims[i] *= base;
    return (int)mult.count;
}

/* A new layer at the end of the list. */
static VaeLayer *add_layer(VaeLayers *list, VaeLayerKind kind) {
    list->layers = reallocate(list->layers, sizeof *list->layers * (size_t)(list->count + 1));
    VaeLayer *layer = &list->layers[list->count++];
    *layer = (VaeLayer){.kind = kind};
    return layer;
}

#define PATH(...) (snprintf(path, sizeof path, __VA_ARGS__), path)

static void bind_residual(const WeightFile *file, Vae *vae, VaeLayers *list, int I, int O, const char *name) {
    char path[64];
    VaeLayer *layer = add_layer(list, RESIDUAL);
    layer->norm1 = weights_floats(file, I, "vae.%s.residual.0.gamma", name);
    layer->conv1 = bind_conv(file, vae->precision, O, I, 3, 3, PATH("%s.residual.2", name));
    layer->norm2 = weights_floats(file, O, "vae.%s.residual.3.gamma", name);
    layer->conv2 = bind_conv(file, vae->precision, O, O, 3, 3, PATH("%s.residual.6", name));
    if (I != O) layer->shortcut = bind_conv(file, vae->precision, O, I, 1, 1, PATH("%s.shortcut", name));
}

static void bind_attention(const WeightFile *file, Vae *vae, VaeLayers *list, int C, const char *name) {
    char path[64];
    VaeLayer *layer = add_layer(list, ATTENTION);
    layer->norm1 = weights_floats(file, C, "vae.%s.norm.gamma", name);
    layer->conv1 = bind_conv(file, vae->precision, 3 * C, C, 1, 1, PATH("%s.to_qkv", name));
    layer->conv2 = bind_conv(file, vae->precision, C, C, 1, 1, PATH("%s.proj", name));
}

static void bind_convolution(const WeightFile *file, Vae *vae, VaeLayers *list, int O, int I, int size,
                             const char *name) {
    add_layer(list, CONVOLUTION)->conv1 = bind_conv(file, vae->precision, O, I, size, size, name);
}

/* The original release numbers residual blocks and upsamplings of all levels in one list. dims: finest first. */
static void bind_levels(const WeightFile *file, Vae *vae, VaeLayers *list, const int *dims, int levels) {
    WeightArray temporal;
    char path[64];
    int blocks = weights_size(file, "vae.num_res_blocks", 64) + 1, last = levels - 1, in = dims[last], index = 0;
    if (!weights_array(file, "vae.temperal_downsample", &temporal) || temporal.count != (size_t)last ||
        !array_is_number(&temporal))
        weights_refuse(file, "vae.temperal_downsample is not an array of %d numbers", last);
    for (int i = last; i >= 0; i--) {
        int out = dims[i];
        for (int j = 0; j < blocks; j++, in = out)
            bind_residual(file, vae, list, in, out, PATH("decoder.upsamples.%d", index++));
        if (i == 0) break;
        if (array_double(&temporal, (size_t)(i - 1)) != 0) {
            Conv conv = bind_conv(file, vae->precision, 2 * out, out, 3, 1,
                                  PATH("decoder.upsamples.%d.time_conv", index));
            add_layer(list, UPSAMPLE_TIME)->conv1 = conv;
            vae->temporal_stride *= 2;
        }
        Conv conv = bind_conv(file, vae->precision, in = out / 2, out, 1, 3,
                              PATH("decoder.upsamples.%d.resample.1", index++));
        add_layer(list, UPSAMPLE_SPACE)->conv1 = conv;
        vae->spatial_stride *= 2;
    }
}

static void bind_decoder(const WeightFile *file, Vae *vae) {
    int dims[MAX_LEVELS], levels = read_dims(file, dims), top = dims[levels - 1], z = vae->z_dim;
    VaeLayers *list = &vae->decoder;
    bind_convolution(file, vae, list, z, z, 1, "conv2");
    bind_convolution(file, vae, list, top, z, 3, "decoder.conv1");
    bind_residual(file, vae, list, top, top, "decoder.middle.0");
    bind_attention(file, vae, list, top, "decoder.middle.1");
    bind_residual(file, vae, list, top, top, "decoder.middle.2");
    bind_levels(file, vae, list, dims, levels);
    bind_convolution(file, vae, list, 3 * vae->patch_size * vae->patch_size, dims[0], 3, "decoder.head.2");
    list->layers[list->count - 1].norm1 = weights_floats(file, dims[0], "vae.decoder.head.0.gamma");
}

Vae vae_load(const WeightFile *file, Precision precision) {
    Vae vae = {.z_dim = weights_size(file, "vae.z_dim", MAX_CHANNELS),
               .patch_size = weights_size_or(file, "vae.patch_size", 16, 1),
               .temporal_stride = 1, .precision = precision == F32 ? F32 : BF16};
    vae.spatial_stride = vae.patch_size;
    vae.latents_mean = config_floats(file, "vae.latents_mean", vae.z_dim);
    vae.latents_std = config_floats(file, "vae.latents_std", vae.z_dim);
    bind_decoder(file, &vae);
    return vae;
}

void vae_free(Vae *vae) {
    free(vae->decoder.layers);
    free((void *)vae->latents_mean);
    free((void *)vae->latents_std);
}

/* ---------------------------------------------------------------- the stream */

/* What frames of one size share. */
typedef struct {
    int height, width;
    int channels, wide_channels; /* the most */
    char *h;                     /* what a convolution reads: a row operand for each pixel */
    float *wide;                 /* (pixels, wide_channels): queries, keys and values; two frames side by side */
} Grid;

/* What a convolution saw in the two frames before, if there were any. */
typedef struct {
    char *frames[2]; /* row operands, older first */
    int seen;        /* of them */
} Past;

/* What moves at a layer. */
typedef struct {
    int grid;      /* the number of that which it reads */
    Past past[2];  /* of conv1 and conv2 */
    bool started;  /* the clip's first frame has passed */
} Moving;

struct VaeStream {
    const Vae *vae;
    const VaeLayers *list;
    Arena arena;
    Grid grids[MAX_LEVELS];
    Moving *moving;  /* [list->count] */
    float *x, *t;    /* (pixels, channels): the frame, and a residual's middle */
    char *zeros;     /* a pixel outside the image */
    float *frame;    /* the decoded frame [3,Y,X] */
    FrameSink *sink;
    void *to;
};

/* ---------------------------------------------------------------- convolutions */

/* Where the rows of a convolution lie: up to three frames of pixels, doubled on the way if asked. */
typedef struct {
    const Conv *conv;
    const char *frames[3]; /* oldest first */
    int skip;              /* frames at the start that have not been */
    const char *zeros;
    size_t pixel;      /* bytes of a row operand */
    int height, width; /* of the output */
    int doubled;       /* 1: the input is half as high and wide */
} View;

/* Taps are ordered (t, y, x). */
static void locate_pixel(const void *of, int row, const void **where, int stride) {
    const View *view = of;
    const Conv *conv = view->conv;
    int top = row / view->width - conv->kh / 2, left = row % view->width - conv->kw / 2;
    for (int t = view->skip; t < conv->kt; t++)
        for (int y = top; y < top + conv->kh; y++) {
            int line = (y >> view->doubled) * (view->width >> view->doubled);
            bool inside = y >= 0 && y < view->height;
            for (int x = left; x < left + conv->kw; x++, where += stride) {
                size_t pixel = (size_t)(line + (x >> view->doubled)) * view->pixel;
                *where = inside && x >= 0 && x < view->width ? view->frames[t] + pixel : view->zeros;
            }
        }
}

static void run(const View *view, float *out, int mode) {
    const Conv *conv = view->conv;
    int area = conv->kh * conv->kw, skip = view->skip * area;
    Rows rows = {view->height * view->width, conv->kt * area - skip, conv->in, skip, locate_pixel, view};
    product(out, rows, &conv->layer, mode);
}

/* Reads the frame in the grid's h and, where the kernel is deep, its past; then that frame is the past, and h the
 * memory of the oldest. */
static void convolve(const VaeStream *s, Grid *grid, const Conv *conv, Past *past, float *out, int mode) {
    View view = {.conv = conv, .frames = {grid->h}, .zeros = s->zeros,
                 .pixel = row_bytes(s->vae->precision, conv->in), .height = grid->height, .width = grid->width};
    if (conv->kt == 1) {
        run(&view, out, mode);
        return;
    }
    view.frames[0] = past->frames[0], view.frames[1] = past->frames[1], view.frames[2] = grid->h;
    view.skip = 2 - past->seen;
    run(&view, out, mode);
    past->seen = smaller(past->seen + 1, 2);
    grid->h = past->frames[0];
    past->frames[0] = past->frames[1];
    past->frames[1] = (char *)view.frames[2];
}

/* ---------------------------------------------------------------- layers */

static int pixels_of(const Grid *grid) { return grid->height * grid->width; }

/* The grid's h from x (pixels, n). */
static void narrow(const VaeStream *s, Grid *grid, const float *x, int n) {
    narrow_rows(s->vae->precision, grid->h, x, (size_t)n, pixels_of(grid), n);
}

static void norm_silu(const VaeStream *s, Grid *grid, const float *x, int n, const float *gamma) {
    l2_norm_silu(s->vae->precision, grid->h, x, pixels_of(grid), n, gamma);
}

static void convolution(VaeStream *s, Grid *grid, const VaeLayer *layer, Moving *moving) {
    if (layer->norm1) norm_silu(s, grid, s->x, layer->conv1.in, layer->norm1);
    else narrow(s, grid, s->x, layer->conv1.in);
    convolve(s, grid, &layer->conv1, &moving->past[0], s->x, REPLACE);
}

static void residual(VaeStream *s, Grid *grid, const VaeLayer *layer, Moving *moving) {
    norm_silu(s, grid, s->x, layer->conv1.in, layer->norm1);
    convolve(s, grid, &layer->conv1, &moving->past[0], s->t, REPLACE);
    if (layer->shortcut.out) {
        narrow(s, grid, s->x, layer->shortcut.in);
        convolve(s, grid, &layer->shortcut, NULL, s->x, REPLACE);
    }
    norm_silu(s, grid, s->t, layer->conv2.in, layer->norm2);
    convolve(s, grid, &layer->conv2, &moving->past[1], s->x, ACCUMULATE);
}

/* One head over the pixels of one frame. */
static void attend(VaeStream *s, Grid *grid, const VaeLayer *layer) {
    int C = layer->conv2.in, pixels = pixels_of(grid);
    float *qkv = grid->wide;
    l2_norm(s->t, s->x, pixels, C, layer->norm1);
    narrow(s, grid, s->t, C);
    convolve(s, grid, &layer->conv1, NULL, qkv, REPLACE);
    attention(&(Attention){.precision = s->vae->precision, .q = qkv, .k = qkv + C, .v = qkv + 2 * C,
                           .out = s->t, .queries = pixels, .keys = pixels, .heads = 1, .d = C,
                           .q_stride = 3 * (size_t)C, .kv_stride = 3 * (size_t)C, .out_stride = C,
                           .scale = 1.0f / sqrtf((float)C)});
    narrow(s, grid, s->t, C);
    convolve(s, grid, &layer->conv2, NULL, s->x, ACCUMULATE);
}

/* x becomes one of two frames that lie side by side in each pixel of wide. */
static void take_half(VaeStream *s, const Grid *grid, int C, int half) {
    PARALLEL_FOR (int i = 0; i < pixels_of(grid); i++)
        memcpy(s->x + (size_t)i * C, grid->wide + ((size_t)2 * i + half) * C, sizeof(float) * (size_t)C);
}

static void double_space(VaeStream *s, Grid *grid, const VaeLayer *layer) {
    narrow(s, grid, s->x, layer->conv1.in);
    View view = {.conv = &layer->conv1, .frames = {grid->h}, .zeros = s->zeros,
                 .pixel = row_bytes(s->vae->precision, layer->conv1.in), .height = 2 * grid->height,
                 .width = 2 * grid->width, .doubled = 1};
    run(&view, s->x, REPLACE);
}

/* x as the list leaves it -> pixels: channel (c*p + b)*p + a of a pixel is colour c, row a, column b of its patch,
 * as in upstream's unpatchify. */
static void emit(VaeStream *s, const Grid *grid) {
    int p = s->vae->patch_size, H = grid->height, W = grid->width;
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < H * p; y++)
            for (int x = 0; x < W * p; x++) {
                int channel = (c * p + x % p) * p + y % p;
                float value = s->x[((size_t)(y / p) * W + x / p) * (3 * p * p) + channel];
                float *pixel = s->frame + ((size_t)c * H * p + y) * W * p + x;
                *pixel = value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value; /* NaN stays NaN */
            }
    s->sink(s->to, s->frame);
}

/* The frame in x passes the layers from `index` on. */
static void push(VaeStream *s, int index) {
    for (; index < s->list->count; index++) {
        const VaeLayer *layer = &s->list->layers[index];
        Moving *moving = &s->moving[index];
        Grid *grid = &s->grids[moving->grid];
        switch (layer->kind) {
        case CONVOLUTION: convolution(s, grid, layer, moving); break;
        case RESIDUAL: residual(s, grid, layer, moving); break;
        case ATTENTION: attend(s, grid, layer); break;
        case UPSAMPLE_SPACE: double_space(s, grid, layer); break;
        case UPSAMPLE_TIME:
            if (!moving->started) {
                moving->started = true;
                break;
            }
            narrow(s, grid, s->x, layer->conv1.in);
            convolve(s, grid, &layer->conv1, &moving->past[0], grid->wide, REPLACE);
            take_half(s, grid, layer->conv1.in, 0);
            push(s, index + 1);
            take_half(s, grid, layer->conv1.in, 1);
        }
    }
    emit(s, &s->grids[s->moving[s->list->count - 1].grid]);
}

void vae_decode(VaeStream *s, const float *latents) {
    const Vae *vae = s->vae;
    int z = vae->z_dim;
    size_t pixels = (size_t)pixels_of(&s->grids[0]);
    for (int c = 0; c < z; c++)
        for (size_t i = 0; i < pixels; i++)
            s->x[i * z + c] = latents[c * pixels + i] * vae->latents_std[c] + vae->latents_mean[c];
    push(s, 0);
}

/* ---------------------------------------------------------------- memory and work */

/* Which grid each layer reads, and how many channels are the most there. Returns the last grid. */
static Grid *size_grids(VaeStream *s, int H, int W) {
    Grid *grid = s->grids;
    *grid = (Grid){.height = H, .width = W};
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        int in = layer->conv1.in, out = layer->conv1.out;
        s->moving[i].grid = (int)(grid - s->grids);
        grid->channels = (int)larger(grid->channels, in);
        if (layer->kind == ATTENTION || layer->kind == UPSAMPLE_TIME) {
            grid->wide_channels = (int)larger(grid->wide_channels, out);
            continue;
        }
        if (layer->kind == UPSAMPLE_SPACE) {
            grid++;
            *grid = (Grid){.height = 2 * grid[-1].height, .width = 2 * grid[-1].width};
        }
        grid->channels = (int)larger(grid->channels, out);
    }
    return grid;
}

static char *take_operands(const VaeStream *s, Arena *arena, const Grid *grid) {
    return arena_take(arena, (size_t)pixels_of(grid) * row_bytes(s->vae->precision, grid->channels));
}

/* All frames of a grid have one size, so that a convolution's input and its oldest past can trade places. */
static void take_past(VaeStream *s, Arena *arena, const Grid *grid, const Conv *conv, Past *past) {
    if (conv->kt > 1)
        for (int i = 0; i < 2; i++) past->frames[i] = take_operands(s, arena, grid);
}

/* Only one layer works at a time, and hands on nothing but x: all grids share one x and one t. */
static void lay_out(VaeStream *s, Arena *arena, int H, int W) {
    const Grid *last = size_grids(s, H, W);
    size_t floats = 0, channels = 0;
    for (Grid *grid = s->grids; grid <= last; grid++) {
        grid->h = take_operands(s, arena, grid);
        grid->wide = arena_floats(arena, (size_t)pixels_of(grid) * grid->wide_channels);
        floats = larger(floats, (size_t)pixels_of(grid) * grid->channels);
        channels = larger(channels, grid->channels);
    }
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        Moving *moving = &s->moving[i];
        take_past(s, arena, &s->grids[moving->grid], &layer->conv1, &moving->past[0]);
        take_past(s, arena, &s->grids[moving->grid], &layer->conv2, &moving->past[1]);
    }
    s->x = arena_floats(arena, floats);
    s->t = arena_floats(arena, floats);
    s->zeros = arena_take(arena, row_bytes(s->vae->precision, (int)channels));
    s->frame = arena_floats(arena, (size_t)pixels_of(last) * 3 * s->vae->patch_size * s->vae->patch_size);
}

static VaeStream *stream_new(const Vae *vae) {
    VaeStream *s = allocate(sizeof *s);
    *s = (VaeStream){.vae = vae, .list = &vae->decoder};
    s->moving = allocate(sizeof *s->moving * (size_t)s->list->count);
    return s;
}

void vae_stream_close(VaeStream *s) {
    if (!s) return;
    arena_close(&s->arena);
    free(s->moving);
    free(s);
}

size_t vae_decoder_memory(const Vae *vae, int H, int W) {
    Arena count = {0};
    VaeStream *s = stream_new(vae);
    lay_out(s, &count, H, W);
    vae_stream_close(s);
    return count.used;
}

size_t vae_decoder_scratch(const Vae *vae, int H, int W) {
    size_t most = 0;
    int pixels = H * W;
    for (int i = 0; i < vae->decoder.count; i++) {
        const VaeLayer *layer = &vae->decoder.layers[i];
        const Conv *convs[] = {&layer->conv1, &layer->conv2, &layer->shortcut};
        if (layer->kind == UPSAMPLE_SPACE) pixels *= 4;
        if (layer->kind == ATTENTION) most = larger(most, attention_memory(vae->precision, pixels, 1, layer->conv2.in));
        for (int j = 0; j < 3; j++)
            if (convs[j]->out)
                most = larger(most, product_memory(&convs[j]->layer, pixels, convs[j]->kt * convs[j]->kh * convs[j]->kw));
    }
    return most;
}

VaeStream *vae_decoder_open(const Vae *vae, int H, int W, FrameSink *sink, void *to) {
    VaeStream *s = stream_new(vae);
    s->sink = sink, s->to = to;
    s->arena = arena_open(vae_decoder_memory(vae, H, W));
    lay_out(s, &s->arena, H, W);
    return s;
}

/* Over `frames` frames of `area` pixels, of which a convolution over time sees fewer at the start. */
static double conv_flops(const Conv *conv, double frames, double area) {
    double missing = conv->kt == 3 ? (frames > 1 ? 3 : 2) : 0;
    double seen = conv->kt && frames > 0 ? (frames * conv->kt - missing) / conv->kt : 0;
    return 2.0 * seen * area * conv->layer.weight.rows * conv->layer.weight.cols;
}

double vae_decoder_flops(const Vae *vae, int T, int H, int W) {
    double frames = T, area = (double)H * W, sum = 0;
    for (int i = 0; i < vae->decoder.count; i++) {
        const VaeLayer *layer = &vae->decoder.layers[i];
        if (layer->kind == UPSAMPLE_SPACE) area *= 4;
        if (layer->kind == ATTENTION) sum += 4.0 * frames * area * area * layer->conv2.in;
        sum += conv_flops(&layer->conv1, layer->kind == UPSAMPLE_TIME ? frames - 1 : frames, area) +
               conv_flops(&layer->conv2, frames, area) + conv_flops(&layer->shortcut, frames, area);
        if (layer->kind == UPSAMPLE_TIME) frames = 2 * frames - 1;
    }
    return sum;
}
