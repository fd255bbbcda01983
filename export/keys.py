"""Keys: the weight file's keys for the sizes of its models. One table serves to write a file and to read it
again.

The names are llama.cpp's for the text encoder, the original release's arguments for the transformer, and diffusers' for
the VAE.
"""

from export.files import ExportError

FORMAT_VERSION = 1

# {part: {key of the weight file: name of the size in sizes.py}}
SIZES = {
    "transformer": {
        **{f"wan.{size}": size for size in ("model_type", "dim", "ffn_dim", "freq_dim", "in_dim", "out_dim",
                                            "num_heads", "num_layers", "text_len", "text_dim", "patch_size", "eps")},
        "t5encoder.context_length": "text_len",
    },
    "text_encoder": {
        "t5encoder.block_count": "num_layers",
        "t5encoder.embedding_length": "dim",
        "t5encoder.feed_forward_length": "ffn_dim",
        "t5encoder.vocab_size": "vocab_size",
        "t5encoder.attention.head_count": "num_heads",
        "t5encoder.attention.key_length": "head_dim",
        "t5encoder.attention.relative_buckets_count": "num_buckets",
        "t5encoder.attention.relative_max_distance": "max_distance",
        "t5encoder.attention.layer_norm_rms_epsilon": "eps",
    },
    "vae": {f"vae.{size}": size for size in ("z_dim", "base_dim", "decoder_base_dim", "dim_mult", "num_res_blocks",
                                             "in_channels", "out_channels", "patch_size", "temperal_downsample",
                                             "is_residual",
                                             "latents_mean", "latents_std")},
    "vae_tiny": {"vae.tiny.widths": "widths", "vae.z_dim": "z_dim", "vae.out_channels": "out_channels"},
}

SIZES["transformer_2"] = SIZES["transformer"]  # two experts have the same sizes

# What files of earlier versions do not state.
ASSUMED = {"vae.is_residual": False}

# Keys with the same value in every weight file.
FIXED = {
    "general.quantization_version": 2,
    "sora.format_version": FORMAT_VERSION,
    "wan.qk_norm": True,
    "wan.cross_attn_norm": True,
    "wan.patch_embedding_layout": "O,I,T,Y,X",
    "vae.conv_layout": "O,T,Y,X,I",
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": True,
}


def model_keys(parts):
    """{key: value} of all sizes."""
    return {key: part.sizes[size] for part in parts for key, size in SIZES[part.name].items()}


def stated_sizes(part, file):
    """{size: value} of a part, from the keys of a weight file. file: its reader. Raises ExportError for a missing key
    or another format."""
    for key, value in FIXED.items():
        if file.keys.get(key, value) != value:
            raise ExportError(f"{file.path}: {key} is {file.keys[key]!r}, expected {value!r}")
    keys = ASSUMED | file.keys
    if missing := [key for key in SIZES[part] if key not in keys]:
        raise ExportError(f"{file.path}: the key {missing[0]} is missing")
    return {size: keys[key] for key, size in SIZES[part].items()}
