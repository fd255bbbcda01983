"""Quantised weights in the formats of ComfyUI, LightX2V and others."""

import json

import numpy as np
import pytest
import torch
from export.containers import open_file
from export.quantised import weights_in
from gguf import GGMLQuantizationType as Type
from helpers import ROOT, export, export_parts, keys, parts, refused, tensors
from safetensors.torch import load_file, save_file

NAMES = [f"blocks.{i}.{m}" for i in (0, 1) for m in ("self_attn.q", "cross_attn.k", "ffn.0", "ffn.2")]


def quantise(weights, suffix="weight_scale", shape=(), dtype=torch.float8_e4m3fn, names=NAMES):
    """The weights with those of NAMES scaled to the range of a narrow type, and their scales. shape: of a scale, -1 for
    the number of rows."""
    largest, out = 127 if dtype == torch.int8 else torch.finfo(dtype).max, dict(weights)
    for name in names:
        values = weights[f"{name}.weight"]
        scale = (values.abs().amax(1, keepdim=True) if -1 in shape else values.abs().max()) / largest
        scaled = values / scale
        out[f"{name}.weight"] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        out[f"{name}.{suffix}"] = scale.reshape(shape)
    return out


def numbers(stored, name):
    """The weight by definition: value times scale."""
    scale = stored[f"{name}.weight_scale" if f"{name}.weight_scale" in stored else f"{name}.scale_weight"]
    return stored[f"{name}.weight"].float() * (scale if scale.dim() != 1 or len(scale) == 1 else scale[:, None])


def says(settings):
    """A tensor .comfy_quant."""
    return torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)


def exported(place, folders, stored, metadata=None):
    """The tensors of an export with these weights as the transformer."""
    save_file(stored, place / "wan.safetensors", metadata=metadata)
    return tensors(export_parts(folders, place / "out.gguf", transformer=place / "wan.safetensors"))


def refusal(capsys, place, folders, stored, metadata=None):
    save_file(stored, place / "wan.safetensors", metadata=metadata)
    options = parts(folders) | {"--transformer": place / "wan.safetensors"}
    return refused(capsys, place / "out.gguf", *(x for pair in options.items() for x in pair))


# ---------------------------------------------------------------- one scale a tensor or a row

@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_values_are_multiplied_by_their_scale(place, folders, weights, suffix, shape, dtype):
    stored = quantise(weights, suffix, shape, dtype)
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = exported(place, folders, stored | {f"{NAMES[0]}.scale_input": torch.ones(1)})
    for name in NAMES:
        assert np.array_equal(file[f"{name}.weight"][1], numbers(stored, name).numpy()), name
    assert np.array_equal(file["blocks.0.self_attn.k.weight"][1], weights["blocks.0.self_attn.k.weight"].numpy())


def test_a_scale_of_a_wide_weight_holds_too(place, folders, weights):
    weights[f"{NAMES[0]}.scale_weight"] = torch.tensor(0.5)
    file = exported(place, folders, weights)
    assert np.array_equal(file[f"{NAMES[0]}.weight"][1], 0.5 * weights[f"{NAMES[0]}.weight"].numpy())


def test_prefixes_stand_before_scales_too(place, folders, weights):
    stored = quantise(weights)
    file = exported(place, folders, {f"model.diffusion_model.{k}": v for k, v in stored.items()})
    assert np.array_equal(file[f"{NAMES[0]}.weight"][1], numbers(stored, NAMES[0]).numpy())


