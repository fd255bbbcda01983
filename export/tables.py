"""Tables: the tensors of each model, and the rule for the type in which each is stored.

A row is (name, shape, type rule). A shape is written with the names of sizes in upstream's configurations, such as
"ffn_dim dim". # stands for a block's number. Rows are in order of use, which is their order in the file.
"""

import math

# Type rules:
#   EXACT   always f32: vectors, modulation, position biases
#   KEPT    f32, or the 16-bit type of the checkpoint: the time embedding, as in diffusers
#   CONV    as KEPT: the VAE's convolutions
#   WIDE    --type, but at least 16 bits: the transformer's first and last layers
#   MATRIX  --type
EXACT, KEPT, CONV, WIDE, MATRIX = "exact", "kept", "conv", "wide", "matrix"

TRANSFORMER = [
    ("patch_embedding.weight", "dim in_dim patch_size", WIDE),
    ("patch_embedding.bias", "dim", EXACT),
    ("text_embedding.0.weight", "dim text_dim", WIDE),
    ("text_embedding.0.bias", "dim", EXACT),
    ("text_embedding.2.weight", "dim dim", WIDE),
    ("text_embedding.2.bias", "dim", EXACT),
    ("time_embedding.0.weight", "dim freq_dim", KEPT),
    ("time_embedding.0.bias", "dim", EXACT),
    ("time_embedding.2.weight", "dim dim", KEPT),
    ("time_embedding.2.bias", "dim", EXACT),
    ("time_projection.1.weight", "6*dim dim", WIDE),
    ("time_projection.1.bias", "6*dim", EXACT),
    ("blocks.#.modulation", "6 dim", EXACT),
    *((f"blocks.#.{attn}.{row}", shape, rule) for attn in ("self_attn", "cross_attn") for row, shape, rule in (
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
    ("head.head.weight", "patch_size*out_dim dim", WIDE),
    ("head.head.bias", "patch_size*out_dim", EXACT),
]

TEXT_ENCODER = [
    ("token_embd.weight", "vocab_size dim", MATRIX),
    ("enc.blk.#.attn_norm.weight", "dim", EXACT),
    ("enc.blk.#.attn_q.weight", "num_heads*head_dim dim", MATRIX),
    ("enc.blk.#.attn_k.weight", "num_heads*head_dim dim", MATRIX),
    ("enc.blk.#.attn_v.weight", "num_heads*head_dim dim", MATRIX),
    ("enc.blk.#.attn_o.weight", "dim num_heads*head_dim", MATRIX),
    ("enc.blk.#.attn_rel_b.weight", "num_buckets num_heads", EXACT),
    ("enc.blk.#.ffn_norm.weight", "dim", EXACT),
    ("enc.blk.#.ffn_gate.weight", "ffn_dim dim", MATRIX),
    ("enc.blk.#.ffn_up.weight", "ffn_dim dim", MATRIX),
    ("enc.blk.#.ffn_down.weight", "dim ffn_dim", MATRIX),
    ("enc.output_norm.weight", "dim", EXACT),
]

# The VAE's tables describe modules; vae_rows() puts them together level by level. i, o: input and output channels.
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
HEAD = [("0.gamma", "i"), ("2.weight", "o i 3 3 3"), ("2.bias", "o")]
CONV_3 = [("weight", "o i 3 3 3"), ("bias", "o")]
CONV_1 = [("weight", "o i 1 1 1"), ("bias", "o")]


# The tiny decoder (TAEHV) describes modules, too; tiny_rows() puts them together.
MEMORY = [
    ("conv.0.weight", "i i 2 3 3"),  # over the frame before and this one
    ("conv.0.bias", "i"),
    ("conv.2.weight", "i i 1 3 3"),
    ("conv.2.bias", "i"),
    ("conv.4.weight", "i i 1 3 3"),
    ("conv.4.bias", "i"),
]
GROW = [("conv.weight", "t i 1 1 1")]
CONV_2D = [("weight", "o i 1 3 3"), ("bias", "o")]


def shape_of(text, sizes):
    """The tuple of numbers for a shape of the tables such as "6*dim dim". patch_size is three numbers; in a product it
    is their product. sizes: {name: number or list}."""
    shape = []
    for term in text.split():
        factors = [int(f) if f.isdigit() else sizes[f] for f in term.split("*")]
        numbers = [n for f in factors for n in (f if isinstance(f, list) else [f])]
        shape += numbers if len(factors) == 1 else [math.prod(numbers)]
    return tuple(shape)


def squeezed(shape):
    """A shape without its ones. torch pads norms and modulation with ones."""
    return tuple(n for n in shape if n != 1)


def block_rows(table, sizes):
    """Yields (name, shape, rule) of every tensor of a transformer or text encoder, in order of use."""
    split = [i for i, row in enumerate(table) if "#" in row[0]]
    for name, shape, rule in table[:split[0]]:
        yield name, shape_of(shape, sizes), rule
    for block in range(sizes["num_layers"]):
        for name, shape, rule in table[split[0]:split[-1] + 1]:
            yield name.replace("#", str(block)), shape_of(shape, sizes), rule
    for name, shape, rule in table[split[-1] + 1:]:
        yield name, shape_of(shape, sizes), rule


def module(prefix, table, i, o=None, t=None):
    """Yields (name, shape, rule) of a module's tensors. i, o, t: the letters of its shapes."""
    for name, shape in table:
        numbers = shape_of(shape, {"i": i, "o": o, "t": t})
        yield f"{prefix}.{name}", numbers, CONV if len(numbers) > 1 else EXACT


def tiny_rows(sizes):
    """Yields (name, shape, rule) of every tensor of the tiny decoder, in order of use: the decoder of taehv.py, whose
    modules are numbered with activations and upsamplings."""
    widths, index = sizes["widths"], 3
    yield from module("1", CONV_2D, sizes["z_dim"], widths[0])
    for level, (i, o) in enumerate(zip(widths, widths[1:])):
        for block in range(3):
            yield from module(str(index + block), MEMORY, i)
        yield from module(str(index + 4), GROW, i, t=2 * i if level else i)
        yield from module(str(index + 5), CONV_2D[:1], i, o)
        index += 6
    yield from module(str(index + 1), CONV_2D, widths[-1], sizes["out_channels"])


def vae_rows(sizes):
    """Yields (name, shape, rule) of every tensor of the VAE, in order of use: Encoder3d and Decoder3d of
    wan/modules/vae.py."""
    z, blocks, temporal = sizes["z_dim"], sizes["num_res_blocks"], sizes["temperal_downsample"]
    encoder_dims = [sizes["base_dim"] * m for m in sizes["dim_mult"]]
    decoder_dims = [sizes["decoder_base_dim"] * m for m in sizes["dim_mult"]]

    def residual(prefix, i, o):
        yield from module(prefix, RESIDUAL + (SHORTCUT if i != o else []), i, o)

    def middle(prefix, width):
        yield from residual(f"{prefix}.0", width, width)
        yield from module(f"{prefix}.1", ATTENTION, width)
        yield from residual(f"{prefix}.2", width, width)

    width, index = sizes["base_dim"], 0
    yield from module("encoder.conv1", CONV_3, sizes["in_channels"], width)
    for level, out in enumerate(encoder_dims):
        for block in range(blocks):
            yield from residual(f"encoder.downsamples.{index}", width, out)
            width, index = out, index + 1
        if level < len(temporal):
            yield from module(f"encoder.downsamples.{index}", RESAMPLE, width, width)
            if temporal[level]:
                yield from module(f"encoder.downsamples.{index}", TIME_CONV, width, t=width)
            index += 1
    yield from middle("encoder.middle", width)
    yield from module("encoder.head", HEAD, width, 2 * z)
    yield from module("conv1", CONV_1, 2 * z, 2 * z)
    yield from module("conv2", CONV_1, z, z)

    width, index = decoder_dims[-1], 0
    yield from module("decoder.conv1", CONV_3, z, width)
    yield from middle("decoder.middle", width)
    for level, out in reversed(list(enumerate(decoder_dims))):
        for block in range(blocks + 1):
            yield from residual(f"decoder.upsamples.{index}", width, out)
            width, index = out, index + 1
        if level > 0:
            narrower = width if sizes["is_residual"] else width // 2
            yield from module(f"decoder.upsamples.{index}", RESAMPLE, width, narrower)
            if temporal[level - 1]:
                yield from module(f"decoder.upsamples.{index}", TIME_CONV, width, t=2 * width)
            width, index = narrower, index + 1
    yield from module("decoder.head", HEAD, width, sizes["out_channels"])
