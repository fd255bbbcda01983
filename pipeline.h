/* pipeline.h - one run of the stages: what plan.c, start.c, video.c and pipeline.c share.
 *
 *   plan.c       settings -> Run: prompts, sizes, chunks; what it will cost
 *   start.c      noise, a source's latents -> what a chunk's denoising begins with
 *   pipeline.c   the denoising loop; its state
 *   video.c      latents -> frames -> the file */
#ifndef PIPELINE_H
#define PIPELINE_H

#include "sora.h"

/* ---------------------------------------------------------------- plan.c */

typedef struct {
    char name[32]; /* of its taps: "prompt", "prompt01", "negative" */
    double time;   /* seconds; the prompt holds from here on */
    int n;
    int32_t *ids;  /* [n]; NULL if the embeds were read from a file */
    float *embeds; /* (n, text_dim); NULL until they are encoded */
} Prompt;
/* Runs the text encoder, unless the embeds were read from a file. */
void prompt_encode(const Model *model, Prompt *prompt);

/* The plan of a run: its settings, and the sizes that follow from them. */
typedef struct {
    Model *model;
    const Settings *settings;
    const Recipe *recipe;
    Schedule own;              /* made for this run; none if the model has a fixed one */
    Schedule schedule, first;  /* of all generated chunks but the first; of the first; the last steps with --strength */
    bool guided;               /* guidance > 1 in an expert: its steps run the negative prompt, too */
    int prompt_count;
    Prompt *prompts, negative; /* [prompt_count]; the negative one is set if guided */
    int C, T, H, W;            /* latents (T,C,H,W); T is rounded up to whole chunks */
    int decoded;               /* latent frames that are decoded: the first ones of T */
    int given, redrawn;        /* the source's latent frames: kept as they are, or mixed with noise (--strength) */
    int ahead;                 /* source frames before the first one that is encoded (--extend); written as they are */
    int held;                  /* latent frames of a chunk that stay as encoded: the first, or the first and the last */
    int condition_channels;    /* channels that the transformer reads beside the latents: mask, encoded picture */
    int pictured, encoded;     /* video frames that the encoder takes, latent frames that it gives */
    int chunks, given_chunks;  /* number of chunks; the first of them hold the given frames */
    int chunk_frames;          /* frames in a chunk, or the most */
    Window window;             /* size and sink are at most T */
    int tokens;                /* in a latent frame */
    int recached;              /* latent frames to keep for RECACHE; 0 if it cannot happen */
    size_t frame_size;         /* C*H*W, elements of a latent frame */
    InputHashes inputs;
} Run;
/* Prompt i of prompt_count + guided: the negative one is the last. */
static inline const Prompt *run_prompt(const Run *run, int i) {
    return i < run->prompt_count ? &run->prompts[i] : &run->negative;
}
Run run_plan(Model *model, const Settings *settings);
void run_free(Run *run);
/* Says what the run costs and what looks wrong. Dies with STATUS_RESOURCE if it needs more memory than there is. */
void run_estimate(const Run *run);

Chunk chunk_at(const Run *run, int index);
const Schedule *chunk_schedule(const Run *run, int index);
bool run_renoises(const Run *run); /* a step of some chunk adds fresh noise */
int chunk_decoded(const Run *run, Chunk chunk); /* the chunk's frames, except those past the clip's end */
double chunk_time(const Run *run, Chunk chunk); /* start of its first video frame, in seconds */
int video_frames(const Run *run, int latent);   /* how many there are when `latent` latent frames are decoded */
PromptChange prompt_change(const Run *run);
int longest_pass(const Run *run);   /* of the transformer, in latent frames */
int cache_capacity(const Run *run); /* in latent frames; 0 for a clip of one chunk */
size_t text_context_memory(const Run *run, int n);

Shape latent_shape(const Run *run, int frames);
/* Taps that follow are named "chunkCCC.PREFIX...", or "PREFIX..." if the model does not generate in chunks. CCC counts
 * generated chunks; given ones are "givenCCC". */
void tap_scope_chunk(const Run *run, int chunk, const char *prefix);
/* Taps the chunk's frames as a part of a tensor of the clip from latent frame `from` on, [C,T-from,H,W]. */
void tap_clip(const Run *run, Chunk chunk, float *latents, int from, const char *name);
/* Ends the run at the first NaN or infinity, which would give a black clip. With --check, its table is printed first,
 * because it names the first tensor that differs. */
