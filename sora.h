/* sora.h - text to video: the stages, in the order in which data flows through them, except that a type stands before
 * its users.
 *
 *   prompt -> prompt.c -> tokenizer.c -> ids -> text_encoder.c -> embeds ----------+
 *                                                                                  v
 *   seed -> engine/arithmetic/noise.c -> latents --+--> transformer.c (reads cache.c) -> velocity
 *                                                  ^                                        |
 *                                                  +---------------- sampler.c <------------+   once a step
 *   latents -> vae.c -> frames -> y4m.c -> file
 *   file -> picture.c -> frames -> vae.c -> latents, which a clip may begin from
 *
 * model.c loads a weight file and completes a run's settings from it. plan.c, start.c, pipeline.c and video.c run the
 * stages (pipeline.h). sora.c is the command line.
 *
 * Dimension letters, the same in shape comments, in Python and in tests:
 *   C T H W   latent channels, frames, height, width  F Y X   video frames, rows, columns
 *   n         prompt tokens with the closing </s>     E       text encoder width (text_dim)
 *   L         video tokens, ordered (t, h, w)         D       transformer width (dim)
 *   h d       attention heads, width of one head      K       length of a dot product
 *   I O       inputs and outputs of a linear layer
 *
 * Arrays are float32, row-major, the last letter innermost. Functions named *_take allocate from an arena. Given an
 * arena without memory they only count, which tells the size before the run (engine.h). Functions named *_flops count a
 * multiplication and an addition as two operations. *_memory and *_scratch are in bytes. *_load dies with STATUS_USAGE
 * if the file does not hold the part. */
#ifndef SORA_H
#define SORA_H

#include "engine/engine.h"

#define SORA_VERSION "0.1.0"
#define FORMAT_VERSION 1 /* of the weight files that export.py writes (key sora.format_version) */

/* ---------------------------------------------------------------- prompt.c: typed text -> clean text */

/* Cleans a prompt as upstream does, with ftfy (except its repair of wrong encodings) and html.unescape. Runs of white
 * space become one space. Bytes that are not UTF-8 become U+FFFD. Returns new UTF-8: free() its data. */
Bytes prompt_clean(Bytes prompt);

/* ---------------------------------------------------------------- story.c: prompts with start times */

typedef struct {
    double time; /* seconds; the prompt holds from here on */
    char *line;  /* the whole line, time included */
    const char *text;
} StoryLine;

typedef struct {
    int count;
    StoryLine *lines; /* [count], strictly increasing times */
} Story; /* begins as {0} */

/* Adds one line, "TIME TEXT". Returns NULL, or the error: a bad time, no text, or a time not after the last line's. */
const char *story_add(Story *story, Bytes line);
/* Adds a file's lines; skips blank lines and # comments. Returns NULL, or the error with its line number. */
const char *story_parse(Story *story, Bytes text);
void story_free(Story *story);

/* ---------------------------------------------------------------- tokenizer.c: clean text -> ids */

typedef struct Tokenizer Tokenizer;
/* Returns NULL, or the error. The tokenizer points into the file: close the file after it. */
const char *tokenizer_load(const WeightFile *file, Tokenizer **out);
void tokenizer_free(Tokenizer *tokenizer); /* accepts NULL */
/* Writes ids [n] of clean text, n <= limit; the last id is </s>. Longer text is cut. Returns n. */
int tokenizer_encode(const Tokenizer *tokenizer, Bytes text, int32_t *ids, int limit);

/* ---------------------------------------------------------------- text_encoder.c: ids -> embeds (umT5) */

typedef struct {
    const float *norm1, *norm2;          /* (E) */
    Linear q, k, v, o;                   /* q k v (heads*d, E), o (E, heads*d); no biases */
    const float *pos_embedding;          /* (num_buckets, heads) */
    Linear gate, fc1, fc2;               /* gate and fc1 (ffn_dim, E), fc2 (E, ffn_dim) */
} TextBlock;

typedef struct {
    int vocab_size, dim, ffn_dim, num_heads, head_dim, num_layers, num_buckets, max_distance;
    float eps;
    Precision precision;    /* of the linear layers: F32 or BF16 */
    Weight token_embedding; /* (vocab_size, E) */
    TextBlock *blocks;      /* [num_layers] */
    const float *norm;      /* (E) */
} TextEncoder;

