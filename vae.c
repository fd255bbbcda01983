/* vae.c - video frames <-> latents: the causal 3D VAE of Wan 2.1 and 2.2, one frame at a time.
 *
 * The decoder takes normalised latent frames (z_dim,H,W) and gives video frames [3,Y,X] in [-1,1]; the encoder is the
 * way back. The first latent frame belongs to one video frame, every later one to temporal_stride (4) of them; Y and X
 * are spatial_stride (8) times H and W. Each half is a list of layers that a frame passes in order:
 *
 *   decoder: latents * std + mean -> conv2 (1x1x1) -> conv1 (3x3x3) -> residual, attention, residual -> levels -> head
 *     level: residual blocks; then, in all but the last, UPSAMPLE_TIME, if this level doubles the frames, and
 *            nearest-neighbour upsampling by 2 with a convolution
 *   encoder: conv1 (3x3x3) -> levels -> residual, attention, residual -> head -> conv1 (1x1x1) -> (z - mean) / std
 *     level: residual blocks; then, in all but the last, a convolution with stride 2, and DOWNSAMPLE_TIME, if this
 *            level halves the frames
 *   head:  conv(silu(norm(x))); the decoder's is clamped to [-1,1]
 *
 * Time is causal: a 3x3x3 convolution reads a frame and the two before it, never a later one. Frames before the clip's
 * first are zeros (left out of the sum, which gives the same bits). So both halves stream. Each convolution keeps its
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
 * DOWNSAMPLE_TIME is the way back, the drawing read upwards. The clip's first frame passes unchanged and enters the
 * cache; of every two later frames the first ends there, and at the second the convolution reads both and the last one
 * of the pair before.
 *
 * Wan 2.2's VAE (vae.is_residual) has a shortcut past each level that changes the resolution, and past the encoder's
 * last. KEEP_FRAME keeps what enters the level. ADD_MEANS adds means of it to what leaves the encoder's level, and
 * ADD_COPIES adds copies of it to what leaves the decoder's. Its upsampling convolutions keep the number of channels.
 *
 * The tiny decoder (TAEHV's taew2_1 and taew2_2) is one more list, for the same latents: much less work, less detail.
 * It looks back one frame in each MEMORY block.
 *
 *   tiny:  3 tanh(latents / 3) -> conv, ReLU -> levels -> ReLU, conv
 *     level: three MEMORY blocks; a 1x1 convolution, which makes two frames of one in the last two levels;
 *            nearest-neighbour upsampling by 2 with a convolution
 *
 * Of the clip's first latent frame it makes four frames, too. The first three are dropped, as upstream does.
 *
 * A frame is stored as (pixels, channels). A convolution is a product whose rows are runs of channels at shifted
 * pixels (product.c). Padding and the upsampled image are not stored: locate_pixel() gives their addresses.
 *
 * Follows AutoencoderKLWan of diffusers, and wan/modules/vae.py and vae2_2.py of the original releases; the weight
 * names are those of the former. The tiny decoder follows taehv.py of madebyollin/taehv. RMS_norm is x / |x| *
 * sqrt(channels) * gamma, where |x| is over channels. Of the distribution that the encoder gives, only the mean is
 * used (diffusers' sample_mode "argmax"). */
#include "sora.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- weights: a list of layers */

enum { MAX_LEVELS = 8, MAX_CHANNELS = 4096 };
_Static_assert((int)MAX_CHANNELS <= (int)MAX_WIDTH, "l2_norm_silu() has room for a pixel");

/* The levels of both halves, the one with the most pixels first. */
typedef struct {
    int count, blocks;         /* blocks: residual blocks in a level of the encoder; the decoder has one more */
    int mult[MAX_LEVELS];      /* channels, as multiples of the half's base_dim */
    bool residual;             /* Wan 2.2: shortcuts past the levels; an upsampling convolution keeps the channels */
    bool temporal[MAX_LEVELS]; /* whether the number of frames changes between this level and the next */
} Levels;

static Levels read_levels(const WeightFile *file) {
    Levels levels = {.blocks = weights_size(file, "vae.num_res_blocks", 64),
                     .residual = weights_bool_or(file, "vae.is_residual", false)};
    WeightArray mult, temporal;
    if (!weights_array(file, "vae.dim_mult", &mult) || mult.count < 1 || mult.count > MAX_LEVELS)
        weights_refuse(file, "vae.dim_mult is not an array of 1 to %d numbers", MAX_LEVELS);
    levels.count = (int)mult.count;
    weights_sizes(file, "vae.dim_mult", 64, levels.mult, levels.count);
    if (!weights_array(file, "vae.temperal_downsample", &temporal) || temporal.count != mult.count - 1 ||
        !array_is_number(&temporal))
        weights_refuse(file, "vae.temperal_downsample is not an array of %d numbers", levels.count - 1);
    for (size_t i = 0; i < temporal.count; i++) levels.temporal[i] = array_double(&temporal, i) != 0;
    return levels;
}

