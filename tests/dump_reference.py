#!/usr/bin/env python3
"""Runs diffusers' Wan pipelines on a checkpoint and writes the tensors that `sora --check` compares, as .npy files.

    python tests/dump_reference.py CHECKPOINT DIR --prompt "A red fox" --size 832x480 --frames 17 --steps 4
    ./sora -m model.gguf --check DIR "A red fox" -s 832x480 -f 17 --steps 4 ...

CHECKPOINT is a diffusers folder. Names and shapes are those of sora's --dump (docs/validating.md): no batch axis,
float32 (ids int32). Of the text encoder's 512 positions only the n with tokens are written.
"""

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVideoToVideoPipeline
from transformers import PreTrainedTokenizerFast

import easycache
import schedulers


@dataclass
class Settings:
    """The settings of one clip. The fields are sora's options of the same names."""

    prompt: str = ""
    negative: str = ""
    size: tuple[int, int] = (64, 64)  # width, height in pixels
    frames: int = 5
    steps: int = 3
    guidance: float = 5.0
    shift: float = 3.0
    sampler: str = "unipc"
    seed: int = 0
    guidance_2: float | None = None  # of the second expert
    strength: float | None = None  # a clip is made anew
    pictures: int = 0  # the clip begins with a picture; 2: it ends with another
    easycache: float = 0.0


