"""Trains the bundled model from nothing, in stages; a stage that was killed goes on where it stopped (reading: anew).

    python train/train.py --out build/train
    python train/train.py --out build/further --base models/demo.gguf      # goes on from a finished model

    tokenizer    OUT/tokenizer/        seconds   the words of the world as a SentencePiece model
    reading      OUT/reading.ckpt      minutes   the text encoder learns to read captions
    vae          OUT/vae.ckpt          an hour   decoder and light encoder, on stretches of clips
    decoder      OUT/decoder.ckpt      minutes   the decoder, on whole clips
    transformer  OUT/transformer.ckpt  hours     latents are drawn into OUT/latents/ as they are needed
    encoder      OUT/encoder.ckpt      minutes   Wan's own VAE encoder learns the light one's latents
    causal       OUT/causal.ckpt       hours     the transformer learns to go on chunk by chunk, from stretches of
                                                 stories, which another process draws into OUT/stretches/
    model        OUT/demo.gguf         seconds   the weight file, by export.py

With --base there are three: the causal stage is the first to learn.

    base         OUT/base.ckpt         seconds   its text encoder and transformer; its VAE is OUT/autoencoder.ckpt
    causal       OUT/causal.ckpt       hours
    model        OUT/demo.gguf         seconds

Beside OUT/transformer.ckpt stands OUT/snapshot/, a diffusers folder, written anew with every checkpoint.
Loss curves stand in OUT/log/*.tsv, process ids in OUT/pids/.  The same command starts and resumes; --until stops early.

Every batch follows from (options, step); in the causal stage also from the stretches that are there.  OUT/options.json
keeps the options, so that a run goes on as it began; of the lengths, --transformer-steps may still change, until the
rate falls, and --causal-steps: a long run begins as a short one does.
A run may move: OUT/ copied to a machine with a GPU goes on there with --device cuda, and afterwards back here.
"""
import argparse
import datetime
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import adherence
import base
import causal
import detect
import pipeline
import reading
import stretches
import tokenizer
import transformer
import vae

FROM_NOTHING = ["tokenizer", "reading", "vae", "decoder", "transformer", "encoder", "causal", "model"]
FROM_BASE = ["tokenizer", "base", "causal", "model"]
STREAM_OPTIONS = ["base", "seed", "workers", "clips", "reading_steps", "vae_steps", "decoder_steps", "encoder_steps",
                  "bf16"]
JUDGES_SEEDS = [vae.EVALUATION_SEED, detect.SEED, adherence.PROMPT_SEED]  # whose clips no training may see
MOST_HELPERS = 16  # that draw clips for a GPU, and as many that load them: what an H100 needs
ROOT = pathlib.Path(__file__).resolve().parent.parent


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "train")
    parser.add_argument("--base", metavar="FILE", type=os.path.abspath,
                        help="go on from the weights of this file, made by an earlier run")
    parser.add_argument("--until", choices=list(dict.fromkeys(FROM_NOTHING + FROM_BASE)), default="model",
                        help="the last stage to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2,
                        help="processes of the transformer stage, one thread each, or on a GPU the work of so many; "
                             "the batch grows with them, so another number is another training")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu",
                        help="where the transformer's stage runs: on a GPU, the batch of all workers at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of every other stage")
    parser.add_argument("--clips", type=int, default=1500, help="drawn clips for the VAE")
    parser.add_argument("--reading-steps", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    parser.add_argument("--encoder-steps", type=int, default=1500)
    parser.add_argument("--transformer-steps", type=int, default=13200)
    parser.add_argument("--shards", type=int, default=400,
                        help=f"of {stretches.SHARD} stretches of stories each, for the causal stage")
    parser.add_argument("--causal-steps", type=int, default=20000)
    parser.add_argument("--bf16", action="store_true",
                        help="products in bfloat16, but for the reading: three fifths of the time on AMD's "
                             "processors since Zen 4, and twice the time on Intel's without AMX")
    parser.add_argument("--eager", action="store_true",
                        help="do without torch.compile, its minutes of compiling and the C++ compiler that it needs")
    args = parser.parse_args()
    if args.seed in JUDGES_SEEDS:
        parser.error(f"--seed {args.seed}: the seeds {JUDGES_SEEDS} are those of clips that judge the model")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no such GPU here")
    args.stages = FROM_BASE if args.base else FROM_NOTHING
    if args.base and not os.path.isfile(args.base):
        parser.error(f"--base {args.base}: there is no such file")
    if args.until not in args.stages:
        parser.error(f"--until {args.until}: the stages are {' '.join(args.stages)}")
    return args


def keep_options(args):
    """Keeps the options that a run depends on in OUT/options.json, and exits if others stand there already."""
    path, now = args.out / "options.json", {name: getattr(args, name) for name in STREAM_OPTIONS}
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(now, indent=2) + "\n")
        temporary.replace(path)
    before = json.loads(path.read_text())
    for name in STREAM_OPTIONS:
        if before.get(name) != now[name]:
            sys.exit(f"train.py: this run began with --{name.replace('_', '-')} {before.get(name)}, not {now[name]}, "
                     f"and what it does depends on it; who knows what they do may remove {path}")


