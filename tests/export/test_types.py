"""The type of each tensor, and that its numbers are the source's within that type's rounding."""

import hashlib
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from helpers import change_transformer, digest, expected, export, refused, tensors
from safetensors.torch import load_file, save_file

EXACT = ("norm", "bias", "modulation", "attn_rel_b", "vae.", "gamma", "time_embedding")


WIDE = ("patch_embedding", "text_embedding", "time_projection", "head.head")


def test_digest_is_of_the_tensors(baseline):
    sha = hashlib.sha256()
    for t in baseline.tensors:
        assert t.data_offset % 64 == 0
        sha.update(t.data.tobytes())
    assert digest(baseline) == sha.hexdigest()


BLOCKS = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", *BLOCKS])
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
        elif name in BLOCKS:
            wide = any(key.startswith(part) for part in WIDE)
            assert kind == (Type.BF16 if wide else Type[name.upper()] if values.shape[-1] % 32 == 0 else Type.F16), key
        else:
            assert kind == Type[name.upper()], key
        if kind.name.lower() in BLOCKS:
            reference = gguf.quants.dequantize(gguf.quants.quantize(source[key], kind), kind)
            assert np.array_equal(values, reference), key
            continue
        half_step = {Type.F32: 0, Type.F16: 2**-11, Type.BF16: 2**-8}[kind]  # and f16's smallest number
        allowed = np.abs(source[key]) * half_step + (2**-25 if kind == Type.F16 else 0)
        assert np.all(np.abs(values - source[key]) <= allowed), key
    assert len(seen) == {"f32": 1, "f16": 2, "bf16": 2}.get(name, 4)


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
    file = tensors(export(copy, tmp_path / "out.gguf", "--type", "bf16"))  # --type does not change the VAE
    assert [file[k][0] for k in names] == [Type.BF16, Type.BF16, Type.BF16, Type.F32, Type.F16, Type.F32]
    file = tensors(export(copy, tmp_path / "out.gguf", "--type", "f32"))
    assert {file[k][0] for k in names} == {Type.F32}
    file = tensors(export(copy, tmp_path / "out.gguf", "--type", "q8_0"))  # the last layer keeps 16 bits
    assert file["head.head.weight"][0] == file["time_embedding.0.weight"][0] == Type.F16


def test_a_number_that_is_none_is_refused(tmp_path, folders, capsys):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "nan")
    change_transformer(copy, lambda w: w["blocks.1.ffn.net.2.weight"][47, 3].fill_(math.nan))
    assert "blocks.1.ffn.net.2.weight holds NaN or infinity" in refused(capsys, tmp_path / "out.gguf", copy)


@pytest.mark.parametrize("kind, name, value", [("f16", "ffn.net.2", 70000.0), ("q8_0", "attn1.to_q", 70000.0),
                                               ("q8_0", "ffn.net.2", 1e7)])  # rows of 104 are f16 instead of q8_0
def test_a_number_beyond_the_type_is_refused(tmp_path, folders, capsys, kind, name, value):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "large")
    change_transformer(copy, lambda w: w[f"blocks.0.{name}.weight"][3].fill_(value))
    line = refused(capsys, tmp_path / "out.gguf", copy, "--type", kind)
    assert f"blocks.0.{name}.weight holds {value:g}" in line and "use --type bf16" in line


def test_a_number_beyond_the_scale_of_a_block_is_refused(tmp_path, folders, capsys):
    path = tmp_path / "umt5.safetensors"
    weights = load_file(folders / "diffusers/text_encoder/model.safetensors")
    weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"][3, 5] = 1e7  # in a row of 96; the limit is 127 * 65504
    save_file(weights, path)
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--text-encoder", path, "--type", "q8_0")
    assert "wo.weight holds 1e+07, expected at most 8.31901e+06 for q8_0" in line


def test_numbers_below_the_smallest_of_f16_become_0(tmp_path, folders):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "small")
    change_transformer(copy, lambda w: w["blocks.0.attn1.to_q.weight"].mul_(1e-9))
    assert not tensors(export(copy, tmp_path / "out.gguf", "--type", "f16"))["blocks.0.self_attn.q.weight"][1].any()
