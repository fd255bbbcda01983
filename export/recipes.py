"""Recipes: the schedule and the way of generating that distilled and causal weights were trained for.

Weights do not tell their schedule, and a wrong one gives garbage without an error. So it is asked for by a recipe's
name or one by one, or known by the name of a released file; weights that look distilled and come without one are
refused. A list of times means one of three things:

    warped    times before the shift, whole numbers: upstream takes the entry of its 1000 steps that has that time
    as_told   what the transformer is told; the noise level is that of the nearest of the 1000 steps
    angles    rCM's: the noise level is sin / (sin + cos), the transformer is told 1000 of it, rounded to bf16

Sources: the inference code of Self-Forcing (33593df), Causal-Forcing (1fc7bbc), LongLive 1.0, rCM (5b41aa9), FastVideo
and LightX2V.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from export.files import ExportError

STEPS = 1000  # of the schedule that models are trained with


def levels(shift):
    """The noise levels of the 1000 steps, largest first, in float32 as upstream has them."""
    sigmas = torch.arange(STEPS, 0, -1, dtype=torch.float32) / STEPS
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def warped(times, shift):
    if any(t != int(t) for t in times):
        raise ExportError(f"{listed(times)} is to be warped, expected whole numbers (--no-warp takes others)")
    sigmas = levels(shift)[[STEPS - int(t) for t in times]]
    return (sigmas * STEPS).tolist(), sigmas.tolist()


def as_told(times, shift):
    sigmas = levels(shift)
    return list(times), [sigmas[(sigmas * STEPS - t).abs().argmin()].item() for t in times]


def angles(times, shift):
    t = torch.tensor(times, dtype=torch.float64)
    sigmas = torch.sin(t) / (torch.sin(t) + torch.cos(t))
    return (sigmas.float().double() * STEPS).bfloat16().tolist(), sigmas.tolist()


@dataclass(frozen=True)
class Recipe:
    """A row of the table. defaults: of defaults.py, over what the checkpoint itself states."""
    times: tuple
    meaning: Callable
    defaults: dict
    first_times: tuple = ()             # of the first chunk, where they are others
    container: str = "generator_ema"    # of a .pt, where it holds several
    lora_alpha: float | None = None     # of its LoRA, which comes without adapter_config.json
    fewer: bool = False                 # whether the first N of the times are a schedule, too (--steps N)


FOUR = (1000, 750, 500, 250)
CHUNKS = {"rule": "renoise", "shift": 5.0, "chunk_frames": 3}
FRAMES = CHUNKS | {"chunk_frames": 1}

RECIPES = {
    "self-forcing": Recipe(FOUR, warped, CHUNKS),
    "causal-forcing": Recipe(FOUR, warped, CHUNKS, container="generator"),
    "causal-forcing-framewise": Recipe(FOUR, warped, FRAMES),
    "causal-forcing-2step": Recipe((1000, 500), warped, FRAMES, first_times=FOUR),
    "causal-forcing-1step": Recipe((1000,), warped, FRAMES, first_times=FOUR),
    "longlive": Recipe(FOUR, warped, CHUNKS | {"window": 12, "sink": 3, "prompt_change": "recache"},
                       container="generator", lora_alpha=256),
    "rcm": Recipe((math.atan(80), 1.5, 1.4, 1.0), angles, {"rule": "renoise"}, fewer=True),
    "fastwan": Recipe((1000, 757, 522), as_told, {"rule": "renoise", "shift": 8.0, "noise_frames_first": True}),
    "lightx2v": Recipe(FOUR, warped, {"rule": "euler", "shift": 5.0}),
}

# Released files by their names, and classes of pipelines that FastVideo runs with one schedule only. Causal-Forcing's
# causal_forcing.pt is two models: only its folder says which.
KNOWN_FILES = [
    (r"self_forcing_(dmd|sid)", "self-forcing"),
    (r"framewise-2step", "causal-forcing-2step"),
    (r"framewise-1step", "causal-forcing-1step"),
    (r"longlive_base", "longlive"),
    (r"rcm_wan2\.1_t2v", "rcm"),
    (r"wan2?\.?1.*lightx2v.*(step_?distill|4step)", "lightx2v"),
]
KNOWN_PIPELINES = {"WanCausalDMDPipeline": "self-forcing", "WanDMDPipeline": "fastwan"}


def find_recipe(args, sources):
    """(The recipe that an option or a known name says, a note of the latter); None where none does, or options or a
    weight file have their own."""
    if args.recipe or args.timesteps or args.rule or sources.own:
        return RECIPES.get(args.recipe), None
    for path in (sources.transformer, *args.lora):
        for pattern, name in KNOWN_FILES:
            if re.match(pattern, Path(path).name, re.IGNORECASE):
                return known(path, name)
    if sources.pipeline in KNOWN_PIPELINES:
        return known(sources.pipeline, KNOWN_PIPELINES[sources.pipeline])
    return None, None


def known(what, name):
    return RECIPES[name], f"{what}: known by its name, as --recipe {name}"


def schedule(args, recipe, shift):
    """The defaults that follow from a list of times, in an option or a recipe; {} where there is none."""
    times = numbers("--timesteps", args.timesteps) or (recipe.times if recipe else ())
    first = numbers("--first-timesteps", args.first_timesteps) or (
        recipe.first_times if recipe and not args.timesteps else ())
    if not times:
        if first or args.no_warp:
            raise ExportError(f"--{'first-timesteps' if first else 'no-warp'} goes with --timesteps or --recipe")
        return {}
    meaning = as_told if args.no_warp else warped if args.timesteps or not recipe else recipe.meaning
    if args.steps and recipe and recipe.fewer and not args.timesteps:
        times = times[:args.steps]
    values = {"guidance": 1.0}
    values["timesteps"], values["sigmas"] = meaning(times, shift)
    if first:
        values["first_timesteps"], values["first_sigmas"] = meaning(first, shift)
    if meaning is angles:
        values["noise_scale"] = values["sigmas"][0]
    return values


def numbers(option, text):
    """The numbers of a list such as 1000,750,500,250: times that fall, none above 1000."""
    if text is None:
        return ()
    try:
        times = tuple(float(word) for word in text.split(","))
    except ValueError:
        times = ()
    if not times or not all(0 < t <= STEPS for t in times) or any(a <= b for a, b in zip(times, times[1:])):
        raise ExportError(f"{option} is {text!r}, expected numbers that fall from at most {STEPS}, such as "
                          "1000,750,500,250")
    return times


def listed(times):
    return ",".join(f"{t:g}" for t in times)
