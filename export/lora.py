"""LoRA: merges low-rank products and differences into the transformer's weights.

    W += scale * (alpha / rank) * up @ down        W += scale * diff
    b += scale * (alpha / rank) * up_b             b += scale * diff_b

in float32, on the weights in torch's layout, some rows at a time, so that neither weights nor LoRA are in memory as a
whole. The keys of ComfyUI, kohya, diffusers, PEFT and DiffSynth are renamed like those of a checkpoint. A key that
matches no tensor is an error unless --lora-skip-unmatched is given. Methods that compute something else are refused by
name.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from export.containers import open_file
from export.files import ExportError, read_json, reading
from export.names import our_name, plain_name
from export.quantised import weights_in
from export.tables import squeezed

# (pattern of a key's end, kind of key). PEFT puts the adapter's name before .weight.
KINDS = [
    (r"\.(?:lora_A|lora_down|lora\.down)(?:\.[\w-]+?)?(?:\.weight)?$", "down"),
    (r"\.(?:lora_B|lora_up|lora\.up)(?:\.[\w-]+?)?\.bias$", "up_b"),
    (r"\.(?:lora_B|lora_up|lora\.up)(?:\.[\w-]+?)?(?:\.weight)?$", "up"),
    (r"\.alpha$", "alpha"),
    (r"\.diff$", "diff"),
    (r"\.diff_b$", "diff_b"),
    (r"\.diff_m$", "diff_m"),
]
FLAT = re.compile(r"lora_(unet|transformer)_+")  # kohya and musubi: after it, dots are underscores

# Methods other than LoRA, recognised by keys or by PEFT's settings.
OTHER_KEYS = [
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA, which scales each row"),
    (r"\.lokr_", "LoKr, a Kronecker product"),
    (r"\.hada_", "LoHa, a Hadamard product"),
    (r"\.b?oft_", "OFT, a rotation"),
    (r"\.lora_mid\b", "LoCon with a core tensor"),
    (r"\.lora_E\b|\.ranknum\b", "AdaLoRA"),
    (r"\.ia3_|\.on_input$", "(IA)^3"),
]
OTHER_SETTINGS = [
    ("use_dora", True, "DoRA, which scales each row"),
    ("init_lora_weights", r"pissa", "PiSSA, which changes the base weights before training"),
    ("init_lora_weights", r"olora|corda|loftq|lora_ga", "LoRA that changes the base weights before training"),
    ("peft_type", r"(?!LORA$)", "another method than LoRA"),
    ("fan_in_fan_out", True, "LoRA of transposed weights"),
    ("target_parameters", True, "LoRA of parameters outside of modules"),
]


@dataclass
class Lora:
    """The changes of one LoRA to the tensors of the transformer."""
    path: Path
    scale: float
    rows: dict   # {name: torch shape} of every tensor of the transformer
    files: list  # paths that were read
    changes: dict = field(default_factory=dict)  # {name: [function (first, last) -> f32 (rows, rest)]}
    note: str = ""  # line for the user

    def add(self, name, shape, change, key):
        """Adds one change to a tensor. shape, key: of the change. Raises ExportError unless the tensor has that
        shape."""
        if squeezed(shape) != squeezed(self.rows[name]):
            raise ExportError(f"{self.path}: {key} has shape {list(shape)}, expected {list(self.rows[name])} as {name}")
        self.changes.setdefault(name, []).append(change)

    def add_difference(self, module, kind, tensor, factor):
        """Adds tensor * factor to the module's weight, bias or modulation, by the kind of key."""
        name = lora_tensor(module, kind)
        self.add(name, tensor.shape, lambda first, last, count=self.rows[name][0]:
                 tensor.matrix(count, first, last) * factor, tensor.key)

    def add_product(self, module, up, down, factor):
        """Adds up (rows, rank) @ down (rank, rest) * factor to the module's weight (rows, rest)."""
        self.add(f"{module}.weight", (up.shape[0], *down.shape[1:]), lambda first, last:
                 up.rows(first, last).flatten(1) @ down.rows().flatten(1) * factor, up.key)


