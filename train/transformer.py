"""Trains the transformer, and the text encoder with it, by flow matching on the frozen latents.

    x = (1 - sigma) * clean + sigma * noise,    wanted: velocity = noise - clean,    loss: their squared distance

Every batch follows from (options, step) alone, the options being the seed, the number of workers and the course, so a
run that was killed goes on as if nothing had happened (on a GPU: but for the last bits of sums).  On a CPU the workers
are processes of one thread each, which make a batch together and sum their gradients: on a machine that is busy with
other things this loses far less than two threads that wait for each other at every operation.  A GPU takes all workers'
parts of the batch at once, and the CPU's cores see to it that the next ones are ready.
"""
import dataclasses
import os
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.utils.data
from torch import nn

import latents
import model
import reading
from common import Average, Log, Optimisers, Replayed, place, products, rate, save_atomically, sum_over_workers

EXTENTS = [(1, 192), (3, 64), (9, 24)]  # (latent frames, clips a worker): pictures, beginnings, whole clips
PIECES = {"cpu": 2, "cuda": 1}  # of a process's part of a batch, in turn: half as much stays in a CPU's cache longer
SHARDS, NEW_SHARDS_EVERY, MOST_SHARDS = 4, 600, 96  # at first; two more every so many steps; the last one's number
MUON_LR, ADAM_LR, EMA_DECAY = 0.01, 1e-3, 0.999
DROPPED = 0.1  # share of prompts replaced by the empty one, for guidance
SAVE_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Course:
    """How a run of so many steps goes.

    mixed: until this step they take turns with EXTENTS; after it, whole clips alone. peak: the highest factor of the
    learning rate. falling: the share of all steps, the last ones, in which it falls. skipped: the first shards of
    latents that it does without.
    """
    steps: int
    mixed: int
    peak: float
    falling: float
    skipped: int

    def extent(self, step):
        """(latent frames, clips a worker) of a step. Pictures teach what is where for a ninth of a clip's price."""
        return EXTENTS[step % len(EXTENTS)] if step < self.mixed else EXTENTS[-1]

    def rate(self, step):
        """Factor of the learning rate: a short rise, then the peak, then linearly down."""
        return self.peak * rate(step, self.steps, 200, self.falling)

    def shards(self, step):
        """Those that a step draws from."""
        return range(self.skipped, min(MOST_SHARDS, self.skipped + SHARDS + 2 * (step // NEW_SHARDS_EVERY)))

    def check_length(self, step, before):
        """Exits if a run of `before` steps, now at `step`, cannot become one of this length: up to where the rate falls
        the two are the same run, and after that no longer."""
        if step > (1 - self.falling) * min(before, self.steps) and before != self.steps:
            sys.exit(f"transformer.py: at step {step} a run of {before} steps can no longer become one of {self.steps}")


def from_nothing(steps):
    return Course(steps, mixed=3000, peak=1.0, falling=0.5, skipped=0)


def further(steps):
    """The course of a run that starts from a finished model."""
    return Course(steps, mixed=0, peak=0.7, falling=0.7, skipped=latents.SINGLE_SHARDS)


class TextToVideo(nn.Module):
    """Text encoder and transformer as one module, so that they share an optimiser, an average and a checkpoint."""

    def __init__(self, vocabulary):
        super().__init__()
        self.text_encoder = model.new_text_encoder(vocabulary)
        self.transformer = model.new_transformer()

    def forward(self, x, sigma, ids, mask):
        return model.velocity(self.transformer, x, sigma, *model.embed(self.text_encoder, ids, mask))


def sample_sigma(generator, count):
    """Noise levels: the logistic of a normal, shifted towards noise, where a clip's contents are decided."""
    return torch.sigmoid(0.6 + 1.2 * torch.randn(count, generator=generator))


def batch_at(step, course, seed, rank, workers, pool, tokenizer):
    """(clean, noise, sigma, ids, mask): this worker's part of the batch of a step."""
    frames, count = course.extent(step)
    rng = np.random.default_rng([seed, step, rank, workers])
    shards = course.shards(step)
    indices = rng.integers(shards.start * latents.SHARD, shards.stop * latents.SHARD, size=count)
    scenes = [latents.shard_scene(seed, int(i)) for i in indices]
    prompts = reading.captions(tokenizer, scenes, rng)
    prompts = [[1] if rng.random() < DROPPED else ids for ids in prompts]
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
    clean = pool.batch(indices, frames)
    noise, sigma = torch.randn(clean.shape, generator=generator), sample_sigma(generator, count)
    return clean, noise, sigma, *model.pad(prompts, model.TOKENS)


class Batches(torch.utils.data.Dataset):
    """The batches by step, or what some ranks of the workers see of them: (clean, noise, sigma, ids, mask)."""

    def __init__(self, ranks, *args):
        self.ranks, self.args = ranks, args

    def __getitem__(self, step):
        course, seed, workers, pool, tokenizer = self.args
        parts = [batch_at(step, course, seed, rank, workers, pool, tokenizer) for rank in self.ranks]
        return [torch.cat(part) for part in zip(*parts)]


def make_shards(shards, *args):
    """Sees to it that these shards exist; the processes take turns, and nobody goes on before all are there."""
    rank, processes = place()
    for k in shards[rank::processes]:
        latents.make_shard(k, *args)
    if dist.is_initialized():
        dist.barrier()


class Run:
    """What training changes: the network, its optimisers and average, and how far it has come.

    known: weights of TextToVideo that are not to be learned from nothing. narrow: whether products are in bfloat16.
    device: "cpu" or "cuda".
    """

    def __init__(self, vocabulary, known, narrow, device):
        self.net, self.narrow, self.device = TextToVideo(vocabulary), narrow, device
        self.net.load_state_dict(self.net.state_dict() | known)
        self.net.to(device)
        self.forward = self.net
        self.optimisers = Optimisers(self.net.named_parameters(), MUON_LR, ADAM_LR, narrow)
        self.average = Average(self.net, EMA_DECAY)
        self.learn = Replayed(self._learn) if device == "cuda" else self._learn
        self.step, self.samples, self.start = 0, 0, time.time()

    def restore(self, checkpoint, course):
        """Goes on from a checkpoint, of a run that may have been meant to be of another length."""
        state = torch.load(checkpoint, weights_only=True, map_location=self.device)
        course.check_length(state["step"], state["steps"])
        self.net.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.average.shadow, self.average.count = state["average"], state["step"]
        self.step, self.samples, self.start = state["step"], state["samples"], self.start - state["seconds"]

    def save(self, checkpoint, steps):
        save_atomically({"model": self.net.state_dict(), "average": self.average.shadow, "step": self.step,
                         "optimisers": self.optimisers.state_dict(), "steps": steps, "samples": self.samples,
                         "seconds": time.time() - self.start}, checkpoint)

    def loss(self, clean, noise, sigma, ids, mask):
        s = sigma[:, None, None, None, None]
        with products(self.narrow, self.device):
            found = self.forward((1 - s) * clean + s * noise, sigma, ids, mask)
        return (found.float() - (noise - clean)).square().mean()

    def _learn(self, *batch):
        """One step of the weights on this process's part of a batch; (its loss, the norm of the gradient)."""
        pieces, total = PIECES[self.device], 0.0
        for piece in zip(*(part.chunk(pieces) for part in batch)):
            loss = self.loss(*piece) / pieces
            loss.backward()
            total = total + loss.detach()
        sum_over_workers([p.grad for p in self.net.parameters()], 1 / place()[1])
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimisers.step()
        return total, norm

    def advance(self, batch, course, workers):
        """One step; (loss, norm) as of _learn. batch: of one process or all; workers: how many share the whole one."""
        self.optimisers.set_factor(course.rate(self.step))
        loss, norm = self.learn(*(part.to(self.device, non_blocking=True) for part in batch))
        self.average.update(self.net)
        self.samples += workers * course.extent(self.step)[1]
        self.step += 1
        return loss, norm


def is_trained(checkpoint, steps):
    """Whether a run of so many steps has come to its end there."""
    if not checkpoint.exists():
        return False
    state = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    return state["step"] == state["steps"] == steps


class Curve:
    """The loss curve in OUT/log/transformer.tsv: a row for every 50 steps, with the mean loss of each extent."""

    def __init__(self, path, samples):
        self.log, self.losses, self.since = Log(path), {}, (time.time(), samples)

    def add(self, run, frames, loss, norm):
        self.losses.setdefault(frames, []).append(loss)
        if run.step % 50:
            return
        now = time.time()
        self.log.write(step=run.step, samples=run.samples, seconds=now - run.start, norm=norm.item(),
                       samples_per_second=(run.samples - self.since[1]) / (now - self.since[0]),
                       **{f"loss{n}": float(torch.tensor(self.losses.get(n, np.nan)).mean()) for n, _ in EXTENTS})
        self.losses, self.since = {}, (now, run.samples)


def draw_ahead(rank, helpers, shards, *args):
    """One of the helpers that draw all shards of a run, in their order, while it goes on."""
    os.nice(19)  # behind those that load batches of what is drawn already
    torch.set_num_threads(1)
    for k in shards[rank::helpers]:
        latents.make_shard(k, *args)


def watch(drawing):
    """Waits for all that draw; ends this process if one of them fails, for it would wait for shards for ever."""
    try:
        while not drawing.join():
            pass
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        print(error, file=sys.stderr)
        os._exit(1)  # the main thread may be waiting


def train(out, tokenizer, known, light, course, seed, ranks=(0,), workers=1, saved=lambda: None, compiled=False,
          narrow=False, device="cpu", helpers=0):
    """Trains as a Course says, going on from OUT/transformer.ckpt; the averaged weights of TextToVideo.

    known, narrow, device: as of Run. light: the encoder that makes the shards. ranks: of the workers whose parts of a
    batch are this process's. saved() follows each save. The logged seconds are those on the clock, saves included, of
    this start and, up to their last saves, earlier ones.

    compiled: by torch.compile, which takes minutes once and then makes a step a fifth shorter; needs a C++ compiler.
    helpers: so many processes draw clips, and so many others load batches, ahead of this one; if none, it does both.
    """
    torch.manual_seed(seed)
    if device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # no graph can be recorded on the one that is there
    run, checkpoint = Run(len(tokenizer), known, narrow, device), out / "transformer.ckpt"
    if checkpoint.exists():
        run.restore(checkpoint, course)
    if compiled:
        run.forward = torch.compile(run.net, dynamic=False)
    folder, shards, last_save = out / "latents", None, time.time()
    if helpers:
        all_shards = range(course.skipped, course.shards(course.steps - 1).stop)
        drawing = multiprocessing.spawn(draw_ahead, (helpers, all_shards, folder, seed, light), helpers, join=False,
                                        daemon=True)
        watching = threading.Thread(target=watch, args=(drawing,), daemon=True)
        watching.start()
    batches = iter(torch.utils.data.DataLoader(
        Batches(ranks, course, seed, workers, latents.Pool(folder), tokenizer), batch_size=None,
        sampler=range(run.step, course.steps), num_workers=helpers, pin_memory=device == "cuda"))
    curve = Curve(out / "log" / "transformer.tsv", run.samples)
    while run.step < course.steps:
        if not helpers and course.shards(run.step) != shards:
            shards = course.shards(run.step)
            make_shards(shards, folder, seed, light)
        batch = next(batches)
        loss, norm = run.advance(batch, course, workers)
        if 0 in ranks:
            curve.add(run, batch[0].shape[2], loss, norm)
        if 0 in ranks and (time.time() - last_save > SAVE_SECONDS or run.step == course.steps):
            run.save(checkpoint, course.steps)
            saved()
            last_save = time.time()
    if helpers:
        watching.join()  # else those that draw would be ended with this process, as if they had failed
    return run.average.shadow
