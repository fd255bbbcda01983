"""The transformer's training data: latents of stretches of stories, in shards on disk.

    shard 0, 3, 6, ...    96 stretches of 3 chunks    the first seconds of a story
    the others            32 stretches of 8 chunks    from anywhere in a story's minute

Both take a core about as long: frames are what costs, in Wan's own encoder. A story has one scene, or several: one in
two of the first kind of shard, three in four of the other. A cut's first latent frame stands for one picture, where the
whole film's would stand for four; it is left out. Beside the latents stand the sentences, several tellings of each
story, so a shard needs nothing else to be read.

Beside half of the stretches from anywhere stands a mistaken past: the same, but a subject has another shape or colour,
or is not there (world.mistaken). A model that learns from it believes the sentence, not what it made before. Else it
would keep for ever a subject that it once got wrong.

Other processes draw the shards, one after the other, while the transformer trains on those that are there. A model
that sees the same stretches again and again learns them by heart.
"""
import dataclasses
import functools
import json
import os
import pathlib
import time

import numpy as np
import torch

import draw
import model
import vae
import world
from common import products, replacing
from world import CHUNK, SIZE

START, ANYWHERE = 0, 1  # where a stretch begins
STRETCHES, CHUNKS = (96, 32), (3, 8)  # in a shard of each; in a stretch of each
MISTAKEN = 0, 16  # stretches in a shard of each that have a mistaken past, too
LATEST = 56  # the last chunk at which a stretch of a lone sentence may begin
LONE_EVERY = 2, 4  # of so many stories of each, one has one scene
SENTENCES = 8  # of the others
TELLINGS = 6  # sets of captions of each story
LASTS = 3, 5  # chunks that a sentence lasts, at least and at most: few, since where it changes is what is hard to learn
# Kinds of lone scenes, drawn from evenly.
LONE = "single", "single", "single", "pair", "relation", world.TRIO, world.TRIO
FIRST = (*world.KINDS, world.TRIO)  # kinds of the others' first scenes
# How often the lone scenes of each show what. A story's subjects are small, so lone ones are oftener medium and large.
# Those from anywhere show characters: legs are hard to carry on.
SIZED = world.LEARNED_LAST | {"small": 1, "medium": 2, "large": 2}
LONE_WEIGHTS = SIZED, SIZED | {"character": 10}
HALF_CELL = 4 / SIZE  # a latent is 8 pixels wide and high


def story_of(seed, index, where):
    """The story of stretch `index` that begins at its START or ANYWHERE.

    Two subjects of which one shrinks are in no story of several scenes: later it would be too small to be seen. So a
    lone scene is not one of world.story, or the transformer would forget them.

    The scenes' offsets become half a latent cell, down and to the right. A model that is to choose between two places in
    four steps may take their mean, which is a lump.
    """
    if index % LONE_EVERY[where]:
        story = world.story(seed, index, FIRST, weights=world.LEARNED_LAST, sentences=SENTENCES, chunks=LASTS)
    else:
        story = world.Story((world.scene(seed, index, LONE, weights=LONE_WEIGHTS[where]),), (0,))
    return dataclasses.replace(story, scenes=tuple(dataclasses.replace(s, dx=HALF_CELL, dy=HALF_CELL)
                                                   for s in story.scenes))


def begin_of(story, where, rng):
    """The chunk at which a stretch of a story begins. Of a lone sentence early ones are likelier, since some
    motions come to rest."""
    if where == START:
        return 0
    last = story.starts[-1] // CHUNK
    return 1 + int(rng.integers(last + 4) if last else LATEST * rng.random() ** 3)


def drawn(story, begin, chunks, mistakes={}):
    """Pixels of a stretch, float [3, F, SIZE, SIZE], after the frame that the encoder takes for a first picture."""
    first = world.first_frame(CHUNK * begin) - 1 if begin else 0
    frames = 4 * CHUNK * chunks + (1 if begin else -3)
    return vae.to_tensor(draw.draw(story, SIZE, frames, first, mistakes))


