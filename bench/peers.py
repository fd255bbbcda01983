#!/usr/bin/env python3
"""The same stages in sora, PyTorch (diffusers, transformers) and stable-diffusion.cpp, alternating in one run.

    python bench/peers.py build/release/bench/bench build/peers.tsv [transformer] [attention] [text_encoder]
        [vae_decode] [sdcpp]
        [--precisions f32 bf16 int8] [--threads N] [--rounds N] [--work build/peers]

Shapes are those of Wan 2.1 1.3B and umT5-XXL, weights are random: nobody's speed depends on their values. sora and
PyTorch run two blocks of the transformer with both of its ends, one block of the text encoder, and a decoder.
stable-diffusion.cpp knows its models by their number of blocks, so it gets a checkpoint of all 30, runs one step, and
tells in its log how long that took; sora's time is scaled to 30 blocks then. The file gets a line for each comparison:
medians in seconds, and their ratio (above 1: sora is faster).
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import make_checkpoint  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SHAPES = make_checkpoint.PRESETS["wan2.1-t2v-1.3b"]
FRAMES, BLOCKS = 17, 30


# ---------------------------------------------------------------- sora

def sora(args, stage, precision, size):
    """Seconds of one run of a stage, the median of a few, by bench/bench.c."""
    with tempfile.NamedTemporaryFile("r", suffix=".tsv") as out:
        subprocess.run([args.bench, out.name, stage, precision, size, str(args.threads)], check=True,
                       stdout=subprocess.DEVNULL)
        return float(next(csv.DictReader(out, delimiter="\t"))["seconds"])


# ---------------------------------------------------------------- PyTorch: each returns a function to be timed

def sides(size):
    """Latent width and height of "832x480"."""
    width, height = size.split("x")
    return int(width) // 8, int(height) // 8


def torch_transformer(dtype, size):
    width, height = sides(size)
    model = WanTransformer3DModel(**{**SHAPES["transformer"], "num_layers": 2}).to(dtype).eval()
    latents = torch.randn(1, 16, (FRAMES + 3) // 4, height, width, dtype=dtype)
    text = torch.randn(1, 512, 4096, dtype=dtype)
    return lambda: model(latents, torch.tensor([500]), text)


def torch_attention(dtype, size):
    q, k, v = torch.randn(3, 1, 12, int(size), 128, dtype=dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def torch_text_encoder(dtype, size):
    """Of the positions that it is given, all are computed: the pipeline pads every prompt to 512."""
    config = UMT5Config(**{**SHAPES["text_encoder"], "vocab_size": 1000, "num_layers": 1},
                        feed_forward_proj="gated-gelu")
    model = UMT5EncoderModel(config).to(dtype).eval()
    ids = torch.arange(int(size))[None] % 1000
    return lambda: model(ids, attention_mask=torch.ones_like(ids))


def torch_vae_decode(dtype, size):
    width, height = sides(size)
    model = AutoencoderKLWan().to(dtype).eval()
    latents = torch.randn(1, 16, 2, height, width, dtype=dtype)
    return lambda: model.decode(latents)


def seconds(run):
    start = time.perf_counter()
    with torch.inference_mode():
        run()
    return time.perf_counter() - start


# (stage, sora's precision and size, PyTorch's type and size)
TORCH = [
    ("transformer", "f32", "256x256", "f32", "256x256"),
    ("transformer", "bf16", "256x256", "bf16", "256x256"),
    ("transformer", "int8", "256x256", "bf16", "256x256"),
    ("transformer", "bf16", "832x480", "bf16", "832x480"),
    ("attention", "bf16", "1280", "bf16", "1280"),
    ("attention", "bf16", "7800", "bf16", "7800"),
    ("text_encoder", "f32", "40", "f32", "40"),
    ("text_encoder", "bf16", "40", "bf16", "40"),
    ("text_encoder", "bf16", "40", "bf16", "512"),
    ("vae_decode", "f32", "256x256", "f32", "256x256"),
    ("vae_decode", "bf16", "256x256", "bf16", "256x256"),
]
MODELS = {"transformer": torch_transformer, "attention": torch_attention, "text_encoder": torch_text_encoder,
          "vae_decode": torch_vae_decode}


def compare_with_torch(args, write):
    """One row after the other; a row's two sides take turns, after one run of PyTorch that does not count."""
    for stage, ours, size, dtype, their_size in TORCH:
        if stage not in args.parts or ours not in args.precisions:
            continue
        run = MODELS[stage](DTYPES[dtype], their_size)
        seconds(run)
        times = [(sora(args, stage, ours, size), seconds(run)) for _ in range(args.rounds)]
        write(stage, size, ours, f"PyTorch {torch.__version__}", dtype, their_size, times)


