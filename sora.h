/* sora.h - text to video, the stages in the order in which data flows through them.
 *
 *   prompt -> tokenizer.c -> ids -> text_encoder.c -> embeds ---+
 *   seed -> engine/arithmetic/noise.c -> noise -> latents -> transformer.c -> velocity -> sampler.c -> latents
 *                                                 (steps times)  cache.c: what earlier chunks left to look back at
 *   latents -> vae.c -> frames -> y4m.c -> file
 *
 * pipeline.c strings them together, as model.c says; sora.c is the command line.
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

/* As upstream with ftfy, but for its guesses at wrong encodings: one way to write what can be written in
 * many, one space for white space. Valid UTF-8 (U+FFFD stands for what was not); free() its data. */
Bytes prompt_clean(Bytes prompt);

/* ---------------------------------------------------------------- story.c: prompts with their times */

/* A prompt, and from when on. */
typedef struct {
    double time; /* seconds */
    char *text;
} StoryLine;

typedef struct {
    int count;
    StoryLine *lines; /* times rise */
} Story;

/* "TIME TEXT"; NULL, or why it cannot be read or does not come after the last line. */
const char *story_add(Story *story, Bytes line);
const char *story_parse(Story *story, Bytes text); /* a file of such lines, blank ones and # comments between them */
void story_free(Story *story);

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
size_t text_encoder_memory(const TextEncoder *encoder, int n);  /* bytes while it runs */
size_t text_encoder_scratch(const TextEncoder *encoder, int n); /* and of scratch: its products and attention */
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
size_t transformer_read_memory(const Transformer *transformer, int n); /* bytes while it runs, those of scratch included */

/* Latent frames that pass at once; a clip that is not made in chunks is one. Latents are frame-major everywhere,
 * (T,C,H,W), so that a chunk lies in one piece; [C,T,H,W] at the border. */
typedef struct {
    int first, frames;      /* the clip's frames [first, first + frames) */
    const float *timesteps; /* [frames], each in [0,1000] */
} Chunk;

typedef struct KvCache KvCache;

/* What a forward pass needs besides weights: positions, and room to compute in. */
typedef struct {
    int H, W, tokens;        /* of a frame: of latents; tokens */
    Rope rope;               /* its times are those of one pass */
    float *x, *y;            /* (L,D) */
    float *wide;             /* the widest of q k v, ffn and patches */
    float *time;             /* (frames,D) */
    float *modulation, *e;   /* (frames,6,D), (6,frames,D) */
} TransformerState;
/* For at most so many frames in a pass, whose attention sees at most `seen`, its own included. */
TransformerState transformer_state_take(Arena *arena, const Transformer *transformer, int frames, int seen, int H, int W);
/* Of one position on an axis: cosines, then sines (2,pairs). */
void rope_angles(float *angles, int pos, int pairs);
/* What the transformer is told of a timestep: cosines, then sines (freq_dim). */
void timestep_sinusoids(float *out, int freq_dim, float timestep);
/* Of one forward pass of L tokens, whose attention sees so many keys and text positions. */
double transformer_flops(const Transformer *transformer, int L, int keys, int positions);
/* Bytes of scratch that the same pass takes. */
size_t transformer_scratch(const Transformer *transformer, int frames, int L, int keys, int positions);
/* velocity (frames,out_dim,H,W) of the chunk's latents (frames,in_dim,H,W). Its keys and values stand in the cache
 * until the next pass, behind those of the frames that are held; kv_cache_keep() holds them, too. */
void transformer_forward(const Transformer *transformer, TransformerState *state, const TextContext *text,
                         KvCache *cache, const Chunk *chunk, const float *latents, float *velocity);

/* ---------------------------------------------------------------- cache.c: what earlier chunks left to look back at */

/* Which frames self attention sees, and where in time it takes them to be. */
typedef struct {
    int window;    /* frames in all, the pass's own and the sink counted in */
    int sink;      /* of these the clip's first, which are never dropped */
    bool relative; /* positions are places in the window, not in the clip */
} Window;

/* Keys (before RoPE) and values of earlier frames in every block. */
struct KvCache {
    Window rule;
    int layers, tokens, D;
    int room, frames;     /* frames that it can hold, and does, oldest first; no room: nobody looks back */
    int *number;          /* [room] each one's number in the clip */
    Type type;            /* F32 or BF16 */
    char *keys, *values;  /* (layers, room, tokens, D) */
};
/* With room for so many frames of so many tokens. */
KvCache kv_cache_take(Arena *arena, const Transformer *transformer, Window rule, int room, int tokens, Type type);
/* Drops the oldest frames after the sink until `frames` more can be held. */
void kv_cache_make_room(KvCache *cache, int frames);
/* The keys and values in one block of all frames that are held, (frames*tokens, D) each. */
void kv_cache_read(const KvCache *cache, int block, float *keys, float *values);
/* Writes those of frames that pass behind the frames that are held. */
void kv_cache_write(KvCache *cache, int block, const float *keys, const float *values, int frames);
void kv_cache_keep(KvCache *cache, const Chunk *chunk); /* the chunk that passed last is held from now on */
void kv_cache_drop(KvCache *cache, int from, int count); /* of the frames that are held, those at [from, from + count) */
/* Of frame j of what a pass of the chunk sees: those that are held, then its own. */
int kv_cache_position(const KvCache *cache, const Chunk *chunk, int j);

