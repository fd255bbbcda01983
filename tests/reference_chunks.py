#!/usr/bin/env python3
"""Compares clips that sora makes chunk by chunk, or in a model's own few steps, with diffusers: `make test-reference`.

diffusers has no causal Wan. But what a chunk sees is a mask: the reference runs diffusers' WanTransformer3DModel,
without any cache, over all frames of the past at the context's time step and the chunk at its own, as one sequence with
a time step for each token. Attention is diffusers' own, called once for each chunk with the mask and the positions that
this chunk has; which frames are held at that time is worked out here, on lists of frame numbers.

Frames that a new prompt has written anew (recache) stand in the sequence twice: as they were, for those that saw them
so, and again, with the new prompt, for those that come after.

    python tests/reference_chunks.py [--sora ./sora] [--work build/reference-chunks] [--only NAME]
"""

import argparse
import math
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import reference
import schedulers
from reference import MODELS, ROOT, TOLERANCE, Tally, relative_error, tensors, worst_of
from reference_causal import write_with_keys

PROMPTS = [reference.FOX, "a cat", "waves roll onto the beach"]


def warp(steps, shift=5.0):
    """Time steps of a list in thousandths, warped by a shift, as Self-Forcing's scheduler has them."""
    sigmas = torch.linspace(1, 0, 1001)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return [float(sigmas[1000 - step] * 1000) for step in steps]


@dataclass
class Case:
    """A clip: the model, how its file says that clips are made, what is asked for."""

    model: str
    frames: int  # latent frames
    chunk: int = 0  # 0: the whole clip
    window: int = 0
    sink: int = 0
    relative: bool = False
    alone: bool = False  # the first frame is a chunk of its own
    context_noise: float = 0.0
    rule: str = "renoise"
    timesteps: list[float] = field(default_factory=lambda: warp([1000, 750, 500, 250]))
    sigmas: list[float] | None = None  # timesteps / 1000
    first: list[float] | None = None  # time steps of the first chunk
    noise_scale: float = 1.0
    frames_first: bool | None = None  # torch's numbers fill frame after frame; as chunks do
    steps: int = 3  # multistep: unipc, shift 3
    guidance: float = 1.0
    switches: dict[int, int] = field(default_factory=dict)  # latent frame from which on a prompt of PROMPTS holds
    change: str = "keep"
    recache_sink: bool = False
    size: tuple[int, int] = (32, 48)

    @property
    def name(self) -> str:
        how = f"chunks of {self.chunk}" if self.chunk else "whole"
        more = [f"window {self.window}"] * bool(self.window) + [f"sink {self.sink}"] * bool(self.sink)
        more += ["relative"] * self.relative + ["first frame alone"] * self.alone + ["guided"] * (self.guidance > 1)
        more += [f"{self.change} at {list(self.switches)}"] * bool(self.switches)
        return f"{self.model}: {self.frames} frames, {how}, {self.rule}" + "".join(f", {m}" for m in more)

    def keys(self) -> dict:
        keys = {"scheduler.rule": self.rule, "default.guidance": self.guidance,
                "scheduler.noise_scale": self.noise_scale}
        if self.rule != "multistep":
            keys["scheduler.timesteps"] = self.timesteps
        if self.sigmas:
            keys["scheduler.sigmas"] = self.sigmas
        if self.first:
            keys["scheduler.first_timesteps"] = self.first
        if self.frames_first is not None:
            keys["scheduler.noise_frames_first"] = self.frames_first
        if self.chunk:
            keys |= {"causal.chunk_frames": self.chunk, "causal.window": self.window, "causal.sink": self.sink,
                     "causal.positions": "relative" if self.relative else "absolute",
                     "causal.independent_first_frame": self.alone, "causal.context_noise": self.context_noise,
                     "causal.prompt_change": self.change, "causal.recache_sink": self.recache_sink}
        return keys