# ---------------------------------------------------------------- stable-diffusion.cpp

def sdcpp_files(folder):
    """Transformer and VAE of a random Wan 2.1 1.3B in the original release's names; made once."""
    files = [folder / "transformer.safetensors", folder / "vae.safetensors"]
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        models = make_checkpoint.meta_models(**{**SHAPES, "text_encoder": {"d_model": 4096}}, seed=0, rows=10)
        names = make_checkpoint.original_names(models)
        for part, file in zip((1, 2), files):
            draw, shapes = make_checkpoint.drawer(models[part], 0, part), make_checkpoint.shapes(models[part])
            make_checkpoint.write_safetensors(file, {ours: shapes[theirs] for ours, theirs in names[part].items()},
                                              torch.bfloat16, lambda name: draw(names[part][name]))
    return files


SDCPP = """
import sys
from stable_diffusion_cpp import StableDiffusion
transformer, vae, wtype, threads, width, height, frames = sys.argv[1:]
model = StableDiffusion(diffusion_model_path=transformer, vae_path=vae, wtype=wtype, n_threads=int(threads),
                        vae_decode_only=False, diffusion_flash_attn=True, verbose=True)
model.generate_video("", width=int(width), height=int(height), video_frames=int(frames), sample_steps=1, cfg_scale=1.0)
"""


def sdcpp(args, files, wtype, size, frames, line):
    """Seconds that stable-diffusion.cpp reports on the log line that starts so; it is stopped there."""
    command = [sys.executable, "-c", SDCPP, *map(str, files), wtype, str(args.threads), *size.split("x"), str(frames)]
    log = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for text in process.stdout:
            log.append(text)
            found = re.search(re.escape(line) + r" completed, taking ([\d.]+)s", text)
            if found:
                process.kill()
                return float(found[1])
    raise RuntimeError(f"stable-diffusion.cpp did not come to '{line}':\n" + "".join(log[-20:]))


# (stage, sora's precision, stable-diffusion.cpp's type, size, frames, the line of its log, sora's runs in it)
SDCPP_ROWS = [
    ("transformer", "bf16", "bf16", "256x256", FRAMES, "sampling", BLOCKS / 2),
    ("transformer", "int8", "q8_0", "256x256", FRAMES, "sampling", BLOCKS / 2),
    ("vae_decode", "bf16", "bf16", "128x128", 5, "decode_first_stage", 1),
]


def compare_with_sdcpp(args, write):
    files = sdcpp_files(args.work)
    for stage, ours, wtype, size, frames, line, runs in SDCPP_ROWS:
        if ours in args.precisions:
            times = [(sora(args, stage, ours, size) * runs, sdcpp(args, files, wtype, size, frames, line))
                     for _ in range(args.rounds)]
            write(stage, size, ours, "stable-diffusion.cpp", wtype, size, times)


# ---------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", default=[*MODELS, "sdcpp"])
    parser.add_argument("--precisions", nargs="*", default=["f32", "bf16", "int8"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build/peers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with open(args.out, "w") as out:
        table = csv.writer(out, delimiter="\t", lineterminator="\n")
        table.writerow(("stage", "size", "precision", "peer", "peer_precision", "peer_size", "threads", "rounds",
                        "seconds", "peer_seconds", "ratio"))

        def write(stage, size, precision, peer, peer_precision, peer_size, times):
            ours, theirs = (statistics.median(column) for column in zip(*times))
            row = (stage, size, precision, peer, peer_precision, peer_size, args.threads, len(times), f"{ours:.4f}",
                   f"{theirs:.4f}", f"{theirs / ours:.2f}")
            table.writerow(row)
            out.flush()
            print(*row, sep="  ", flush=True)

        compare_with_torch(args, write)
        if "sdcpp" in args.parts:
            compare_with_sdcpp(args, write)


if __name__ == "__main__":
    main()
