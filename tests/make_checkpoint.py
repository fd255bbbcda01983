#!/usr/bin/env python3
"""Makes a Wan checkpoint with random weights, in the layout of a released one.

    python tests/make_checkpoint.py small FOLDER [--layout diffusers|original] [--dtype f32|f16|bf16] [--seed N]
    python tests/make_checkpoint.py wan2.1-t2v-1.3b FOLDER --dtype bf16 [--blocks N]

The shapes come from the classes of diffusers and transformers, on the meta device, which needs no memory. Weights are
scaled so that activations neither vanish nor explode. They are drawn and written some rows at a time, so little memory
is needed. The tokenizer is a small sentencepiece model that is trained here, unless --tokenizer gives one.
"""

import argparse
import io
import json
import math
import re
import shutil
import struct
import sys
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from transformers import UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from export.names import count_upsamples, our_name  # noqa: E402

SLICE = 1 << 25  # elements drawn at a time
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Differences from the defaults of UMT5Config, WanTransformer3DModel and AutoencoderKLWan.
PRESETS = {
    "small": {
        "text_encoder": {"d_model": 40, "d_kv": 16, "num_heads": 3, "d_ff": 72, "num_layers": 2},
        "transformer": {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 104, "num_layers": 2},
        "vae": {"base_dim": 8},
    },
    "wan2.1-t2v-1.3b": {
        "text_encoder": {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240,
                         "num_layers": 24},
        "transformer": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
        "vae": {"base_dim": 96},
    },
}
UMT5_XXL = PRESETS["wan2.1-t2v-1.3b"]["text_encoder"]
A14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
PRESETS |= {
    "wan2.2-ti2v-5b": {
        "text_encoder": UMT5_XXL,
        "transformer": {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 30,
                        "in_channels": 48, "out_channels": 48},
        "vae": {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "patch_size": 2, "in_channels": 12,
                "out_channels": 12, "is_residual": True, "temperal_downsample": [False, True, True],
                "scale_factor_spatial": 16},
        "expand": True,
    },
    "wan2.2-t2v-a14b": {"text_encoder": UMT5_XXL, "transformer": A14B, "vae": {"base_dim": 96}, "boundary": 0.875},
    "wan2.2-i2v-a14b": {"text_encoder": UMT5_XXL, "transformer": A14B | {"in_channels": 36}, "vae": {"base_dim": 96},
                        "boundary": 0.9},
}

