#!/usr/bin/env python3
"""From a released Wan 2.1 text-to-video checkpoint to the one GGUF file that sora maps into memory.

    checkpoint files -> names of the original release -> table of tensors -> stored type -> model.gguf

What users have on disk comes in many layouts (a diffusers folder, an original release folder, single files repackaged
by others). Each is read lazily, its keys are renamed to those of the original release by the tables RENAMES, and the
result is held against the tables of ROWS, which say what a model of these sizes consists of: name, shape, type rule.
Sizes come from shapes; a configuration that states them otherwise is an error, as is a tensor that is missing,
misshapen or not in the tables: nothing is skipped silently. Tensors are then read, merged with LoRAs, converted and
written a slice of rows at a time, so a 14B model passes through little memory, and the file gets its name only when
it is complete.

Pitfalls that other converters fell into:
- diffusers swaps norm2 and norm3 of the transformer's blocks;
- fp8 weights mean nothing without the scale that lies beside them;
- tokenizer.json and spiece.model, though from one release, do not tokenize alike: the file says whose rules hold;
- ggml knows four dimensions: every convolution is folded to a matrix, the input channel innermost.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from tqdm import tqdm

FORMAT_VERSION = 1
ALIGNMENT = 64          # bytes; a cache line, so that rows of a mapped tensor load aligned
SLICE = 1 << 25         # elements converted at a time
REMAP = 1 << 30         # bytes read from a mapped .pth before it is mapped anew, which gives its pages back
TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q8_0: 7, Type.BF16: 32}  # llama.cpp's LLAMA_FTYPE


class ExportError(Exception):
    """What is wrong with the input, as one line for the user."""


# ---------------------------------------------------------------- files: tensors that are not read yet

@dataclass
class Stored:
    """A tensor of a source file. dtype is safetensors' or ggml's name of it, e.g. F32, BF16, F8_E4M3, Q8_0."""
    key: str
    shape: tuple
    dtype: str
    file: "Safetensors | Pickle | Gguf"
    scale: "Stored | None" = None

    def rows(self, first=None, last=None):
        """Rows [first, last) of the first dimension (or everything) as float32, fp8 multiplied by its scale."""
        values = self.file.read(self.key, first, last).float()
        if self.scale is None:
            return values
        scale = self.scale.file.read(self.scale.key, None, None).float().flatten()
        return values * (scale if len(scale) == 1 else scale[first:last].view(-1, *[1] * (values.dim() - 1)))


class Safetensors:
    """A .safetensors file. It is opened for each read, so that no more than a slice of it stays mapped."""

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

    CONTAINERS = ("generator_ema", "generator", "model", "module", "state_dict")
    DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
              torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float64: "F64"}

    def __init__(self, path):
        self.path, self.metadata = path, {}
        self.open()
        other = [k for k, v in self.values.items() if not torch.is_tensor(v)]
        if other:
            raise ExportError(f"{path}: {other[0]!r} is not a tensor")
        self.tensors = {k: Stored(k, tuple(v.shape), self.DTYPES.get(v.dtype, str(v.dtype)), self)
                        for k, v in self.values.items()}

    def open(self):
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            values = torch.load(self.path, map_location="cpu", weights_only=True)
        while isinstance(values, dict) and (found := [c for c in self.CONTAINERS if isinstance(values.get(c), dict)]):
            values = values[found[0]]
        if not isinstance(values, dict):
            raise ExportError(f"{self.path}: holds a {type(values).__name__}, expected a dictionary of tensors")
        self.values, self.bytes_read = values, 0

    def read(self, key, first, last):
        if self.bytes_read > REMAP:
            self.open()
        values = self.values[key][first:last] if first is not None else self.values[key]
        self.bytes_read += values.nbytes
        return values


class Gguf:
    """A .gguf file as other programs write it; quantised tensors are read as the floats they stand for."""

    def __init__(self, path):
        self.path, self.metadata = path, {}
        reader = gguf.GGUFReader(path)
        self.fields = reader.fields
        self.infos = {t.name: t for t in reader.tensors}
        self.tensors = {t.name: Stored(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name, self)
                        for t in reader.tensors}

    def read(self, key, first, last):
        info, shape = self.infos[key], self.tensors[key].shape
        row = info.n_bytes // shape[0]
        first, last = first or 0, shape[0] if last is None else min(last, shape[0])
        raw = np.fromfile(self.path, np.uint8, (last - first) * row, offset=info.data_offset + first * row)
        values = gguf.quants.dequantize(raw.reshape(last - first, row), info.tensor_type)
        return torch.from_numpy(values.reshape(last - first, *shape[1:]))

    def value(self, key, default=None):
        return self.fields[key].contents() if key in self.fields else default


READERS = {".safetensors": Safetensors, ".pth": Pickle, ".pt": Pickle, ".bin": Pickle, ".ckpt": Pickle, ".gguf": Gguf}


def open_file(path):
    """The reader of one weight file; whatever its library dislikes about it becomes one line."""
    if path.suffix not in READERS:
        raise ExportError(f"{path}: unknown kind of file, expected one of {' '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except (ExportError, MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # each library raises its own kinds on a corrupt file
        raise ExportError(f"{path}: cannot be read: {str(error).strip().splitlines()[0]}") from error


def read_json(path):
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, gzip.BadGzipFile) as error:
        raise ExportError(f"{path}: not valid JSON: {error}") from error


def weight_files(path, pattern="*"):
    """The weight files behind a path: itself, or in a folder the shards of its index, or its only weight file."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ExportError(f"{path}: no such file or folder")
    indices = sorted(path.glob(pattern + ".safetensors.index.json"))
    if indices:
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


# ---------------------------------------------------------------- names: of every layout, to the original release's

PREFIXES = ("model.diffusion_model.", "diffusion_model.model.", "diffusion_model.", "model.", "net.", "generator.")
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