THREE = {"timesteps": [1000.0, 757.0, 522.0]}
CASES = [
    Case("wan", 9, 3),
    Case("wan", 12, 3, window=6),
    Case("wan", 15, 3, window=9, sink=3),
    Case("wan", 15, 3, window=6, sink=1, relative=True),
    Case("wan", 7, 2, alone=True, window=4, sink=1, context_noise=120.0),
    Case("odd widths", 5, 1, window=3, sink=1, **THREE),
    Case("odd widths", 6, 1, relative=True, window=2, first=warp([1000, 750, 500, 250]), timesteps=warp([1000, 500])),
    Case("three levels with patches", 8, 4, rule="multistep", guidance=2.5, size=(32, 32)),
    Case("three levels without patches", 9, 3, rule="multistep", window=6, relative=True, size=(16, 32)),
    Case("four levels with patches", 8, 2, window=6, sink=2, rule="euler", size=(64, 32)),
    Case("wan", 12, 3, window=6, switches={3: 1, 9: 2}),
    Case("wan", 15, 3, window=9, sink=3, switches={6: 1, 12: 2}, change="recache"),
    Case("wan", 15, 3, window=9, sink=3, switches={12: 1}, change="recache", recache_sink=True),
    Case("wan", 9, 3, switches={3: 1, 6: 0}, change="recache", guidance=2.0),
    Case("wan", 15, 3, window=9, sink=1, relative=True, switches={9: 1}, change="flush"),
]


def few_step_cases() -> list[Case]:
    """Whole clips as those who trained for them make them; their update rules are in `few_steps`."""
    angles = torch.tensor([math.atan(80), 1.5, 1.4, 1.0], dtype=torch.float64)
    flow = torch.sin(angles) / (torch.sin(angles) + torch.cos(angles))
    table = FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [int(torch.argmin((table.timesteps - t).abs())) for t in THREE["timesteps"]]
    return [
        Case("wan", 3, rule="renoise", timesteps=(flow.float() * 1000).bfloat16().tolist(), sigmas=flow.tolist(),
             noise_scale=float(flow[0])),
        Case("wan", 3, rule="renoise", sigmas=[float(table.sigmas[i]) for i in nearest], frames_first=True, **THREE),
        Case("odd widths", 2, rule="euler"),
    ]


# ---------------------------------------------------------------- the reference


@dataclass
class Segment:
    """Frames that pass at once, in the sequence of all that have passed: where its frames stand in it, their numbers in
    the clip, and the places of those that it sees, itself last."""

    latents: torch.Tensor  # [C,f,H,W]
    timestep: float
    prompt: int
    numbers: list[int]
    places: list[int]
    sees: list[int]


class Masked:
    """WanAttnProcessor, called once a segment: each with its own mask and positions, or its own text."""

    def __init__(self, run: "Run", cross: bool):
        self.run, self.cross, self.attend = run, cross, WanAttnProcessor()

    def __call__(self, attn, hidden, text, mask, rotary):
        out = torch.empty_like(hidden)
        for segment in self.run.sequence:
            rows = self.run.tokens_of(segment.places)
            if self.cross:
                part = text[:, segment.prompt * 512:(segment.prompt + 1) * 512]
                out[:, rows] = self.attend(attn, hidden[:, rows], part, None, None)
            else:
                seen = torch.zeros(1, 1, 1, hidden.shape[1], dtype=torch.bool)
                seen[..., self.run.tokens_of(segment.sees)] = True
                out[:, rows] = self.attend(attn, hidden, None, seen, self.run.rotary(segment))[:, rows]
        return out


