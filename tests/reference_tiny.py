#!/usr/bin/env python3
"""Compares the tiny decoder (--decoder tiny) with a reference of TAEHV's decoder in PyTorch, on random weights.

The reference below is written from madebyollin/taehv's taehv.py. --taehv gives that file, or its folder; then the
reference is compared with it, too. --latents gives the repository's examples/test_latents_wan.pth, real latents of Wan
2.1: they go through both decoders at their true widths, with random weights, which takes minutes.

    python tests/reference_tiny.py [--sora ./sora] [--work build/reference-tiny] [--taehv taehv.py] [--latents FILE]
"""

import argparse
import contextlib
import fcntl
import importlib.util
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from reference import ROOT, TOLERANCE, Tally, export, make_model, relative_error


@dataclass
class Case:
    """A tiny decoder for one of reference.py's models."""
    model: str
    channels: int  # of the latents
    patch: int
    widths: tuple[int, ...] = (16, 12, 10, 6)
    dtype: torch.dtype = torch.float32
    size: tuple[int, int] = (48, 32)
    suffix: str = ".pth"
    grown: bool = False  # the first level's GROW has rows for two frames, of which the last are taken


CASES = [
    Case("wan", 16, 1),
    Case("wan", 16, 1, widths=(7, 9, 5, 3), size=(80, 48), suffix=".safetensors", grown=True),
    Case("wan", 16, 1, dtype=torch.float16),
    Case("residual VAE", 12, 2, size=(64, 96)),
    Case("residual VAE", 12, 2, dtype=torch.bfloat16, suffix=".safetensors", size=(32, 32)),
]
TRUE_WIDTHS = (256, 128, 64, 64)
LATENT_FRAMES = (1, 2, 3, 5, 9, 17)


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """{key of taehv.py: shape} of the decoder, and one tensor of the encoder, which the export leaves out."""
    out = {"encoder.0.weight": (8, 3, 3, 3)}

    def conv(key, i, o, kernel=3, bias=True):
        out[f"decoder.{key}.weight"] = (o, i, kernel, kernel)
        if bias:
            out[f"decoder.{key}.bias"] = (o,)

    widths, index = case.widths, 3
    conv(1, case.channels, widths[0])
    for level, (i, o) in enumerate(zip(widths, widths[1:])):
        for block in range(3):
            for part in (0, 2, 4):
                conv(f"{index + block}.conv.{part}", 2 * i if part == 0 else i, i)
        conv(f"{index + 4}.conv", i, 2 * i if level or case.grown else i, 1, bias=False)
        conv(index + 5, i, o, bias=False)
        index += 6
    conv(index + 1, widths[-1], 3 * case.patch**2)
    return out


