"""Trains the transformer, and the text encoder with it, by flow matching on the frozen latents.

    x = (1 - sigma) * clean + sigma * noise,    wanted: velocity = noise - clean,    loss: their squared distance

Every batch follows from (options, step) alone, the options being the seed and the numbers of workers and steps, so a
run that was killed goes on as if nothing had happened.  Two worker processes of one thread each share a batch and sum
their gradients: on a machine that is busy with other things this loses far less than two threads that wait for each
other at every operation.
"""
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import latents
import model
import reading
from common import Average, Log, Optimisers, save_atomically, sum_over_workers

MIXED_SHARE = 0.8  # of all steps: until then, steps take turns with EXTENTS; after it, whole clips alone
EXTENTS = [(1, 192), (3, 64), (9, 24)]  # (latent frames, clips a worker): pictures, beginnings, whole clips
PIECES = 2  # of a worker's part of a batch, one after the other: what is half as large stays in the cache longer
SHARDS, NEW_SHARDS_EVERY, MOST_SHARDS = 4, 400, 96  # at first; two more every so many steps; in all
MUON_LR, ADAM_LR, EMA_DECAY = 0.01, 1e-3, 0.999
DROPPED = 0.1  # share of prompts replaced by the empty one, for guidance
SAVE_SECONDS = 120


class TextToVideo(nn.Module):
    """Text encoder and transformer as one module, so that they share an optimiser, an average and a checkpoint."""

    def __init__(self, vocabulary):
        super().__init__()
        self.text_encoder = model.new_text_encoder(vocabulary)
        self.transformer = model.new_transformer()

    def forward(self, x, sigma, ids, mask):
        return model.velocity(self.transformer, x, sigma, *model.embed(self.text_encoder, ids, mask))


def extent(step, steps):
    """(latent frames, clips a worker) of a step. Pictures teach what is where for a ninth of a clip's price."""
    return EXTENTS[step % len(EXTENTS)] if step < MIXED_SHARE * steps else EXTENTS[-1]


def shards_at(step):
    return min(MOST_SHARDS, SHARDS + 2 * (step // NEW_SHARDS_EVERY))


def rate(step, steps):
    """Factor of the learning rate: a short rise, then full, then linearly down while whole clips are alone."""
    return min(1, (step + 1) / 200, max((1 - step / steps) / (1 - MIXED_SHARE), 1e-3))


def check_length(step, before, steps):
    """Exits if a run of `before` steps, now at `step`, cannot become one of `steps`: up to where the rate falls, and
    the mix ends, the two are the same run, and after that no longer."""
    if step > MIXED_SHARE * min(before, steps) and before != steps:
        sys.exit(f"transformer.py: at step {step} a run of {before} steps can no longer become one of {steps}")


def sample_sigma(generator, count):
    """Noise levels: the logistic of a normal, shifted towards noise, where a clip's contents are decided."""
    return torch.sigmoid(0.6 + 1.2 * torch.randn(count, generator=generator))


def batch_at(step, steps, seed, rank, workers, pool, tokenizer):
    """(clean, noise, sigma, ids, mask): this worker's part of the batch of a step."""
    frames, count = extent(step, steps)
    rng = np.random.default_rng([seed, step, rank, workers])
    indices = rng.integers(shards_at(step) * latents.SHARD, size=count)
    prompts = reading.captions(tokenizer, [latents.shard_scene(seed, int(i)) for i in indices], rng)
    prompts = [[1] if rng.random() < DROPPED else ids for ids in prompts]
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    clean = pool.batch(indices, frames)
    noise, sigma = torch.randn(clean.shape, generator=generator), sample_sigma(generator, count)
    return clean, noise, sigma, *model.pad(prompts, model.TOKENS)


def make_shards(step, seed, rank, workers, folder, light):
    """Sees to it that the shards of a step exist; the workers take turns, and nobody goes on before all are there."""
    for k in range(rank, shards_at(step), workers):
        latents.make_shard(folder, k, seed, light)
    if dist.is_initialized():
        dist.barrier()


def train(out, tokenizer, encoder_state, light, steps, seed, rank=0, workers=1, saved=lambda: None, compiled=False):
    """Trains up to `steps` steps, going on from OUT/transformer.ckpt; saved() follows each save.

    The logged seconds are those on the clock, saves included, of this start and, up to their last saves, earlier ones.

    compiled: by torch.compile, which takes minutes once and then makes a step a fifth shorter; needs a C++ compiler.
    """
    torch.manual_seed(seed)
    net = TextToVideo(len(tokenizer))
    net.text_encoder.load_state_dict(encoder_state)
    optimisers = Optimisers(net.named_parameters(), MUON_LR, ADAM_LR)
    average = Average(net, EMA_DECAY)
    checkpoint, log = out / "transformer.ckpt", Log(out / "log" / "transformer.tsv")
    step, samples, start = 0, 0, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        check_length(state["step"], state["steps"], steps)
        net.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        average.shadow, average.count = state["average"], state["step"]
        step, samples, start = state["step"], state["samples"], start - state["seconds"]

    def save():
        save_atomically({"model": net.state_dict(), "average": average.shadow, "optimisers": optimisers.state_dict(),
                         "step": step, "steps": steps, "samples": samples, "seconds": time.time() - start}, checkpoint)
        saved()

    forward = torch.compile(net, dynamic=False) if compiled else net

    def loss_of(clean, noise, sigma, ids, mask):
        s = sigma[:, None, None, None, None]
        return (forward((1 - s) * clean + s * noise, sigma, ids, mask) - (noise - clean)).square().mean() / PIECES

    def accumulate(batch):
        """Adds the gradients of a batch, and returns its loss."""
        total = 0.0
        for piece in zip(*(part.chunk(PIECES) for part in batch)):
            loss = loss_of(*piece)
            loss.backward()
            total += loss.item()
        return total

    pool, shards, last_save = latents.Pool(out / "latents"), 0, time.time()
    recent = {frames: [] for frames, _ in EXTENTS}
    logged = time.time(), samples
    while step < steps:
        if shards_at(step) != shards:
            make_shards(step, seed, rank, workers, out / "latents", light)
            shards = shards_at(step)
        parts = batch_at(step, steps, seed, rank, workers, pool, tokenizer)
        loss = accumulate(parts)
        sum_over_workers([p.grad for p in net.parameters()], 1 / workers)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimisers.step(rate(step, steps))
        average.update(net)
        step, samples = step + 1, samples + workers * len(parts[0])
        recent[parts[0].shape[2]].append(loss)
        if rank == 0 and step % 50 == 0:
            now = time.time()
            log.write(step=step, samples=samples, seconds=now - start, norm=norm.item(),
                      samples_per_second=(samples - logged[1]) / (now - logged[0]),
                      **{f"loss{frames}": float(np.mean(x or [np.nan])) for frames, x in recent.items()})
            logged = now, samples
            recent = {frames: [] for frames in recent}
        if rank == 0 and (time.time() - last_save > SAVE_SECONDS or step == steps):
            save()
            last_save = time.time()
    return average.shadow