def lora_module(key, rows):
    """(module under the original release's name, kind of key), or None for a key of an unknown style or module. rows:
    {name: torch shape} of the transformer."""
    pattern, kind = next(((p, k) for p, k in KINDS if re.search(p, key)), (None, None))
    if kind is None:
        return None
    module = plain_name(re.sub(pattern, "", key) + ".").removesuffix(".")
    if FLAT.match(module):
        flat = {name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight") for name in rows}
        module = flat.get(FLAT.sub("", module))
    else:
        module = our_name("transformer", module + ".").removesuffix(".")
    return (module, kind) if module and lora_tensor(module, kind) in rows else None


def lora_tensor(module, kind):
    """The name of the tensor that a key of this kind changes."""
    if kind == "diff_m":
        return f"{module}.modulation"
    return f"{module}.bias" if kind in ("diff_b", "up_b") else f"{module}.weight"


def open_lora(option, rows, skip=False, alpha=None):
    """The Lora of an option FILE[:SCALE]. rows: {name: torch shape} of the transformer; skip: leave out and count keys
    that match no tensor; alpha: lora_alpha if there are no settings of PEFT. Raises ExportError for keys, shapes and
    methods that cannot be merged."""
    path, scale = split_option(option)
    file = open_file(path)
    with reading(path):
        modules, left_out = lora_modules(file, rows, skip)
        config, config_files = adapter_config(file, alpha)
        lora = Lora(path, scale, rows, [file.path, *config_files])
        for module, keys in modules.items():
            add_changes(lora, module, keys, config)
    if not lora.changes:
        raise ExportError(f"{path}: no key changes a tensor, expected a LoRA for Wan 2.1's transformer")
    lora.note = f"{path}: {len(file.tensors) - left_out} keys applied to {len(lora.changes)} tensors, scale {scale:g}"
    lora.note += f"; {left_out} keys that match no tensor left out" if left_out else ""
    return lora


def split_option(option):
    """(path, scale) of FILE[:SCALE]. Raises ExportError for a scale that is not a finite number."""
    if Path(option).is_file() or ":" not in option:
        return Path(option), 1.0
    path, _, number = option.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ExportError(f"--lora {option}: {number!r} is not a number, expected FILE or FILE:SCALE")
    return Path(path), scale


def lora_modules(file, rows, skip):
    """({module: {kind of key: tensor}}, number of keys left out) of a LoRA file. Raises ExportError for other methods,
    keys that match no tensor (unless skip), and two keys of one kind."""
    for key in file.tensors:
        for pattern, what in OTHER_KEYS:
            if re.search(pattern, key):
                raise ExportError(f"{file.path}: {what}, cannot be merged ({key})")
    alphas = {k: t for k, t in file.tensors.items() if k.endswith(".alpha")}  # may be integers
    modules, left_out = {}, 0
    for key, tensor in (weights_in({k: t for k, t in file.tensors.items() if k not in alphas}) | alphas).items():
        found = lora_module(key, rows)
        if not found and not skip:
            raise ExportError(f"{file.path}: {key} matches no tensor of the transformer (--lora-skip-unmatched leaves "
                              "such keys out)")
        if not found:
            left_out += 1
            continue
        module, kind = found
        if kind in modules.setdefault(module, {}):
            raise ExportError(f"{file.path}: {key} and {modules[module][kind].key} are the same, expected one of them")
        modules[module][kind] = tensor
    return modules, left_out


def adapter_config(file, alpha):
    """(PEFT's settings of the adapter, [files that state them]). diffusers has them in the file's metadata, PEFT in
    adapter_config.json beside the file; without either, alpha is a recipe's or None. Raises ExportError for missing
    settings and for other methods than LoRA."""
    beside = file.path.parent / "adapter_config.json"
    if "lora_adapter_metadata" in file.metadata:
        config, files = json.loads(file.metadata["lora_adapter_metadata"]), []
    elif any(key.startswith("base_model.model.") for key in file.tensors):
        if not beside.is_file() and not alpha:
            raise ExportError(f"{file.path}: no {beside.name} beside it, expected one, since PEFT states the strength "
                              "there")
        config, files = (read_json(beside), [beside]) if beside.is_file() else ({"lora_alpha": alpha}, [])
    else:
        config, files = {}, []
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    for key, wrong, what in OTHER_SETTINGS:
        value = config.get(key)
        if value and (wrong is True or isinstance(value, str) and re.match(wrong, value)):
            raise ExportError(f"{file.path}: {what}, cannot be merged ({key} is {json.dumps(value)})")
    return config, files


def strength(lora, keys, rank, config):
    """The factor of one module's product, without the option's scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    alpha is that of the file's key, else the module's in PEFT's settings, else the common one there, else rank."""
    module, alpha = plain_name(re.sub(KINDS[0][0], "", keys["down"].key)), config.get("lora_alpha", rank)
    alpha = next((a for pattern, a in (config.get("alpha_pattern") or {}).items()
                  if re.match(rf"(.*\.)?({pattern})$", module)), alpha)
    if "alpha" in keys:
        alpha = keys["alpha"].rows().item()
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ExportError(f"{lora.path}: lora_alpha is {json.dumps(alpha)}, expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def add_changes(lora, module, keys, config):
    """Adds the changes of one module. keys: {kind of key: tensor}; config: PEFT's settings."""
    for kind in ("diff", "diff_b", "diff_m"):
        if kind in keys:
            lora.add_difference(module, kind, keys[kind], lora.scale)
    alone = keys.keys() & {"down", "up", "up_b", "alpha"}
    if not alone:
        return
    if not {"down", "up"} <= keys.keys():
        raise ExportError(f"{lora.path}: {keys[min(alone)].key} is alone, expected both matrices of the product")
    down, up = keys["down"], keys["up"]
    rank = down.shape[0] if down.shape else 0
    if rank == 0:
        raise ExportError(f"{lora.path}: {down.key} has shape {list(down.shape)}, expected a rank above 0")
    if math.prod(up.shape[1:]) != rank:
        raise ExportError(f"{lora.path}: {up.key} has rank {math.prod(up.shape[1:])}, expected {rank} as {down.key}")
    factor = lora.scale * strength(lora, keys, rank, config)
    lora.add_product(module, up, down, factor)
    if "up_b" in keys:
        lora.add_difference(module, "up_b", keys["up_b"], factor)
