"""Layouts of checkpoints, parts given one by one, and models that sora cannot run."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from export.names import count_upsamples, our_name
from export.parts import Part, expert_note
from helpers import (change_json, change_transformer, digest, export, export_parts, keys, original, parts, refused,
                     tensors, truncate)
from safetensors.torch import load_file, save_file

import make_checkpoint


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


def test_sources_are_named_with_their_digest(folders, baseline):
    values = keys(baseline)
    for name, sha in zip(values["sora.source.names"], values["sora.source.sha256"], strict=True):
        assert hashlib.sha256((folders / "diffusers" / name).read_bytes()).hexdigest() == sha
    assert "text_encoder/model.safetensors" in values["sora.source.names"]


def test_parts_named_one_by_one(tmp_path, folders, baseline):
    assert digest(export_parts(folders, tmp_path / "out.gguf")) == digest(baseline)
    root = folders / "original"
    assert digest(export_parts(folders, tmp_path / "out.gguf", vae=root / "Wan2.1_VAE.pth",
                               transformer=root / "diffusion_pytorch_model.safetensors",
                               text_encoder=root / "models_t5_umt5-xxl-enc-bf16.pth",
                               tokenizer=root / "google/umt5-xxl/spiece.model")) == digest(baseline)


@pytest.mark.parametrize("prefix", [
    "model.diffusion_model.", "diffusion_model.model.", "diffusion_model.", "model.", "net.", "generator.", "module.",
    "transformer.", "dit.", "pipe.dit.", "unet.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.module.",
    "_fsdp_wrapped_module.", "model._fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_prefixes(place, folders, weights, baseline, prefix):
    save_file({prefix + k: v for k, v in weights.items()}, place / "wan.safetensors")
    file = export_parts(folders, place / "out.gguf", transformer=place / "wan.safetensors")
    assert digest(file) == digest(baseline)


def test_wrappers_inside_names(place, folders, weights, baseline):
    """Keys of a model whose blocks were compiled or wrapped one by one."""
    wrapped = {k.replace("blocks.1.", "blocks.1._orig_mod.").replace(".ffn.", ".ffn._fsdp_wrapped_module."): v
               for k, v in weights.items()}
    assert wrapped.keys() != weights.keys()
    save_file(wrapped, place / "wan.safetensors")
    file = export_parts(folders, place / "out.gguf", transformer=place / "wan.safetensors")
    assert digest(file) == digest(baseline)


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


def test_sizes_that_no_layout_states_come_from_shapes(tmp_path):
    vae = {"base_dim": 6, "z_dim": 8, "dim_mult": [2, 1, 3], "num_res_blocks": 1, "patch_size": 2, "in_channels": 12,
           "out_channels": 12, "temperal_downsample": [True, False]}
    make_checkpoint.make(tmp_path / "odd", vae=vae, transformer={
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 3, "attention_head_dim": 10, "ffn_dim": 77,
        "patch_size": [1, 2, 1], "freq_dim": 62})
    stated = json.loads((tmp_path / "odd/vae/config.json").read_text())
    (tmp_path / "odd/vae/config.json").write_text(json.dumps({  # mean and deviation are in no shape
        k: stated[k] for k in ("z_dim", "latents_mean", "latents_std")}))
    values = keys(export(tmp_path / "odd", tmp_path / "out.gguf"))
    for key in ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "patch_size", "in_channels", "out_channels"):
        assert values[f"vae.{key}"] == vae[key], key
    assert values["vae.temperal_downsample"] == [1, 0]
    assert np.allclose(values["vae.latents_std"], stated["latents_std"], rtol=1e-7)
    assert values["wan.patch_size"] == [1, 2, 1]
    assert [values[f"wan.{k}"] for k in ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads")] == [30, 77, 62, 8, 3]
    assert [values[f"t5encoder.attention.{k}"] for k in ("head_count", "key_length")] == [3, 16]


WRONG = [  # (change of a diffusers folder, part of the error line)
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
    (lambda f: change_transformer(f, lambda w: w.update({"vace_blocks.0.proj_in.weight": torch.zeros(2)})), "VACE"),
    (lambda f: change_json(f / "transformer/config.json", num_layers=3),
     "num_layers is 3, expected 2 by the tensors' shapes"),
    (lambda f: change_json(f / "transformer/config.json", qk_norm="rms_norm"), "qk_norm is 'rms_norm'"),
    (lambda f: change_json(f / "transformer/config.json", num_attention_heads="two"),
     "num_attention_heads is 'two', expected a number from 1 to 1024"),
    (lambda f: change_json(f / "transformer/config.json", eps="x"), "eps is 'x', expected a number"),
    (lambda f: change_json(f / "transformer/config.json", local_attention=12),
     "local_attention is 12: unknown setting"),
    (lambda f: change_json(f / "transformer/config.json", _class_name="WanAnimateModel"),
     "_class_name is 'WanAnimateModel'"),
    (lambda f: change_json(f / "text_encoder/config.json", relative_attention_max_distance=0),
     "relative_attention_max_distance is 0, expected a number from 1"),
    (lambda f: change_json(f / "text_encoder/config.json", layer_norm_epsilon=None), "layer_norm_epsilon is None"),
    (lambda f: change_json(f / "vae/config.json", latents_std=[0.0] * 16), "expected finite numbers above 0"),
    (lambda f: change_json(f / "model_index.json", _class_name="WanVACEPipeline"), "a WanVACEPipeline cannot be run"),
    (lambda f: change_json(f / "model_index.json", transformer_2=True), "model_index.json: cannot be read"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", flow_shift=None),
     "scheduler_config.json: cannot be read"),
    (lambda f: (f / "scheduler/scheduler_config.json").write_text('{"_class_name": "UniPCMultistepScheduler"}'),
     "prediction_type is None, expected 'flow_prediction'"),
    (lambda f: change_json(f / "vae/config.json", is_residual=True), "is_residual is True"),
    (lambda f: change_json(f / "vae/config.json", dim_mult=[1, 2, 4, 8]), "dim_mult is [1, 2, 4, 8]"),
    (lambda f: change_json(f / "vae/config.json", latents_mean=[0.0]), "latents_mean has 1 numbers, expected 16"),
    (lambda f: change_json(f / "text_encoder/config.json", feed_forward_proj="relu"), "feed_forward_proj is 'relu'"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", solver_order=3), "solver_order is 3, expected 2"),
    (lambda f: change_json(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
     "_class_name is DDIMScheduler, expected one of"),
    (lambda f: change_json(f / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]),
     "transformer_2: no such file or folder"),
    (lambda f: change_json(f / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"]),
     "image-to-video"),
    (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: cannot be read"),
    (lambda f: truncate(f / "vae/diffusion_pytorch_model.safetensors"),
     "vae/diffusion_pytorch_model.safetensors: cannot be read"),
    (lambda f: (f / "tokenizer/spiece.model").write_bytes(b"not a model"), "spiece.model: not a sentencepiece model"),
    (lambda f: (f / "tokenizer/spiece.model").unlink(), "no tokenizer.json or spiece.model"),
    (lambda f: shutil.rmtree(f / "vae"), "vae: no such file or folder"),
]


@pytest.mark.parametrize("change, says", WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_is_named(tmp_path, folders, capsys, change, says):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change(copy)
    assert says in refused(capsys, tmp_path / "out.gguf", copy)


@pytest.mark.parametrize("name, says", [
    ("high_noise_model/x", "high_noise_model: no weight file"), ("Wan2.2_VAE.pth", "Wan2.2_VAE.pth, expected one"),
    ("models_clip_xlm.pth", "image-to-video"),
    ("diffusion_pytorch_model.safetensors.index.json", "missing.safetensors: named by")])
def test_original_folders_that_cannot_be_run(tmp_path, folders, capsys, name, says):
    copy = shutil.copytree(folders / "original", tmp_path / "copy")
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text('{"weight_map": {"a": "missing.safetensors"}}')
    assert says in refused(capsys, tmp_path / "out.gguf", copy)


def test_levels_of_wan22_vae_are_counted_through(tmp_path):
    """The residual VAE in diffusers' names, and in those of wan/modules/vae2_2.py, which number level by level."""
    vae = {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 16, "dim_mult": [1, 2, 2], "num_res_blocks": 2,
           "patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True,
           "temperal_downsample": [True, False], "scale_factor_spatial": 8, "scale_factor_temporal": 2}
    make_checkpoint.make(tmp_path / "diffusers", seed=1, vae=vae)
    stored = load_file(tmp_path / "diffusers/vae/diffusion_pytorch_model.safetensors")
    through = [our_name("vae", name) for name in count_upsamples(list(stored))]
    nested = through
    for half, way, size in (("encoder", "down", 3), ("decoder", "up", 4)):
        nested = [re.sub(rf"{half}\.{way}samples\.(\d+)",
                         lambda m: f"{half}.{way}samples.{int(m[1]) // size}.{way}samples.{int(m[1]) % size}", name)
                  for name in nested]
    assert count_upsamples(nested) == through
    assert "decoder.upsamples.0.upsamples.3.resample.1.weight" in nested
    assert "encoder.downsamples.0.downsamples.2.time_conv.weight" in nested


