"""Recipes: the schedules, and the chunks, for which distilled and causal weights were trained.

Weights do not state their schedule, and a wrong one gives garbage without an error. So the user gives a recipe's name
or the schedule's options; the names of released files are known, too. Weights that look distilled and come without a
schedule are refused. A list of times means one of three things:

    warped    time steps before the shift, whole numbers; upstream takes the entry of its 1000 steps with that time
    as_told   the time steps that the transformer gets; the noise level is that of the nearest of the 1000 steps
    angles    rCM's: the noise level is sin / (sin + cos); the transformer gets 1000 times that, rounded to bf16

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
    """The noise levels of the 1000 steps, [1000] float32 as upstream has them, largest first."""
    sigmas = torch.arange(STEPS, 0, -1, dtype=torch.float32) / STEPS
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def warped(times, shift):
    """([time step], [noise level]) of times before the shift. Raises ExportError for a fraction."""
    if any(t != int(t) for t in times):
        raise ExportError(f"time steps {listed(times)}: expected whole numbers before the shift (--no-warp takes "
                          "others)")
    sigmas = levels(shift)[[STEPS - int(t) for t in times]]
    return (sigmas * STEPS).tolist(), sigmas.tolist()


def as_told(times, shift):
    """([time step], [noise level]) of the time steps that the transformer gets."""
    sigmas = levels(shift)
    return list(times), [sigmas[(sigmas * STEPS - t).abs().argmin()].item() for t in times]


def angles(times, shift):
    """([time step], [noise level]) of rCM's angles; the shift is not used."""
    t = torch.tensor(times, dtype=torch.float64)
    sigmas = torch.sin(t) / (torch.sin(t) + torch.cos(t))
    return (sigmas.float().double() * STEPS).bfloat16().tolist(), sigmas.tolist()


@dataclass(frozen=True)
class Recipe:
    """A row of the table."""
    times: tuple
    meaning: Callable                   # warped, as_told or angles
    defaults: dict                      # names of defaults.py; they override the checkpoint's own
    first_times: tuple = ()             # of the first chunk, if they differ
    container: str = "generator_ema"    # the one to take from a .pt that holds several
    lora_alpha: float | None = None     # of its LoRA, which comes without adapter_config.json
    fewer: bool = False                 # whether the first N times are a schedule, too (--steps N)


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

# (pattern of a released file's name, recipe); and the pipeline classes that FastVideo runs with one schedule only. Two
# models of Causal-Forcing are named causal_forcing.pt, in different folders, so that name is not in the list.
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
    """(recipe, note for the user): by --recipe, or by the known name of a file or pipeline, which gives the note. Both
    are None if there is no recipe, or if options or a weight file state the schedule."""
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
    """A recipe and the note that it was chosen by a file's name."""
    return RECIPES[name], f"{what}: known by its name, as --recipe {name}"


def schedule(args, recipe, shift):
    """{name of a default: value} of the lists in --timesteps or a recipe; {} if there is none. shift: of the schedule.
    Raises ExportError for options that need another one."""
    times = numbers("--timesteps", args.timesteps) or (recipe.times if recipe else ())
    first = numbers("--first-timesteps", args.first_timesteps) or (
        recipe.first_times if recipe and not args.timesteps else ())
    if not times:
        if first or args.no_warp:
            raise ExportError(f"--{'first-timesteps' if first else 'no-warp'} is given, expected --timesteps or "
                              "--recipe, too")
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


def falls(values, lowest, highest):
    """Whether time steps or noise levels are numbers that fall from at most `highest` and stay above `lowest`."""
    return bool(values) and all(type(v) in (int, float) and lowest < v <= highest for v in values) and all(
        a > b for a, b in zip(values, values[1:]))


def numbers(option, text):
    """The numbers of a text such as "1000,750,500,250"; () for None. Raises ExportError unless they are time steps that
    fall. option: the one that has the text."""
    if text is None:
        return ()
    try:
        times = tuple(float(word) for word in text.split(","))
    except ValueError:
        times = ()
    if not falls(times, 0, STEPS):
        raise ExportError(f"{option} is {text!r}, expected numbers that fall from at most {STEPS}, such as "
                          "1000,750,500,250")
    return times


def listed(times):
    """Times as the text of an option."""
    return ",".join(f"{t:g}" for t in times)
