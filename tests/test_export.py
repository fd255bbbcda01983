"""Holds export.py against the libraries whose files it reads: pytest tests/test_export.py (in make test-reference).

Checkpoints are random ones of make_checkpoint.py. What a file holds is read back with the gguf package and compared
with the source's tensors, as safetensors and torch read them; names are held against diffusers' own converters, merges
against its own merge.
"""

import hashlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import make_checkpoint  # noqa: E402
from export.names import our_name  # noqa: E402
from export.parts import Part, note_expert  # noqa: E402
from export.tokenizer import tokenizer_keys  # noqa: E402

# The package export/ hides export.py from `import`, so the command is loaded by its path.
spec = importlib.util.spec_from_file_location("export_command", ROOT / "export.py")
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)


# ---------------------------------------------------------------- checkpoints and files

@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One random checkpoint in both layouts; also sharded."""
    root = tmp_path_factory.mktemp("checkpoints")
    text_encoder = {"d_ff": 96}  # rows that q8_0 can hold, beside others that it cannot
    make_checkpoint.make(root / "diffusers", seed=1, text_encoder=text_encoder)
    make_checkpoint.make(root / "original", seed=1, text_encoder=text_encoder, layout="original")
    make_checkpoint.make(root / "sharded", seed=1, text_encoder=text_encoder, shard="200KB")
    return root


@pytest.fixture(scope="session")
def baseline(folders):
    """The file of the diffusers folder in f32, each tensor in one slice."""
    return export(folders / "diffusers", folders / "baseline.gguf", "--type", "f32")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Every tensor of some size is read and written in several slices here, but for the baseline, which is whole."""
    monkeypatch.setattr("export.writer.SLICE", 3000)
    monkeypatch.setattr("export.files.REMAP", 100000)


def export(*arguments):
    """Runs export.py; the second argument is the output. Returns a reader of it."""
    checkpoint, output, *options = map(str, arguments)
    assert command.main([checkpoint, "-o", output, *options]) == 0
    return gguf.GGUFReader(output)


def refused(capsys, output, *arguments):
    """Runs export.py on something wrong: exit status 2, one line, no file. Returns the line."""
    capsys.readouterr()
    assert command.main([*map(str, arguments), "-o", str(output)]) == 2
    assert not list(output.parent.glob(output.name + "*"))
    line = capsys.readouterr().err.strip()
    assert line.startswith("export.py: ") and "\n" not in line
    return line


def keys(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(reader):
    """{name: (type, float values in torch's order of dimensions)}."""
    return {t.name: (t.tensor_type, gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape))))
            for t in reader.tensors}


def digest(reader):
    return keys(reader)["sora.tensors_sha256"]


def original(folders):
    """The source's tensors under the original release's names, with the parts' prefixes of the weight file."""
    root = folders / "original"
    text = torch.load(root / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    vae = torch.load(root / "Wan2.1_VAE.pth", weights_only=True)
    return text, load_file(root / "diffusion_pytorch_model.safetensors"), vae


LLAMA_CPP = {  # llama.cpp's t5encoder for what wan/modules/t5.py calls so
    "token_embedding": "token_embd", "norm": "enc.output_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_o",
    "pos_embedding.embedding": "attn_rel_b", "ffn.gate.0": "ffn_gate", "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down",
}


def llama_cpp_name(name):
    if not name.startswith("blocks."):
        return LLAMA_CPP[name.removesuffix(".weight")] + ".weight"
    _, number, module = name.removesuffix(".weight").split(".", 2)
    return f"enc.blk.{number}.{LLAMA_CPP[module]}.weight"


def expected(folders):
    """{name in the file: values}: convolutions folded, ones dropped, as README describes the file."""
    text, transformer, vae = original(folders)
    out = {llama_cpp_name(k): v for k, v in text.items()}
    out |= {k: v.flatten(1) if k == "patch_embedding.weight" else v.reshape(v.shape[-2:]) if "modulation" in k else v
            for k, v in transformer.items()}
    for k, v in vae.items():
        out["vae." + k] = v.flatten() if "gamma" in k or v.dim() == 1 else v.movedim(1, -1).flatten(1)
    return {k: v.numpy() for k, v in out.items()}


# ---------------------------------------------------------------- layouts

def test_original_names_are_those_that_diffusers_converts(folders):
    _, transformer, vae = original(folders)
    for converted, theirs in (
            (convert_wan_transformer_to_diffusers(dict(transformer)), folders / "diffusers/transformer"),
            (convert_wan_vae_to_diffusers(dict(vae)), folders / "diffusers/vae")):
        source = load_file(theirs / "diffusion_pytorch_model.safetensors")
        assert converted.keys() == source.keys()
        assert all(torch.equal(converted[k].squeeze(), source[k].squeeze()) for k in source)


def test_layouts_give_one_file_but_for_source_names(folders, baseline):
    other = export(folders / "original", folders / "original.gguf", "--type", "f32")
    sharded = export(folders / "sharded", folders / "sharded.gguf", "--type", "f32")
    assert len(list((folders / "sharded/transformer").glob("*-of-*.safetensors"))) > 1

    def without_sources(reader):
        return {k: v for k, v in keys(reader).items() if not k.startswith("sora.source.")}

    assert without_sources(baseline) == without_sources(other) == without_sources(sharded)
    a, b, c = map(tensors, (baseline, other, sharded))
    assert list(a) == list(b) == list(c)
    assert all(np.array_equal(a[k][1], b[k][1]) and np.array_equal(a[k][1], c[k][1]) for k in a)


def test_digest_is_of_the_tensors(baseline):
    sha = hashlib.sha256()
    for t in baseline.tensors:
        assert t.data_offset % 64 == 0
        sha.update(t.data.tobytes())
    assert digest(baseline) == sha.hexdigest()


def test_sources_are_named_with_their_digest(folders, baseline):
    values = keys(baseline)
    for name, sha in zip(values["sora.source.names"], values["sora.source.sha256"], strict=True):
        assert hashlib.sha256((folders / "diffusers" / name).read_bytes()).hexdigest() == sha
    assert "text_encoder/model.safetensors" in values["sora.source.names"]


# ---------------------------------------------------------------- types

EXACT = ("norm", "bias", "modulation", "attn_rel_b", "vae.", "gamma", "time_embedding")
WIDE = ("patch_embedding", "text_embedding", "time_projection", "head.head")


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0"])
def test_tensors_are_the_sources_within_their_type(folders, name):
    file = tensors(export(folders / "diffusers", folders / f"{name}.gguf", "--type", name))
    source = expected(folders)
    assert file.keys() == source.keys()
    seen = set()
    for key, (kind, values) in file.items():
        assert values.shape == source[key].shape, key
        seen.add(kind)
        if any(part in key for part in EXACT):
            assert kind == Type.F32, key
        elif name == "q8_0":
            wide = any(key.startswith(part) for part in WIDE)
            assert kind == (Type.BF16 if wide else Type.Q8_0 if values.shape[-1] % 32 == 0 else Type.F16), key
        else:
            assert kind == Type[name.upper()], key
        if kind == Type.Q8_0:
            reference = gguf.quants.dequantize(gguf.quants.quantize(source[key], Type.Q8_0), Type.Q8_0)
            assert np.array_equal(values, reference), key
            continue
        half_step = {Type.F32: 0, Type.F16: 2**-11, Type.BF16: 2**-8}[kind]  # and f16's smallest step
        allowed = np.abs(source[key]) * half_step + (2**-25 if kind == Type.F16 else 0)
        assert np.all(np.abs(values - source[key]) <= allowed), key
    assert len(seen) == {"f32": 1, "f16": 2, "bf16": 2, "q8_0": 4}[name]


def test_without_a_type_tensors_stay_as_stored(tmp_path, folders):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "mixed")
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["blocks.0.ffn.net.2.weight"] = weights["blocks.0.ffn.net.2.weight"].bfloat16()
    weights["blocks.1.ffn.net.2.weight"] = weights["blocks.1.ffn.net.2.weight"].half()
    weights["blocks.1.norm2.weight"] = weights["blocks.1.norm2.weight"].half()
    for name in ("proj_out", "condition_embedder.time_embedder.linear_1"):
        weights[f"{name}.weight"] = weights[f"{name}.weight"].half()
    save_file(weights, path)
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path)
    names = ("blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight", "blocks.1.ffn.2.weight", "blocks.1.norm3.weight",
             "vae.decoder.conv1.weight", "vae.decoder.conv1.bias")
    file = tensors(export(copy, tmp_path / "out.gguf"))
    assert [file[k][0] for k in names] == [Type.F32, Type.BF16, Type.F16, Type.F32, Type.F16, Type.F32]
    file = tensors(export(copy, tmp_path / "out.gguf", "--type", "bf16"))  # the VAE loses nothing to --type
    assert [file[k][0] for k in names] == [Type.BF16, Type.BF16, Type.BF16, Type.F32, Type.F16, Type.F32]
    file = tensors(export(copy, tmp_path / "out.gguf", "--type", "f32"))
    assert {file[k][0] for k in names} == {Type.F32}
    file = tensors(export(copy, tmp_path / "out.gguf", "--type", "q8_0"))  # the way out keeps its 16 bits
    assert file["head.head.weight"][0] == file["time_embedding.0.weight"][0] == Type.F16


