"""Helpers of the tests of export.py: run it, read its output with the gguf package, compute the expected tensors."""

import json
from pathlib import Path

import gguf
import torch
from export import command
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent.parent


def export(*arguments):
    """Runs export.py CHECKPOINT -o OUTPUT OPTIONS... Returns a reader of the output."""
    checkpoint, output, *options = map(str, arguments)
    assert command.main([checkpoint, "-o", output, *options]) == 0
    return gguf.GGUFReader(output)


def refused(capsys, output, *arguments):
    """Runs export.py on a wrong input and asserts exit status 2, one line, no file. Returns the line."""
    capsys.readouterr()
    assert command.main([*map(str, arguments), "-o", str(output)]) == 2
    assert not list(output.parent.glob(output.name + "*"))
    line = capsys.readouterr().err.strip()
    assert line.startswith("export.py: ") and "\n" not in line
    return line


def keys(reader):
    """{key: value} of a weight file."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(reader):
    """{name: (type, float32 values in torch's order of dimensions)}."""
    return {t.name: (t.tensor_type, gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape))))
            for t in reader.tensors}


def digest(reader):
    """The SHA-256 of the tensors that a weight file states."""
    return keys(reader)["sora.tensors_sha256"]


def original(folders):
    """(text encoder, transformer, VAE) of the original layout, each {name: tensor}."""
    root = folders / "original"
    text = torch.load(root / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    vae = torch.load(root / "Wan2.1_VAE.pth", weights_only=True)
    return text, load_file(root / "diffusion_pytorch_model.safetensors"), vae


LLAMA_CPP = {  # {name in wan/modules/t5.py: name in llama.cpp's t5encoder}
    "token_embedding": "token_embd", "norm": "enc.output_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_o",
    "pos_embedding.embedding": "attn_rel_b", "ffn.gate.0": "ffn_gate", "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down",
}


def llama_cpp_name(name):
    """llama.cpp's name of a tensor of wan/modules/t5.py."""
    if not name.startswith("blocks."):
        return LLAMA_CPP[name.removesuffix(".weight")] + ".weight"
    _, number, module = name.removesuffix(".weight").split(".", 2)
    return f"enc.blk.{number}.{LLAMA_CPP[module]}.weight"


def expected(folders):
    """{name in the weight file: values}: convolutions are matrices, dimensions of 1 are dropped."""
    text, transformer, vae = original(folders)
    out = {llama_cpp_name(k): v for k, v in text.items()}
    out |= {k: v.flatten(1) if k == "patch_embedding.weight" else v.reshape(v.shape[-2:]) if "modulation" in k else v
            for k, v in transformer.items()}
    for k, v in vae.items():
        out["vae." + k] = v.flatten() if "gamma" in k or v.dim() == 1 else v.movedim(1, -1).flatten(1)
    return {k: v.numpy() for k, v in out.items()}


def parts(folders):
    """{option: path} for every part of the diffusers folder."""
    root = folders / "diffusers"
    return {"--transformer": root / "transformer", "--text-encoder": root / "text_encoder", "--vae": root / "vae",
            "--tokenizer": root / "tokenizer"}


def export_parts(folders, output, **replaced):
    """Runs export.py on the parts of the diffusers folder, in f32. replaced: options by name. Returns a reader."""
    options = parts(folders) | {f"--{k.replace('_', '-')}": v for k, v in replaced.items()}
    assert command.main(["-o", str(output), "--type", "f32", *(str(x) for pair in options.items() for x in pair)]) == 0
    return gguf.GGUFReader(output)


def write_gguf(path, arch, weights, fields=()):
    """Writes a GGUF file. weights: {name: (values, type)}; fields: [(method of GGUFWriter, key, value)]."""
    writer = gguf.GGUFWriter(path, arch)
    for add, key, value in fields:
        getattr(writer, add)(key, value)
    for name, (values, kind) in weights.items():
        writer.add_tensor(name, gguf.quants.quantize(values.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def change_transformer(folder, change):
    """Applies change(weights) to the transformer of a diffusers folder."""
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_json(path, **values):
    """Replaces values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path):
    """Cuts the last 1000 bytes off a file."""
    path.write_bytes(path.read_bytes()[:-1000])
