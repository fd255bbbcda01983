"""The transformer's training data: latents of drawn clips, in shards on disk.

Shard k holds the clips of indices k*SHARD ... of the world, encoded by the frozen light encoder.  A shard is a pure
function of the world and the encoder, so a lost one is simply made again.  The pool of shards grows as training goes
on, so that later clips are seen only a few times; drawing takes a tenth of the time.
"""
import dataclasses
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch

import draw
import vae
import world
from world import FRAMES, SIZE

SHARD = 1024
HALF_CELL = 4 / SIZE  # a latent is 8 pixels wide and high
SINGLE_SHARDS = 4  # the first shards show one subject at a time: easy things first
KINDS = "single", "single", "single", "single", "pair", "relation", "relation"  # then these, drawn from evenly


def shard_scene(seed, index):
    """The scene of clip `index` of the training world: as world.scene draws it, but for its offsets.

    They become half a latent cell, down and to one side or the other. A whole cell lies between the two, so a subject's
    latents are the same in either place, only moved, and the transformer need not learn them for every fraction of one.
    """
    kinds = ("single",) if index < SINGLE_SHARDS * SHARD else KINDS
    scene = world.scene(seed, index, kinds, weights=world.LEARNED_LAST)
    return dataclasses.replace(scene, dx=math.copysign(HALF_CELL, scene.dx), dy=HALF_CELL)


def shard_path(folder, k):
    return pathlib.Path(folder) / f"shard-{k:04d}.npy"


@torch.no_grad()
def make_shard(k, folder, seed, light):
    """Draws and encodes shard k unless it is there: float16 [SHARD, Z, T, h, w]."""
    path = shard_path(folder, k)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    out = []
    for start in range(k * SHARD, (k + 1) * SHARD, 8):
        scenes = [shard_scene(seed, i) for i in range(start, start + 8)]
        clips = np.stack([draw.draw(scene, SIZE, FRAMES) for scene in scenes])
        out.append(light(vae.to_tensor(clips)).half().numpy())
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, np.concatenate(out))
    temporary.rename(path)


class Pool:
    """Clips by index over the shards, mapped from disk; waits for one that another process has yet to make."""

    def __init__(self, folder):
        self.folder, self.shards = folder, {}

    def __getitem__(self, index):
        k = index // SHARD
        if k not in self.shards:
            path, parent = shard_path(self.folder, k), os.getppid()
            while not path.exists():
                if os.getppid() != parent:
                    sys.exit(1)  # nobody trains any more
                time.sleep(0.1)
            self.shards[k] = np.load(path, mmap_mode="r")
        return self.shards[k][index % SHARD]

    def batch(self, indices, frames):
        """float32 [len(indices), Z, frames, h, w]: the first `frames` latent frames of each clip."""
        return torch.from_numpy(np.stack([self[i][:, :frames] for i in indices]).astype(np.float32))