def test_missing_parts_are_named(tmp_path, folders, capsys):
    transformer = folders / "diffusers/transformer"
    assert "--text-encoder" in refused(capsys, tmp_path / "out.gguf", "--transformer", transformer)
    assert "no such file" in refused(capsys, tmp_path / "out.gguf", tmp_path / "nothing")


@pytest.mark.parametrize("name", ["high_noise_model", "Wan2_2-T2V-A14B-LOW_fp8", "Wan2.2-Diffusers/transformer_2"])
def test_a_name_decides_nothing(tmp_path, folders, baseline, capsys, name):
    expert = shutil.copytree(folders / "diffusers/transformer", tmp_path / name)
    assert digest(export_parts(folders, tmp_path / "out.gguf", transformer=expert)) == digest(baseline)
    assert "expert of" not in capsys.readouterr().err
    note, = expert_note(Part("transformer", expert, {}, {}, [], {"dim": 5120}))  # the size of an expert
    assert "named like an expert of Wan 2.2 A14B" in note


def test_other_parts_come_from_any_pipeline(tmp_path, folders, baseline):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change_json(copy / "model_index.json", _class_name="WanImageToVideoPipeline",
                image_encoder=["transformers", "CLIPVisionModel"])
    file = export(copy, tmp_path / "out.gguf", "--type", "f32", "--transformer", folders / "diffusers/transformer")
    assert digest(file) == digest(baseline)
