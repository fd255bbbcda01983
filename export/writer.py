"""Writer: plans the type of every tensor from the tables, then reads, merges, converts and writes them in one pass,
some rows at a time. The file gets its name only when it is complete.

ggml has at most four dimensions, so convolutions become matrices (rows, columns). The VAE's have the input channel
innermost.
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

ALIGNMENT = 64  # bytes: a cache line, so that a mapped tensor's rows are aligned
SLICE = 1 << 24  # elements converted at a time
F16_MAX = 65504  # largest f16; a block's largest value over LARGEST must not exceed it
LARGEST = {Type.Q8_0: 127, Type.Q4_0: 8, Type.Q5_0: 16}
QUANTISED = {n: Type[n.upper()] for n in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")}  # the gguf package makes these
TYPES = {"keep": None, "f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, **QUANTISED}
BLOCKS = [*QUANTISED.values(), Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]  # and sora reads all these
DIGEST_KEY, NO_DIGEST = "sora.tensors_sha256", "0" * 64

# ---------------------------------------------------------------- planning

@dataclass
class Planned:
    """A tensor to write into the weight file."""
    name: str
    shape: tuple        # as written: (n) or (rows, columns)
    torch_shape: tuple  # in the tables
    folded: bool        # a VAE convolution, whose input channels become the innermost
    type: Type
    source: Stored
    changes: list = field(default_factory=list)

    def bytes(self):
        block, size = gguf.constants.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def slices(self):
        """Yields the tensor's bytes as arrays of some rows: read, merged with LoRAs in f32, folded, converted. Raises
        ExportError for NaN and infinity."""
        rows, step = self.torch_shape[0], max(1, SLICE // math.prod(self.torch_shape[1:]))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            values = self.source.matrix(rows, first, last)
            for change in self.changes:
                values = values + change(first, last)
            if not torch.isfinite(values).all():
                raise ExportError(f"{self.source.file.path}: {self.source.key} holds NaN or infinity"
                                  f"{' after merging its LoRAs' if self.changes else ''}, expected finite numbers")
            if self.folded and not self.source.folded:
                values = values.reshape(last - first, self.torch_shape[1], -1).transpose(1, 2)
            values = values.reshape(last - first, *self.shape[1:])
            yield self.kept(first, last) if self.is_kept() else self.convert(values)

    def is_kept(self):
        """Whether the source's blocks are copied. Quantising again could change them."""
        return self.type in BLOCKS and self.source.dtype == self.type.name and not self.changes

    def kept(self, first, last):
        """The source's bytes of rows [first, last), uint8."""
        columns = math.prod(self.torch_shape[1:])
        return self.source.file.raw(self.source.key, first * columns, last * columns)

    def convert(self, values):
        """Converts f32 (rows, columns) to an array of the stored type; blocks by the gguf package. Raises ExportError
        for numbers above the type's range."""
        if self.type == Type.F32:
            return values.numpy()
        if self.type == Type.BF16:
            return values.bfloat16().view(torch.uint16).numpy()
        largest, limit = values.abs().max(), F16_MAX * LARGEST.get(self.type, 1)
        if largest > limit:
            raise ExportError(f"{self.source.file.path}: {self.source.key} holds {largest:g}, expected at most "
                              f"{limit:g} for {self.type.name.lower()}: use --type bf16")
        return values.half().numpy() if self.type == Type.F16 else gguf.quants.quantize(values.numpy(), self.type)


def four_dimensions(shape):
    """A shape of five dimensions as GGUF files by others have it: the two outer ones folded."""
    return (shape[0] * shape[1], *shape[2:]) if len(shape) == 5 else shape


