/* vae.c - latents -> video frames: the decoder of Wan 2.1's causal 3D VAE, one latent frame at a time.
 *
 * Takes normalised latent frames (z_dim,H,W), gives video frames [3,Y,X] in [-1,1]. The first latent frame gives one
 * video frame, every later one temporal_stride (4) of them; Y and X are spatial_stride (8) times H and W. The decoder
 * is a list of layers that a frame passes in order:
 *
 *   latents * std + mean -> conv2 (1x1x1) -> conv1 (3x3x3) -> residual, attention, residual -> levels -> head
 *   level: residual blocks; then UPSAMPLE_TIME, if this level doubles the frames, and UPSAMPLE_SPACE; not in the last
 *   head:  conv(silu(norm(x))), clamped to [-1,1]
 *
 * Time is causal: a 3x3x3 convolution reads a frame and the two before it, never a later one. Frames before the clip's
 * first are zeros (left out of the sum, which gives the same bits). So the decoder streams. Each convolution keeps its
 * two previous input frames (upstream's feat_cache), and memory does not depend on the clip's length:
 *
 *   t-2  t-1   t                    after frame t:  t-1   t
 *   [ cache ] [x] -> conv -> frame t                [ cache ]
 *
 * UPSAMPLE_TIME makes two frames of one. Each goes through the remaining layers by itself, the first one first. The
 * clip's first frame stays one frame and does not enter that layer's cache (upstream's "Rep"). With two such layers:
 *
 *   latent frames             0       1                2
 *   after the first layer     0     1   2            3   4
 *   after the second: video   0    1 2 3 4          5 6 7 8
 *
 * A frame is stored as (pixels, channels). A convolution is a product whose rows are runs of channels at shifted
 * pixels (product.c). Padding and the upsampled image are not stored: locate_pixel() gives their addresses.
 *
 * Follows AutoencoderKLWan of diffusers (is_residual false) and wan/modules/vae.py of the original release, whose
 * weight names the file keeps. Its RMS_norm is x / |x| * sqrt(channels) * gamma, where |x| is over channels. */
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
        weights_refuse(file, "vae.%s has %d input channels, expected at most %d", name, I, MAX_CHANNELS);
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

/* Channels of the levels, finest first. Returns the number of levels. */
static int read_dims(const WeightFile *file, int dims[MAX_LEVELS]) {
    WeightArray mult;
    if (!weights_array(file, "vae.dim_mult", &mult) || mult.count < 1 || mult.count > MAX_LEVELS)
        weights_refuse(file, "vae.dim_mult is not an array of 1 to %d numbers", MAX_LEVELS);
    int base = weights_size(file, "vae.base_dim", MAX_CHANNELS);
    base = weights_size_or(file, "vae.decoder_base_dim", MAX_CHANNELS, base);
    weights_sizes(file, "vae.dim_mult", 64, dims, (int)mult.count);
    for (size_t i = 0; i < mult.count; i++) dims[i] *= base;
    return (int)mult.count;
}

/* Appends a layer. */
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

/* Residual blocks and upsampling layers of all levels share one numbering, decoder.upsamples.N. dims: finest first. */
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

/* Buffers of one resolution. There is a grid for the latents' and one after each UPSAMPLE_SPACE. */
typedef struct {
    int height, width;
    int channels, wide_channels; /* the most of any layer at this resolution */
    char *operands;              /* (pixels): a convolution's input, a row operand (panel.c) for each pixel */
    float *wide;                 /* (pixels, wide_channels): q, k and v; or the two frames of UPSAMPLE_TIME */
} Grid;

/* The two previous input frames of a convolution over time. */
typedef struct {
    char *frames[2]; /* row operands, the older first */
    int seen;        /* how many of the two there have been, 0 to 2 */
} FeatCache;

