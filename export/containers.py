"""Containers: readers of safetensors, torch's pickles (unpickled as data only) and GGUF. Each gives the name, shape and
type of every tensor, and reads its rows.

A reader holds no more of a file in memory than the rows that were asked for, so a 14B model needs little memory.

Pitfall: the pages that were read through a mapping count as the process's memory until the mapping ends. So a file is
mapped again after every REMAP bytes.
"""

import math
import pickle
import re
from dataclasses import dataclass
from typing import ClassVar

import gguf
import numpy as np
import torch
from safetensors import safe_open

from export.files import SUFFIXES, ExportError, first_bytes, reading

REMAP = 1 << 28  # bytes read from a mapped file before it is mapped again


@dataclass
class Stored:
    """A tensor of a source file, with its shape in torch's order. dtype: its type by the name of safetensors or ggml,
    such as F32, BF16, F8_E4M3, Q8_0."""
    key: str
    shape: tuple
    dtype: str
    file: "Safetensors | Pickle | Gguf"
    folded: ClassVar[bool] = False  # whether a convolution is a matrix already, as the writer makes it

    def rows(self, first=None, last=None):
        """Rows [first, last) of the first dimension, or all, as contiguous float32 (rows, ...). Raises ExportError for
        a damaged file."""
        with reading(self.file.path):
            return self.file.read(self.key, first, last).float().contiguous()

    def matrix(self, count, first, last):
        """Rows [first, last) as a matrix (rows, rest) float32. count: number of rows without torch's leading ones."""
        if self.shape[0] == count:
            return self.rows(first, last).reshape(last - first, -1)
        return self.rows().reshape(count, -1)[first:last]


class Folded(Stored):
    """A tensor of a weight file that export.py wrote."""
    folded = True


class Safetensors:
    """A .safetensors file, mapped again after every REMAP bytes."""
    own, keys, containers, note = False, {}, (), None

    def __init__(self, path):
        self.path, self.bytes_read, self.mapped = path, math.inf, None
        with safe_open(path, "pt") as f:
            self.metadata = f.metadata() or {}
            slices = {key: f.get_slice(key) for key in f.keys()}
            self.tensors = {k: Stored(k, tuple(s.get_shape()), s.get_dtype(), self) for k, s in slices.items()}

    def read(self, key, first, last):
        if self.bytes_read > REMAP:
            self.mapped, self.bytes_read = safe_open(self.path, "pt"), 0
        values = self.mapped.get_tensor(key) if first is None else self.mapped.get_slice(key)[first:last]
        self.bytes_read += values.nbytes
        return values


class Pickle:
    """A torch checkpoint (.pth, .pt, .bin, .ckpt), unpickled as data only, and mapped if its format allows that."""
    own, keys = False, {}
    CONTAINERS = ("generator_ema", "generator", "generator_lora", "ema", "model_state_dict", "state_dict", "model",
                  "module")  # the first that the file has is taken
    DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
              torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8"}

    def __init__(self, path, container=None):
        self.path, self.metadata, self.containers, self.remap, self.first = path, {}, [], REMAP, container
        self.open()
        other = [k for k, v in self.values.items() if not (isinstance(k, str) and torch.is_tensor(v))]
        if other:
            raise ExportError(f"{path}: {other[0]!r} is not a tensor, expected tensors with names only")
        self.tensors = {k: Stored(k, tuple(v.shape), self.dtype_of(v), self) for k, v in self.values.items()}

    def dtype_of(self, values):
        """The name of a tensor's type; for a tensor without plain numbers, a description."""
        if values.is_meta:
            return "a shape without values (of torch's meta device)"
        if values.layout != torch.strided:
            return f"a {str(values.layout).removeprefix('torch.')} tensor"
        return self.DTYPES.get(values.dtype, str(values.dtype))

    def open(self):
        """Loads the file (again) and finds the dictionary of tensors inside the containers of trainers."""
        values, self.containers, self.note = self.load(), [], None
        names = [self.first] * bool(self.first) + [c for c in self.CONTAINERS if c != self.first]
        while isinstance(values, dict) and (found := [c for c in names if isinstance(values.get(c), dict)]):
            values = values[found[0]]
            self.containers.append(found[0])
            if found[1:]:
                self.note = f"{self.path}: takes {found[0]}, not {' or '.join(found[1:])}"
        if not isinstance(values, dict):
            raise ExportError(f"{self.path}: holds a {type(values).__name__}, expected a dictionary of tensors")
        self.values, self.bytes_read = values, 0

    def load(self):
        """The unpickled object. Raises ExportError for objects other than data."""
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.remap != math.inf)
        except pickle.UnpicklingError as error:
            if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise ExportError(f"{self.path}: holds {found[1]}, whose loading could run code, expected tensors "
                                  "only: save them, for example as safetensors") from error
            raise
        except RuntimeError as error:
            if "mmap" in str(error):  # a format from before 2020: the whole file is in memory, once
                self.remap = math.inf
                return self.load()
            if "TorchScript" in str(error):
                raise ExportError(f"{self.path}: is a TorchScript program, expected tensors: save its "
                                  "state_dict()") from error
            raise

    def read(self, key, first, last):
        if self.bytes_read > self.remap:
            self.open()
        values = self.values[key].detach()
        values = values[first:last] if first is not None else values
        self.bytes_read += values.nbytes
        return values


class Gguf:
    """A GGUF file, by export.py or another program. It is read, not mapped. keys: {key: value} of its header."""
    containers, note = (), None
    SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF's key of the shape, if blocks continue across rows

    def __init__(self, path):
        self.path, self.metadata = path, {}
        reader = gguf.GGUFReader(path)  # has several arrays for each piece of the vocabulary, so it is not kept
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.own = "sora.format_version" in self.keys
        self.places = {t.name: (t.tensor_type, int(t.data_offset)) for t in reader.tensors}
        self.tensors = {t.name: (Folded if self.own else Stored)(t.name, self.shape_of(t), t.tensor_type.name, self)
                        for t in reader.tensors}

    def shape_of(self, tensor):
        shape = tuple(int(n) for n in reversed(tensor.shape))
        stated = tuple(self.keys.get(self.SHAPE + tensor.name, shape))
        if math.prod(stated) != math.prod(shape):
            raise ExportError(f"{self.path}: {self.SHAPE}{tensor.name} is {list(stated)}, expected as many "
                              f"elements as the tensor's {list(shape)}")
        return stated

    def raw(self, key, first, last):
        """The bytes of the blocks that hold elements [first, last) of a tensor, uint8."""
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


# (pattern of a file's first bytes, its reader)
MAGIC = [(rb"GGUF", Gguf), (rb"PK\x03\x04|\x80[\x02-\x05]", Pickle), (rb"[\s\S]{8}\{", Safetensors)]


def container_of(head):
    """The class that reads a file with these first bytes, or None."""
    return next((container for magic, container in MAGIC if re.match(magic, head)), None)


def open_file(path, opened=None, container=None):
    """The reader of one weight file. opened: {path: reader} of the open files, added to; container: the one to take
    from a pickle that has several. Raises ExportError for a file that is none of these formats."""
    opened = {} if opened is None else opened
    if path not in opened:
        with reading(path):
            reader = container_of(first_bytes(path))
            if reader is None:
                raise ExportError(f"{path}: unknown format by its first bytes, expected one of {', '.join(SUFFIXES)}")
            opened[path] = reader(path, container) if reader is Pickle else reader(path)
    return opened[path]
