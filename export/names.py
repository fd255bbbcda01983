"""Names: renames the keys of every layout to the names of the weight file.

The weight file has the original release's names for the transformer and the VAE, and llama.cpp's t5encoder names for
the text encoder. RENAMES lists (pattern, replacement) for each part: the inverse of the converters that made the other
layouts. UNSUPPORTED lists keys of models that sora cannot run.

Pitfalls: diffusers swaps norm2 and norm3 of the transformer's blocks. It numbers the decoder's blocks within each
level; the original release numbers them through all levels.
"""

import re

from export.files import ExportError

# Prefixes of ComfyUI, trainers, PEFT and DiffSynth, in any order and number.
PREFIX = re.compile(r"^((model|diffusion_model|transformer|module|net|generator|unet|dit|pipe|base_model)\.)+")
WRAPPER = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")  # anywhere in a key
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"  # transformers' two names for one tensor

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
    "vae_tiny": [(r"^decoder\.", "")],
}

RENAMES["transformer_2"] = RENAMES["transformer"]

# (pattern of a key, the model that has it): models that sora cannot run yet. The first that matches a key counts.
UNSUPPORTED = [
    (r"\bemb_pos$|\bpos_embed$", "a first-and-last-frame model (CLIP image encoder)"),
    (r"^vace_", "a VACE model"),
    (r"\bmotion_encoder\.|\bface_adapter\.|\bface_encoder\.|\bpose_patch_embedding\.", "a Wan-Animate model"),
    (r"\bcasual_audio_encoder\.|\baudio_injector\.|\bcond_encoder\.|\bframe_packer\.|\baudio_proj\.|"
     r"\baudio_cross_attn\.",
     "a model of speech or sound (Wan-S2V and others)"),
    (r"\bcontrol_adapter\.|\bref_conv\.|\bcam_encoder\.", "a model of cameras or controls (Wan-Fun and others)"),
    (r"\bimg_emb\.|\.[kv]_img\.|image_embedder|\.add_[kv]_proj\.|norm_added_[kqv]\.|norm_k_img\.",
     "an image-to-video model (CLIP image encoder)"),
]

# {part: what of it is left out}. FastWan's gate belongs to sparse attention; attention is dense here.
UNUSED = {"transformer": re.compile(r"\.to_gate_compress\."), "vae_tiny": re.compile(r"^encoder\.")}

# Names of Wan 2.2 A14B's two experts. The tensors of T2V's have the same names and shapes as Wan 2.1's 14B.
EXPERT = re.compile(r"(high|low)[-_ ]?noise|transformer_2|wan2[._]2|a14b", re.IGNORECASE)
HIGH, LOW = (re.compile(rf"(?<![a-z]){word}(?![a-z])", re.IGNORECASE) for word in ("high", "low"))


def plain_name(key):
    """A key without the prefixes and wrappers of trainers and repackagers."""
    return PREFIX.sub("", WRAPPER.sub("", key))


def our_name(part, name):
    """The weight file's name for a plain name of any layout. part: a key of RENAMES."""
    for pattern, replacement in RENAMES[part]:
        name = re.sub(pattern, replacement, name)
    return name


def count_upsamples(names):
    """Renames what is numbered level by level to decoder.upsamples.N and encoder.downsamples.N, numbered through all
    levels as in Wan 2.1's original release. Other names stay. Level by level are diffusers'
    decoder.up_blocks.LEVEL.{resnets.R, upsamplers.0}, in Wan 2.2's VAE also its encoder (down_blocks, downsampler),
    and the original release of that one (decoder.upsamples.LEVEL.upsamples.R, in which the last R is the
    resampling layer)."""
    for half, way in (("decoder", "up"), ("encoder", "down")):
        pattern = re.compile(rf"{half}\.{way}(?:_block|sample)s\.(\d+)\.(resnets|{way}samples|{way}samplers?)\."
                             r"(?:(\d+)\.)?")
        found = [m for m in map(pattern.match, names) if m]
        resnets = 1 + max((int(m[3]) for m in found if m[2] == "resnets"), default=-2)
        level = max([resnets + 1, *(int(m[3]) + 1 for m in found if m[2] == f"{way}samples")])

        def count(m):
            within = resnets if "sampler" in m[2] else int(m[3])
            return f"{half}.{way}samples.{int(m[1]) * level + within}."

        names = [pattern.sub(count, n) for n in names]
    return names


def refuse_unsupported(path, keys):
    """Raises ExportError if one of a file's keys belongs to a model that sora cannot run."""
    for pattern, what in UNSUPPORTED:
        for key in keys:
            if re.search(pattern, plain_name(key)):
                raise ExportError(f"{path}: {what} cannot be run yet ({key})")