def tellings_of(story, tokenizer, rng):
    """TELLINGS times [[chunk, text], ...], in none of which a sentence has too many tokens."""
    result = []
    while len(result) < TELLINGS:
        telling = [[frame // CHUNK, text] for frame, text in world.story_captions(story, rng)]
        if all(len(tokenizer(text)) <= model.TOKENS for _, text in telling):
            result.append(telling)
    return result


def where_of(k):
    """Where the stretches of shard k begin: START or ANYWHERE."""
    return START if k % 3 == 0 else ANYWHERE


def path_of(folder, k):
    """The file of shard k."""
    return pathlib.Path(folder) / f"shard-{k:04d}.npy"


def mistaken_path_of(folder, k):
    """The file of the mistaken pasts of shard k."""
    return pathlib.Path(folder) / f"mistaken-{k:04d}.npy"


@torch.no_grad()
def make_shard(k, folder, seed, encode, tokenizer, narrow):
    """Draws and encodes shard k: float16 [stretches, chunks, Z, CHUNK, h, w], a file of its mistaken pasts, likewise
    [MISTAKEN, ...], and a JSON file of what is told.

    encode: pixels [1, 3, F, H, W] -> latents.
    """
    path, where, out, mistaken, told = path_of(folder, k), where_of(k), [], [], []

    def latents(story, begin, mistakes={}):
        with products(narrow):
            z = encode(drawn(story, begin, CHUNKS[where], mistakes)[None])[0]  # [Z, frames, h, w]
        if not z.isfinite().all():
            raise FloatingPointError(f"shard {k}: the encoder gave NaN")
        z = z[:, -CHUNK * CHUNKS[where]:].unflatten(1, (CHUNKS[where], CHUNK))
        return z.transpose(0, 1).half().numpy()

    for i in range(STRETCHES[where]):
        index = k * max(STRETCHES) + i
        story, rng = story_of(seed, index, where), np.random.default_rng([seed, index, 5])
        begin = begin_of(story, where, rng)
        told.append({"begin": begin, "tellings": tellings_of(story, tokenizer, rng)})
        out.append(latents(story, begin))
        if i < MISTAKEN[where]:
            scenes = [story.at(world.first_frame(CHUNK * (begin + c))) for c in range(CHUNKS[where])]
            mistaken.append(latents(story, begin, world.mistaken(scenes, rng)))
    if mistaken:
        np.save(mistaken_path_of(folder, k), np.stack(mistaken))
    with replacing(path) as new:
        path.with_suffix(".json").write_text(json.dumps(told))
        np.save(new, np.stack(out))


def draw_ahead(shards, folder, seed, autoencoder, tokenizer, compiled, narrow):
    """A process of its own: makes those of the shards that are not there, as long as its parent lives."""
    torch.set_num_threads(1)
    parent = os.getppid()
    for module in autoencoder.encoder.modules():
        if isinstance(module, torch.nn.Conv3d):  # so a convolution takes two thirds of the time; compiled, half of it
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    encode = functools.partial(vae.encode, autoencoder)
    # PyTorch 2.13 compiles the encoder wrongly in bfloat16 with AMX: of 45 frames it makes NaN.
    wrong = narrow and torch.cpu._is_amx_tile_supported()
    encode = torch.compile(encode, dynamic=False) if compiled and not wrong else encode
    for k in shards:
        if not path_of(folder, k).exists() and os.getppid() == parent:
            make_shard(k, folder, seed, encode, tokenizer, narrow)


class Pool:
    """The stretches of all shards that are there, up to the first that is not."""

    def __init__(self, folder):
        self.folder, self.shards, self.latents, self.told = folder, 0, ([], []), ([], [])
        self.mistaken = []  # (number of a stretch from anywhere, its mistaken past)

    def grow(self):
        """Takes in the shards that have come, and waits for the first two; how many stretches there are."""
        while (path := path_of(self.folder, self.shards)).exists() or self.shards < 2:
            if not path.exists():
                time.sleep(1)
                continue
            where = where_of(self.shards)
            if MISTAKEN[where]:
                self.mistaken += enumerate(np.load(mistaken_path_of(self.folder, self.shards), mmap_mode="r"),
                                           len(self.told[where]))
            self.latents[where].extend(np.load(path, mmap_mode="r"))
            self.told[where].extend(json.loads(path.with_suffix(".json").read_text()))
            self.shards += 1
        return sum(map(len, self.told))

    def stretch(self, i, where, rng):
        """(latents [CHUNKS, Z, CHUNK, h, w], the text of each chunk) of stretch i, in one of its tellings."""
        latents, told = self.latents[where][i], self.told[where][i]
        telling = told["tellings"][rng.integers(TELLINGS)]
        return latents, [[text for start, text in telling if start <= told["begin"] + c][-1]
                         for c in range(CHUNKS[where])]
