#!/usr/bin/env python3
"""Writes tests/goldens/: numbers of the reference packages, with which `make test` compares.

    python tests/make_goldens.py            (all parts except those below; or give names of parts)
    python tests/make_goldens.py demo       (from models/demo.gguf; needs the packages of train/requirements.txt)
    python tests/make_goldens.py quantised  (needs comfy-kitchen==0.2.40)

Each part has a file VERSIONS: this command, the packages' versions, the seed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import gguf
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import clips
import make_checkpoint
import reference_chunks
import reference_tiny
import schedulers
from dump_reference import Settings, dump, float64_arithmetic

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
SEED = 20250707


def write_versions(folder: Path, part: str) -> None:
    """Writes VERSIONS: how the files beside it were made."""
    packages = ["torch", "diffusers", "transformers", "numpy", "gguf", "pillow"]
    packages += ["comfy-kitchen"] if part == "quantised" else []
    lines = [f"python tests/make_goldens.py {part}", f"seed {SEED}"]
    lines += [f"{name} {version(name)}" for name in packages]
    (folder / "VERSIONS").write_text("\n".join(lines) + "\n")


def make_sampler(folder: Path) -> None:
    """NAME.npy: rows [shift, steps, step, time step, sigma, velocity (6), latents before (6), latents after (6)]
    of runs on random latents and velocities, run after run. schedule.npy [3,1000,2]: time step and sigma of 1000
    steps with shift 5, in the order of sora.h."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, 6, 1, 1, 1)
    for name in schedulers.NAMES:
        rows = []
        for shift in (1.0, 3.0, 5.0, 12.0):
            for steps in (1, 2, 3, 5, 20):
                scheduler = schedulers.make(name, shift, steps)
                latents = torch.randn(shape, generator=generator)
                for step, timestep in enumerate(scheduler.timesteps):
                    velocity = torch.randn(shape, generator=generator)
                    after = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                    numbers = [shift, steps, step, float(timestep), float(scheduler.sigmas[step])]
                    rows.append(np.concatenate([numbers, *(t.flatten() for t in (velocity, latents, after))]))
                    latents = after
        np.save(folder / f"{name}.npy", np.array(rows, np.float32))
    schedules = [schedulers.make(name, 5.0, 1000) for name in schedulers.NAMES]
    np.save(folder / "schedule.npy",
            np.array([np.stack([s.timesteps, s.sigmas[:-1]], axis=1) for s in schedules], np.float32))


# Where the half-precision numbers of a block stand.
HALVES = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2],
          "q5_k": [0, 2], "q6_k": [208]}