/* Wan 2.2's shortcuts: the sizes at both ends of one must divide. AvgDown3D and DupUp3D assert the same. */
static void check_shortcuts(const WeightFile *file, const Levels *levels) {
    int last = levels->count - 1;
    for (int i = 0; levels->residual && i <= last; i++) {
        int before = i ? levels->mult[i - 1] : 1, own = levels->mult[i], after = levels->mult[smaller(i + 1, last)];
        int down = before * (i < last ? 4 * (1 + levels->temporal[i]) : 1);
        int up = own * (i ? 4 * (1 + levels->temporal[i - 1]) : after);
        if (down % own || up % after)
            weights_refuse(file, "vae.dim_mult has no shortcuts past level %d: %d of %d, or %d of %d values", i, own,
                           down, after, up);
    }
}

static Conv bind_conv(const WeightFile *file, Precision precision, int O, int I, int kt, int k, int with_bias,
                      const char *name) {
    Conv conv = {.kt = kt, .kh = k, .kw = k, .in = I, .out = O, .up = 1, .stride = 1};
    if (I > MAX_CHANNELS)
        weights_refuse(file, "vae.%s has %d input channels, expected at most %d", name, I, MAX_CHANNELS);
    conv.layer = linear_bind(file, precision, O, kt * k * k * I, with_bias, "vae.%s", name);
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

/* Appends a layer. */
static VaeLayer *add_layer(VaeLayers *list, VaeLayerKind kind) {
    list->layers = reallocate(list->layers, sizeof *list->layers * (size_t)(list->count + 1));
    VaeLayer *layer = &list->layers[list->count++];
    *layer = (VaeLayer){.kind = kind};
    return layer;
}

static const char *name_in(char path[MAX_TENSOR_NAME], const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    tensor_name(path, format, arguments);
    va_end(arguments);
    return path;
}
#define PATH(...) name_in(path, __VA_ARGS__)

/* Channels of a patch of pixels. */
static int patch_channels(const Vae *vae) { return 3 * vae->patch_size * vae->patch_size; }

static void bind_residual(const WeightFile *file, Vae *vae, VaeLayers *list, int I, int O, const char *name) {
    char path[MAX_TENSOR_NAME];
    VaeLayer *layer = add_layer(list, RESIDUAL);
    layer->norm1 = weights_floats(file, I, "vae.%s.residual.0.gamma", name);
    layer->conv1 = bind_conv(file, vae->precision, O, I, 3, 3, BIAS, PATH("%s.residual.2", name));
    layer->norm2 = weights_floats(file, O, "vae.%s.residual.3.gamma", name);
    layer->conv2 = bind_conv(file, vae->precision, O, O, 3, 3, BIAS, PATH("%s.residual.6", name));
    if (I != O) layer->shortcut = bind_conv(file, vae->precision, O, I, 1, 1, BIAS, PATH("%s.shortcut", name));
}

static void bind_attention(const WeightFile *file, Vae *vae, VaeLayers *list, int C, const char *name) {
    char path[MAX_TENSOR_NAME];
    VaeLayer *layer = add_layer(list, ATTENTION);
    layer->norm1 = weights_floats(file, C, "vae.%s.norm.gamma", name);
    layer->conv1 = bind_conv(file, vae->precision, 3 * C, C, 1, 1, BIAS, PATH("%s.to_qkv", name));
    layer->conv2 = bind_conv(file, vae->precision, C, C, 1, 1, BIAS, PATH("%s.proj", name));
}

/* Appends a CONVOLUTION. The Conv is valid until the next layer is appended. */
static Conv *add_convolution(const WeightFile *file, Vae *vae, VaeLayers *list, int O, int I, int kt, int k,
                             const char *name) {
    VaeLayer *layer = add_layer(list, CONVOLUTION);
    layer->conv1 = bind_conv(file, vae->precision, O, I, kt, k, BIAS, name);
    return &layer->conv1;
}

static void bind_middle(const WeightFile *file, Vae *vae, VaeLayers *list, int C, const char *half) {
    char path[MAX_TENSOR_NAME];
    bind_residual(file, vae, list, C, C, PATH("%s.middle.0", half));
    bind_attention(file, vae, list, C, PATH("%s.middle.1", half));
    bind_residual(file, vae, list, C, C, PATH("%s.middle.2", half));
}

static void bind_head(const WeightFile *file, Vae *vae, VaeLayers *list, int O, int I, const char *half) {
    char path[MAX_TENSOR_NAME];
    const float *norm = weights_floats(file, I, "vae.%s.head.0.gamma", half);
    add_convolution(file, vae, list, O, I, 3, 3, PATH("%s.head.2", half));
    list->layers[list->count - 1].norm1 = norm;
}

/* Begins a shortcut past a level, which end_shortcut() ends. Returns the index of KEEP_FRAME; -1 without shortcuts. */
static int begin_shortcut(const Levels *levels, VaeLayers *list) {
    if (!levels->residual) return -1;
    add_layer(list, KEEP_FRAME);
    return list->count - 1;
}

static void end_shortcut(VaeLayers *list, int keep, VaeLayerKind kind, int in, int out, int time, int space) {
    if (keep < 0) return;
    VaeLayer *add = add_layer(list, kind);
    add->past = (Shortcut){.partner = keep, .in = in, .out = out, .time = time, .space = space};
    list->layers[keep].past = add->past;
    list->layers[keep].past.partner = list->count - 1;
}

/* Residual blocks and resampling layers of all levels share one numbering, encoder.downsamples.N. */
static void bind_encoder(const WeightFile *file, Vae *vae, const Levels *levels) {
    VaeLayers *list = &vae->halves[ENCODER];
    char path[MAX_TENSOR_NAME];
    int base = weights_size(file, "vae.base_dim", MAX_CHANNELS), width = base, index = 0;
    add_convolution(file, vae, list, width, patch_channels(vae), 3, 3, "encoder.conv1");
    for (int i = 0; i < levels->count; i++) {
        int in = width, out = base * levels->mult[i], keep = begin_shortcut(levels, list);
        bool last = i + 1 == levels->count;
        for (int j = 0; j < levels->blocks; j++, width = out)
            bind_residual(file, vae, list, width, out, PATH("encoder.downsamples.%d", index++));
        if (last) end_shortcut(list, keep, ADD_MEANS, in, out, 1, 1);
        if (last) break;
        add_convolution(file, vae, list, out, out, 1, 3, PATH("encoder.downsamples.%d.resample.1", index))->stride = 2;
        if (levels->temporal[i])
            add_layer(list, DOWNSAMPLE_TIME)->conv1 =
                bind_conv(file, vae->precision, out, out, 3, 1, BIAS, PATH("encoder.downsamples.%d.time_conv", index));
        end_shortcut(list, keep, ADD_MEANS, in, out, 1 + levels->temporal[i], 2);
        index++;
    }
    bind_middle(file, vae, list, width, "encoder");
    bind_head(file, vae, list, 2 * vae->z_dim, width, "encoder");
    add_convolution(file, vae, list, 2 * vae->z_dim, 2 * vae->z_dim, 1, 1, "conv1");
}

static void bind_decoder(const WeightFile *file, Vae *vae, const Levels *levels) {
    VaeLayers *list = &vae->halves[DECODER];
    char path[MAX_TENSOR_NAME];
    int base = weights_size(file, "vae.base_dim", MAX_CHANNELS);
    base = weights_size_or(file, "vae.decoder_base_dim", MAX_CHANNELS, base);
    int z = vae->z_dim, width = base * levels->mult[levels->count - 1], index = 0;
    add_convolution(file, vae, list, z, z, 1, 1, "conv2");
    add_convolution(file, vae, list, width, z, 3, 3, "decoder.conv1");
    bind_middle(file, vae, list, width, "decoder");
    for (int i = levels->count - 1; i >= 0; i--) {
        int in = width, out = base * levels->mult[i], keep = i ? begin_shortcut(levels, list) : -1;
        for (int j = 0; j <= levels->blocks; j++, width = out)
            bind_residual(file, vae, list, width, out, PATH("decoder.upsamples.%d", index++));
        if (i == 0) break;
        if (levels->temporal[i - 1])
            add_layer(list, UPSAMPLE_TIME)->conv1 =
                bind_conv(file, vae->precision, 2 * out, out, 3, 1, BIAS,
                          PATH("decoder.upsamples.%d.time_conv", index));
        width = levels->residual ? out : out / 2;
        add_convolution(file, vae, list, width, out, 1, 3, PATH("decoder.upsamples.%d.resample.1", index++))->up = 2;
        end_shortcut(list, keep, ADD_COPIES, in, out, 1 + levels->temporal[i - 1], 2);
    }
    bind_head(file, vae, list, patch_channels(vae), width, "decoder");
}

static void bind_memory(const WeightFile *file, Vae *vae, VaeLayers *list, int n, int index) {
    char path[MAX_TENSOR_NAME];
    VaeLayer *layer = add_layer(list, MEMORY);
    layer->conv1 = bind_conv(file, vae->precision, n, n, 2, 3, BIAS, PATH("tiny.%d.conv.0", index));
    layer->conv2 = bind_conv(file, vae->precision, n, n, 1, 3, BIAS, PATH("tiny.%d.conv.2", index));
    layer->conv3 = bind_conv(file, vae->precision, n, n, 1, 3, BIAS, PATH("tiny.%d.conv.4", index));
}

/* tiny.N is decoder.N of taehv.py, whose activations and upsamplings are counted, too. */
static void bind_tiny(const WeightFile *file, Vae *vae) {
    enum { WIDTHS = 4 };
    VaeLayers *list = &vae->halves[TINY];
    char path[MAX_TENSOR_NAME];
    int width[WIDTHS], index = 3;
    if (vae->temporal_stride != 4 || vae->spatial_stride != 8 * vae->patch_size)
        weights_refuse(file, "vae.tiny is for a VAE with strides 4 and %d, found %d and %d", 8 * vae->patch_size,
                       vae->temporal_stride, vae->spatial_stride);
    weights_sizes(file, "vae.tiny.widths", MAX_CHANNELS, width, WIDTHS);
    add_convolution(file, vae, list, width[0], vae->z_dim, 1, 3, "tiny.1");
    add_layer(list, RELU);
    for (int i = 0; i + 1 < WIDTHS; i++, index += 3) {
        int n = width[i], frames = i ? 2 : 1;
        for (int j = 0; j < 3; j++) bind_memory(file, vae, list, n, index++);
        add_layer(list, i ? UPSAMPLE_TIME : CONVOLUTION)->conv1 =
            bind_conv(file, vae->precision, frames * n, n, 1, 1, NO_BIAS, PATH("tiny.%d.conv", index + 1));
        VaeLayer *up = add_layer(list, CONVOLUTION);
        up->conv1 = bind_conv(file, vae->precision, width[i + 1], n, 1, 3, NO_BIAS, PATH("tiny.%d", index + 2));
        up->conv1.up = 2;
    }
    add_layer(list, RELU);
    add_convolution(file, vae, list, patch_channels(vae), width[WIDTHS - 1], 1, 3, PATH("tiny.%d", index + 1));
}

Vae vae_load(const WeightFile *file, Precision precision) {
    Vae vae = {.z_dim = weights_size(file, "vae.z_dim", MAX_CHANNELS),
               .patch_size = weights_size_or(file, "vae.patch_size", 16, 1),
               .precision = precision_of_floats(precision)};
    Levels levels = read_levels(file);
    check_shortcuts(file, &levels);
    vae.spatial_stride = vae.patch_size << (levels.count - 1);
    vae.temporal_stride = 1;
    for (int i = 0; i + 1 < levels.count; i++) vae.temporal_stride <<= levels.temporal[i];
    vae.latents_mean = config_floats(file, "vae.latents_mean", vae.z_dim);
    vae.latents_std = config_floats(file, "vae.latents_std", vae.z_dim);
    bind_encoder(file, &vae, &levels);
    bind_decoder(file, &vae, &levels);
    if (weights_has(file, "vae.tiny.widths")) bind_tiny(file, &vae);
    return vae;
}

void vae_free(Vae *vae) {
    for (int half = 0; half < HALVES; half++) free(vae->halves[half].layers);
    free((void *)vae->latents_mean);
    free((void *)vae->latents_std);
}

/* ---------------------------------------------------------------- the stream */

/* Buffers of one resolution. There is a grid for the frame that enters, and one after each
 * convolution that changes the resolution. */
typedef struct {
    int height, width;
    int channels, wide_channels; /* the most of any layer at this resolution */
    char *operands;              /* (pixels): a convolution's input, a row operand (panel.c) for each pixel */
    float *wide;                 /* (pixels, wide_channels): q, k and v; or the two frames of UPSAMPLE_TIME */
} Grid;

/* The previous input frames of a convolution over time, kt - 1 of them, the newest last. */
typedef struct {
    char *frames[2]; /* row operands */
    int seen;        /* how many of them there have been */
} FeatCache;

/* What a layer keeps from frame to frame. */
typedef struct {
    int in, out;        /* indices of the grids that it reads and writes */
    FeatCache cache[2]; /* of conv1 and conv2 */
    bool started;       /* UPSAMPLE_TIME, DOWNSAMPLE_TIME: the clip's first frame has passed */
    bool waiting;       /* DOWNSAMPLE_TIME: the first frame of a pair has passed, the second has not */
    float *kept;        /* ADD_MEANS: (pixels, out), the sums so far; ADD_COPIES: (pixels that KEEP_FRAME reads, in) */
} LayerState;

struct VaeStream {
    const Vae *vae;
    VaeHalf half;
    const VaeLayers *list;
    Arena arena;
    Grid grids[MAX_LEVELS];
    LayerState *states; /* [list->count] */
    float *x, *t;       /* (pixels, channels): the frame; the hidden frame of a residual block */
    char *zeros;        /* a row operand of zeros: a pixel of the padding */
    float *frame;       /* what comes out: a video frame [3,Y,X] or a latent frame (z_dim,H,W) */
    int dropped;        /* TINY: frames still to be dropped */
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
    int height, width;     /* of the frames, after upsampling by conv->up */
    int columns;           /* of the output */
} ConvInput;

/* The pixel under a tap, for output pixel `row` and those that follow: as far as the line goes; past its end if the tap
 * is in the middle; one pixel where the image is doubled. Taps are ordered (t, y, x). Padding is on all sides; with
 * stride 2, only below and to the right. */
static Segment locate_pixel(const void *of, int row, int rows, int tap) {
    const ConvInput *input = of;
    const Conv *conv = input->conv;
    int pad = conv->stride == 1 ? conv->kh / 2 : 0, column = row % input->columns;
    int y = row / input->columns * conv->stride - pad + tap / conv->kw % conv->kh;
    int x = column * conv->stride - pad + tap % conv->kw, t = input->skip + tap / (conv->kw * conv->kh);
    int left = smaller(rows, input->columns - column); /* pixels of the line */
    if (y < 0 || y >= input->height || x >= input->width) return (Segment){input->zeros, 0, left};
    if (x < 0) return (Segment){input->zeros, 0, 1};
    size_t place = (size_t)(y / conv->up * (input->width / conv->up) + x / conv->up);
    Segment run = {input->frames[t] + place * input->pixel, input->pixel * (size_t)conv->stride, 1};
    if (conv->up > 1) return run;
    run.rows = smaller(left, ceiling(input->width - x, conv->stride));
    if (conv->stride == 1 && x == column) run.rows = smaller(rows, (input->height - y) * input->width - x);
    return run;
}

static void run_conv(const ConvInput *input, float *out, int mode) {
    const Conv *conv = input->conv;
    int area = conv->kh * conv->kw, skip = input->skip * area;
    Rows rows = {.rows = input->height / conv->stride * input->columns, .segments = conv->kt * area - skip,
                 .n = conv->in, .skip = skip, .locate = locate_pixel, .of = input};
    product(out, rows, &conv->layer, mode);
}

/* The buffers rotate: operands -> cache, each cached frame becomes the older one, the oldest becomes operands. */
static void cache_frame(Grid *grid, FeatCache *cache, int kept) {
    char *oldest = cache->frames[2 - kept];
    if (kept == 2) cache->frames[0] = cache->frames[1];
    cache->frames[1] = grid->operands;
    cache->seen = smaller(cache->seen + 1, kept);
    grid->operands = oldest;
}

/* out (pixels, O) = or += conv of the frame in grid->operands and of the kt - 1 frames in its cache, which the frame
 * then enters. */
static void convolve(const VaeStream *s, Grid *grid, const Conv *conv, FeatCache *cache, float *out, int mode) {
    ConvInput input = {.conv = conv, .frames = {grid->operands}, .zeros = s->zeros,
                       .pixel = row_bytes(s->vae->precision, conv->in),
                       .height = grid->height * conv->up, .width = grid->width * conv->up};
    input.columns = input.width / conv->stride;
    int kept = conv->kt - 1;
    if (kept) {
        for (int i = 0; i < kept; i++) input.frames[i] = cache->frames[2 - kept + i];
        input.frames[kept] = grid->operands;
        input.skip = kept - cache->seen;
    }
    run_conv(&input, out, mode);
    if (kept) cache_frame(grid, cache, kept);
}

/* ---------------------------------------------------------------- layers */

static int pixels_of(const Grid *grid) { return grid->height * grid->width; }

/* grid->operands as rows (pixels, n) */
static Rows operands_of(const VaeStream *s, const Grid *grid, int n) {
    Precision precision = s->vae->precision;
    return rows_at(precision, grid->operands, row_bytes(precision, n), pixels_of(grid), n);
}

/* grid->operands from x (pixels, n) */
static void to_operands(const VaeStream *s, Grid *grid, const float *x, int n) {
    narrow_rows(operands_of(s, grid, n), x);
}

/* grid->operands from silu(norm(x)) */
static void norm_silu(const VaeStream *s, Grid *grid, const float *x, int n, const float *gamma) {
    l2_norm_silu(operands_of(s, grid, n), x, gamma);
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

static void memory(VaeStream *s, Grid *grid, const VaeLayer *layer, LayerState *state) {
    int n = layer->conv1.in;
    size_t count = (size_t)pixels_of(grid) * n;
    to_operands(s, grid, s->x, n);
    convolve(s, grid, &layer->conv1, &state->cache[0], s->t, REPLACE);
    relu(s->t, s->t, count);
    to_operands(s, grid, s->t, n);
    convolve(s, grid, &layer->conv2, NULL, s->t, REPLACE);
    relu(s->t, s->t, count);
    to_operands(s, grid, s->t, n);
    convolve(s, grid, &layer->conv3, NULL, s->x, ACCUMULATE);
    relu(s->x, s->x, count);
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
    PARALLEL_ROWS(i, pixels_of(grid), C)
        memcpy(s->x + (size_t)i * C, grid->wide + ((size_t)2 * i + half) * C, sizeof(float) * (size_t)C);
}

/* Returns whether x goes on to the next layer. The clip's first frame does, unchanged. The first frame of a pair does
 * not. At the second, x becomes conv1 of the pair. */
static bool downsample_time(VaeStream *s, Grid *grid, const VaeLayer *layer, LayerState *state) {
    to_operands(s, grid, s->x, layer->conv1.in);
    if (!state->started || !state->waiting) cache_frame(grid, &state->cache[0], 2);
    else convolve(s, grid, &layer->conv1, &state->cache[0], s->x, REPLACE);
    bool goes_on = !state->started || state->waiting;
    state->waiting = state->started && !state->waiting;
    state->started = true;
    return goes_on;
}

/* ---------------------------------------------------------------- shortcuts of Wan 2.2 */

/* Whether this frame is the first (0) or the second (1) of a pair. The clip's first frame is a second one: for
 * ADD_MEANS the frame before it is zeros, for ADD_COPIES the first copy is not used. */
static int next_of_pair(LayerState *state, int time) {
    int which = time == 1 ? 0 : !state->started || state->waiting;
    state->waiting = time > 1 && state->started && !state->waiting;
    state->started = true;
    return which;
}

/* AvgDown3D: adds x (pixels, in) to means over pixels, frames and neighbouring channels. The in*time*space*space values
 * (channel, frame, row, column) are cut into `out` runs in order. Each channel that comes out is the mean of a run. */
static void keep_means(VaeStream *s, const Grid *grid, LayerState *state, LayerState *add, const Shortcut *past) {
    int which = next_of_pair(state, past->time), columns = grid->width / past->space, f = past->space;
    int run = past->in * past->time * f * f / past->out, pixels = grid->height / f * columns;
    if (past->time == 1 || which == 0 || !add->started)
        memset(add->kept, 0, sizeof(float) * (size_t)pixels * past->out);
    add->started = true;
    PARALLEL_ROWS(i, pixels, past->in)
        for (int c = 0; c < past->in; c++)
            for (int j = 0; j < f * f; j++) {
                size_t pixel = (size_t)(i / columns * f + j / f) * grid->width + i % columns * f + j % f;
                int place = ((c * past->time + which) * f * f + j) / run;
                add->kept[(size_t)i * past->out + place] += s->x[pixel * past->in + c] / (float)run;
            }
}

/* DupUp3D: adds one kept value to each element of x (pixels, out). The `in` channels of a kept pixel, each repeated
 * `repeats` times, fill the places (channel, frame, row, column) in order. */
static void add_copies(VaeStream *s, const Grid *grid, LayerState *state, const Shortcut *past) {
    int which = next_of_pair(state, past->time), f = past->space, columns = grid->width / f;
    int repeats = past->out * past->time * f * f / past->in;
    PARALLEL_ROWS(i, pixels_of(grid), past->out) {
        int y = i / grid->width, x = i % grid->width;
        const float *kept = state->kept + ((size_t)(y / f) * columns + x / f) * past->in;
        for (int c = 0; c < past->out; c++)
            s->x[(size_t)i * past->out + c] += kept[(((c * past->time + which) * f + y % f) * f + x % f) / repeats];
    }
}

static void keep(VaeStream *s, const Grid *grid, const VaeLayer *layer, LayerState *state) {
    const Shortcut *past = &layer->past;
    LayerState *add = &s->states[past->partner];
    if (s->list->layers[past->partner].kind == ADD_MEANS) keep_means(s, grid, state, add, past);
    else memcpy(add->kept, s->x, sizeof(float) * (size_t)pixels_of(grid) * past->in);
}

/* ---------------------------------------------------------------- both ends of the lists */

/* Index in x (pixels, 3*p*p) of colour c of pixel (y,x) of the video, W patches wide. Channel (c*p + b)*p + a is colour
 * c, row a, column b of a p x p patch, as in upstream's patchify; p is 1 in Wan 2.1. */
static size_t patch_index(int p, int W, int c, int y, int x) {
    return ((size_t)(y / p) * W + x / p) * 3 * p * p + (c * p + x % p) * p + y % p;
}

static void load_frame(VaeStream *s, const Grid *grid, const float *frame) {
    int p = s->vae->patch_size, Y = grid->height * p, X = grid->width * p;
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < Y; y++)
            for (int x = 0; x < X; x++) s->x[patch_index(p, grid->width, c, y, x)] = *frame++;
}

static void store_frame(VaeStream *s, const Grid *grid) {
    int p = s->vae->patch_size, Y = grid->height * p, X = grid->width * p;
    float *pixel = s->frame;
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < Y; y++)
            for (int x = 0; x < X; x++) {
                float value = s->x[patch_index(p, grid->width, c, y, x)];
                *pixel++ = value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value; /* NaN stays NaN */
            }
}

