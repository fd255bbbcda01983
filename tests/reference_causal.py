"""Clips made in chunks against upstream's own models: windows, sinks, positions, lists, prompt changes.

tests/goldens/causal/NAME holds what upstream's model made (VERSIONS there).  The weights are those of tests/goldens/causal/model.gguf;
each case writes its keys into a copy, runs ./sora and has it compare.  Usage: reference_causal.py
"""
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np

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
    "recache-early": (12, {"causal.prompt_change": "recache"}, ["--window", "9", "--sink", "3", "--at", f"1 {SWITCHED}"]),
    "recache-relative": (24, {"causal.prompt_change": "recache"},
                         ["--window", "9", "--sink", "3", "--positions", "relative", "--at", f"3 {SWITCHED}"]),
}


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
            writer.add_key_value(name, [float(x) for x in value], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.FLOAT32)
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
            command = [ROOT / "sora", "-m", model, "-s", "48x32", "-f", str(4 * frames - 3), "--seed", "7", "-q", "-o", "/dev/null",
                       "--check", GOLDENS / name, "--tolerance", "1e-5", *options, PROMPT]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0 and "check passed: 2 tensors" in result.stderr:
                passed += 1
            else:
                failed += 1
                print(f"{name}: status {result.returncode}\n{result.stderr}", file=sys.stderr)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
