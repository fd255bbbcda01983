"""LoRA: low-rank products and differences that others trained, merged into the transformer's weights.

    W += scale * (alpha / rank) * up @ down        W += scale * diff
    b += scale * (alpha / rank) * up_b             b += scale * diff_b

in float32, on the weights as torch lays them out, some rows at a time: a LoRA is as little in memory as what it
changes. Four styles of keys are in use (ComfyUI's, kohya's, diffusers', PEFT's); all are renamed as the checkpoint's
own keys are. A key that matches no tensor is an error.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from export.files import ExportError, open_file, read_json, reading
from export.names import our_name, plain_name
from export.quantised import check_stored
from export.tables import squeezed

PEFT_PREFIX = "base_model.model."
LORA_PREFIXES = (PEFT_PREFIX, "transformer.", "diffusion_model.")
LORA_SUFFIXES = {".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
                 ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
                 ".lora_B.bias": "up_b", ".lora_B.default.bias": "up_b", ".alpha": "alpha",
                 ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m"}


@dataclass
class Lora:
    """What one LoRA adds: for each tensor, by our name, low-rank products and differences."""
    path: Path
    scale: float
    rows: dict   # name -> torch shape, of every tensor of the transformer
    files: list  # that were read
    changes: dict = field(default_factory=dict)  # name -> functions (first row, last row) -> f32 (rows, rest), as torch

    def add(self, name, shape, change, key):
        """One change of a tensor that must have this shape."""
        if squeezed(shape) != squeezed(self.rows[name]):
            raise ExportError(f"{self.path}: {key} has shape {list(shape)}, but {name} has {list(self.rows[name])}")
        self.changes.setdefault(name, []).append(change)

    def add_difference(self, module, kind, tensor, factor):
        """A tensor that is added, times a factor, to the module's weight, bias or modulation."""
        name = lora_tensor(module, kind)
        self.add(name, tensor.shape, lambda first, last, count=self.rows[name][0]:
                 tensor.matrix(count, first, last) * factor, tensor.key)

    def add_product(self, module, up, down, factor):
        """up (rows, rank) @ down (rank, rest), times a factor, added to the module's weight (rows, rest)."""
        self.add(f"{module}.weight", (up.shape[0], *down.shape[1:]), lambda first, last:
                 up.rows(first, last).flatten(1) @ down.rows().flatten(1) * factor, up.key)


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
        module = our_name("transformer", plain_name(module) + ".").removesuffix(".")
    return module and (module, LORA_SUFFIXES[suffix])


def lora_tensor(module, kind):
    """The name of the tensor that a key of this kind changes."""
    if kind == "diff_m":
        return f"{module}.modulation"
    return f"{module}.bias" if kind in ("diff_b", "up_b") else f"{module}.weight"


def open_lora(option, rows):
    """Reads FILE[:SCALE] and matches every key with a tensor of the transformer. rows: name -> torch shape."""
    path, scale = option, 1.0
    if not Path(option).is_file() and ":" in option:
        path, _, number = option.rpartition(":")
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ExportError(f"--lora {option}: {number!r} is not a scale")
    file = open_file(Path(path))
    with reading(path):
        modules = lora_modules(file, rows)
        config, config_files = adapter_config(file)
        lora = Lora(Path(path), scale, rows, [file.path, *config_files])
        for module, keys in modules.items():
            add_changes(lora, module, keys, config)
    if not lora.changes:
        raise ExportError(f"{path}: changes nothing")
    print(f"{path}: {len(file.tensors)} keys applied to {len(lora.changes)} tensors, scale {scale:g}",
          file=sys.stderr)
    return lora


def lora_modules(file, rows):
    """{module: {kind of key: tensor}} of a LoRA file."""
    modules = {}
    for key, tensor in file.tensors.items():
        found = lora_module(key, rows)
        if not found or lora_tensor(*found) not in rows:
            raise ExportError(f"{file.path}: {key} matches no tensor of the transformer")
        module, kind = found
        if kind in modules.setdefault(module, {}):
            raise ExportError(f"{file.path}: {key} stands for the same as {modules[module][kind].key}")
        if kind != "alpha":  # which is a count, and may be stored as one
            check_stored(key, tensor, key.removesuffix(".weight"))
        modules[module][kind] = tensor
    return modules


def adapter_config(file):
    """(What PEFT says of the adapter, the files that say so): diffusers keeps it in the file's metadata, PEFT itself in
    adapter_config.json beside it."""
    beside = file.path.parent / "adapter_config.json"
    if "lora_adapter_metadata" in file.metadata:
        config, files = json.loads(file.metadata["lora_adapter_metadata"]), []
    elif any(key.startswith(PEFT_PREFIX) for key in file.tensors):
        if not beside.is_file():
            raise ExportError(f"{file.path}: PEFT keeps its strength in {beside.name}, which must lie beside it")
        config, files = read_json(beside), [beside]
    else:
        config, files = {}, []
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    for key in ("use_dora", "use_rslora", "alpha_pattern"):
        if config.get(key):
            raise ExportError(f"{file.path}: {key} is not supported")
    return config, files


def add_changes(lora, module, keys, config):
    """All that the keys of one module change."""
    for kind in ("diff", "diff_b", "diff_m"):
        if kind in keys:
            lora.add_difference(module, kind, keys[kind], lora.scale)
    alone = keys.keys() & {"down", "up", "up_b", "alpha"}
    if not alone:
        return
    if not {"down", "up"} <= keys.keys():
        raise ExportError(f"{lora.path}: {keys[min(alone)].key} has no counterpart")
    down, up = keys["down"], keys["up"]
    rank = down.shape[0]
    if math.prod(up.shape[1:]) != rank:
        raise ExportError(f"{lora.path}: {up.key} has rank {math.prod(up.shape[1:])}, {down.key} has {rank}")
    alpha = keys["alpha"].rows().item() if "alpha" in keys else config.get("lora_alpha", rank)
    factor = lora.scale * (alpha / rank)
    lora.add_product(module, up, down, factor)
    if "up_b" in keys:
        lora.add_difference(module, "up_b", keys["up_b"], factor)