# From the names of transformers' UMT5EncoderModel to those of models_t5_umt5-xxl-enc-bf16.pth (wan/modules/t5.py).
ORIGINAL_T5 = [
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.block\.", "blocks."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "pos_embedding.embedding."),
    (r"layer\.0\.SelfAttention\.", "attn."),
    (r"layer\.0\.layer_norm\.", "norm1."),
    (r"layer\.1\.layer_norm\.", "norm2."),
    (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn.gate.0."),
    (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn.fc1."),
    (r"layer\.1\.DenseReluDense\.wo\.", "ffn.fc2."),
]

CORPUS = ("a red fox jumps over the lazy dog", "a cat walks on the grass, realistic style",
          "waves roll onto the beach at dusk", "two boxers fight on a spotlighted stage",
          "blurry, static, low quality", "the camera pans slowly to the left")


# ---------------------------------------------------------------- models: names and shapes, without memory

def meta_models(text_encoder, transformer, vae, seed, rows):
    """(text encoder, transformer, VAE) on the meta device.
    rows: of the embedding, unless text_encoder has vocab_size."""
    text = UMT5Config(**{"vocab_size": rows, "feed_forward_proj": "gated-gelu", **text_encoder})
    vae = dict(vae)
    channels = vae.get("z_dim", 16)
    if channels != 16:  # the defaults are the released VAE's
        generator = torch.Generator().manual_seed(seed)
        vae.setdefault("latents_mean", torch.randn(channels, generator=generator).tolist())
        vae.setdefault("latents_std", (1 + torch.rand(channels, generator=generator)).tolist())
    with torch.device("meta"):
        return (UMT5EncoderModel(text), WanTransformer3DModel(**{"text_dim": text.d_model, **transformer}),
                AutoencoderKLWan(**vae))


def shapes(model):
    """{name: shape} of a model's tensors, in order. A tied tensor counts once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def draw(name, shape, rows, config, generator):
    """Random rows of a tensor, (rows, ...): scales near 1, small biases,
    matrices that keep the variance of their input."""
    values = torch.randn(rows, *shape[1:], generator=generator)
    if re.search(r"(norm\w*\.weight|norm\.weight|gamma)$", name):
        return 1 + 0.1 * values
    if name.endswith("bias"):
        return 0.1 * values
    if "scale_shift_table" in name:
        return values / math.sqrt(shape[-1])
    if name.startswith("shared.") or "relative_attention_bias" in name:
        return values
    if "SelfAttention.q" in name:  # T5 does not divide its scores
        return values / math.sqrt(shape[1] * config["d_kv"])
    return values / math.sqrt(math.prod(shape[1:]))


# ---------------------------------------------------------------- files, written tensor by tensor

def write_safetensors(path, tensors, dtype, values):
    """Writes a .safetensors file: length of the header, header as JSON, bytes. values(name) yields a tensor's rows."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            write_slices(f, values(name), dtype)


def write_pth(path, tensors, dtype, values):
    """Writes a .pth file: torch writes it with empty tensors, then their bytes are filled in."""
    with FakeTensorMode():
        empty = {name: torch.empty(shape, dtype=dtype) for name, shape in tensors.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save(empty, path)
    with FakeTensorMode():
        offsets = {name: t.untyped_storage()._checkpoint_offset for name, t in torch.load(path).items()}
    with open(path, "r+b") as f:
        for name in tensors:
            f.seek(offsets[name])
            write_slices(f, values(name), dtype)


def write_slices(file, slices, dtype):
    for values in slices:
        file.write(values.to(dtype).contiguous().view(torch.uint8).numpy())


def write_shards(folder, stem, tensors, dtype, values, limit):
    """Writes one .safetensors file, or shards of at most limit bytes and their index, with the hub's names."""
    shards, size = [{}], 0
    for name, shape in tensors.items():
        size += math.prod(shape) * dtype.itemsize
        if shards[-1] and size > limit:
            shards.append({})
            size = math.prod(shape) * dtype.itemsize
        shards[-1][name] = shape
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, dtype, values)
        return
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        write_safetensors(folder / file, shard, dtype, values)
    total = sum(math.prod(shape) for shape in tensors.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total},
             "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------- tokenizer

def train_tokenizer(normalization="identity"):
    """The bytes of a small spiece.model in umT5's order: <pad>, </s>, <unk>, bytes, pieces;
    without a normaliser map."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, vocab_size=380, model_type="unigram",
        normalization_rule_name=normalization, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return model.getvalue()


def write_tokenizer(folder, source):
    """Copies a tokenizer file, or trains one. Returns its number of pieces; 0 for a copied file."""
    folder.mkdir(parents=True)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer", "model_max_length": 512, "pad_token": "<pad>", "eos_token": "</s>",
        "unk_token": "<unk>"})
    if source:
        shutil.copy(source, folder / ("spiece.model" if source.suffix == ".model" else "tokenizer.json"))
        return 0
    model = train_tokenizer()
    (folder / "spiece.model").write_bytes(model)
    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()


# ---------------------------------------------------------------- layouts

def make(folder, seed=0, layout="diffusers", dtype="f32", text_encoder=None, transformer=None, vae=None, shard="2GB",
         tokenizer=None, boundary=None, expand=False):
    """Makes FOLDER. text_encoder, transformer, vae: arguments of the models' classes, over those of the preset small;
    shard: largest file of a sharded part, such as "500KB"; tokenizer: a file to copy; boundary: between two
    transformers, None for one; expand: the pipeline has expand_timesteps, as TI2V-5B's."""
    folder, small = Path(folder), PRESETS["small"]
    folder.mkdir(parents=True)
    pieces = write_tokenizer(folder / ("tokenizer" if layout == "diffusers" else "google/umt5-xxl"),
                             Path(tokenizer) if tokenizer else None)
    text_encoder = {**small["text_encoder"], **(text_encoder or {})}
    models = meta_models(text_encoder, {**small["transformer"], **(transformer or {})}, {**small["vae"], **(vae or {})},
                         seed, (pieces or 256300) + 20)
    write = write_diffusers if layout == "diffusers" else write_original
    write(folder, models, DTYPES[dtype], parse_size(shard), seed, boundary, expand)


def parse_size(text):
    number, unit = re.fullmatch(r"(\d+)(KB|MB|GB)", text).groups()
    return int(number) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit]


def drawer(model, seed, part):
    """A function from a name to the tensor's slices. Each tensor has its own seed, so file and order do not matter.
    part: 0 text encoder, 1 transformer, 2 VAE, 3 second transformer."""
    config, tensors = dict(model.config.to_dict() if part == 0 else model.config), shapes(model)
    order = {name: i for i, name in enumerate(tensors)}

    def values(name):
        generator = torch.Generator().manual_seed(seed * 3000003 + part * 1000003 + order[name])
        shape = tensors[name]
        step = max(1, SLICE // math.prod(shape[1:]))
        for first in range(0, shape[0], step):
            yield draw(name, shape, min(step, shape[0] - first), config, generator)

    return values


def write_diffusers(folder, models, dtype, limit, seed, boundary, expand):
    """Writes a folder for each model, a scheduler, and model_index.json, like WanPipeline.save_pretrained. The shift is
    the one that diffusers' converter writes for Wan 2.1 and A14B."""
    text, transformer, vae = models
    pictures = transformer.config.in_channels != transformer.config.out_channels
    parts = {"text_encoder": ("model", text), "transformer": ("diffusion_pytorch_model", transformer),
             "vae": ("diffusion_pytorch_model", vae), "transformer_2": ("diffusion_pytorch_model", transformer)}
    if boundary is None:
        del parts["transformer_2"]
    for part, (name, (stem, model)) in enumerate(parts.items()):
        (folder / name).mkdir()
        write_shards(folder / name, stem, shapes(model), dtype, drawer(model, seed, part), limit)
        save_config = model.config.save_pretrained if name == "text_encoder" else model.save_config
        save_config(folder / name)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
                            flow_shift=3.0).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", {
        "_class_name": "WanImageToVideoPipeline" if pictures else "WanPipeline", "_diffusers_version": "0.42.1",
        "boundary_ratio": boundary, "expand_timesteps": expand,
        "transformer_2": [None, None] if boundary is None else ["diffusers", "WanTransformer3DModel"],
        **({"image_encoder": [None, None], "image_processor": [None, None]} if pictures else {}),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"]})


def original_names(models):
    """{original name: diffusers' or transformers' name} for each model. Those of transformer and VAE come from
    export.py's tables; tests/export compares them with diffusers' converters."""
    def t5(name):
        for pattern, replacement in ORIGINAL_T5:
            name = re.sub(pattern, replacement, name)
        return name

    text, transformer, vae = (list(shapes(model)) for model in models)
    return ({t5(n): n for n in text}, {our_name("transformer", n): n for n in transformer},
            {our_name("vae", c): n for c, n in zip(count_upsamples(vae), vae)})


def write_original(folder, models, dtype, limit, seed, boundary, expand):
    """Writes text encoder and VAE as .pth, the transformer as safetensors with config.json; two transformers in folders
    of their own. No file states the boundary between them."""
    names = original_names(models)

    def part(index, drawn):
        draws, tensors = drawer(models[index], seed, drawn), shapes(models[index])
        return ({ours: tensors[theirs] for ours, theirs in names[index].items()}, dtype,
                lambda ours: draws(names[index][ours]))

    config = models[1].config
    kind = "i2v" if config.in_channels != config.out_channels else "ti2v" if expand else "t2v"
    write_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", *part(0, 0))
    write_pth(folder / ("Wan2.2_VAE.pth" if expand else "Wan2.1_VAE.pth"), *part(2, 2))
    experts = {folder: 1} if boundary is None else {folder / "high_noise_model": 1, folder / "low_noise_model": 3}
    for place, drawn in experts.items():
        place.mkdir(exist_ok=True)
        write_shards(place, "diffusion_pytorch_model", *part(1, drawn), limit)
        write_json(place / "config.json", {
            "_class_name": "WanModel", "_diffusers_version": "0.30.0",
            "dim": config.num_attention_heads * config.attention_head_dim, "eps": config.eps,
            "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "in_dim": config.in_channels, "model_type": kind,
            "num_heads": config.num_attention_heads, "num_layers": config.num_layers, "out_dim": config.out_channels,
            "text_len": 512})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=("diffusers", "original"), default="diffusers")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="5GB", help="largest file of a sharded part")
    parser.add_argument("--tokenizer", type=Path, help="spiece.model or tokenizer.json to use")
    parser.add_argument("--blocks", type=int,
                        help="of the transformer and of the text encoder, instead of the model's own")
    args = parser.parse_args()
    preset = dict(PRESETS[args.preset])
    if args.blocks:
        for part in ("text_encoder", "transformer"):
            preset[part] = preset[part] | {"num_layers": args.blocks}
    make(args.folder, args.seed, args.layout, args.dtype, **preset, shard=args.shard, tokenizer=args.tokenizer)


if __name__ == "__main__":
    main()
