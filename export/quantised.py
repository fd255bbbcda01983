"""Quantised weights: how a stored tensor becomes float32, for each format in use.

    plain fp8       the values are the weights
    scaled fp8      value * scale; ComfyUI's (.scale_weight, later .weight_scale) and LightX2V's (.weight_scale)
    int8            value * scale; LightX2V's, and ComfyUI's int8_tensorwise and int8_blockwise
    convrot         int8_tensorwise of weights that were multiplied by a Hadamard matrix; they are multiplied again

There is one scale for a tensor, for each row, or for each block. ComfyUI names the format of each module in the file's
metadata or in a tensor .comfy_quant; a format that is not in FORMATS is refused by name.

Pitfall: scaled fp8 also loads without its scale, and gives a white picture. So fp8 counts as plain only if the file has
no scale and no marker at all.
"""

import json
import math
import re
from dataclasses import dataclass

import torch

from export.containers import Gguf, Stored
from export.files import ExportError
from export.names import plain_name

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FORMATS = {  # ComfyUI's name: (stored types, whether there is a scale for each block)
    "float8_e4m3fn": (("F8_E4M3", "U8"), False),
    "float8_e4m3fn_rowwise": (("F8_E4M3", "U8"), False),
    "float8_e4m3fn_blockwise": (("F8_E4M3", "U8"), True),
    "float8_e5m2": (("F8_E5M2", "U8"), False),
    "int8_tensorwise": (("I8",), False),
    "int8_blockwise": (("I8",), True),
}

GROUPS = tuple(4 ** n for n in range(1, 8))  # sizes of the groups of columns that convrot rotates

SCALES = (".scale_weight", ".weight_scale")
QUANT, METADATA = ".comfy_quant", "_quantization_metadata"
# Tensors that are not weights: the marker of scaled fp8, scales of activations, a tokenizer, a choice of attention.
IGNORED = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|spiece_model|comfy_attention\.config)$")
MARKS = re.compile(r"(^|\.)(scaled_fp8|[^.]*scale(_inv|_2|_weight|_input)?)$")  # signs of scaled fp8
UNKNOWN = {"weight_scale_2": "two levels of scales", "pre_quant_scale": "a scale for each input",
           "weight_scale_inv": "DeepSeek's scales of blocks"}