def test_a_text_encoder_of_comfyui(tmp_path, folders, baseline):
    weights = load_file(folders / "diffusers/text_encoder/model.safetensors")
    matrices = [k.removesuffix(".weight") for k in weights if "SelfAttention." in k or "DenseReluDense" in k]
    stored = quantise(weights, "scale_weight", names=[m for m in matrices if "relative" not in m])
    stored |= {k: v.half() for k, v in stored.items() if v.dtype == torch.float32 and "scale" not in k}
    model = (folders / "diffusers/tokenizer/spiece.model").read_bytes()
    stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    stored["spiece_model"] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    path = tmp_path / "umt5.safetensors"
    save_file(stored, path)
    file = export_parts(folders, tmp_path / "out.gguf", text_encoder=path, tokenizer=path)
    values = numbers(stored, "encoder.block.1.layer.1.DenseReluDense.wo")
    assert np.array_equal(tensors(file)["enc.blk.1.ffn_down.weight"][1], values.numpy())
    assert keys(file)["tokenizer.ggml.tokens"] == keys(baseline)["tokenizer.ggml.tokens"]


# ---------------------------------------------------------------- plain fp8

@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_the_weights(place, folders, weights, dtype):
    stored = {k: v.to(dtype) if v.dim() == 2 and k.startswith("blocks.") else v.half() for k, v in weights.items()}
    file = exported(place, folders, stored)
    for key, values in stored.items():
        assert np.array_equal(file[key][1].flatten(), values.float().numpy().flatten()), key


@pytest.mark.parametrize("lost, says", [
    ({}, "blocks.0.self_attn.q.weight is fp8 without a scale, expected blocks.0.self_attn.q.weight_scale"),
    ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "is fp8 without a scale")])
def test_fp8_without_its_scale_is_refused_where_it_should_have_one(place, folders, weights, capsys, lost, says):
    stored = quantise(weights) | lost
    for name in NAMES if lost else NAMES[:1]:  # with the marker, even if no scale is left
        del stored[f"{name}.weight_scale"]
    assert says in refusal(capsys, place, folders, stored)


# ---------------------------------------------------------------- formats that ComfyUI names

def blocks_of(values, size):
    """An int8 matrix with a scale for each block."""
    rows, columns = values.shape[0] // size, values.shape[1] // size
    scale = values.reshape(rows, size, columns, size).abs().amax((1, 3)) / 127
    return (values / scale.repeat_interleave(size, 0).repeat_interleave(size, 1)).round().to(torch.int8), scale


@pytest.mark.parametrize("way", ["metadata", "tensors"])
@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise"])
def test_formats_of_modules(place, folders, weights, way, format):
    dtype = {"f": getattr(torch, format, torch.int8), "i": torch.int8}[format[0]]
    stored, name = quantise(weights, dtype=dtype, names=NAMES[:2]), NAMES[0]
    want = numbers(stored, name)
    if format == "int8_blockwise":
        for n in NAMES[:2]:
            stored[f"{n}.weight"], stored[f"{n}.weight_scale"] = blocks_of(weights[f"{n}.weight"], 16)
        scale = stored[f"{name}.weight_scale"].repeat_interleave(16, 0).repeat_interleave(16, 1)
        want = stored[f"{name}.weight"].float() * scale
    stored[f"{name}.input_scale"] = torch.tensor(1.0)
    settings = {"format": format, "group_size": 16}
    metadata = None
    if way == "metadata":
        layers = {f"model.diffusion_model.{n}": settings for n in NAMES[:2]}
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    else:
        stored |= {f"{n}.comfy_quant": says(settings) for n in NAMES[:2]}
    file = exported(place, folders, stored, metadata)
    assert np.array_equal(file[f"{name}.weight"][1], want.numpy())


def test_fp8_in_a_tensor_of_bytes(place, folders, weights):
    stored = quantise(weights, names=NAMES[:1])
    want = numbers(stored, NAMES[0])
    stored[f"{NAMES[0]}.weight"] = stored[f"{NAMES[0]}.weight"].view(torch.uint8)
    stored[f"{NAMES[0]}.comfy_quant"] = says({"format": "float8_e4m3fn"})
    assert np.array_equal(exported(place, folders, stored)[f"{NAMES[0]}.weight"][1], want.numpy())