TextEncoder text_encoder_load(const WeightFile *file, Precision precision);
void text_encoder_free(TextEncoder *encoder);
size_t text_encoder_memory(const TextEncoder *encoder, int n);  /* activations */
size_t text_encoder_scratch(const TextEncoder *encoder, int n); /* besides: linear layers and attention */
double text_encoder_flops(const TextEncoder *encoder, int n);
/* embeds (n,E) from ids [n]. Dies with STATUS_USAGE on an id outside the vocabulary. */
void text_encode(const TextEncoder *encoder, const int32_t *ids, int n, float *embeds);

/* --------------------------------------------------------------- transformer.c: latents, text -> velocity */

typedef struct {
    Linear q, k, v, o;            /* (D,D) */
    const float *norm_q, *norm_k; /* (D): RMS norm over all heads at once */
} AttentionLayers;

typedef struct {
    AttentionLayers self_attn, cross_attn;
    const float *norm3_weight, *norm3_bias; /* (D) */
    Linear ffn_0, ffn_2;                    /* (ffn_dim,D), (D,ffn_dim) */
    const float *modulation;                /* (6,D): shift, scale, gate of self attention, then of the FFN */
} TransformerBlock;

typedef struct {
    int dim, ffn_dim, freq_dim, in_dim, out_dim, num_heads, num_layers, text_len, text_dim, patch_size[3];
    float eps;
    Precision precision; /* of the blocks' linear layers; all other layers are F32 */
    Linear patch_embedding, text_embedding_0, text_embedding_2, time_embedding_0, time_embedding_2,
           time_projection_1;
    TransformerBlock *blocks;     /* [num_layers] */
    Linear head;                  /* (patch*out_dim, D) */
    const float *head_modulation; /* (2,D): shift, scale */
} Transformer;

/* prefix: of the tensors' names, "" or "transformer_2." */
Transformer transformer_load(const WeightFile *file, Precision precision, const char *prefix);
void transformer_free(Transformer *transformer);

/* A prompt as the transformer reads it: keys and values of cross attention in every block, computed once a prompt.
 * Upstream pads the text with zeros to text_len positions, without a mask. All padded positions have the same key and
 * value, so one of them is stored and its attention score gets the bias log(text_len - n). */
typedef struct {
    int positions;        /* n, plus 1 for the padding if n < text_len */
    float *bias;          /* (positions): 0, and log(text_len - n) for the padding */
    float *keys, *values; /* (num_layers, positions, D) */
} TextContext;
TextContext text_context_take(Arena *arena, const Transformer *transformer, int n);
/* Fills a context that was taken for n tokens from embeds (n, text_dim). */
void text_context_fill(const Transformer *transformer, const float *embeds, int n, TextContext *context);
size_t text_context_fill_memory(const Transformer *transformer, int n);  /* buffers of that call */
size_t text_context_fill_scratch(const Transformer *transformer, int n); /* besides: linear layers */

/* The latent frames of one forward pass. A model that does not generate in chunks has one chunk, the whole clip.
 * Latents are frame-major in memory, (T,C,H,W), so that a chunk is contiguous; dumped tensors and --noise are
 * [C,T,H,W]. */
typedef struct {
    int first, frames;      /* frames [first, first + frames) of the clip */
    const float *timesteps; /* [frames], each in [0,1000] */
} Chunk;

typedef struct KvCache KvCache;

/* Some of the channels that a forward pass reads. */
typedef struct {
    int channels;
    const float *values; /* (frames,channels,H,W) */
} Planes;

/* Buffers of a forward pass, and the RoPE angles of its positions. */
typedef struct {
    int H, W, tokens;      /* height and width of the latents; tokens in a frame */
    Rope rope;             /* rope.time is filled anew in every pass */
    float *x, *y;          /* (L,D) */
    float *wide;           /* in turn: patches; q, k and v; the FFN's hidden layer (L,ffn_dim) */
    void *narrow;          /* rows of (L,D) or (L,ffn_dim) for the next product, unless in float32 */
    float *time;           /* (frames,D): time embedding */
    float *modulation;     /* (frames,6,D): projection of the time embedding */
    float *e;              /* (6,frames,D): that plus a block's own modulation */
} TransformerState;
/* `frames`: the most in one pass. `seen`: the most that self attention reads, cached ones and the pass's own. */
TransformerState transformer_state_take(Arena *arena, const Transformer *transformer, int frames, int seen, int H,
                                        int W);