/* ---------------------------------------------------------------- sampler.c: velocity -> next latents */

/* Those before SAMPLERS make schedules of any length; a model's own list goes by EULER or RENOISE. */
typedef enum { UNIPC, EULER, DPM, SAMPLERS, RENOISE } Sampler;
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
/* Of a list of steps; sigmas [steps], without the last 0. */
Schedule schedule_of(Sampler sampler, int steps, const float *timesteps, const float *sigmas);
char *schedule_string(const Schedule *schedule); /* its time steps, "1000 937.5 833.333313 625"; a new string */
void schedule_free(Schedule *schedule);

/* What a sampler remembers of earlier steps. */
typedef struct {
    size_t n;      /* elements of the latents */
    float *x0[3];  /* guesses of the clip, this step's first */
    float *sample; /* latents from which the last step set out */
} History;
History history_take(Arena *arena, size_t n);
bool sampler_needs_noise(const Schedule *schedule, int step);
/* latents [n] move from sigmas[step] to sigmas[step + 1]. Steps go upwards from 0, which forgets the past. noise [n]:
 * fresh, where the step needs it. */
void sampler_step(const Schedule *schedule, int step, const float *velocity, float *latents, History *history,
                  const float *noise);

/* ----------------------------------------------------------- vae.c: latents -> frames (the causal 3D VAE) */

typedef struct {
    Linear layer; /* (O, kt*kh*kw*I), taps outermost */
    int kt, kh, kw, in, out; /* out == 0: there is none */
} Conv;

/* A half of the VAE is a list of layers. What each does with the frame x that it is handed: */
typedef enum {
    CONVOLUTION, /* x = conv1(x), or conv1(silu(norm1(x))) */
    RESIDUAL,    /* x = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))) */
    ATTENTION,   /* x += conv2(attention(conv1(norm1(x)))), over the pixels of the frame */
    DOUBLE_TIME, /* the clip's first frame goes on as it is, of each later one conv1 makes two */
    DOUBLE_SPACE /* x = conv1(every pixel of x four times) */
} VaeLayerKind;

typedef struct {
    VaeLayerKind kind;
    const float *norm1, *norm2; /* (I), or NULL */
    Conv conv1, conv2, shortcut;
} VaeLayer;

typedef struct {
    int count;
    VaeLayer *layers;
} VaeLayers;

typedef struct {
    int z_dim, patch_size, temporal_stride, spatial_stride;
    const float *latents_mean, *latents_std; /* (z_dim) */
    VaeLayers decoder;
    Precision precision; /* F32 or BF16 */
} Vae;

Vae vae_load(const WeightFile *file, Precision precision);
void vae_free(Vae *vae);

typedef void FrameSink(void *to, float *frame); /* frame [3,Y,X] in [-1,1], to be overwritten at will */

/* What moves while frames pass the layers. */
typedef struct VaeStream VaeStream;
VaeStream *vae_decoder_open(const Vae *vae, int H, int W, FrameSink *sink, void *to); /* for latents of H x W */
size_t vae_decoder_memory(const Vae *vae, int H, int W);  /* bytes while it is open */
size_t vae_decoder_scratch(const Vae *vae, int H, int W); /* and while it works: its products and attention */
double vae_decoder_flops(const Vae *vae, int T, int H, int W);
/* Decodes the clip's next latent frame (z_dim,H,W) and hands every video frame that follows to the sink at once: one
 * for the clip's first, temporal_stride for each later. */
void vae_decode(VaeStream *stream, const float *latents);
void vae_stream_close(VaeStream *stream);

/* ---------------------------------------------------------------- y4m.c: frames -> file */

typedef struct {
    int width, height;
    int rate_num, rate_den; /* frames a second */
    int chroma;             /* 420 or 444 when writing; reading also 422 and 400 (mono) */
} VideoFormat;

bool y4m_is_bt709(const VideoFormat *format); /* by its size, as players assume; else it is BT.601 */
/* Planes of 8 bits in limited range from a frame [3,Y,X] of floats in [-1,1];
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

/* ---------------------------------------------------------------- label.c: frames -> frames with a visible label */

bool label_is_due(const VideoFormat *format, int index); /* in the first two seconds of every minute */
void label_draw(const VideoFormat *format, uint8_t *planes); /* planes as y4m_convert makes them */

/* ---------------------------------------------------------------- mark.c: frames -> frames with an invisible mark */

enum { MARK_SIDE = 64 };
typedef struct {
    float tile[MARK_SIDE * MARK_SIDE]; /* what is added to the luma, in grey levels, again and again */
} Mark;
Mark mark_make(uint64_t payload);
void mark_add(const Mark *mark, const VideoFormat *format, uint8_t *planes); /* planes as y4m_convert makes them */

