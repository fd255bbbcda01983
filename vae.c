/* vae.c - latents -> frames: the decoder of Wan 2.1's causal 3D VAE, one latent frame at a time.
 *
 *   z -> conv2 (1x1x1) -> conv1 -> middle: residual, attention, residual -> levels -> head -> frame
 *   residual: x + conv2(silu(norm2(conv1(silu(norm1(x))))))     (x through a 1x1x1 shortcut if widths differ)
 *   level:    residual blocks, then upsampling: in time by time_conv, in space by doubling and a 3x3
 *             convolution
 *
 * Causal means that a convolution over time sees a frame and the two before it, never one after. So the
 * decoder runs as a stream: each convolution keeps its last two input frames, a frame is pushed through the
 * layers, and where a level doubles the frame rate each of the two goes on by itself to the end before the
 * next is made. Memory does not depend on the clip's length. The clip's first frame has no companion:
 * time_conv lets it pass, and starts with an empty past at the second (upstream's "Rep").
 *
 * Frames are stored (pixels, channels), channels innermost, which makes a convolution a product whose rows
 * are runs of channels at shifted pixels (product.c). Neither padding, nor the doubled image, nor the split
 * of time_conv's output into two frames is ever built: they are ways to find a row.
 *
 * Follows AutoencoderKLWan of diffusers (without residual shortcuts) and wan/modules/vae.py of the original
 * release, whose names the fields carry. Its RMS_norm is F.normalize over channels, times sqrt(channels)
 * and gamma. */
#include "sora.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- weights */

enum { MAX_LEVELS = 8 };

static Conv bind_conv(const WeightFile *file, Precision precision, int O, int I, int kt, int k,
                      const char *name) {
    Conv conv = {.kt = kt, .kh = k, .kw = k, .in = I, .out = O};
    if (I > MAX_CHANNELS)
        weights_refuse(file, "vae.%s reads %d channels, more than %d", name, I, MAX_CHANNELS);
    conv.layer = linear_bind(file, precision, O, kt * k * k * I, BIAS, "vae.%s", name);
    return conv;
}

static ResidualBlock bind_residual(const WeightFile *file, Precision precision, int I, int O,
                                   const char *name) {
    char path[64];
#define PATH(part) (snprintf(path, sizeof path, "%s." part, name), path)
    ResidualBlock block = {0};
    block.norm1 = weights_floats(file, I, "vae.%s.residual.0.gamma", name);
    block.conv1 = bind_conv(file, precision, O, I, 3, 3, PATH("residual.2"));
    block.norm2 = weights_floats(file, O, "vae.%s.residual.3.gamma", name);
    block.conv2 = bind_conv(file, precision, O, O, 3, 3, PATH("residual.6"));
    if (I != O) block.shortcut = bind_conv(file, precision, O, I, 1, 1, PATH("shortcut"));
#undef PATH
    return block;
}

static const float *config_floats(const WeightFile *file, const char *key, int count) {
    WeightArray array;
    if (!weights_array(file, key, &array) || array.count != (size_t)count || !array_is_number(&array))
        weights_refuse(file, "%s is not an array of %d numbers", key, count);
    float *values = allocate(sizeof(float) * (size_t)count);
    for (int i = 0; i < count; i++) values[i] = (float)array_double(&array, (size_t)i);
    return values;
}

/* The original release numbers residual blocks and upsamplings of all levels in one list. */
static void bind_levels(const WeightFile *file, Vae *vae, const int *dims, int blocks) {
    WeightArray temporal;
    char path[64];
    int last = vae->num_levels - 1, in = dims[last], index = 0;
    if (!weights_array(file, "vae.temperal_downsample", &temporal) || temporal.count != (size_t)last ||
        !array_is_number(&temporal))
        weights_refuse(file, "vae.temperal_downsample is not an array of %d numbers", last);
    for (int i = 0; i <= last; i++) { /* the file lists the finest level first */
        VaeLevel *level = &vae->levels[i];
        int out = dims[last - i];
        level->num_blocks = blocks + 1;
        level->blocks = allocate(sizeof *level->blocks * (size_t)level->num_blocks);
        for (int j = 0; j < level->num_blocks; j++, in = out) {
            snprintf(path, sizeof path, "decoder.upsamples.%d", index++);
            level->blocks[j] = bind_residual(file, vae->precision, in, out, path);
        }
        if (i == last) break;
        snprintf(path, sizeof path, "decoder.upsamples.%d.resample.1", index);
        level->resample = bind_conv(file, vae->precision, in = out / 2, out, 1, 3, path);
        vae->spatial_stride *= 2;
        if (array_double(&temporal, (size_t)(last - 1 - i)) != 0) {
            snprintf(path, sizeof path, "decoder.upsamples.%d.time_conv", index);
            level->time_conv = bind_conv(file, vae->precision, 2 * out, out, 3, 1, path);
            vae->temporal_stride *= 2;
        }
        index++;
    }
}

