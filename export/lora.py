"""LoRA: low-rank products and differences that others trained, merged into the transformer's weights.

    W += scale * (alpha / rank) * up @ down        b += scale * diff_b        W += scale * diff

in float32, on the weights as torch lays them out. Three styles of keys are in use (ComfyUI's, kohya's, diffusers');
all are renamed as the checkpoint's own keys are. A key that matches no tensor is an error.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from export.files import ExportError, open_file, reading
from export.names import our_name, plain_name
from export.tables import squeezed

LORA_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
LORA_SUFFIXES = {".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
                 ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
                 ".lora_B.bias": "diff_b", ".alpha": "alpha",
                 ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m"}


@dataclass
class Lora:
    """What one LoRA adds: for each tensor, by our name, low-rank products and differences."""
    path: Path
    scale: float
    rows: dict     # name -> torch shape, of every tensor of the transformer
    changes: dict  # name -> list of functions (first row, last row) -> f32 (rows, rest), in torch's layout

    def add(self, name, shape, change, key):
        """One change of a tensor that must have this shape."""
        if squeezed(shape) != squeezed(self.rows[name]):
            raise ExportError(f"{self.path}: {key} has shape {list(shape)}, but {name} has {list(self.rows[name])}")
        self.changes.setdefault(name, []).append(change)


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
    return f"{module}.bias" if kind == "diff_b" else f"{module}.weight"


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
    modules = {}
    for key, tensor in file.tensors.items():
        found = lora_module(key, rows)
        if not found or lora_tensor(*found) not in rows:
            raise ExportError(f"{path}: {key} matches no tensor of the transformer")
        if found[1] in modules.setdefault(found[0], {}):
            raise ExportError(f"{path}: {key} stands for the same as {modules[found[0]][found[1]].key}")
        modules[found[0]][found[1]] = tensor
    alpha = peft_alpha(file)
    lora = Lora(Path(path), scale, rows, {})
    for module, keys in modules.items():
        add_differences(lora, module, keys)
        add_product(lora, module, keys, alpha)
    if not lora.changes:
        raise ExportError(f"{path}: changes nothing")
    print(f"{path}: {len(file.tensors)} keys applied to {len(lora.changes)} tensors, scale {scale:g}",
          file=sys.stderr)
    return lora


def peft_alpha(file):
    """lora_alpha as diffusers keeps it in the file's metadata; None where it says nothing: alpha is then the rank."""
    with reading(file.path):
        config = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    for key in ("use_dora", "use_rslora", "alpha_pattern"):
        if config.get(f"transformer.{key}", config.get(key)):
            raise ExportError(f"{file.path}: {key} is not supported")
    return config.get("transformer.lora_alpha", config.get("lora_alpha"))


def add_differences(lora, module, keys):
    """The keys that hold a difference of the module's weight, bias or modulation."""
    for kind in keys.keys() & {"diff", "diff_b", "diff_m"}:
        name, values = lora_tensor(module, kind), lora.scale * keys[kind].rows()
        lora.add(name, values.shape, lambda first, last, values=values, rows=lora.rows[name][0]:
                 values.reshape(rows, -1)[first:last], keys[kind].key)


def add_product(lora, module, keys, default_alpha):
    """The keys that hold a low-rank product: up (rows, rank) @ down (rank, rest), added to a weight (rows, rest)."""
    alone = keys.keys() & {"down", "up", "alpha"}
    if not alone:
        return
    if not {"down", "up"} <= keys.keys():
        raise ExportError(f"{lora.path}: {keys[min(alone)].key} has no counterpart")
    down, up = keys["down"].rows(), keys["up"].rows().flatten(1)
    if up.shape[1] != down.shape[0]:
        raise ExportError(f"{lora.path}: {keys['up'].key} has rank {up.shape[1]}, {keys['down'].key} has "
                          f"{down.shape[0]}")
    alpha = keys["alpha"].rows().item() if "alpha" in keys else default_alpha
    factor = lora.scale * (1.0 if alpha is None else alpha / down.shape[0])
    lora.add(f"{module}.weight", (up.shape[0], *down.shape[1:]),
             lambda first, last: (up[first:last] @ down.flatten(1)) * factor, keys["up"].key)