/* 3 tanh(x / 3), without libm, whose last bits differ from system to system: the exponential is a series in a small
 * number, squared as often as that was halved. */
static float bounded(float x) {
    double z = -2 / 3.0 * fabs((double)x), e = 1;
    int halvings = 0;
    if (z < -50) return x < 0 ? -3 : 3;
    for (; z < -0.5; z /= 2) halvings++;
    for (int k = 14; k > 0; k--) e = 1 + z / k * e;
    for (; halvings > 0; halvings--) e *= e;
    double y = 3 * (1 - e) / (1 + e);
    return (float)(x < 0 ? -y : y);
}

static void load_latents(VaeStream *s, const Grid *grid, const float *latents) {
    const Vae *vae = s->vae;
    int z = vae->z_dim;
    size_t pixels = (size_t)pixels_of(grid);
    for (int c = 0; c < z; c++)
        for (size_t i = 0; i < pixels; i++) {
            float value = latents[c * pixels + i];
            s->x[i * z + c] = s->half == TINY ? bounded(value) : value * vae->latents_std[c] + vae->latents_mean[c];
        }
}

/* x holds z_dim means, then as many logarithms of variances, which are not used. */
static void store_latents(VaeStream *s, const Grid *grid) {
    const Vae *vae = s->vae;
    int z = vae->z_dim;
    size_t pixels = (size_t)pixels_of(grid);
    for (int c = 0; c < z; c++)
        for (size_t i = 0; i < pixels; i++)
            s->frame[c * pixels + i] = (s->x[i * 2 * z + c] - vae->latents_mean[c]) / vae->latents_std[c];
}