/* The luma of a clip's frames, added up. Begin with {0}, free() the luma. */
typedef struct {
    int width, height, frames;
    float *luma; /* (height,width) */
} MarkSum;
void mark_gather(MarkSum *sum, const VideoFormat *format, const float *frame); /* frame [3,Y,X] */

/* The likeliest place of a mark: its scale, its shift, how far its peak stands out, and what it says if it is one. */
typedef struct {
    double deviations, scale;
    int x, y;
    uint64_t payload;
} MarkFound;
#define MARK_DEVIATIONS 7.5 /* from here on it is a mark */
enum { MARK_AGREEING = 54 }; /* of its 64 bits, for a record to be its own: by chance 1e-8 */
MarkFound mark_find(const MarkSum *sum); /* of at least one frame */

/* ---------------------------------------------------------------- drift.c: how a long clip changes (--drift) */

typedef struct Drift Drift;
Drift *drift_open(const VideoFormat *format); /* prints the heads of the columns */
void drift_frame(Drift *drift, const float *frame); /* the clip's next frame [3,Y,X] in [-1,1] */
void drift_chunk(Drift *drift);  /* a chunk ends here: prints its line */
void drift_close(Drift *drift);  /* prints the summary; NULL will do */

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

/* ---------------------------------------------------------------- model.c: a weight file, and what it says of how to use it */

/* What a new prompt does to what the cache holds, besides what cross attention reads from then on. */
typedef enum {
    KEEP,    /* nothing */
    FLUSH,   /* frame 0 and the last two stay */
    RECACHE, /* a pass over the frames in the window, with the new prompt, writes theirs anew */
    BY_POSITIONS /* FLUSH where positions are relative, else KEEP */
} PromptChange;

/* How the file says that clips are made. */
typedef struct {
    Schedule schedule, first; /* its list of steps, and the first chunk's; no steps: any schedule will do */
    float noise_scale;        /* the first latents are noise times this */
    bool noise_frames_first;  /* torch's numbers fill (T,C,H,W), not (C,T,H,W) */
    int chunk_frames;         /* latent frames that are made at once; 0: all */
    bool independent_first_frame; /* the first chunk is one frame */
    Window window;            /* .window 0: all that come before */
    float context_noise;      /* the time step of the pass that writes the cache */
    PromptChange prompt_change;
    bool recache_sink;        /* RECACHE begins with an empty cache */
} Recipe;

/* What one run is asked to do. The command line fills in what was given; settings_complete() takes the rest
 * from the model's own defaults. */
typedef struct {
    const char *prompt, *negative, *output, *noise, *producer, *produce_id;
    int width, height, frames, fps_num, fps_den, steps, chroma; /* 0: not given */
    double seconds, guidance, shift;                            /* negative: not given */
    Sampler sampler;                                            /* SAMPLERS: not given */
    int window, sink;                                           /* negative: not given; window 0: everything */
    const char *positions;                                      /* "absolute", "relative", or NULL */
    Story story;                                                /* what follows the prompt */
    uint64_t seed;
    bool quiet, record, record_prompt, preview, feed, drift, label, mark;
} Settings;
Settings settings_new(void); /* nothing given */

typedef struct {
    WeightFile *file;
    Precision precision;
    Tokenizer *tokenizer;
    TextEncoder text_encoder;
    Transformer transformer;
    Vae vae;
    Recipe recipe;
} Model;

/* AUTOMATIC is the file's own (default.precision); without one, F32 for float32 weights, and for narrower ones
 * the fastest that the processor has. */
Model model_load(const char *path, Precision precision);
void model_free(Model *model);
Recipe recipe_load(const WeightFile *file);
void recipe_free(Recipe *recipe);
void settings_complete(Settings *settings, const Model *model);
int model_frames(const Model *model); /* the length of the clips that the model was made for */

/* ---------------------------------------------------------------- pipeline.c: the stages on one string */

/* Cleaned, at most text_len ids with the closing </s>. Returns their number. */
int prompt_ids(const Model *model, const char *prompt, int32_t *ids);
void generate(Model *model, const Settings *settings);
size_t generate_memory(Model *model, const Settings *settings); /* private bytes that it will take, at the most */

/* ---------------------------------------------------------------- record.c: what made the file, beside it */

char *record_path(const char *output); /* OUTPUT.json, a new string */
/* What a mark says of a run: the first bits of the SHA-256 of the record's part that is known before the video is. */
uint64_t record_bits(const Model *model, const Settings *settings, const char *noise_sha256);
/* Writes and commits it: settings that make the same file again, and hashes of what went in and came out;
 * noise_sha256: of the file of --noise, if that was given. */
void record_write(OutputFile *file, const Model *model, const Settings *settings, const char *noise_sha256,
                  const char *y4m_sha256);
/* Prints on standard output what a Y4M's pixels and the record beside it say; whether there is a record or a mark, and
 * all that is there agrees. */
bool verify(const char *path);

#endif
