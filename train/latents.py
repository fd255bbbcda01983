"""The transformer's training data: latents of drawn clips, in shards on disk.

Shard k holds the clips of indices k*SHARD ... of the world, encoded by the frozen light encoder.  A shard is a pure
function of the world and the encoder, so a lost one is simply made again.  The pool of shards grows as training goes
on, so that later clips are seen only a few times; drawing takes a tenth of the time.
"""
import dataclasses
import math
import pathlib

import numpy as np
import torch

import draw
import vae
import world
from world import FRAMES, SIZE

SHARD = 1024
HALF_CELL = 4 / SIZE  # a latent is 8 pixels wide and high
SINGLE_SHARDS = 4  # the first shards show one subject at a time: easy things first
WEIGHTS = {"spin": 4, "loop": 2, "jump": 2, "walk left": 2, "walk right": 2, "run left": 3, "run right": 3,
           "character": 2, "star": 1.5, "cross": 2, "orbit": 1.5, "jump together": 1.5}  # what is learned last


def shard_kinds(k):
    """The kinds of scenes in shard k, as world.scene takes them: drawn from evenly."""
    return ("single",) if k < SINGLE_SHARDS else ("single", "single", "pair", "pair", "relation")


def shard_scene(seed, index):
    """The scene of clip `index` of the training world: as world.scene draws it, but for its offsets.

    They become half a latent cell, to one side or the other. A whole cell lies between the two, so a subject's latents
    are the same in either place, only moved, and the transformer need not learn them for every fraction of a cell.
    """
    scene = world.scene(seed, index, shard_kinds(index // SHARD), weights=WEIGHTS)
    return dataclasses.replace(scene, dx=math.copysign(HALF_CELL, scene.dx), dy=math.copysign(HALF_CELL, scene.dy))


def shard_path(folder, k):
    return pathlib.Path(folder) / f"shard-{k:04d}.npy"


@torch.no_grad()
def make_shard(folder, k, seed, light):
    """Draws and encodes shard k unless it is there: float16 [SHARD, Z, T, h, w]."""
    path = shard_path(folder, k)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    out = []
    for start in range(k * SHARD, (k + 1) * SHARD, 8):
        clips = np.stack([draw.draw(shard_scene(seed, i), SIZE, FRAMES) for i in range(start, start + 8)])
        out.append(light(vae.to_tensor(clips)).half().numpy())
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, np.concatenate(out))
    temporary.rename(path)


class Pool:
    """Clips by index over the shards made so far, mapped from disk."""

    def __init__(self, folder):
        self.folder, self.shards = folder, {}

    def __getitem__(self, index):
        k = index // SHARD
        if k not in self.shards:
            self.shards[k] = np.load(shard_path(self.folder, k), mmap_mode="r")
        return self.shards[k][index % SHARD]

    def batch(self, indices, frames):
        """float32 [len(indices), Z, frames, h, w]: the first `frames` latent frames of each clip."""
        return torch.from_numpy(np.stack([self[i][:, :frames] for i in indices]).astype(np.float32))
