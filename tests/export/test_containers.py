"""Containers of weights, as trainers, downloads and converters leave them."""

import argparse
import json
import shutil
import struct
from pathlib import Path

import gguf
import make_checkpoint
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers import (command, digest, expected, export, export_parts, keys, llama_cpp_name, original, parts,
                     refused, tensors, write_gguf)
from safetensors.torch import load_file, save_file


def refusal(capsys, path, folders):
    """The error line for a file that is given as the transformer."""
    options = parts(folders) | {"--transformer": path}
    return refused(capsys, path.parent / "out.gguf", *(x for pair in options.items() for x in pair))


# ---------------------------------------------------------------- whatever the container

STAND_INS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5676070424\n", "is a Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html>Access to model is restricted</html>" * 40, "is a web page"),
    "xml": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page"),
    "empty": (b"", "is empty"),
    "text": (b"not found",
             "unknown format by its first bytes, expected one of .safetensors, .pth, .pt, .bin, .ckpt, .gguf"),
}


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth", "wan.gguf"])
def test_what_stands_in_a_files_place_is_named(place, folders, capsys, name, kind):
    content, says = STAND_INS[kind]
    (place / name).write_bytes(content)
    assert f"{name}: {says}" in refusal(capsys, place / name, folders)


@pytest.mark.parametrize("part, name", [("transformer", "config.json"), ("tokenizer", "spiece.model"),
                                        ("", "model_index.json"), ("", "sora.json")])
@pytest.mark.parametrize("kind", ["lfs", "html", "empty"])
def test_what_stands_in_a_small_files_place_is_named(tmp_path, folders, capsys, part, name, kind):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    content, says = STAND_INS[kind]
    (copy / part / name).write_bytes(content)
    assert f"{name}: {says}" in refused(capsys, tmp_path / "out.gguf", copy)


def write(path, weights):
    if path.suffix == ".gguf":
        write_gguf(path, "wan", {k: (v, Type.F32) for k, v in weights.items()})
    else:
        (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth", "wan.gguf"])
def test_a_file_that_is_cut_off_is_named(place, folders, weights, capsys, name):
    write(place / name, weights)
    (place / name).write_bytes((place / name).read_bytes()[:-5000])
    line = refusal(capsys, place / name, folders)
    assert f"{name}: cannot be read: the file is incomplete or damaged, copy or download it again" in line


@pytest.mark.parametrize("name, really", [("wan.bin", "wan.safetensors"), ("wan.ckpt", "wan.gguf"),
                                          ("wan.model", "wan.pth")])
def test_the_content_decides_what_a_file_is(place, folders, weights, baseline, name, really):
    write(place / really, weights)
    (place / really).rename(place / name)
    assert digest(export_parts(folders, place / "out.gguf", transformer=place / name)) == digest(baseline)


@pytest.mark.parametrize("step", ["tokenizer_keys", "check_space", "write"])
@pytest.mark.parametrize("layout, name", [("diffusers", "vae/diffusion_pytorch_model.safetensors"),
                                          ("diffusers", "text_encoder/config.json")])
def test_files_that_disappear_meanwhile(tmp_path, folders, capsys, monkeypatch, step, layout, name):
    copy = shutil.copytree(folders / layout, tmp_path / "copy")
    function = getattr(command, step)

    def lose(*arguments):
        (copy / name).unlink()
        return function(*arguments)

    monkeypatch.setattr(command, step, lose)
    if step == "write" and name.endswith("config.json"):
        export(copy, tmp_path / "out.gguf")  # all its values are known by then
    else:
        assert f"{copy / name}: No such file or directory" in refused(capsys, tmp_path / "out.gguf", copy)


# ---------------------------------------------------------------- safetensors

DIRECT = {  # weights that give the same file
    "a marker without fp8": lambda w: {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)},
    "double precision": lambda w: {k: v.double() for k, v in w.items()},
}


@pytest.mark.parametrize("change", DIRECT)
def test_safetensors_that_mean_the_same(place, folders, weights, baseline, change):
    save_file(weights | DIRECT[change](weights), place / "wan.safetensors",
              metadata={"modelspec.architecture": "wan", "x": "é", "format": "pt"})
    assert digest(export_parts(folders, place / "out.gguf", transformer=place / "wan.safetensors")) == digest(baseline)