RENAMES = {
    "transformer": [  # the inverse of diffusers' convert_wan_transformer_to_diffusers
        (r"^condition_embedder\.(text|time)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"^condition_embedder\.(text|time)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"^condition_embedder\.time_proj\.", r"time_projection.1."),
        (r"^proj_out\.", r"head.head."),
        (r"^scale_shift_table$", r"head.modulation"),
        (r"\.scale_shift_table$", r".modulation"),
        (r"\.attn1\.", r".self_attn."),
        (r"\.attn2\.", r".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", r".o."),
        (r"\.ffn\.net\.0\.proj\.", r".ffn.0."),
        (r"\.ffn\.net\.2\.", r".ffn.2."),
        (r"\.norm2\.", r".norm3."),
    ],
    "text_encoder": [  # transformers' UMT5EncoderModel, then llama.cpp's t5encoder
        (r"^(shared|encoder\.embed_tokens|token_embd)\.", r"token_embedding."),
        (r"^encoder\.block\.", r"blocks."),
        (r"^encoder\.final_layer_norm\.", r"norm."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", r".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", r".attn."),
        (r"\.layer\.0\.layer_norm\.", r".norm1."),
        (r"\.layer\.1\.layer_norm\.", r".norm2."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", r".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", r".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", r".ffn.fc2."),
        (r"^enc\.output_norm\.", r"norm."),
        (r"^enc\.blk\.", r"blocks."),
        (r"\.attn_rel_b\.", r".pos_embedding.embedding."),
        (r"\.attn_norm\.", r".norm1."),
        (r"\.ffn_norm\.", r".norm2."),
        (r"\.attn_([qkvo])\.", r".attn.\1."),
        (r"\.ffn_gate\.", r".ffn.gate.0."),
        (r"\.ffn_up\.", r".ffn.fc1."),
        (r"\.ffn_down\.", r".ffn.fc2."),
    ],
    "vae": [  # the inverse of convert_wan_vae_to_diffusers, after count_upsamples()
        (r"^quant_conv\.", r"conv1."),
        (r"^post_quant_conv\.", r"conv2."),
        (r"coder\.conv_in\.", r"coder.conv1."),
        (r"coder\.norm_out\.", r"coder.head.0."),
        (r"coder\.conv_out\.", r"coder.head.2."),
        (r"\.mid_block\.resnets\.0\.", r".middle.0."),
        (r"\.mid_block\.attentions\.0\.", r".middle.1."),
        (r"\.mid_block\.resnets\.1\.", r".middle.2."),
        (r"\.down_blocks\.", r".downsamples."),
        (r"\.conv_shortcut\.", r".shortcut."),
        (r"\.norm1\.", r".residual.0."),
        (r"(coder\.\w+\.\d+)\.conv1\.", r"\1.residual.2."),
        (r"\.norm2\.", r".residual.3."),
        (r"(coder\.\w+\.\d+)\.conv2\.", r"\1.residual.6."),
    ],
}

# Keys that carry no weight of the model: a tied copy, ComfyUI's markers, activation scales of fp8 products.
IGNORED = re.compile(r"(^|\.)(scaled_fp8|spiece_model|comfy_quant|scale_input|input_scale)$")
SCALES = (".scale_weight", ".weight_scale")

# What sora cannot run yet, by the keys that give it away.
UNSUPPORTED = [
    (r"\bimg_emb\.|\.[kv]_img\.|image_embedder|\.add_[kv]_proj\.", "an image-to-video model (CLIP image encoder)"),
    (r"^vace_", "a VACE model"),
    (r"\bmotion_encoder\.|\bface_adapter\.", "a Wan-Animate model"),
    (r"\.to_gate_compress\.", "FastWan (its sparse attention's gate)"),
    (r"avg_shortcut|samples\.\d+\.(down|up)samples\.|down_blocks\.\d+\.resnets|\.(down|up)sampler\.",
     "Wan 2.2's residual VAE (TI2V-5B)"),
]


# A key that the part's own config.json always has.
CONFIG_MARKS = {"transformer": "ffn_dim", "text_encoder": "d_model", "vae": "z_dim"}


def plain_name(key):
    """A key without the prefixes and wrappers that trainers and repackagers put around it."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key[len(prefix):]
    return key


def original_name(part, name):
    """The original release's name of a plain name in any layout."""
    for pattern, replacement in RENAMES[part]:
        name = re.sub(pattern, replacement, name)
    return name


def count_upsamples(names):
    """diffusers' decoder.up_blocks.LEVEL.{resnets.R,upsamplers.0} counted through, as the original release does."""
    pattern = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
    found = [m for m in map(pattern.match, names) if m]
    resnets = 1 + max((int(m[3]) for m in found if m[2] == "resnets"), default=0)

    def count(m):
        within = int(m[3]) if m[2] == "resnets" else resnets
        return f"decoder.upsamples.{int(m[1]) * (resnets + 1) + within}."

    return [pattern.sub(count, n) for n in names]


@dataclass
class Part:
    """One of the three models: its tensors by the original release's names, and what its config.json states."""
    name: str
    path: Path
    tensors: dict
    config: dict
    files: list


def open_part(name, path, pattern="*"):
    """Opens the files of one part and renames their tensors; refuses what sora cannot run, by name."""
    paths = weight_files(path, pattern)
    config = paths[0].parent / "config.json"
    stored = {}
    for file in map(open_file, paths):
        for key, tensor in file.tensors.items():
            if key in stored:
                raise ExportError(f"{file.path}: {key} is also in {stored[key].file.path}")
            stored[key] = tensor
    for key, tensor in stored.items():
        for pattern, what in UNSUPPORTED:
            if re.search(pattern, plain_name(key)):
                raise ExportError(f"{tensor.file.path}: {what} cannot be run yet ({key})")
    stated = read_json(config) if config.is_file() else {}
    if CONFIG_MARKS[name] not in stated:  # an original release folder has one config.json, the transformer's
        stated = {}
    return Part(name, path, rename(name, attach_scales(stored)), stated, paths + ([config] if stated else []))


def attach_scales(stored):
    """Ties each fp8 tensor to its scale and drops what is no weight; an fp8 tensor without a scale is an error."""
    weights = {k: t for k, t in stored.items() if not k.endswith(SCALES) and not IGNORED.search(k)}
    scales = {k: t for k, t in stored.items() if k.endswith(SCALES)}
    for key, tensor in weights.items():
        base = key.removesuffix(".weight")
        found = [scales.pop(base + s) for s in SCALES if base + s in scales]
        if not found and not tensor.dtype.startswith("F8"):
            continue
        if not found:
            raise ExportError(f"{tensor.file.path}: {key} is fp8 without its scale ({base}.scale_weight)")
        if math.prod(found[0].shape) not in (1, tensor.shape[0]):
            raise ExportError(f"{tensor.file.path}: {found[0].key} has shape {list(found[0].shape)}, "
                              f"expected one value, or one for each of {tensor.shape[0]} rows")
        tensor.scale = found[0]
    if scales:
        raise ExportError(f"{next(iter(scales.values())).file.path}: {next(iter(scales))} scales no tensor")
    return weights


def rename(part, stored):
    """Tensors by original names. Two keys for one tensor are an error, but for umT5's tied copy of its embedding."""
    tied = "encoder.embed_tokens.weight"
    plain = [plain_name(key) for key in stored if not (key == tied and "shared.weight" in stored)]
    counted = count_upsamples(plain) if part == "vae" else plain
    tensors = {}
    for key, name in zip((k for k in stored if not (k == tied and "shared.weight" in stored)), counted):
        name, tensor = original_name(part, name), stored[key]
        if name in tensors:
            raise ExportError(f"{tensor.file.path}: {key} and {tensors[name].key} are both {name}")
        tensors[name] = tensor
    return tensors


# ---------------------------------------------------------------- tables: what each model consists of

# Type rules. EXACT stays f32: vectors, modulation, position biases, and the VAE, whose every rounding shows in the
# picture and which is small beside the rest. WIDE is the way in and out of the transformer: never below 16 bits.
EXACT, WIDE, MATRIX = "exact", "wide", "matrix"

# (name, torch shape in sizes of the model, rule); # is a block's number. Each "linear" is a weight and a bias.
TRANSFORMER = [
    ("patch_embedding.weight", "dim in_dim patch_t patch_h patch_w", WIDE),
    ("patch_embedding.bias", "dim", EXACT),
    ("text_embedding.0.weight", "dim text_dim", WIDE),
    ("text_embedding.0.bias", "dim", EXACT),
    ("text_embedding.2.weight", "dim dim", WIDE),
    ("text_embedding.2.bias", "dim", EXACT),
    ("time_embedding.0.weight", "dim freq_dim", WIDE),
    ("time_embedding.0.bias", "dim", EXACT),
    ("time_embedding.2.weight", "dim dim", WIDE),
    ("time_embedding.2.bias", "dim", EXACT),
    ("time_projection.1.weight", "6*dim dim", WIDE),
    ("time_projection.1.bias", "6*dim", EXACT),
    ("blocks.#.modulation", "6 dim", EXACT),
    *((f"blocks.#.{attention}.{row}", shape, rule) for attention in ("self_attn", "cross_attn") for row, shape, rule in (
        ("q.weight", "dim dim", MATRIX),
        ("q.bias", "dim", EXACT),
        ("k.weight", "dim dim", MATRIX),
        ("k.bias", "dim", EXACT),
        ("v.weight", "dim dim", MATRIX),
        ("v.bias", "dim", EXACT),
        ("o.weight", "dim dim", MATRIX),
        ("o.bias", "dim", EXACT),
        ("norm_q.weight", "dim", EXACT),
        ("norm_k.weight", "dim", EXACT),
    )),
    ("blocks.#.norm3.weight", "dim", EXACT),
    ("blocks.#.norm3.bias", "dim", EXACT),
    ("blocks.#.ffn.0.weight", "ffn_dim dim", MATRIX),
    ("blocks.#.ffn.0.bias", "ffn_dim", EXACT),
    ("blocks.#.ffn.2.weight", "dim ffn_dim", MATRIX),
    ("blocks.#.ffn.2.bias", "dim", EXACT),
    ("head.modulation", "2 dim", EXACT),
    ("head.head.weight", "patch_t*patch_h*patch_w*out_dim dim", WIDE),
    ("head.head.bias", "patch_t*patch_h*patch_w*out_dim", EXACT),
]

TEXT_ENCODER = [
    ("token_embedding.weight", "vocab_size dim", MATRIX),
    ("blocks.#.norm1.weight", "dim", EXACT),
    ("blocks.#.attn.q.weight", "dim_attn dim", MATRIX),
    ("blocks.#.attn.k.weight", "dim_attn dim", MATRIX),
    ("blocks.#.attn.v.weight", "dim_attn dim", MATRIX),
    ("blocks.#.attn.o.weight", "dim dim_attn", MATRIX),
    ("blocks.#.pos_embedding.embedding.weight", "num_buckets num_heads", EXACT),
    ("blocks.#.norm2.weight", "dim", EXACT),
    ("blocks.#.ffn.gate.0.weight", "dim_ffn dim", MATRIX),
    ("blocks.#.ffn.fc1.weight", "dim_ffn dim", MATRIX),
    ("blocks.#.ffn.fc2.weight", "dim dim_ffn", MATRIX),
    ("norm.weight", "dim", EXACT),
]

# The VAE's tables are its modules; vae_rows() lays them out level by level.
RESIDUAL = [
    ("residual.0.gamma", "i"),
    ("residual.2.weight", "o i 3 3 3"),
    ("residual.2.bias", "o"),
    ("residual.3.gamma", "o"),
    ("residual.6.weight", "o o 3 3 3"),
    ("residual.6.bias", "o"),
]
SHORTCUT = [("shortcut.weight", "o i 1 1 1"), ("shortcut.bias", "o")]
ATTENTION = [
    ("norm.gamma", "i"),
    ("to_qkv.weight", "3*i i 1 1"),
    ("to_qkv.bias", "3*i"),
    ("proj.weight", "i i 1 1"),
    ("proj.bias", "i"),
]
RESAMPLE = [("resample.1.weight", "o i 3 3"), ("resample.1.bias", "o")]
TIME_CONV = [("time_conv.weight", "t i 3 1 1"), ("time_conv.bias", "t")]
CONV = [("weight", "o i 3 3 3"), ("bias", "o")]
CONV_1X1 = [("weight", "o i 1 1 1"), ("bias", "o")]


def shape_of(text, sizes):
    """A shape of the tables, e.g. "6*dim dim", as numbers."""
    return tuple(math.prod(int(f) if f.isdigit() else sizes[f] for f in factor.split("*")) for factor in text.split())


def block_rows(table, sizes):
    """(name, shape, rule) of every tensor of a transformer or text encoder, in order of use."""
    split = [i for i, row in enumerate(table) if "#" in row[0]]
    for name, shape, rule in table[:split[0]]:
        yield name, shape_of(shape, sizes), rule
    for block in range(sizes["num_layers"]):
        for name, shape, rule in table[split[0]:split[-1] + 1]:
            yield name.replace("#", str(block)), shape_of(shape, sizes), rule
    for name, shape, rule in table[split[-1] + 1:]:
        yield name, shape_of(shape, sizes), rule


def vae_rows(sizes):
    """(name, shape, rule) of every tensor of the VAE, walking its levels as Encoder3d and Decoder3d of wan/modules/vae.py."""
    z, blocks, temporal = sizes["z_dim"], sizes["num_res_blocks"], sizes["temperal_downsample"]
    colours = 3 * sizes["patch_size"] ** 2

    def module(prefix, table, i, o=None, t=None):
        for name, shape in table:
            yield f"{prefix}.{name}", shape_of(shape, {"i": i, "o": o, "t": t}), EXACT

    def residual(prefix, i, o):
        yield from module(prefix, RESIDUAL + (SHORTCUT if i != o else []), i, o)

    def middle(prefix, width):
        yield from residual(f"{prefix}.0", width, width)
        yield from module(f"{prefix}.1", ATTENTION, width)
        yield from residual(f"{prefix}.2", width, width)

    width, index = sizes["base_dim"], 0
    yield from module("encoder.conv1", CONV, colours, width)
    for level, out in enumerate(sizes["encoder_dims"]):
        for block in range(blocks):
            yield from residual(f"encoder.downsamples.{index}", width, out)
            width, index = out, index + 1
        if level < len(temporal):
            yield from module(f"encoder.downsamples.{index}", RESAMPLE, width, width)
            if temporal[level]:
                yield from module(f"encoder.downsamples.{index}", TIME_CONV, width, t=width)
            index += 1
    yield from middle("encoder.middle", width)
    yield from module("encoder.head", [("0.gamma", "i"), ("2.weight", "o i 3 3 3"), ("2.bias", "o")], width, 2 * z)
    yield from module("conv1", CONV_1X1, 2 * z, 2 * z)
    yield from module("conv2", CONV_1X1, z, z)

    width, index = sizes["decoder_dims"][-1], 0
    yield from module("decoder.conv1", CONV, z, width)
    yield from middle("decoder.middle", width)
    for level, out in reversed(list(enumerate(sizes["decoder_dims"]))):
        for block in range(blocks + 1):
            yield from residual(f"decoder.upsamples.{index}", width, out)
            width, index = out, index + 1
        if level > 0:
            yield from module(f"decoder.upsamples.{index}", RESAMPLE, width, width // 2)
            if temporal[level - 1]:
                yield from module(f"decoder.upsamples.{index}", TIME_CONV, width, t=2 * width)
            width, index = width // 2, index + 1
    yield from module("decoder.head", [("0.gamma", "i"), ("2.weight", "o i 3 3 3"), ("2.bias", "o")], width, colours)


# ---------------------------------------------------------------- sizes: from shapes, held against what is stated

def shape_in(part, name, dims):
    """The shape of a tensor from which sizes are inferred."""
    if name not in part.tensors:
        raise ExportError(f"{part.path}: {part.name}.{name} is missing")
    shape = part.tensors[name].shape
    if len(shape) != dims:
        raise ExportError(f"{part.path}: {part.name}.{name} has shape {list(shape)}, expected {dims} dimensions")
    return shape


def blocks_in(part):
    """How many blocks the names count."""
    return 1 + max((int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, part.tensors) if m), default=-1)


def check_stated(part, sizes, stated):
    """Sizes that config.json states must be those of the tensors. stated: (size, its names in a config)."""
    for size, keys in stated:
        for key in keys:
            value = part.config.get(key)
            value = tuple(value) if isinstance(value, list) else value
            if value is not None and value != sizes[size]:
                raise ExportError(f"{part.path}: config.json: {key} is {part.config[key]}, but the tensors say {sizes[size]}")


def check_required(part, required):
    """Settings that sora computes in one way only. required: (key, the values that mean this way, what else)."""
    for key, values, what in required:
        if key in part.config and part.config[key] not in values:
            raise ExportError(f"{part.path}: config.json: {key} is {part.config[key]!r}: {what} cannot be run yet")


def transformer_sizes(part):
    """wan/modules/model.py's arguments. Without a config the head width is 128, as in every released Wan model."""
    patch = part.tensors.get("patch_embedding.weight")
    if patch is not None and len(patch.shape) == 4:  # GGUF: the two outer dimensions folded
        dim, = shape_in(part, "patch_embedding.bias", 1)
        shape = (dim, patch.shape[0] // dim, *patch.shape[1:])
    else:
        shape = shape_in(part, "patch_embedding.weight", 5)
    sizes = dict(zip(("dim", "in_dim", "patch_t", "patch_h", "patch_w"), shape))
    sizes["patch_size"] = shape[2:]
    sizes["text_dim"] = shape_in(part, "text_embedding.0.weight", 2)[1]
    sizes["freq_dim"] = shape_in(part, "time_embedding.0.weight", 2)[1]
    sizes["ffn_dim"] = shape_in(part, "blocks.0.ffn.0.weight", 2)[0]
    sizes["out_dim"] = shape_in(part, "head.head.weight", 2)[0] // math.prod(shape[2:])
    sizes["num_layers"] = blocks_in(part)
    heads = part.config.get("num_heads", part.config.get("num_attention_heads", sizes["dim"] // 128))
    if heads < 1 or sizes["dim"] % (2 * heads):
        raise ExportError(f"{part.path}: a width of {sizes['dim']} is not {heads} heads of even width "
                          "(without a config.json that states num_heads, heads are 128 wide)")
    sizes["num_heads"], sizes["head_dim"] = heads, sizes["dim"] // heads
    sizes["eps"], sizes["text_len"] = part.config.get("eps", 1e-6), part.config.get("text_len", 512)
    if sizes["in_dim"] != sizes["out_dim"]:
        raise ExportError(f"{part.path}: {sizes['in_dim']} latent channels in, {sizes['out_dim']} out: a model conditioned "
                          "on images or other latents cannot be run yet")
    check_required(part, [
        ("model_type", ("t2v",), "that kind of model"),
        ("qk_norm", (True, "rms_norm_across_heads"), "another norm of queries and keys"),
        ("cross_attn_norm", (True,), "a block without it"),
        ("image_dim", (None,), "image conditioning"),
        ("added_kv_proj_dim", (None,), "image conditioning"),
        ("pos_embed_seq_len", (None,), "a learned position embedding"),
        ("window_size", ([-1, -1],), "local attention"),
    ])
    check_stated(part, sizes, [
        ("dim", ("dim",)), ("in_dim", ("in_dim", "in_channels")), ("out_dim", ("out_dim", "out_channels")),
        ("ffn_dim", ("ffn_dim",)), ("freq_dim", ("freq_dim",)), ("text_dim", ("text_dim",)),
        ("num_layers", ("num_layers",)), ("head_dim", ("attention_head_dim",)), ("patch_size", ("patch_size",)),
    ])
    return sizes


def text_encoder_sizes(part):
    """wan/modules/t5.py's arguments. The position table tells the heads; bucket distance and eps are umT5's."""
    sizes = dict(zip(("vocab_size", "dim"), shape_in(part, "token_embedding.weight", 2)))
    sizes["dim_attn"] = shape_in(part, "blocks.0.attn.q.weight", 2)[0]
    sizes["dim_ffn"] = shape_in(part, "blocks.0.ffn.fc1.weight", 2)[0]
    sizes["num_buckets"], sizes["num_heads"] = shape_in(part, "blocks.0.pos_embedding.embedding.weight", 2)
    sizes["num_layers"], sizes["max_distance"] = blocks_in(part), part.config.get("relative_attention_max_distance", 128)
    sizes["head_dim"], sizes["eps"] = sizes["dim_attn"] // sizes["num_heads"], part.config.get("layer_norm_epsilon", 1e-6)
    check_required(part, [
        ("model_type", ("umt5",), "another text encoder"),
        ("feed_forward_proj", ("gated-gelu",), "another feed-forward"),
        ("dense_act_fn", ("gelu_new",), "another activation"),
    ])
    check_stated(part, sizes, [
        ("vocab_size", ("vocab_size",)), ("dim", ("d_model",)), ("dim_ffn", ("d_ff",)), ("head_dim", ("d_kv",)),
        ("num_heads", ("num_heads",)), ("num_layers", ("num_layers",)),
        ("num_buckets", ("relative_attention_num_buckets",)),
    ])
    return sizes


# wan/modules/vae.py, class WanVAE: the statistics of the released VAE's 16 latent channels.
LATENTS_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
LATENTS_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


def vae_sizes(part):
    """AutoencoderKLWan's arguments. Levels are counted by their resamplers, residual blocks by where those stand."""
    resamplers = sorted(int(m[1]) for m in map(re.compile(r"decoder\.upsamples\.(\d+)\.resample\.1\.weight").match,
                                               part.tensors) if m)
    blocks = 1 + max((int(m[1]) for m in map(re.compile(r"decoder\.upsamples\.(\d+)\.").match, part.tensors) if m),
                     default=0)
    levels = len(resamplers) + 1
    sizes = {"num_res_blocks": (resamplers[0] if resamplers else blocks) - 1}
    n = sizes["num_res_blocks"]
    sizes["z_dim"] = shape_in(part, "conv2.weight", 5)[0]
    sizes["base_dim"] = shape_in(part, "encoder.conv1.weight", 5)[0]
    sizes["encoder_dims"] = [shape_in(part, f"encoder.downsamples.{level * (n + 1)}.residual.2.weight", 5)[0]
                             for level in range(levels)]
    sizes["decoder_dims"] = [shape_in(part, f"decoder.upsamples.{level * (n + 2)}.residual.2.weight", 5)[0]
                             for level in reversed(range(levels))]
    sizes["temperal_downsample"] = [f"decoder.upsamples.{i}.time_conv.weight" in part.tensors for i in reversed(resamplers)]
    sizes["patch_size"] = math.isqrt(shape_in(part, "decoder.head.2.weight", 5)[0] // 3)
    known = sizes["z_dim"] == len(LATENTS_MEAN)
    sizes["latents_mean"] = part.config.get("latents_mean", LATENTS_MEAN if known else None)
    sizes["latents_std"] = part.config.get("latents_std", LATENTS_STD if known else None)
    for key in ("latents_mean", "latents_std"):
        if sizes[key] is None or len(sizes[key]) != sizes["z_dim"]:
            raise ExportError(f"{part.path}: {key} is not known for {sizes['z_dim']} latent channels: a config.json with it "
                              "must lie beside the VAE")
    check_required(part, [
        ("is_residual", (False,), "Wan 2.2's residual VAE"),
        ("attn_scales", ([],), "attention inside the VAE's levels"),
        ("patch_size", (None, sizes["patch_size"]), f"a patch that differs from the tensors' {sizes['patch_size']}"),
    ])
    stated = part.config.get("temperal_downsample", sizes["temperal_downsample"])
    if stated != sizes["temperal_downsample"]:
        raise ExportError(f"{part.path}: config.json: temperal_downsample is {stated}, but the tensors say "
                          f"{sizes['temperal_downsample']}")
    check_stated(part, sizes, [("z_dim", ("z_dim",)), ("base_dim", ("base_dim",)), ("num_res_blocks", ("num_res_blocks",))])
    return sizes


# ---------------------------------------------------------------- LoRA: merged into the weights it names

LORA_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
LORA_SUFFIXES = {".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
                 ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
                 ".lora_B.bias": "diff_b", ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m"}


@dataclass
class Lora:
    """What one LoRA adds: for each tensor, by original name, a low-rank product or a difference."""
    path: Path
    scale: float
    changes: dict  # name -> list of functions (first row, last row) -> f32 (rows, rest), in torch's layout


def lora_module(key, rows):
    """(module of the original release, kind of key), or None when the key is of no known style."""
    suffix = next((s for s in LORA_SUFFIXES if key.endswith(s)), None)
    if suffix is None:
        return None
    module = key.removesuffix(suffix)
    if module.startswith("lora_unet_"):  # kohya and musubi write underscores for dots
        flat = {name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight") for name in rows}
        module = flat.get(module.removeprefix("lora_unet_"))
    else:
        for prefix in LORA_PREFIXES:
            module = module.removeprefix(prefix)
        module = original_name("transformer", plain_name(module) + ".").removesuffix(".")
    return module and (module, LORA_SUFFIXES[suffix])


def lora_tensor(module, kind):
    """The name of the tensor that a key of this kind changes."""
    if kind == "diff_m":
        return f"{module}.modulation"
    return f"{module}.bias" if kind == "diff_b" else f"{module}.weight"


def open_lora(text, rows):
    """Reads FILE[:SCALE] and matches every key with a tensor of the transformer. rows: name -> torch shape."""
    path, scale = text, 1.0
    if not Path(text).is_file() and ":" in text:
        path, _, number = text.rpartition(":")
        try:
            scale = float(number)
        except ValueError:
            raise ExportError(f"--lora {text}: {number!r} is not a scale") from None
    file = open_file(Path(path))
    modules = {}
    for key, tensor in file.tensors.items():
        found = lora_module(key, rows)
        if not found or lora_tensor(*found) not in rows:
            raise ExportError(f"{path}: {key} matches no tensor of the transformer")
        if found[1] in modules.setdefault(found[0], {}):
            raise ExportError(f"{path}: {key} stands for the same as {modules[found[0]][found[1]].key}")
        modules[found[0]][found[1]] = tensor
    default_alpha = peft_alpha(file)
    lora = Lora(Path(path), scale, {})
    for module, keys in modules.items():
        add_changes(lora, module, keys, default_alpha, rows)
    print(f"{path}: {len(file.tensors)} of {len(file.tensors)} keys applied to {len(lora.changes)} tensors, scale {scale:g}",
          file=sys.stderr)
    return lora


def peft_alpha(file):
    """lora_alpha as diffusers keeps it in the file's metadata; None when the file says nothing: alpha is then the rank."""
    config = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    for key in ("use_dora", "use_rslora", "alpha_pattern"):
        if config.get(f"transformer.{key}", config.get(key)):
            raise ExportError(f"{file.path}: {key} is not supported")
    return config.get("transformer.lora_alpha", config.get("lora_alpha"))


def add_changes(lora, module, keys, default_alpha, rows):
    """The changes of one module, with their shapes checked."""
    def add(name, shape, change, key):
        expected = math.prod(rows[name])
        if math.prod(shape) != expected:
            raise ExportError(f"{lora.path}: {key} has shape {list(shape)}, but {name} has {list(rows[name])}")
        lora.changes.setdefault(name, []).append(change)

    for kind in ("diff", "diff_b", "diff_m"):
        if kind in keys:
            values = keys[kind].rows().flatten()
            name = lora_tensor(module, kind)
            columns = math.prod(rows[name]) // rows[name][0]
            add(name, keys[kind].shape,
                lambda first, last, v=values, n=columns: lora.scale * v.view(-1, n)[first:last], keys[kind].key)
    if ("down" in keys) != ("up" in keys):
        alone = keys.get("down") or keys.get("up")
        raise ExportError(f"{lora.path}: {alone.key} has no counterpart")
    if "down" in keys:
        down, up = keys["down"].rows().flatten(1), keys["up"].rows().flatten(1)
        if up.shape[1] != down.shape[0]:
            raise ExportError(f"{lora.path}: {keys['up'].key} has rank {up.shape[1]}, {keys['down'].key} {down.shape[0]}")
        alpha = keys["alpha"].rows().item() if "alpha" in keys else default_alpha
        factor = lora.scale * (1.0 if alpha is None else alpha / down.shape[0])
        add(f"{module}.weight", (up.shape[0], down.shape[1]),
            lambda first, last: (up[first:last] @ down) * factor, keys["up"].key)
    elif "alpha" in keys:
        raise ExportError(f"{lora.path}: {keys['alpha'].key} scales nothing")


# ---------------------------------------------------------------- tokenizer: pieces, and whose rules hold

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # as sentencepiece numbers them
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>$")


def find_tokenizer(path):
    """tokenizer.json where there is one, since upstream loads that; else spiece.model."""
    if path.is_file():
        return path
    for name in ("tokenizer.json", "spiece.model"):
        if (path / name).is_file():
            return path / name
    raise ExportError(f"{path}: no tokenizer.json or spiece.model")


def tokenizer_keys(path):
    """The keys of one tokenizer file, chosen by its kind."""
    if path.name.endswith((".json", ".json.gz")):
        return from_tokenizer_json(path, read_json(path))
    if path.suffix == ".gguf":
        return from_gguf(open_file(path))
    if path.suffix == ".safetensors":
        return from_embedded(open_file(path))
    return from_sentencepiece(path, path.read_bytes())


def from_embedded(file):
    """ComfyUI's text encoders carry spiece.model as a tensor of bytes."""
    if "spiece_model" not in file.tensors:
        raise ExportError(f"{file.path}: holds no tokenizer (no tensor spiece_model): name one with --tokenizer")
    return from_sentencepiece(file.path, file.read("spiece_model", None, None).numpy().tobytes())


def from_sentencepiece(path, data):
    """Keys of a spiece.model, which is used as the sentencepiece library uses it."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb
    model = pb.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ExportError(f"{path}: not a sentencepiece model") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces or trainer.model_type != trainer.UNIGRAM:
        raise ExportError(f"{path}: not a unigram model")
    if trainer.treat_whitespace_as_suffix:
        raise ExportError(f"{path}: treat_whitespace_as_suffix is not supported")
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    return {
        "tokenizer.ggml.tokens": [p.piece for p in model.pieces],
        "tokenizer.ggml.scores": [p.score for p in model.pieces],
        "tokenizer.ggml.token_type": [p.type for p in model.pieces],
        "tokenizer.ggml.eos_token_id": piece_id(path, ids, trainer.eos_piece),
        "tokenizer.ggml.unknown_token_id": next(i for i, p in enumerate(model.pieces) if p.type == UNKNOWN),
        "tokenizer.ggml.padding_token_id": ids.get(trainer.pad_piece, 0),
        "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "tokenizer.ggml.precompiled_charsmap": normalizer.precompiled_charsmap,
        "sora.tokenizer.rules": "sentencepiece",
        "sora.tokenizer.byte_fallback": trainer.byte_fallback,
        "sora.tokenizer.escape_whitespaces": normalizer.escape_whitespaces,
        "sora.tokenizer.squeeze_spaces": False,
        "sora.tokenizer.prepend_scheme": "always" if normalizer.add_dummy_prefix else "never",
        "sora.tokenizer.added_ids": [],
    }


def piece_id(path, ids, piece):
    if piece not in ids:
        raise ExportError(f"{path}: no piece {piece}")
    return ids[piece]


def from_gguf(file):
    """Keys of llama.cpp's conversion of a spiece.model; byte pieces exist only where byte fallback is on."""
    if file.value("tokenizer.ggml.model") != "t5":
        raise ExportError(f"{file.path}: holds no unigram tokenizer: name one with --tokenizer")
    types = file.value("tokenizer.ggml.token_type")
    prefix = bool(file.value("tokenizer.ggml.add_space_prefix", True))
    return {
        "tokenizer.ggml.tokens": file.value("tokenizer.ggml.tokens"),
        "tokenizer.ggml.scores": file.value("tokenizer.ggml.scores"),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": file.value("tokenizer.ggml.eos_token_id", 1),
        "tokenizer.ggml.unknown_token_id": types.index(UNKNOWN),
        "tokenizer.ggml.padding_token_id": file.value("tokenizer.ggml.padding_token_id", 0),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": bool(file.value("tokenizer.ggml.remove_extra_whitespaces", True)),
        "tokenizer.ggml.precompiled_charsmap": bytes(file.value("tokenizer.ggml.precompiled_charsmap", b"")),
        "sora.tokenizer.rules": "sentencepiece",
        "sora.tokenizer.byte_fallback": BYTE in types,
        "sora.tokenizer.escape_whitespaces": True,
        "sora.tokenizer.squeeze_spaces": False,
        "sora.tokenizer.prepend_scheme": "always" if prefix else "never",
        "sora.tokenizer.added_ids": [],
    }


def from_tokenizer_json(path, config):
    """Keys of a tokenizer.json, which is used as the tokenizers library uses it. What sora does not model is refused."""
    def refuse(what, found):
        raise ExportError(f"{path}: {what} {json.dumps(found, ensure_ascii=False)[:80]} is not supported")

    model, meta = config.get("model") or {}, config.get("pre_tokenizer") or {}
    if model.get("type") != "Unigram" or not model.get("vocab"):
        refuse("model", model.get("type"))
    if meta.get("type") != "Metaspace" or meta.get("replacement") != "\u2581" or meta.get("split", True) is not True:
        refuse("pre_tokenizer", meta)
    scheme = meta.get("prepend_scheme", "always" if meta.get("add_prefix_space", True) else "never")
    pieces, scores = [p for p, _ in model["vocab"]], [s for _, s in model["vocab"]]
    types = [BYTE if BYTE_PIECE.match(p) else NORMAL for p in pieces]
    if model.get("unk_id") is None:
        refuse("unk_id", None)
    types[model["unk_id"]] = UNKNOWN
    added = add_tokens(pieces, scores, types, config.get("added_tokens") or [], refuse)
    eos = closing_token(config.get("post_processor") or {}, refuse)
    return {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.eos_token_id": eos,
        "tokenizer.ggml.unknown_token_id": model["unk_id"],
        "tokenizer.ggml.padding_token_id": pieces.index("<pad>") if "<pad>" in pieces else 0,
        "tokenizer.ggml.add_space_prefix": scheme != "never",
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.ggml.precompiled_charsmap": b"",
        "sora.tokenizer.rules": "tokenizers",
        "sora.tokenizer.byte_fallback": bool(model.get("byte_fallback", False)),
        "sora.tokenizer.escape_whitespaces": True,
        "sora.tokenizer.squeeze_spaces": squeezes(config.get("normalizer"), refuse),
        "sora.tokenizer.prepend_scheme": scheme,
        "sora.tokenizer.added_ids": added,
    }


def add_tokens(pieces, scores, types, tokens, refuse):
    """Ids of the added tokens; those beyond the vocabulary are appended to it."""
    for token in sorted(tokens, key=lambda t: t["id"]):
        if any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")):
            refuse("added token", token)
        if token["id"] == len(pieces):
            pieces.append(token["content"])
            scores.append(0.0)
            types.append(NORMAL)
        if token["id"] >= len(pieces) or pieces[token["id"]] != token["content"]:
            refuse("added token", token)
        if types[token["id"]] != UNKNOWN:
            types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    return sorted(t["id"] for t in tokens)


def squeezes(normalizer, refuse):
    """Whether runs of spaces become one; any other normaliser is refused."""
    steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer] if normalizer else []
    for step in steps:
        if step != {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}:
            refuse("normalizer", step)
    return bool(steps)


def closing_token(processor, refuse):
    """The id that a post-processor of the form "text, then one token" appends."""
    single = processor.get("single") or []
    if processor.get("type") != "TemplateProcessing" or [list(step) for step in single] != [["Sequence"], ["SpecialToken"]]:
        refuse("post_processor", processor)
    ids = processor["special_tokens"][single[1]["SpecialToken"]["id"]]["ids"]
    if len(ids) != 1:
        refuse("post_processor", processor)
    return ids[0]


# ---------------------------------------------------------------- defaults of a run

# Sizes, steps and guidance are those of diffusers' WanPipeline and the released folders' flow_shift; the original
# repository's generate.py takes shift 5 and the sizes of its README, which options of sora reach.
DEFAULTS = {"width": 832, "height": 480, "frames": 81, "fps": "16", "steps": 50, "guidance": 5.0, "shift": 3.0,
            "sampler": "unipc", "negative_prompt": "", "name": "Wan"}

# wan/configs/shared_config.py: sample_neg_prompt, part of the released models' configuration.
NEGATIVE_PROMPT = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
                   "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
RELEASED = {  # (dim, num_layers): what the original configuration says of it
    (1536, 30): {"name": "Wan2.1-T2V-1.3B", "negative_prompt": NEGATIVE_PROMPT},
    (5120, 40): {"name": "Wan2.1-T2V-14B", "negative_prompt": NEGATIVE_PROMPT},
}

# The schedulers that sora has, and the only settings in which it has them.
SCHEDULERS = {
    "UniPCMultistepScheduler": ("unipc", "flow_shift", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "bh2",
        "predict_x0": True, "lower_order_final": True, "disable_corrector": []}),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift", {"invert_sigmas": False, "stochastic_sampling": False}),
    "DPMSolverMultistepScheduler": ("dpm++", "flow_shift", {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++", "lower_order_final": True, "euler_at_final": False}),
}
ALL_SCHEDULERS = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift_terminal": None,
                  "thresholding": False, "final_sigmas_type": "zero", "use_karras_sigmas": False,
                  "use_exponential_sigmas": False, "use_beta_sigmas": False}


def scheduler_defaults(path):
    """Sampler and shift of a scheduler_config.json; a setting that sora does not compute is an error."""
    config = read_json(path)
    if config.get("_class_name") not in SCHEDULERS:
        raise ExportError(f"{path}: {config.get('_class_name')} is none of {', '.join(SCHEDULERS)}")
    sampler, shift, settings = SCHEDULERS[config["_class_name"]]
    for key, value in {**ALL_SCHEDULERS, **settings}.items():
        if config.get(key, value) != value:
            raise ExportError(f"{path}: {key} is {config[key]!r}, expected {value!r}")
    return {"sampler": sampler, "shift": float(config.get(shift, 1.0))}


def run_defaults(args, sources, sizes):
    """What sora does when no option says otherwise, from the general to the particular: this script, the release, the
    scheduler's configuration, sora.json beside the checkpoint, options of this command."""
    values = {**DEFAULTS, **RELEASED.get((sizes["dim"], sizes["num_layers"]), {})}
    if sources.scheduler:
        values.update(scheduler_defaults(sources.scheduler))
    if sources.settings:
        stated = read_json(sources.settings)
        unknown = [key for key in stated if key not in DEFAULTS]
        if unknown:
            raise ExportError(f"{sources.settings}: {unknown[0]} is none of {', '.join(DEFAULTS)}")
        values.update(stated)
    values.update({key: getattr(args, key) for key in DEFAULTS if getattr(args, key) is not None})
    if values["sampler"] not in ("unipc", "euler", "dpm++"):
        raise ExportError(f"sampler is {values['sampler']!r}, expected unipc, euler or dpm++")
    if values["frames"] % 4 != 1:
        raise ExportError(f"frames is {values['frames']}, expected 4k+1")
    return values


# ---------------------------------------------------------------- sources: which file holds which part

@dataclass
class Sources:
    """Paths of the parts. Named ones replace those that CHECKPOINT has."""
    transformer: Path | None = None
    text_encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    scheduler: Path | None = None
    settings: Path | None = None
    transformer_pattern: str = "*"


def find_sources(args):
    """Recognises CHECKPOINT's layout and lays the named parts over it."""
    sources = Sources()
    if args.checkpoint:
        root = Path(args.checkpoint)
        if not root.exists():
            raise ExportError(f"{root}: no such file or folder")
        if root.is_file():
            sources = Sources(transformer=root)
        elif (root / "model_index.json").is_file():
            sources = diffusers_sources(root)
        else:
            sources = original_sources(root)
        if (root / "sora.json").is_file():
            sources.settings = root / "sora.json"
    for part in ("transformer", "text_encoder", "vae", "tokenizer"):
        if getattr(args, part):
            setattr(sources, part, Path(getattr(args, part)))
            if part == "transformer":
                sources.transformer_pattern = "*"
    if sources.tokenizer is None:  # ComfyUI's and llama.cpp's text encoders carry it
        sources.tokenizer = sources.text_encoder
    for part in ("transformer", "text_encoder", "vae"):
        if getattr(sources, part) is None:
            raise ExportError(f"no {part.replace('_', ' ')}: name it with --{part.replace('_', '-')}")
    return sources


def diffusers_sources(root):
    index = read_json(root / "model_index.json")
    for key, what in (("transformer_2", "Wan 2.2 A14B (two experts)"), ("image_encoder", "an image-to-video model")):
        if any(index.get(key) or []):
            raise ExportError(f"{root}: {what} cannot be run yet ({key} in model_index.json)")
    if index.get("expand_timesteps"):
        raise ExportError(f"{root}: Wan 2.2 TI2V-5B cannot be run yet (expand_timesteps in model_index.json)")
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Sources(root / "transformer", root / "text_encoder", root / "vae", root / "tokenizer",
                   scheduler if scheduler.is_file() else None)


def original_sources(root):
    for name, what in (("high_noise_model", "Wan 2.2 A14B (two experts)"), ("low_noise_model", "Wan 2.2 A14B (two experts)"),
                       ("Wan2.2_VAE.pth", "Wan 2.2 TI2V-5B (residual VAE)")):
        if (root / name).exists():
            raise ExportError(f"{root}: {what} cannot be run yet ({name})")
    clip = sorted(root.glob("models_clip_*"))
    if clip:
        raise ExportError(f"{root}: an image-to-video model cannot be run yet ({clip[0].name})")

    def only(pattern):
        found = sorted(root.glob(pattern))
        return found[0] if found else None

    return Sources(root, only("models_t5_*"), only("*VAE*.*"), only("google/*"), transformer_pattern="diffusion_pytorch_model*")


# ---------------------------------------------------------------- planning: every tensor's place and type, before any is read

@dataclass
class Planned:
    """A tensor of the weight file."""
    name: str
    shape: tuple        # as written: (n) or (rows, columns)
    torch_shape: tuple  # as the tables say
    type: Type
    source: Stored
    changes: list = field(default_factory=list)

    def bytes(self):
        block, size = gguf.constants.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def slices(self):
        """The tensor's bytes, some rows at a time: read, merged with LoRAs in f32, folded, converted."""
        rows, step = self.torch_shape[0], max(1, SLICE // math.prod(self.torch_shape[1:]))
        whole = step >= rows or self.source.shape[0] != rows
        for first in range(0, rows, rows if whole else step):
            last = rows if whole else min(first + step, rows)
            values = self.source.rows(*(() if whole else (first, last))).reshape(last - first, -1)
            for change in self.changes:
                values = values + change(first, last)
            yield self.convert(fold(values.reshape(last - first, *self.torch_shape[1:])))

    def convert(self, values):
        if self.type == Type.F32:
            return values.numpy()
        if self.type == Type.BF16:
            return values.bfloat16().view(torch.uint16).numpy()
        if self.type == Type.Q8_0:
            return gguf.quants.quantize(values.numpy(), Type.Q8_0)
        half = values.half()
        if not torch.isfinite(half).all():
            raise ExportError(f"{self.source.file.path}: {self.source.key} holds {values.abs().max():g}, which f16 cannot: "
                              "take --type bf16")
        return half.numpy()


def fold(values):
    """A convolution [O,I,T,Y,X] or [O,I,Y,X] as rows of (T,Y,X,I); others as they are."""
    if values.dim() > 2:
        values = values.movedim(1, -1)
    return values.contiguous()


def squeezed(shape):
    return tuple(n for n in shape if n != 1)


def folded_shape(shape):
    """A vector stays one; a matrix or convolution becomes (rows, columns)."""
    return shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def stored_type(rule, source, columns, wanted):
    """The type of a tensor in the file: as --type wants it and its rule allows, without --type as it was stored."""
    if rule == EXACT:
        return Type.F32
    if wanted is None:
        return {"F32": Type.F32, "F64": Type.F32, "F16": Type.F16}.get(source.dtype, Type.BF16)
    if wanted == Type.Q8_0 and rule == WIDE:
        return Type.BF16
    if wanted == Type.Q8_0 and columns % gguf.constants.GGML_QUANT_SIZES[Type.Q8_0][0]:
        return Type.F16
    return wanted


def plan(part, rows, wanted, loras=()):
    """Matches a part's tensors with its table: one that is missing, misshapen or left over is an error."""
    left, planned = dict(part.tensors), []
    for name, shape, rule in rows:
        source = left.pop(name, None)
        if source is None:
            raise ExportError(f"{part.path}: {part.name}.{name} is missing")
        outer_folded = (math.prod(shape[:2]), *shape[2:])  # how four dimensions hold five
        if squeezed(source.shape) not in (squeezed(shape), squeezed(outer_folded)):
            raise ExportError(f"{source.file.path}: {source.key} has shape {list(source.shape)}, expected {list(shape)}")
        folded = folded_shape(shape)
        planned.append(Planned(f"{part.name}.{name}", folded, shape, stored_type(rule, source, folded[-1], wanted), source,
                               [c for lora in loras for c in lora.changes.get(name, [])]))
    if left:
        tensor = next(iter(left.values()))
        raise ExportError(f"{tensor.file.path}: {tensor.key} {list(tensor.shape)} is no tensor of the {part.name.replace('_', ' ')}")
    return planned


# ---------------------------------------------------------------- writing

def sha256_of(path, bar):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def source_keys(root, files):
    """Names, relative to the checkpoint where they lie in it, and SHA-256 of all files that were read."""
    files = list(dict.fromkeys(files))
    inside = [f.relative_to(root).as_posix() if root and f.is_relative_to(root) and f != root else f.name for f in files]
    with tqdm(total=sum(f.stat().st_size for f in files), desc="sha256", unit="B", unit_scale=True, disable=None) as bar:
        return {"sora.source.names": inside, "sora.source.sha256": [sha256_of(f, bar) for f in files]}


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


def write(path, keys, planned):
    """Writes the file under a temporary name and renames it when complete."""
    temporary = path.with_name(path.name + ".part")
    try:
        write_header(temporary, keys, planned)
        digest = write_tensors(temporary, planned)
        fill_digest(temporary, digest)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_header(path, keys, planned):
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


DIGEST_KEY, NO_DIGEST = "sora.tensors_sha256", "0" * 64


def fill_digest(path, digest):
    """Puts the tensors' digest, known only now, where the header keeps room for it."""
    with open(path, "r+b") as f:
        head = f.read(1 << 16)
        at = head.index(NO_DIGEST.encode(), head.index(DIGEST_KEY.encode()))
        f.seek(at)
        f.write(digest.encode())


# ---------------------------------------------------------------- the export

def model_keys(transformer, text, vae):
    """The three models' configuration, under the names of their own conventions."""
    return {
        "wan.model_type": "t2v",
        **{f"wan.{key}": transformer[key] for key in ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads",
                                                      "num_layers", "text_len", "text_dim", "patch_size", "eps")},
        "wan.qk_norm": True,
        "wan.cross_attn_norm": True,
        "t5encoder.block_count": text["num_layers"],
        "t5encoder.embedding_length": text["dim"],
        "t5encoder.feed_forward_length": text["dim_ffn"],
        "t5encoder.vocab_size": text["vocab_size"],
        "t5encoder.context_length": transformer["text_len"],
        "t5encoder.attention.head_count": text["num_heads"],
        "t5encoder.attention.key_length": text["head_dim"],
        "t5encoder.attention.relative_buckets_count": text["num_buckets"],
        "t5encoder.attention.relative_max_distance": text["max_distance"],
        "t5encoder.attention.layer_norm_rms_epsilon": text["eps"],
        **{f"wan.vae.{key}": vae[key] for key in ("z_dim", "base_dim", "encoder_dims", "decoder_dims", "num_res_blocks",
                                                  "patch_size", "latents_mean", "latents_std")},
        "wan.vae.temperal_downsample": [int(t) for t in vae["temperal_downsample"]],
    }


def default_keys(values):
    rate = parse_rate(values["fps"])
    return {
        "general.name": values["name"],
        **{f"sora.{key}": values[key] for key in ("width", "height", "frames", "steps", "sampler", "negative_prompt")},
        "sora.fps_num": rate.numerator,
        "sora.fps_den": rate.denominator,
        "sora.guidance": float(values["guidance"]),
        "sora.shift": float(values["shift"]),
        "sora.num_train_timesteps": 1000,
    }


def parse_rate(text):
    """Frames a second, N or N:D."""
    try:
        rate = Fraction(str(text).replace(":", "/"))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise ExportError(f"fps is {text!r}, expected N or N:D")
    return rate


def check_parts_fit(transformer, text, vae, tokenizer):
    """The parts must have been made for each other."""
    if transformer["text_dim"] != text["dim"]:
        raise ExportError(f"the transformer takes text of width {transformer['text_dim']}, the text encoder gives {text['dim']}")
    if transformer["in_dim"] != vae["z_dim"]:
        raise ExportError(f"the transformer has {transformer['in_dim']} latent channels, the VAE {vae['z_dim']}")
    if len(tokenizer["tokenizer.ggml.tokens"]) > text["vocab_size"]:
        raise ExportError(f"the tokenizer has {len(tokenizer['tokenizer.ggml.tokens'])} pieces, the text encoder's "
                          f"embedding {text['vocab_size']} rows")


def export(args):
    """From the arguments to the finished file."""
    sources, wanted = find_sources(args), TYPES.get(args.type)
    transformer = open_part("transformer", sources.transformer, sources.transformer_pattern)
    text = open_part("text_encoder", sources.text_encoder)
    vae = open_part("vae", sources.vae)
    tokenizer_path = find_tokenizer(sources.tokenizer)
    tokenizer = tokenizer_keys(tokenizer_path)
    sizes = transformer_sizes(transformer), text_encoder_sizes(text), vae_sizes(vae)
    check_parts_fit(*sizes, tokenizer)

    rows = list(block_rows(TRANSFORMER, sizes[0]))
    loras = [open_lora(text, {name: shape for name, shape, _ in rows}) for text in args.lora]
    planned = [*plan(text, block_rows(TEXT_ENCODER, sizes[1]), wanted),
               *plan(transformer, rows, wanted, loras),
               *plan(vae, vae_rows(sizes[2]), wanted)]
    matrix = next(t for t in planned if t.name == "transformer.blocks.0.self_attn.q.weight")
    values = run_defaults(args, sources, sizes[0])
    files = [*text.files, *transformer.files, *vae.files, tokenizer_path, sources.scheduler, sources.settings,
             *(lora.path for lora in loras)]
    write(Path(args.output), {
        "general.file_type": FILE_TYPES[matrix.type],
        "general.quantization_version": 2,
        "sora.format_version": FORMAT_VERSION,
        "sora.layout.conv": "O,T,Y,X,I",
        DIGEST_KEY: NO_DIGEST,
        **default_keys(values),
        **model_keys(*sizes),
        "sora.lora": [f"{lora.path.name}:{lora.scale:g}" for lora in loras],
        **source_keys(Path(args.checkpoint) if args.checkpoint else None, [f for f in files if f]),
        "tokenizer.ggml.model": "t5",
        **tokenizer,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }, planned)
    print(f"{args.output}: {len(planned)} tensors, {Path(args.output).stat().st_size:,} bytes", file=sys.stderr)


def arguments(argv):
    parser = argparse.ArgumentParser(description="Convert a Wan 2.1 text-to-video checkpoint to one GGUF file for sora.")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT",
                        help="a diffusers folder, an original release folder, or the transformer's file")
    parser.add_argument("-o", "--output", required=True, help="the GGUF file to write")
    parser.add_argument("--type", choices=TYPES, help="type of the matrices (default: as they are stored)")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="merge a LoRA; repeatable")
    for part in ("transformer", "text-encoder", "vae", "tokenizer"):
        parser.add_argument(f"--{part}", metavar="PATH", help="file or folder to take this part from")
    defaults = parser.add_argument_group("defaults that the file gives to sora")
    for key, kind in (("width", int), ("height", int), ("frames", int), ("fps", str), ("steps", int), ("guidance", float),
                      ("shift", float), ("sampler", str), ("name", str)):
        defaults.add_argument(f"--{key}", type=kind)
    defaults.add_argument("--negative", dest="negative_prompt")
    return parser.parse_args(argv)


def main(argv=None):
    try:
        export(arguments(argv))
    except ExportError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export.py: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2 if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) else 3
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