def test_a_number_that_is_none_is_refused(tmp_path, folders, capsys):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "nan")
    change_transformer(copy, lambda w: w["blocks.1.ffn.net.2.weight"][47, 3].fill_(math.nan))
    assert "blocks.1.ffn.net.2.weight holds a number that is not finite" in refused(capsys, tmp_path / "out.gguf", copy)


def test_a_number_beyond_f16_is_refused(tmp_path, folders, capsys):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "large")
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["blocks.0.ffn.net.2.weight"][3, 5] = 70000.0
    save_file(weights, path)
    line = refused(capsys, tmp_path / "out.gguf", copy, "--type", "f16")
    assert "blocks.0.ffn.net.2.weight holds 70000" in line


# ---------------------------------------------------------------- parts and single files

def parts(folders):
    """Options that name every part of the diffusers folder."""
    root = folders / "diffusers"
    return {"--transformer": root / "transformer", "--text-encoder": root / "text_encoder", "--vae": root / "vae",
            "--tokenizer": root / "tokenizer"}


def export_parts(folders, output, **replaced):
    options = parts(folders) | {f"--{k.replace('_', '-')}": v for k, v in replaced.items()}
    assert command.main(["-o", str(output), "--type", "f32", *(str(x) for pair in options.items() for x in pair)]) == 0
    return gguf.GGUFReader(output)


def test_parts_named_one_by_one(tmp_path, folders, baseline):
    assert digest(export_parts(folders, tmp_path / "out.gguf")) == digest(baseline)
    root = folders / "original"
    assert digest(export_parts(folders, tmp_path / "out.gguf", vae=root / "Wan2.1_VAE.pth",
                               transformer=root / "diffusion_pytorch_model.safetensors",
                               text_encoder=root / "models_t5_umt5-xxl-enc-bf16.pth",
                               tokenizer=root / "google/umt5-xxl/spiece.model")) == digest(baseline)


