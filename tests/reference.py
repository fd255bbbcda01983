#!/usr/bin/env python3
"""Compares sora with diffusers, tensor by tensor, on random checkpoints of many shapes: `make test-reference`.

1. Every model of MODELS becomes a diffusers folder and a float32 GGUF.
2. For every case of CASES, a pipeline of diffusers writes its tensors (dump_reference.py), and sora runs the same
   settings with --dump and --check. numpy compares sora's dump with the reference, and sora's own verdict must agree.
3. Single weights are changed. The check must fail and name the first tensor that depends on the weight.

A tensor's error is its largest difference over the reference's largest magnitude. Where the reference's own rounding
comes near the tolerance, it runs in float64, too, and the nearer of both runs counts. Everything runs on one thread,
since the tensors are small.

    python tests/reference.py [--sora ./sora] [--work build/reference] [--only NAME]
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import clips
import make_checkpoint
from dump_reference import Settings, dump

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5

FOX = "A red fox jumps over 12 lazy dogs."
KNOWN = "a red fox jumps over the lazy dog"  # in the corpus of make_checkpoint's spiece.model
WORDS = " ".join(f"{word} {n}" for n in range(60) for word in ("red", "über", "走る", "jumps,", "Ωmega"))

# Arguments of make_checkpoint.make(): the differences from a small Wan 2.1. A model has a tokenizer.json of umT5's
# kind, or with "spiece" only a spiece.model.
MODELS = {
    "wan": {},
    "odd widths": {
        "text_encoder": {"d_model": 37, "d_kv": 7, "num_heads": 5, "d_ff": 51, "num_layers": 3},
        "transformer": {"num_attention_heads": 3, "attention_head_dim": 10, "ffn_dim": 77, "num_layers": 3,
                        "freq_dim": 62},
        "vae": {"base_dim": 9, "dim_mult": [1, 3, 2, 4], "num_res_blocks": 1,
                "temperal_downsample": [True, False, True]},
    },
    "three levels with patches": {
        "transformer": {"num_attention_heads": 1, "attention_head_dim": 40, "in_channels": 12, "out_channels": 12},
        "vae": {"base_dim": 12, "z_dim": 12, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "patch_size": 2,
                "in_channels": 12, "out_channels": 12, "temperal_downsample": [True, True]},
    },
    "three levels without patches": {
        "transformer": {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 6, "out_channels": 6},
        "vae": {"base_dim": 11, "z_dim": 6, "dim_mult": [2, 1, 3], "num_res_blocks": 3,
                "temperal_downsample": [True, True], "scale_factor_spatial": 4},
    },
    "four levels with patches": {
        "transformer": {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 20, "out_channels": 20},
        "vae": {"base_dim": 16, "z_dim": 20, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 2, "patch_size": 2,
                "in_channels": 12, "out_channels": 12, "temperal_downsample": [True, True, False],
                "scale_factor_spatial": 16},
    },
    "residual VAE": {
        "transformer": {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "out_channels": 12},
        "vae": {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 12, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
                "patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True,
                "temperal_downsample": [False, True, True], "scale_factor_spatial": 16},
    },
    "small residual VAE": {
        "transformer": {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6, "out_channels": 6},
        "vae": {"base_dim": 12, "z_dim": 6, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "patch_size": 2,
                "in_channels": 12, "out_channels": 12, "is_residual": True, "temperal_downsample": [True, False],
                "scale_factor_spatial": 8, "scale_factor_temporal": 2},
    },
    "sharded": {
        "transformer": {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 600, "num_layers": 1},
        "shard": "500KB",
    },
    "spiece.model": {"spiece": True},
    "two experts": {"boundary": 0.875},
    "two experts, odd widths": {
        "boundary": 0.6,
        "transformer": {"num_attention_heads": 3, "attention_head_dim": 10, "ffn_dim": 77, "num_layers": 3,
                        "in_channels": 6, "out_channels": 6},
        "vae": {"base_dim": 11, "z_dim": 6, "dim_mult": [2, 1, 3], "num_res_blocks": 1,
                "temperal_downsample": [True, True], "scale_factor_spatial": 4},
    },
    "pictures, two experts": {"boundary": 0.9, "transformer": {"in_channels": 36}},
    "pictures, odd widths": {
        "boundary": 0.5,
        "transformer": {"num_attention_heads": 3, "attention_head_dim": 10, "ffn_dim": 77, "num_layers": 3,
                        "in_channels": 16, "out_channels": 6},
        "vae": {"base_dim": 11, "z_dim": 6, "dim_mult": [2, 1, 3], "num_res_blocks": 1,
                "temperal_downsample": [True, True], "scale_factor_spatial": 4},
    },
}
MODELS["expanded"] = MODELS["residual VAE"] | {"expand": True}  # time steps for each token, as TI2V-5B
MODELS["expanded, small"] = MODELS["small residual VAE"] | {"expand": True}
MODELS["expanded, Wan 2.1's VAE"] = {
    "expand": True, "transformer": {"num_attention_heads": 3, "attention_head_dim": 16}}


@dataclass
class Case:
    model: str
    settings: Settings
    double: bool = False  # also run the reference in float64

    @property
    def name(self) -> str:
        s = self.settings
        words = "no prompt" if not s.prompt else "long prompt" if len(s.prompt) > 99 else "prompt"
        source = "" if s.strength is None else f", a clip anew with {s.strength:g}"
        source += ("", ", a picture", ", first and last picture")[s.pictures]
        source += f", EasyCache {s.easycache:g}" * bool(s.easycache)
        return (f"{self.model}: {s.size[0]}x{s.size[1]} {s.frames}f {s.steps} steps {s.sampler} "
                f"g{s.guidance:g} shift {s.shift:g}, {words}{source}")


def case(model, size, frames, sampler, steps=3, guidance=3.0, shift=3.0, prompt=FOX, negative="blurry, static",
         seed=7, double=False, strength=None, guidance_2=None, pictures=0,
         easycache=0.0) -> Case:
    return Case(model, Settings(prompt, negative, size, frames, steps, guidance, shift, sampler, seed, guidance_2,
                                strength, pictures, easycache), double)


CASES = [
    case("wan", (48, 32), 5, "unipc", guidance=5.0, double=True),
    case("wan", (32, 32), 1, "euler", guidance=1.0, prompt="", seed=0),
    case("wan", (64, 48), 9, "dpm++", steps=4, shift=5.0, prompt=WORDS, negative="", seed=2**40 + 1),
    case("wan", (32, 80), 17, "unipc", steps=2, shift=8.0, guidance=4.5),
    case("wan", (32, 16), 5, "unipc", steps=20, shift=1.0, guidance=3.5, double=True),
    case("odd widths", (48, 32), 9, "unipc", double=True),
    case("odd widths", (16, 64), 5, "dpm++", steps=6, guidance=1.0, shift=12.0),
    case("odd widths", (64, 64), 1, "euler", steps=1, prompt=WORDS, negative=WORDS),
    case("three levels with patches", (64, 48), 17, "euler", shift=5.0, double=True),
    case("three levels with patches", (32, 48), 5, "unipc", guidance=0.5, prompt=""),
    case("three levels without patches", (32, 16), 5, "dpm++", steps=2, double=True),
    case("three levels without patches", (16, 48), 13, "unipc", prompt="", negative=WORDS),
    case("four levels with patches", (96, 64), 9, "unipc", double=True),
    case("four levels with patches", (64, 32), 1, "dpm++", steps=5, guidance=2.0),
    case("residual VAE", (96, 64), 17, "unipc", double=True),
    case("residual VAE", (64, 64), 1, "euler"),
    case("residual VAE", (32, 64), 9, "dpm++", steps=4, strength=0.5),
    case("small residual VAE", (48, 32), 5, "unipc"),
    case("small residual VAE", (32, 32), 9, "euler", strength=0.7),
    case("sharded", (80, 48), 5, "euler", steps=4, prompt="a\u00a0 &lt;b&gt;  “fox”\t\u3000走る\n"),
    case("spiece.model", (48, 48), 5, "dpm++", prompt=KNOWN, negative=""),
    case("wan", (48, 32), 9, "unipc", steps=4, strength=0.5),
    case("wan", (32, 48), 17, "euler", strength=1.0, guidance=1.0),
    case("wan", (32, 32), 1, "dpm++", steps=5, strength=0.99),
    case("odd widths", (48, 32), 5, "dpm++", strength=0.4, guidance=1.5, double=True),
    case("odd widths", (32, 16), 17, "unipc", steps=7, strength=0.3, double=True),
    case("three levels with patches", (64, 48), 9, "unipc", strength=0.7),
    case("three levels without patches", (32, 16), 13, "euler", steps=5, strength=0.8),
    case("four levels with patches", (96, 64), 9, "dpm++", steps=4, strength=0.75),
    *(case("residual VAE", (64, 32), frames, "unipc", steps=2, guidance=1.0, strength=0.5)
      for frames in (1, 2, 5, 9, 17)),
    case("two experts", (48, 32), 9, "unipc", steps=6, shift=12.0, guidance=4.0, guidance_2=3.0, double=True),
    case("two experts", (32, 48), 5, "euler", steps=4, shift=3.0, guidance=4.0, guidance_2=2.0),
    case("two experts", (32, 48), 5, "dpm++", steps=5, shift=5.0, guidance=1.0),
    case("two experts, odd widths", (32, 16), 13, "dpm++", steps=4, guidance=2.0, double=True),
    case("two experts, odd widths", (16, 48), 1, "unipc", steps=3, guidance=2.0, guidance_2=3.0, double=True),
    case("expanded", (96, 64), 9, "unipc", shift=5.0),
    case("expanded", (96, 64), 17, "unipc", shift=5.0, pictures=1, double=True),
    case("expanded", (64, 64), 9, "euler", pictures=2, guidance=1.0),
    case("expanded, small", (48, 32), 9, "dpm++", steps=5, pictures=1),
    case("expanded, small", (32, 32), 5, "unipc", pictures=2),
    case("expanded, Wan 2.1's VAE", (48, 32), 13, "unipc", steps=4, pictures=1),
    case("pictures, two experts", (48, 32), 9, "unipc", steps=5, shift=5.0, guidance=3.5, guidance_2=2.5, pictures=1,
         double=True),
    case("pictures, two experts", (32, 48), 17, "euler", steps=4, shift=5.0, guidance=3.5, pictures=2),
    case("pictures, two experts", (32, 32), 5, "dpm++", steps=4, guidance=1.0, pictures=2),
    case("pictures, odd widths", (32, 16), 13, "unipc", steps=6, guidance=2.0, pictures=1, double=True),
    case("pictures, odd widths", (48, 32), 5, "euler", steps=2, guidance=2.0, pictures=2, double=True),
    case("wan", (32, 32), 5, "unipc", steps=30, guidance=4.0, easycache=0.6),
    case("wan", (32, 16), 9, "euler", steps=40, guidance=1.0, easycache=0.4),
    case("odd widths", (32, 32), 5, "dpm++", steps=50, guidance=2.0, shift=5.0, easycache=0.3),
    case("four levels with patches", (64, 32), 5, "unipc", steps=24, easycache=1.0),
    case("residual VAE", (32, 32), 5, "unipc", steps=12, easycache=100.0),
    case("wan", (32, 32), 9, "unipc", steps=40, strength=0.6, easycache=0.3),
    case("two experts", (32, 32), 5, "unipc", steps=40, shift=5.0, guidance=4.0, guidance_2=3.0, easycache=0.6),
    case("expanded, small", (48, 32), 9, "unipc", steps=20, pictures=1, easycache=0.6),
]

# (tensor whose weight is changed, first tensor of the run that depends on it)
PERTURBED = [
    ("enc.blk.0.ffn_up.weight", "prompt.embeds"),
    ("enc.output_norm.weight", "prompt.embeds"),
    ("patch_embedding.weight", "step000.cond.block00"),
    ("time_projection.1.bias", "step000.cond.block00"),
    ("blocks.0.cross_attn.k.weight", "step000.cond.block00"),
    ("blocks.1.self_attn.norm_q.weight", "step000.cond.block01"),
    ("blocks.1.ffn.2.weight", "step000.cond.block01"),
    ("head.head.weight", "step000.cond.velocity"),
    ("head.modulation", "step000.cond.velocity"),
    ("vae.conv2.weight", "video"),
    ("vae.decoder.head.2.bias", "video"),
]
PERTURBED_PICTURES = [  # the same in a model of two experts that starts from a picture; the second takes over in step 1
    ("vae.encoder.conv1.weight", "encoded"),
    ("patch_embedding.weight", "step000.cond.block00"),
    ("transformer_2.patch_embedding.weight", "step001.cond.block00"),
    ("transformer_2.blocks.0.cross_attn.k.weight", "step001.cond.block00"),
    ("transformer_2.head.modulation", "step001.cond.velocity"),
]


@dataclass
class Tally:
    """Number of claims that hold and fail, and the worst error of every group of tensors."""

    passed: int = 0
    failed: int = 0
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)

    def claim(self, holds: bool, message: str) -> None:
        self.passed += holds
        self.failed += not holds
        if not holds:
            print(f"FAILED: {message}", flush=True)

    def measure(self, name: str, error: float, where: str) -> None:
        group = re.sub(r"(?<=chunk)\d+|(?<=step)\d+|(?<=block)\d+", "", name)
        self.worst[group] = max(self.worst.get(group, (-1.0, "")), (error, where))

    def report(self) -> None:
        """Prints the worst errors, and ends the program."""
        print(f"\nworst error of each tensor, of {TOLERANCE:g} allowed")
        for group, (error, where) in self.worst.items():
            print(f"{group:24} {error:8.1e}  {where}")
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(self.failed > 0)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest magnitude of `expected`. Infinite if a shape or an integer differs, or if
    `actual` has NaN or infinity."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return np.inf
    if expected.dtype.kind == "i":
        return 0.0 if np.array_equal(actual, expected) else np.inf
    difference = np.abs(actual.astype(np.float64) - expected).max(initial=0)
    return float(difference / max(np.abs(expected).max(initial=0), np.finfo(np.float64).tiny))


def worst_of(errors: dict[str, float]) -> str:
    """The largest error and its tensor, as a text. errors: {name: error}."""
    worst = max(errors, key=errors.get)
    return f"worst {errors[worst]:.1e} ({worst})"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in sorted(folder.glob("*.npy"))}


def make_tokenizer(path: Path) -> int:
    """Writes a tokenizer.json of umT5's kind with pieces of the cases' texts. Returns the number of pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", show_progress=False,
                                      special_tokens=["<pad>", "</s>", "<s>", "<unk>"])
    tokenizer.train_from_iterator([FOX, KNOWN, WORDS] * 9, trainer)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()