/* What a layer keeps from frame to frame. */
typedef struct {
    int grid;           /* index of the grid that it reads */
    FeatCache cache[2]; /* of conv1 and conv2 */
    bool started;       /* UPSAMPLE_TIME: the clip's first frame has passed */
} LayerState;

struct VaeStream {
    const Vae *vae;
    const VaeLayers *list;
    Arena arena;
    Grid grids[MAX_LEVELS];
    LayerState *states; /* [list->count] */
    float *x, *t;       /* (pixels, channels): the frame; the hidden frame of a residual block */
    char *zeros;        /* a row operand of zeros: a pixel of the padding */
    float *frame;       /* the decoded frame [3,Y,X] */
    FrameSink *sink;
    void *to;
};

/* ---------------------------------------------------------------- convolutions */

/* The input of a convolution, from which locate_pixel() finds the rows of its product. */
typedef struct {
    const Conv *conv;
    const char *frames[3]; /* [kt] row operands (pixels), the oldest frame first */
    int skip;              /* frames before the clip's first: their taps are left out */
    const char *zeros;
    size_t pixel;          /* bytes of a pixel's row operand */
    int height, width;     /* of the output */
    int upsampled;         /* 1: the input has half the height and width, and pixel (y,x) is its (y/2,x/2) */
} ConvInput;

/* Addresses of the pixels under each tap, for output pixel `row`. Taps are ordered (t, y, x). */
static void locate_pixel(const void *of, int row, const void **where) {
    const ConvInput *input = of;
    const Conv *conv = input->conv;
    int top = row / input->width - conv->kh / 2, left = row % input->width - conv->kw / 2;
    for (int t = input->skip; t < conv->kt; t++)
        for (int y = top; y < top + conv->kh; y++) {
            int line = (y >> input->upsampled) * (input->width >> input->upsampled);
            bool inside = y >= 0 && y < input->height;
            for (int x = left; x < left + conv->kw; x++, where++) {
                size_t pixel = (size_t)(line + (x >> input->upsampled)) * input->pixel;
                *where = inside && x >= 0 && x < input->width ? input->frames[t] + pixel : input->zeros;
            }
        }
}

static void run_conv(const ConvInput *input, float *out, int mode) {
    const Conv *conv = input->conv;
    int area = conv->kh * conv->kw, skip = input->skip * area;
    Rows rows = {input->height * input->width, conv->kt * area - skip, conv->in, skip, locate_pixel, input};
    product(out, rows, &conv->layer, mode);
}

/* out (pixels, O) = or += conv of the frame in grid->operands and, if kt is 3, of the two frames in its cache. Then the
 * buffers rotate: operands -> cache, the newer cached frame becomes the older, the older one becomes grid->operands. */
static void convolve(const VaeStream *s, Grid *grid, const Conv *conv, FeatCache *cache, float *out, int mode) {
    ConvInput input = {.conv = conv, .frames = {grid->operands}, .zeros = s->zeros,
                       .pixel = row_bytes(s->vae->precision, conv->in), .height = grid->height, .width = grid->width};
    if (conv->kt == 1) {
        run_conv(&input, out, mode);
        return;
    }
    input.frames[0] = cache->frames[0], input.frames[1] = cache->frames[1], input.frames[2] = grid->operands;
    input.skip = 2 - cache->seen;
    run_conv(&input, out, mode);
    cache->seen = smaller(cache->seen + 1, 2);
    grid->operands = cache->frames[0];
    cache->frames[0] = cache->frames[1];
    cache->frames[1] = (char *)input.frames[2];
}

/* ---------------------------------------------------------------- layers */

static int pixels_of(const Grid *grid) { return grid->height * grid->width; }

/* grid->operands from x (pixels, n), narrowed to the VAE's precision */
static void to_operands(const VaeStream *s, Grid *grid, const float *x, int n) {
    narrow_rows(s->vae->precision, grid->operands, x, (size_t)n, pixels_of(grid), n);
}