/* Runs the layers from `index` on with the frame in x. UPSAMPLE_TIME calls it for its first frame, and goes on with the
 * second. */
static void push(VaeStream *s, int index) {
    for (; index < s->list->count; index++) {
        const VaeLayer *layer = &s->list->layers[index];
        LayerState *state = &s->states[index];
        Grid *grid = &s->grids[state->in];
        switch (layer->kind) {
        case CONVOLUTION: convolution(s, grid, layer, state); break;
        case RESIDUAL: residual(s, grid, layer, state); break;
        case ATTENTION: attend(s, grid, layer); break;
        case MEMORY: memory(s, grid, layer, state); break;
        case RELU: relu(s->x, s->x, (size_t)pixels_of(grid) * s->list->layers[index - 1].conv1.out); break;
        case KEEP_FRAME: keep(s, grid, layer, state); break;
        case ADD_MEANS: add(s->x, state->kept, (size_t)pixels_of(grid) * layer->past.out); break;
        case ADD_COPIES: add_copies(s, grid, state, &layer->past); break;
        case DOWNSAMPLE_TIME:
            if (!downsample_time(s, grid, layer, state)) return;
            break;
        case UPSAMPLE_TIME:
            if (layer->conv1.kt > 1 && !state->started) {
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
    if (s->dropped) {
        s->dropped--;
        return;
    }
    const Grid *last = &s->grids[s->states[index - 1].out];
    if (s->half == ENCODER) store_latents(s, last);
    else store_frame(s, last);
    s->sink(s->to, s->frame);
}

void vae_push(VaeStream *s, const float *frame) {
    if (s->half == ENCODER) load_frame(s, &s->grids[0], frame);
    else load_latents(s, &s->grids[0], frame);
    push(s, 0);
}

/* ---------------------------------------------------------------- memory and operations */

/* Sets the size and channels of each grid, and the grids of each layer. H, W: of the latents. Returns the last grid. */
static Grid *size_grids(VaeStream *s, int H, int W) {
    Grid *grid = s->grids;
    int times = s->half == ENCODER ? s->vae->spatial_stride / s->vae->patch_size : 1;
    *grid = (Grid){.height = H * times, .width = W * times};
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        const Conv *conv = &layer->conv1;
        s->states[i].in = (int)(grid - s->grids);
        grid->channels = larger(grid->channels, conv->in);
        if (conv->up != conv->stride) {
            grid++;
            *grid = (Grid){.height = grid[-1].height * conv->up / conv->stride,
                           .width = grid[-1].width * conv->up / conv->stride};
        }
        s->states[i].out = (int)(grid - s->grids);
        if (layer->kind == ATTENTION || layer->kind == UPSAMPLE_TIME)
            grid->wide_channels = larger(grid->wide_channels, conv->out);
        else
            grid->channels = larger(grid->channels, conv->out);
    }
    return grid;
}

static char *take_operands(const VaeStream *s, Arena *arena, const Grid *grid) {
    return arena_take(arena, (size_t)pixels_of(grid) * row_bytes(s->vae->precision, grid->channels));
}

/* Cached frames are as large as grid->operands, because convolve() exchanges the two. */
static void take_cache(VaeStream *s, Arena *arena, const Grid *grid, const Conv *conv, FeatCache *cache) {
    for (int i = 3 - conv->kt; conv->out && i < 2; i++) cache->frames[i] = take_operands(s, arena, grid);
}

/* All grids share one x and one t, because one layer runs at a time. */
static void take_buffers(VaeStream *s, Arena *arena, int H, int W) {
    const Grid *last = size_grids(s, H, W);
    size_t floats = 0;
    int channels = 0;
    for (Grid *grid = s->grids; grid <= last; grid++) {
        grid->operands = take_operands(s, arena, grid);
        grid->wide = arena_floats(arena, (size_t)pixels_of(grid) * grid->wide_channels);
        floats = larger_size(floats, (size_t)pixels_of(grid) * grid->channels);
        channels = larger(channels, grid->channels);
    }
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        const Shortcut *past = &layer->past;
        LayerState *state = &s->states[i];
        const Grid *grid = &s->grids[state->in], *before = &s->grids[s->states[past->partner].in]; /* the partner's */
        take_cache(s, arena, grid, &layer->conv1, &state->cache[0]);
        take_cache(s, arena, grid, &layer->conv2, &state->cache[1]);
        if (layer->kind == ADD_MEANS) state->kept = arena_floats(arena, (size_t)pixels_of(grid) * past->out);
        if (layer->kind == ADD_COPIES) state->kept = arena_floats(arena, (size_t)pixels_of(before) * past->in);
    }
    s->x = arena_floats(arena, floats);
    s->t = arena_floats(arena, floats);
    s->zeros = arena_take(arena, row_bytes(s->vae->precision, channels));
    int given = s->half == ENCODER ? s->vae->z_dim : patch_channels(s->vae); /* channels of what comes out */
    s->frame = arena_floats(arena, (size_t)pixels_of(last) * given);
}

static VaeStream *stream_new(const Vae *vae, VaeHalf half) {
    VaeStream *s = allocate(sizeof *s);
    *s = (VaeStream){.vae = vae, .half = half, .list = &vae->halves[half],
                     .dropped = half == TINY ? vae->temporal_stride - 1 : 0};
    s->states = allocate(sizeof *s->states * (size_t)s->list->count);
    return s;
}

static void feat_cache_state(const VaeStream *s, const Grid *grid, const Conv *conv, FeatCache *cache, StateFile *f) {
    if (conv->kt < 2) return;
    size_t bytes = (size_t)pixels_of(grid) * row_bytes(s->vae->precision, conv->in);
    cache->seen = (int)state_number(f, "vae.seen", cache->seen, 0, conv->kt - 1);
    for (int i = 2 - cache->seen; i < 2; i++) state_item(f, "vae.frame", cache->frames[i], bytes);
}

/* All other buffers are written before they are read. */
void vae_stream_state(VaeStream *s, StateFile *f) {
    s->dropped = (int)state_number(f, "vae.dropped", s->dropped, 0, s->dropped);
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        LayerState *state = &s->states[i];
        const Grid *grid = &s->grids[state->in];
        state->started = state_number(f, "vae.started", state->started, 0, 1);
        state->waiting = state_number(f, "vae.waiting", state->waiting, 0, 1);
        feat_cache_state(s, grid, &layer->conv1, &state->cache[0], f);
        feat_cache_state(s, grid, &layer->conv2, &state->cache[1], f);
    }
}

