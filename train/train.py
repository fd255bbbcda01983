"""Trains the bundled model in stages; a stage that was killed goes on where it stopped (reading: anew).

    python train/train.py --out build/train                                # from nothing
    python train/train.py --out build/further --base models/demo.gguf      # from a finished model

    tokenizer    OUT/tokenizer/        seconds   the words of the world as a SentencePiece model
    reading      OUT/reading.ckpt      minutes   the text encoder learns to read captions
    vae          OUT/vae.ckpt          an hour   decoder and light encoder, on stretches of clips
    encoder      OUT/encoder.ckpt      minutes   Wan's own VAE encoder learns the light one's latents
    autoencoder  OUT/autoencoder.ckpt  minutes   Wan's encoder and decoder together, on whole clips
    transformer  OUT/transformer.ckpt  hours     on stretches of stories, which are drawn into OUT/stretches/ meanwhile
    model        OUT/demo.gguf         seconds   the weight file, by export.py

With --base the stages are five: VAE, text encoder and transformer go on from their weights.

    tokenizer    OUT/tokenizer/        seconds
    base         OUT/base.ckpt         seconds   its text encoder and transformer; its VAE is OUT/base-vae.ckpt
    autoencoder  OUT/autoencoder.ckpt  minutes
    transformer  OUT/transformer.ckpt  hours
    model        OUT/demo.gguf         seconds

Loss curves stand in OUT/log/*.tsv.  The same command starts and resumes; --until stops early; kill ends the
transformer's stage after a step, saved.  `python train/pipeline.py OUT` writes OUT/snapshot/, a diffusers folder, from
an unfinished run.

OUT/options.json keeps the options, so that a run goes on as it began; of the lengths, --transformer-steps alone may
still change.  A run may move: OUT/ copied to a machine with a GPU goes on there with --device cuda.
"""
import argparse
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import torch
import torch.multiprocessing as multiprocessing

import adherence
import base
import detect
import pipeline
import reading
import stretches
import tokenizer
import transformer
import vae
from common import replacing

FROM_NOTHING = ["tokenizer", "reading", "vae", "encoder", "autoencoder", "transformer", "model"]
FROM_BASE = ["tokenizer", "base", "autoencoder", "transformer", "model"]
STREAM_OPTIONS = ["base", "seed", "clips", "reading_steps", "vae_steps", "encoder_steps", "autoencoder_steps", "bf16"]
JUDGES_SEEDS = [vae.EVALUATION_SEED, detect.SEED, adherence.PROMPT_SEED]  # whose clips no training may see
ROOT = pathlib.Path(__file__).resolve().parent.parent


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "train")
    parser.add_argument("--base", metavar="FILE", type=os.path.abspath,
                        help="go on from the weights of this file, made by an earlier run")
    parser.add_argument("--until", choices=list(dict.fromkeys(FROM_NOTHING + FROM_BASE)), default="model",
                        help="the last stage to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the transformer's stage runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of every stage")
    parser.add_argument("--drawers", type=int, default=1, help="processes that draw while the transformer trains")
    parser.add_argument("--shards", type=int, default=400,
                        help=f"that they draw, at most, of {' or '.join(map(str, stretches.STRETCHES))} stretches each")
    parser.add_argument("--clips", type=int, default=1500, help="drawn clips for the VAE")
    parser.add_argument("--reading-steps", type=int, default=1000)
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--encoder-steps", type=int, default=1500)
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--transformer-steps", type=int, default=20000)
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
        with replacing(path) as new:
            new.write_text(json.dumps(now, indent=2) + "\n")
    before = json.loads(path.read_text())
    for name in STREAM_OPTIONS:
        if before.get(name) != now[name]:
            sys.exit(f"train.py: this run began with --{name.replace('_', '-')} {before.get(name)}, not {now[name]}, "
                     f"and what it does depends on it; whoever knows what they do may remove {path}")


def lock(out):
    """A file to keep open while training in `out`; exits if another process holds it."""
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"train.py: another process is training in {out}")
    return file


def train_transformer(args, words):
    """The transformer's stage, and the processes that draw for it."""
    tokens, autoencoder = tokenizer.Tokenizer(words), vae.load(args.out)[0]
    if args.base:
        course = transformer.from_base(args.transformer_steps)
        known = torch.load(args.out / "base.ckpt", weights_only=True)
    else:
        reader = torch.load(args.out / "reading.ckpt", weights_only=True)
        course = transformer.from_nothing(args.transformer_steps)
        known = {f"text_encoder.{name}": weight for name, weight in reader.items()}
    folder, spawn = args.out / "stretches", multiprocessing.get_context("spawn")
    for i in range(args.drawers):
        shards = range(i, args.shards, args.drawers)
        spawn.Process(target=stretches.draw_ahead, daemon=True,
                      args=(shards, folder, args.seed, autoencoder, tokens, not args.eager, args.bf16)).start()
    transformer.train(args.out, tokens, known, stretches.Pool(folder), course, args.seed,
                      compiled=not args.eager, narrow=args.bf16, device=args.device)


def main():
    args = options()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    held = lock(args.out)  # until this process ends
    keep_options(args)
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
    if "encoder" in wanted:
        vae.train_encoder(args.out, args.encoder_steps, args.seed, args.clips, **how)
    if "autoencoder" in wanted:
        vae.train_autoencoder(args.out, args.autoencoder_steps, args.seed, args.clips, **how)
    if "transformer" in wanted and not transformer.is_trained(args.out / "transformer.ckpt", args.transformer_steps):
        train_transformer(args, words)
    if "model" in wanted:
        pipeline.snapshot(args.out)
        subprocess.run([sys.executable, ROOT / "export.py", args.out / "snapshot", "-o", args.out / "demo.gguf"],
                       check=True)


if __name__ == "__main__":
    main()
