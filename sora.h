/* sora.h - text to video, the stages in the order in which data flows through them.
 *
 *   prompt -> tokenizer.c -> ids -> text_encoder.c -> embeds ---+
 *   seed -> engine/arithmetic/noise.c -> noise -> latents -> transformer.c -> velocity -> sampler.c -> latents
 *                                                 (steps times)
 *   latents -> vae.c -> frames -> y4m.c -> file
 *
 * pipeline.c strings them together; sora.c is the command line.
 *
 * Glossary of dimension letters, here, in shape comments, in Python and in tests:
 *   C T H W   latent channels, frames, height, width  F Y X   video frames, rows, columns
 *   n         prompt tokens with the closing </s>     N       text positions that the transformer sees (512)
 *   L         video tokens, ordered (t, h, w)         D       transformer width (dim)
 *   h d       attention heads, width of one head      E       text encoder width (text_dim)
 *   I O       inputs and outputs of a product         K       length of a product's sum
 */
#ifndef SORA_H
#define SORA_H

#include "engine/engine.h"

#define SORA_VERSION "0.1.0"
#define FORMAT_VERSION 1 /* of weight files, as export.py writes it */

/* ---------------------------------------------------------------- prompt.c: what was typed -> clean text */

/* diffusers' prompt_clean without ftfy's guesses: HTML entities, curly quotes, Unicode white space. The
 * result is valid UTF-8 (U+FFFD stands for what was not); free() its data. */
Bytes prompt_clean(Bytes prompt);

/* ---------------------------------------------------------------- tokenizer.c: clean text -> ids */

typedef struct Tokenizer Tokenizer;
/* NULL, or why the file's tokenizer cannot be used. Reads the file's bytes where they lie. */
const char *tokenizer_load(const WeightFile *file, Tokenizer **out);
void tokenizer_free(Tokenizer *tokenizer);
/* ids [n], n <= limit, the last one </s>, of a text as it is (clean it first). Returns n. */
int tokenizer_encode(const Tokenizer *tokenizer, Bytes text, int32_t *ids, int limit);

/* ---------------------------------------------------------------- text_encoder.c: ids -> embeds (umT5) */

typedef struct {
    const float *norm1, *norm2;          /* (E) */
    Linear q, k, v, o;                   /* (heads*d, E), o (E, heads*d); no biases */
    const float *pos_embedding;          /* (buckets, heads) */
    Linear gate, fc1, fc2;               /* (ffn_dim, E) twice, (E, ffn_dim) */
} TextBlock;

typedef struct {
    int vocab_size, dim, ffn_dim, num_heads, head_dim, num_layers, num_buckets, max_distance;
    float eps;
    Precision precision; /* of its products */
    Weight token_embedding; /* (vocab_size, E) */
    TextBlock *blocks;
    const float *norm; /* (E) */
} TextEncoder;

TextEncoder text_encoder_load(const WeightFile *file, Precision precision);
void text_encoder_free(TextEncoder *encoder);
size_t text_encoder_memory(const TextEncoder *encoder, int n); /* bytes while it runs */
double text_encoder_flops(const TextEncoder *encoder, int n);
void text_encode(const TextEncoder *encoder, const int32_t *ids, int n, float *embeds); /* embeds (n,E) */

/* --------------------------------------------------------------- transformer.c: latents, text -> velocity */

typedef struct {
    Linear q, k, v, o;            /* (D,D) */
    const float *norm_q, *norm_k; /* (D), over all heads at once */
} AttentionLayers;

typedef struct {
    AttentionLayers self_attn, cross_attn;
    const float *norm3_weight, *norm3_bias; /* (D) */
    Linear ffn_0, ffn_2;
    const float *modulation; /* (6,D) */
} TransformerBlock;

typedef struct {
    int dim, ffn_dim, freq_dim, in_dim, out_dim, num_heads, num_layers, text_len, text_dim, patch_size[3];
    float eps;
    Precision precision; /* of the blocks' products */
    Linear patch_embedding, text_embedding_0, text_embedding_2, time_embedding_0, time_embedding_2,
           time_projection_1;
    TransformerBlock *blocks;
    Linear head;
    const float *head_modulation; /* (2,D) */
} Transformer;

Transformer transformer_load(const WeightFile *file, Precision precision);
void transformer_free(Transformer *transformer);

/* What a prompt is to the transformer: the keys and values of every block's cross attention. The zero padding
 * up to text_len gives the same key and value again and again: it is kept once, and counted by its bias. */
