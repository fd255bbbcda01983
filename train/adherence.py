"""How often does the model do as it is told?  The world asks, the C program makes the clip, the detector answers.

    python train/adherence.py models/demo.gguf --prompts 200 --kind single --held-out
    python train/adherence.py models/demo.gguf --prompts 100 --kind minute
    python train/adherence.py models/demo.gguf --prompts 50 --kind story

Every clip is one run of `./sora -m MODEL --seed N PROMPT`, with the file's own defaults, read back from its Y4M file.
Prints, for each attribute, the share of prompts in which the detector sees what the prompt names, and the same for all
attributes at once.

    single, pair, relation   two seconds, as in world.KINDS
    trio                     two seconds of three that move on their own
    hard                     two seconds of small or dark things, with points or legs, that move fast
    minute                   a minute of one sentence that was held out, judged in windows of two seconds along it
    story                    five to eight sentences, each judged in the two seconds that begin a second after its time

--ceiling puts drawn clips through the model's VAE instead: what a transformer that made exactly the encoder's latents
would be credited with.
"""
import argparse
import concurrent.futures
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile
import time

import numpy as np
import torch

import base
import detect
import draw
import vae
import video
import world
from common import Log

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT_SEED = 3
KINDS = (*world.KINDS, world.TRIO, "hard", "minute", "story")
FPS, WINDOW = 16, 32  # WINDOW: frames that are judged at a time of a long clip
MINUTE = 0, 2, 4, 5, 6, 8, 15, 30, 50, 52, 54, 56, 58  # seconds at which the windows of a minute begin
SETTLED = draw.BEAT  # frames after its time, at which a sentence is judged
CONTEXT = 48  # frames before a window that the VAE must see, for the window to be as in the whole clip


def question(index, kind, held_out):
    """(story, [(latent frame, text)]) number `index` of a kind. Most scenes occur in training too, with other words,
    places and light; those that are held out never do."""
    rng = np.random.default_rng([PROMPT_SEED, index, 1])  # not the scene's own numbers
    if kind == "story":
        count = int(np.random.default_rng([PROMPT_SEED, index, 2]).integers(5, 9))
        story = world.story(PROMPT_SEED, index, held_out=held_out, sentences=count)
    elif kind == "minute":
        story = world.story(PROMPT_SEED, index, ("single",), held_out=True)
    else:
        scene = (world.hard_scene(PROMPT_SEED, index, held_out) if kind == "hard" else
                 world.scene(PROMPT_SEED, index, (kind,), held_out))
        return world.Story((scene,), (0,)), [(0, world.caption(scene, rng))]
    return story, world.story_captions(story, rng)


def windows(story, kind):
    """[(name, first frame, frames, begun)] of what is judged of a clip; begun: as in detect.detect."""
    if kind == "minute":
        return [(f"{second}s", second * FPS, WINDOW, second == 0) for second in MINUTE]
    if kind == "story":
        starts = [world.first_frame(start) for start in (*story.starts, story.starts[-1] + 4 * world.CHUNK)]
        return [(f"sentence{i}", begin + SETTLED, min(WINDOW, end - begin - SETTLED), False)
                for i, (begin, end) in enumerate(zip(starts, starts[1:]))]
    return [("clip", 0, world.FRAMES, True)]


def generate(sora, model, texts, seed, options=()):
    """The C program's clip of a prompt, uint8 [F, H, W, 3]; texts: [(latent frame, text)]."""
    (_, prompt), *later = texts
    for start, text in later:
        options = [*options, "--at", f"{world.first_frame(start) / FPS} {text}"]
    with tempfile.TemporaryDirectory() as folder:
        clip = pathlib.Path(folder) / "clip.y4m"
        subprocess.run([sora.resolve(), "-m", model, "--seed", str(seed), "-t", "1", "-q", "--no-record", *options,
                        "-o", clip, "--prompt", prompt], check=True)
        return video.read(clip)[0]


autoencoder_of = functools.lru_cache(base.autoencoder)


