#!/usr/bin/env python3
"""Draws the roofline of the machine and where each kernel stands below it (Williams et al., Roofline, 2009).

    python bench/roofline.py build/bench.tsv docs/roofline.svg

A kernel that does n operations for each byte of memory can be no faster than n times what memory delivers, nor than
what the processor multiplies. A kernel's bytes are the least there could be: every operand once.
"""

import csv
import sys

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

COLORS = {"f32": "tab:blue", "bf16": "tab:orange", "int8": "tab:green"}
MARKERS = {"linear": "o", "self": "s", "cross": "D", "convolution": "^"}


def read(path):
    """Rows of a file of bench.c, numbers as floats."""
    with open(path) as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    words = "kind", "name", "precision", "instruction"
    return [{key: value if key in words else float(value) for key, value in row.items()} for row in rows]


def draw_roofs(axes, peaks, intensity):
    threads = max(p["threads"] for p in peaks)
    peaks = [p for p in peaks if p["threads"] == threads]
    memory = next(p["gbyte/s"] for p in peaks if p["gflop"] == 0)
    for peak in peaks:
        if peak["gflop"]:
            axes.plot(intensity, np.minimum(peak["gflop/s"], memory * intensity), color=COLORS[peak["precision"]],
                      lw=1)
            axes.text(intensity[-1], peak["gflop/s"], f"{peak['name']}  {peak['gflop/s']:.0f} ", ha="right",
                      va="bottom", fontsize=8)
    axes.text(intensity[0] * 1.1, memory * intensity[0] * 1.5, f"memory, {memory:.0f} GB/s", fontsize=8)


def main(source, target):
    rows = read(source)
    kernels = [row for row in rows if row["kind"] == "kernel"]
    figure, axes = plt.subplots(figsize=(9, 5.5))
    draw_roofs(axes, [row for row in rows if row["kind"] == "peak"], np.logspace(0.5, 4, 200))
    for row in kernels:
        axes.plot(row["gflop"] / row["gbyte"], row["gflop/s"], MARKERS[row["name"].split()[0]], ms=6, alpha=0.8,
                  color=COLORS[row["precision"]])
    handles = [plt.Line2D([], [], marker=marker, ls="", color="gray", label=name) for name, marker in MARKERS.items()]
    handles += [plt.Line2D([], [], color=color, label=name) for name, color in COLORS.items()]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte of memory",
             ylabel="billions of operations a second")
    axes.grid(True, which="both", lw=0.3)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