typedef struct {
    int positions;        /* n, and one for the padding if n < text_len */
    float *bias;          /* (positions): 0, and log(text_len - n) for the padding */
    float *keys, *values; /* (num_layers, positions, D) */
} TextContext;
TextContext text_context_take(Arena *arena, const Transformer *transformer, int n);
/* embeds (n, text_dim), of the n that the context was taken for. */
void transformer_read(const Transformer *transformer, const float *embeds, int n, TextContext *context);

/* What a forward pass needs besides weights: positions, and room to compute in. */
typedef struct {
    int T, H, W, L;       /* of the latents; tokens */
    float *cosine, *sine; /* (L, d/2) */
    float *x, *y;         /* (L,D) */
    float *wide;          /* (L, the widest of q k v, ffn and patches) */
    float *time, *modulation, *e; /* (D), (6,D), (6,D) */
} TransformerState;
TransformerState transformer_state_take(Arena *arena, const Transformer *transformer, int T, int H, int W);
/* What the transformer is told of a timestep: cosines, then sines (freq_dim). */
void timestep_sinusoids(float *out, int freq_dim, float timestep);
double transformer_flops(const Transformer *transformer, int L, int positions); /* of one forward pass */
/* velocity (out_dim,T,H,W) from latents (in_dim,T,H,W) at a timestep in [0,1000]. */
void transformer_forward(const Transformer *transformer, TransformerState *state, const TextContext *context,
                         const float *latents, float timestep, float *velocity);

/* ---------------------------------------------------------------- sampler.c: velocity -> next latents */

typedef enum { UNIPC, EULER, DPM, SAMPLERS } Sampler;
bool sampler_parse(const char *name, Sampler *out); /* "unipc", "euler" or "dpm++"; false for any other */
const char *sampler_name(Sampler sampler);

typedef struct {
    Sampler sampler;
    int steps;
    float *sigmas;    /* [steps + 1], falling from 1 or little less to 0 */
    float *timesteps; /* [steps], what the transformer is told */
} Schedule;
/* As the scheduler of diffusers; shift > 0, steps >= 1, train_timesteps is 1000 in every released model. */
Schedule schedule_make(Sampler sampler, int steps, double shift, int train_timesteps);
void schedule_free(Schedule *schedule);

/* What a sampler remembers of earlier steps. */
typedef struct {
    size_t n;      /* elements of the latents */
    float *x0[3];  /* guesses of the clip, this step's first */
    float *sample; /* latents from which the last step set out */
} History;
History history_take(Arena *arena, size_t n);
/* latents [n] move from sigmas[step] to sigmas[step + 1]. Steps go upwards from 0, which forgets the past. */
void sampler_step(const Schedule *schedule, int step, const float *velocity, float *latents,
                  History *history);

/* ----------------------------------------------------------- vae.c: latents -> frames (the causal 3D VAE) */

/* A causal convolution and its past: what it saw in the two frames before, if there were any. */
typedef struct {
    Linear layer; /* (O, kt*kh*kw*I), taps outermost */
    int kt, kh, kw, in, out;
    char *past[2]; /* frames of row operands, older first */
    int seen;      /* frames of it that have been, at most two */
} Conv;

typedef struct {
    const float *norm1, *norm2;        /* residual.0.gamma, residual.3.gamma */
    Conv conv1, conv2, shortcut;       /* residual.2, residual.6, shortcut (out == 0: none) */
} ResidualBlock;

/* One resolution of the decoder: residual blocks, then, but for the last, an upsampling to the next one. */
typedef struct {
    int num_blocks;
    ResidualBlock *blocks;
    Conv time_conv, resample; /* out == 0: none */
    bool started;             /* time_conv lets the clip's first frame pass */
    int height, width, channels, wide_channels;
    float *x, *t;             /* (height*width, channels), the same memory on every level */
    float *wide;              /* (height*width, wide_channels) */
    char *h;                  /* what a convolution reads: a row operand for each pixel */
} VaeLevel;

typedef struct {
    int z_dim, out_channels, patch_size, num_levels, temporal_stride, spatial_stride;
    const float *latents_mean, *latents_std; /* (z_dim) */
    Conv conv2, conv1, qkv, proj, head;
    ResidualBlock middle_0, middle_2;
    const float *middle_norm, *head_norm; /* middle.1.norm.gamma, head.0.gamma */
    VaeLevel *levels;
    Precision precision;  /* F32 or BF16 */
    char *zeros;          /* a pixel outside the image */
    float *frame;         /* the decoded frame [3,Y,X] */
} Vae;

