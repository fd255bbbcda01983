"""Sizes: what a layout does not state is inferred from shapes, and what it states must agree with them.

Only the head count of the transformer cannot be seen in a shape. Settings that change the computation, and that sora
knows in one way only, are refused by name.
"""

import math
import re

from export.files import ExportError


# What config.json may say, besides names that begin with "_": arguments of WanModel (the original repository's) and of
# WanTransformer3DModel and AutoencoderKLWan (diffusers'). The text encoder's has whatever transformers adds to every
# model; what matters there is required below.
KNOWN = {
    "transformer": "model_type dim in_dim out_dim ffn_dim freq_dim text_dim text_len num_heads num_layers patch_size "
                   "eps window_size qk_norm cross_attn_norm num_attention_heads attention_head_dim in_channels "
                   "out_channels image_dim added_kv_proj_dim rope_max_seq_len pos_embed_seq_len "
                   "local_attn_size sink_size num_frame_per_block num_frames_per_block independent_first_frame",
    "vae": "base_dim decoder_base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample dropout "
           "latents_mean latents_std is_residual in_channels out_channels patch_size scale_factor_temporal "
           "scale_factor_spatial clip_output",
}


def shape_in(part, name, dims):
    """The shape of a tensor from which sizes are inferred."""
    if name not in part.tensors:
        raise ExportError(f"{part.path}: the {part.title}'s {name} is missing")
    shape = part.tensors[name].shape
    if len(shape) != dims:
        raise ExportError(f"{part.path}: the {part.title}'s {name} has shape {list(shape)}, expected {dims} dimensions")
    return shape


def blocks_in(part):
    """How many blocks the names count."""
    found = map(re.compile(r"(?:blocks|enc\.blk)\.(\d+)\.").match, part.tensors)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def check_stated(part, sizes, stated):
    """Sizes that config.json states must be those of the tensors. stated: {key of a config: size}."""
    for key, size in stated.items():
        value = part.config.get(key)
        if value is not None and value != sizes[size]:
            raise ExportError(f"{part.path}: config.json: {key} is {value}, but the tensors say {sizes[size]}")


def check_required(part, required):
    """Settings that sora computes in one way only. required: (key, the values that mean this way, what else)."""
    for key, values, what in required:
        if key in part.config and part.config[key] not in values:
            raise ExportError(f"{part.path}: config.json: {key} is {part.config[key]!r}: {what} cannot be run yet")


def check_known(part, known):
    """A setting that nobody here has heard of may change what is computed. known: names, as one text."""
    for key in part.config.keys() - known.split():
        if not key.startswith("_"):
            raise ExportError(f"{part.path}: config.json: {key} is {part.config[key]!r}: that setting is not known")


def stated(part, keys, default, low, high):
    """A number that no shape shows: what config.json states under one of these keys, of the default's kind and from
    low to high; else the default."""
    key, value = next(((k, part.config[k]) for k in keys.split() if k in part.config), (keys, default))
    if type(value) not in (type(default), int) or not low <= value <= high:
        raise ExportError(f"{part.path}: config.json: {key} is {value!r}, expected a number from {low:g} to {high:g}")
    return value