@dataclass
class Quantised(Stored):
    """A tensor that is multiplied by a scale. rotation: size of the groups of columns that are rotated back, or 0."""
    scale: Stored = None
    by_block: bool = False
    rotation: int = 0
    stored_as: torch.dtype = None  # the fp8 type of a tensor that is stored as bytes

    def rows(self, first=None, last=None):
        first, last = first or 0, self.shape[0] if last is None else last
        values = self.file.read(self.key, first, last)
        values = (values.view(self.stored_as) if self.stored_as else values).float()
        values = values * self.factors(first, last).view(last - first, -1, *[1] * (len(self.shape) - 2))
        return rotated(values, self.rotation) if self.rotation else values.contiguous()

    def grid(self):
        """(rows, columns) of the scale."""
        shape = self.scale.shape
        return shape if len(shape) == 2 else (math.prod(shape), 1)

    def factors(self, first, last):
        """The factors of rows [first, last): (1 or rows, 1), or (rows, columns) with a scale for each block."""
        rows, columns = self.grid()
        scale = self.scale.rows().reshape(rows, columns)[torch.arange(first, last) // (self.shape[0] // rows)]
        return scale if columns == 1 else scale.repeat_interleave(self.shape[1] // columns, 1)

    def check(self):
        """Raises ExportError unless the scale's shape fits the tensor's, and the rotation divides the columns."""
        rows, columns = self.grid()
        whole = columns == 1 and rows in (1, self.shape[0])
        blocks = self.by_block and len(self.shape) == 2 and 0 not in (rows, columns) and \
            self.shape[0] % rows == self.shape[1] % columns == 0
        if not (whole or blocks):
            blocks = f", or of blocks of {list(self.shape)}" if self.by_block else ""
            raise ExportError(f"{self.file.path}: {self.scale.key} has shape {list(self.scale.shape)}, expected one "
                              f"value, or one for each of {self.shape[0]} rows{blocks}")
        group = self.rotation
        if group and (len(self.shape) != 2 or group not in GROUPS or self.shape[1] % group):
            raise ExportError(f"{self.file.path}: {self.key}: convrot_groupsize is {group!r}, expected a power of 4 "
                              f"that divides {self.shape[-1]} columns")


def rotated(values, group):
    """values (rows, columns) times ComfyUI's Hadamard matrix (group, group), for each group of columns. The matrix is
    its own inverse."""
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2
    matrix = h4
    while len(matrix) < group:
        matrix = torch.kron(matrix, h4)
    return (values.reshape(-1, group) @ matrix).reshape(values.shape)


def weights_in(stored):
    """{key: tensor} of the weights, each quantised one with its scale. stored: {key: tensor} of all files of a part.
    Raises ExportError for unknown formats, missing scales, and scales without a weight."""
    formats = stated_formats(stored)
    helpers = {k for k in stored if k.endswith((*SCALES, QUANT)) or IGNORED.search(k)}
    for key in stored:
        if (last := key.rpartition(".")[2]) in UNKNOWN:
            raise ExportError(f"{stored[key].file.path}: {key}: {UNKNOWN[last]}, expected {' or '.join(SCALES)}")
    plain_fp8 = not formats and not any(MARKS.search(key) for key in stored)
    weights, used = {}, set()
    for key, tensor in stored.items():
        if key in helpers:
            continue
        module = key.removesuffix(".weight")
        scale = next((module + s for s in SCALES if module + s in stored), None)
        used.add(scale)
        weights[key] = quantised(tensor, stored.get(scale), formats.pop(plain_name(module), None), plain_fp8)
    for key in helpers - used:
        if key.endswith(SCALES):
            raise ExportError(f"{stored[key].file.path}: {key} is the scale of no tensor")
    if formats:
        raise ExportError(f"{next(iter(stored.values())).file.path}: the metadata names {min(formats)}, expected a "
                          "weight of that name")
    return weights


def stated_formats(stored):
    """{plain name of a module: its format as a dictionary}, from ComfyUI's metadata and .comfy_quant tensors."""
    formats = {}
    for file in {t.file.path: t.file for t in stored.values()}.values():
        layers = json_object(file, METADATA, file.metadata.get(METADATA, "{}")).get("layers", {})
        formats |= {plain_name(module): says for module, says in layers.items()}
    for key, tensor in stored.items():
        if key.endswith(QUANT):
            text = tensor.file.read(key, None, None).numpy().tobytes()
            formats[plain_name(key.removesuffix(QUANT))] = json_object(tensor.file, key, text)
    return formats


def json_object(file, where, text):
    """A dictionary from JSON text. where: its place in the file. Raises ExportError for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ExportError(f"{file.path}: {where} is {str(text)[:40]!r}, expected a JSON object")
    return value


def quantised(tensor, scale, says, plain_fp8):
    """The tensor with its scale, or the tensor itself if it needs none. scale: a tensor or None; says: ComfyUI's format
    or None; plain_fp8: fp8 needs no scale. Raises ExportError for a format or type that is not known."""
    where = f"{tensor.file.path}: {tensor.key}"
    name = says and says.get("format")
    if says and name not in FORMATS:
        raise ExportError(f"{where} is quantised as {name}, expected one of {', '.join(FORMATS)}")
    dtypes, by_block = FORMATS[name] if says else ((*FP8, "I8", *FLOATS), False)
    if scale is None and not says:
        if tensor.dtype in FP8 and not plain_fp8:
            raise ExportError(f"{where} is fp8 without a scale, expected "
                              f"{tensor.key.removesuffix('.weight')}.weight_scale")
        if tensor.dtype not in FLOATS + tuple(FP8) and not isinstance(tensor.file, Gguf):
            raise ExportError(f"{where} is {tensor.dtype}, expected {', '.join(FLOATS + tuple(FP8))}, or I8 with a "
                              "scale")
        return tensor
    if scale is None or tensor.dtype not in dtypes or scale.dtype not in FLOATS:
        raise ExportError(f"{where} is {tensor.dtype} with {f'a scale of {scale.dtype}' if scale else 'no scale'}, "
                          f"expected {' or '.join(dtypes)} with a scale of {' or '.join(FLOATS)}")
    settings = (says or {}) | (says or {}).get("params", {})
    rotation = settings.get("convrot_groupsize", 256) if settings.get("convrot") else 0
    view = FP8["F8_E5M2" if name == "float8_e5m2" else "F8_E4M3"] if tensor.dtype == "U8" else None
    result = Quantised(tensor.key, tensor.shape, tensor.dtype, tensor.file, scale, by_block, rotation, view)
    result.check()
    return result