/* grid->operands from silu(norm(x)) */
static void norm_silu(const VaeStream *s, Grid *grid, const float *x, int n, const float *gamma) {
    l2_norm_silu(s->vae->precision, grid->operands, x, pixels_of(grid), n, gamma);
}

static void convolution(VaeStream *s, Grid *grid, const VaeLayer *layer, LayerState *state) {
    if (layer->norm1) norm_silu(s, grid, s->x, layer->conv1.in, layer->norm1);
    else to_operands(s, grid, s->x, layer->conv1.in);
    convolve(s, grid, &layer->conv1, &state->cache[0], s->x, REPLACE);
}

static void residual(VaeStream *s, Grid *grid, const VaeLayer *layer, LayerState *state) {
    norm_silu(s, grid, s->x, layer->conv1.in, layer->norm1);
    convolve(s, grid, &layer->conv1, &state->cache[0], s->t, REPLACE);
    if (layer->shortcut.out) {
        to_operands(s, grid, s->x, layer->shortcut.in);
        convolve(s, grid, &layer->shortcut, NULL, s->x, REPLACE);
    }
    norm_silu(s, grid, s->t, layer->conv2.in, layer->norm2);
    convolve(s, grid, &layer->conv2, &state->cache[1], s->x, ACCUMULATE);
}

/* Self attention with one head over the pixels of one frame. conv1 is to_qkv, conv2 is proj. */
static void attend(VaeStream *s, Grid *grid, const VaeLayer *layer) {
    int C = layer->conv2.in, pixels = pixels_of(grid);
    float *qkv = grid->wide;
    l2_norm(s->t, s->x, pixels, C, layer->norm1);
    to_operands(s, grid, s->t, C);
    convolve(s, grid, &layer->conv1, NULL, qkv, REPLACE);
    attention(&(Attention){.precision = s->vae->precision, .q = qkv, .k = qkv + C, .v = qkv + 2 * C,
                           .out = s->t, .queries = pixels, .keys = pixels, .heads = 1, .d = C,
                           .q_stride = 3 * (size_t)C, .kv_stride = 3 * (size_t)C, .out_stride = C,
                           .scale = 1.0f / sqrtf((float)C)});
    to_operands(s, grid, s->t, C);
    convolve(s, grid, &layer->conv2, NULL, s->x, ACCUMULATE);
}

/* x (pixels, C) = frame `half` of the two in wide (pixels, 2, C) */
static void copy_half(VaeStream *s, const Grid *grid, int C, int half) {
    PARALLEL_FOR (int i = 0; i < pixels_of(grid); i++)
        memcpy(s->x + (size_t)i * C, grid->wide + ((size_t)2 * i + half) * C, sizeof(float) * (size_t)C);
}

static void upsample_space(VaeStream *s, Grid *grid, const VaeLayer *layer) {
    to_operands(s, grid, s->x, layer->conv1.in);
    ConvInput input = {.conv = &layer->conv1, .frames = {grid->operands}, .zeros = s->zeros,
                       .pixel = row_bytes(s->vae->precision, layer->conv1.in), .height = 2 * grid->height,
                       .width = 2 * grid->width, .upsampled = 1};
    run_conv(&input, s->x, REPLACE);
}

/* Unpatches and clamps the last layer's output, and hands the frame to the sink. Channel (c*p + b)*p + a of x is colour
 * c, row a, column b of a p x p patch, as in upstream's unpatchify; p is 1 in Wan 2.1. */
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

/* Runs the layers from `index` on with the frame in x. UPSAMPLE_TIME calls it for its first frame, and goes on with the
 * second. */
