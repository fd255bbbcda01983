"""Trains the transformer, and the text encoder with it, by flow matching on the frozen latents.

    x = (1 - sigma) * clean + sigma * noise,    wanted: velocity = noise - clean,    loss: their squared distance

A sample is a sequence of pieces: chunks, or single frames. It is laid out in one of six ways. The first three teach
what things look like, on the beginnings of stories, whose pieces see each other. Beginnings never cease, since the
program's first chunk has no past:

    picture      noisy: frame 0
    beginning    noisy: chunk 0
    whole        noisy: chunks 0 1 2, of one sigma

The fourth teaches to go on from a picture (--image):

    pictured     drawn: frame 0       noisy: frames 1 2 3 4, of one sigma

The others teach to go on chunk by chunk, by teacher forcing. First stand drawn chunks, told to be clean, then the same
clip's later ones with noise on, twice, each time with another sigma. Every chunk sees itself and the two drawn ones
before it:

    start        drawn 0 1          noisy 0 1 2
    anywhere     drawn 0 1 2 3      noisy     2 3 4         noisy 4 sees drawn 2, drawn 3 and itself

So one pass learns six times, each from the past that the C program's cache would hold (cache.c). The program's past is
its own work and never quite clean: three samples in four have noise on the drawn pieces that they are not told of. And
the model goes on by itself over some stretches now and then, as the program does. What it made is kept in OUT/own/, and
is the past of half of the samples from anywhere; of others it is a mistaken one, in which a subject has a wrong shape
or colour. The wanted chunks stay the drawn ones, so it learns to find back.

Each piece reads the prompt of its time, so a story is a sample like any other.
"""
import dataclasses
import itertools
import signal
import time

import numpy as np
import torch
from torch import nn

import model
import stretches
from common import Average, Log, Optimisers, products, rate, replacing, save_atomically
from world import CHUNK

