"""Sizes of the models, from the shapes of their tensors.

Sizes that config.json states must agree with the shapes. Only the transformer's number of heads is in no shape. A
setting that changes the computation to one that sora does not implement is refused by name.
"""

import math
import re

from export.files import ExportError


# Keys that config.json may have, besides those that begin with "_": arguments of WanModel (original repository) and of
# WanTransformer3DModel and AutoencoderKLWan (diffusers). The text encoder's config has many keys that transformers adds
# to every model, so it is checked only by text_encoder_sizes().
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
    """The shape of a tensor. Raises ExportError if it is missing or has another number of dimensions than dims."""
    if name not in part.tensors:
        raise ExportError(f"{part.path}: the {part.title}'s {name} is missing")
    shape = part.tensors[name].shape
    if len(shape) != dims:
        raise ExportError(f"{part.path}: the {part.title}'s {name} has shape {list(shape)}, expected {dims} dimensions")
    return shape


def blocks_in(part):
    """The number of blocks: one more than the largest block number in the names."""
    found = map(re.compile(r"(?:blocks|enc\.blk)\.(\d+)\.").match, part.tensors)
    return 1 + max((int(m[1]) for m in found if m), default=-1)


def check_stated(part, sizes, stated):
    """Raises ExportError unless config.json states the tensors' sizes. stated: {key of config.json: name of the
    size}."""
    for key, size in stated.items():
        value = part.config.get(key)
        if value is not None and value != sizes[size]:
            raise ExportError(f"{part.path}: config.json: {key} is {value}, expected {sizes[size]} by the tensors' "
                              "shapes")


def check_required(part, required):
    """Raises ExportError for a setting that sora does not implement. required: (key, values it implements, what another
    value means)."""
    for key, values, what in required:
        if key in part.config and part.config[key] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise ExportError(f"{part.path}: config.json: {key} is {part.config[key]!r}, expected {expected}: {what} "
                              "cannot be run yet")


def check_known(part, known):
    """Raises ExportError for an unknown setting, since it may change the computation. known: names, separated by
    spaces."""
    for key in part.config.keys() - known.split():
        if not key.startswith("_"):
            raise ExportError(f"{part.path}: config.json: {key} is {part.config[key]!r}: unknown setting")


def stated(part, keys, default, low, high):
    """A number that is in no shape: config.json's value of the first of these keys that it has, else the default.
    Raises ExportError unless it is of the default's type and from low to high. keys: separated by spaces."""
    key, value = next(((k, part.config[k]) for k in keys.split() if k in part.config), (keys, default))
    if type(value) not in (type(default), int) or not low <= value <= high:
        raise ExportError(f"{part.path}: config.json: {key} is {value!r}, expected a number from {low:g} to {high:g}")
    return value


