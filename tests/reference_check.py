#!/usr/bin/env python3
"""Runs the commands of docs/validating.md, and again with a faulty reference: part of `make test-reference`.

    python tests/reference_check.py [--sora ./sora]

1. The page's commands run on a small random checkpoint: export, diffusers' tensors, --check, --check --feed.
2. One layer of the reference is changed. --feed must fail that block in each pass, and nothing else.
3. Both references are written as other tools might write them, in float16, Fortran order and big-endian, with batch
   axes and integer time steps, and checked again.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.torch import load_file, save_file

import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "validating.md").read_text()
FAULTY = "blocks.1.ffn.net.2.weight"
BLOCK = {f"step{step:03}.{branch}.block01" for step in range(3) for branch in ("cond", "uncond")}


def commands(language: str) -> list[str]:
    """The lines of the page's code blocks in a language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def play(line: str, folder: Path, sora: Path, *more: str) -> subprocess.CompletedProcess:
    """Runs one command of the page in a folder."""
    places = {".venv/bin/python": sys.executable, "./sora": sora, "export.py": ROOT / "export.py"}
    words = [str(places.get(word, word)) for word in shlex.split(line)]
    return subprocess.run([*words, *more], cwd=folder, capture_output=True, text=True)


def failures(result: subprocess.CompletedProcess) -> set[str]:
    """The tensors that failed, from --check's table."""
    return set(re.findall(r"^(\S+) .*FAILED", result.stderr, re.M))


def make_faulty(checkpoint: Path) -> None:
    """Multiplies one layer of a diffusers folder by 1.5."""
    path = next(path for path in (checkpoint / "transformer").glob("*.safetensors") if FAULTY in load_file(path))
    weights = load_file(path)
    weights[FAULTY] *= 1.5
    save_file(weights, path, {"format": "pt"})


def rewrite(tensors: Path) -> None:
    """Rewrites every array as another tool might. The schedule keeps its types, since rounding would change it."""
    for path in tensors.glob("*.npy"):
        array = np.load(path)
        if array.dtype == np.float32 and path.stem != "sigmas":
            array = array.astype(np.float16)
        np.save(path, np.asfortranarray(array.astype(array.dtype.newbyteorder(">"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sora", type=Path, default=ROOT / "sora")
    args = parser.parse_args()
    sora = args.sora.resolve()
    passed = failed = 0

    def claim(holds: bool, message: str) -> None:
        nonlocal passed, failed
        passed, failed = passed + bool(holds), failed + (not holds)
        print(f"{'ok' if holds else 'FAILED'}: {message}", flush=True)

    def claim_check(message: str, line: str, folder: Path, expected: set[str], *more: str) -> None:
        result = play(line, folder, sora, *more)
        found = failures(result)
        claim(result.returncode == (1 if expected else 0) and found == expected,
              f"{message}: exit status {result.returncode}, {sorted(found) or 'nothing'} failed; "
              f"{result.stderr.strip().splitlines()[-1:]}")

    export, dump, check, feed = commands("sh")
    with TemporaryDirectory() as work:
        good, faulty = Path(work) / "good", Path(work) / "faulty"
        make_checkpoint.make(good / "checkpoint", seed=3)
        (good / "dump.py").write_text("\n".join(commands("python")) + "\n")
        for line in (export, dump):
            result = play(line, good, sora)
            claim(result.returncode == 0,
                  f"{line}: exit status {result.returncode} {result.stderr[-300:] * result.returncode}")
        shutil.copytree(good, faulty)
        make_faulty(faulty / "checkpoint")
        play(dump, faulty, sora)

        claim_check("the session's --check", check, good, set(), "--tolerance", "1e-5")
        claim_check("the session's --feed", feed, good, set(), "--tolerance", "1e-5")
        claim_check("a faulty layer, --feed", feed, faulty, BLOCK, "--tolerance", "1e-5")
        found = failures(play(check, faulty, sora))
        claim(found > BLOCK, f"a faulty layer, --check alone: {len(found)} tensors fail, {len(BLOCK)} are the layer's")
        for folder in (good, faulty):
            rewrite(folder / "tensors")
        claim_check("float16 in Fortran order, --check", check, good, set(), "--tolerance", "1e-5")
        claim_check("float16 in Fortran order, --feed", feed, good, set(), "--tolerance", "1e-2")
        claim_check("a faulty layer in float16, --feed", feed, faulty, BLOCK, "--tolerance", "1e-2")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