def make_weights(folder: Path) -> None:
    """tiny.gguf: keys and tensors of every type that the reader knows, written by the gguf package.
    NAME.npy [rows, cols]: the tensors, dequantised by that package."""
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "wan")
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -100)
    writer.add_uint16("test.u16", 60000)
    writer.add_int16("test.i16", -30000)
    writer.add_uint32("test.u32", 4000000000)
    writer.add_int32("test.i32", -2000000000)
    writer.add_key_value("test.i64", -(2**63), gguf.GGUFValueType.INT64)
    writer.add_float32("test.f32", 0.1)
    writer.add_float64("test.f64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "na\u00efve")
    writer.add_array("test.words", ["", "\u2581the", "</s>"])
    writer.add_array("test.scores", [-1.5, -0.1])
    writer.add_array("test.numbers", [-1, 0, 70000])
    rng = np.random.default_rng(SEED)
    for name in ("f32", "f16", "bf16", "q8_0"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        values = rng.standard_normal((3, 64), np.float32) * np.float32([[1], [1e-3], [1e-6]])
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        np.save(folder / f"{name}.npy", gguf.quants.dequantize(packed, kind))
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):  # every bit of a block counts
        kind = gguf.GGMLQuantizationType[name.upper()]
        block, size = gguf.constants.GGML_QUANT_SIZES[kind]
        packed = np.random.default_rng(SEED).integers(0, 256, (3, 512 // block * size), np.uint8)
        blocks = packed.reshape(-1, size)
        for at in HALVES[name]:
            blocks[:, at + 1] &= 0xBF  # no half-precision number is infinite or NaN
        writer.add_tensor(name, packed, raw_dtype=kind)
        np.save(folder / f"{name}.npy", gguf.quants.dequantize(packed, kind))
    writer.add_tensor("conv.weight", rng.standard_normal((2, 3, 3, 3), np.float32))
    writer.add_tensor("vector", rng.standard_normal(5, np.float32))
    writer.add_tensor("last", rng.standard_normal(3, np.float32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


    make_foreign(folder / "foreign.gguf")


def make_foreign(path: Path) -> None:
    """A GGUF file as other programs write it: another architecture, a row of 256 zeros of every type that ggml stores,
    tensors of five dimensions and of none, a name of 127 bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("foreign")
    for kind, (block, size) in gguf.constants.GGML_QUANT_SIZES.items():
        if kind.name not in ("Q8_1", "Q8_K"):  # ggml does not store these types
            writer.add_tensor(f"of.{kind.name.lower()}", np.zeros((1, 256 // block * size), np.uint8), raw_dtype=kind)
    writer.add_tensor("conv3d.weight", np.zeros((2, 3, 1, 2, 2), np.float32))
    writer.add_tensor("scale", np.array(1, np.float32))
    writer.add_tensor("n" * 127, np.zeros(4, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_noise(folder: Path) -> None:
    """integers.npy, randn_N.npy, randn_mixed.npy, randn_clip.npy: [len(seeds), n], a row for each seed.
    seeds/SEED/noise.npy: seeds from the whole range. The seeds, and the sizes of the mixed draws, are those of
    test_noise.c. The numbers are torch's on a processor with AVX2."""
    seeds = [0, 7, 2**32 + 7, 2**64 - 1]

    def save(name: str, draw: Callable[[torch.Generator], torch.Tensor]) -> None:
        rows = [draw(torch.Generator().manual_seed(seed)) for seed in seeds]
        np.save(folder / f"{name}.npy", torch.stack(rows).numpy())

    save("integers", lambda g: torch.empty(1300, dtype=torch.int32).random_(generator=g))
    for n in (1, 2, 15, 16, 17, 31, 33, 4099):
        save(f"randn_{n}", lambda g: torch.randn(n, generator=g))
    save("randn_mixed", lambda g: torch.cat([torch.randn(n, generator=g) for n in (3, 5, 16, 1, 17, 2, 40)]))
    for seed in (-2**63, -2, 2**63 + 5, 2**64 - 1):  # for `sora --seed SEED --check`
        part = folder / "seeds" / str(seed)
        part.mkdir(parents=True, exist_ok=True)
        np.save(part / "noise.npy", torch.randn(4, 2, 4, 8, generator=torch.Generator().manual_seed(seed)))
    save("randn_clip", lambda g: torch.randn(1, 16, 2, 4, 6, generator=g).flatten())


def make_npy(folder: Path) -> None:
    """Files that the reader accepts, written by numpy:
    TYPE_SIZES.npy         arrays of 0, 1, 2, ...
    types/ORDER_TYPE.npy   [2, 3, 4]: numbers that need a type's sign, fraction or highest bits; both byte orders, and
                           big-endian in Fortran order
    v2.npy, v3.npy         versions 2 and 3 of the format
    noise.npy              the model's noise in float64, big-endian, in Fortran order, with a batch axis
    Files that it refuses: bad_*.npy; noise_tchw.npy, whose axes are in another order."""
    for kind in ("f4", "f8", "i4", "i8"):
        for shape in ((), (3,), (0, 2), (2, 1, 3), (1, 2, 3, 2, 1)):
            name = "x".join(map(str, shape)) or "scalar"
            values = np.arange(np.prod(shape, dtype=int), dtype=kind)
            np.save(folder / f"{kind}_{name}.npy", values.reshape(shape))
    for kind in ("f4", "i4"):  # the space that numpy leaves for growth decides the length of this header
        fields = {"descr": "<" + kind, "fortran_order": False, "shape": (0, 1234567890, 1234567890, 1234567890, 1234)}
        with open(folder / f"{kind}_long.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, fields)
    for version in (2, 3):
        with open(folder / f"v{version}.npy", "wb") as file:
            np.lib.format.write_array(file, np.arange(6, dtype=np.float32).reshape(2, 3), version=(version, 0))
    types = folder / "types"
    types.mkdir(exist_ok=True)
    count = np.arange(24).reshape(2, 3, 4)
    for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        numbers = {"f": (count - 11) / 4, "i": count - 11, "b": count % 2}.get(kind[0])
        if numbers is None:
            numbers = count.astype(np.uint64) << np.uint64(8 * int(kind[1]) - 5)
        np.save(types / f"little_{kind}.npy", numbers.astype("<" + kind))
        np.save(types / f"big_{kind}.npy", numbers.astype(">" + kind))
        np.save(types / f"fortran_{kind}.npy", np.asfortranarray(numbers.astype(">" + kind)))
    np.save(folder / "batch.npy", np.arange(6, dtype=np.float32).reshape(1, 1, 1, 1, 2, 3))
    noise = np.load(GOLDENS / "model" / "noise.npy")
    np.save(folder / "noise.npy", np.asfortranarray(noise[None].astype(">f8")))
    np.save(folder / "noise_tchw.npy", noise.swapaxes(0, 1).copy())
    np.save(folder / "bad_dimensions.npy", np.zeros((2, 1, 1, 1, 1, 1), np.float32))
    np.save(folder / "bad_complex.npy", np.zeros(3, np.complex64))
    np.save(folder / "bad_text.npy", np.array(["a red fox"]))
    np.save(folder / "bad_bytes.npy", np.zeros(3, "V2"))
    np.save(folder / "bad_fields.npy", np.zeros(3, [("a", "f4"), ("b", "i8")]))
    np.save(folder / "bad_objects.npy", np.array([None, {}]), allow_pickle=True)
    np.savez(folder / "bad_archive", noise=np.zeros(3, np.float32))
    (folder / "bad_archive.npz").rename(folder / "bad_archive.npy")


def make_model(folder: Path) -> None:
    """model.gguf: a very small model with random weights. *.npy: the tensors of one clip by diffusers; cli.sh has the
    same settings."""
    settings = Settings(prompt="a red fox", negative="the lazy dog", size=(32, 16), frames=5, steps=2, guidance=3.0,
                        shift=3.0, sampler="unipc", seed=7)
    with TemporaryDirectory() as work:
        checkpoint = make_small(Path(work) / "checkpoint")
        subprocess.run([sys.executable, ROOT / "export.py", checkpoint, "-o", folder / "model.gguf", "--type", "f32"],
                       check=True)
        dump(checkpoint, folder, settings)


def make_small(checkpoint: Path, channels: int = 4, vae_sizes: dict | None = None, **pipeline) -> Path:
    """The checkpoint of model.gguf. channels: that the transformer reads; vae_sizes: other ones of the VAE; pipeline:
    further arguments of make()."""
    text_encoder = {"d_model": 24, "d_kv": 8, "num_heads": 2, "d_ff": 40, "num_layers": 2}
    transformer = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "num_layers": 2, "freq_dim": 32,
                   "in_channels": channels, "out_channels": 4}
    vae = {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
           "scale_factor_spatial": 4, **(vae_sizes or {})}
    make_checkpoint.make(checkpoint, SEED, text_encoder=text_encoder, transformer=transformer, vae=vae, **pipeline)
    return checkpoint


def make_images(folder: Path) -> None:
    """clip.y4m, and in anew/ the tensors of it made anew by diffusers with the weights of model.gguf, as cli.sh does.
    picture.ppm, and as NAME.npy [3, Y, X] what Pillow's BICUBIC makes of its middle in another size,
    in floating point."""
    planes = clips.make_planes(32, 16, 9, SEED)
    clips.write_y4m(folder / "clip.y4m", planes)
    settings = Settings(prompt="a red fox", negative="the lazy dog", size=(32, 16), frames=9, steps=3, guidance=3.0,
                        shift=3.0, sampler="unipc", seed=7, strength=0.7)
    with TemporaryDirectory() as work:
        dump(make_small(Path(work) / "checkpoint"), folder / "anew", settings, source=clips.colours(planes))
    for path in (folder / "anew").glob("step*.block*.npy"):
        path.unlink()
    pixels = np.random.default_rng(SEED).integers(0, 256, (17, 23, 3), np.uint8)
    clips.write_ppm(folder / "picture.ppm", pixels)
    for name, width, height in (("smaller", 8, 8), ("larger", 48, 24), ("narrower", 6, 17), ("same", 23, 17)):
        scale = min(23 / width, 17 / height)
        left, top = (23 - scale * width) / 2, (17 - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        planes = [Image.fromarray(pixels[..., c] / np.float32(127.5) - np.float32(1)) for c in range(3)]
        np.save(folder / f"{name}.npy",
                np.stack([p.resize((width, height), Image.Resampling.BICUBIC, box) for p in planes]))


def make_pictures(folder: Path) -> None:
    """first.y4m, last.y4m: two pictures. planes/: the tensors of a clip from one to the other by diffusers, with the
    weights of model.gguf: an image-to-video model with two experts. held/: the same with weights like TI2V-5B's: the
    first and last latent frames are held, and the VAE has shortcuts."""
    planes = clips.make_planes(32, 16, 2, SEED + 1)
    for i, name in enumerate(("first", "last")):
        clips.write_y4m(folder / f"{name}.y4m", planes[i:i + 1])
    settings = Settings(prompt="a red fox", negative="the lazy dog", size=(32, 16), frames=9, steps=3, guidance=3.0,
                        guidance_2=2.0, shift=3.0, sampler="unipc", seed=7, pictures=2)
    with TemporaryDirectory() as work:
        experts = make_small(Path(work) / "experts", channels=12, boundary=0.7)
        subprocess.run([sys.executable, ROOT / "export.py", experts, "-o", folder / "model.gguf", "--type", "f32"],
                       check=True)
        dump(experts, folder / "planes", settings, source=clips.colours(planes))
        held = make_small(Path(work) / "held", expand=True, vae_sizes={
            "decoder_base_dim": 8, "patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True,
            "scale_factor_spatial": 8})
        subprocess.run([sys.executable, ROOT / "export.py", held, "-o", folder / "held" / "model.gguf",
                        "--type", "f32"], check=True)
        dump(held, folder / "held", replace(settings, guidance_2=None), source=clips.colours(planes))
    for path in folder.glob("*/step*.block*.npy"):
        path.unlink()


def make_tiny(folder: Path) -> None:
    """model.gguf: a very small model with a tiny decoder, all weights random. latents.npy by diffusers, and video.npy:
    what reference_tiny.py makes of them, which equals madebyollin/taehv's taehv.py bit for bit. cli.sh has the same
    settings."""
    case = reference_tiny.Case("", 4, 1, widths=(8, 6, 5, 4))
    weights = reference_tiny.random_weights(case, SEED)
    settings = Settings(prompt="a red fox", size=(32, 16), frames=9, steps=2, guidance=1.0, shift=3.0,
                        sampler="unipc", seed=7)
    with TemporaryDirectory() as work:
        checkpoint, tensors, tiny = (Path(work) / name for name in ("checkpoint", "tensors", "tiny.pth"))
        make_small(checkpoint, vae_sizes={"base_dim": 4, "dim_mult": [1, 1, 1, 1], "scale_factor_spatial": 8,
                                          "temperal_downsample": [False, True, True]})
        torch.save(weights, tiny)
        subprocess.run([sys.executable, ROOT / "export.py", checkpoint, "-o", folder / "model.gguf", "--type", "f32",
                        "--vae-tiny", tiny], check=True)
        dump(checkpoint, tensors, settings)
        latents = np.load(tensors / "latents.npy")
    np.save(folder / "latents.npy", latents)
    frames = reference_tiny.decode(weights, torch.from_numpy(latents).transpose(0, 1), case.patch)
    np.save(folder / "video.npy", (2 * frames - 1).transpose(0, 1).contiguous().numpy())


@torch.no_grad()
def make_demo(folder: Path) -> None:
    """The tensors of 21 frames of 48x48 with the bundled model's own settings by diffusers' modules; cli.sh makes the
    same clip. Of the blocks only the first and the last of the last pass are kept. The frames come from a float64 VAE,
    since the trained decoder amplifies rounding."""
    with TemporaryDirectory() as work:
        checkpoint, made = Path(work) / "checkpoint", Path(work) / "made"
        subprocess.run([sys.executable, ROOT / "train" / "base.py", ROOT / "models" / "demo.gguf", checkpoint],
                       check=True)
        run = json.loads((checkpoint / "sora.json").read_text())
        pipe = diffusers.WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)
        ids = [pipe.tokenizer(text, return_tensors="pt").input_ids for text in ("a blue star bounces on the grass", "")]
        embeds = [pipe.text_encoder(x).last_hidden_state[0].numpy() for x in ids]
        names = ("window", "rule", "timesteps", "sigmas", "steps", "guidance")
        how = {"rule": "multistep"} | {name: run[name] for name in names if name in run}
        case = reference_chunks.Case("demo", frames=6, chunk=run.get("chunk_frames", 0), **how)
        reference_chunks.make_reference(case, checkpoint, embeds, (pipe.vae.config.z_dim, case.frames, 6, 6), made)
        last = max(made.glob("*.cond.velocity.npy")).name.removesuffix("velocity.npy")
        kept = [f"{last}block{i:02d}.npy" for i in (0, len(pipe.transformer.blocks) - 1)]
        for path in made.glob("*.npy"):
            if ".block" not in path.name or path.name in kept:
                shutil.copy(path, folder)
        for name, x, e in zip(("prompt", "negative")[:1 + (case.guidance > 1)], ids, embeds):
            np.save(folder / f"{name}.ids.npy", x[0].numpy().astype(np.int32))
            np.save(folder / f"{name}.embeds.npy", e)
        mean, std = (torch.tensor(x, dtype=torch.float64).view(1, -1, 1, 1, 1)
                     for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
        latents = torch.from_numpy(np.load(folder / "latents.npy")).double()[None]
        with float64_arithmetic():
            video = pipe.vae.double().decode(latents * std + mean, return_dict=False)[0][0]
        np.save(folder / "video.npy", video.float().numpy())


def make_quantised(folder: Path) -> None:
    """comfy.safetensors: small weights in ComfyUI's formats. dequantised.safetensors: the same, dequantised by
    ComfyUI's library comfy-kitchen 0.2.40."""
    from comfy_kitchen.tensor import QuantizedTensor
    int8, fp8 = "TensorWiseINT8Layout", "TensorCoreFP8Layout"
    generator = torch.Generator().manual_seed(SEED)
    stored, dequantised = {}, {}
    for name, layout, options in (("whole", int8, {}), ("rows", int8, {"per_channel": True}),
                                  *((f"rotated{n}", int8, {"per_channel": True, "convrot": True,
                                                           "convrot_groupsize": n}) for n in (16, 64, 256)),
                                  ("fp8", fp8, {"scale": torch.tensor(0.01)})):
        values = torch.randn(8, 256, generator=generator)
        quantised = QuantizedTensor.from_float(values, layout, **options)
        stored |= quantised.state_dict(f"{name}.weight")
        settings = {"format": "int8_tensorwise" if layout == int8 else "float8_e4m3fn"}
        settings |= {k: v for k, v in options.items() if k.startswith("convrot")}
        stored[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        dequantised[f"{name}.weight"] = quantised.dequantize()
    save_file(stored, folder / "comfy.safetensors")
    save_file(dequantised, folder / "dequantised.safetensors")


PARTS = {"weights": make_weights, "noise": make_noise, "sampler": make_sampler, "npy": make_npy, "model": make_model,
         "images": make_images, "pictures": make_pictures, "tiny": make_tiny,
         "demo": make_demo, "quantised": make_quantised}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    for part in parser.parse_args().parts or PARTS.keys() - {"demo", "quantised"}:
        folder = GOLDENS / part
        folder.mkdir(parents=True, exist_ok=True)
        PARTS[part](folder)
        write_versions(folder, part)


if __name__ == "__main__":
    main()