@pytest.mark.parametrize("change, says", [
    ({"extra": torch.zeros(0, 3)}, "extra [0, 3] is no tensor of the transformer"),
    ({"blocks.0.self_attn.q.weight": torch.zeros(0, 48)}, "q.weight has shape [0, 48], expected [48, 48]")])
def test_safetensors_with_what_does_not_belong(place, folders, weights, capsys, change, says):
    save_file(weights | change, place / "wan.safetensors")
    assert says in refusal(capsys, place / "wan.safetensors", folders)


def test_safetensors_whose_tensors_overlap(place, folders, weights, capsys):
    path = place / "wan.safetensors"
    save_file(weights, path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header["blocks.0.self_attn.k.weight"]["data_offsets"] = header["blocks.0.self_attn.q.weight"]["data_offsets"]
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(data[:8] + text + data[8 + size:])
    assert "wan.safetensors: cannot be read" in refusal(capsys, path, folders)


# ---------------------------------------------------------------- pickles

def transposed(values):
    """The same tensor with column-major strides."""
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(values):
    return values.contiguous(memory_format=torch.channels_last_3d) if values.dim() == 5 else values


PICKLES = {  # what trainers save, as a function of the tensors; all give the same file
    "ordinary": lambda w: w,
    "in a dictionary beside other things": lambda w: {"state_dict": w, "epoch": 3, "optimizer": {}},
    "lightning": lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "pytorch-lightning_version": "2"},
    "parameters": lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()},
    "transposed": lambda w: {k: transposed(v) for k, v in w.items()},
    "channels last": lambda w: {k: channels_last(v) for k, v in w.items()},
    "parts of larger tensors": lambda w: {k: torch.cat([v.flatten(), torch.zeros(5)])[:v.numel()].reshape(v.shape)
                                          for k, v in w.items()},
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_mean_the_same(place, folders, weights, baseline, kind, legacy):
    torch.save(PICKLES[kind](weights), place / "wan.pth", _use_new_zipfile_serialization=not legacy)
    assert digest(export_parts(folders, place / "out.gguf", transformer=place / "wan.pth")) == digest(baseline)


def test_a_vae_in_channels_last(tmp_path, folders, baseline):
    vae = torch.load(folders / "original/Wan2.1_VAE.pth", weights_only=True)
    torch.save({k: channels_last(v) for k, v in vae.items()}, tmp_path / "vae.pth")
    assert digest(export_parts(folders, tmp_path / "out.gguf", vae=tmp_path / "vae.pth")) == digest(baseline)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_transposed_weights_are_narrowed(place, folders, weights, kind):
    torch.save({k: transposed(v) for k, v in weights.items()}, place / "wan.pth")
    file = export(folders / "diffusers", place / "a.gguf", "--type", kind, "--transformer", place / "wan.pth")
    assert digest(file) == digest(export(folders / "diffusers", place / "b.gguf", "--type", kind))


@pytest.mark.parametrize("container", ["generator_ema", "generator", "ema", "model_state_dict", "state_dict", "model",
                                       "module"])
def test_containers(place, folders, weights, baseline, container):
    torch.save({container: weights, "epoch": 3}, place / "wan.pt")
    file = export_parts(folders, place / "out.gguf", transformer=place / "wan.pt", rule="multistep")
    assert digest(file) == digest(baseline)


def test_averaged_weights_go_before_the_last(place, folders, weights, baseline):
    others = {k: v * 0 for k, v in weights.items()}
    for averaged, last in (("generator_ema", "generator"), ("ema", "model"), ("ema", "state_dict")):
        torch.save({last: others, averaged: weights}, place / "wan.pt")
        file = export_parts(folders, place / "out.gguf", transformer=place / "wan.pt", rule="multistep")
        assert digest(file) == digest(baseline)


class Code:
    """An object whose loading runs code."""

    def __reduce__(self):
        return Path.touch, (Path("code-ran"),)