def patch_embedding_shape(part):
    """[dim, in_dim, patch_t, patch_h, patch_w], however the layout has it: a GGUF folds the two outer dimensions into
    one, rCM stores a linear over a patch's numbers, whose sizes only a config states where they are no 1, 2, 2."""
    weight, (dim,) = part.tensors.get("patch_embedding.weight"), shape_in(part, "patch_embedding.bias", 1)
    if weight is not None and len(weight.shape) == 4:
        return (dim, weight.shape[0] // dim, *weight.shape[1:])
    if weight is not None and len(weight.shape) == 2:
        patch = part.config.get("patch_size", [1, 2, 2])
        return (dim, weight.shape[1] // math.prod(patch), *patch)
    return shape_in(part, "patch_embedding.weight", 5)


def transformer_sizes(part):
    """wan/modules/model.py's arguments. Without a config the head width is 128, as in every released Wan model."""
    shape = patch_embedding_shape(part)
    heads = stated(part, "num_heads num_attention_heads", max(shape[0] // 128, 1), 1, 1024)
    if shape[0] % (2 * heads) or shape[0] < 128 and not part.config:
        raise ExportError(f"{part.path}: a width of {shape[0]} is not {heads} heads of even width "
                          "(without a config.json that states num_heads, heads are 128 wide)")
    sizes = {
        "dim": shape[0],
        "in_dim": shape[1],
        "out_dim": shape_in(part, "head.head.weight", 2)[0] // math.prod(shape[2:]),
        "patch_size": list(shape[2:]),
        "text_dim": shape_in(part, "text_embedding.0.weight", 2)[1],
        "text_len": stated(part, "text_len", 512, 1, 4096),
        "freq_dim": shape_in(part, "time_embedding.0.weight", 2)[1],
        "ffn_dim": shape_in(part, "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": blocks_in(part),
        "num_heads": heads,
        "eps": stated(part, "eps", 1e-6, 0, 1),
    }
    if sizes["in_dim"] != sizes["out_dim"]:
        raise ExportError(f"{part.path}: {sizes['in_dim']} latent channels in, {sizes['out_dim']} out: a model "
                          "conditioned on images or other latents cannot be run yet")
    check_known(part, KNOWN["transformer"])
    check_required(part, [
        ("_class_name", ("WanTransformer3DModel", "WanModel", "CausalWanTransformer3DModel", "CausalWanModel"),
         "that kind of model"),
        ("model_type", ("t2v",), "that kind of model"),
        ("qk_norm", (True, "rms_norm_across_heads"), "another norm of queries and keys"),
        ("cross_attn_norm", (True,), "a block without it"),
        ("image_dim", (None,), "image conditioning"),
        ("added_kv_proj_dim", (None,), "image conditioning"),
        ("pos_embed_seq_len", (None,), "a learned position embedding"),
        ("window_size", ([-1, -1],), "local attention"),
    ])
    check_stated(part, sizes | {"head_dim": shape[0] // heads}, {
        "dim": "dim", "in_dim": "in_dim", "in_channels": "in_dim", "out_dim": "out_dim", "out_channels": "out_dim",
        "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "text_dim": "text_dim", "num_layers": "num_layers",
        "attention_head_dim": "head_dim", "patch_size": "patch_size",
    })
    return sizes


def text_encoder_sizes(part):
    """wan/modules/t5.py's arguments. The position table tells the heads; bucket distance and eps are umT5's."""
    vocab_size, dim = shape_in(part, "token_embd.weight", 2)
    num_buckets, num_heads = shape_in(part, "enc.blk.0.attn_rel_b.weight", 2)
    inner = shape_in(part, "enc.blk.0.attn_q.weight", 2)[0]
    sizes = {
        "vocab_size": vocab_size,
        "dim": dim,
        "ffn_dim": shape_in(part, "enc.blk.0.ffn_up.weight", 2)[0],
        "num_layers": blocks_in(part),
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "num_buckets": num_buckets,
        "max_distance": stated(part, "relative_attention_max_distance", 128, 1, 65536),
        "eps": stated(part, "layer_norm_epsilon", 1e-6, 0, 1),
    }
    check_required(part, [
        ("model_type", ("umt5",), "another text encoder"),
        ("feed_forward_proj", ("gated-gelu",), "another feed-forward"),
        ("dense_act_fn", ("gelu_new",), "another activation"),
    ])
    check_stated(part, sizes, {
        "vocab_size": "vocab_size", "d_model": "dim", "d_ff": "ffn_dim", "d_kv": "head_dim", "num_heads": "num_heads",
        "num_layers": "num_layers", "relative_attention_num_buckets": "num_buckets",
    })
    return sizes


# wan/modules/vae.py, class WanVAE: the statistics of the released VAE's 16 latent channels.
LATENTS_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
LATENTS_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


def vae_sizes(part):
    """AutoencoderKLWan's arguments. The decoder's levels end where it resamples, the last one where it ends."""
    numbers = {int(m[1]) for m in map(re.compile(r"decoder\.upsamples\.(\d+)\.").match, part.tensors) if m}
    resamplers = sorted(i for i in numbers if f"decoder.upsamples.{i}.resample.1.weight" in part.tensors)
    blocks = (resamplers[0] if resamplers else len(numbers)) - 1
    sizes = {
        "z_dim": shape_in(part, "conv2.weight", 5)[0],
        "base_dim": shape_in(part, "encoder.conv1.weight", 5)[0],
        "in_channels": shape_in(part, "encoder.conv1.weight", 5)[1],
        "out_channels": shape_in(part, "decoder.head.2.weight", 5)[0],
        "num_res_blocks": blocks,
        "temperal_downsample": [int(f"decoder.upsamples.{i}.time_conv.weight" in part.tensors)
                                for i in reversed(resamplers)],
    }
    widths = [shape_in(part, f"encoder.downsamples.{level * (blocks + 1)}.residual.2.weight", 5)[0]
              for level in range(len(resamplers) + 1)]
    sizes["dim_mult"] = [width // sizes["base_dim"] for width in widths]
    top = shape_in(part, "decoder.conv1.weight", 5)[0]
    sizes["decoder_base_dim"] = top // max(sizes["dim_mult"][-1], 1)
    sizes["patch_size"] = math.isqrt(sizes["out_channels"] // 3)
    add_statistics(part, sizes)
    check_known(part, KNOWN["vae"])
    check_required(part, [
        ("is_residual", (False,), "Wan 2.2's residual VAE"),
        ("attn_scales", ([],), "attention inside the VAE's levels"),
    ])
    check_stated(part, sizes, {key: key for key in sizes if not key.startswith("latents_")})
    return sizes


def add_statistics(part, sizes):
    """Mean and deviation of each latent channel: as stated, or the released VAE's where the channels are as many."""
    for key, released in (("latents_mean", LATENTS_MEAN), ("latents_std", LATENTS_STD)):
        values = part.config.get(key, released)
        if len(values) != sizes["z_dim"]:
            raise ExportError(f"{part.path}: {key} is not known for {sizes['z_dim']} latent channels: a config.json "
                              "that states it must lie beside the VAE")
        sizes[key] = [float(v) for v in values]
        if not all(map(math.isfinite, sizes[key])) or key == "latents_std" and min(sizes[key]) <= 0:
            raise ExportError(f"{part.path}: config.json: {key} is {values}, which is no mean or deviation")
