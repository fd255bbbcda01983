"""Wan 2.2: checkpoints with two experts, and models that start from a picture."""

import shutil

import pytest
import torch
from export.defaults import BOUNDARIES, RELEASED, checkpoint_defaults
from export.parts import Part
from export.sources import Sources
from helpers import change_json, digest, export, keys, refused, tensors
from safetensors.torch import load_file, save_file
from test_lora import lora

import make_checkpoint

PICTURES = {"in_channels": 36}  # of I2V-A14B: 16 latent channels, 4 of the mask, 16 of the picture


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def experts(request, tmp_path_factory):
    """(model type, folder with one random checkpoint of two experts as diffusers/ and original/)."""
    root = tmp_path_factory.mktemp(request.param)
    for layout in ("diffusers", "original"):
        make_checkpoint.make(root / layout, seed=2, layout=layout, boundary=BOUNDARIES[request.param],
                             transformer=PICTURES if request.param == "i2v" else {})
    return request.param, root


def test_both_layouts_give_one_file(tmp_path, experts):
    kind, root = experts
    files = [export(root / layout, tmp_path / f"{layout}.gguf", "--type", "f32")
             for layout in ("diffusers", "original")]
    assert digest(files[0]) == digest(files[1])
    values = keys(files[0])
    assert values["wan.model_type"] == kind and values["scheduler.boundary"] == BOUNDARIES[kind]
    weights = tensors(files[0])
    second = {name for name in weights if name.startswith("transformer_2.")}
    assert second == {f"transformer_2.{name}" for name in weights
                      if not name.startswith(("transformer_2.", "vae.", "enc.", "token_embd."))}
    stored = load_file(root / "original/low_noise_model/diffusion_pytorch_model.safetensors")
    assert (weights["transformer_2.blocks.1.ffn.0.weight"][1] == stored["blocks.1.ffn.0.weight"].numpy()).all()
    again = export(tmp_path / "diffusers.gguf", tmp_path / "again.gguf")
    assert digest(again) == digest(files[0]) and keys(again)["scheduler.boundary"] == BOUNDARIES[kind]


@pytest.mark.parametrize("experts", ["t2v"], indirect=True)
def test_experts_one_by_one(tmp_path, experts, folders):
    _, root = experts
    high, low = root / "original/high_noise_model", root / "original/low_noise_model"
    file = export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--transformer", high,
                  "--transformer-2", low)
    expected = tensors(export(root / "original", tmp_path / "expected.gguf", "--type", "f32"))
    found = tensors(file)
    assert all((found[name][1] == expected[name][1]).all() for name in expected
               if "blocks." in name and "enc." not in name)
    assert keys(file)["scheduler.boundary"] == 0.875
    # the second expert can be the only transformer of another weight file
    export(folders / "diffusers", tmp_path / "low.gguf", "--type", "f32", "--transformer", low)
    file = export(folders / "diffusers", tmp_path / "own.gguf", "--type", "f32", "--transformer", high,
                  "--transformer-2", tmp_path / "low.gguf", "--boundary", 0.5, "--guidance-2", 2)
    assert all((tensors(file)[name][1] == found[name][1]).all() for name in found)
    assert keys(file)["scheduler.boundary"] == 0.5 and keys(file)["default.guidance_2"] == 2


@pytest.mark.parametrize("experts", ["t2v"], indirect=True)
def test_experts_the_other_way_round(tmp_path, experts, folders, capsys):
    high, low = (experts[1] / f"original/{level}_noise_model" for level in ("high", "low"))
    for first, second, told in ((high, low, False), (low, high, True)):
        export(folders / "diffusers", tmp_path / "out.gguf", "--transformer", first, "--transformer-2", second)
        assert ("the other way round: expected --transformer HIGH --transformer-2 LOW"
                in capsys.readouterr().err) == told