def random_weights(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep the size of what passes them, and pixels in and around [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes(case).items():
        scale = (1 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1
        scale *= 0.3 if "conv.4" in key else 1  # what is added to the input
        weights[key] = (torch.randn(shape, generator=generator) * scale).to(case.dtype)
    weights["decoder.22.weight"] *= 0.5
    weights["decoder.22.bias"] += 0.5
    return weights


def decode(weights: dict[str, torch.Tensor], latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Frames [F, 3, Y, X] in [0, 1] from normalised latents [T, C, H, W]."""
    def conv(x, key):
        weight = weights[f"decoder.{key}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{key}.bias"), padding=weight.shape[-1] // 2)

    def memory(x, index):
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        y = torch.cat([x, before], 1)
        for part in (0, 2, 4):
            y = conv(y, f"{index}.conv.{part}")
            y = F.relu(y) if part < 4 else y
        return F.relu(y + x)

    x, index = F.relu(conv(3 * torch.tanh(latents / 3), 1)), 3
    for level in range(3):
        for block in range(3):
            x = memory(x, index + block)
        x, n = F.interpolate(x, scale_factor=2), x.shape[1]
        x = conv(x, f"{index + 4}.conv")
        x = x.unflatten(1, (-1, n)).flatten(0, 1) if level else x[:, -n:]
        x = conv(x, index + 5)
        index += 6
    x = F.pixel_shuffle(conv(F.relu(x), index + 1), patch)
    return x.clamp(0, 1)[3:]


def upstream(path: Path, case: Case, weights: dict[str, torch.Tensor]) -> Callable:
    """taehv.py's own decoder with these weights, as a function like decode()."""
    spec = importlib.util.spec_from_file_location("taehv", path / "taehv.py" if path.is_dir() else path)
    taehv = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(taehv)
    model = taehv.TAEHV(None, patch_size=case.patch, latent_channels=case.channels)
    decoder = {k.removeprefix("decoder."): v for k, v in model.patch_tgrow_layers(dict(weights)).items()
               if k.startswith("decoder.")}
    model.decoder.load_state_dict(decoder)
    return lambda latents: model.decode_video(latents[None], show_progress_bar=False)[0]


def run(case: Case, sora: Path, work: Path, latent_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """sora's latents [T, C, H, W] and frames [F, 3, Y, X]."""
    dumped = work / "dumped"
    shutil.rmtree(dumped, ignore_errors=True)
    frames = 4 * latent_frames - 3
    result = subprocess.run(
        [sora, "-q", "-m", work / "model.gguf", "a red fox", "-s", f"{case.size[0]}x{case.size[1]}", "-f", str(frames),
         "--steps", "1", "-g", "1", "--seed", str(latent_frames), "--precision", "f32", "--decoder", "tiny",
         "--no-record", "-o", work / "out.y4m", "--dump", dumped], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"sora failed on {case}:\n{result.stderr}")
    return tuple(np.load(dumped / f"{name}.npy").swapaxes(0, 1) for name in ("latents", "video"))


@torch.no_grad()
def compare(case: Case, sora: Path, work: Path, tally: Tally) -> None:
    weights, name = random_weights(case, seed=3), f"{case.model}, {case.widths}, {case.dtype}"
    tiny = work / f"tiny{case.suffix}"
    (save_file if case.suffix == ".safetensors" else torch.save)(weights, tiny)
    _, full = export(case.model, work)
    subprocess.run([sys.executable, ROOT / "export.py", full, "-o", work / "model.gguf", "--vae-tiny", tiny],
                   check=True, capture_output=True)
    exact = {key: values.float() for key, values in weights.items()}
    for frames in LATENT_FRAMES:
        latents, video = run(case, sora, work, frames)
        expected = decode(exact, torch.from_numpy(latents), case.patch)
        error = relative_error(video, (2 * expected - 1).numpy())
        tally.claim(error <= TOLERANCE, f"{name}, {frames} latent frames: the video is off by {error:.1e}")
        tally.measure("video", error, name)
        inside = float(((expected > 0) & (expected < 1)).float().mean())
        tally.claim(inside > 0.3, f"{name}: only {inside:.0%} of the values are inside the range")
    print(name, flush=True)


@torch.no_grad()
def compare_upstream(taehv: Path, tally: Tally) -> None:
    """The reference above and taehv.py, with TAEHV's widths."""
    for case in (Case("", 16, 1, TRUE_WIDTHS), Case("", 48, 2, TRUE_WIDTHS),
                 Case("", 16, 1, TRUE_WIDTHS, grown=True)):
        weights = random_weights(case, seed=5)
        latents = torch.randn(5, case.channels, 4, 6, generator=torch.Generator().manual_seed(1))
        ours, theirs = decode(weights, latents, case.patch), upstream(taehv, case, weights)(latents)
        error = relative_error(ours.numpy(), theirs.numpy())
        tally.claim(error <= 1e-6, f"the reference is off from taehv.py by {error:.1e}")
        tally.measure("reference", error, f"{case.channels} channels")


@torch.no_grad()
def compare_real(latents: Path, sora: Path, work: Path, tally: Tally) -> None:
    """Real latents (1, C, T, H, W) through the tiny decoder, and their first frames through the full one."""
    values = torch.load(latents, weights_only=True, map_location="cpu").float()[0].transpose(0, 1)
    case, checkpoint = Case("", 16, 1, TRUE_WIDTHS), work / "checkpoint"
    weights = random_weights(case, seed=5)
    torch.save(weights, work / "tiny.pth")
    make_model(checkpoint, seed=1, vae={"base_dim": 96},
               text_encoder={"d_model": 24, "d_kv": 8, "num_heads": 2, "d_ff": 40},
               transformer={"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 24, "num_layers": 1})
    subprocess.run([sys.executable, ROOT / "export.py", checkpoint, "-o", work / "model.gguf", "--vae-tiny",
                    work / "tiny.pth"], check=True, capture_output=True)
    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae")
    mean, deviation = (torch.tensor(numbers)[:, None, None]
                       for numbers in (vae.config.latents_mean, vae.config.latents_std))
    for decoder, count in (("tiny", len(values)), ("full", 3)):
        taken = values[:count]
        video = fed(sora, work, taken, decoder)
        if decoder == "tiny":
            expected = 2 * decode(weights, taken, case.patch) - 1
        else:
            expected = vae.decode((taken * deviation + mean).transpose(0, 1)[None]).sample[0].transpose(0, 1)
        error = relative_error(video, expected.numpy())
        tally.claim(error <= TOLERANCE, f"{count} real latents, {decoder} decoder: the video is off by {error:.1e}")
        tally.measure(f"video, real latents, {decoder}", error, f"{list(video.shape)}")


def preview(sora: Path, work: Path, steps: int, frames: int, tally: Tally) -> None:
    """--preview in a terminal of 60x30: a picture after each step, then one for each frame. The last step's guess is
    the clip's first frame."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 60, 0, 0))
    process = subprocess.Popen(
        [sora, "-q", "--preview", "-m", work / "model.gguf", "a red fox", "-s", "32x32", "-f", str(frames), "--steps",
         str(steps), "-g", "1", "--seed", "1", "--fps", "1000", "--decoder", "tiny", "--no-record", "-o",
         work / "out.y4m"],
        stdout=child, stderr=child, env={"TERM": "xterm", "COLORTERM": "truecolor"})
    os.close(child)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while some := os.read(parent, 1 << 16):
            text += some
    process.wait()
    pictures = [np.array([list(map(int, rgb)) for rgb in re.findall(rb"8;2;(\d+);(\d+);(\d+)m", picture)])
                for picture in re.split(rb"\r\x1b\[K", text) if b"8;2;" in picture]
    tally.claim(len(pictures) == steps + frames, f"--preview: {len(pictures)} pictures, expected {steps + frames}")
    differences = [int(abs(picture - pictures[steps]).max()) for picture in pictures[:steps]]
    tally.claim(differences[-1] <= 1 < differences[0], f"--preview: guesses are off from the frame by {differences}")


def fed(sora: Path, work: Path, latents: torch.Tensor, decoder: str) -> np.ndarray:
    """sora's frames [F, 3, Y, X] of given latents [T, C, H, W], which replace those of a run (--feed)."""
    given, dumped = work / "given", work / "dumped"
    for folder in (given, dumped):
        shutil.rmtree(folder, ignore_errors=True)
    given.mkdir()
    np.save(given / "latents.npy", latents.transpose(0, 1).contiguous().numpy())
    frames, _, height, width = latents.shape
    subprocess.run(
        [sora, "-q", "-m", work / "model.gguf", "x", "-s", f"{8 * width}x{8 * height}", "-f", str(4 * frames - 3),
         "--steps", "1", "-g", "1", "--seed", "1", "--precision", "f32", "--decoder", decoder, "--no-record",
         "-o", work / "out.y4m", "--dump", dumped, "--dump-only", "video", "--check", given, "--tolerance", "1e9",
         "--feed"], check=True, capture_output=True)
    return np.load(dumped / "video.npy").swapaxes(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sora", type=Path, default=ROOT / "sora")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reference-tiny", help="folder for checkpoints")
    parser.add_argument("--taehv", type=Path, help="madebyollin/taehv's taehv.py")
    parser.add_argument("--latents", type=Path, help="madebyollin/taehv's examples/test_latents_wan.pth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    tally = Tally()
    if args.taehv:
        compare_upstream(args.taehv, tally)
    if args.latents:
        torch.set_num_threads(2)
        compare_real(args.latents, args.sora, args.work, tally)
        torch.set_num_threads(1)
    for case in CASES:
        compare(case, args.sora, args.work, tally)
    preview(args.sora, args.work, 3, 5, tally)
    tally.report()


if __name__ == "__main__":
    main()
