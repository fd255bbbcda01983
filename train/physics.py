"""Do things move as the physical world moves them?  Measured from pixels, of clips of ten seconds.

    python train/physics.py                         # drawn clips
    python train/physics.py models/demo.gguf --vae  # drawn clips through the model's VAE
    python train/physics.py models/demo.gguf        # clips that ./sora makes of their prompts

    acceleration   of a subject that bounces or jumps, while in the air, in frame heights per second squared; the same
                   for all, as there is one gravity
    restitution    speed after a contact over the speed before it, of a subject that bounces, from its heights
    collision      the same of two that collide
    momentum       of two that collide: how much their sum of velocities changes, as a share of their speeds
    hiding         seconds for which a subject that stands is hidden by one that passes in front

A subject's place is the middle of the pixels of its colour (detect.py).  Each line of the table: how many were
measured, their mean, and their deviation as a share of it.
"""
import argparse
import concurrent.futures
import pathlib

import numpy as np

import adherence
import detect
import world
from common import Log

SEED, FIRST = adherence.PROMPT_SEED, 1_000_000  # of the scenes; the first one's number
SECONDS = 10
MOTIONS = "bounce", "jump", "collide", "pass"  # what the clips show, by turns
ALOFT = 0.04  # a subject that is this high over its lowest place is in the air


def question(index):
    """(story, [(latent frame, text)]) of clip `index`."""
    motion, k = MOTIONS[index % len(MOTIONS)], 0
    kind = "single" if motion in ("bounce", "jump") else "relation"
    while True:
        scene = world.scene(SEED, FIRST + 1000 * index + k, (kind,))
        if scene.subjects[0].motion == motion:
            story = world.Story((scene,), (0,))
            return story, world.story_captions(story, np.random.default_rng([SEED, FIRST + index]))
        k += 1


def _runs(mask):
    """[(first, last + 1)] of each stretch of True; those that are cut off by an end are left out."""
    edges = np.flatnonzero(np.diff(mask.astype(int)))
    edges = edges[1:] if mask[0] else edges
    return [(a + 1, b + 1) for a, b in zip(edges[::2], edges[1::2])]


def flights(y):
    """[(acceleration, height)] of each stretch in the air; y [F]: places, downward. A contact ends it, even if no frame
    shows it: the lowest of five frames."""
    found, lowest = [], np.max(np.lib.stride_tricks.sliding_window_view(np.pad(y, 2, "edge"), 5), 1)
    for a, b in _runs((np.quantile(y, 0.98) - y > ALOFT) & (y < lowest)):
        if b - a > 4:
            t = np.arange(a, b) / adherence.FPS
            curve = np.polyfit(t - t.mean(), y[a:b], 2)
            found.append((2 * curve[0], np.quantile(y, 0.98) - np.polyval(curve, -curve[1] / (2 * curve[0]))))
    return found


def contacts(x):
    """[(change of momentum, restitution)] of each collision; x [2, F]: places of the two."""
    apart, found = np.abs(x[1] - x[0]), []
    for a, b in _runs(apart < np.min(apart) + 0.06):
        middle = a + int(apart[a:b].argmin())
        before, after = np.arange(middle - 9, middle - 1), np.arange(middle + 2, middle + 10)
        if before[0] >= 0 and after[-1] < x.shape[1]:
            (v0, v1), (w0, w1) = (np.polyfit(t / adherence.FPS, x[:, t].T, 1)[0] for t in (before, after))
            found.append((abs(w0 + w1 - v0 - v1) / (abs(v0) + abs(v1)), (w1 - w0) / (v0 - v1)))
    return found


def measure(clip, scene):
    """{what: [values]} of a clip that shows a scene; nothing of what is not there."""
    seen = {x.colour: x for x in detect.subjects_of(clip, begun=False)}
    if not all(x.colour in seen for x in scene.subjects):
        return {}
    centre = np.array([seen[x.colour].centre for x in scene.subjects])
    motion = scene.subjects[0].motion
    if motion == "collide":
        found = contacts(centre[:, :, 0])
        return {"momentum": [m for m, _ in found], "collision": [e for _, e in found]}
    if motion == "pass":
        area = seen[scene.subjects[1].colour].area
        return {"hiding": [(b - a) / adherence.FPS for a, b in _runs(area < 0.6 * np.median(area))]}
    arcs = flights(centre[0, :, 1])
    found = {"acceleration": [a for a, _ in arcs]}
    if motion == "bounce":
        found["restitution"] = [(low / high) ** 0.5 for (_, high), (_, low) in zip(arcs, arcs[1:])]
    return found


def answer(index, args):
    """{what: [values]} of clip `index`."""
    story, texts = question(index)
    look = adherence.film(index, story, texts, args, SECONDS)
    return measure(look(0, SECONDS * adherence.FPS), story.scenes[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?")
    parser.add_argument("--vae", dest="ceiling", action="store_true", help="drawn clips through the model's VAE")
    adherence.run_options(parser)
    parser.add_argument("--clips", type=int, default=32)
    args = parser.parse_args()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        answers = list(pool.map(answer, range(args.clips), [args] * args.clips))
    source = "drawn" if args.model is None else "vae" if args.ceiling else "model"
    for what in ("acceleration", "restitution", "collision", "momentum", "hiding"):
        values = np.array([v for found in answers for v in found.get(what, [])])
        mean, deviation = (float(values.mean()), float(values.std())) if len(values) else (np.nan, np.nan)
        row = dict(source=source, what=what, count=len(values), mean=mean, spread=deviation / abs(mean))
        if args.log:
            Log(args.log).write(model=args.model and adherence.weights_id(args.model), **row)
        print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
