#!/usr/bin/env python3
"""Writes tests/goldens/ from the reference packages: what `make test` compares with.

    python tests/make_goldens.py            (all parts; name some to make only those: sampler)

Each part leaves a VERSIONS beside its files: this command, the packages' versions and the seed.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import schedulers

GOLDENS = Path(__file__).resolve().parent / "goldens"
SEED = 20250707


def write_versions(folder: Path, part: str) -> None:
    """VERSIONS: how the files beside it were made."""
    packages = ["torch", "diffusers", "transformers", "numpy"]
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


PARTS = {"sampler": make_sampler}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    for part in parser.parse_args().parts or PARTS:
        folder = GOLDENS / part
        folder.mkdir(parents=True, exist_ok=True)
        PARTS[part](folder)
        write_versions(folder, part)


if __name__ == "__main__":
    main()
