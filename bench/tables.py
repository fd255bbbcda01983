#!/usr/bin/env python3
"""Writes what was measured into the pages of docs/.

    python bench/tables.py build docs/bench.md docs/kernels.md

In a page, the lines between <!-- NAME --> and <!-- end --> become table NAME, from bench.tsv, growth.tsv, peers.tsv and
steps*.tsv of the folder.
"""

import csv
import re
import sys
from pathlib import Path
from statistics import median

from growth import full_clip
from roofline import read


def markdown(heading, rows):
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def rate(row):
    """Of one row of bench.c: operations a second, or bytes where there are none to count."""
    return f"{row['gflop/s']:.0f} GFLOP/s" if row["gflop"] else f"{row['gbyte/s']:.1f} GB/s"


def peaks(folder):
    rows = [row for row in read(folder / "bench.tsv") if row["kind"] == "peak"]
    threads = sorted({int(row["threads"]) for row in rows})
    names = dict.fromkeys(row["name"] for row in rows)
    rates = {(row["name"], int(row["threads"])): rate(row) for row in rows}
    return markdown(["from registers, or memory", *(f"{t} threads" if t > 1 else "1 thread" for t in threads)],
                    [[name, *(rates[name, t] for t in threads)] for name in names])


def kernels(folder):
    """A line for each kernel and size, a column for each precision."""
    cells = {}
    for row in read(folder / "bench.tsv"):
        if row["kind"] == "kernel":
            cells.setdefault((row["name"], int(row["size"])), {})[row["precision"]] = \
                f"{row['gflop/s']:.0f} ({100 * row['of_peak']:.0f} %)"
    return markdown(["kernel", "rows", "f32", "bf16", "int8"],
                    [[name, f"{size:,}", *(cell.get(p, "") for p in ("f32", "bf16", "int8"))]
                     for (name, size), cell in cells.items()])


def stages(folder):
    rows = [row for row in read(folder / "bench.tsv") if row["kind"] == "stage"]
    seconds = {(row["name"], row["precision"], int(row["threads"])): row for row in rows}
    most = max(threads for _, _, threads in seconds)
    lines = []
    for name, precision, threads in seconds:
        if threads == 1:
            one, all_ = seconds[name, precision, 1], seconds[name, precision, most]
            lines.append([name, int(one["size"]), precision, f"{one['seconds']:.3f} s", f"{all_['seconds']:.3f} s",
                          f"{one['seconds'] / all_['seconds']:.2f}", f"{100 * all_['of_peak']:.0f} %"])
    return markdown(["stage", "tokens or frames", "precision", "1 thread", f"{most} threads", "ratio", "of peak"],
                    lines)


def steps(folder):
    """Medians of all runs, steps*.tsv."""
    runs = [read(path) for path in sorted(folder.glob("steps*.tsv"))]
    lines = []
    for i, same in enumerate(zip(*runs, strict=True), 1):
        rate, fraction = (median(row[key] for row in same) for key in ("gflop/s", "of_peak"))
        lines.append([f"{i}. {same[0]['name']}", int(same[0]["threads"]), f"{rate:.1f}", f"{100 * fraction:.0f} %",
                      same[0]["instruction"]])
    return markdown(["step", "threads", "GFLOP/s", "of the peak", "of this instruction"], lines)


def peers(folder):
    with open(folder / "peers.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return markdown(["stage", "size", "sora", "peer", "sora, s", "peer, s", "ratio"],
                    [[r["stage"], r["size"], r["precision"],
                      f"{r['peer']} {r['peer_precision']}" + (f", {r['peer_size']}" * (r["peer_size"] != r["size"])),
                      r["seconds"], r["peer_seconds"], r["ratio"]] for r in rows])


def clip(folder):
    return full_clip(read(folder / "growth.tsv"))


TABLES = {"peaks": peaks, "kernels": kernels, "stages": stages, "steps": steps, "peers": peers, "clip": clip}


def main(folder, *pages):
    for page in map(Path, pages):
        text = page.read_text()
        for name, table in TABLES.items():
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            if re.search(pattern, text, re.S):
                content = table(Path(folder)) + "\n"
                text = re.sub(pattern, lambda found: found[1] + content + found[2], text, flags=re.S)
        page.write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