Q = "blocks.0.self_attn.q.weight"
WRONG_PICKLES = {
    "arguments": (lambda w: {"model": w, "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace, whose "
                  "loading could run code, expected tensors only: save them"),
    "numpy arrays": (lambda w: {k: v.numpy() for k, v in w.items()}, "holds numpy"),
    "a module": (lambda w: torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, whose loading"),
    "code": (lambda w: {"conv1.weight": Code()}, "holds getattr, whose loading could run code"),
    "a list": (lambda w: [w], "holds a list, expected a dictionary of tensors"),
    "a tensor": (lambda w: torch.zeros(3), "holds a Tensor, expected a dictionary of tensors"),
    "a key that is no text": (lambda w: {3: torch.zeros(2)}, "3 is not a tensor"),
    "a value that is no tensor": (lambda w: w | {"x": {"y": 3}}, "'x' is not a tensor"),
    "a sparse tensor": (lambda w: w | {Q: w[Q].to_sparse()}, f"{Q} is a sparse_coo tensor, expected F64, F32"),
    "tensors without values": (lambda w: {k: v.to("meta") for k, v in w.items()},
                               "is a shape without values (of torch's meta device), expected F64, F32"),
    "a count": (lambda w: w | {"num_batches_tracked": torch.tensor(3)}, "num_batches_tracked is torch.int64"),
}


@pytest.mark.parametrize("kind", WRONG_PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_do_not_convert(place, folders, weights, capsys, monkeypatch, kind, legacy):
    monkeypatch.chdir(place)
    content, says = WRONG_PICKLES[kind]
    torch.save(content(weights), place / "wan.pth", _use_new_zipfile_serialization=not legacy)
    assert says in refusal(capsys, place / "wan.pth", folders)
    assert not (place / "code-ran").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_program_or_quantised_tensors_do_not_convert(place, folders, weights, capsys):
    torch.jit.script(torch.nn.Linear(2, 2)).save(place / "wan.pt")
    line = refusal(capsys, place / "wan.pt", folders)
    assert "wan.pt: is a TorchScript program, expected tensors: save its state_dict()" in line
    torch.save(weights | {Q: torch.quantize_per_tensor(weights[Q], 0.1, 0, torch.qint8)}, place / "wan.pt")
    assert f"{Q} is torch.qint8, expected F64, F32" in refusal(capsys, place / "wan.pt", folders)


# ---------------------------------------------------------------- GGUF

FOLDED = {"patch_embedding.weight"}  # of more than four dimensions


def patched(weights):
    """Weights with at most the four dimensions of ggml."""
    return {k: v.flatten(0, 1) if k in FOLDED else v for k, v in weights.items()}


GGUFS = {  # (architecture, prefix, whether the patch embedding has five dimensions)
    "four dimensions": ("wan", "", False),
    "five dimensions": ("wan", "", True),
    "pig": ("pig", "", True),
    "cow": ("cow", "", False),
    "prefixed": ("wan", "model.diffusion_model.", True),
}


@pytest.mark.parametrize("kind", GGUFS)
def test_ggufs_that_mean_the_same(place, folders, weights, baseline, kind):
    arch, prefix, five = GGUFS[kind]
    tensors_ = {prefix + k: (v, Type.F32) for k, v in (weights if five else patched(weights)).items()}
    write_gguf(place / "wan.gguf", arch, tensors_)
    assert digest(export_parts(folders, place / "out.gguf", transformer=place / "wan.gguf")) == digest(baseline)


def test_a_gguf_without_an_architecture(place, folders, weights, baseline):
    path = place / "wan.gguf"
    write_gguf(path, "wan", {k: (v, Type.F32) for k, v in weights.items()})
    data = path.read_bytes()
    key = struct.pack("<Q", 20) + b"general.architecture"
    at = data.index(key)
    path.write_bytes(data.replace(key, struct.pack("<Q", 20) + b"general.unheard_of__", 1))
    assert at > 0 and "general.architecture" not in gguf.GGUFReader(path).fields
    assert digest(export_parts(folders, place / "out.gguf", transformer=path)) == digest(baseline)


def test_blocks_that_run_over_the_ends_of_rows(place, folders, weights):
    """ComfyUI-GGUF stores such a tensor in other rows, and its shape in a key."""
    name = "blocks.0.ffn.2.weight"  # (48, 104)
    stored = {k: (v, Type.F32) for k, v in weights.items()} | {name: (weights[name].reshape(-1, 96), Type.Q8_0)}
    write_gguf(place / "wan.gguf", "wan", stored, [("add_array", f"comfy.gguf.orig_shape.{name}", [48, 104])])
    file = tensors(export_parts(folders, place / "out.gguf", transformer=place / "wan.gguf"))
    want = gguf.quants.dequantize(gguf.quants.quantize(stored[name][0].numpy(), Type.Q8_0), Type.Q8_0)
    assert np.array_equal(file[name][1], want.reshape(48, 104))


def test_an_original_shape_that_does_not_fit(place, folders, weights, capsys):
    write_gguf(place / "wan.gguf", "wan", {k: (v, Type.F32) for k, v in weights.items()},
               [("add_array", f"comfy.gguf.orig_shape.{Q}", [48, 47])])
    assert f"{Q} is [48, 47], expected as many elements as the tensor's [48, 48]" in refusal(
        capsys, place / "wan.gguf", folders)


KINDS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
         "IQ4_XS", "TQ1_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_tensors_of_others_are_read_as_gguf_reads_them(place, folders, weights, kind):
    """Random blocks give the numbers of the gguf package, for every type."""
    name, kind = "blocks.0.self_attn.q.weight", Type[kind]
    block, size = gguf.constants.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (48 * 48 // block, size), dtype=np.uint8)
    if kind not in (Type.F16, Type.BF16):
        raw[:] = finite(raw, kind)
    else:
        raw[:, 1] &= 0x3F  # no infinity, no NaN
    writer = gguf.GGUFWriter(place / "wan.gguf", "wan")
    writer.add_array(f"comfy.gguf.orig_shape.{name}", [48, 48])
    for key, values in weights.items():
        if key == name:
            writer.add_tensor(key, raw.reshape(-1, size) if block > 1 else raw.reshape(48, -1), raw_dtype=kind)
        else:
            writer.add_tensor(key, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tensors(export_parts(folders, place / "out.gguf", transformer=place / "wan.gguf"))
    assert np.array_equal(file[name][1], gguf.quants.dequantize(raw.reshape(1, -1), kind).reshape(48, 48))


def finite(raw, kind):
    """The blocks, with zeros in place of those that have NaN or infinity."""
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw, kind).reshape(len(raw), -1)
    return np.where(np.isfinite(values).all(1)[:, None], raw, 0)


@pytest.mark.parametrize("version, says", [(struct.pack("<I", 1), "version 1"), (struct.pack(">I", 3), None),
                                           (struct.pack("<I", 2), "")])
def test_versions_of_gguf(place, folders, weights, baseline, capsys, version, says):
    path = place / "wan.gguf"
    write_gguf(path, "wan", {k: (v, Type.F32) for k, v in weights.items()})
    data = path.read_bytes()
    path.write_bytes(data[:4] + version + data[8:])
    if says == "":
        assert digest(export_parts(folders, place / "out.gguf", transformer=path)) == digest(baseline)
    else:
        assert f"wan.gguf: cannot be read: {'Sorry, file appears to be ' + says if says else ''}" in refusal(
            capsys, path, folders)


# ---------------------------------------------------------------- GGUF of the text encoder

def tokenizer_fields(keys, **changes):
    """The keys that llama.cpp writes for a spiece.model, from those of a weight file."""
    values = {key: keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")} | changes
    return [("add_string", "tokenizer.ggml.model", "t5"),
            *(("add_array", f"tokenizer.ggml.{key}", value) for key, value in values.items())]


def text_encoder(folders):
    """The text encoder's tensors under llama.cpp's names, some in q8_0."""
    text, _, _ = original(folders)
    return {llama_cpp_name(k): (v, Type.Q8_0 if v.shape[-1] % 32 == 0 else Type.F32) for k, v in text.items()}


@pytest.mark.parametrize("arch", ["t5encoder", "t5"])
def test_gguf_of_the_text_encoder_carries_its_tokenizer(tmp_path, folders, baseline, arch):
    weights, theirs, path = text_encoder(folders), keys(baseline), tmp_path / "t5.gguf"
    write_gguf(path, arch, weights, tokenizer_fields(theirs, precompiled_charsmap=b"\0\1\2\3"))
    file = export_parts(folders, tmp_path / "out.gguf", text_encoder=path, tokenizer=path)
    ours = keys(file)
    assert all(ours[k] == v for k, v in theirs.items() if k.startswith(("tokenizer.", "sora.tokenizer.")))
    assert bytes(ours["tokenizer.ggml.precompiled_charsmap"]) == b"\0\1\2\3"
    source = expected(folders)
    for name, (kind, values) in tensors(file).items():
        if name in weights:
            exact = weights[name][1] == Type.F32
            assert np.abs(values - source[name]).max() <= (0 if exact else np.abs(source[name]).max() / 100)


def test_q8_0_stays_what_it_is_bit_for_bit(tmp_path, folders):
    path = tmp_path / "t5.gguf"
    write_gguf(path, "t5encoder", text_encoder(folders))
    file = export(folders / "diffusers", tmp_path / "kept.gguf", "--text-encoder", path)
    theirs, ours = ({t.name: t for t in r.tensors} for r in (gguf.GGUFReader(path), file))
    kept = [name for name, tensor in theirs.items() if tensor.tensor_type == Type.Q8_0 and "rel_b" not in name]
    assert len(kept) == 2 and all(theirs[name].n_elements > 3000 for name in kept)  # read in several slices
    assert all(np.array_equal(theirs[name].data, ours[name].data) for name in kept)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_stay_what_they_are(tmp_path, kind):
    """As downloaded, and once more from the weight file; --type bf16 widens them."""
    name, kind = "blocks.1.ffn.2.weight", Type[kind]
    make_checkpoint.make(tmp_path / "original", layout="original", transformer={"ffn_dim": 256})
    shutil.copytree(tmp_path / "original", tmp_path / "place")
    path = tmp_path / "place/diffusion_pytorch_model.safetensors"
    block, size = gguf.constants.GGML_QUANT_SIZES[kind]
    raw = finite(np.random.default_rng(0).integers(0, 256, (48 * 256 // block, size), np.uint8), kind)
    writer = gguf.GGUFWriter(tmp_path / "place/wan.gguf", "wan")
    for key, values in load_file(path).items():
        writer.add_tensor(key, raw.reshape(48, -1) if key == name else values.numpy(),
                          raw_dtype=kind if key == name else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    once = export(tmp_path / "original", tmp_path / "once.gguf", "--transformer", tmp_path / "place/wan.gguf")
    again = export(tmp_path / "once.gguf", tmp_path / "again.gguf", "--type", "keep")
    for reader in (once, again):
        tensor = next(t for t in reader.tensors if t.name == name)
        assert tensor.tensor_type == kind and np.array_equal(tensor.data.reshape(-1), raw.reshape(-1))
    wide = tensors(export(tmp_path / "once.gguf", tmp_path / "wide.gguf", "--type", "f32"))[name]
    assert np.array_equal(wide[1], gguf.quants.dequantize(raw.reshape(1, -1), kind).reshape(48, 256))


def test_a_vocabulary_padded_to_the_embedding(tmp_path, folders, baseline):
    """llama.cpp fills the vocabulary with unused pieces. They are kept, and the search does not find them."""
    theirs, path, count = keys(baseline), tmp_path / "t5.gguf", 20
    tokens = theirs["tokenizer.ggml.tokens"] + [f"[PAD{i}]" for i in range(count)]
    write_gguf(path, "t5encoder", text_encoder(folders), tokenizer_fields(
        theirs, tokens=tokens, scores=theirs["tokenizer.ggml.scores"] + [-1000.0] * count,
        token_type=theirs["tokenizer.ggml.token_type"] + [5] * count))
    ours = keys(export_parts(folders, tmp_path / "out.gguf", text_encoder=path, tokenizer=path))
    assert ours["tokenizer.ggml.tokens"] == tokens


def test_a_text_encoder_without_a_tokenizer(tmp_path, folders, capsys):
    path = tmp_path / "t5.gguf"
    write_gguf(path, "t5encoder", text_encoder(folders))
    options = parts(folders) | {"--text-encoder": path}
    del options["--tokenizer"]
    line = refused(capsys, tmp_path / "out.gguf", *(x for pair in options.items() for x in pair))
    assert "t5.gguf: holds no unigram tokenizer" in line and "--tokenizer" in line


def test_the_wrong_text_encoder(tmp_path, folders, capsys):
    """T5 has one table of position biases, umT5 one in each block."""
    weights = load_file(folders / "diffusers/text_encoder/model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(weights, tmp_path / "t5.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--text-encoder", tmp_path / "t5.safetensors")
    assert "the text encoder's enc.blk.1.attn_rel_b.weight is missing" in line