Vae vae_load(const WeightFile *file, Precision precision);
void vae_free(Vae *vae);
size_t vae_decode_memory(Vae *vae, int H, int W); /* not once it has started */
double vae_decode_flops(const Vae *vae, int T, int H, int W);

typedef void FrameSink(void *to, float *frame); /* frame [3,Y,X] in [-1,1], to be overwritten at will */
/* Lays out the decoder for latents of H x W; the past is empty. */
void vae_decode_start(Vae *vae, Arena *arena, int H, int W);
/* Decodes frame t of latents (z_dim,T,H,W) and hands every video frame that follows to the sink at once: one
 * for the clip's first, temporal_stride for each later. Frames must come in order. */
void vae_decode_frame(Vae *vae, const float *latents, int T, int t, FrameSink *sink, void *to);

/* ---------------------------------------------------------------- y4m.c: frames -> file */

typedef struct {
    int width, height;
    int rate_num, rate_den; /* frames a second */
    int chroma;             /* 420 or 444 when writing; reading also 422 and 400 (mono) */
} VideoFormat;

/* Planes of 8 bits, BT.601 limited range, from a frame [3,Y,X] of floats in [-1,1];
 * out has y4m_frame_bytes(). */
size_t y4m_frame_bytes(const VideoFormat *format);
void y4m_convert(const VideoFormat *format, const float *frame, uint8_t *out);
/* The header line with its newline, at most 79 bytes, since some readers stop there; returns its length. */
size_t y4m_header(const VideoFormat *format, char out[80]);

typedef struct Y4mReader Y4mReader;
const char *y4m_open(Bytes bytes, Y4mReader **out, VideoFormat *format); /* bytes stay the caller's */
/* Next frame as floats [3,Y,X] in [-1,1]; *end is set after the last one. */
const char *y4m_next(Y4mReader *reader, float *frame, bool *end);
void y4m_close(Y4mReader *reader);

/* ---------------------------------------------------------------- preview.c: frames -> a colour terminal */

typedef struct {
    int columns, rows; /* of character cells, each two pixels high */
} PreviewSize;
/* The largest picture of a frame's shape, no larger than the frame, in so many cells. */
PreviewSize preview_fit(int width, int height, int columns, int rows);
size_t preview_room(PreviewSize size); /* bytes that preview_render may write */
/* Lines of half blocks from a frame [3,Y,X] in [-1,1]; returns the bytes written. */
size_t preview_render(const float *frame, int width, int height, PreviewSize size, bool true_colour,
                      char *out);

typedef struct {
    bool enabled, true_colour;
    PreviewSize drawn; /* what stands on the screen: no rows before the first frame */
    double start;      /* when frame 0 was due */
} Preview;
/* On standard error; not enabled, after a warning, where that is no terminal or wants no colours. */
Preview preview_open(void);
/* Draws a clip's frame `index` over the one before, no sooner than the clip's rate has it; nothing where the
 * preview is not enabled or the window too small. */
void preview_frame(Preview *preview, const VideoFormat *format, const float *frame, int index);

/* ---------------------------------------------------------------- pipeline.c: the stages on one string */

/* What one run is asked to do. The command line fills in what was given; settings_complete() takes the rest
 * from the model's own defaults. */
typedef struct {
    const char *prompt, *negative, *output, *noise;
    int width, height, frames, fps_num, fps_den, steps, chroma; /* 0: not given */
    double seconds, guidance, shift;                            /* negative: not given */
    Sampler sampler;                                            /* SAMPLERS: not given */
    uint64_t seed;
    bool quiet, record, record_prompt, preview, feed;
} Settings;

typedef struct {
    WeightFile *file;
    Precision precision;
    Tokenizer *tokenizer;
    TextEncoder text_encoder;
    Transformer transformer;
    Vae vae;
} Model;

/* AUTOMATIC is the file's own (default.precision); without one, F32 for float32 weights, and for narrower ones
 * the fastest that the processor has. */
Model model_load(const char *path, Precision precision);
void model_free(Model *model);
void settings_complete(Settings *settings, const Model *model);
/* Cleaned, at most text_len ids with the closing </s>. Returns their number. */
int prompt_ids(const Model *model, const char *prompt, int32_t *ids);
void generate(Model *model, const Settings *settings);

/* ---------------------------------------------------------------- record.c: what made the file, beside it */

char *record_path(const Settings *settings); /* OUTPUT.json, a new string */
/* Writes and commits it: settings that make the same file again, and hashes of what went in and came out;
 * noise_sha256: of the file of --noise, if that was given. */
void record_write(OutputFile *file, const Model *model, const Settings *settings, const char *noise_sha256,
                  const char *y4m_sha256);

#endif