void rope_angles(float *angles, int pos, int pairs); /* (2,pairs) of one position on one axis: cosines, then sines */
void timestep_sinusoids(float *out, int freq_dim, float timestep); /* (freq_dim): cosines, then sines */
/* Of one pass of L tokens, with `keys` keys in self attention and `positions` text positions. */
double transformer_flops(const Transformer *transformer, int L, int keys, int positions);
size_t transformer_scratch(const Transformer *transformer, int frames, int L, int keys, int positions);
/* velocity (frames,out_dim,H,W) of the chunk. input: planes that have in_dim channels in all, the latents first. First
 * drops the frames that have left the cache's window. Leaves the chunk's keys and values in the cache, where the next
 * pass overwrites them unless kv_cache_keep() is called in between. */
void transformer_forward(const Transformer *transformer, TransformerState *state, const TextContext *text,
                         KvCache *cache, const Chunk *chunk, const Planes *input, float *velocity);

/* ---------------------------------------------------------------- cache.c: keys and values of earlier frames */

typedef struct StateFile StateFile; /* state.c */

/* Which latent frames self attention sees, and which positions RoPE gives them. cache.c has a drawing. */
typedef struct {
    int size;      /* frames seen in all: sink, earlier frames and the chunk itself */
    int sink;      /* the clip's first frames, which are never dropped; part of `size` */
    bool relative; /* positions count from the start of the window; else from the start of the clip */
} Window;

struct KvCache {
    Window window;
    int layers, tokens, D;
    int capacity, frames; /* frames that fit; frames that are kept, oldest first. Capacity 0: nothing is cached */
    int *frame_numbers;   /* [capacity]: the number in the clip of each kept frame */
    Type type;            /* TYPE_F32 or TYPE_BF16 */
    char *keys, *values;  /* (layers, capacity, tokens, D): keys before RoPE */
};
KvCache kv_cache_take(Arena *arena, const Transformer *transformer, Window window, int capacity, int tokens, Type type);
/* Drops the oldest frames after the sink until `frames` more fit. */
void kv_cache_make_room(KvCache *cache, int frames);
/* Reads one block's keys and values of all kept frames, (frames*tokens, D) each. */
void kv_cache_read(const KvCache *cache, int block, float *keys, float *values);
/* Writes one block's keys and values of `frames` new frames behind the kept ones, (frames*tokens, D) each. */
void kv_cache_write(KvCache *cache, int block, const float *keys, const float *values, int frames);
void kv_cache_keep(KvCache *cache, const Chunk *chunk); /* keeps the frames that the last pass wrote */
void kv_cache_drop(KvCache *cache, int from, int count); /* drops kept frames [from, from + count) */
/* RoPE position in time of frame j of a pass: the kept frames come first, then the chunk's own. */
int kv_cache_position(const KvCache *cache, const Chunk *chunk, int j);
void kv_cache_state(KvCache *cache, StateFile *file); /* the kept frames */

/* ---------------------------------------------------------------- sampler.c: velocity -> next latents */

/* UNIPC, EULER and DPM make a schedule of any length. RENOISE and EULER can follow a list that comes with the model.
 * SAMPLERS is the number of the first three; in Settings it means that no sampler was given. */
typedef enum { UNIPC, EULER, DPM, SAMPLERS, RENOISE } Sampler;
bool sampler_parse(const char *name, Sampler *out); /* "unipc", "euler" or "dpm++"; false for any other name */
const char *sampler_name(Sampler sampler);

typedef struct {
    Sampler sampler;
    int steps;
    float *sigmas;    /* [steps + 1]: noise levels, falling from 1 (or just below) to 0 */
    float *timesteps; /* [steps]: the transformer's input for each step */
} Schedule;
/* The schedule of diffusers' scheduler of that name. shift > 0, steps >= 1; train_timesteps is 1000 in every released
 * model. */
Schedule schedule_make(Sampler sampler, int steps, double shift, int train_timesteps);
/* A schedule from a list: timesteps [steps] and sigmas [steps], to which the last sigma, 0, is appended. */
Schedule schedule_of(Sampler sampler, int steps, const float *timesteps, const float *sigmas);
char *schedule_string(const Schedule *schedule); /* the timesteps, as "1000 937.5 833.333313 625"; free() it */
int steps_in_part(int steps, double part); /* int(steps * part), at most all */
/* The last steps_in_part() steps; sigmas and timesteps are still the schedule's. */
Schedule schedule_end(const Schedule *schedule, double part);
void schedule_free(Schedule *schedule);