void vae_close(VaeStream *s) {
    if (!s) return;
    arena_close(&s->arena);
    free(s->states);
    free(s);
}

size_t vae_memory(const Vae *vae, VaeHalf half, int H, int W) {
    Arena count = {0};
    VaeStream *s = stream_new(vae, half);
    take_buffers(s, &count, H, W);
    vae_close(s);
    return count.used;
}

size_t vae_scratch(const Vae *vae, VaeHalf half, int H, int W) {
    size_t most = 0;
    VaeStream *s = stream_new(vae, half);
    size_grids(s, H, W);
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        const Conv *convs[] = {&layer->conv1, &layer->conv2, &layer->conv3, &layer->shortcut};
        int pixels = pixels_of(&s->grids[s->states[i].out]);
        if (layer->kind == ATTENTION)
            most = larger_size(most, attention_memory(vae->precision, pixels, 1, layer->conv2.in));
        for (int j = 0; j < 4; j++)
            if (convs[j]->out) most = larger_size(most, product_memory(&convs[j]->layer, pixels));
    }
    vae_close(s);
    return most;
}

VaeStream *vae_open(const Vae *vae, VaeHalf half, int H, int W, FrameSink *sink, void *to) {
    VaeStream *s = stream_new(vae, half);
    s->sink = sink, s->to = to;
    s->arena = arena_open(vae_memory(vae, half, H, W));
    take_buffers(s, &s->arena, H, W);
    return s;
}

