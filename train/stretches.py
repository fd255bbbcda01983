"""The transformer's training data: latents of stretches of stories, in shards on disk.

A stretch is ten chunks of latent frames, from the start of a story or from anywhere in its minute, encoded by Wan's own
encoder. A cut's first latent frame stands for one picture, where the whole film's would stand for four; it is left out.
Beside the latents stand the sentences, several tellings of each story, so a shard needs nothing else to be read.

Other processes draw the shards, one after the other, while the transformer trains on those that are there.
"""
import dataclasses
import json
import math
import os
import pathlib
import time

import numpy as np
import torch

import draw
import model
import vae
import world
from common import products
from world import CHUNK, SIZE

SHARD, STRETCH = 32, 10  # stretches in a shard; chunks in a stretch
LATEST, SENTENCES, TELLINGS = 75, 8, 6  # chunk at which a stretch begins at the latest; of half of the stories; of each
AT_START = 0.35  # share of stretches from a story's start
KINDS = "single", "single", "single", "single", "pair", "relation", "relation"  # how stories begin, drawn from evenly
HALF_CELL = 4 / SIZE  # a latent is 8 pixels wide and high


def story_of(seed, index):
    """The story of stretch `index`: one sentence or, every second one, several.

    The scenes' offsets become half a latent cell, down and to one side or the other. A whole cell lies between the two,
    so a subject's latents are the same in either place, only moved, and the transformer need not learn them for every
    fraction of one.
    """
    story = world.story(seed, index, KINDS, weights=world.LEARNED_LAST, sentences=(1, SENTENCES)[index % 2])
    dx = math.copysign(HALF_CELL, story.scenes[0].dx)
    return dataclasses.replace(story, scenes=tuple(dataclasses.replace(s, dx=dx, dy=HALF_CELL) for s in story.scenes))


def begin_of(story, rng):
    """The chunk at which a stretch of a story begins. Of a lone sentence early ones are likelier: some come to rest."""
    if rng.random() < AT_START:
        return 0
    last = story.starts[-1] // CHUNK
    return 1 + int(rng.integers(last + 4) if last else LATEST * rng.random() ** 3)


def drawn(story, begin):
    """Pixels of a stretch, float [3, F, SIZE, SIZE], after the frame that the encoder takes for a first picture."""
    first = world.first_frame(CHUNK * begin) - 1 if begin else 0
    frames = 4 * CHUNK * STRETCH + (1 if begin else -3)
    return vae.to_tensor(draw.draw(story, SIZE, frames, first))


def tellings_of(story, tokenizer, rng):
    """TELLINGS times [[chunk, text], ...], in none of which a sentence has too many tokens."""
    result = []
    while len(result) < TELLINGS:
        telling = [[frame // CHUNK, text] for frame, text in world.story_captions(story, rng)]
        if all(len(tokenizer(text)) <= model.TOKENS for _, text in telling):
            result.append(telling)
    return result


def path_of(folder, k):
    return pathlib.Path(folder) / f"shard-{k:04d}.npy"


@torch.no_grad()
def make_shard(k, folder, seed, autoencoder, tokenizer, narrow):
    """Draws and encodes shard k: float16 [SHARD, STRETCH, Z, CHUNK, h, w], and a JSON file of what is told."""
    path, out, told = path_of(folder, k), [], []
    for index in range(k * SHARD, (k + 1) * SHARD):
        story, rng = story_of(seed, index), np.random.default_rng([seed, index, 5])
        begin = begin_of(story, rng)
        told.append({"begin": begin, "tellings": tellings_of(story, tokenizer, rng)})
        with products(narrow):
            z = vae.encode(autoencoder, drawn(story, begin)[None])[0]  # [Z, frames, h, w]
        out.append(z[:, -CHUNK * STRETCH:].unflatten(1, (STRETCH, CHUNK)).transpose(0, 1).half().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(told))
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, np.stack(out))
    temporary.rename(path)


def draw_ahead(shards, *args):
    """A process of its own: makes those of the shards that are not there, as long as its parent lives."""
    torch.set_num_threads(1)
    parent = os.getppid()
    for k in shards:
        if not path_of(args[0], k).exists() and os.getppid() == parent:
            make_shard(k, *args)


class Pool:
    """The windows of all shards that are there, up to the first that is not."""

    def __init__(self, folder):
        self.folder, self.latents, self.told, self.at_start = folder, [], [], []

    def grow(self):
        """Takes in the shards that have come, and waits for the first; how many stretches there are."""
        while (path := path_of(self.folder, len(self.told) // SHARD)).exists() or not self.told:
            if not path.exists():
                time.sleep(1)
                continue
            self.latents += list(np.load(path, mmap_mode="r"))
            self.told += json.loads(path.with_suffix(".json").read_text())
            self.at_start = [i for i, told in enumerate(self.told) if told["begin"] == 0]
        return len(self.told)

    def window(self, rng, chunks, at_start):
        """(latents [chunks, Z, CHUNK, h, w], the text of each chunk) of so many chunks of a stretch."""
        i = int(rng.choice(self.at_start) if at_start else rng.integers(len(self.told)))
        first = 0 if at_start else int(rng.integers(STRETCH - chunks + 1))
        begin, tellings = self.told[i]["begin"], self.told[i]["tellings"]
        telling = tellings[rng.integers(len(tellings))]
        texts = [[text for start, text in telling if start <= begin + first + c][-1] for c in range(chunks)]
        return np.asarray(self.latents[i][first:first + chunks]), texts