/* What multistep samplers keep from earlier steps. */
typedef struct {
    size_t n;      /* elements of the latents */
    float *x0[3];  /* predictions of x0: of this step, of one and of two steps ago */
    float *sample; /* the latents before the last step */
} History;
History history_take(Arena *arena, size_t n);
bool sampler_needs_noise(const Schedule *schedule, int step);
/* Moves latents [n] from sigmas[step] to sigmas[step + 1] by velocity [n]. Call it with step = 0, 1, 2, ...; step 0
 * ignores the history. noise [n] is read only if sampler_needs_noise(). */
void sampler_step(const Schedule *schedule, int step, const float *velocity, float *latents, History *history,
                  const float *noise);
void history_state(History *history, StateFile *file);

/* ---------------------------------------------------------------- easycache.c: a velocity without the transformer */

/* What is kept of earlier steps. Arrays are (frames,C,H,W). */
typedef struct {
    size_t n;             /* elements of an array */
    float *latest;        /* latents of the last step */
    float *x;             /* those of the last computed step */
    float *cond, *uncond; /* the branches' velocities at that step; uncond only with guidance */
    double rate;          /* change of the velocity by change of the latents, at the last computed step */
    double error;         /* change that was left out since then, relative to the velocity */
    int known;            /* computed steps so far, at most 2: from 2 on there is a rate */
} EasyCache;
enum { EASYCACHE_FIRST = 10 }; /* steps that are always computed; the last step is, too */
EasyCache easycache_take(Arena *arena, size_t n, bool guided);
/* Whether the step can be left out, given its latents x. Call it once for every step, in order. */
bool easycache_leaves_out(EasyCache *cache, double most, int step, int steps, const float *x);
/* Call it after a computed step. uncond may be NULL. */
void easycache_keep(EasyCache *cache, const float *x, const float *cond, const float *uncond);
/* The velocities of a step that is left out. uncond may be NULL. */
void easycache_velocity(const EasyCache *cache, const float *x, float *cond, float *uncond);
void easycache_state(EasyCache *cache, bool guided, StateFile *file);

/* ---------------------------------------------------------------- state.c: a run on disk, for --resume */

char *state_path(const char *output); /* OUTPUT.state, a new string */
StateFile *state_create(const char *path);                 /* for writing; errors are reported by state_commit() */
const char *state_commit(StateFile *file);                 /* NULL; or the reason, and the old file stays */
const char *state_open(const char *path, StateFile **out); /* for reading, checksum verified; NULL or the reason */
const char *state_parse(Bytes bytes, StateFile **out);     /* the same from memory; the bytes stay the caller's */
const char *state_close(StateFile *file);                  /* after reading: NULL or the first mismatch */
/* Reads a state's command line: arguments, each followed by a 0 byte. */
const char *state_arguments(const char *path, Text *out);

/* These functions write to a created file and read from an opened one. After an error in reading they do nothing. */
bool state_is_read(const StateFile *file);
const char *state_fault(const StateFile *file); /* the error in reading so far, or NULL */
void state_refuse(StateFile *file, const char *format, ...) PRINTF_LIKE(2, 3); /* adds an error of the caller's */
void state_item(StateFile *file, const char *name, void *data, size_t bytes);
/* Writes `value` and returns it, or reads and returns a number from `least` to `most`. */
int64_t state_number(StateFile *file, const char *name, int64_t value, int64_t least, int64_t most);
/* Writes `mine` and returns it, or returns the bytes of the file, of any length. */
Bytes state_bytes(StateFile *file, const char *name, Bytes mine);
/* Writes `mine` and returns true, or returns whether the file has the same bytes. */
bool state_same(StateFile *file, const char *name, const void *mine, size_t bytes);
/* SHA-256 of the results of one small call of each kind of kernel. It differs where a build or processor rounds
 * differently. */
void arithmetic_digest(Precision precision, char hex[65]);

/* ----------------------------------------------------------- vae.c: frames <-> latents (the causal 3D VAE) */

typedef struct {
    Linear layer;            /* (O, kt*kh*kw*I), input channels innermost */
    int kt, kh, kw, in, out; /* kernel size, channels; out 0: the layer has no such convolution */
    int up, stride;          /* 1 or 2: nearest-neighbour upsampling of the input; stride of the output */
} Conv;