def patch_embedding_shape(part):
    """(dim, in_dim, patch_t, patch_h, patch_w) in every layout. A GGUF folds the two outer dimensions into one. rCM
    stores a linear layer over a patch's numbers; its patch is 1, 2, 2 unless config.json states another."""
    weight, (dim,) = part.tensors.get("patch_embedding.weight"), shape_in(part, "patch_embedding.bias", 1)
    if weight is not None and len(weight.shape) == 4:
        return (dim, weight.shape[0] // dim, *weight.shape[1:])
    if weight is not None and len(weight.shape) == 2:
        patch = part.config.get("patch_size", [1, 2, 2])
        return (dim, weight.shape[1] // math.prod(patch), *patch)
    return shape_in(part, "patch_embedding.weight", 5)


MODEL_TYPES = ("t2v", "ti2v", "i2v")  # text to video; text, and a picture if there is one; a picture and text


def model_type(part, sizes):
    """What the model starts from: one of MODEL_TYPES. An image-to-video model has more input than output channels.
    TI2V-5B's weights are those of a text-to-video model; it alone has 48 channels. A diffusers pipeline states it
    elsewhere (expand_timesteps in model_index.json)."""
    if sizes["in_dim"] != sizes["out_dim"]:
        return "i2v"
    return "ti2v" if sizes["out_dim"] == 48 or part.config.get("model_type") == "ti2v" else "t2v"


def transformer_sizes(part):
    """The arguments of WanModel (wan/modules/model.py). Without config.json the head width is 128, as in every released
    Wan model. Raises ExportError for sizes that do not fit and models that sora cannot run."""
    shape = patch_embedding_shape(part)
    heads = stated(part, "num_heads num_attention_heads", max(shape[0] // 128, 1), 1, 1024)
    if shape[0] % (2 * heads) or shape[0] < 128 and not part.config:
        raise ExportError(f"{part.path}: the width is {shape[0]} with {heads} heads, expected heads of even width "
                          "(128 unless a config.json beside the file states num_heads)")
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
    sizes["model_type"] = model_type(part, sizes)
    check_known(part, KNOWN["transformer"])
    check_required(part, [
        ("_class_name", ("WanTransformer3DModel", "WanModel", "CausalWanTransformer3DModel", "CausalWanModel"),
         "that kind of model"),
        ("model_type", MODEL_TYPES, "that kind of model"),
        ("qk_norm", (True, "rms_norm_across_heads"), "another norm of queries and keys"),
        ("cross_attn_norm", (True,), "a block without it"),
        ("image_dim", (None,), "image conditioning"),
        ("added_kv_proj_dim", (None,), "image conditioning"),
        ("pos_embed_seq_len", (None,), "a learned position embedding"),
        ("window_size", ([-1, -1],), "local attention"),
    ])
    if "i2v" in (sizes["model_type"], part.config.get("model_type")):
        check_stated(part, sizes, {"model_type": "model_type"})
    check_stated(part, sizes | {"head_dim": shape[0] // heads}, {
        "dim": "dim", "in_dim": "in_dim", "in_channels": "in_dim", "out_dim": "out_dim", "out_channels": "out_dim",
        "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "text_dim": "text_dim", "num_layers": "num_layers",
        "attention_head_dim": "head_dim", "patch_size": "patch_size",
    })
    return sizes


def text_encoder_sizes(part):
    """The arguments of T5Encoder (wan/modules/t5.py). The table of position biases gives the number of heads; without
    config.json the largest bucket distance and eps are umT5's. Raises ExportError as transformer_sizes()."""
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


# wan/modules/vae.py, class WanVAE, and vae2_2.py, class Wan2_2_VAE: mean and standard deviation of the released VAEs'
# 16 and 48 latent channels.
LATENTS_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
LATENTS_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


LATENTS_MEAN_48 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667]
LATENTS_STD_48 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]


def vae_sizes(part):
    """The arguments of diffusers' AutoencoderKLWan. Each level of the decoder ends with a resampling layer; the last
    ends with the decoder. Raises ExportError as transformer_sizes()."""
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
    first = shape_in(part, f"decoder.upsamples.{resamplers[0]}.resample.1.weight", 4) if resamplers else (1, 2)
    sizes["is_residual"] = first[0] == first[1]  # Wan 2.1's upsampling halves the channels
    add_statistics(part, sizes)
    check_known(part, KNOWN["vae"])
    check_required(part, [
        ("attn_scales", ([],), "attention inside the VAE's levels"),
    ])
    check_stated(part, sizes, {key: key for key in sizes if not key.startswith("latents_")})
    return sizes


def tiny_sizes(part):
    """The arguments of TAEHV (taehv.py). Raises ExportError for its other variants."""
    if "0.weight" in part.tensors:
        raise ExportError(f"{part.path}: TAEHV's kind \"super\" cannot be run yet, expected taew2_1 or taew2_2")
    names = ("1.weight", "8.weight", "14.weight", "20.weight")
    return {
        "widths": [shape_in(part, name, 4)[0] for name in names],
        "z_dim": shape_in(part, "1.weight", 4)[1],
        "out_channels": shape_in(part, "22.weight", 4)[0],
    }


def add_statistics(part, sizes):
    """Adds mean and standard deviation of each latent channel to sizes: config.json's, else the released VAE's. Raises
    ExportError unless there is one for each channel and deviations are positive."""
    means, deviations = (LATENTS_MEAN_48, LATENTS_STD_48) if sizes["z_dim"] == 48 else (LATENTS_MEAN, LATENTS_STD)
    for key, released in (("latents_mean", means), ("latents_std", deviations)):
        values = part.config.get(key, released)
        if len(values) != sizes["z_dim"]:
            raise ExportError(f"{part.path}: {key} has {len(values)} numbers, expected {sizes['z_dim']}, one for each "
                              "latent channel, in a config.json beside the VAE")
        sizes[key] = [float(v) for v in values]
        if not all(map(math.isfinite, sizes[key])) or key == "latents_std" and min(sizes[key]) <= 0:
            raise ExportError(f"{part.path}: config.json: {key} is {values}, expected finite numbers"
                              f"{' above 0' * (key == 'latents_std')}")