void require_finite(const Model *model, const float *values, size_t count, const char *what);

/* ---------------------------------------------------------------- start.c */

/* The seed gives one sequence of random numbers:
 *
 *   [ initial noise of the clip, T*C*H*W numbers | noise of re-noising steps, in the order of the steps ... ]
 *     ^ initial                                    ^ steps
 *
 * Given frames have no noise, and T is then that of the generated frames.
 *
 * --noise replaces the initial noise; the numbers of the steps stay the same. */
typedef struct {
    Npy file; /* --noise, [C,T,H,W] */
    Draw initial;
    Generator steps;
} Noise;
Noise noise_open(Run *run);
void noise_state(Noise *noise, StateFile *file);

/* The encoder at work, and what it made of pictures. It is opened for its first frame and closed after its last. */
typedef struct {
    const Run *run;
    SourceReader *source;
    VaeStream *stream;
    float *frame;     /* [3,Y,X] */
    int taken;        /* frames so far, of run->pictured */
    int encoded;      /* latent frames so far */
    float *out;       /* where the next one goes */
    size_t stride;    /* from one to the next */
    float *held;      /* (run->held,C,H,W) */
    float *condition; /* (T,run->condition_channels,H,W): mask, encoded picture */
} Encoding;
size_t condition_size(const Run *run); /* values of `condition` */
void encoding_free(Encoding *encoding);
void encoding_state(const Run *run, Encoding *encoding, StateFile *file);

/* latents (frames,C,H,W) = what a chunk begins with: (1 - sigma) * encoded + sigma * noise, or one of the two */
void begin_chunk(const Run *run, Encoding *encoding, Noise *noise, int index, float *latents);
bool is_held(const Run *run, int frame);
/* latents (frames,C,H,W): the chunk's held frames = what was encoded */
void hold_frames(const Run *run, const Encoding *encoding, Chunk chunk, float *latents);
/* latents (frames,C,H,W) = the noise that a re-noising step adds */
void fresh_noise(const Run *run, Noise *noise, Chunk chunk, float *latents);
/* Reads over the source's next frames. */
void source_skip(SourceReader *source, int frames, float *frame);

/* ---------------------------------------------------------------- video.c */

typedef struct {
    const Run *run;
    VideoFormat format;
    OutputFile file, record; /* the record is opened only if one is written */
    Preview preview;
    uint8_t *planes;         /* Y, Cb, Cr of one frame */
    Mark mark;               /* set with --mark */
    Sha256 sha;              /* of the bytes written so far */
    Drift *drift;            /* NULL without --drift */
    SourceReader *source;    /* NULL without --extend */
    int index;               /* of the next frame */
    int chunk;               /* chunks that are decoded */
    int resumed;             /* frames that an earlier run had written */
    double started, next;    /* by seconds(): when this process began the loop; when the next state is due */
    VaeStream *decoder;      /* NULL before the first latent frame */
    char *state;             /* name of the state file; NULL: none is written */
    bool kept;               /* the state file exists */
    bool warned;             /* that the state cannot be written */
    int constant;            /* frames of one colour */
    int left_out;            /* passes of the transformer, by --easycache */
    size_t values, clamped;  /* of the frames that were decoded; those that are -1 or 1 */
} Video;
VideoFormat video_format(const Settings *settings);
static inline size_t video_frame_values(const Settings *s) { return (size_t)3 * s->height * s->width; } /* of [3,Y,X] */
Video video_open(const Run *run);
/* Writes the file's header and the frames before the decoded ones, and opens the decoder. */
void video_begin(const Run *run, Video *video);
/* --preview, with a tiny decoder: draws the first frame of the step's prediction of x0, x - sigma * v. */
void video_guess(const Run *run, Video *video, const float *x, const float *v, float sigma);
void video_close(Video *video);
void video_state(Video *video, StateFile *file);
/* One line on a terminal: "step 3/20", or in models that generate in chunks
 * "chunk 1/7, step 3/4, 0.6 s of video, speed 0.05x"; 1x is real time. */
void show_progress(const Video *video, const char *stage, int done, int total);

/* ---------------------------------------------------------------- pipeline.c */

size_t sampling_memory(const Run *run); /* of the denoising loop's buffers */

#endif