/* Each half is a list of layers, and the tiny decoder is one. What each kind does with a frame x (pixels, channels): */
typedef enum {
    CONVOLUTION,    /* x = conv1(x), or conv1(silu(norm1(x))) if there is a norm1 */
    RESIDUAL,       /* x = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))) */
    ATTENTION,      /* x = x + conv2(attention(conv1(norm1(x)))), over the pixels of the frame */
    MEMORY,         /* x = relu(x + conv3(relu(conv2(relu(conv1(x, x of the frame before)))))) */
    RELU,           /* x = max(x, 0) */
    UPSAMPLE_TIME,  /* two frames of conv1(x); if kt is 3, the clip's first frame passes unchanged, as one frame */
    DOWNSAMPLE_TIME, /* one frame of conv1 of two; the clip's first frame passes unchanged */
    KEEP_FRAME,     /* keeps x for the ADD_MEANS or ADD_COPIES at index `partner` */
    ADD_MEANS,      /* x = x + means of what was kept, over pixels, frames and channels */
    ADD_COPIES      /* x = x + copies of what was kept */
} VaeLayerKind;

/* A way past the layers between KEEP_FRAME and ADD_...: space is 2 if they halve or double height and
 * width, time if they do so with frames. */
typedef struct {
    int partner, in, out, time, space;
} Shortcut;

typedef struct {
    VaeLayerKind kind;
    const float *norm1, *norm2; /* (I) of conv1 and conv2, or NULL */
    Conv conv1, conv2, conv3, shortcut;
    Shortcut past; /* of KEEP_FRAME, ADD_MEANS and ADD_COPIES */
} VaeLayer;

typedef struct {
    int count;
    VaeLayer *layers; /* [count] */
} VaeLayers;

typedef enum { ENCODER, DECODER, TINY, HALVES } VaeHalf; /* TINY: another decoder, if the file has it */

typedef struct {
    int z_dim, patch_size, temporal_stride, spatial_stride; /* strides: video frames and pixels per latent */
    const float *latents_mean, *latents_std;                /* (z_dim) */
    VaeLayers halves[HALVES];
    Precision precision; /* F32 or BF16 */
} Vae;

Vae vae_load(const WeightFile *file, Precision precision);
void vae_free(Vae *vae);

/* Takes one frame that comes out of a half, which it may overwrite. `to` comes from vae_open(). */
typedef void FrameSink(void *to, float *frame);

/* A half at work: its buffers, and the frames that causal convolutions keep. H, W: size of the latents. */
typedef struct VaeStream VaeStream;
VaeStream *vae_open(const Vae *vae, VaeHalf half, int H, int W, FrameSink *sink, void *to);
size_t vae_memory(const Vae *vae, VaeHalf half, int H, int W);  /* while it is open */
size_t vae_scratch(const Vae *vae, VaeHalf half, int H, int W); /* besides, in vae_push(): convolutions and attention */
double vae_flops(const Vae *vae, VaeHalf half, int frames, int H, int W); /* of so many frames that go in */
/* Takes the clip's next frame, and hands each frame that comes out to the sink as soon as it is ready.
 * DECODER: in, a normalised latent frame (z_dim,H,W); out, video frames [3,Y,X] clamped to [-1,1]: 1 for the clip's
 * first latent frame, temporal_stride for every later one. TINY: the same. ENCODER: the way back; a latent frame comes
 * out after the clip's first video frame and after every temporal_stride of the later ones. */
void vae_push(VaeStream *stream, const float *frame);
void vae_stream_state(VaeStream *stream, StateFile *file); /* between two frames that go in */
void vae_close(VaeStream *stream); /* accepts NULL */

/* ---------------------------------------------------------------- y4m.c: frames -> file, and back */

typedef struct {
    int width, height;
    int rate_num, rate_den; /* frames a second, as a fraction */
    int chroma;             /* 420 or 444; the reader also gives 422 and 400 (mono) */
} VideoFormat;

uint8_t byte_of(float x); /* the nearest from 0 to 255; of NaN 0 */
bool y4m_is_bt709(const VideoFormat *format); /* the colour matrix, by size, as players assume; else it is BT.601 */
size_t y4m_frame_bytes(const VideoFormat *format);
/* Planes Y, Cb, Cr of 8 bits in limited range, y4m_frame_bytes() in all, from a frame [3,Y,X] in [-1,1]. */
void y4m_convert(const VideoFormat *format, const float *frame, uint8_t *out);
/* The header line with its newline: at most 79 bytes, because some readers stop there. Returns its length. */
size_t y4m_header(const VideoFormat *format, char out[80]);

