"""Conversion of a weight file that export.py wrote."""

import hashlib

import gguf
import numpy as np
import pytest
import torch
from export import command
from gguf import GGMLQuantizationType as Type
from helpers import ROOT, digest, export, keys, refused, tensors, write_gguf
from safetensors.torch import save_file
from test_lora import lora


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
    again = export(ROOT / "models/demo.gguf", tmp_path / "out.gguf")
    assert digest(bundled) == digest(again)
    before, after = ({k: v for k, v in keys(r).items() if not k.startswith("sora.source.")} for r in (bundled, again))
    # The exporter has since learned to write more keys; those that the file has keep their values.
    assert before.items() <= after.items() and before["default.precision"] == "f32"


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
    assert "unknown key sora.unheard_of, expected a file of this version" in refused(
        capsys, tmp_path / "out.gguf", path)
