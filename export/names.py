"""Names: the keys of every layout that users have on disk, renamed to the ones that sora knows.

Those are the original release's for the transformer and the VAE, and llama.cpp's t5encoder for the text encoder. Each
part has a list of (pattern, replacement), the inverse of the converter that made the other layouts. What sora cannot
run is recognised here, by the keys that give it away, and refused by name; an fp8 weight is tied to its scale.

Pitfalls: diffusers swaps norm2 and norm3 of the transformer's blocks, and counts the decoder's blocks by level where
the original counts them through; fp8 without its scale loads as well as with it, and gives a white picture.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from export.files import ExportError, Gguf, open_file, read_json, weight_files

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
    "text_encoder": [  # the original release, then transformers' UMT5EncoderModel, to llama.cpp's t5encoder
        (r"^(token_embedding|shared|encoder\.embed_tokens)\.", r"token_embd."),
        (r"^(norm|encoder\.final_layer_norm)\.", r"enc.output_norm."),
        (r"^(blocks|encoder\.block)\.", r"enc.blk."),
        (r"\.(norm1|layer\.0\.layer_norm)\.", r".attn_norm."),
        (r"\.(norm2|layer\.1\.layer_norm)\.", r".ffn_norm."),
        (r"\.(pos_embedding\.embedding|layer\.0\.SelfAttention\.relative_attention_bias)\.", r".attn_rel_b."),
        (r"\.(?:attn|layer\.0\.SelfAttention)\.([qkvo])\.", r".attn_\1."),
        (r"\.(ffn\.gate\.0|layer\.1\.DenseReluDense\.wi_0)\.", r".ffn_gate."),
        (r"\.(ffn\.fc1|layer\.1\.DenseReluDense\.wi_1)\.", r".ffn_up."),
        (r"\.(ffn\.fc2|layer\.1\.DenseReluDense\.wo)\.", r".ffn_down."),
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

# Keys that carry no weight of the model: ComfyUI's markers, and scales of activations in fp8 products.
IGNORED = re.compile(r"(^|\.)(scaled_fp8|spiece_model|comfy_quant|scale_input|input_scale)$")
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"  # two names that transformers has for one tensor
SCALES = (".scale_weight", ".weight_scale")
FLOATS = ("F64", "F32", "F16", "BF16")

# What sora cannot run yet, by the keys that give it away.
UNSUPPORTED = [
    (r"\bimg_emb\.|\.[kv]_img\.|image_embedder|\.add_[kv]_proj\.", "an image-to-video model (CLIP image encoder)"),
    (r"^vace_", "a VACE model"),
    (r"\bmotion_encoder\.|\bface_adapter\.", "a Wan-Animate model"),
    (r"\.to_gate_compress\.", "FastWan (its sparse attention's gate)"),
    (r"avg_shortcut|samples\.\d+\.(down|up)samples\.|down_blocks\.\d+\.resnets|\.(down|up)sampler\.",
     "Wan 2.2's residual VAE (TI2V-5B)"),
]

# Names of one of Wan 2.2 A14B's two experts, which has the tensors of Wan 2.1's 14B.
EXPERT = re.compile(r"(high|low)[-_ ]?noise|transformer_2|wan2[._]2|a14b", re.IGNORECASE)

# A key that the part's own config.json always has.
CONFIG_MARKS = {"transformer": "ffn_dim", "text_encoder": "d_model", "vae": "z_dim"}


def plain_name(key):
    """A key without the prefixes and wrappers that trainers and repackagers put around it."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key[len(prefix):]
    return key


def our_name(part, name):
    """Our name of a plain name in any layout."""
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
    """One of the three models: its tensors by our names, and what its config.json states."""
    name: str
    path: Path
    tensors: dict
    config: dict
    files: list

    @property
    def title(self):
        return self.name.replace("_", " ")

    @property
    def opened(self):
        """The files that its tensors are in."""
        return {t.file for t in self.tensors.values()}


def open_part(name, path, pattern="*"):
    """Opens the files of one part and renames their tensors; refuses what sora cannot run, by name."""
    expert = EXPERT.search("/".join(path.absolute().parts[-2:])) if name == "transformer" else None
    if expert:
        raise ExportError(f"{path}: Wan 2.2 A14B (two experts) cannot be run yet ({expert[0]})")
    paths = weight_files(path, pattern)
    stored = {}
    for file in map(open_file, paths):
        for key, tensor in file.tensors.items():
            if key in stored:
                raise ExportError(f"{file.path}: {key} is also in {stored[key].file.path}")
            refuse_unsupported(file.path, key)
            stored[key] = tensor
    config_path = paths[0].parent / "config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if CONFIG_MARKS[name] not in config:  # an original release folder has one config.json, the transformer's
        config = {}
    return Part(name, path, rename(name, weights_in(stored)), config, paths + ([config_path] if config else []))


def refuse_unsupported(path, key):
    """An error that names the model, where the key is one that only a model has which sora cannot run."""
    for pattern, what in UNSUPPORTED:
        if re.search(pattern, plain_name(key)):
            raise ExportError(f"{path}: {what} cannot be run yet ({key})")


def weights_in(stored):
    """The tensors that are weights, each fp8 one tied to its scale: without it, it is an error."""
    scales = {k: t for k, t in stored.items() if k.endswith(SCALES)}
    weights = {k: t for k, t in stored.items() if k not in scales and not IGNORED.search(k)}
    if SHARED in weights:
        weights.pop(TIED, None)
    for key, tensor in weights.items():
        module = key.removesuffix(".weight")
        tensor.scale = next((scales.pop(module + s) for s in SCALES if module + s in scales), None)
        check_stored(key, tensor, module)
    if scales:
        key, tensor = next(iter(scales.items()))
        raise ExportError(f"{tensor.file.path}: {key} scales no tensor")
    return weights


def check_stored(key, tensor, module):
    """A tensor must be stored in a way that is known to be readable as numbers."""
    fp8 = tensor.dtype.startswith("F8")
    if fp8 and tensor.scale is None:
        raise ExportError(f"{tensor.file.path}: {key} is fp8 without its scale ({module}.scale_weight)")
    if not fp8 and (tensor.scale or tensor.dtype not in FLOATS and not isinstance(tensor.file, Gguf)):
        raise ExportError(f"{tensor.file.path}: {key} is {tensor.dtype}{' with a scale' if tensor.scale else ''}, "
                          "which is no known way to store weights")
    if fp8 and math.prod(tensor.scale.shape) not in (1, tensor.shape[0]):
        raise ExportError(f"{tensor.file.path}: {tensor.scale.key} has shape {list(tensor.scale.shape)}, expected one "
                          f"value, or one for each of {tensor.shape[0]} rows")


def rename(part, weights):
    """Tensors by our names; two keys for one tensor are an error."""
    plain = [plain_name(key) for key in weights]
    tensors = {}
    for name, tensor in zip(count_upsamples(plain) if part == "vae" else plain, weights.values()):
        name = our_name(part, name)
        if name in tensors:
            raise ExportError(f"{tensor.file.path}: {tensor.key} and {tensors[name].key} are both {name}")
        tensors[name] = tensor
    return tensors
