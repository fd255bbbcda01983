"""Teaches the transformer to make a clip chunk by chunk: teacher forcing on windows of long clips.

A sample is a sequence of chunks of three latent frames. First stand drawn ones, told to be clean, then the same clip's
later ones with noise on, twice, each time with another sigma. Every chunk sees itself and the two drawn chunks before
it, as through a window of nine frames:

    at the start     drawn 0 1          noisy 0 1 2
    anywhere         drawn 0 1 2 3      noisy     2 3 4         noisy 4 sees drawn 2, drawn 3 and itself

So one pass learns six times, each from the past that the C program's cache would hold (cache.c). The program's past is
its own work and never quite clean: three samples in four have noise on the drawn chunks that they are not told of, and
in the last third of the steps half of the batches have the model's own guesses of chunks 2 and 3 for a past.

The text encoder stays as it is. Each chunk reads the prompt of its time, so a story is a sample like any other.
"""
import dataclasses
import signal
import time

import numpy as np
import torch

import model
from common import Average, Log, Optimisers, products, rate, save_atomically
from world import CHUNK

WINDOW = 3 * CHUNK  # latent frames that a chunk sees, its own included
BATCH, PROMPTS = 16, 3  # samples of a step; prompts of a sample, at most
START_SHARE = 0.35  # of the batches
UNTOLD, UNTOLD_SHARE = 0.2, 0.75  # most noise on what is told to be clean; share of samples that have any
OWN_FROM, OWN_SHARE, OWN_SIGMAS = 2 / 3, 0.5, (1.0, 0.75, 0.0)  # from this part of the steps on; of the batches
MUON_LR, ADAM_LR, EMA_DECAY, FALLING = 0.005, 5e-4, 0.998, 0.5
SAVE_SECONDS, LOG_STEPS = 180, 25


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sequence of a sample: which of its chunks are drawn, from chunk 0 on, and which are noisy."""
    name: str
    drawn: tuple
    noisy: tuple

    @property
    def chunks(self):
        return list(self.drawn + self.noisy)

    @property
    def sees(self):
        """For each chunk, the places in the sequence of those that it sees, itself last."""
        past = lambda chunk: [c for c in (chunk - 2, chunk - 1) if c in self.drawn]  # drawn chunk c stands in place c
        return [past(chunk) + [place] for place, chunk in enumerate(self.chunks)]


START = Layout("start", (0, 1), (0, 1, 2, 0, 1, 2))
ANYWHERE = Layout("anywhere", (0, 1, 2, 3), (2, 3, 4, 2, 3, 4))


class Batch:
    """What a step learns from: a function of the step and of the stretches that are there.

    clean [B, 3 or 5, Z, CHUNK, h, w]: the drawn chunks of the windows. states, bias: of the prompts. prompt_of [B, 3 or
    5]: the prompt that each chunk reads.
    """

    def __init__(self, step, seed, pool, tokenizer, text_encoder):
        rng = np.random.default_rng([seed, step])
        self.generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        self.layout = START if rng.random() < START_SHARE else ANYWHERE
        self.own = rng.random() < OWN_SHARE
        count = max(self.layout.noisy) + 1
        windows = [pool.window(rng, self.layout is START, count) for _ in range(BATCH)]
        self.clean = torch.from_numpy(np.stack([chunks for chunks, _ in windows])).float()
        self.prompt_of, prompts = torch.zeros(BATCH, count, dtype=torch.long), []
        for row, (_, texts) in enumerate(windows):
            different = list(dict.fromkeys(texts))
            self.prompt_of[row] = torch.tensor([row * PROMPTS + different.index(text) for text in texts])
            prompts += [tokenizer(text) for text in different] + [[1]] * (PROMPTS - len(different))
        with torch.no_grad():
            self.states, self.bias = model.embed(text_encoder, *model.pad(prompts, model.TOKENS))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)


class Run:
    """What training changes: the transformer, its optimisers and average, and how far it has come."""

    def __init__(self, transformer, steps, narrow, compiled):
        self.transformer, self.steps, self.narrow = transformer, steps, narrow
        self.run_block = model.compiled_block if compiled else model.plain_block
        self.optimisers = Optimisers(transformer.named_parameters(), MUON_LR, ADAM_LR, narrow)
        self.average = Average(transformer, EMA_DECAY)
        self.step, self.seconds = 0, 0.0

    def restore(self, checkpoint):
        state = torch.load(checkpoint, weights_only=True)
        self.transformer.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.average.shadow, self.average.count = state["average"], state["step"]
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self, checkpoint):
        save_atomically({"model": self.transformer.state_dict(), "average": self.average.shadow, "step": self.step,
                         "optimisers": self.optimisers.state_dict(), "seconds": self.seconds}, checkpoint)

    def forward(self, batch, context, x, sigma):
        """The velocity of noisy chunks x [B, n, Z, CHUNK, h, w] of noise level sigma [B, n] after those of the past."""
        layout = batch.layout
        told = torch.cat([torch.zeros(BATCH, len(layout.drawn)), sigma], 1)
        with products(self.narrow):
            found = model.chunk_velocity(
                self.transformer, torch.cat([context, x], 1), told, batch.states, batch.bias,
                batch.prompt_of[:, layout.chunks], [CHUNK * c for c in layout.chunks], layout.sees, self.run_block)
        return found[:, len(layout.drawn):].float()

    @torch.no_grad()
    def guessed(self, batch, context):
        """The context with the model's own guesses, in two Euler steps from noise, of the chunks that are noisy too."""
        noisy = batch.layout.noisy
        x = batch.normal(*batch.clean[:, noisy].shape)
        for sigma, after in zip(OWN_SIGMAS, OWN_SIGMAS[1:]):
            x = x + (after - sigma) * self.forward(batch, context, x, torch.full(x.shape[:2], sigma))
        return torch.stack([x[:, noisy.index(c)] if c in noisy else context[:, c] for c in batch.layout.drawn], 1)

    def losses(self, batch):
        """[n]: the squared distance from the wanted velocity, noise - clean, of each noisy chunk."""
        context, clean = batch.clean[:, batch.layout.drawn], batch.clean[:, batch.layout.noisy]
        if batch.own and batch.layout is ANYWHERE and self.step >= OWN_FROM * self.steps:
            context = self.guessed(batch, context)
        untold, share = UNTOLD * torch.rand(BATCH, generator=batch.generator), torch.rand(BATCH, generator=batch.generator)
        untold = (untold * (share < UNTOLD_SHARE)).view(-1, 1, 1, 1, 1, 1)
        context = (1 - untold) * context + untold * batch.normal(*context.shape)
        sigma = torch.sigmoid(0.6 + 1.2 * batch.normal(*clean.shape[:2]))  # mostly where contents are decided
        s, noise = sigma.view(*sigma.shape, 1, 1, 1, 1), batch.normal(*clean.shape)
        found = self.forward(batch, context, (1 - s) * clean + s * noise, sigma)
        return (found - (noise - clean)).square().mean((0, 2, 3, 4, 5))

    def advance(self, batch):
        """One step of the weights; (the losses of the noisy chunks, the norm of the gradient)."""
        losses = self.losses(batch)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimisers.set_factor(rate(self.step, self.steps, 100, FALLING))
        self.optimisers.step()
        self.average.update(self.transformer)
        self.step += 1
        return losses.detach(), norm