def test_a_lora_for_each_expert(tmp_path, experts):
    _, root = experts
    save_file(lora("lora_A lora_B", True), tmp_path / "a.safetensors")
    before = tensors(export(root / "diffusers", tmp_path / "before.gguf", "--type", "f32"))
    for option, changed in (("--lora", ""), ("--lora-2", "transformer_2.")):
        after = export(root / "diffusers", tmp_path / "after.gguf", "--type", "f32", option, tmp_path / "a.safetensors")
        names = {name for name, (_, values) in tensors(after).items() if (values != before[name][1]).any()}
        assert names and all(name.startswith("transformer_2.") == bool(changed) for name in names)
        assert keys(after)["sora.lora"] == ["a.safetensors:1"]


def narrower(folder):
    """Another second expert, whose feed-forward network is narrower."""
    make_checkpoint.make(folder.parent / "narrow", transformer={"ffn_dim": 96, **PICTURES})
    shutil.copytree(folder.parent / "narrow/transformer", folder / "transformer_2", dirs_exist_ok=True)


def cut(folder):
    path = folder / "transformer_2/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_tensor(folder):
    path = folder / "transformer_2/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["blocks.0.attn1.to_q.weight"]
    save_file(weights, path)


@pytest.mark.parametrize("change, options, says", [
    (lambda f: shutil.rmtree(f / "transformer_2"), (), "transformer_2: no such file or folder"),
    (cut, (), "transformer_2/diffusion_pytorch_model.safetensors: cannot be read"),
    (without_a_tensor, (), "the transformer 2's blocks.0.self_attn.q.weight is missing"),
    (narrower, (), "transformer_2: ffn_dim is 96, expected 104 as in the first expert"),
    (lambda f: change_json(f / "model_index.json", boundary_ratio="x"), (), "boundary is 'x', expected a number"),
    (lambda f: change_json(f / "model_index.json", boundary_ratio=2.0), (), "boundary is 2.0, expected 0 to 1"),
    (lambda f: change_json(f / "model_index.json", transformer_2=[None, None]), ("--boundary", 0.5),
     "--boundary is given, but there is one transformer"),
    (lambda f: change_json(f / "model_index.json", transformer_2=[None, None]), ("--guidance-2", 3),
     "--guidance-2 is given, but there is one transformer"),
    (lambda f: change_json(f / "model_index.json", transformer_2=[None, None]), ("--lora-2", "x"),
     "--lora-2 is given, but there is one transformer"),
    (lambda f: None, ("--chunk-frames", 3), "two experts that generate in chunks"),
    (lambda f: change_json(f / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"]), (), "CLIP"),
])
@pytest.mark.parametrize("experts", ["i2v"], indirect=True)
def test_what_is_wrong_is_named(tmp_path, experts, capsys, change, options, says):
    copy = shutil.copytree(experts[1] / "diffusers", tmp_path / "copy")
    change(copy)
    assert says in refused(capsys, tmp_path / "out.gguf", copy, *options)


def test_half_an_original_release(tmp_path, experts, capsys):
    copy = shutil.copytree(experts[1] / "original", tmp_path / "copy")
    shutil.rmtree(copy / "high_noise_model")
    assert "high_noise_model: no such file or folder" in refused(capsys, tmp_path / "out.gguf", copy)


def test_channels_that_belong_to_no_model(tmp_path, capsys):
    make_checkpoint.make(tmp_path / "control", transformer={"in_channels": 52})
    line = refused(capsys, tmp_path / "out.gguf", tmp_path / "control")
    assert "52 input channels, expected 16, or 36 for an image-to-video model" in line


def test_a_config_of_another_kind(tmp_path, experts, capsys):
    kind, root = experts
    copy = shutil.copytree(root / "original", tmp_path / "copy")
    change_json(copy / "low_noise_model/config.json", model_type="t2v" if kind == "i2v" else "i2v")
    assert "model_type is" in refused(capsys, tmp_path / "out.gguf", copy)


def test_guidance_of_both_experts(tmp_path, experts):
    """As in diffusers, guidance_scale holds for both unless guidance_scale_2 is given."""
    _, root = experts
    for options, expected in (((), (5.0, None)), (("--guidance", 2), (2.0, None)),
                              (("--guidance", 2, "--guidance-2", 1.5), (2.0, 1.5))):
        values = keys(export(root / "diffusers", tmp_path / "out.gguf", *options))
        assert (values["default.guidance"], values.get("default.guidance_2")) == expected


def released(kind, tmp_path, shift):
    """(defaults, notes) of a checkpoint of A14B's sizes whose scheduler states this shift."""
    make_checkpoint.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                            flow_shift=shift).save_pretrained(tmp_path)
    part = Part("transformer", tmp_path, {}, {}, [], {"dim": 5120, "num_layers": 40, "model_type": kind})
    sources = Sources(transformer_2=tmp_path, scheduler=tmp_path / "scheduler_config.json")
    return checkpoint_defaults(sources, part), part.notes


@pytest.mark.parametrize("kind, shift, guidance", [("t2v", 12.0, (4.0, 3.0)), ("i2v", 5.0, (3.5, 3.5))])
def test_layouts_that_disagree_are_told(tmp_path, kind, shift, guidance):
    """diffusers' converter writes shift 3 for A14B, the release has another one."""
    values, notes = released(kind, tmp_path, 3.0)
    assert values["shift"] == shift and values["boundary"] == BOUNDARIES[kind]
    assert (values["guidance"], values["guidance_2"]) == guidance and values["steps"] == 40
    note, = notes
    assert f"the shift is 3, the release's is {shift:g}, which is used; --shift 3 for diffusers' clips" in note
    assert released(kind, tmp_path, shift) == (values, [])


OTHERS = {  # a key of a model that is not run, and its name in the error
    "img_emb.emb_pos": "first-and-last-frame", "condition_embedder.image_embedder.pos_embed": "first-and-last-frame",
    "img_emb.proj.0.weight": "CLIP", "blocks.0.cross_attn.k_img.weight": "CLIP",
    "blocks.0.attn2.norm_added_k.weight": "CLIP",
    "vace_patch_embedding.weight": "VACE", "face_encoder.norm1.weight": "Wan-Animate",
    "pose_patch_embedding.weight": "Wan-Animate", "casual_audio_encoder.weights": "Wan-S2V",
    "audio_injector.injector.0.q.weight": "Wan-S2V", "frame_packer.proj.weight": "Wan-S2V",
    "audio_proj.proj1.weight": "sound", "control_adapter.conv.weight": "Wan-Fun", "ref_conv.weight": "Wan-Fun",
    "blocks.0.cam_encoder.weight": "cameras",
}


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_models_that_are_not_run_are_refused_by_name(tmp_path, folders, capsys, key, prefix):
    weights = {prefix + k: v for k, v in load_file(folders / "original/diffusion_pytorch_model.safetensors").items()}
    save_file(weights | {prefix + "img_emb.x.weight": torch.zeros(2)} | {prefix + key: torch.zeros(2)},
              tmp_path / "model.safetensors")
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--transformer",
                   tmp_path / "model.safetensors")
    assert OTHERS[key] in line and "cannot be run yet" in line and key.split(".")[-1] in line


