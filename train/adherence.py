"""How often does the model do as it is told?  The world asks, the C program makes the clip, the detector answers.

    python train/adherence.py models/demo.gguf --prompts 200 --kind single --held-out

Every clip is one run of `./sora -m MODEL --seed N PROMPT`, with the file's own defaults, read back from its Y4M file.
Prints, for each attribute, the share of prompts in which the detector sees what the prompt names, and the same for all
attributes at once.  --ceiling puts drawn clips through the model's VAE instead: what a transformer that made exactly
the encoder's latents would be credited with (of a finished model: a run from nothing fits the encoder last).
"""
import argparse
import concurrent.futures
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile
import time

import numpy as np
import torch

import base
import detect
import draw
import vae
import video
import world
from common import Log

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT_SEED = 3


def question(index, kind, held_out):
    """(scene, prompt) number `index` of a kind. Most scenes occur in training too, with other words, places and light;
    those that are held out never do."""
    scene = world.scene(PROMPT_SEED, index, (kind,), held_out)
    return scene, world.caption(scene, np.random.default_rng([PROMPT_SEED, index, 1]))  # not the scene's own numbers


def generate(sora, model, prompt, seed, options=()):
    """The C program's clip of a prompt, uint8 [F, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        clip = pathlib.Path(folder) / "clip.y4m"
        subprocess.run([sora.resolve(), "-m", model, "--seed", str(seed), "-t", "1", "-q", "--no-record", *options,
                        "-o", clip, "--prompt", prompt], check=True)
        return video.read(clip)[0]


autoencoder_of = functools.lru_cache(base.autoencoder)


@torch.no_grad()
def through_vae(autoencoder, scene):
    """The drawn clip of a scene, encoded and decoded: uint8 [F, H, W, 3], without the way through a Y4M file."""
    pixels = vae.decode(autoencoder, vae.encode(autoencoder, vae.to_tensor(draw.draw(scene))[None]))[0]
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def answer(index, args):
    """(prompt, {attribute: right or not}, clip or None) of one question."""
    torch.set_num_threads(1)
    scene, prompt = question(index, args.kind, args.held_out)
    if args.ceiling:
        clip = through_vae(autoencoder_of(args.model), scene)
    else:
        clip = generate(args.sora, args.model, prompt, args.seed + index, args.option)
    return prompt, detect.compare(scene, detect.detect(clip)), clip if args.strip else None


def weights_id(path):
    """What was judged: the first digits of the SHA-256 of the model's file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def write_results(path, args, answers):
    """A table of every prompt, its seed, and the attributes that were wrong."""
    lines = ["seed\tprompt\twrong"]
    lines += [f"{args.seed + i}\t{prompt}\t{' '.join(n for n, ok in marks.items() if not ok)}"
              for i, (prompt, marks, _) in enumerate(answers)]
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?", default=ROOT / "models" / "demo.gguf")
    parser.add_argument("--sora", type=pathlib.Path, default=ROOT / "sora")
    parser.add_argument("--option", action="append", default=[], help="for the program, as in --option=--steps=8")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--kind", choices=world.KINDS, default="single")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next one's is one more")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="clips made at a time, on one thread each")
    parser.add_argument("--ceiling", action="store_true", help="judge the model's VAE on drawn clips instead")
    parser.add_argument("--log", type=pathlib.Path, help="append the shares to this table")
    parser.add_argument("--results", type=pathlib.Path, help="write the prompts, with what was wrong, into this table")
    parser.add_argument("--strip", type=pathlib.Path, help="save every fourth frame of the first ten clips as a PNG")
    args = parser.parse_args()
    start = time.time()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        answers = list(pool.map(answer, range(args.prompts), [args] * args.prompts))
    if args.results:
        write_results(args.results, args, answers)
    if args.strip:
        video.save_strips(args.strip, [clip for _, _, clip in answers[:10]])
        print(*(f"{prompt}\t{[n for n, ok in marks.items() if not ok]}" for prompt, marks, _ in answers[:10]), sep="\n")
    found = detect.shares([marks for _, marks, _ in answers])
    row = dict(model=weights_id(args.model), kind=args.kind, held_out=args.held_out, prompts=args.prompts,
               seconds=time.time() - start)
    if args.log:
        Log(args.log).write(**row, **{name: found.get(name, float("nan")) for name in detect.ATTRIBUTES})
    print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in {**row, **found}.items()))


if __name__ == "__main__":
    main()