def calm_decoder(folder: Path) -> None:
    """Scales a random VAE's last convolution so that most pixels lie in [-1, 1], as a trained one's do. Clamped pixels
    would hide errors."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "decoder.conv_out.weight" in tensors:
            tensors["decoder.conv_out.weight"] *= 0.4
            save_file(tensors, path, {"format": "pt"})


def make_model(folder: Path, seed: int, spiece: bool = False, text_encoder: dict | None = None, **sizes) -> None:
    """Makes a diffusers folder of MODELS."""
    tokenizer, text_encoder = None, text_encoder or {}
    if not spiece:
        tokenizer = folder.parent / "tokenizer.json"
        text_encoder = {"vocab_size": make_tokenizer(tokenizer) + 7, **text_encoder}
    make_checkpoint.make(folder, seed, text_encoder=text_encoder, tokenizer=tokenizer, **sizes)
    calm_decoder(folder / "vae")


def export(model: str, work: Path) -> tuple[Path, Path]:
    """(diffusers folder, GGUF) of a model of MODELS. They are made once."""
    folder = work / model.replace(" ", "-")
    checkpoint, weights = folder / "checkpoint", folder / "model.gguf"
    if not weights.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_model(checkpoint, seed=len(model), **MODELS[model])
        result = subprocess.run([sys.executable, ROOT / "export.py", checkpoint, "-o", weights, "--type", "f32"],
                                capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"export.py failed on {checkpoint}:\n{result.stderr}")
    return checkpoint, weights


def run_sora(sora: Path, weights: Path, s: Settings, reference: Path, dumped: Path,
             sources: list[Path] = ()) -> subprocess.CompletedProcess:
    """sources: the clip that is made anew, or the pictures."""
    clip = ["-s", f"{s.size[0]}x{s.size[1]}", "-f", str(s.frames)]
    if s.strength is not None:  # the clip says its size and length
        clip = ["--video", *sources, "--strength", repr(s.strength)]
    for option, picture in zip(("--image", "--last-image"), sources if s.pictures else ()):
        clip += [option, picture]
    if s.guidance_2 is not None:
        clip += ["--guidance-2", repr(s.guidance_2)]
    cache = ["--easycache", repr(s.easycache)] * bool(s.easycache)
    return subprocess.run(
        [sora, "-t", "1", "-m", weights, "-p", s.prompt, "-n", s.negative, *clip, *cache, "--steps", str(s.steps),
         "-g", repr(s.guidance), "--shift", repr(s.shift), "--sampler", s.sampler, "--seed", str(s.seed),
         "--precision", "f32", "-q", "-o", dumped.parent / "out.y4m", "--dump", dumped, "--check", reference,
         "--tolerance", repr(TOLERANCE)],
        capture_output=True, text=True, errors="replace")


def make_sources(s: Settings, work: Path) -> tuple[list[Path], np.ndarray | None]:
    """(files, their colours [3, F, Y, X]) of the clip that is made anew, or of the pictures; none without either."""
    count = s.pictures if s.strength is None else s.frames
    if not count:
        return [], None
    planes = clips.make_planes(*s.size, count, seed=1)
    files = [work / f"source{i}.y4m" for i in range(count if s.pictures else 1)]
    for file, frames in zip(files, np.split(planes, len(files))):
        clips.write_y4m(file, frames)
    return files, clips.colours(planes)


def compare_case(case: Case, sora: Path, work: Path, tally: Tally) -> None:
    checkpoint, weights = export(case.model, work)
    reference, dumped = work / "reference", work / "dumped"
    for folder in (reference, dumped):
        shutil.rmtree(folder, ignore_errors=True)
    sources, colours = make_sources(case.settings, work)
    dump(checkpoint, reference, case.settings, source=colours)
    result = run_sora(sora, weights, case.settings, reference, dumped, sources)
    if result.returncode not in (0, 1):
        tally.claim(False, f"{case.name}: exit status {result.returncode}: {result.stderr.strip()}")
        return
    expected, actual = tensors(reference), tensors(dumped)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected if name in actual}
    exact = run_double(case, checkpoint, colours, work) if case.double else {}
    for name in expected:
        error = errors.get(name, np.inf)
        if name in exact and name in actual:
            error = min(error, relative_error(actual[name], exact[name]))
        tally.claim(error <= TOLERANCE, f"{case.name}: {name} is off by {error:.1e}")
        tally.measure(name, error, case.name)
    agrees = len(errors) == len(expected) and max(errors.values()) <= TOLERANCE
    tally.claim(agrees == (result.returncode == 0), f"{case.name}: --check says otherwise\n{result.stderr}")
    if case.settings.easycache:
        check_left_out(case, actual, expected, tally)
    print(f"{case.name}: {len(expected)} tensors, {worst_of(errors)}", flush=True)
    for who, what in (("diffusers", expected), ("sora", actual)) if exact else ():
        apart = {name: relative_error(what[name], exact[name]) for name in exact if name in what}
        print(f"    {who} in float32 against float64: {worst_of(apart)}", flush=True)


def check_left_out(case: Case, actual: dict, expected: dict, tally: Tally) -> None:
    """Of the same steps there is no velocity of a branch, and there are such steps."""
    def computed(tensors):
        return [name for name in tensors if name.endswith(".cond.velocity")]

    steps = sum(name.startswith("step") and name.endswith(".latents") for name in expected)
    tally.claim(sorted(computed(actual)) == sorted(computed(expected)), f"{case.name}: other steps are left out")
    tally.claim(len(computed(expected)) < steps, f"{case.name}: no step is left out")
    print(f"{steps - len(computed(expected))} of {steps} steps are left out", flush=True)


def run_double(case: Case, checkpoint: Path, colours: np.ndarray | None, work: Path) -> dict:
    """The reference's tensors in float64."""
    folder = work / "double"
    shutil.rmtree(folder, ignore_errors=True)
    dump(checkpoint, folder, case.settings, double=True, source=colours)
    return tensors(folder)