static void push(VaeStream *s, int index) {
    for (; index < s->list->count; index++) {
        const VaeLayer *layer = &s->list->layers[index];
        LayerState *state = &s->states[index];
        Grid *grid = &s->grids[state->grid];
        switch (layer->kind) {
        case CONVOLUTION: convolution(s, grid, layer, state); break;
        case RESIDUAL: residual(s, grid, layer, state); break;
        case ATTENTION: attend(s, grid, layer); break;
        case UPSAMPLE_SPACE: upsample_space(s, grid, layer); break;
        case UPSAMPLE_TIME:
            if (!state->started) {
                state->started = true;
                break;
            }
            to_operands(s, grid, s->x, layer->conv1.in);
            convolve(s, grid, &layer->conv1, &state->cache[0], grid->wide, REPLACE);
            copy_half(s, grid, layer->conv1.in, 0);
            push(s, index + 1);
            copy_half(s, grid, layer->conv1.in, 1);
        }
    }
    emit(s, &s->grids[s->states[s->list->count - 1].grid]);
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

/* ---------------------------------------------------------------- memory and operations */

/* Sets the size and channels of each grid, and the grid of each layer. Returns the last grid. */
static Grid *size_grids(VaeStream *s, int H, int W) {
    Grid *grid = s->grids;
    *grid = (Grid){.height = H, .width = W};
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        int in = layer->conv1.in, out = layer->conv1.out;
        s->states[i].grid = (int)(grid - s->grids);
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

/* Cached frames are as large as grid->operands, because convolve() exchanges the two. */
static void take_cache(VaeStream *s, Arena *arena, const Grid *grid, const Conv *conv, FeatCache *cache) {
    if (conv->kt > 1)
        for (int i = 0; i < 2; i++) cache->frames[i] = take_operands(s, arena, grid);
}

/* All grids share one x and one t, because one layer runs at a time. */
static void take_buffers(VaeStream *s, Arena *arena, int H, int W) {
    const Grid *last = size_grids(s, H, W);
    size_t floats = 0, channels = 0;
    for (Grid *grid = s->grids; grid <= last; grid++) {
        grid->operands = take_operands(s, arena, grid);
        grid->wide = arena_floats(arena, (size_t)pixels_of(grid) * grid->wide_channels);
        floats = larger(floats, (size_t)pixels_of(grid) * grid->channels);
        channels = larger(channels, grid->channels);
    }
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        LayerState *state = &s->states[i];
        take_cache(s, arena, &s->grids[state->grid], &layer->conv1, &state->cache[0]);
        take_cache(s, arena, &s->grids[state->grid], &layer->conv2, &state->cache[1]);
    }
    s->x = arena_floats(arena, floats);
    s->t = arena_floats(arena, floats);
    s->zeros = arena_take(arena, row_bytes(s->vae->precision, (int)channels));
    s->frame = arena_floats(arena, (size_t)pixels_of(last) * 3 * s->vae->patch_size * s->vae->patch_size);
}

static VaeStream *stream_new(const Vae *vae) {
    VaeStream *s = allocate(sizeof *s);
    *s = (VaeStream){.vae = vae, .list = &vae->decoder};
    s->states = allocate(sizeof *s->states * (size_t)s->list->count);
    return s;
}

void vae_stream_close(VaeStream *s) {
    if (!s) return;
    arena_close(&s->arena);
    free(s->states);
    free(s);
}

size_t vae_decoder_memory(const Vae *vae, int H, int W) {
    Arena count = {0};
    VaeStream *s = stream_new(vae);
    take_buffers(s, &count, H, W);
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
                most = larger(most, product_memory(&convs[j]->layer, pixels));
    }
    return most;
}

VaeStream *vae_decoder_open(const Vae *vae, int H, int W, FrameSink *sink, void *to) {
    VaeStream *s = stream_new(vae);
    s->sink = sink, s->to = to;
    s->arena = arena_open(vae_decoder_memory(vae, H, W));
    take_buffers(s, &s->arena, H, W);
    return s;
}

/* Of `frames` frames of `area` pixels. Taps before the clip's first frame are left out: 2 of 3 in its first frame, 1 in
 * its second. */
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