/* Of `frames` frames of `area` pixels. `missing` taps in time are left out, before the clip's first frame. */
static double conv_flops(const Conv *conv, double frames, double area, double missing) {
    double seen = conv->kt && frames > 0 ? (frames * conv->kt - missing) / conv->kt : 0;
    return 2.0 * seen * area * conv->layer.weight.rows * conv->layer.weight.cols;
}

double vae_flops(const Vae *vae, VaeHalf half, int count, int H, int W) {
    double frames = count, sum = 0;
    VaeStream *s = stream_new(vae, half);
    size_grids(s, H, W);
    for (int i = 0; i < s->list->count; i++) {
        const VaeLayer *layer = &s->list->layers[i];
        const Conv *convs[] = {&layer->conv1, &layer->conv2, &layer->conv3, &layer->shortcut};
        double area = pixels_of(&s->grids[s->states[i].out]);
        if (layer->kind == ATTENTION) sum += 4.0 * frames * area * area * layer->conv2.in;
        if (layer->kind == DOWNSAMPLE_TIME) frames = (frames - 1) / 2; /* the clip's first passes */
        bool passes = layer->kind == UPSAMPLE_TIME && layer->conv1.kt > 1; /* the clip's first */
        if (passes) frames--;
        for (int j = 0; j < 4; j++) {
            int kept = layer->kind == DOWNSAMPLE_TIME ? 0 : convs[j]->kt - 1; /* of 2, first none are there, then 1 */
            sum += conv_flops(convs[j], frames, area, kept == 2 && frames > 1 ? 3 : kept > 0 ? kept : 0);
        }
        if (layer->kind == DOWNSAMPLE_TIME) frames++;
        if (layer->kind == UPSAMPLE_TIME) frames = 2 * frames + passes;
    }
    vae_close(s);
    return sum;
}