class Run:
    """One side of guidance: what has passed so far, and what is held of it."""

    def __init__(self, case: Case, model: WanTransformer3DModel, texts: torch.Tensor):
        self.case, self.model, self.texts = case, model, texts  # texts [1, prompts*512, E]
        self.sequence: list[Segment] = []
        self.held: list[int] = []  # places
        self.numbers: list[int] = []  # of every place
        self.blocks: list[torch.Tensor] = []
        self.made: list[torch.Tensor] = []  # finished frames [C,H,W]

    def tokens_of(self, places: list[int]) -> torch.Tensor:
        return (torch.tensor(places)[:, None] * self.tokens + torch.arange(self.tokens)).flatten()

    def rotary(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of all frames of the sequence, as this segment takes them to be."""
        rope, position = self.model.rope, torch.zeros(len(self.numbers), dtype=torch.long)
        for j, place in enumerate(segment.sees):
            position[place] = j if self.case.relative else self.numbers[place]
        h, w = self.grid
        shape, sizes = (len(position), h, w, -1), [rope.t_dim, rope.h_dim, rope.w_dim]
        parts = []
        for table in (rope.freqs_cos, rope.freqs_sin):
            t, y, x = table.split(sizes, dim=1)
            full = torch.cat([t[position][:, None, None].expand(shape), y[:h][None, :, None].expand(shape),
                              x[:w][None, None].expand(shape)], dim=-1)
            parts.append(full.reshape(1, -1, 1, rope.attention_head_dim))
        return tuple(parts)

    def add(self, latents: torch.Tensor, timestep: float, prompt: int, numbers: list[int]) -> None:
        """A segment behind all others, for which the oldest frames after the sink give way."""
        excess = len(self.held) + len(numbers) - self.case.window if self.case.window else 0
        if excess > 0:
            del self.held[self.case.sink:self.case.sink + excess]
        places = list(range(len(self.numbers), len(self.numbers) + len(numbers)))
        self.numbers += numbers
        self.sequence.append(Segment(latents, timestep, prompt, numbers, places, self.held + places))

    def passes(self, latents: torch.Tensor, timestep: float, prompt: int, numbers: list[int],
               keep: bool) -> torch.Tensor:
        """The velocity of frames behind all others; they stay there if `keep`."""
        held = list(self.held)
        self.add(latents, timestep, prompt, numbers)
        patch = self.model.config.patch_size
        self.grid = (latents.shape[2] // patch[1], latents.shape[3] // patch[2])
        self.tokens = self.grid[0] * self.grid[1]
        times = torch.cat([torch.full((len(s.numbers) * self.tokens,), s.timestep) for s in self.sequence])
        self.blocks.clear()
        for block in self.model.blocks:
            block.attn1.processor, block.attn2.processor = Masked(self, False), Masked(self, True)
        velocity = self.model(torch.cat([s.latents for s in self.sequence], dim=1)[None], times[None], self.texts,
                              return_dict=False)[0][0][:, -len(numbers):]
        self.blocks = [out[0, -len(numbers) * self.tokens:] for out in self.blocks]
        if keep:
            self.held += self.sequence[-1].places
        else:
            self.held = held
            self.sequence.pop()
            del self.numbers[-len(numbers):]
        return velocity

    def change_prompt(self, prompt: int) -> None:
        case, made = self.case, len(self.made)
        if case.change == "flush":
            self.held = self.held[:1] + self.held[-2:] if len(self.held) > 3 else self.held
        if case.change == "recache":
            window = case.window or made
            sink = 0 if case.recache_sink or made <= window else case.sink
            count = min(window - sink, made)
            del self.held[sink:]
            self.passes(torch.stack(self.made[-count:], dim=1), case.context_noise, prompt,
                        list(range(made - count, made)), keep=True)


def schedule_of(case: Case, chunk: int) -> tuple[list[float], list[float]]:
    timesteps = case.first if case.first and chunk == 0 else case.timesteps
    return timesteps, [t / 1000 for t in timesteps] if case.sigmas is None or timesteps is case.first else case.sigmas


def draw(case: Case, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Noise [C,t,H,W] in the order in which upstream draws it."""
    C, t, H, W = shape
    frames_first = case.frames_first if case.frames_first is not None else case.chunk > 0
    if frames_first:
        return torch.randn(1, t, C, H, W, generator=generator)[0].transpose(0, 1).contiguous()
    return torch.randn(1, C, t, H, W, generator=generator)[0]


@torch.no_grad()
def make_reference(case: Case, checkpoint: Path, embeds: list[np.ndarray], shape: tuple[int, ...],
                   folder: Path) -> None:
    """Writes the clip's tensors. embeds: of PROMPTS, then of the negative prompt, [n,E] each; shape: [C,T,H,W]."""
    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer").float().eval()
    padded = torch.zeros(len(embeds), 512, embeds[0].shape[1])
    for i, e in enumerate(embeds):
        padded[i, :len(e)] = torch.from_numpy(e)
    texts = padded.flatten(0, 1)[None]
    sides = [Run(case, model, texts) for _ in range(1 + (case.guidance > 1))]
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: current.blocks.append(out))
    folder.mkdir(parents=True)

    def save(name: str, tensor: torch.Tensor) -> None:
        np.save(folder / f"{name}.npy", tensor.contiguous().numpy())

    generator = torch.Generator().manual_seed(7)
    noise = draw(case, generator, shape)
    save("noise", noise)
    done, prompt, chunks = 0, 0, 0
    while done < shape[1]:
        count = 1 if case.alone and done == 0 else case.chunk or shape[1]
        numbers = list(range(done, done + count))
        prefix = f"chunk{chunks:03d}." if case.chunk else ""
        if done in case.switches:
            prompt = case.switches[done]
            for current, side in zip(sides, (prompt, len(embeds) - 1)):
                current.change_prompt(side)
        x = noise[:, done:done + count] * torch.tensor(case.noise_scale, dtype=torch.float32)
        scheduler = schedulers.make("unipc", 3.0, case.steps) if case.rule == "multistep" else None
        timesteps, sigmas = (scheduler.timesteps.tolist(), None) if scheduler else schedule_of(case, chunks)
        for step, t in enumerate(timesteps):
            name = f"{prefix}step{step:03d}"
            velocities = []
            for current, side, text in zip(sides, ("cond", "uncond"), (prompt, len(embeds) - 1)):
                velocities.append(current.passes(x, t, text, numbers, keep=False))
                save(f"{name}.{side}.velocity", velocities[-1])
                for i, out in enumerate(current.blocks):
                    save(f"{name}.{side}.block{i:02d}", out)
            v = velocities[0]
            if len(sides) > 1:
                v = velocities[1] + case.guidance * (velocities[0] - velocities[1])
            save(f"{name}.velocity", v)
            if scheduler:
                x = scheduler.step(v[None], scheduler.timesteps[step], x[None], return_dict=False)[0][0]
            else:
                last = step + 1 == len(timesteps)
                sigma, after = sigmas[step], 0.0 if last else sigmas[step + 1]
                x0 = (x.double() - sigma * v.double()).float()
                if case.rule == "euler":
                    x = (x.double() + (after - sigma) * v.double()).float()
                elif last:
                    x = x0
                else:
                    fresh = draw(case, generator, x.shape)
                    save(f"{name}.noise", fresh)
                    x = ((1 - after) * x0.double() + after * fresh.double()).float()
            save(f"{name}.latents", x)
        if case.chunk:
            save(f"{prefix}latents", x)
        done += count
        chunks += 1
        for current, text in zip(sides, (prompt, len(embeds) - 1)):
            if done < shape[1]:
                current.passes(x, case.context_noise, text, numbers, keep=True)
                if current is sides[0]:
                    for i, out in enumerate(current.blocks):
                        save(f"{prefix}cache.block{i:02d}", out)
            current.made += list(x.unbind(1))
    save("latents", torch.stack(sides[0].made, dim=1))