typedef struct Y4mReader Y4mReader;
/* Reads the header and the first frame of a stream, which stays the caller's. Returns NULL and a reader, or the error.
 * The reader holds no more than one frame, and adds every byte that it reads to `sha` unless that is NULL. */
const char *y4m_open(FILE *stream, Sha256 *sha, Y4mReader **out, VideoFormat *format);
/* Reads the next frame as floats [3,Y,X] in [-1,1], or sets *end after the last; frame NULL skips it. Returns NULL, or
 * the error. */
const char *y4m_next(Y4mReader *reader, float *frame, bool *end);
void y4m_close(Y4mReader *reader);
/* The inverse of y4m_convert(): frame [3,Y,X] from planes, which may be in full range, 0 to 255. Planes that are no
 * colour give values beyond [-1,1]. */
void y4m_to_floats(const VideoFormat *format, bool full_range, const uint8_t *planes, float *frame);

/* ---------------------------------------------------------------- picture.c: a run's source, a picture or a clip */

/* A Y4M, or a PPM (P6), which is a clip of one frame. */
typedef struct {
    Bytes bytes;           /* of the file */
    bool mapped;
    VideoFormat format;    /* a PPM has no frame rate */
    int frames;
    const uint8_t *pixels; /* (Y,X,3) of a PPM; NULL if this is a Y4M */
    int white;             /* a PPM's largest value */
} Source;
/* Opens a file, "-" is standard input, and reads it down to its end. Returns NULL, or the error. */
const char *source_open(const char *path, Source *out);
const char *source_parse(Bytes bytes, Source *out); /* the same from memory; the bytes stay the caller's */
void source_close(Source *source);

/* Gives the frames of a source one by one, as [3,Y,X] of X = width and Y = height. If the file has another size, they
 * are scaled to cover, antialiased, and cropped in the centre. */
typedef struct SourceReader SourceReader;
SourceReader *source_reader_open(const Source *source, int width, int height);
void source_next(SourceReader *reader, float *frame); /* at most source->frames times */
void source_reader_close(SourceReader *reader);       /* accepts NULL */
size_t source_reader_memory(const Source *source, int width, int height);

size_t ppm_header(int width, int height, char out[32]); /* returns its length */
void ppm_convert(int width, int height, const float *frame, uint8_t *out); /* [3,Y,X] -> (Y,X,3) */

/* ---------------------------------------------------------------- label.c: a visible label in the frames (--label) */

/* Both label and mark change a frame's planes, as y4m_convert() writes them. */
bool label_is_due(const VideoFormat *format, int index); /* frame `index` is in the first two seconds of a minute */
void label_draw(const VideoFormat *format, uint8_t *planes);

/* ---------------------------------------------------------------- mark.c: an invisible mark in the frames (--mark) */

enum { MARK_SIDE = 64 };
typedef struct {
    float tile[MARK_SIDE * MARK_SIDE]; /* added to the luma, in grey levels; repeats across the frame */
} Mark;
Mark mark_make(uint64_t payload);
void mark_add(const Mark *mark, const VideoFormat *format, uint8_t *planes);

/* The sum of the luma of a clip's frames. Begins as {0}; free() the luma. */
typedef struct {
    int width, height, frames;
    float *luma; /* (height,width) */
} MarkSum;
void mark_gather(MarkSum *sum, const VideoFormat *format, const float *frame); /* frame [3,Y,X] */

/* The best candidate for a mark. */
typedef struct {
    double deviations;   /* height of its correlation peak, in standard deviations of the noise */
    double scale;        /* the clip was enlarged by this factor after it was marked */
    int x, y;            /* shift of the tile, in pixels */
    uint64_t payload;
} MarkFound;
#define MARK_DEVIATIONS 8.0  /* from here on a candidate counts as a mark */
enum { MARK_AGREEING = 52 }; /* bits of the payload's 64 that must agree with the record; by chance 2.3e-7 */
MarkFound mark_find(const MarkSum *sum); /* sum of at least one frame */

/* ---------------------------------------------------------------- drift.c: how a long clip changes (--drift) */

