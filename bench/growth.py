#!/usr/bin/env python3
"""How cost grows with tokens, frames and threads, and what a full clip takes.

    build/release/bench/bench build/growth.tsv growth
    python bench/growth.py build/growth.tsv docs/growth.svg

Measured are one block of the transformer and none, and the decoder on frames of 128x128. A forward pass is the ends and
30 times the difference; a frame costs in proportion to its pixels. What is extrapolated so is called so.
"""

import sys

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

from roofline import COLORS, read  # noqa: E402

BLOCKS = 30
FULL = {"width": 832, "height": 480, "frames": 81, "tokens": 21 * 30 * 52}
SIDE = 128  # of the decoder's measured frames


def forwards(rows, precision):
    """{tokens: seconds of 30 blocks and the ends}, on all threads."""
    threads = max(row["threads"] for row in rows)
    seconds = {(row["name"], row["size"]): row["seconds"] for row in rows
               if row["precision"] == precision and row["threads"] == threads}
    return {int(size): ends + BLOCKS * (seconds["transformer, 1 block", size] - ends)
            for (name, size), ends in seconds.items() if name == "transformer, no block"}


def decodings(rows, precision):
    """{frames: seconds} of the decoder, on all threads."""
    return {int(row["size"]): row["seconds"] for row in rows
            if row["name"] == "VAE decode" and row["precision"] == precision}


def speedups(rows, precision):
    """{threads: speed over one thread} of one block."""
    tokens = {row["size"] for row in rows if row["name"] == "transformer, 1 block" and row["threads"] == 1}
    seconds = {int(row["threads"]): row["seconds"] for row in rows
               if row["name"] == "transformer, 1 block" and row["precision"] == precision and row["size"] in tokens}
    return {threads: seconds[1] / value for threads, value in sorted(seconds.items())}


def draw(rows, target):
    figure, (tokens, frames, threads) = plt.subplots(1, 3, figsize=(13, 4))
    for precision, color in COLORS.items():
        for axes, curve in ((tokens, forwards), (frames, decodings), (threads, speedups)):
            points = curve(rows, precision)
            if points:
                axes.plot(list(points), list(points.values()), "o-", color=color, label=precision)
    tokens.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds",
               title="one forward pass, 30 blocks\n(scaled from one)")
    frames.set(xlabel=f"frames of {SIDE}x{SIDE}", ylabel="seconds", ylim=0, title="decoding")
    threads.set(xlabel="threads", ylabel="speed over one thread", title="one block, 1,280 tokens")
    threads.set_xticks(sorted({int(row["threads"]) for row in rows}))
    for axes in (tokens, frames, threads):
        axes.legend()
        axes.grid(True, lw=0.3)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


def duration(seconds):
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def full_clip(rows):
    """A Markdown table: 81 frames of 832x480, extrapolated from what was measured."""
    lines = ["| precision | one forward pass | 50 steps with guidance | 4 steps without | decoding |",
             "|---|---|---|---|---|"]
    area = FULL["width"] * FULL["height"] / SIDE**2
    for precision in COLORS:
        forward = forwards(rows, precision)[FULL["tokens"]]
        decoded = decodings(rows, precision) or decodings(rows, "bf16")
        most = max(decoded)
        times = (forward, 100 * forward, 4 * forward, decoded[most] / most * FULL["frames"] * area)
        lines.append(f"| {precision} | " + " | ".join(map(duration, times)) + " |")
    return "\n".join(lines)


def main(source, target):
    rows = read(source)
    draw(rows, target)
    print(full_clip(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