class Curve:
    """The loss curve in OUT/log/causal.tsv: a row for every LOG_STEPS steps, with the mean loss of each chunk."""

    def __init__(self, path):
        self.log, self.seen = Log(path), {}

    def add(self, run, batch, losses, norm, count):
        for chunk, loss in zip(batch.layout.noisy, losses.tolist()):
            self.seen.setdefault((batch.layout, chunk), []).append(loss)
        if run.step % LOG_STEPS == 0:
            mean = {f"{layout.name}{chunk}": float(np.mean(self.seen.get((layout, chunk), np.nan)))
                    for layout in (START, ANYWHERE) for chunk in sorted(set(layout.noisy))}
            self.log.write(step=run.step, seconds=run.seconds, stretches=count, norm=norm.item(), **mean)
            self.seen = {}


def train(out, tokenizer, text_encoder, transformer, pool, steps, seed, compiled=False, narrow=False):
    """Trains `transformer` up to `steps` steps into OUT/causal.ckpt, from which it also goes on; returns the averaged
    weights. pool: of stretches. A SIGTERM ends it after the step, saved: then the process exits."""
    run, checkpoint, curve = Run(transformer, steps, narrow, compiled), out / "causal.ckpt", Curve(out / "log/causal.tsv")
    if checkpoint.exists():
        run.restore(checkpoint)
    begun, last_save, asked = time.time() - run.seconds, time.time(), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    while run.step < steps:
        count = pool.grow()
        batch = Batch(run.step, seed, pool, tokenizer, text_encoder)
        losses, norm = run.advance(batch)
        run.seconds = time.time() - begun
        curve.add(run, batch, losses, norm, count)
        if asked or time.time() - last_save > SAVE_SECONDS or run.step == steps:
            run.save(checkpoint)
            last_save = time.time()
        if asked:
            raise SystemExit("train.py: asked to end; the same command goes on")
    return run.average.shadow