def perturb(weights: Path, tensor: str, out: Path) -> None:
    """Copies a weight file to `out` and changes one weight in the middle of `tensor`."""
    shutil.copy(weights, out)
    found = next(t for t in gguf.GGUFReader(weights).tensors if t.name == tensor)
    values = np.memmap(out, np.float32, "r+", found.data_offset, int(found.n_elements))
    values[values.size // 2] += 0.5
    values.flush()


def test_perturbations(model: str, perturbed: list, settings: Settings, sora: Path, work: Path, tally: Tally) -> None:
    checkpoint, weights = export(model, work)
    reference, changed = work / "reference", work / "perturbed.gguf"
    shutil.rmtree(reference, ignore_errors=True)
    sources, colours = make_sources(settings, work)
    dump(checkpoint, reference, settings, source=colours)
    for tensor, first in perturbed:
        perturb(weights, tensor, changed)
        result = run_sora(sora, changed, settings, reference, work / "dumped", sources)
        named = re.search(r"the first in order of data flow is (\S+)", result.stderr)
        tally.claim(result.returncode == 1 and named is not None and named[1] == first,
                    f"{tensor} changed: exit status {result.returncode}, names {named and named[1]}, expected {first}")
    print(f"{model}: {len(perturbed)} single weights changed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sora", type=Path, default=ROOT / "sora")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reference", help="folder for checkpoints")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    tally = Tally()
    for chosen in (c for c in CASES if args.only in c.name):
        compare_case(chosen, args.sora, args.work, tally)
    if not args.only:
        settings = replace(CASES[0].settings, steps=2)
        test_perturbations("wan", PERTURBED, settings, args.sora, args.work, tally)
        settings = replace(settings, shift=0.5, pictures=1)
        test_perturbations("pictures, two experts", PERTURBED_PICTURES, settings, args.sora, args.work, tally)
    tally.report()


if __name__ == "__main__":
    main()