@pytest.mark.parametrize("kind", ["flf2v", "vace", "s2v", "animate"])
def test_kinds_that_are_not_run_are_refused_by_name(tmp_path, folders, capsys, kind):
    copy = shutil.copytree(folders / "original", tmp_path / "copy")
    change_json(copy / "config.json", model_type=kind)
    line = refused(capsys, tmp_path / "out.gguf", copy)
    assert f"model_type is '{kind}', expected 't2v' or 'ti2v' or 'i2v'" in line


@pytest.mark.parametrize("kind", ["WanVACEPipeline", "WanAnimatePipeline", "WanSpeechToVideoPipeline"])
def test_pipelines_that_are_not_run_are_refused_by_name(tmp_path, folders, capsys, kind):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change_json(copy / "model_index.json", _class_name=kind)
    assert f"a {kind} cannot be run yet" in refused(capsys, tmp_path / "out.gguf", copy)


def test_a_picture_as_the_first_frame(tmp_path):
    """TI2V: by expand_timesteps in model_index.json, by model_type in config.json, by 48 channels."""
    for layout in ("diffusers", "original"):
        make_checkpoint.make(tmp_path / layout, seed=3, layout=layout, expand=True)
        assert keys(export(tmp_path / layout, tmp_path / "out.gguf"))["wan.model_type"] == "ti2v"
    assert (3072, 30, "ti2v", 1) in RELEASED