static void bind_middle(const WeightFile *file, Vae *vae, int top) {
    vae->conv2 = bind_conv(file, vae->precision, vae->z_dim, vae->z_dim, 1, 1, "conv2");
    vae->conv1 = bind_conv(file, vae->precision, top, vae->z_dim, 3, 3, "decoder.conv1");
    vae->middle_0 = bind_residual(file, vae->precision, top, top, "decoder.middle.0");
    vae->middle_norm = weights_floats(file, top, "vae.decoder.middle.1.norm.gamma");
    vae->qkv = bind_conv(file, vae->precision, 3 * top, top, 1, 1, "decoder.middle.1.to_qkv");
    vae->proj = bind_conv(file, vae->precision, top, top, 1, 1, "decoder.middle.1.proj");
    vae->middle_2 = bind_residual(file, vae->precision, top, top, "decoder.middle.2");
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

Vae vae_load(const WeightFile *file, Precision precision) {
    int dims[MAX_LEVELS], levels = read_dims(file, dims);
    Vae vae = {.z_dim = weights_size(file, "vae.z_dim", MAX_CHANNELS),
               .patch_size = weights_size_or(file, "vae.patch_size", 16, 1),
               .num_levels = levels, .temporal_stride = 1, .precision = precision == F32 ? F32 : BF16};
    vae.out_channels = 3 * vae.patch_size * vae.patch_size;
    vae.spatial_stride = vae.patch_size;
    vae.levels = allocate(sizeof *vae.levels * (size_t)levels);
    vae.latents_mean = config_floats(file, "vae.latents_mean", vae.z_dim);
    vae.latents_std = config_floats(file, "vae.latents_std", vae.z_dim);
    bind_middle(file, &vae, dims[levels - 1]);
    bind_levels(file, &vae, dims, weights_size(file, "vae.num_res_blocks", 64));
    vae.head_norm = weights_floats(file, dims[0], "vae.decoder.head.0.gamma");
    vae.head = bind_conv(file, vae.precision, vae.out_channels, dims[0], 3, 3, "decoder.head.2");
    return vae;
}

void vae_free(Vae *vae) {
    for (int i = 0; i < vae->num_levels; i++) free(vae->levels[i].blocks);
    free(vae->levels);
    free((void *)vae->latents_mean);
    free((void *)vae->latents_std);
}

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

/* A convolution within one frame. */
static void spatial_conv(const Vae *vae, const VaeLevel *level, const Conv *conv, const char *in, float *out,
                         int mode) {
    View view = {conv, {in}, 0, vae->zeros, row_bytes(vae->precision, conv->in), level->height,
                 level->width, 0};
    run(&view, out, mode);
}

/* Reads the frame in level->h and its past; then that frame is the past,
 * and level->h the memory of the oldest. */
static void causal_conv(const Vae *vae, VaeLevel *level, Conv *conv, float *out, int mode) {
    View view = {conv, {conv->past[0], conv->past[1], level->h}, 2 - conv->seen, vae->zeros,
                 row_bytes(vae->precision, conv->in), level->height, level->width, 0};
    run(&view, out, mode);
    conv->seen = smaller(conv->seen + 1, 2);
    char *oldest = conv->past[0];
    conv->past[0] = conv->past[1];
    conv->past[1] = level->h;
    level->h = oldest;
}

/* ---------------------------------------------------------------- blocks */

static int pixels_of(const VaeLevel *level) { return level->height * level->width; }

/* level->h from channels [0,n) of pixels that are `stride` floats apart. */
static void narrow(const Vae *vae, VaeLevel *level, const float *x, int stride, int n) {
    narrow_rows(vae->precision, level->h, x, (size_t)stride, pixels_of(level), n);
}

static void norm_silu(const Vae *vae, VaeLevel *level, const float *x, int n, const float *gamma) {
    l2_norm_silu(vae->precision, level->h, x, pixels_of(level), n, gamma);
}

/* level->x becomes the block's output. */
static void residual(const Vae *vae, VaeLevel *level, ResidualBlock *block) {
    int in = block->conv1.in;
    norm_silu(vae, level, level->x, in, block->norm1);
    causal_conv(vae, level, &block->conv1, level->t, REPLACE);
    if (block->shortcut.out) {
        narrow(vae, level, level->x, in, in);
        spatial_conv(vae, level, &block->shortcut, level->h, level->x, REPLACE);
    }
    norm_silu(vae, level, level->t, block->conv1.out, block->norm2);
    causal_conv(vae, level, &block->conv2, level->x, ACCUMULATE);
}

/* One head over the pixels of one frame. */
static void middle_attention(const Vae *vae, VaeLevel *level) {
    int C = vae->proj.in, pixels = pixels_of(level);
    float *qkv = level->wide;
    l2_norm(level->t, level->x, pixels, C, vae->middle_norm);
    narrow(vae, level, level->t, C, C);
    spatial_conv(vae, level, &vae->qkv, level->h, qkv, REPLACE);
    attention(&(Attention){.precision = vae->precision, .q = qkv, .k = qkv + C, .v = qkv + 2 * C,
                           .out = level->t, .queries = pixels, .keys = pixels, .heads = 1, .d = C,
                           .q_stride = 3 * (size_t)C, .kv_stride = 3 * (size_t)C, .out_stride = C,
                           .scale = 1.0f / sqrtf((float)C)});
    narrow(vae, level, level->t, C, C);
    spatial_conv(vae, level, &vae->proj, level->h, level->x, ACCUMULATE);
}

/* ---------------------------------------------------------------- the stream */

typedef struct {
    FrameSink *sink;
    void *to;
} Output;

/* The last level's x -> pixels: channel (c*p + b)*p + a of a pixel is colour c, row a, column b of its patch,
 * as in upstream's unpatchify. */
static void emit(Vae *vae, VaeLevel *level, Output output) {
    int p = vae->patch_size, H = level->height, W = level->width;
    norm_silu(vae, level, level->x, vae->head.in, vae->head_norm);
    causal_conv(vae, level, &vae->head, level->t, REPLACE);
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < H * p; y++)
            for (int x = 0; x < W * p; x++) {
                int channel = (c * p + x % p) * p + y % p;
                float value = level->t[((size_t)(y / p) * W + x / p) * vae->out_channels + channel];
                float *pixel = vae->frame + ((size_t)c * H * p + y) * W * p + x;
                *pixel = value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value; /* no number stays none */
            }
    output.sink(output.to, vae->frame);
}

