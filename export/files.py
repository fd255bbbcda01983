"""Files of weights, opened without being read: each tensor's name, shape and type, and a way to its rows.

Three containers are in use: safetensors, torch's pickles (unpickled as data only) and GGUF. A reader maps or seeks
and never holds more of a file than the rows that were asked for, so a 14B model passes through little memory.

Pitfall: pages of a mapping that lives on count as the process's memory until it is given up, so mappings are short.
"""

import gzip
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from safetensors import safe_open

REMAP = 1 << 30  # bytes read from a mapped pickle before it is mapped anew


class ExportError(Exception):
    """What is wrong with the input, as one line for the user."""


def is_out_of_memory(error):
    """Whether an exception says so; torch raises no kind of its own."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


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
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{path}: cannot be read: {detail[:200]}") from error


@dataclass
class Stored:
    """A tensor of a source file. dtype is safetensors' or ggml's name of it, e.g. F32, BF16, F8_E4M3, Q8_0."""
    key: str
    shape: tuple
    dtype: str
    file: "Safetensors | Pickle | Gguf"
    scale: "Stored | None" = None
    folded: bool = False  # a matrix already, as the writer folds convolutions

    def rows(self, first=None, last=None):
        """Rows [first, last) of the first dimension (or everything) as float32, fp8 multiplied by its scale."""
        with reading(self.file.path):
            values = self.file.read(self.key, first, last).float()
        if self.scale is None:
            return values
        scale = self.scale.rows().flatten()  # one value, or one a row
        return values * (scale if len(scale) == 1 else scale[first:last].view(-1, *[1] * (values.dim() - 1)))

    def matrix(self, count, first, last):
        """Rows [first, last) of the `count` that are left without the ones that torch pads with, as (rows, rest)."""
        if self.shape[0] == count:
            return self.rows(first, last).reshape(last - first, -1)
        return self.rows().reshape(count, -1)[first:last]


class Safetensors:
    """A .safetensors file. It is opened for each read, so that no more than a slice of it stays mapped."""
    own = False

    def __init__(self, path):
        self.path = path
        with safe_open(path, "pt") as f:
            self.metadata = f.metadata() or {}
            slices = {key: f.get_slice(key) for key in f.keys()}
            self.tensors = {k: Stored(k, tuple(s.get_shape()), s.get_dtype(), self) for k, s in slices.items()}

    def read(self, key, first, last):
        with safe_open(self.path, "pt") as f:
            return f.get_tensor(key) if first is None else f.get_slice(key)[first:last]


class Pickle:
    """A torch checkpoint (.pth, .pt, .bin, .ckpt), unpickled as data only and mapped where its format allows it."""

    own = False
    CONTAINERS = ("generator_ema", "generator", "model", "module", "state_dict")  # the first one found counts
    DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
              torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float64: "F64"}

    def __init__(self, path):
        self.path, self.metadata, self.containers, self.remap = path, {}, [], REMAP
        self.open()
        if "generator_ema" in self.containers or "generator" in self.containers:
            print(f"{path}: weights of a distilled generator, which are only as good as the steps, shift and guidance "
                  "that it was trained for; causal ones run as if they were not", file=sys.stderr)
        other = [k for k, v in self.values.items() if not (isinstance(k, str) and torch.is_tensor(v))]
        if other:
            raise ExportError(f"{path}: {other[0]!r} is not a tensor")
        self.tensors = {k: Stored(k, tuple(v.shape), self.DTYPES.get(v.dtype, str(v.dtype)), self)
                        for k, v in self.values.items()}

    def open(self):
        """Maps the file anew and goes down to the dictionary of tensors, whatever trainers wrapped it in."""
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            values = torch.load(self.path, map_location="cpu", weights_only=True)
            self.remap = math.inf  # a format of before 2020: it is in memory as a whole, once
        self.containers = []
        while isinstance(values, dict) and (found := [c for c in self.CONTAINERS if isinstance(values.get(c), dict)]):
            values = values[found[0]]
            self.containers.append(found[0])
        if not isinstance(values, dict):
            raise ExportError(f"{self.path}: holds a {type(values).__name__}, expected a dictionary of tensors")
        self.values, self.bytes_read = values, 0

    def read(self, key, first, last):
        if self.bytes_read > self.remap:
            self.open()
        values = self.values[key][first:last] if first is not None else self.values[key]
        self.bytes_read += values.nbytes
        return values


class Gguf:
    """A GGUF file, export.py's own or another's: read from the disk, not mapped. keys: what its header states."""

    def __init__(self, path):
        self.path, self.metadata = path, {}
        reader = gguf.GGUFReader(path)  # makes several arrays for each piece of a vocabulary, so it is not kept
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.own = "sora.format_version" in self.keys
        self.places = {t.name: (t.tensor_type, int(t.data_offset)) for t in reader.tensors}
        self.tensors = {t.name: Stored(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, self,
                                       folded=self.own) for t in reader.tensors}

    def raw(self, key, first, last):
        """The bytes of the blocks that hold the values [first, last) of a tensor."""
        kind, offset = self.places[key]
        block, size = gguf.constants.GGML_QUANT_SIZES[kind]
        count = (-(-last // block) - first // block) * size
        return np.fromfile(self.path, np.uint8, count, offset=offset + first // block * size)

    def read(self, key, first, last):
        (kind, _), (count, *rest) = self.places[key], self.tensors[key].shape
        first, last = first or 0, count if last is None else min(last, count)
        start, end = first * math.prod(rest), last * math.prod(rest)
        values = gguf.quants.dequantize(self.raw(key, start, end), kind)
        begin = start % gguf.constants.GGML_QUANT_SIZES[kind][0]
        return torch.from_numpy(values[begin:begin + end - start].reshape(last - first, *rest))


READERS = {".safetensors": Safetensors, ".pth": Pickle, ".pt": Pickle, ".bin": Pickle, ".ckpt": Pickle, ".gguf": Gguf}


def open_file(path, opened=None):
    """The reader of one weight file, by its suffix. opened: {path: reader} of those that are open."""
    opened = {} if opened is None else opened
    if path not in opened:
        if path.suffix not in READERS:
            raise ExportError(f"{path}: unknown kind of file, expected one of {' '.join(READERS)}")
        with reading(path):
            opened[path] = READERS[path.suffix](path)
    return opened[path]


def read_json(path):
    """A JSON object, possibly gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with reading(path), opener(path, "rt", encoding="utf-8") as f:
        value = json.load(f)
    if not isinstance(value, dict):
        raise ExportError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def weight_files(path, pattern="*"):
    """The weight files behind a path: itself, or in a folder the shards of its index, or its only weight file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder")
    indices = sorted(path.glob(pattern + ".safetensors.index.json"))
    if indices:
        with reading(indices[0]):
            names = sorted(set(read_json(indices[0])["weight_map"].values()))
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise ExportError(f"{path / missing[0]}: named by {indices[0].name}, but not there")
        return [path / n for n in names]
    for suffix in READERS:
        found = sorted(path.glob(pattern + suffix))
        if len(found) == 1 or (found and all("-of-" in f.name for f in found)):
            return found
        if found:
            raise ExportError(f"{path}: several weight files ({found[0].name}, {found[1].name}): name one")
    raise ExportError(f"{path}: no weight file in this folder")
