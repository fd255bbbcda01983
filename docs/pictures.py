#!/usr/bin/env python3
"""Turns Y4M clips into pictures: a strip of frames (PNG), an animation (WebP), and the README's grid of prompts.

    python docs/pictures.py strip demo.y4m strip.png         # every fourth frame, side by side
    python docs/pictures.py animate demo.y4m demo.webp       # twice as large as the clip, at its own rate
    python docs/pictures.py grid                             # runs ./sora on PROMPTS, into docs/demo/ and the README
    python docs/pictures.py minute                           # runs make demo-minute, into docs/demo/
    python docs/pictures.py curves build/train               # a training run's logs, into docs/training/train/ as they
                                                             # are and as a plot
    python docs/pictures.py table                            # docs/adherence/ as the table in docs/bundled-model.md
Needs what train/requirements.txt names.
"""
import argparse
import csv
import html
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

import video  # noqa: E402
import world  # noqa: E402

GRID, TRAINING, ADHERENCE = ROOT / "docs" / "demo", ROOT / "docs" / "training", ROOT / "docs" / "adherence"
COLUMNS, SEED, ENLARGED = 4, 1, 2
# The stages of a run that leave a log, and what of it is drawn: {column: its label}.
QUALITY = {"psnr": "PSNR, dB"}
CURVES = {"reading": {"shape": "shape", "motion": "motion", "role": "first or second"}, "vae": QUALITY,
          "encoder": QUALITY, "autoencoder": QUALITY,
          "transformer": {"picture0": "pictures", "beginning0": "beginnings", "whole0": "whole clips",
                          "start0": "first chunks", "start2": "third chunks", "anywhere4": "chunks of long clips"}}
# Each with the shape, colour and motion or relation of its subjects: did training ever draw these together?
PROMPTS = [
    ("a blue star bounces on the grass", [("star", "blue", "bounce")]),
    ("a pink heart grows at sunset", [("heart", "pink", "grow")]),
    ("a small yellow circle goes up under water", [("circle", "yellow", "up")]),
    ("the green character walks to the left in the snow", [("character", "green", "walk left")]),
    ("a red cross spins at night", [("cross", "red", "spin")]),
    ("one tiny yellow triangle flies up", [("triangle", "yellow", "up")]),
    ("a purple creature runs through the dunes", [("character", "purple", "run right")]),
    ("at dusk, a green heart moves in a circle", [("heart", "green", "loop")]),
    ("a red ball orbits a blue box at night", [("circle", "red", "orbit"), ("square", "blue", "orbit")]),
    ("a green star chases a pink heart on the grass", [("star", "green", "chase"), ("heart", "pink", "chase")]),
    ("a yellow circle and a purple square collide", [("circle", "yellow", "collide"), ("square", "purple", "collide")]),
    ("an orange character spins and a blue star jumps under water",
     [("character", "orange", "spin"), ("star", "blue", "jump")]),
]


def animate(source, target):
    """A clip as an animation that repeats."""
    frames, rate = video.read(source)
    size = (ENLARGED * frames.shape[2], ENLARGED * frames.shape[1])
    images = [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in frames]
    images[0].save(target, save_all=True, append_images=images[1:], duration=round(1000 / rate), loop=0, quality=80)


def insert(page, name, lines):
    """Puts lines between the two comments of that name in a page."""
    text = "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])
    page.write_text(re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _: text, page.read_text(), flags=re.S))


def grid():
    """Runs every prompt and writes its animation, and the README's table of them."""
    GRID.mkdir(exist_ok=True)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (prompt, combinations) in enumerate(PROMPTS):
            clip, picture = pathlib.Path(folder) / "clip.y4m", GRID / f"{i:02}.webp"
            command = [ROOT / "sora", "-q", "--no-record", "--seed", str(SEED), "-o", clip, prompt]
            subprocess.run(command, check=True)
            animate(clip, picture)
            mark = "&nbsp;*" if any(world.is_held_out(*c) for c in combinations) else ""
            image = f'<img src="{picture.relative_to(ROOT)}" alt="{html.escape(prompt)}">'
            cells.append(f'<td width="25%">{image}<br>{html.escape(prompt)}{mark}</td>')
    rows = [f"<tr>{''.join(cells[i:i + COLUMNS])}</tr>" for i in range(0, len(cells), COLUMNS)]
    insert(ROOT / "README.md", "grid", ["<table>", *rows, "</table>"])