static void push(Vae *vae, int index, Output output);

/* From channels of this level, `stride` floats apart, doubled, to the next level, and on to the end. */
static void upsample(Vae *vae, int index, const float *x, int stride, Output output) {
    VaeLevel *level = &vae->levels[index], *next = level + 1;
    int C = level->resample.in;
    narrow(vae, level, x, stride, C);
    View view = {&level->resample, {level->h}, 0, vae->zeros, row_bytes(vae->precision, C), next->height,
                 next->width, 1};
    run(&view, next->x, REPLACE);
    push(vae, index + 1, output);
}

/* A frame lies in x of level `index`. */
static void push(Vae *vae, int index, Output output) {
    VaeLevel *level = &vae->levels[index];
    int C = level->resample.in;
    for (int i = 0; i < level->num_blocks; i++) residual(vae, level, &level->blocks[i]);
    if (!level->resample.out) {
        emit(vae, level, output);
    } else if (level->time_conv.out && level->started) {
        narrow(vae, level, level->x, C, C);
        /* two frames, side by side in each pixel */
        causal_conv(vae, level, &level->time_conv, level->wide, REPLACE);
        upsample(vae, index, level->wide, 2 * C, output);
        upsample(vae, index, level->wide + C, 2 * C, output);
    } else {
        level->started = true;
        upsample(vae, index, level->x, C, output);
    }
}

void vae_decode_frame(Vae *vae, const float *latents, int T, int t, FrameSink *sink, void *to) {
    VaeLevel *level = &vae->levels[0];
    int z = vae->z_dim;
    size_t pixels = (size_t)pixels_of(level);
    for (int c = 0; c < z; c++)
        for (size_t i = 0; i < pixels; i++)
            level->t[i * z + c] =
                latents[((size_t)c * T + t) * pixels + i] * vae->latents_std[c] + vae->latents_mean[c];
    narrow(vae, level, level->t, z, z);
    spatial_conv(vae, level, &vae->conv2, level->h, level->t, REPLACE);
    narrow(vae, level, level->t, z, z);
    causal_conv(vae, level, &vae->conv1, level->x, REPLACE);
    residual(vae, level, &vae->middle_0);
    middle_attention(vae, level);
    residual(vae, level, &vae->middle_2);
    push(vae, 0, (Output){sink, to});
}

/* ---------------------------------------------------------------- memory and work */

static char *take_operands(const Vae *vae, Arena *arena, const VaeLevel *level) {
    return arena_take(arena, (size_t)pixels_of(level) * row_bytes(vae->precision, level->channels));
}