typedef struct Drift Drift;
Drift *drift_open(const VideoFormat *format);       /* prints the column names */
void drift_frame(Drift *drift, const float *frame); /* the clip's next frame [3,Y,X] in [-1,1] */
void drift_chunk(Drift *drift);                     /* ends a chunk: prints its line */
void drift_state(Drift *drift, StateFile *file);
void drift_close(Drift *drift);                     /* prints the summary; accepts NULL */

/* ---------------------------------------------------------------- preview.c: frames -> a colour terminal */

typedef struct {
    int columns, rows; /* character cells; a cell is one pixel wide and two high */
} PreviewSize;
/* The largest picture with the frame's proportions that fits into columns x rows and does not enlarge the frame. */
PreviewSize preview_fit(int width, int height, int columns, int rows);
size_t preview_room(PreviewSize size); /* the most bytes that preview_render() writes */
/* Writes lines of half blocks with their colours for a frame [3,Y,X] in [-1,1]. Returns the number of bytes. */
size_t preview_render(const float *frame, int width, int height, PreviewSize size, bool true_colour,
                      char *out);

typedef struct {
    bool enabled, true_colour;
    PreviewSize drawn; /* the picture on the screen; 0 rows before the first */
    bool plays;        /* frames are drawn, not only guesses */
    double start;      /* when frame 0 was due, by seconds() */
} Preview;
/* Draws on standard error. Warns, and draws nothing, if that is not a colour terminal. */
Preview preview_open(void);
/* Draws frame `index` over the previous one. Waits until the frame is due by the clip's frame rate. Draws nothing if
 * the preview is not enabled or the window is too small. */
void preview_frame(Preview *preview, const VideoFormat *format, const float *frame, int index);
void preview_guess(Preview *preview, const VideoFormat *format, const float *frame); /* draws it at once */

/* ---------------------------------------------------------------- model.c: a weight file, and a run's settings */

/* What happens to the KV cache at a new prompt. Cross attention reads the new prompt in every case. */
typedef enum {
    KEEP,        /* the cache stays */
    FLUSH,       /* frame 0 and the last two frames stay */
    RECACHE,     /* one pass with the new prompt computes the keys and values of the window's frames again */
    BY_POSITIONS /* FLUSH for relative positions, KEEP for absolute ones */
} PromptChange;

/* How the weight file says to generate. */
typedef struct {
    Schedule schedule, first; /* the model's own list of steps, and the first chunk's; 0 steps: it has no list */
    float noise_scale;        /* factor of the initial noise */
    bool noise_frames_first;  /* torch's random numbers fill (T,C,H,W) in order; else (C,T,H,W) */
    int chunk_frames;         /* latent frames in a chunk; 0: the whole clip is one chunk */
    bool independent_first_frame; /* the first chunk is one frame */
    Window window;            /* size 0: all earlier frames */
    float context_noise;      /* timestep of the pass that fills the cache */
    PromptChange prompt_change;
    bool recache_sink;        /* RECACHE drops the sink, too; else it stays as it is */
} Recipe;

enum { EXPERTS = 2 }; /* the most transformers that a model has */

/* What one run is asked to do. The command line sets what the user gave; settings_complete() sets the rest. */
typedef struct {
    const char *prompt, *negative, *output, *noise, *producer, *produce_id; /* NULL: not given */
    const char *embeds, *negative_embeds;                       /* files that hold embeds; NULL: not given */
    int width, height, frames, fps_num, fps_den, steps, chroma; /* 0: not given */
    double seconds, guidance[EXPERTS], shift;                   /* negative: not given */
    Sampler sampler;                                            /* SAMPLERS: not given */
    int window, sink;                                           /* latent frames; negative: not given; window 0: all */
    const char *positions;                                      /* "absolute", "relative"; NULL: not given */
    const char *image, *video;                                  /* at most one: the file of the source */
    const char *last_image;                                     /* --last-image */
    const Source *source, *last_source;                         /* NULL: none */
    int source_frames;                                          /* its frames in use; set by settings_complete() */
    double strength;                                            /* --strength; negative: not given */
    double easycache;                                           /* --easycache; 0: every step is computed */
    VaeHalf decoder;                                            /* DECODER or TINY */
    bool extend;                                                /* the clip begins with the source's own frames */
    bool ppm;                                                   /* a picture is written; set by settings_complete() */
    Story story;                                                /* the prompts after the first */
    uint64_t seed;
    Bytes arguments;      /* the command line, for OUTPUT.state; empty: no state is written */
    double state_seconds; /* shortest time between two states */
    bool resume;          /* continue from OUTPUT.state */
    bool quiet, record, record_prompt, preview, feed, drift, label, mark;
} Settings;
Settings settings_new(void); /* nothing given */

