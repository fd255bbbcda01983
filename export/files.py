"""Files: what a path holds is decided by its first bytes, and weights are opened without being read.

A checkpoint's folder may hold shards with an index, variants, and what a computer or a download left beside them. What
is not certain is refused: a file is taken where it is the only one.
"""

import gzip
import json
import re
from contextlib import contextmanager


class ExportError(Exception):
    """What is wrong with the input, as one line for the user."""


def is_out_of_memory(error):
    """Whether an exception says so; torch raises no kind of its own."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


INCOMPLETE = ("file not fully covered", "central directory", "cannot reshape array", "unexpected EOF", "end-of-stream")


@contextmanager
def reading(path):
    """Whatever a library, or our own code, dislikes about a file's contents becomes one line that names it."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # each library raises its own kinds on a corrupt file
        if is_out_of_memory(error):
            raise MemoryError from error
        if getattr(error, "filename", None):  # an OSError that names the file itself
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(error.errno, "No such file or directory", str(path)) from error
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        if any(phrase in detail for phrase in INCOMPLETE):
            detail = f"it is not complete or damaged, copy or download it again ({detail})"
        raise ExportError(f"{path}: cannot be read: {detail[:200]}") from error


# ---------------------------------------------------------------- one file

# The first bytes of what stands in a file's place when a download went wrong.
STAND_INS = [
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it"),
    (rb"\s*<(!doctype html|html|\?xml)", "is a web page, not the file itself: download it again, logged in where its "
                                         "terms must be accepted first"),
    (rb"$", "is empty"),
]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # of weights; in a folder the first one counts


def first_bytes(path):
    """How a file begins; an error where that is not the file that was meant."""
    with open(path, "rb") as f:
        head = f.read(512)
    for pattern, what in STAND_INS:
        if re.match(pattern, head, re.IGNORECASE):
            raise ExportError(f"{path}: {what}")
    return head


def read_json(path):
    """A JSON object, possibly gzipped."""
    with reading(path):
        opener = gzip.open if first_bytes(path).startswith(b"\x1f\x8b") else open
        with opener(path, "rt", encoding="utf-8-sig") as f:
            value = json.load(f)
    if not isinstance(value, dict):
        raise ExportError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


# ---------------------------------------------------------------- the files of a folder

INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # model.safetensors.index.json, with a variant before the last dot
SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)$")


def weight_files(path, pattern="*"):
    """The weight files behind a path: itself, the shards of an index, or in a folder the only ones."""
    if path.is_file():
        return indexed_files(path) if INDEX.search(path.name) else [path]
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder")
    found = sorted(f for f in path.glob(pattern) if f.is_file() and not f.name.startswith("."))
    for suffix in SUFFIXES:
        choices = weight_sets(found, suffix)
        if len(choices) > 1:
            first, second = list(choices)[:2]
            raise ExportError(f"{path}: several sets of weights ({first}, {second}): name one")
        for files in choices.values():
            return files
    raise ExportError(f"{path}: no weight file in this folder")


def weight_sets(found, suffix):
    """{name: files} of each set of weights of one kind: an index and its shards, shards without one, a file alone."""
    sets, taken = {}, set()
    for index in (f for f in found if INDEX.search(f.name) and suffix + ".index" in f.name):
        sets[index.name] = indexed_files(index)
        taken.update(sets[index.name])
    for file in (f for f in found if f.suffix == suffix and f not in taken):
        shard = SHARD.match(file.name)
        sets.setdefault(f"{shard[1]}-*{shard[4]}" if shard else file.name, []).append(file)
    for name, files in sets.items():
        check_shards(name, files)
    return sets


def check_shards(name, files):
    """Shards count themselves: all of them must be there."""
    shards = [m for m in (SHARD.match(f.name) for f in files) if m]
    count = int(shards[0][3]) if shards else 0
    if missing := set(range(1, count + 1)) - {int(m[2]) for m in shards}:
        raise ExportError(f"{files[0].parent}: {name}: shard {min(missing)} of {count} is not there")


def indexed_files(index):
    """The shards that an index names, which lie beside it."""
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise ExportError(f"{index}: names {name!r}, expected a file beside it")
        if not (index.parent / name).is_file():
            raise ExportError(f"{index.parent / name}: named by {index.name}, but not there")
    return [index.parent / name for name in names]