static void take_past(const Vae *vae, Arena *arena, Conv *conv, const VaeLevel *level) {
    for (int i = 0; i < 2; i++) conv->past[i] = take_operands(vae, arena, level);
    conv->seen = 0;
}

/* All frames of a level have one size, so that a convolution's input and its oldest past can trade places.
 * Returns the floats of x, and of t. */
static size_t lay_out_level(Vae *vae, Arena *arena, int index, int in) {
    VaeLevel *level = &vae->levels[index];
    int out = level->blocks[0].conv1.out;
    level->channels = (int)larger(in, out);
    level->wide_channels = 2 * level->time_conv.in;
    if (index == 0) {
        level->channels = (int)larger(level->channels, vae->z_dim);
        level->wide_channels = (int)larger(level->wide_channels, vae->qkv.out);
    }
    if (!level->resample.out) level->channels = (int)larger(level->channels, vae->out_channels);
    size_t pixels = (size_t)level->height * level->width;
    level->h = take_operands(vae, arena, level);
    level->wide = arena_floats(arena, pixels * level->wide_channels);
    for (int i = 0; i < level->num_blocks; i++) {
        take_past(vae, arena, &level->blocks[i].conv1, level);
        take_past(vae, arena, &level->blocks[i].conv2, level);
    }
    if (level->time_conv.out) take_past(vae, arena, &level->time_conv, level);
    level->started = false;
    return pixels * level->channels;
}

/* Only one level works at a time, and hands on nothing but the next one's x: all share one x and one t. */
void vae_decode_start(Vae *vae, Arena *arena, int H, int W) {
    int channels = vae->z_dim, in = vae->conv1.out;
    size_t floats = 0;
    for (int i = 0; i < vae->num_levels; i++) {
        VaeLevel *level = &vae->levels[i];
        level->height = H << i;
        level->width = W << i;
        floats = larger(floats, lay_out_level(vae, arena, i, in));
        channels = (int)larger(channels, level->channels);
        in = level->resample.out;
    }
    float *x = arena_floats(arena, floats), *t = arena_floats(arena, floats);
    for (int i = 0; i < vae->num_levels; i++) vae->levels[i].x = x, vae->levels[i].t = t;
    VaeLevel *first = &vae->levels[0], *last = &vae->levels[vae->num_levels - 1];
    Conv *early[] = {&vae->conv1, &vae->middle_0.conv1, &vae->middle_0.conv2, &vae->middle_2.conv1,
                     &vae->middle_2.conv2};
    for (size_t i = 0; i < sizeof early / sizeof *early; i++) take_past(vae, arena, early[i], first);
    take_past(vae, arena, &vae->head, last);
    vae->zeros = arena_take(arena, row_bytes(vae->precision, channels));
    vae->frame =
        arena_floats(arena, 3 * (size_t)last->height * last->width * vae->patch_size * vae->patch_size);
}

size_t vae_decode_memory(Vae *vae, int H, int W) {
    Arena count = {0};
    vae_decode_start(vae, &count, H, W);
    return count.used;
}

/* Over `frames` frames of `area` pixels, of which a convolution over time sees fewer at the start. */
static double conv_flops(const Conv *conv, double frames, double area) {
    double missing = conv->kt == 3 ? (frames > 1 ? 3 : 2) : 0;
    double seen = conv->kt ? (frames * conv->kt - missing) / conv->kt : 0;
    return 2.0 * seen * area * conv->layer.weight.rows * conv->layer.weight.cols;
}

static double block_flops(const ResidualBlock *block, double frames, double area) {
    return conv_flops(&block->conv1, frames, area) + conv_flops(&block->conv2, frames, area) +
           conv_flops(&block->shortcut, frames, area);
}

double vae_decode_flops(const Vae *vae, int T, int H, int W) {
    double frames = T, area = (double)H * W;
    double sum = conv_flops(&vae->conv2, frames, area) + conv_flops(&vae->conv1, frames, area) +
                 conv_flops(&vae->qkv, frames, area) + conv_flops(&vae->proj, frames, area) +
                 block_flops(&vae->middle_0, frames, area) + block_flops(&vae->middle_2, frames, area) +
                 4.0 * frames * area * area * vae->proj.in;
    for (int i = 0; i < vae->num_levels; i++, area *= 4) {
        const VaeLevel *level = &vae->levels[i];
        for (int j = 0; j < level->num_blocks; j++) sum += block_flops(&level->blocks[j], frames, area);
        if (level->time_conv.out) {
            if (frames > 1) sum += conv_flops(&level->time_conv, frames - 1, area);
            frames = 2 * frames - 1;
        }
        if (level->resample.out) sum += conv_flops(&level->resample, frames, 4 * area);
        else sum += conv_flops(&vae->head, frames, area);
    }
    return sum;
}