def test_comfy_kitchens_own_tensors():
    """int8 with a scale for each row, rotated in groups of 256, 64 and 16; fp8. comfy-kitchen dequantised the expected
    values."""
    file = open_file(ROOT / "tests/goldens/quantised/comfy.safetensors")
    want = load_file(ROOT / "tests/goldens/quantised/dequantised.safetensors")
    weights = weights_in(file.tensors)
    assert weights.keys() == want.keys() and len(want) == 6
    for key, values in want.items():
        whole = weights[key].rows()
        assert (whole - values).abs().max() <= 1e-6 * values.abs().max(), key
        assert torch.equal(whole[3:7], weights[key].rows(3, 7)), key


@pytest.mark.parametrize("settings, scale, what", [
    ({"format": "nvfp4"}, (48, 1), "blocks.0.self_attn.q.weight is quantised as nvfp4, expected one of float8_e4m3fn"),
    ({"format": "int8_tensorwise"}, (2, 2), "weight_scale has shape [2, 2], expected one value, or one for each of 48"),
    ({"format": "int8_blockwise"}, (5, 3), "or of blocks of [48, 48]"),
    ({"format": "float8_e4m3fn"}, (), "is I8 with a scale of F32, expected F8_E4M3 or U8"),
    ({"format": "int8_tensorwise", "convrot": True}, (48, 1), "convrot_groupsize is 256, expected a power of 4"),
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 8}, (48, 1), "convrot_groupsize is 8"),
    ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "x"}, (48, 1), "convrot_groupsize is 'x'"),
    ([], (48, 1), "comfy_quant")])
def test_formats_that_are_not_read_are_named(place, folders, weights, capsys, settings, scale, what):
    name = NAMES[0]
    stored = weights | {f"{name}.weight": torch.ones(48, 48, dtype=torch.int8),
                        f"{name}.weight_scale": torch.ones(scale), f"{name}.comfy_quant": says(settings)}
    assert what in refusal(capsys, place, folders, stored)


@pytest.mark.parametrize("helper, what", [
    ("weight_scale_2", "two levels of scales"), ("pre_quant_scale", "a scale for each input"),
    ("weight_scale_inv", "DeepSeek's scales of blocks")])
def test_scales_that_are_not_read_are_named(place, folders, weights, capsys, helper, what):
    stored = quantise(weights) | {f"{NAMES[0]}.{helper}": torch.ones(1)}
    line = refusal(capsys, place, folders, stored)
    assert f"{NAMES[0]}.{helper}: {what}" in line


@pytest.mark.parametrize("change, what", [
    ({"blocks.0.self_attn.q.weight": torch.zeros(48, 48, dtype=torch.int8)}, "q.weight is I8, expected F64, F32"),
    ({"blocks.9.self_attn.q.weight_scale": torch.ones(1)},
     "blocks.9.self_attn.q.weight_scale is the scale of no tensor"),
    ({"blocks.9.self_attn.q.comfy_quant": says({"format": "int8_tensorwise"})},
     "the metadata names blocks.9.self_attn.q, expected a weight"),
    ({"blocks.0.self_attn.q.weight_scale": torch.ones(1, dtype=torch.int32)}, "is F32 with a scale of I32")])
def test_what_does_not_belong_together(place, folders, weights, capsys, change, what):
    assert what in refusal(capsys, place, folders, weights | change)


def test_a_damaged_quantisation_metadata(place, folders, weights, capsys):
    line = refusal(capsys, place, folders, weights, {"_quantization_metadata": "{"})
    assert "_quantization_metadata" in line


def test_quantised_weights_are_stored_in_16_bits(place, folders, weights):
    save_file(quantise(weights), place / "wan.safetensors")
    file = tensors(export(folders / "diffusers", place / "out.gguf", "--transformer", place / "wan.safetensors"))
    assert file[f"{NAMES[0]}.weight"][0] == Type.BF16 and file["blocks.0.self_attn.k.weight"][0] == Type.F32