class Recorder:
    """Hooks on a pipeline's modules that write their inputs and outputs into `folder`."""

    def __init__(self, pipe: WanPipeline, folder: Path, settings: Settings):
        self.folder = folder
        self.stride = pipe.vae.config.scale_factor_temporal
        self.branches = ("cond", "uncond") if settings.guidance > 1 else ("cond",)
        self.cache = None
        if settings.easycache:
            steps = settings.steps if settings.strength is None else int(settings.steps * settings.strength)
            experts = filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None)))
            self.cache = easycache.attach(experts, settings.easycache, steps, len(self.branches))
        self.texts = iter(("prompt", "negative"))
        self.passes = 0  # forward passes of the transformer so far
        self.steps = 0  # steps of the sampler so far
        self.begun = False  # noise and encoded frames are written
        self.hold = lambda latents: latents  # puts frames that are not denoised in their place
        folder.mkdir(parents=True, exist_ok=True)
        pipe.text_encoder.register_forward_hook(self.on_text)
        for transformer in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None))):
            transformer.register_forward_pre_hook(self.on_noise, with_kwargs=True)
            for index, block in enumerate(transformer.blocks):
                block.register_forward_hook(
                    lambda _, args, out, name=f"block{index:02d}": self.save(self.branch(name), out[0]))
            transformer.register_forward_hook(self.on_velocity)
        pipe.scheduler.step = self.wrap(pipe.scheduler.step, self.on_step)
        if hasattr(pipe.scheduler, "add_noise"):
            pipe.scheduler.add_noise = self.wrap(
                pipe.scheduler.add_noise, lambda _, encoded, noise, *__: self.on_encoded(encoded, noise))
        else:
            pipe.scheduler.scale_noise = self.wrap(
                pipe.scheduler.scale_noise, lambda _, encoded, __, noise: self.on_encoded(encoded, noise))
        pipe.vae.encode = self.wrap(pipe.vae.encode, lambda _, source: self.on_source(source[0]))
        pipe.vae.decode = self.wrap(pipe.vae.decode, lambda out, *_: self.save("video", out[0][0]))

    @staticmethod
    def wrap(function, after):
        """A function that calls `function`, then after(result, *arguments), and returns the result."""

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            after(result, *args)
            return result

        return wrapped

    def save(self, name: str, tensor: torch.Tensor) -> None:
        np.save(self.folder / f"{name}.npy", tensor.detach().contiguous().numpy())

    def branch(self, name: str) -> str:
        step, branch = divmod(self.passes, len(self.branches))
        return f"step{step:03d}.{self.branches[branch]}.{name}"

    def on_text(self, module, args, output) -> None:
        ids, mask = args
        n = int(mask.sum())
        name = next(self.texts)
        self.save(f"{name}.ids", ids[0, :n].to(torch.int32))
        self.save(f"{name}.embeds", output.last_hidden_state[0, :n])

    def on_source(self, source) -> None:
        if not self.begun:
            # upstream encodes no more frames than these
            self.save("source", source[:, :1 + (source.shape[1] - 1) // self.stride * self.stride])

    def on_encoded(self, encoded, noise) -> None:
        self.save("encoded", encoded[0])
        self.save("noise", noise[0])
        self.begun = True

    def on_noise(self, module, args, kwargs) -> None:
        if self.passes == 0 and not self.begun:
            self.save("noise", kwargs["hidden_states"][0])

    def on_velocity(self, module, args, output) -> None:
        if not (self.cache and self.cache.left_out):
            self.save(self.branch("velocity"), output[0][0])
        self.passes += 1

    def on_step(self, result, velocity, timestep, before) -> None:
        latents = self.hold(result[0])[0]
        self.save(f"step{self.steps:03d}.velocity", velocity[0])
        self.save(f"step{self.steps:03d}.latents", latents)
        self.save("latents", latents)
        self.steps += 1


@contextlib.contextmanager
def float64_arithmetic():
    """Makes upstream's .float() leave float64 tensors alone. float32 tensors stay float32, above all the sinusoids of
    the time step: the model was trained with their float32 rounding."""
    to_float = torch.Tensor.float
    torch.Tensor.float = lambda tensor: tensor if tensor.dtype == torch.float64 else to_float(tensor)
    try:
        yield
    finally:
        torch.Tensor.float = to_float


def load(checkpoint: Path, kind: type = WanPipeline) -> WanPipeline:
    """The pipeline in float32. kind: its class. A tokenizer.json is used as it is. (From transformers 5 on, T5Tokenizer
    would keep the pieces, build its own rules, and take piece 2 as the unknown one; umT5's is 3.)"""
    rules = checkpoint / "tokenizer" / "tokenizer.json"
    given = {}
    if rules.exists():
        given["tokenizer"] = PreTrainedTokenizerFast(tokenizer_file=str(rules), pad_token="<pad>", eos_token="</s>",
                                                     unk_token="<unk>")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = kind.from_pretrained(checkpoint, dtype=torch.float32, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def dump(checkpoint: Path, folder: Path, settings: Settings, double: bool = False,
         source: np.ndarray | None = None) -> None:
    """Generates one clip with WanPipeline, WanVideoToVideoPipeline or WanImageToVideoPipeline, and writes its tensors
    into `folder`.

    checkpoint: a diffusers folder; double: compute and write float64, from the same noise.
    source: the clip [3, F, Y, X] that is made anew, with settings.strength;
        or settings.pictures pictures, as its frames.
    """
    pipe = load(checkpoint, WanImageToVideoPipeline if settings.pictures else WanPipeline)
    pipe.scheduler = schedulers.configure(settings.sampler, settings.shift)
    modules = [m for m in (pipe.text_encoder, pipe.transformer, pipe.transformer_2, pipe.vae) if m]
    if settings.strength is not None:
        redraw(pipe, folder, settings, source, modules if double else [])
        return
    recorder = Recorder(pipe, folder, settings)
    width, height = settings.size
    noise = WanPipeline.prepare_latents(pipe, 1, pipe.vae.config.z_dim, height, width, settings.frames, torch.float32,
                                        "cpu", torch.Generator().manual_seed(settings.seed))
    given = {}
    if settings.pictures:
        given = dict(zip(("image", "last_image"), ((torch.from_numpy(p)[None] + 1) / 2 for p in source.swapaxes(0, 1))))
        record_condition(pipe, recorder)
    if pipe.config.boundary_ratio is not None:
        given["guidance_scale_2"] = settings.guidance_2
    for module in modules if double else ():
        module.double()
    with float64_arithmetic() if double else contextlib.nullcontext():
        pipe(prompt=settings.prompt, negative_prompt=settings.negative, width=width, height=height,
             num_frames=settings.frames, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
             latents=noise, **given)
    np.save(folder / "timesteps.npy", pipe.scheduler.timesteps.numpy().astype(np.float32))
    np.save(folder / "sigmas.npy", pipe.scheduler.sigmas.numpy())


def record_condition(pipe: WanImageToVideoPipeline, recorder: Recorder) -> None:
    """Writes what prepare_latents() makes of pictures.

    With expand_timesteps diffusers puts the encoded picture into the first latent frame of each step's input, and into
    the latents after the last step; sora, like the original release, does so after each step. It takes one picture. The
    last one is treated likewise here, as a frame that is encoded by itself.
    """
    prepare = pipe.prepare_latents

    def prepare_and_write(image, *args):
        *args, last = args
        recorder.begun = True
        for name, picture in (("image", image), ("last_image", last)):
            if picture is not None:
                recorder.save(name, picture[0])
        if not pipe.config.expand_timesteps:
            latents, condition = prepare(image, *args, last)
            recorder.save("condition", condition[0])
            recorder.save("encoded", condition[0, -latents.shape[1]:])
        else:
            encoded = [prepare(picture, *args, None) for picture in (image, last) if picture is not None]
            latents, condition, mask = encoded[0]
            condition = condition.repeat(1, 1, latents.shape[2], 1, 1)
            if last is not None:
                condition[:, :, -1:], mask[:, :, -1] = encoded[1][1], 0
            recorder.hold = lambda x: (1 - mask) * condition + mask * x
            recorder.save("encoded", torch.cat([e[1] for e in encoded], 2)[0])
        recorder.save("noise", latents[0])
        return (latents, condition, mask) if pipe.config.expand_timesteps else (latents, condition)

    pipe.prepare_latents = prepare_and_write


def redraw(pipe: WanPipeline, folder: Path, settings: Settings, source: np.ndarray, widened: list) -> None:
    """Makes the source anew. Of the schedule, time steps and sigmas of the steps that are taken are written. widened:
    the modules that compute in float64."""
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    pipe = WanVideoToVideoPipeline(**parts)
    pipe.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial  # it takes a VAE without patches for granted
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe, folder, settings)
    width, height = settings.size
    clip = (torch.from_numpy(source).transpose(0, 1)[None] + 1) / 2  # [1, F, 3, Y, X] in [0, 1]
    for module in widened:
        module.double()
    with float64_arithmetic() if widened else contextlib.nullcontext():
        pipe(clip, settings.prompt, settings.negative, width=width, height=height, num_inference_steps=settings.steps,
             guidance_scale=settings.guidance, strength=settings.strength,
             generator=torch.Generator().manual_seed(settings.seed))
    np.save(folder / "timesteps.npy", pipe.scheduler.timesteps.numpy().astype(np.float32)[-recorder.steps:])
    np.save(folder / "sigmas.npy", pipe.scheduler.sigmas.numpy()[-recorder.steps - 1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    for name, default in vars(Settings()).items():
        kind = (float if default is None else
                (lambda text: tuple(map(int, text.split("x")))) if name == "size" else type(default))
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--double", action="store_true", help="compute in float64")
    arguments = vars(parser.parse_args())
    dump(arguments.pop("checkpoint"), arguments.pop("folder"), double=arguments.pop("double"),
         settings=Settings(**arguments))


if __name__ == "__main__":
    main()