def folded_shape(shape):
    """The shape in the file: (n) for a vector, (rows, columns) for a matrix or convolution."""
    return shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def stored_type(rule, source, columns, wanted, changed):
    """The type of a tensor in the file: that of --type if its rule allows it; with keep the source's. wanted: the type
    of --type, None for keep; columns: of the tensor as a matrix; changed: whether LoRAs are merged into it."""
    if rule == EXACT or (rule in (KEPT, CONV) and source.dtype not in ("F16", "BF16")):
        return Type.F32

    def fits(kind):
        return columns % gguf.constants.GGML_QUANT_SIZES[kind][0] == 0

    if wanted is None or (rule in (KEPT, CONV) and wanted != Type.F32):
        kept = {"F32": Type.F32, "F64": Type.F32, "F16": Type.F16}
        if rule == MATRIX:
            kept |= {kind.name: kind for kind in (QUANTISED.values() if changed else BLOCKS) if fits(kind)}
        return kept.get(source.dtype, Type.BF16)
    if wanted in BLOCKS and rule == WIDE:
        return Type.F16 if source.dtype == "F16" else Type.BF16
    return wanted if fits(wanted) else Type.F16


def has_shape(source, shape, rule):
    """Whether a tensor of a checkpoint has the shape of its row, or one of the foldings of its layout. A convolution of
    the VAE must not be a matrix, since the order of its columns would be unknown."""
    if source.folded:
        return source.shape == folded_shape(shape)
    folds = [squeezed(shape), squeezed(four_dimensions(shape))] + [folded_shape(shape)] * (rule != CONV)
    return squeezed(source.shape) in folds


def plan(part, wanted, loras=()):
    """[Planned] for every tensor of a part. wanted: the type of --type, or None. Raises ExportError for a tensor that
    is missing, has the wrong shape, or is not in the tables."""
    left, planned = dict(part.tensors), []
    for name, shape, rule in part.rows():
        source = left.pop(name, None)
        if source is None:
            raise ExportError(f"{part.path}: the {part.title}'s {name} is missing")
        if not has_shape(source, shape, rule):
            raise ExportError(f"{source.file.path}: {source.key} has shape {list(source.shape)}, "
                              f"expected {list(shape)}")
        folded, changes = folded_shape(shape), [c for lora in loras for c in lora.changes.get(name, [])]
        planned.append(Planned(part.prefix + name, folded, shape, rule == CONV,
                               stored_type(rule, source, folded[-1], wanted, bool(changes)), source, changes))
    if left:
        tensor = next(iter(left.values()))
        raise ExportError(f"{tensor.file.path}: {tensor.key} {list(tensor.shape)} is no tensor of the {part.title}")
    return planned


# ---------------------------------------------------------------- writing

def add_key(writer, key, value):
    """Adds one key, with the type of its Python value; f32 for the keys that llama.cpp has in f32."""
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
    """The path of the output. Raises ExportError unless it is a regular file or does not exist."""
    if path.exists() and not path.is_file():
        raise ExportError(f"--output {path}: expected a regular file or a new name")
    if not path.parent.is_dir():
        raise ExportError(f"--output {path}: no such folder as {path.parent}")
    return path


def spare_sources(path, sources):
    """Raises ExportError if the output is one of the input files."""
    if path.exists() and any(map(path.samefile, sources)):
        raise ExportError(f"--output {path}: is an input file and would be overwritten, expected another name")


def write(path, keys, planned):
    """Writes the file under a temporary name and renames it when it is complete. keys: {key: value}; planned:
    [Planned]."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write_header(temporary, keys, planned)
        digest = write_tensors(temporary, planned)
        fill_digest(temporary, digest)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_header(path, keys, planned):
    """Writes everything before the tensors' bytes, with the gguf package."""
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
    """Appends every tensor, aligned. Returns the SHA-256 of their bytes as hex digits."""
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
    """Writes the tensors' digest into its place in the header, where write_header() put zeros."""
    with open(path, "r+b") as f:
        head = f.read(1 << 16)
        at = head.index(NO_DIGEST.encode(), head.index(DIGEST_KEY.encode()))
        f.seek(at)
        f.write(digest.encode())