def minute():
    """The minute of `make demo-minute`: a frame a second, ten in a row."""
    subprocess.run(["make", "-C", ROOT, "demo-minute"], check=True)
    frames = video.read(ROOT / "minute.y4m")[0]
    video.save_strips(GRID / "minute.webp", frames[:960].reshape(6, 160, *frames.shape[1:])[:, 8:], every=16)


# The rows of the table: what was asked, and of which kind (train/adherence.py) and from which file it is.
ASKED = [("one subject", "single", "False", "shares"),
         ("*one subject: drawn, through the VAE*", "single", "False", "ceiling"),
         ("one subject, a combination never trained", "single", "True", "shares"),
         ("two subjects", "pair", "False", "shares"),
         ("*two subjects: drawn, through the VAE*", "pair", "False", "ceiling"),
         ("two, related", "relation", "False", "shares"),
         ("*two, related: drawn, through the VAE*", "relation", "False", "ceiling")]
ATTRIBUTES = {"all": "all right", "background": "place", "shape": "shape", "colour": "colour", "size": "size",
              "motion": "motion", "roles": "roles", "count": "count"}


def table():
    """The table in docs/bundled-model.md of how often the model does as it is told."""
    found = {}
    for name in ("shares", "ceiling"):
        with open(ADHERENCE / f"{name}.tsv") as file:
            found |= {(row["kind"], row["held_out"], name): row for row in csv.DictReader(file, delimiter="\t")}
    if len({(row["model"], row["prompts"]) for row in found.values()}) > 1:
        sys.exit(f"pictures.py: {ADHERENCE} holds shares of more than one model or number of prompts")
    rows = [f"| {found[ASKED[0][1:]]['prompts']} prompts each | {' | '.join(ATTRIBUTES.values())} |",
            "|---" * (1 + len(ATTRIBUTES)) + "|"]
    for label, *key in ASKED:
        shares = [float(found[tuple(key)][attribute]) for attribute in ATTRIBUTES]
        rows.append(f"| {label} | {' | '.join('' if math.isnan(x) else f'{100 * x:.3g} %' for x in shares)} |")
    insert(ROOT / "docs" / "bundled-model.md", "adherence", rows)


def read_log(path):
    """{column: numbers} of a stage's log; of steps that a resumed run made again, the last row."""
    with open(path) as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file, delimiter="\t")}
    rows = [rows[step] for step in sorted(rows)]
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name != "utc"}


def curves(run):
    """Copies a run's logs into a folder of docs/training/, and draws there what each stage learned, over its steps."""
    folder = TRAINING / run.absolute().name
    stages = [stage for stage in CURVES if (run / "log" / f"{stage}.tsv").exists()]
    if not stages:
        sys.exit(f"pictures.py: {run}/log holds no logs")
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        shutil.copy(run / "log" / f"{stage}.tsv", folder)
    figure = Figure(figsize=(3 * len(stages), 3.2), layout="constrained")
    for ax, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        log = read_log(folder / f"{stage}.tsv")
        for name, label in CURVES[stage].items():
            if not all(math.isnan(value) for value in log[name]):
                ax.plot(log["step"], log[name], label=label, lw=1)
        ax.set(title=f"{stage}: {log['seconds'][-1] / 60:.0f} minutes", xlabel="step")
        ax.legend()
        ax.grid(True, lw=0.3)
        if stage == "transformer":
            ax.set_ylim(0.03, 0.3)  # the first steps would flatten the rest
    with matplotlib.rc_context({"svg.hashsalt": "sora.c"}):  # the same curves make the same file
        figure.savefig(folder / "curves.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("strip", "animate"):
        command = commands.add_parser(name)
        command.add_argument("source", type=pathlib.Path)
        command.add_argument("target", type=pathlib.Path)
    commands.add_parser("grid")
    commands.add_parser("minute")
    commands.add_parser("table")
    commands.add_parser("curves").add_argument("run", type=pathlib.Path)
    args = parser.parse_args()
    if args.command == "grid":
        grid()
    elif args.command == "minute":
        minute()
    elif args.command == "table":
        table()
    elif args.command == "curves":
        curves(args.run)
    elif args.command == "strip":
        video.save_strips(args.target, [video.read(args.source)[0]])
    else:
        animate(args.source, args.target)


if __name__ == "__main__":
    main()
