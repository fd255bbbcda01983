"""Files: from a path to the files that hold a part's weights.

A checkpoint's folder may hold shards with an index, variants, and leftovers of systems and downloads. Where more than
one set of weights is possible, the folder is refused. The first bytes of a file decide what it is, not its name.
"""

import gzip
import json
import re
from contextlib import contextmanager


class ExportError(Exception):
    """An error in the input. Its text is one line for the user: the option or file, what was found, what was
    expected."""


def is_out_of_memory(error):
    """Whether an exception means that memory ran out. torch raises a RuntimeError for that."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


INCOMPLETE = ("file not fully covered", "central directory", "cannot reshape array", "unexpected EOF", "end-of-stream")


@contextmanager
def reading(path):
    """Turns every exception of a library on a file's contents into an ExportError that names the file."""
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
            detail = f"the file is incomplete or damaged, copy or download it again ({detail})"
        raise ExportError(f"{path}: cannot be read: {detail[:200]}") from error


# ---------------------------------------------------------------- one file

# (pattern of the first bytes, what the file is): results of downloads that went wrong.
STAND_INS = [
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it"),
    (rb"\s*<(!doctype html|html|\?xml)", "is a web page, not the file itself: download it again, logged in where its "
                                         "terms must be accepted first"),
    (rb"$", "is empty"),
]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf")  # of weights; a folder's first match is taken


def first_bytes(path):
    """The first 512 bytes of a file. Raises ExportError for an empty file, a web page, or a Git LFS pointer."""
    with open(path, "rb") as f:
        head = f.read(512)
    for pattern, what in STAND_INS:
        if re.match(pattern, head, re.IGNORECASE):
            raise ExportError(f"{path}: {what}")
    return head


def read_json(path):
    """The JSON object in a file, which may be gzipped. Raises ExportError for anything else."""
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
    """The weight files of a path, in order: the file itself, the shards of an index, or the only set of weights in a
    folder. pattern: of their names. Raises ExportError if there is none, or more than one set."""
    if path.is_file():
        return indexed_files(path) if INDEX.search(path.name) else [path]
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder")
    found = sorted(f for f in path.glob(pattern) if f.is_file() and not f.name.startswith("."))
    for suffix in SUFFIXES:
        choices = weight_sets(found, suffix)
        if len(choices) > 1:
            first, second = list(choices)[:2]
            raise ExportError(f"{path}: several sets of weights ({first}, {second}), expected one: give its file's "
                              "path")
        for files in choices.values():
            return files
    raise ExportError(f"{path}: no weight file in this folder, expected one of {', '.join(SUFFIXES)}")


def weight_sets(found, suffix):
    """{name: files} of every set of weights with this suffix: an index with its shards, shards without an index, or a
    single file. found: the files of a folder."""
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
    """Raises ExportError unless all shards are there. Their names state how many there are."""
    shards = [m for m in (SHARD.match(f.name) for f in files) if m]
    count = int(shards[0][3]) if shards else 0
    if missing := set(range(1, count + 1)) - {int(m[2]) for m in shards}:
        raise ExportError(f"{files[0].parent}: {name}: shard {min(missing)} of {count} is missing")


def indexed_files(index):
    """The shards that an index names. Raises ExportError unless they lie beside it."""
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if not isinstance(name, str) or "/" in name or "\\" in name:
            raise ExportError(f"{index}: names {name!r}, expected a file beside it")
        if not (index.parent / name).is_file():
            raise ExportError(f"{index.parent / name}: named by {index.name}, but missing")
    return [index.parent / name for name in names]
