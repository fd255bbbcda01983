"""Writer: every tensor's place and type is planned from the tables before any is read; then one pass reads, merges,
converts and writes, some rows at a time. The file gets its name only when it is complete.

Convolutions are folded to matrices, since ggml knows four dimensions: the VAE's with the input channel innermost.
"""

import hashlib
import math
import os
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tqdm import tqdm

from export.containers import Stored
from export.files import ExportError
from export.tables import CONV, EXACT, KEPT, MATRIX, WIDE, squeezed

ALIGNMENT = 64  # bytes; a cache line, so that rows of a mapped tensor load aligned
SLICE = 1 << 24  # elements converted at a time
F16_MAX = 65504  # also of q8_0's scales: the largest of a block over 127
TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
DIGEST_KEY, NO_DIGEST = "sora.tensors_sha256", "0" * 64

# ---------------------------------------------------------------- planning

@dataclass
class Planned:
    """A tensor of the weight file."""
    name: str
    shape: tuple        # as written: (n) or (rows, columns)
    torch_shape: tuple  # as the tables say
    folded: bool        # a convolution whose input channels become the innermost
    type: Type
    source: Stored
    changes: list = field(default_factory=list)

    def bytes(self):
        block, size = gguf.constants.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def slices(self):
        """The tensor's bytes, some rows at a time: read, merged with LoRAs in f32, folded, converted."""
        rows, step = self.torch_shape[0], max(1, SLICE // math.prod(self.torch_shape[1:]))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            values = self.source.matrix(rows, first, last)
            for change in self.changes:
                values = values + change(first, last)
            if not torch.isfinite(values).all():
                raise ExportError(f"{self.source.file.path}: {self.source.key} holds a number that is not finite"
                                  f"{', with its LoRAs' if self.changes else ''}")
            if self.folded and not self.source.folded:
                values = values.reshape(last - first, self.torch_shape[1], -1).transpose(1, 2)
            values = values.reshape(last - first, *self.shape[1:])
            yield self.kept(first, last) if self.is_kept() else self.convert(values)

    def is_kept(self):
        """Whether the source's blocks are written as they are, which quantising anew would not promise."""
        return self.type == Type.Q8_0 and self.source.dtype == "Q8_0" and not self.changes

    def kept(self, first, last):
        """The source's own bytes of some rows."""
        columns = math.prod(self.torch_shape[1:])
        return self.source.file.raw(self.source.key, first * columns, last * columns)

    def convert(self, values):
        """f32 (rows, columns) as an array of the stored type; q8_0 by the gguf package, which is ggml's bit for bit."""
        if self.type == Type.F32:
            return values.numpy()
        if self.type == Type.BF16:
            return values.bfloat16().view(torch.uint16).numpy()
        largest, limit = values.abs().max(), F16_MAX * (127 if self.type == Type.Q8_0 else 1)
        if largest > limit:
            raise ExportError(f"{self.source.file.path}: {self.source.key} holds {largest:g}, which "
                              f"{self.type.name.lower()} cannot: take --type bf16")
        return gguf.quants.quantize(values.numpy(), Type.Q8_0) if self.type == Type.Q8_0 else values.half().numpy()


def four_dimensions(shape):
    """How ggml, which knows no more than four, holds five: the two outer ones folded."""
    return (shape[0] * shape[1], *shape[2:]) if len(shape) == 5 else shape


def folded_shape(shape):
    """A vector stays one; a matrix or convolution becomes (rows, columns)."""
    return shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def stored_type(rule, source, columns, wanted):
    """The type of a tensor in the file: as --type wants it and its rule allows, without --type as it was stored."""
    if rule == EXACT or (rule in (KEPT, CONV) and source.dtype not in ("F16", "BF16")):
        return Type.F32
    fits = columns % gguf.constants.GGML_QUANT_SIZES[Type.Q8_0][0] == 0
    if wanted is None or (rule in (KEPT, CONV) and wanted != Type.F32):
        kept = {"F32": Type.F32, "F64": Type.F32, "F16": Type.F16}
        if rule == MATRIX and fits:
            kept["Q8_0"] = Type.Q8_0
        return kept.get(source.dtype, Type.BF16)
    if wanted == Type.Q8_0 and rule == WIDE:
        return Type.F16 if source.dtype == "F16" else Type.BF16
    return Type.F16 if wanted == Type.Q8_0 and not fits else wanted


def has_shape(source, shape, rule):
    """Whether a tensor of a checkpoint has the shape that its row says, but for how its layout folds it. A convolution
    of the VAE may not be a matrix there, which would not say what its columns are."""
    if source.folded:
        return source.shape == folded_shape(shape)
    folds = [squeezed(shape), squeezed(four_dimensions(shape))] + [folded_shape(shape)] * (rule != CONV)
    return squeezed(source.shape) in folds


def plan(part, wanted, loras=()):
    """Matches a part's tensors with its table: one that is missing, misshapen or left over is an error."""
    left, planned = dict(part.tensors), []
    for name, shape, rule in part.rows():
        source = left.pop(name, None)
        if source is None:
            raise ExportError(f"{part.path}: the {part.title}'s {name} is missing")
        if not has_shape(source, shape, rule):
            raise ExportError(f"{source.file.path}: {source.key} has shape {list(source.shape)}, "
                              f"expected {list(shape)}")
        folded = folded_shape(shape)
        planned.append(Planned(part.prefix + name, folded, shape, rule == CONV,
                               stored_type(rule, source, folded[-1], wanted), source,
                               [c for lora in loras for c in lora.changes.get(name, [])]))
    if left:
        tensor = next(iter(left.values()))
        raise ExportError(f"{tensor.file.path}: {tensor.key} {list(tensor.shape)} is no tensor of the {part.title}")
    return planned


# ---------------------------------------------------------------- writing

def add_key(writer, key, value):
    """One key, typed by its Python value; f32 for the keys that llama.cpp and the original release have as such."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        (writer.add_float32 if key.endswith(("eps", "epsilon")) else writer.add_float64)(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)  # bytes become u8[]; ints i32[], floats f32[], strings string[]


def check_output(path):
    """What will be replaced at the end must be nothing, or a file."""
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: not a regular file")
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent}: no such folder")
    return path


def spare_sources(path, sources):
    """What is converted must not be what is replaced."""
    if path.exists() and any(map(path.samefile, sources)):
        raise ExportError(f"{path}: is being converted, and would be overwritten")


def write(path, keys, planned):
    """Writes the file under a temporary name and renames it when complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write_header(temporary, keys, planned)
        digest = write_tensors(temporary, planned)
        fill_digest(temporary, digest)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_header(path, keys, planned):
    """Everything before the tensors' bytes, by the gguf package."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_custom_alignment(ALIGNMENT)
    for key, value in keys.items():
        add_key(writer, key, value)
    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes(), tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def write_tensors(path, planned):
    """Appends every tensor, aligned; returns the SHA-256 of their bytes."""
    digest = hashlib.sha256()
    with open(path, "ab") as f, tqdm(total=sum(t.bytes() for t in planned), desc="export", unit="B", unit_scale=True,
                                     disable=None) as bar:
        f.write(bytes(-f.tell() % ALIGNMENT))
        for tensor in planned:
            for data in tensor.slices():
                digest.update(data)
                f.write(data)
                bar.update(data.nbytes)
            f.write(bytes(-f.tell() % ALIGNMENT))
    return digest.hexdigest()


def fill_digest(path, digest):
    """Puts the tensors' digest, known only now, where the header keeps room for it."""
    with open(path, "r+b") as f:
        head = f.read(1 << 16)
        at = head.index(NO_DIGEST.encode(), head.index(DIGEST_KEY.encode()))
        f.seek(at)
        f.write(digest.encode())