@torch.no_grad()
def through_vae(autoencoder, story, first=0, frames=world.FRAMES):
    """Drawn frames, encoded and decoded: uint8 [frames, H, W, 3], without the way through a Y4M file.

    Of a window in a long clip enough is coded before it that it is as it would be had all been.
    """
    begin = max((first - CONTEXT) // 4 * 4, 0)  # where four frames that share a latent end
    count = -(-(first + frames - 1 - begin) // 4) * 4 + 1
    x = vae.to_tensor(draw.draw(story, frames=count, first=begin))[None]
    pixels = vae.decode(autoencoder, vae.encode(autoencoder, x))[0]
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    return pixels[first - begin:first - begin + frames]


def film(index, story, texts, args, seconds=None):
    """(first frame, frames) -> pixels, of the clip of a question: drawn if there is no model, drawn and through the
    model's VAE with --ceiling, else the program's."""
    if args.model is None:
        return lambda first, frames: draw.draw(story, frames=frames, first=first)
    if args.ceiling:
        return lambda first, frames: through_vae(autoencoder_of(args.model), story, first, frames)
    length = ["--seconds", str(seconds)] if seconds else []
    clip = generate(args.sora, args.model, texts, args.seed + index, [*args.option, *length])
    return lambda first, frames: clip[first:first + frames]


def answer(index, args):
    """(prompt, {window: {attribute: right or not}}, strip or None) of one question."""
    torch.set_num_threads(1)
    story, texts = question(index, args.kind, args.held_out)
    parts = windows(story, args.kind)
    long = len(parts) > 1
    look = film(index, story, texts, args, (parts[-1][1] + parts[-1][2]) / FPS if long else None)
    marks = {}
    for name, first, frames, begun in parts:
        scene = story.at(first)
        window = look(first, frames)
        marks[name] = detect.compare(scene, detect.detect(window, begun), begun, args.kind != "story")
        before = first - SETTLED - 1  # the last frame of the sentence before
        if args.kind == "story" and before > 0:
            for i, subject in enumerate(scene.subjects):
                if subject not in story.at(before).subjects:
                    went = detect.goes_there(window[:SETTLED], subject)
                    marks[name] |= {} if went is None else {f"way{i}": went}
    return " | ".join(text for _, text in texts), marks, look(*parts[-1][1:3]) if args.strip else None


def weights_id(path):
    """What was judged: the first digits of the SHA-256 of the model's file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def wrong(marks):
    """The attributes that were wrong, each with its window where there are several."""
    return " ".join(f"{window}.{name}" if len(marks) > 1 else name
                    for window, found in marks.items() for name, ok in found.items() if not ok)


ALONG = ("texture", "way", "at_5s", "at_15s", "at_30s", "at_58s", "first_ten", "last_ten", "first_sentence",
         "later_sentences", "kept")


def along(kind, answers):
    """{name of ALONG: share} of a minute's windows at some seconds, and in its first and last ten; or of a story's
    first and later sentences, and of how often a subject keeps its shape, or its colour, in the later ones."""
    right = [{window: detect.all_right(found) for window, found in marks.items()} for _, marks, _ in answers]
    share = lambda names: float(np.mean([r[name] for r in right for name in names]))
    if kind == "minute":
        return {**{f"at_{t}s": share([f"{t}s"]) for t in (5, 15, 30, 58)},
                "first_ten": share([f"{t}s" for t in MINUTE if t < 10]),
                "last_ten": share([f"{t}s" for t in MINUTE if t >= 50])}
    kept = [found[f"{name}{i}"] for _, marks, _ in answers for window, found in marks.items() if window != "sentence0"
            for i in range(world.CROWD) for name in ("shape", "colour") if f"{name}{i}" in found]
    return {"first_sentence": share(["sentence0"]), "kept": float(np.mean(kept)),
            "later_sentences": float(np.mean([ok for r in right for name, ok in r.items() if name != "sentence0"]))}


def run_options(parser):
    """Adds the options that say how clips are made, and where what is measured is kept."""
    parser.add_argument("--sora", type=pathlib.Path, default=ROOT / "sora")
    parser.add_argument("--option", action="append", default=[], help="for the program, as in --option=--steps=8")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next one's is one more")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="clips made at a time, on one thread each")
    parser.add_argument("--log", type=pathlib.Path, help="append the figures to this table")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?", default=ROOT / "models" / "demo.gguf")
    run_options(parser)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--kind", choices=KINDS, default="single")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--ceiling", action="store_true", help="judge the model's VAE on drawn clips instead")
    parser.add_argument("--results", type=pathlib.Path, help="write the prompts, with what was wrong, into this table")
    parser.add_argument("--strip", type=pathlib.Path, help="save every fourth frame of the first ten clips as a PNG")
    args = parser.parse_args()
    start = time.time()
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        answers = list(pool.map(answer, range(args.prompts), [args] * args.prompts))
    if args.results:
        lines = [f"{args.seed + i}\t{prompt}\t{wrong(marks)}" for i, (prompt, marks, _) in enumerate(answers)]
        args.results.write_text("\n".join(["seed\tprompt\twrong", *lines]) + "\n")
    if args.strip:
        video.save_strips(args.strip, [clip for _, _, clip in answers[:10]])
        print(*(f"{prompt}\t{wrong(marks)}" for prompt, marks, _ in answers[:10]), sep="\n")
    found = detect.shares([found for _, marks, _ in answers for found in marks.values()])
    row = dict(model=weights_id(args.model), kind=args.kind, held_out=args.held_out or args.kind == "minute",
               prompts=args.prompts, seconds=time.time() - start)
    names = detect.ATTRIBUTES
    if args.kind in ("minute", "story"):
        names, found = names + ALONG, found | along(args.kind, answers)
    if args.log:
        Log(args.log).write(**row, **{name: found.get(name, float("nan")) for name in names})
    print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in {**row, **found}.items()))


if __name__ == "__main__":
    main()