# ---------------------------------------------------------------- the comparison


def compare_case(case: Case, sora: Path, work: Path, tally: Tally) -> None:
    checkpoint, weights = reference.export(case.model, work)
    keyed, dumped, expected_folder = work / "keyed.gguf", work / "dumped", work / "expected"
    write_with_keys(weights, keyed, case.keys())
    for folder in (dumped, expected_folder):
        shutil.rmtree(folder, ignore_errors=True)
    config = MODELS[case.model].get("vae", {})
    temporal = 2 ** sum(config.get("temperal_downsample", [False, True, True]))
    story = []
    for i, prompt in enumerate(case.switches.values()):
        frame = list(case.switches)[i]
        story += ["--at", f"{((frame - 1) * temporal + 1) / 16:.9g} {PROMPTS[prompt]}"]
    command = [sora, "-t", "1", "-m", keyed, "-s", f"{case.size[1]}x{case.size[0]}", "--fps", "16", "-f",
               str((case.frames - 1) * temporal + 1), "--seed", "7", "--precision", "f32", "-q", "-n", "blurry", *story,
               "-o", work / "out.y4m", "--dump", dumped, PROMPTS[0]]
    if case.rule == "multistep":
        command += ["--steps", str(case.steps), "--shift", "3", "--sampler", "unipc"]
    first = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if first.returncode:
        tally.claim(False, f"{case.name}: exit status {first.returncode}: {first.stderr.strip()}")
        return
    actual = tensors(dumped)
    by_prompt = {0: actual["prompt.embeds"]}
    for i, prompt in enumerate(case.switches.values()):
        by_prompt[prompt] = actual[f"prompt{i + 1:02d}.embeds"]
    embeds = [by_prompt.get(i, by_prompt[0]) for i in range(len(PROMPTS))]
    embeds.append(actual.get("negative.embeds", by_prompt[0]))
    make_reference(case, checkpoint, embeds, actual["noise"].shape, expected_folder)
    expected = tensors(expected_folder)
    errors = {name: relative_error(actual[name], expected[name]) if name in actual else np.inf for name in expected}
    for name, error in errors.items():
        tally.claim(error <= TOLERANCE, f"{case.name}: {name} is off by {error:.1e}")
        tally.measure(name, error, case.name)
    print(f"{case.name}: {len(expected)} tensors, {worst_of(errors)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sora", type=Path, default=ROOT / "sora")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reference-chunks", help="folder for checkpoints")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    tally = Tally()
    for case in (c for c in CASES + few_step_cases() if args.only in c.name):
        compare_case(case, args.sora.resolve(), args.work, tally)
    tally.report()


if __name__ == "__main__":
    main()