def lock(out):
    """A file to keep open while training in `out`; exits if another process holds it."""
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"train.py: another process is training in {out}")
    return file


def note_pid(out, name):
    """Leaves this process's id in OUT/pids/, so that the run can be stopped and continued with kill -STOP and -CONT."""
    (out / "pids").mkdir(parents=True, exist_ok=True)
    (out / "pids" / f"{name}.pid").write_text(f"{os.getpid()}\n")


def known(args):
    """What the transformer's stage knows already of the weights of TextToVideo: the reader's."""
    reader = torch.load(args.out / "reading.ckpt", weights_only=True)
    return {f"text_encoder.{name}": weight for name, weight in reader.items()}


def train_transformer(process, processes, helpers, args, rendezvous):
    """One of the processes that train the transformer together: each is a worker, or on a GPU one stands for all."""
    torch.set_num_threads(1)
    note_pid(args.out, f"worker{process}")
    if processes > 1:
        dist.init_process_group("gloo", f"file://{rendezvous}", rank=process, world_size=processes,
                                timeout=datetime.timedelta(days=1))
    course = transformer.from_nothing(args.transformer_steps)
    transformer.train(args.out, tokenizer.Tokenizer(args.out / "tokenizer"), known(args), vae.load(args.out)[1], course,
                      args.seed, range(args.workers)[process::processes], args.workers, compiled=not args.eager,
                      narrow=args.bf16, device=args.device, helpers=helpers, saved=lambda: pipeline.snapshot(args.out))


def train_causal(args, words):
    """The transformer learns to go on chunk by chunk, while another process draws stretches."""
    tokens, (autoencoder, _) = tokenizer.Tokenizer(words), vae.load(args.out)
    net = transformer.TextToVideo(len(tokens))
    net.load_state_dict(pipeline.learned(args.out))
    folder = args.out / "stretches"
    drawing = multiprocessing.get_context("spawn").Process(
        target=stretches.draw_ahead, daemon=True,
        args=(range(args.shards), folder, args.seed, autoencoder, tokens, args.bf16))
    drawing.start()
    causal.train(args.out, tokens, net.text_encoder.eval(), net.transformer, stretches.Pool(folder), args.causal_steps,
                 args.seed, compiled=not args.eager, narrow=args.bf16)


def main():
    args = options()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    held = lock(args.out)  # until this process ends
    keep_options(args)
    shutil.rmtree(args.out / "pids", ignore_errors=True)  # of an earlier start, perhaps on another machine
    note_pid(args.out, "train")
    wanted = args.stages[:args.stages.index(args.until) + 1]
    words = args.out / "tokenizer"
    if not words.exists():
        tokenizer.save(words)
    if "reading" in wanted:
        reading.train(args.out, tokenizer.Tokenizer(words), args.reading_steps, args.seed)
    how = dict(compiled=not args.eager, narrow=args.bf16)
    if "vae" in wanted:
        vae.train_vae(args.out, args.vae_steps, args.seed, args.clips, **how)
    if "base" in wanted and not (args.out / "base.ckpt").exists():
        base.unpack(args.base, args.out, words)
    if "decoder" in wanted:
        vae.train_decoder(args.out, args.decoder_steps, args.seed, args.clips, **how)
    if "transformer" in wanted and not transformer.is_trained(args.out / "transformer.ckpt", args.transformer_steps):
        processes, helpers = args.workers, 0
        if args.device == "cuda":
            processes, helpers = 1, min(MOST_HELPERS, len(os.sched_getaffinity(0)))
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(train_transformer, (processes, helpers, args, f"{folder}/rendezvous"), processes)
    if "encoder" in wanted:
        vae.train_encoder(args.out, args.encoder_steps, args.seed, args.clips, **how)
    if "causal" in wanted:
        train_causal(args, words)
    if "model" in wanted:
        pipeline.snapshot(args.out)
        subprocess.run([sys.executable, ROOT / "export.py", args.out / "snapshot", "-o", args.out / "demo.gguf"],
                       check=True)


if __name__ == "__main__":
    main()
