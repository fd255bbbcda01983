"""How often does the model do as it is told?  Prompts from the world, clips from the model, answers from the detector.

    python train/adherence.py OUT/snapshot --prompts 64

Prints, for each attribute, the share of prompts in which the detector sees what the prompt names, and the same for all
attributes at once; --ceiling puts drawn clips through the VAE instead, which no transformer can beat.
"""
import argparse
import pathlib
import time

import numpy as np
import torch
from diffusers import WanPipeline

import detect
import draw
import latents
import model
import vae
import world
from common import Log

PROMPT_SEED = 3


def load(folder):
    """The WanPipeline of a folder in float32, ready for the batched sampling below."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.transformer.set_attn_processor(model.MatmulAttention())
    vae.whole_clips(pipeline.vae)
    return pipeline


@torch.no_grad()
def sample(pipeline, prompts, seed, steps, guidance, size=latents.SIZE, frames=latents.FRAMES):
    """uint8 [B, F, S, S, 3]: one clip a prompt, as WanPipeline makes them, all prompts in one batch."""
    shape = (len(prompts), vae.Z, 1 + (frames - 1) // 4, size // 8, size // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    texts = prompts + ([""] * len(prompts) if guidance > 1 else [])
    ids = pipeline.tokenizer(texts)["input_ids"]
    states, bias = model.embed(pipeline.text_encoder, *model.pad(ids))
    pipeline.scheduler.set_timesteps(steps)
    for t in pipeline.scheduler.timesteps:
        both = torch.cat([x, x]) if guidance > 1 else x
        v = model.velocity(pipeline.transformer, both, (t / 1000).expand(len(both)), states, bias)
        if guidance > 1:
            v, v0 = v.chunk(2)
            v = v0 + guidance * (v - v0)
        x = pipeline.scheduler.step(v, t, x, return_dict=False)[0]
    return to_clips(pipeline, x)


def to_clips(pipeline, x):
    """uint8 clips of latents, decoded one at a time."""
    pixels = torch.cat([vae.decode(pipeline.vae, z[None]) for z in x])
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


@torch.no_grad()
def through_vae(pipeline, scenes, light):
    """The drawn clips of scenes, encoded and decoded."""
    clips = np.stack([draw.draw(s, latents.SIZE, latents.FRAMES) for s in scenes])
    return to_clips(pipeline, torch.cat([light(vae.to_tensor(clip)[None]) for clip in clips]))


def questions(count, kinds, held_out, first=0):
    """(scenes, prompts)."""
    scenes = [world.scene(PROMPT_SEED, first + i, kinds, held_out) for i in range(count)]
    return scenes, [world.caption(s, np.random.default_rng([PROMPT_SEED, first + i])) for i, s in enumerate(scenes)]


def score(scenes, clips):
    """{attribute: share right, "all": share of clips in which every attribute is right}."""
    right = {}
    for scene, clip in zip(scenes, clips):
        marks = detect.compare(scene, detect.detect(clip))
        for name, ok in [*marks.items(), ("all", all(marks.values()))]:
            right.setdefault(name.rstrip("01"), []).append(ok)
    return {name: float(np.mean(oks)) for name, oks in right.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=pathlib.Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--kind", choices=["single", "pair", "relation"], default="single")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ceiling", type=pathlib.Path, metavar="OUT", help="judge OUT's VAE on drawn clips instead")
    parser.add_argument("--log", type=pathlib.Path, help="append the shares to this table")
    parser.add_argument("--strip", type=pathlib.Path, help="save frames of the first clips as a PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, pipeline = time.time(), load(args.pipeline)
    scenes, prompts = questions(args.prompts, (args.kind,), args.held_out)
    if args.ceiling:
        clips = through_vae(pipeline, scenes, vae.load(args.ceiling)[1])
    else:
        clips = np.concatenate([sample(pipeline, prompts[i:i + 8], args.seed + i, args.steps, args.guidance)
                                for i in range(0, len(prompts), 8)])
    shares = score(scenes, clips)
    if args.strip:
        save_strip(args.strip, clips[:10])
        print(*prompts[:10], sep="\n")
    row = dict(kind=args.kind, held_out=args.held_out, prompts=args.prompts, steps=args.steps, guidance=args.guidance,
               seconds=time.time() - start, **{k: shares.get(k, float("nan")) for k in
                                               ("all", "background", "shape", "colour", "size", "motion", "relation", "count")})
    if args.log:
        Log(args.log).write(**row)
    else:
        print(*(f"{k}={v}" for k, v in row.items()))


def save_strip(path, clips):
    """One row a clip, every fourth frame."""
    from PIL import Image
    Image.fromarray(np.concatenate([np.concatenate(list(clip[::4]), 1) for clip in clips])).save(path)


if __name__ == "__main__":
    main()
