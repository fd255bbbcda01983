"""Clips made in chunks against upstream's own models: windows, sinks, positions, lists, prompt changes, given frames.

tests/goldens/causal/NAME holds what upstream's model made (VERSIONS there).  The weights are those of
tests/goldens/causal/model.gguf; each case writes its keys into a copy, runs ./sora and has it compare.  Given frames
are latents: --feed puts them in the place of what the encoder makes of any picture or clip of that length.

A clip that is continued twice has to be, bit for bit, the clip that is continued once by both lengths, where the second
run begins from the very latents of the first.  Usage: reference_causal.py
"""
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np

import clips

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests/goldens/causal"
PROMPT, SWITCHED = "A red fox jumps over 12 lazy dogs.", "blurry, static"
FOUR, FIRST = [1000, 937.5, 833.3333, 625], "scheduler.first_timesteps"
# name: (latent frames, keys, options)
CASES = {
    "window": (18, {}, ["--window", "6"]),
    "sink": (18, {}, ["--window", "9", "--sink", "3"]),
    "relative": (18, {}, ["--window", "6", "--sink", "1", "--positions", "relative"]),
    "relative-sink": (18, {}, ["--window", "9", "--sink", "3", "--positions", "relative"]),
    "framewise": (8, {"causal.chunk_frames": 1}, []),
    "framewise-window": (10, {"causal.chunk_frames": 1}, ["--window", "5", "--sink", "1"]),
    "twostep": (5, {"causal.chunk_frames": 1, "scheduler.timesteps": [1000, 833.3333], FIRST: FOUR}, []),
    "onestep": (5, {"causal.chunk_frames": 1, "scheduler.timesteps": [1000], FIRST: FOUR}, []),
    "independent": (7, {"causal.independent_first_frame": True}, []),
    "contextnoise": (9, {"causal.context_noise": 100.0}, []),
    "flush": (18, {}, ["--window", "6", "--sink", "1", "--positions", "relative", "--at", f"2.5 {SWITCHED}"]),
    "recache": (24, {"causal.prompt_change": "recache"}, ["--window", "9", "--sink", "3", "--at", f"3 {SWITCHED}"]),
    "recache-early": (12, {"causal.prompt_change": "recache"},
                      ["--window", "9", "--sink", "3", "--at", f"1 {SWITCHED}"]),
    "recache-relative": (24, {"causal.prompt_change": "recache"},
                         ["--window", "9", "--sink", "3", "--positions", "relative", "--at", f"3 {SWITCHED}"]),
}

# name: (keys, video frames that are given, video frames in all)
GIVEN = {
    "given1": ({"causal.chunk_frames": 1}, 1, 17),
    "given3": ({}, 9, 33),
    "given-independent": ({"causal.independent_first_frame": True}, 13, 37),
}


def sora(model, *options):
    """A run on frames of 48x32, which the weights of model.gguf make of latents of 6x4."""
    command = [ROOT / "sora", "-m", model, "-s", "48x32", "--seed", "7", "-q", "-o", "/dev/null", *options, PROMPT]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def source(folder, frames, end=None):
    """Options that begin a run from so many frames: a picture, or a clip that is continued to `end` frames."""
    planes = clips.make_planes(48, 32, frames, seed=3)
    if frames == 1:
        clips.write_ppm(folder / "picture.ppm", np.ascontiguousarray(planes[0].transpose(1, 2, 0)))
        return ["--image", folder / "picture.ppm", "-f", end]
    clips.write_y4m(folder / "clip.y4m", planes)
    return ["--video", folder / "clip.y4m", "--extend", "-f", end - frames]


def fed(result, tensors):
    """Whether --check --feed found so many tensors, of which only what was fed differs."""
    failed = [line.split()[0] for line in result.stderr.splitlines() if "FAILED" in line]
    return result.returncode == 1 and failed == ["encoded"] and f"check failed: 1 of {tensors} tensors" in result.stderr


def extend_twice(folder, options):
    """Whether 3 latent frames, continued by 3 and then by 3, are what they are when continued by 6."""
    model, once, twice = (folder / name for name in ("twice.gguf", "once", "twice"))
    write_with_keys(GOLDENS / "model.gguf", model, {"scheduler.rule": "euler"})  # all noise is the initial one
    sora(model, *source(folder, 9, 33), *options, "--dump", once)
    noise, latents = np.load(once / "noise.npy"), np.load(once / "latents.npy")
    twice.mkdir(exist_ok=True)
    np.save(folder / "later.npy", noise[:, 3:])
    np.save(twice / "encoded.npy", latents[:, :6])
    np.save(twice / "latents.npy", latents)
    return sora(model, *source(folder, 21, 33), *options, "--noise", folder / "later.npy", "--check", twice, "--feed",
                "--tolerance", "0")


def write_with_keys(path, target, keys):
    """A copy of a weight file in which these keys have these values."""
    source = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in keys:
            continue
        if name == "general.alignment":
            writer.add_custom_alignment(field.contents())
        elif field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_key_value(name, [float(x) for x in value], gguf.GGUFValueType.ARRAY,
                                 sub_type=gguf.GGUFValueType.FLOAT32)
        else:
            add[type(value)](name, value)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (frames, keys, options) in CASES.items():
            model = pathlib.Path(folder) / f"{name}.gguf"
            write_with_keys(GOLDENS / "model.gguf", model, keys)
            command = [ROOT / "sora", "-m", model, "-s", "48x32", "-f", str(4 * frames - 3), "--seed", "7", "-q",
                       "-o", "/dev/null", "--check", GOLDENS / name, "--tolerance", "1e-5", *options, PROMPT]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0 and "check passed: 2 tensors" in result.stderr:
                passed += 1
            else:
                failed += 1
                print(f"{name}: status {result.returncode}\n{result.stderr}", file=sys.stderr)
        for name, (keys, given, end) in GIVEN.items():
            model = pathlib.Path(folder) / f"{name}.gguf"
            write_with_keys(GOLDENS / "model.gguf", model, keys)
            result = sora(model, *source(pathlib.Path(folder), given, end), "--check", GOLDENS / name, "--feed",
                          "--tolerance", "1e-5")
            passed, failed = passed + fed(result, 3), failed + (not fed(result, 3))
            if not fed(result, 3):
                print(f"{name}: status {result.returncode}\n{result.stderr}", file=sys.stderr)
        for options in ([], ["--window", "6"], ["--window", "9", "--sink", "3", "--positions", "relative"]):
            result = extend_twice(pathlib.Path(folder), options)
            passed, failed = passed + fed(result, 2), failed + (not fed(result, 2))
            if not fed(result, 2):
                print(f"continued twice, {options}: status {result.returncode}\n{result.stderr}", file=sys.stderr)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