/* What a model's clips begin from. */
typedef enum {
    TEXT,            /* a prompt */
    TEXT_OR_PICTURE, /* a picture can be the first frame: its latent frame is not denoised, and has timestep 0 */
    PICTURE          /* a picture and a prompt: the transformer reads the encoded picture beside the latents */
} Start;

/* A transformer, and the timesteps that it serves: those from `from` on, up to the expert before it. */
typedef struct {
    Transformer transformer;
    double from;
} Expert;

typedef struct {
    WeightFile *file;
    Precision precision;
    Tokenizer *tokenizer;
    TextEncoder text_encoder;
    int expert_count;        /* 2 in Wan 2.2 A14B, else 1 */
    Expert experts[EXPERTS]; /* the one for the most noise first. All have the same sizes; the last serves from 0 on */
    Vae vae;
    Start start;
    Recipe recipe;
} Model;

/* Dies with STATUS_USAGE and the reason if the file cannot be used. Precision AUTOMATIC is the file's key
 * default.precision; without that key, F32 for float32 weights and the fastest on this processor for narrower ones. */
Model model_load(const char *path, Precision precision);
void model_bind(Model *model); /* the second half of model_load(): sets what follows the tokenizer, from model->file */
void model_free(Model *model);
int model_expert(const Model *model, double timestep); /* index of the expert that serves it */
int model_train_timesteps(const WeightFile *file); /* timesteps are from 0 to this number */
Recipe recipe_load(const WeightFile *file);
void recipe_free(Recipe *recipe);
/* Sets what was not given to the model's default, and checks all of it. Dies with STATUS_USAGE on a bad setting. */
void settings_complete(Settings *settings, const Model *model);
int model_frames(const Model *model); /* video frames of the clips that the model was trained on */

/* ---------------------------------------------------------------- plan.c: what a run will do */

/* Cleans and tokenizes a prompt into ids [text_len]. Returns their number, </s> included. */
int prompt_ids(const Model *model, const char *prompt, int32_t *ids);
/* Writes the text encoder's output for the prompt to a .npy file, (n, text_dim), which --embeds reads. */
void embeds_write(Model *model, const char *prompt, const char *path);
size_t generate_memory(Model *model, const Settings *settings); /* private memory at its peak, without the weights */

/* ---------------------------------------------------------------- pipeline.c: the stages in one run */

/* Makes the video, and its record. Dies with STATUS_RESOURCE on lack of memory or a failed write, and with STATUS_CHECK
 * on values that are not finite. */
void generate(Model *model, const Settings *settings);
/* Checks and reads a state as generate() does to resume, without the video file. Returns NULL or the reason. */
const char *generate_read(Model *model, const Settings *settings, Bytes state);

/* ---------------------------------------------------------------- record.c: OUTPUT.json, how the video was made */

char *record_path(const char *output); /* OUTPUT.json; free() it */
/* SHA-256 of the files of --noise, --embeds, --negative-embeds, --image or --video, and --last-image; "" where none was
 * given. */
typedef struct {
    char noise[65], embeds[65], negative_embeds[65], source[65], last_source[65];
} InputHashes;
/* The 64 bits that a mark carries: the first of the SHA-256 of the part of the record that is known before the run. */
uint64_t record_bits(const Model *model, const Settings *settings, const InputHashes *inputs);
/* Writes and commits the record. passes_left_out: of the transformer, by --easycache. */
void record_write(OutputFile *file, const Model *model, const Settings *settings, const InputHashes *inputs,
                  const char *y4m_sha256, int passes_left_out);
/* Prints what a record says, whatever text that may be, and returns whether it agrees with itself, with the SHA-256 of
 * the video beside it and with the video's mark, if there is one. */
bool record_check(FILE *out, Bytes record, const char *y4m_sha256, const MarkFound *mark);
/* Prints what the Y4M's mark and the record beside it say. Returns true if there is a record or a mark, and all that is
 * there agrees. */
bool verify(const char *path);

#endif