WINDOW = 3 * CHUNK  # latent frames that a chunk sees, its own included
SHIFT = 3.0
SIGMAS = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1, 0.75, 0.5, 0.25)]  # the noise levels of a chunk's four steps
UNTOLD = 0.2  # most noise that is added to the past, which is still told to be clean
UNTOLD_SHARE = 0.75  # of the samples have such noise
OWN_SHARE = 0.5  # of the samples from anywhere have the model's own past, from the step on that the course says
MISTAKEN_SHARE = 0.2  # of them have a mistaken one
OWN_EVERY, OWN_KEPT = 10, 60  # after so many steps the model makes another past; so many of the last ones are used
MUON_LR, ADAM_LR, EMA_DECAY, FALLING = 0.01, 1e-3, 0.998, 0.7
SAVE_SECONDS, LOG_STEPS = 180, 25


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sequence of a sample: which pieces of a window are drawn, from piece 0 on, and which are noisy."""
    name: str
    samples: int  # in a batch
    drawn: tuple
    noisy: tuple
    frames: int = CHUNK  # of each piece
    together: bool = False  # whether the noisy ones see each other and all drawn ones, and have one sigma

    @property
    def pieces(self):
        return list(self.drawn + self.noisy)

    @property
    def sees(self):
        """For each piece, the places in the sequence of those that it sees, itself among them."""
        past = lambda piece: [p for p in (piece - 2, piece - 1) if p in self.drawn]  # drawn piece p stands in place p
        alone = [past(piece) + [place] for place, piece in enumerate(self.pieces)]
        count = len(self.drawn)
        return alone[:count] + [list(range(len(self.pieces)))] * len(self.noisy) if self.together else alone


PICTURE = Layout("picture", 256, (), (0,), frames=1)
BEGINNING = Layout("beginning", 72, (), (0,))
WHOLE = Layout("whole", 36, (), (0, 1, 2), together=True)
PICTURED = Layout("pictured", 48, (0,), (1, 2, 3, 4), frames=1, together=True)
START = Layout("start", 16, (0, 1), (0, 1, 2, 0, 1, 2))
ANYWHERE = Layout("anywhere", 16, (0, 1, 2, 3), (2, 3, 4, 2, 3, 4))
LAYOUTS = PICTURE, BEGINNING, WHOLE, PICTURED, START, ANYWHERE
NEXT = Layout("next", 16, (0, 1), (2,))  # how the program makes a chunk
GOING_ON = 0.20, 0.06, 0.22, 0.52  # shares of the batches of a beginning, and of the last three layouts


@dataclasses.dataclass(frozen=True)
class Course:
    """How a run of so many steps goes.

    mixed: until this step pictures, beginnings and whole clips take turns. whole: until this one clips are whole. own:
    from this one on the past may be the model's own. peak: the highest factor of the learning rate.
    """
    steps: int
    mixed: int
    whole: int
    own: int
    peak: float

    def layout(self, step, rng):
        if step < self.mixed:
            return (PICTURE, BEGINNING, WHOLE)[step % 3]  # pictures teach what is where for a ninth of a clip's price
        if step < self.whole:
            return WHOLE
        return (BEGINNING, PICTURED, START, ANYWHERE)[rng.choice(4, p=GOING_ON)]

    def own_steps(self, step):
        """The steps at which the model made what may be the past at this step."""
        return [s for s in range(0, step + 1, OWN_EVERY) if s >= self.own][-OWN_KEPT:]

    def rate(self, step):
        """Factor of the learning rate: a short rise, then the peak, then linearly down."""
        return self.peak * rate(step, self.steps, 100, FALLING)


def from_nothing(steps):
    """The course of a run that starts from random weights."""
    return Course(steps, mixed=steps // 8, whole=steps // 2, own=steps * 2 // 3, peak=1.0)


def from_base(steps):
    """The course of a run that starts from a finished model: it learns to go on."""
    return Course(steps, mixed=0, whole=0, own=steps // 10, peak=0.5)


class TextToVideo(nn.Module):
    """Text encoder and transformer as one module, so that they share an optimiser, an average and a checkpoint."""

    def __init__(self, vocabulary, run_block=model.plain_block):
        super().__init__()
        self.text_encoder = model.new_text_encoder(vocabulary)
        self.transformer = model.new_transformer()
        self.run_block = run_block

    def forward(self, x, sigma, ids, mask, prompt_of, first, sees):
        """Velocity of pieces x [B, C, Z, t, h, w]; arguments as of model.velocity. ids, mask [P, L]: prompts."""
        return model.velocity(self.transformer, x, sigma, *model.embed(self.text_encoder, ids, mask), prompt_of, first,
                              sees, self.run_block)


@dataclasses.dataclass(frozen=True)
class Window:
    """Some chunks of a stretch [chunks, Z, CHUNK, h, w], as they are wanted and as they are seen later; their texts."""
    wanted: np.ndarray
    past: np.ndarray
    texts: list


def window_of(layout, pool, rng, seen=None):
    """A Window for a sample of this layout. seen: (number of a stretch, its latents as they are seen later), or None."""
    where = stretches.ANYWHERE if layout is ANYWHERE else stretches.START
    number, past = seen or (int(rng.integers(len(pool.told[where]))), None)
    wanted, texts = pool.stretch(number, where, rng)
    past = wanted if past is None else past
    chunks = -(-(max(layout.noisy) + 1) * layout.frames // CHUNK)
    first = int(rng.integers(len(texts) - chunks + 1)) if where == stretches.ANYWHERE else 0
    return Window(*(x[first:first + chunks] for x in (wanted, past, texts)))


class Batch:
    """Windows as tensors, and random numbers for them.

    wanted, past [B, count, Z, t, h, w]: their pieces. prompts: (ids, mask) [P, L]. prompt_of [B, count]: the one that
    each piece reads.
    """

    def __init__(self, layout, windows, rng, tokenizer, device):
        self.layout, self.device = layout, device
        self.generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        self.wanted, self.past = (self._pieces([getattr(w, name) for w in windows]) for name in ("wanted", "past"))
        chunks, prompts, prompt_of = len(windows[0].texts), [], []
        most = 1 + -(-(chunks - 1) // stretches.LASTS[0])  # prompts of a window
        for window in windows:
            different = list(dict.fromkeys(window.texts))
            prompt_of.append([len(prompts) + different.index(text) for text in window.texts])
            prompts += [tokenizer(text) for text in different] + [[1]] * (most - len(different))
        self.prompt_of = torch.tensor(prompt_of).repeat_interleave(CHUNK // layout.frames, 1).to(device)
        self.prompts = [x.to(device) for x in model.pad(prompts, model.TOKENS)]

    def _pieces(self, latents):
        x = torch.from_numpy(np.stack(latents)).float()  # [B, chunks, Z, CHUNK, h, w]
        return x.unflatten(3, (-1, self.layout.frames)).transpose(2, 3).flatten(1, 2).to(self.device)

    def normal(self, *shape):
        """Normal numbers of a shape, on the device; the same for the same step."""
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def uniform(self, *shape):
        """Numbers in [0, 1) of a shape, likewise."""
        return torch.rand(*shape, generator=self.generator).to(self.device)


class Run:
    """What training changes: the network, its optimisers and average, and how far it has come.

    known: weights of TextToVideo that are not to be learned from nothing. narrow: whether products are in bfloat16.
    """

    def __init__(self, vocabulary, known, course, compiled, narrow, device):
        self.net = TextToVideo(vocabulary, model.compiled_block if compiled else model.plain_block)
        self.net.load_state_dict(self.net.state_dict() | known)
        self.net.to(device)
        self.course, self.narrow, self.device = course, narrow, device
        self.optimisers = Optimisers(self.net.named_parameters(), MUON_LR, ADAM_LR, narrow)
        self.average = Average(self.net, EMA_DECAY)
        self.step, self.seconds = 0, 0.0

    def restore(self, checkpoint):
        state = torch.load(checkpoint, weights_only=True, map_location=self.device)
        self.net.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.average.shadow, self.average.count = state["average"], state["step"]
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self, checkpoint):
        """Keeps what restore() needs to go on, and the averaged weights of TextToVideo."""
        save_atomically({"model": self.net.state_dict(), "average": self.average.shadow, "step": self.step,
                         "optimisers": self.optimisers.state_dict(), "seconds": self.seconds}, checkpoint)

    def forward(self, batch, first, context, x, sigma):
        """The velocity of noisy pieces x [B, n, Z, t, h, w] of noise level sigma [B, n] after those of the past.

        first: the number of the piece that stands where the layout says 0.
        """
        layout, past = batch.layout, context.shape[1]
        told = torch.cat([torch.zeros_like(sigma[:, :1]).expand(-1, past), sigma], 1)
        with products(self.narrow, self.device):
            found = self.net(torch.cat([context, x], 1), told, *batch.prompts,
                             batch.prompt_of[:, [first + p for p in layout.pieces]],
                             [layout.frames * p for p in layout.pieces], layout.sees)
        return found[:, past:].float()

    @torch.no_grad()
    def go_on(self, batch):
        """Whole stretches of which the model made all chunks but the first two, as the program does."""
        made = batch.wanted.clone()
        for c in range(2, made.shape[1]):
            x = batch.normal(*made[:, :1].shape)
            for sigma, after in itertools.pairwise((*SIGMAS, 0.0)):
                told = torch.full_like(x[:, :, 0, 0, 0, 0], sigma)
                x = x + (after - sigma) * self.forward(batch, c - 2, made[:, c - 2:c], x, told)
            made[:, c] = x[:, 0]
        return made

    def losses(self, batch):
        """[n]: the squared distance from the wanted velocity of each noisy piece."""
        layout = batch.layout
        context, wanted = batch.past[:, list(layout.drawn)], batch.wanted[:, list(layout.noisy)]
        untold = UNTOLD * batch.uniform(len(wanted)) * (batch.uniform(len(wanted)) < UNTOLD_SHARE)
        context = context + untold.view(-1, 1, 1, 1, 1, 1) * (batch.normal(*context.shape) - context)
        sigma = batch.normal(len(wanted), 1 if layout.together else wanted.shape[1]).expand(-1, wanted.shape[1])
        sigma = torch.sigmoid(1.1 + sigma)  # most are 0.5 and more, as in the program's four steps
        s, noise = sigma[:, :, None, None, None, None], batch.normal(*wanted.shape)
        found = self.forward(batch, 0, context, (1 - s) * wanted + s * noise, sigma)
        return (found - (noise - wanted)).square().mean((0, 2, 3, 4, 5))

    def advance(self, batch):
        """One step of the weights; (the losses of the noisy pieces, the norm of the gradient)."""
        losses = self.losses(batch)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0, error_if_nonfinite=True)
        self.optimisers.set_factor(self.course.rate(self.step))
        self.optimisers.step()
        self.average.update(self.net)
        self.step += 1
        return losses.detach(), norm


class Curve:
    """The loss curve in OUT/log/transformer.tsv: a row for every LOG_STEPS steps, with the mean loss of each piece."""

    def __init__(self, path):
        self.log, self.seen = Log(path), {}

    def add(self, run, batch, losses, norm, stretches):
        for piece, loss in zip(batch.layout.noisy, losses.tolist()):
            self.seen.setdefault(f"{batch.layout.name}{piece}", []).append(loss)
        if run.step % LOG_STEPS == 0:
            columns = [f"{layout.name}{piece}" for layout in LAYOUTS for piece in dict.fromkeys(layout.noisy)]
            self.log.write(step=run.step, seconds=run.seconds, stretches=stretches, norm=norm.item(),
                           **{name: float(np.mean(self.seen.get(name, np.nan))) for name in columns})
            self.seen = {}


def is_trained(checkpoint, steps):
    """Whether a run of so many steps has come to its end there."""
    if not checkpoint.exists():
        return False
    return torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)["step"] >= steps


def own_path(out, step):
    """The file of what the model made before this step: the numbers of stretches [16], and their latents."""
    return out / "own" / f"step-{step:05d}.npz"


def make_own(out, run, pool, seed, tokenizer):
    """Lets the model go on by itself over some stretches."""
    rng = np.random.default_rng([seed, run.step, 1])
    chosen = rng.choice(len(pool.told[stretches.ANYWHERE]), NEXT.samples)
    windows = [Window(latents, latents, texts)
               for latents, texts in (pool.stretch(i, stretches.ANYWHERE, rng) for i in chosen)]
    made = run.go_on(Batch(NEXT, windows, rng, tokenizer, run.device))
    with replacing(own_path(out, run.step)) as new:
        np.savez(new, stretches=chosen, latents=made.cpu().half().numpy())
    for old in own_path(out, run.step).parent.glob("step-*.npz"):
        if old < own_path(out, run.step - OWN_EVERY * 2 * OWN_KEPT):  # a run that was killed may need some older ones
            old.unlink()


def own_stretch(path, rng):
    """(number of a stretch, what the model made of it), one of those in a file of make_own."""
    made, row = np.load(path), int(rng.integers(NEXT.samples))
    return int(made["stretches"][row]), made["latents"][row]


def next_batch(out, run, pool, seed, tokenizer):
    """What the next step learns from: a function of the options, the step and the stretches that are there."""
    rng, own_steps = np.random.default_rng([seed, run.step]), run.course.own_steps(run.step)
    if run.step in own_steps:
        make_own(out, run, pool, seed, tokenizer)
    made = [path for path in (own_path(out, step) for step in own_steps) if path.exists()]  # a shortened run lacks some
    layout = run.course.layout(run.step, rng)

    def seen():
        """(number of a stretch, what its past looks like), or None: as it was drawn."""
        chance = rng.random() if layout is ANYWHERE else 1
        if chance < OWN_SHARE and made:
            return own_stretch(made[rng.integers(len(made))], rng)
        if OWN_SHARE <= chance < OWN_SHARE + MISTAKEN_SHARE:
            return pool.mistaken[rng.integers(len(pool.mistaken))]
        return None

    windows = [window_of(layout, pool, rng, seen()) for _ in range(layout.samples)]
    return Batch(layout, windows, rng, tokenizer, run.device)


def train(out, tokenizer, known, pool, course, seed, compiled=False, narrow=False, device="cpu"):
    """Trains as a Course says, into OUT/transformer.ckpt, from which it also resumes.

    pool: of stretches; the other arguments are those of Run. A SIGTERM ends the process after the step, saved.
    """
    torch.manual_seed(seed)
    run = Run(len(tokenizer), known, course, compiled, narrow, device)
    checkpoint = out / "transformer.ckpt"
    if checkpoint.exists():
        run.restore(checkpoint)
    curve, begun, last_save, asked = Curve(out / "log/transformer.tsv"), time.time() - run.seconds, time.time(), []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    while run.step < course.steps:
        count = pool.grow()
        batch = next_batch(out, run, pool, seed, tokenizer)
        losses, norm = run.advance(batch)
        run.seconds = time.time() - begun
        curve.add(run, batch, losses, norm, count)
        if asked or time.time() - last_save > SAVE_SECONDS or run.step == course.steps:
            run.save(checkpoint)
            last_save = time.time()
        if asked:
            raise SystemExit("train.py: asked to end; the same command goes on")
    signal.signal(signal.SIGTERM, before)