@pytest.mark.parametrize("prefix", [
    "model.diffusion_model.", "diffusion_model.model.", "diffusion_model.", "model.", "net.", "generator.",
    "model._fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_prefixes(tmp_path, folders, baseline, prefix):
    weights = load_file(folders / "original/diffusion_pytorch_model.safetensors")
    save_file({prefix + k: v for k, v in weights.items()}, tmp_path / "wan.safetensors")
    shutil.copy(folders / "original/config.json", tmp_path)
    file = export_parts(folders, tmp_path / "out.gguf", transformer=tmp_path / "wan.safetensors")
    assert digest(file) == digest(baseline)


@pytest.mark.parametrize("container", ["generator_ema", "generator", "model", "module", "state_dict"])
def test_containers(tmp_path, folders, baseline, container):
    weights = load_file(folders / "original/diffusion_pytorch_model.safetensors")
    torch.save({container: weights, "epoch": 3}, tmp_path / "wan.pt")
    shutil.copy(folders / "original/config.json", tmp_path)
    assert digest(export_parts(folders, tmp_path / "out.gguf", transformer=tmp_path / "wan.pt")) == digest(baseline)


def test_a_tied_embedding_stored_twice(tmp_path, folders, baseline):
    weights = load_file(folders / "diffusers/text_encoder/model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    path = tmp_path / "umt5.safetensors"
    save_file(weights, path)
    assert digest(export_parts(folders, tmp_path / "out.gguf", text_encoder=path)) == digest(baseline)
    del weights["shared.weight"]
    save_file(weights, path)
    assert digest(export_parts(folders, tmp_path / "out.gguf", text_encoder=path)) == digest(baseline)


def test_heads_are_128_wide_without_a_config(tmp_path, capsys):
    make_checkpoint.make(tmp_path / "wide", layout="original",
                         transformer={"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 1})
    (tmp_path / "wide/config.json").unlink()
    assert keys(export(tmp_path / "wide", tmp_path / "out.gguf"))["wan.num_heads"] == 2


def write_gguf(path, arch, weights, fields=()):
    writer = gguf.GGUFWriter(path, arch)
    for add, key, value in fields:
        getattr(writer, add)(key, value)
    for name, (values, kind) in weights.items():
        writer.add_tensor(name, gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_of_the_transformer(tmp_path, folders, baseline):
    weights = load_file(folders / "original/diffusion_pytorch_model.safetensors")
    patch = weights["patch_embedding.weight"]
    weights["patch_embedding.weight"] = patch.flatten(0, 1)  # four dimensions
    write_gguf(tmp_path / "wan.gguf", "wan", {k: (v, Type.F32) for k, v in weights.items()})
    shutil.copy(folders / "original/config.json", tmp_path)
    assert digest(export_parts(folders, tmp_path / "out.gguf", transformer=tmp_path / "wan.gguf")) == digest(baseline)


def test_gguf_of_the_text_encoder_carries_its_tokenizer(tmp_path, folders, baseline):
    text, _, _ = original(folders)
    weights = {llama_cpp_name(k): (v, Type.Q8_0 if v.shape[-1] % 32 == 0 else Type.F32) for k, v in text.items()}
    theirs = keys(baseline)
    write_gguf(tmp_path / "t5.gguf", "t5encoder", weights, [
        ("add_string", "tokenizer.ggml.model", "t5"),
        ("add_array", "tokenizer.ggml.tokens", theirs["tokenizer.ggml.tokens"]),
        ("add_array", "tokenizer.ggml.scores", theirs["tokenizer.ggml.scores"]),
        ("add_array", "tokenizer.ggml.token_type", theirs["tokenizer.ggml.token_type"]),
        ("add_array", "tokenizer.ggml.precompiled_charsmap", b"\0\1\2\3")])
    path = tmp_path / "t5.gguf"
    file = export_parts(folders, tmp_path / "out.gguf", text_encoder=path, tokenizer=path)
    ours = keys(file)
    assert all(ours[k] == v for k, v in theirs.items() if k.startswith(("tokenizer.", "sora.tokenizer.")))
    assert bytes(ours["tokenizer.ggml.precompiled_charsmap"]) == b"\0\1\2\3"
    source = expected(folders)
    for name, (kind, values) in tensors(file).items():
        if name in weights:
            exact = weights[name][1] == Type.F32
            assert np.abs(values - source[name]).max() <= (0 if exact else np.abs(source[name]).max() / 100)
    # Without --type, q8_0 stays what it is, bit for bit.
    file = export(folders / "diffusers", tmp_path / "kept.gguf", "--text-encoder", path)
    theirs, ours = ({t.name: t for t in r.tensors} for r in (gguf.GGUFReader(path), file))
    kept = [name for name, tensor in theirs.items() if tensor.tensor_type == Type.Q8_0 and "rel_b" not in name]
    assert len(kept) == 2 and all(theirs[name].n_elements > 3000 for name in kept)  # of several slices
    assert all(np.array_equal(theirs[name].data, ours[name].data) for name in kept)


def comfy_text_encoder(folders, suffix, per_row):
    """ComfyUI's fp8 text encoder: matrices as fp8 with a scale beside them, and spiece.model as a tensor."""
    weights, out = load_file(folders / "diffusers/text_encoder/model.safetensors"), {}
    for key, value in weights.items():
        if value.dim() == 2 and "block" in key and "relative" not in key:
            largest = value.abs().amax(1) if per_row else value.abs().max()
            scale = largest / 448
            out[key] = (value / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
            out[key.removesuffix("weight") + suffix] = scale
        else:
            out[key] = value.half()
    out["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    model = (folders / "diffusers/tokenizer/spiece.model").read_bytes()
    out["spiece_model"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    return out


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_fp8_is_multiplied_by_its_scale(tmp_path, folders, baseline, suffix, per_row):
    weights = comfy_text_encoder(folders, suffix, per_row)
    path = tmp_path / "umt5.safetensors"
    save_file(weights, path)
    file = export_parts(folders, tmp_path / "out.gguf", text_encoder=path, tokenizer=path)
    key = "encoder.block.1.layer.1.DenseReluDense.wo."
    scale = weights[key + suffix]
    values = weights[key + "weight"].float() * (scale[:, None] if per_row else scale)
    assert np.array_equal(tensors(file)["enc.blk.1.ffn_down.weight"][1], values.numpy())
    assert keys(file)["tokenizer.ggml.tokens"] == keys(baseline)["tokenizer.ggml.tokens"]


def test_fp8_without_its_scale_is_refused(tmp_path, folders, capsys):
    weights = comfy_text_encoder(folders, "scale_weight", False)
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.scale_weight"]
    save_file(weights, tmp_path / "umt5.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--text-encoder",
                   tmp_path / "umt5.safetensors")
    assert "encoder.block.1.layer.1.DenseReluDense.wo.weight is fp8 without its scale" in line


# ---------------------------------------------------------------- weight files as checkpoints

@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_weight_file_is_a_checkpoint(tmp_path, folders, kind):
    once = export(folders / "diffusers", tmp_path / "once.gguf", "--type", kind, "--steps", 7, "--fps", "30000:1001")
    again = export(tmp_path / "once.gguf", tmp_path / "again.gguf")
    assert [(t.name, t.tensor_type) for t in once.tensors] == [(t.name, t.tensor_type) for t in again.tensors]
    assert digest(once) == digest(again)
    once, again = keys(once), keys(again)
    for key in ("names", "sha256"):
        sources = again.pop(f"sora.source.{key}")
        assert sources[:-1] == once.pop(f"sora.source.{key}")
    assert sources[-1] == hashlib.sha256((tmp_path / "once.gguf").read_bytes()).hexdigest()
    assert once == again


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_weight_file_takes_another_type(tmp_path, folders, baseline, kind):
    direct = export(folders / "diffusers", tmp_path / "direct.gguf", "--type", kind)
    again = export(folders / "baseline.gguf", tmp_path / "again.gguf", "--type", kind)
    assert digest(direct) == digest(again)
    assert keys(direct)["general.file_type"] == keys(again)["general.file_type"]


def test_the_bundled_model_is_a_checkpoint(tmp_path):
    bundled = gguf.GGUFReader(ROOT / "models/demo.gguf")
    again = export(ROOT / "models/demo.gguf", tmp_path / "out.gguf", "--precision", "f32")
    assert digest(bundled) == digest(again)
    before, after = keys(bundled), keys(again)
    assert after["default.precision"] == "f32" and "default.precision" not in before
    assert all(after[key] == before[key] for key in before if not key.startswith("sora.source."))


def test_defaults_of_a_weight_file_give_way_to_options(tmp_path, folders):
    export(folders / "diffusers", tmp_path / "once.gguf", "--steps", 7, "--precision", "bf16", "--name", "x")
    values = keys(export(tmp_path / "once.gguf", tmp_path / "again.gguf", "--steps", 8, "--precision", "f32"))
    assert (values["default.steps"], values["default.precision"], values["general.name"]) == (8, "f32", "x")


def test_loras_merge_into_a_weight_file(tmp_path, folders, baseline):
    for name in "ab":
        save_file(lora("lora_A lora_B", True), tmp_path / f"{name}.safetensors")
    a, b = (["--lora", f"{tmp_path / name}.safetensors:{scale}"] for name, scale in (("a", 0.5), ("b", 2)))
    both = export(folders / "diffusers", tmp_path / "both.gguf", "--type", "f32", *a, *b)
    export(folders / "diffusers", tmp_path / "once.gguf", "--type", "f32", *a)
    again = export(tmp_path / "once.gguf", tmp_path / "again.gguf", *b)
    assert keys(again)["sora.lora"] == keys(both)["sora.lora"] == ["a.safetensors:0.5", "b.safetensors:2"]
    a, b = tensors(again), tensors(both)
    assert all(np.array_equal(a[name][1], b[name][1]) for name in b)


@pytest.mark.parametrize("part", ["transformer", "text-encoder", "vae", "tokenizer"])
def test_parts_of_a_weight_file(tmp_path, folders, baseline, part):
    file = export(folders / "original", tmp_path / "out.gguf", "--type", "f32", f"--{part}", folders / "baseline.gguf")
    assert digest(file) == digest(baseline)
    file = export(folders / "baseline.gguf", tmp_path / "out.gguf", f"--{part}",
                  folders / "diffusers" / part.replace("-", "_"))
    assert digest(file) == digest(baseline)


def test_weight_files_that_are_not_understood(tmp_path, folders, capsys, monkeypatch):
    path = tmp_path / "other.gguf"
    weights = {"x": (torch.zeros(2), Type.F32)}
    write_gguf(path, "wan", weights, [("add_uint32", "sora.format_version", 2)])
    assert f"{path}: sora.format_version is 2, expected 1" in refused(capsys, tmp_path / "out.gguf", path)
    write_gguf(path, "wan", weights, [("add_uint32", "sora.format_version", 1)])
    assert f"{path}: the key t5encoder.block_count is missing" in refused(capsys, tmp_path / "out.gguf", path)
    with monkeypatch.context() as patch:
        patch.setattr(command, "FIXED", command.FIXED | {"sora.unheard_of": 3})
        export(folders / "diffusers", path)
    assert "sora.unheard_of is no key that this export.py knows" in refused(capsys, tmp_path / "out.gguf", path)


# ---------------------------------------------------------------- what is wrong is named

def change_transformer(folder, change):
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


WRONG = [  # (what is done to a diffusers folder, what the line says)
    (lambda f: change_transformer(f, lambda w: w.pop("blocks.1.attn2.norm_k.weight")),
     "transformer's blocks.1.cross_attn.norm_k.weight is missing"),
    (lambda f: change_transformer(f, lambda w: w.update(extra=torch.zeros(3))),
     "extra [3] is no tensor of the transformer"),
    (lambda f: change_transformer(f, lambda w: w.update({"blocks.0.attn1.to_k.bias": torch.zeros(7)})),
     "blocks.0.attn1.to_k.bias has shape [7], expected [48]"),
    (lambda f: change_transformer(f, lambda w: w.update({"blocks.0.attn1.to_k.weight": torch.zeros(48 * 48)})),
     "blocks.0.attn1.to_k.weight has shape [2304], expected [48, 48]"),
    (lambda f: change_transformer(f, lambda w: w.update({"blocks.0.self_attn.q.bias": torch.zeros(48)})),
     "are both blocks.0.self_attn.q.bias"),
    (lambda f: change_transformer(f, lambda w: w.update({"proj_out.bias": torch.zeros(64, dtype=torch.int8)})),
     "proj_out.bias is I8"),
    (lambda f: change_transformer(f, lambda w: w.update({"blocks.0.attn2.add_k_proj.weight": torch.zeros(2)})),
     "image-to-video"),
    (lambda f: change_transformer(f, lambda w: w.update({"blocks.0.to_gate_compress.weight": torch.zeros(2)})),
     "FastWan"),
    (lambda f: change_transformer(f, lambda w: w.update({"vace_blocks.0.proj_in.weight": torch.zeros(2)})), "VACE"),
    (lambda f: change_json(f / "transformer/config.json", num_layers=3), "num_layers is 3, but the tensors say 2"),
    (lambda f: change_json(f / "transformer/config.json", qk_norm="rms_norm"), "qk_norm is 'rms_norm'"),
    (lambda f: change_json(f / "transformer/config.json", num_attention_heads="two"),
     "num_attention_heads is 'two', expected a number from 1 to 1024"),
    (lambda f: change_json(f / "transformer/config.json", eps="x"), "eps is 'x', expected a number"),
    (lambda f: change_json(f / "transformer/config.json", local_attn_size=12),
     "local_attn_size is 12: that setting is not known"),
    (lambda f: change_json(f / "transformer/config.json", _class_name="CausalWanModel"),
     "_class_name is 'CausalWanModel'"),
    (lambda f: change_json(f / "text_encoder/config.json", relative_attention_max_distance=0),
     "relative_attention_max_distance is 0, expected a number from 1"),
    (lambda f: change_json(f / "text_encoder/config.json", layer_norm_epsilon=None), "layer_norm_epsilon is None"),
    (lambda f: change_json(f / "vae/config.json", latents_std=[0.0] * 16), "which is no mean or deviation"),
    (lambda f: change_json(f / "model_index.json", _class_name="WanVACEPipeline"), "a WanVACEPipeline cannot be run"),
    (lambda f: change_json(f / "model_index.json", transformer_2=True), "model_index.json: cannot be read"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", flow_shift=None),
     "scheduler_config.json: cannot be read"),
    (lambda f: (f / "scheduler/scheduler_config.json").write_text('{"_class_name": "UniPCMultistepScheduler"}'),
     "prediction_type is None, expected 'flow_prediction'"),
    (lambda f: change_json(f / "vae/config.json", is_residual=True), "residual VAE"),
    (lambda f: change_json(f / "vae/config.json", dim_mult=[1, 2, 4, 8]), "dim_mult is [1, 2, 4, 8]"),
    (lambda f: change_json(f / "vae/config.json", latents_mean=[0.0]), "latents_mean is not known"),
    (lambda f: change_json(f / "text_encoder/config.json", feed_forward_proj="relu"), "feed_forward_proj is 'relu'"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", solver_order=3), "solver_order is 3, expected 2"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
     "DDIMScheduler is none of"),
    (lambda f: change_json(f / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
     "two experts"),
    (lambda f: change_json(f / "model_index.json", expand_timesteps=True), "TI2V-5B"),
    (lambda f: change_json(f / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"]),
     "image-to-video"),
    (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: cannot be read"),
    (lambda f: truncate(f / "vae/diffusion_pytorch_model.safetensors"),
     "vae/diffusion_pytorch_model.safetensors: cannot be read"),
    (lambda f: (f / "tokenizer/spiece.model").write_bytes(b"not a model"), "spiece.model: not a sentencepiece model"),
    (lambda f: (f / "tokenizer/spiece.model").unlink(), "no tokenizer.json or spiece.model"),
    (lambda f: (f / "sora.json").write_text('{"stepps": 3}'), "'stepps' is none of"),
    (lambda f: (f / "sora.json").write_text('{"steps": "3"}'), "steps is '3'"),
    (lambda f: (f / "sora.json").write_text('{"steps": 5000}'), "steps is 5000, expected 1 to 1000"),
    (lambda f: (f / "sora.json").write_text('{"guidance": NaN}'), "guidance is nan, expected 0 to 1000"),
    (lambda f: (f / "sora.json").write_text('{"width": 100}'), "width is 100, expected a multiple of"),
    (lambda f: (f / "sora.json").write_text('{"frames": 6}'), "frames is 6, expected 4k+1"),
    (lambda f: (f / "sora.json").write_text('{"fps": 2147483648}'), "fps is 2147483648, expected N or N:D"),
    (lambda f: shutil.rmtree(f / "vae"), "vae: no such file or folder"),
]


@pytest.mark.parametrize("change, says", WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_is_named(tmp_path, folders, capsys, change, says):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change(copy)
    assert says in refused(capsys, tmp_path / "out.gguf", copy)


@pytest.mark.parametrize("name, says", [
    ("high_noise_model/x", "two experts"), ("Wan2.2_VAE.pth", "TI2V-5B"), ("models_clip_xlm.pth", "image-to-video"),
    ("diffusion_pytorch_model.safetensors.index.json", "missing.safetensors: named by")])
def test_original_folders_that_cannot_be_run(tmp_path, folders, capsys, name, says):
    copy = shutil.copytree(folders / "original", tmp_path / "copy")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text('{"weight_map": {"a": "missing.safetensors"}}')
    assert says in refused(capsys, tmp_path / "out.gguf", copy)


def test_a_pickle_that_runs_code_is_refused(tmp_path, folders, capsys):
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    copy = shutil.copytree(folders / "original", tmp_path / "copy")
    torch.save({"conv1.weight": Code()}, copy / "Wan2.1_VAE.pth")
    assert "Wan2.1_VAE.pth: cannot be read" in refused(capsys, tmp_path / "out.gguf", copy)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_something_else_is_refused(tmp_path, folders, capsys):
    copy = shutil.copytree(folders / "original", tmp_path / "copy")
    torch.save({3: torch.zeros(2)}, copy / "Wan2.1_VAE.pth")
    assert "3 is not a tensor" in refused(capsys, tmp_path / "out.gguf", copy)


def test_a_pickle_of_the_old_format(tmp_path, folders, baseline):
    path = tmp_path / "wan.pth"
    torch.save(load_file(folders / "original/diffusion_pytorch_model.safetensors"), path,
               _use_new_zipfile_serialization=False)
    shutil.copy(folders / "original/config.json", tmp_path)
    assert digest(export_parts(folders, tmp_path / "out.gguf", transformer=path)) == digest(baseline)


def test_out_of_memory_is_no_fault_of_the_file(tmp_path, folders, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    for where in ("export.files.Safetensors.read", "export.writer.Planned.convert"):
        with monkeypatch.context() as patch:
            patch.setattr(where, refuse)
            assert command.main([str(folders / "diffusers"), "-o", str(tmp_path / "out.gguf")]) == 3
    assert capsys.readouterr().err.splitlines() == ["export.py: out of memory"] * 2


def test_missing_parts_are_named(tmp_path, folders, capsys):
    transformer = folders / "diffusers/transformer"
    assert "--text-encoder" in refused(capsys, tmp_path / "out.gguf", "--transformer", transformer)
    assert "no such file" in refused(capsys, tmp_path / "out.gguf", tmp_path / "nothing")


@pytest.mark.parametrize("name", ["high_noise_model", "Wan2_2-T2V-A14B-LOW_fp8", "Wan2.2-Diffusers/transformer_2"])
def test_a_name_decides_nothing(tmp_path, folders, baseline, capsys, name):
    expert = shutil.copytree(folders / "diffusers/transformer", tmp_path / name)
    assert digest(export_parts(folders, tmp_path / "out.gguf", transformer=expert)) == digest(baseline)
    assert "note" not in capsys.readouterr().err
    note_expert(Part("transformer", expert, {}, {}, [], {"dim": 5120}))  # of the experts' size
    assert "named like an expert of Wan 2.2 A14B" in capsys.readouterr().err


def test_other_parts_come_from_any_pipeline(tmp_path, folders, baseline):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change_json(copy / "model_index.json", _class_name="WanImageToVideoPipeline",
                image_encoder=["transformers", "CLIPVisionModel"])
    file = export(copy, tmp_path / "out.gguf", "--type", "f32", "--transformer", folders / "diffusers/transformer")
    assert digest(file) == digest(baseline)


@pytest.mark.parametrize("option, says", [
    ("nowhere.safetensors", "nowhere.safetensors: "), ("a.safetensors:nan", "'nan' is not a scale"),
    ("a.safetensors:half", "'half' is not a scale")])
def test_a_lora_that_cannot_be_applied_is_named(tmp_path, folders, capsys, option, says):
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / option)
    assert says in line and "None" not in line


def test_outputs_that_cannot_be_written(tmp_path, folders, capsys):
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "folder", tmp_path / "nowhere/out.gguf", Path("/dev/null")):
        assert command.main([str(folders / "diffusers"), "-o", str(output)]) == 2
    assert [line.split(": ")[-1] for line in capsys.readouterr().err.splitlines()] == [
        "not a regular file", "no such folder", "not a regular file"]
    assert Path("/dev/null").is_char_device()


def test_what_is_converted_is_not_overwritten(tmp_path, folders, capsys):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    output = copy / "transformer/diffusion_pytorch_model.safetensors"
    before = output.read_bytes()
    assert command.main([str(copy), "-o", str(output)]) == 2
    assert "is being converted, and would be overwritten" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_an_interrupted_export_leaves_the_old_file(tmp_path, folders, monkeypatch):
    output = tmp_path / "out.gguf"
    output.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("export.writer.fill_digest", interrupt)
    assert command.main([str(folders / "diffusers"), "-o", str(output)]) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"] and output.read_text() == "old"


# ---------------------------------------------------------------- LoRA

def lora(style, with_alpha):
    """Random LoRA tensors for some modules of the small transformer, in one style's keys. Rank 4."""
    generator = torch.Generator().manual_seed(5)
    dim, ffn = 48, 104
    modules = {f"blocks.{i}.{a}.{m}": (dim, dim) for i in (0, 1) for a in ("self_attn", "cross_attn") for m in "qkvo"}
    modules |= {f"blocks.{i}.ffn.{n}": shape for i in (0, 1) for n, shape in ((0, (ffn, dim)), (2, (dim, ffn)))}
    renames = {"self_attn.": "attn1.to_", "cross_attn.": "attn2.to_", "to_o": "to_out.0", "ffn.0": "ffn.net.0.proj",
               "ffn.2": "ffn.net.2"}
    out = {}
    for module, (rows, columns) in modules.items():
        down, up = (torch.randn(shape, generator=generator) / 4 for shape in ((4, columns), (rows, 4)))
        if style == "diffusers":
            for ours, theirs in renames.items():
                module = module.replace(ours, theirs)
            base, a, b = f"transformer.{module}", "lora_A", "lora_B"
        elif style == "kohya":
            base, a, b = "lora_unet_" + module.replace(".", "_"), "lora_down", "lora_up"
        else:
            base, (a, b) = f"diffusion_model.{module}", style.split()
        out |= {f"{base}.{a}.weight": down, f"{base}.{b}.weight": up}
        if with_alpha:
            out[f"{base}.alpha"] = torch.tensor(float(1 + len(out) % 7))
    return out


def fused(folders, path, scale):
    """The transformer's weights after diffusers' own load_lora_weights and fuse_lora, by diffusers' names."""
    from diffusers import WanPipeline
    transformer = WanTransformer3DModel.from_pretrained(folders / "diffusers/transformer")
    pipe = WanPipeline(None, None, None, None, transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return transformer.state_dict()


@pytest.mark.parametrize("style, with_alpha", [
    ("lora_A lora_B", False), ("lora_A lora_B", True), ("lora_down lora_up", True), ("kohya", True),
    ("diffusers", False)])
@pytest.mark.parametrize("scale", [1.0, 0.35])
def test_lora_is_merged_as_diffusers_merges(tmp_path, folders, capsys, style, with_alpha, scale):
    path = tmp_path / "style.safetensors"
    weights = lora(style, with_alpha)
    if style.startswith("lora_"):
        weights |= {f"diffusion_model.blocks.{i}.ffn.2.diff_b": torch.full((48,), 0.25) for i in (0, 1)}
    save_file(weights, path)
    file = tensors(export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--lora", f"{path}:{scale}"))
    assert f"{len(weights)} keys applied" in capsys.readouterr().err
    source, changed = expected(folders), 0
    for name, reference in fused(folders, path, scale).items():
        ours = file[our_name("transformer", name)][1]
        reference = reference.numpy().reshape(ours.shape)
        assert np.abs(ours - reference).max() <= 1e-6 * np.abs(reference).max(), name
        changed += not np.array_equal(ours, source[our_name("transformer", name)])
    assert changed >= 20


def test_alpha_of_the_adapter_metadata(tmp_path, folders):
    from peft import LoraConfig
    path, weights = tmp_path / "lora.safetensors", lora("diffusers", False)
    modules = sorted({k.split(".lora_")[0].removeprefix("transformer.") for k in weights})
    config = LoraConfig(r=4, lora_alpha=10, target_modules=modules).to_dict()
    values = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    save_file(weights, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(values)})
    file = tensors(export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--lora", path))
    name = "blocks.1.ffn.net.2.weight"
    reference = fused(folders, path, 1.0)[name].numpy()
    assert np.abs(file["blocks.1.ffn.2.weight"][1] - reference).max() <= 1e-6 * np.abs(reference).max()
    down, up = (weights[f"transformer.blocks.1.ffn.net.2.{k}.weight"] for k in ("lora_A", "lora_B"))
    difference = reference - expected(folders)["blocks.1.ffn.2.weight"]
    assert np.allclose(difference, 2.5 * (up @ down).numpy(), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_as_peft_saves_it(tmp_path, folders, capsys, bias):
    from peft import LoraConfig, get_peft_model
    transformer = WanTransformer3DModel.from_pretrained(folders / "diffusers/transformer")
    adapter = get_peft_model(transformer, LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "ffn.net.2"],
                                                     init_lora_weights=False, lora_bias=bias))
    adapter.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    file = tensors(export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--lora", path))
    for name, reference in adapter.merge_and_unload().state_dict().items():
        ours, reference = file[our_name("transformer", name)][1], reference.numpy()
        assert np.abs(ours - reference.reshape(ours.shape)).max() <= 2e-6 * np.abs(reference).max(), name
    (tmp_path / "adapter/adapter_config.json").unlink()
    (tmp_path / "out.gguf").unlink()
    assert "adapter_config.json" in refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", path)


@pytest.mark.parametrize("down, alpha, says", [
    (torch.ones(4, 48, dtype=torch.int8), torch.tensor(4.0), "lora_A.weight is I8"),
    (torch.ones(4, 48, dtype=torch.float8_e4m3fn), torch.tensor(4.0), "lora_A.weight is fp8 without its scale"),
    (torch.full((4, 48), math.nan), torch.tensor(4.0), "is not finite, with its LoRAs"),
    (torch.ones(4, 48), torch.ones(2), "cannot be read"), (torch.ones(0, 48), torch.tensor(4.0), "has rank 4")])
def test_lora_values_that_are_none_are_refused(tmp_path, folders, capsys, down, alpha, says):
    base, path = "diffusion_model.blocks.0.self_attn.q", tmp_path / "lora.safetensors"
    save_file({f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": torch.ones(48, 4), f"{base}.alpha": alpha}, path)
    capsys.readouterr()
    assert command.main([str(folders / "diffusers"), "-o", str(tmp_path / "out.gguf"), "--lora", str(path)]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()


def test_loras_add_up_and_differences_apply(tmp_path, folders):
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48),
               "diffusion_model.patch_embedding.diff": torch.ones(48, 16, 1, 2, 2),
               "diffusion_model.blocks.1.diff_m": torch.ones(1, 6, 48),
               "diffusion_model.blocks.0.norm3.diff": torch.ones(48)}, tmp_path / "a.safetensors")
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48)}, tmp_path / "b.safetensors")
    reader = export(folders / "diffusers", tmp_path / "out.gguf", "--lora", tmp_path / "a.safetensors",
                    "--lora", f"{tmp_path / 'b.safetensors'}:0.5")
    file, source = tensors(reader), expected(folders)
    for name, difference in (("blocks.0.self_attn.q.weight", 1.5), ("patch_embedding.weight", 1),
                             ("blocks.1.modulation", 1), ("blocks.0.norm3.weight", 1),
                             ("blocks.0.self_attn.k.weight", 0)):
        assert np.allclose(file[name][1], source[name] + difference, atol=1e-6), name
    assert keys(reader)["sora.lora"] == ["a.safetensors:1", "b.safetensors:0.5"]


@pytest.mark.parametrize("key, shape, says", [
    ("diffusion_model.blocks.7.self_attn.q.lora_A.weight", (4, 48), "matches no tensor"),
    ("diffusion_model.blocks.0.self_attn.q.dora_scale", (48,), "matches no tensor"),
    ("lora_te_blocks_0_attn_q.lora_down.weight", (4, 48), "matches no tensor"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", (4, 48), "has no counterpart"),
    ("diffusion_model.blocks.0.self_attn.q.diff", (48, 47), "has shape [48, 47]"),
    ("diffusion_model.blocks.0.self_attn.q.alpha", (), "has no counterpart")])
def test_lora_keys_that_do_not_apply_are_named(tmp_path, folders, capsys, key, shape, says):
    save_file({key: torch.ones(shape)}, tmp_path / "lora.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / "lora.safetensors")
    assert key in line and says in line


def test_a_lora_of_another_shape_is_refused(tmp_path, folders, capsys):
    base = "diffusion_model.blocks.0.ffn.0"  # its shape transposed: as many numbers
    save_file({f"{base}.lora_A.weight": torch.ones(4, 104), f"{base}.lora_B.weight": torch.ones(48, 4)},
              tmp_path / "lora.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--lora", tmp_path / "lora.safetensors")
    assert f"{base}.lora_B.weight has shape [48, 104], but blocks.0.ffn.0.weight has [104, 48]" in line


# ---------------------------------------------------------------- tokenizer

def tokenizer_json(**changes):
    """A small tokenizer.json with umT5's rules."""
    pieces = ["<pad>", "</s>", "<s>", "<unk>", "\u2581", "a", "b", "\u2581a", "<0x41>"]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in range(4)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [[p, -float(i)] for i, p in enumerate(pieces)],
                  "byte_fallback": False}} | changes


def with_tokenizer(tmp_path, folders, config):
    from tokenizers import Tokenizer
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    (copy / "tokenizer/tokenizer.json").write_text(json.dumps(config))
    Tokenizer.from_file(str(copy / "tokenizer/tokenizer.json"))  # the library takes it
    return copy


def test_tokenizer_json_is_the_truth_where_there_is_one(tmp_path, folders):
    added = {"id": 11, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": False}
    config = tokenizer_json()
    config["added_tokens"].append(added)
    values = keys(export(with_tokenizer(tmp_path, folders, config), tmp_path / "out.gguf"))
    assert values["tokenizer.ggml.tokens"][4:] == ["\u2581", "a", "b", "\u2581a", "<0x41>", "", "", "<x>"]
    assert values["tokenizer.ggml.token_type"] == [3, 3, 3, 2, 1, 1, 1, 1, 6, 5, 5, 5]
    assert values["tokenizer.ggml.scores"][5:8] == [-5.0, -6.0, -7.0]
    assert values["sora.tokenizer.added_ids"] == [0, 1, 2, 3, 11]
    assert values["sora.tokenizer.rules"] == "tokenizers"
    assert values["sora.tokenizer.squeeze_spaces"] is True and values["sora.tokenizer.byte_fallback"] is False
    assert values["sora.tokenizer.prepend_scheme"] == "always"
    assert values["tokenizer.ggml.eos_token_id"] == 1 and values["tokenizer.ggml.unknown_token_id"] == 3
    assert "tokenizer.ggml.precompiled_charsmap" not in values


@pytest.mark.parametrize("says, changes", [
    ("normalizer", {"normalizer": {"type": "NFKC"}}),
    ("normalizer", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    ("pre_tokenizer", {"pre_tokenizer": None}),
    ("pre_tokenizer", {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}}),
    ("post_processor", {"post_processor": None}),
    ("added token", {"added_tokens": [{"id": 1, "content": "</s>", "single_word": False, "lstrip": True,
                                       "rstrip": False, "normalized": False, "special": True}]}),
    ("model", {"model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}})])
def test_rules_that_sora_does_not_have_are_refused(tmp_path, folders, capsys, says, changes):
    copy = with_tokenizer(tmp_path, folders, tokenizer_json(**changes))
    line = refused(capsys, tmp_path / "out.gguf", copy)
    assert f"tokenizer.json: {says}" in line and "not supported" in line


def test_spiece_model_alone(tmp_path):
    import sentencepiece
    path = tmp_path / "spiece.model"
    path.write_bytes(make_checkpoint.train_tokenizer("nmt_nfkc"))
    model = sentencepiece.SentencePieceProcessor(str(path))
    values, size = tokenizer_keys(path), model.get_piece_size()
    assert values["tokenizer.ggml.tokens"] == [model.id_to_piece(i) for i in range(size)]
    assert values["tokenizer.ggml.scores"] == [model.get_score(i) for i in range(size)]
    kinds = values["tokenizer.ggml.token_type"]
    assert [k == 6 for k in kinds] == [model.is_byte(i) for i in range(size)]
    assert [k == 3 for k in kinds] == [model.is_control(i) for i in range(size)]
    assert values["tokenizer.ggml.unknown_token_id"] == model.unk_id() == kinds.index(2)
    assert values["tokenizer.ggml.eos_token_id"] == model.eos_id()
    assert values["sora.tokenizer.rules"] == "sentencepiece" and values["sora.tokenizer.byte_fallback"] is True
    assert len(values["tokenizer.ggml.precompiled_charsmap"]) > 100000


def test_normaliser_map_is_written_as_bytes(tmp_path, folders):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    path = copy / "tokenizer/spiece.model"
    path.write_bytes(make_checkpoint.train_tokenizer("nmt_nfkc"))
    field = export(copy, tmp_path / "out.gguf").fields["tokenizer.ggml.precompiled_charsmap"]
    assert field.types[1] == gguf.GGUFValueType.UINT8
    assert bytes(field.contents()) == tokenizer_keys(path)["tokenizer.ggml.precompiled_charsmap"]


# ---------------------------------------------------------------- configuration

def test_sizes_that_no_layout_states_come_from_shapes(tmp_path):
    vae = {"base_dim": 6, "z_dim": 8, "dim_mult": [2, 1, 3], "num_res_blocks": 1, "patch_size": 2, "in_channels": 12,
           "out_channels": 12, "temperal_downsample": [True, False]}
    make_checkpoint.make(tmp_path / "odd", vae=vae, transformer={
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 3, "attention_head_dim": 10, "ffn_dim": 77,
        "patch_size": [1, 2, 1], "freq_dim": 62})
    stated = json.loads((tmp_path / "odd/vae/config.json").read_text())
    (tmp_path / "odd/vae/config.json").write_text(json.dumps({  # the statistics cannot be inferred
        k: stated[k] for k in ("z_dim", "latents_mean", "latents_std")}))
    values = keys(export(tmp_path / "odd", tmp_path / "out.gguf"))
    for key in ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "patch_size", "in_channels", "out_channels"):
        assert values[f"vae.{key}"] == vae[key], key
    assert values["vae.temperal_downsample"] == [1, 0]
    assert np.allclose(values["vae.latents_std"], stated["latents_std"], rtol=1e-7)
    assert values["wan.patch_size"] == [1, 2, 1]
    assert [values[f"wan.{k}"] for k in ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads")] == [30, 77, 62, 8, 3]
    assert [values[f"t5encoder.attention.{k}"] for k in ("head_count", "key_length")] == [3, 16]


def test_defaults_from_the_general_to_the_particular(tmp_path, folders):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change_json(copy / "scheduler/scheduler_config.json", flow_shift=7.5)
    (copy / "sora.json").write_text(json.dumps({"width": 96, "height": 64, "steps": 12, "fps": "24000:1001",
                                                "negative_prompt": "blurry"}))
    values = keys(export(copy, tmp_path / "out.gguf", "--steps", 4, "--name", "tiny", "--sampler", "euler"))
    assert (values["default.width"], values["default.height"], values["default.frames"]) == (96, 64, 81)
    assert (values["default.steps"], values["default.guidance"], values["scheduler.shift"]) == (4, 5.0, 7.5)
    assert (values["default.fps_num"], values["default.fps_den"]) == (24000, 1001)
    assert (values["scheduler.sampler"], values["general.name"]) == ("euler", "tiny")
    assert values["default.negative_prompt"] == "blurry"


@pytest.mark.parametrize("name, sampler, shift", [("FlowMatchEulerDiscreteScheduler", "euler", {"shift": 4.0}),
                                                  ("DPMSolverMultistepScheduler", "dpm++", {
                                                      "flow_shift": 4.0, "use_flow_sigmas": True,
                                                      "prediction_type": "flow_prediction"})])
def test_schedulers(tmp_path, folders, name, sampler, shift):
    import diffusers
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    getattr(diffusers, name)(**shift).save_pretrained(copy / "scheduler")
    values = keys(export(copy, tmp_path / "out.gguf"))
    assert (values["scheduler.sampler"], values["scheduler.shift"]) == (sampler, 4.0)
