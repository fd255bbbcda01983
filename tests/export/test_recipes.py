"""Recipes: schedules of distilled and causal weights, layouts of such weights,
errors for weights without a schedule."""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from export.recipes import KNOWN_FILES, RECIPES
from helpers import ROOT, change_json, digest, export, export_parts, keys, parts, refused, tensors
from safetensors.torch import save_file

WARPED = [1000.0, 937.5, float.fromhex("0x1.a0aaaap+9"), 625.0]  # upstream's own: 5 s / (1 + 4 s) in float32


@pytest.fixture
def generator(place, weights):
    """A .pt of Self-Forcing and its descendants. The last weights are zeros; the averaged ones are to be taken."""
    names = {f"model._fsdp_wrapped_module.{k}": v for k, v in weights.items()}
    zeros = {k: v * 0 for k, v in names.items()}
    torch.save({"generator": zeros, "generator_ema": names, "step": 3}, place / "model.pt")
    return place / "model.pt"


def schedule_of(reader):
    return {k: v for k, v in keys(reader).items() if k.startswith(("scheduler.", "causal."))}


def approximately(values):
    return pytest.approx(values, rel=1e-7)


EXPECTED = {  # keys of each recipe, besides shift 3, unipc and 1000 training steps
    "self-forcing": {"causal.chunk_frames": 3},
    "causal-forcing": {"causal.chunk_frames": 3},
    "causal-forcing-framewise": {"causal.chunk_frames": 1},
    "causal-forcing-2step": {"causal.chunk_frames": 1, "scheduler.timesteps": [WARPED[0], WARPED[2]],
                             "scheduler.first_timesteps": WARPED},
    "causal-forcing-1step": {"causal.chunk_frames": 1, "scheduler.timesteps": [WARPED[0]],
                             "scheduler.first_timesteps": WARPED},
    "longlive": {"causal.chunk_frames": 3, "causal.window": 12, "causal.sink": 3, "causal.prompt_change": "recache"},
    "lightx2v": {"scheduler.rule": "euler"},
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_warped_recipes(folders, generator, recipe):
    file = keys(export_parts(folders, generator.parent / "out.gguf", transformer=generator, **{"recipe": recipe}))
    want = {"scheduler.rule": "renoise", "scheduler.timesteps": WARPED, "scheduler.shift": 5.0,
            "scheduler.sampler": "unipc", "scheduler.num_train_timesteps": 1000} | EXPECTED[recipe]
    for list_ in [k for k in want if k.endswith("timesteps") and isinstance(want[k], list)]:
        want[list_.replace("timesteps", "sigmas")] = approximately([t / 1000 for t in want[list_]])
    assert {k: v for k, v in file.items() if k.startswith(("scheduler.", "causal."))} == want
    assert (file["default.guidance"], file["default.steps"]) == (1.0, len(want["scheduler.timesteps"]))


def test_fastwans_levels_are_those_of_the_nearest_step(folders, generator):
    file = keys(export_parts(folders, generator.parent / "out.gguf", transformer=generator, recipe="fastwan"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [int(scheduler.timesteps.sub(t).abs().argmin()) for t in (1000, 757, 522)]
    assert file["scheduler.timesteps"] == [1000, 757, 522]
    assert file["scheduler.sigmas"] == scheduler.sigmas[torch.tensor(nearest)].tolist()
    assert file["scheduler.noise_frames_first"] is True and "causal.chunk_frames" not in file


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_rcms_angles(folders, generator, steps):
    file = keys(export_parts(folders, generator.parent / "out.gguf", transformer=generator, recipe="rcm", steps=steps))
    times = [math.atan(80), 1.5, 1.4, 1.0][:steps]
    sigmas = [math.sin(t) / (math.sin(t) + math.cos(t)) for t in times]
    assert file["scheduler.sigmas"] == approximately(sigmas)
    assert file["scheduler.timesteps"] == [torch.tensor(1000 * s).bfloat16().item() for s in sigmas]
    assert file["scheduler.timesteps"][0] == 988.0 and file["default.steps"] == steps
    assert file["scheduler.noise_scale"] == approximately(0.9876543209876543)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_container_of_a_recipe(folders, baseline, place, weights, capsys, recipe):
    taken = RECIPES[recipe].container
    other = {"generator": "generator_ema", "generator_ema": "generator"}[taken]
    torch.save({taken: weights, other: {k: v * 0 for k, v in weights.items()}}, place / "model.pt")
    file = export_parts(folders, place / "out.gguf", transformer=place / "model.pt", recipe=recipe)
    assert digest(file) == digest(baseline)
    assert f"model.pt: takes {taken}, not {other}" in capsys.readouterr().err
    torch.save({other: weights}, place / "model.pt")  # the only one is taken
    file = export_parts(folders, place / "out.gguf", transformer=place / "model.pt", recipe=recipe)
    assert digest(file) == digest(baseline)


@pytest.mark.parametrize("recipe", RECIPES)
def test_sora_runs_every_recipe(folders, generator, recipe):
    export_parts(folders, generator.parent / "out.gguf", transformer=generator, recipe=recipe)
    result = subprocess.run([ROOT / "sora", "-m", generator.parent / "out.gguf", "-s", "16x16", "-f", "9", "-t", "1",
                             "-o", generator.parent / "out.y4m", "a red fox"], capture_output=True, text=True,
                            timeout=120)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------- layouts

def test_longlive_is_a_base_and_a_lora(folders, place, weights, capsys):
    base = "blocks.0.self_attn.q"
    down, up = torch.randn(256, 48), torch.randn(48, 256)
    lora = {f"base_model.model.{base}.lora_A.weight": down, f"base_model.model.{base}.lora_B.weight": up}
    torch.save({"generator": weights}, place / "longlive_base.pt")
    torch.save({"generator_lora": lora, "critic_lora": {}, "step": 1}, place / "lora.pt")
    options = {"transformer": place / "longlive_base.pt", "lora": place / "lora.pt"}
    file = tensors(export_parts(folders, place / "out.gguf", recipe="longlive", **options))
    want = weights[f"{base}.weight"] + up @ down
    assert np.abs(file[f"{base}.weight"][1] - want.numpy()).max() <= 1e-5 * want.abs().max()
    assert digest(export_parts(folders, place / "b.gguf", **options)) == digest(
        export_parts(folders, place / "out.gguf", recipe="longlive", **options))  # the file's name tells the recipe
    options = parts(folders) | {"--transformer": place / "longlive_base.pt", "--lora": place / "lora.pt",
                                "--recipe": "self-forcing"}
    (place / "out.gguf").unlink()
    line = refused(capsys, place / "out.gguf", *(x for pair in options.items() for x in pair))
    assert "no adapter_config.json beside it" in line  # other recipes have no alpha


def test_rcms_patch_embedding_is_a_linear(folders, place, weights, baseline):
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    torch.save({f"net.{k}": v for k, v in weights.items()}, place / "rcm.pt")
    assert digest(export_parts(folders, place / "out.gguf", transformer=place / "rcm.pt")) == digest(baseline)


def test_fastwans_gate_is_left_out(folders, place, weights, baseline, capsys):
    gates = {f"blocks.{i}.to_gate_compress.{k}": torch.zeros(48) for i in (0, 1) for k in ("weight", "bias")}
    save_file(weights | gates, place / "wan.safetensors")
    file = export_parts(folders, place / "out.gguf", transformer=place / "wan.safetensors", recipe="fastwan")
    assert digest(file) == digest(baseline)
    assert "4 tensors of FastWan's gate left out: attention is dense here" in capsys.readouterr().err


def causal_folder(tmp_path, folders, **config):
    """A diffusers folder in the layout of FastVideo's causal models."""
    copy = shutil.copytree(folders / "diffusers", tmp_path / "causal")
    change_json(copy / "model_index.json", _class_name="WanCausalDMDPipeline",
                transformer=["diffusers", "CausalWanTransformer3DModel"])
    change_json(copy / "transformer/config.json", _class_name="CausalWanTransformer3DModel", **config)
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps({
        "_class_name": "SelfForcingFlowMatchScheduler", "shift": 5.0, "extra_one_step": True}))
    return copy


def test_a_causal_folder_of_diffusers(tmp_path, folders, baseline, capsys):
    file = export(causal_folder(tmp_path, folders), tmp_path / "out.gguf", "--type", "f32")
    assert digest(file) == digest(baseline)
    assert schedule_of(file)["scheduler.timesteps"] == WARPED and schedule_of(file)["causal.chunk_frames"] == 3
    assert "WanCausalDMDPipeline: known by its name, as --recipe self-forcing" in capsys.readouterr().err


def test_a_configuration_that_states_chunks(tmp_path, folders):
    copy = causal_folder(tmp_path, folders, num_frames_per_block=2, local_attn_size=9, sink_size=1)
    values = schedule_of(export(copy, tmp_path / "out.gguf", "--timesteps", "1000,500", "--rule", "renoise"))
    assert {k: v for k, v in values.items() if k.startswith("causal.")} == {
        "causal.chunk_frames": 2, "causal.window": 9, "causal.sink": 1}
    values = schedule_of(export(copy, tmp_path / "out.gguf"))  # a recipe overrides it
    assert (values["causal.chunk_frames"], values["causal.window"]) == (3, 9)


# ---------------------------------------------------------------- weights that need a schedule

def gated(weights):
    return {"blocks.0.to_gate_compress.bias": torch.zeros(48)} | weights


@pytest.mark.parametrize("content, says", [
    (lambda w: {"generator_ema": w}, "its weights are a generator_ema"),
    (lambda w: {"generator": w}, "its weights are a generator"), (gated, "has FastWan's gate")])
def test_distilled_weights_without_a_schedule_are_refused(folders, place, weights, baseline, capsys, content, says):
    torch.save(content(weights), place / "model.pt")
    options = parts(folders) | {"--transformer": place / "model.pt"}
    line = refused(capsys, place / "out.gguf", *(x for pair in options.items() for x in pair))
    assert f"model.pt: {says}: such weights were trained for one schedule and do not state it; expected --recipe " \
        "self-forcing|causal-forcing|causal-forcing-framewise|causal-forcing-2step|causal-forcing-1step|longlive|rcm|" \
        "fastwan|lightx2v, or --timesteps and --rule" in line
    file = export_parts(folders, place / "out.gguf", transformer=place / "model.pt", rule="multistep")
    assert digest(file) == digest(baseline)  # --rule multistep is the user's statement


@pytest.mark.parametrize("name", ["CausalWanModel", "CausalWanTransformer3DModel"])
def test_a_causal_configuration_without_a_schedule_is_refused(tmp_path, folders, capsys, name):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    change_json(copy / "transformer/config.json", _class_name=name, local_attn_size=12)
    assert f"transformer: is a {name}: such weights were trained" in refused(capsys, tmp_path / "out.gguf", copy)


@pytest.mark.parametrize("name, recipe", [
    ("self_forcing_dmd.pt", "self-forcing"), ("self_forcing_sid_v2.pt", "self-forcing"),
    ("framewise-2step.pt", "causal-forcing-2step"), ("framewise-1step.pt", "causal-forcing-1step"),
    ("longlive_base.pt", "longlive"), ("rCM_Wan2.1_T2V_1.3B_480p.pt", "rcm"),
    ("wan2.1_t2v_14b_lightx2v_4step.pt", "lightx2v"),
    ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.pt", "lightx2v"), ("causal_forcing.pt", None)])
def test_released_files_are_known_by_their_names(folders, place, generator, capsys, name, recipe):
    generator.rename(place / name)
    if recipe:
        file = export_parts(folders, place / "out.gguf", transformer=place / name)
        assert keys(file)["scheduler.rule"] == RECIPES[recipe].defaults["rule"]
        assert f"{name}: known by its name, as --recipe {recipe}" in capsys.readouterr().err
    else:
        options = parts(folders) | {"--transformer": place / name}
        assert "--recipe" in refused(capsys, place / "out.gguf", *(x for pair in options.items() for x in pair))


def test_a_lora_is_known_by_its_name(folders, place):
    path = place / "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(48, 48)}, path)
    values = schedule_of(export(folders / "diffusers", place / "out.gguf", "--lora", path))
    assert values["scheduler.rule"] == "euler" and values["scheduler.timesteps"] == WARPED
    assert {recipe for _, recipe in KNOWN_FILES} <= RECIPES.keys()


# ---------------------------------------------------------------- options instead of a recipe

def test_a_schedule_one_by_one(tmp_path, folders):
    file = export(folders / "diffusers", tmp_path / "out.gguf", "--timesteps", "1000,500", "--first-timesteps",
                  "1000,750,500,250", "--rule", "renoise", "--shift", 5, "--chunk-frames", 2, "--window", 8,
                  "--sink", 1, "--positions", "relative", "--context-noise", 12.5)
    assert schedule_of(file) == {
        "scheduler.rule": "renoise", "scheduler.timesteps": [WARPED[0], WARPED[2]], "scheduler.shift": 5.0,
        "scheduler.sigmas": approximately([1, 5 / 6]), "scheduler.first_timesteps": WARPED,
        "scheduler.first_sigmas": approximately([1, 0.9375, 5 / 6, 0.625]), "scheduler.sampler": "unipc",
        "scheduler.num_train_timesteps": 1000, "causal.chunk_frames": 2, "causal.window": 8, "causal.sink": 1,
        "causal.positions": "relative", "causal.context_noise": 12.5}
    assert (keys(file)["default.guidance"], keys(file)["default.steps"]) == (1.0, 2)


def test_options_go_before_a_recipe(folders, generator):
    file = keys(export_parts(folders, generator.parent / "out.gguf", transformer=generator, recipe="self-forcing",
                             window=6, sink=1, positions="relative", guidance=2.5, timesteps="900,400", shift=1))
    assert (file["causal.window"], file["causal.sink"], file["causal.positions"]) == (6, 1, "relative")
    assert file["scheduler.timesteps"] == [900, 400] and file["default.guidance"] == 2.5
    assert file["causal.chunk_frames"] == 3


def test_times_that_are_not_warped(tmp_path, folders):
    values = schedule_of(export(folders / "diffusers", tmp_path / "out.gguf", "--timesteps", "987.5,500", "--no-warp",
                                "--rule", "euler", "--shift", 1))
    assert values["scheduler.timesteps"] == [987.5, 500] and values["scheduler.sigmas"] == approximately([0.988, 0.5])


WRONG = [
    (["--timesteps", "1000,500"], "the rule is multistep, expected --rule renoise or --rule euler"),
    (["--rule", "renoise"], "--rule is renoise, but there is no list of time steps"),
    (["--recipe", "self-forcing", "--rule", "multistep"], "the rule is multistep, expected --rule renoise"),
    (["--timesteps", "500,1000", "--rule", "euler"], "--timesteps is '500,1000', expected numbers that fall"),
    (["--timesteps", "1000,1000", "--rule", "euler"], "expected numbers that fall from at most 1000"),
    (["--timesteps", "1001", "--rule", "euler"], "expected numbers that fall"),
    (["--timesteps", "", "--rule", "euler"], "--timesteps is '', expected numbers"),
    (["--timesteps", "1000,x", "--rule", "euler"], "--timesteps is '1000,x', expected numbers"),
    (["--timesteps", "nan", "--rule", "euler"], "--timesteps is 'nan', expected numbers"),
    (["--timesteps", "937.5", "--rule", "euler"],
     "time steps 937.5: expected whole numbers before the shift (--no-warp takes"),
    (["--timesteps", "900,899.9", "--no-warp", "--rule", "euler"], "sigmas is [0.89"),
    (["--first-timesteps", "1000"], "--first-timesteps is given, expected --timesteps or --recipe"),
    (["--no-warp"], "--no-warp is given, expected --timesteps or --recipe"),
    (["--recipe", "lightx2v", "--first-timesteps", "1000"], "--first-timesteps is given, expected --chunk-frames"),
    (["--recipe", "self-forcing", "--steps", "3"], "--steps is 3, expected 4, the length of the schedule"),
    (["--recipe", "rcm", "--steps", "5"], "--steps is 5, expected 4, the length of the schedule"),
    (["--window", "12"], "--window is given, expected --chunk-frames, too"),
    (["--chunk-frames", "3", "--window", "2"], "window is 2, expected 0 or at least 3"),
    (["--chunk-frames", "3", "--window", "5", "--sink", "3"], "window is 5, expected 0 or at least 6: the sink of 3"),
    (["--chunk-frames", "3", "--sink", "3"], "--sink is 3, but there is no window"),
    (["--chunk-frames", "0"], "--chunk-frames is 0, expected 1 to 4096"),
    (["--chunk-frames", "3", "--context-noise", "-1"], "--context-noise is -1.0, expected 0 to 1000"),
    (["--chunk-frames", "3", "--positions", "other"], "positions is 'other', expected one of absolute, relative"),
]


@pytest.mark.parametrize("options, says", WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_schedules_that_cannot_be(tmp_path, folders, capsys, options, says):
    assert says in refused(capsys, tmp_path / "out.gguf", folders / "diffusers", *options)


@pytest.mark.parametrize("values, says", [
    ({"rule": "renoise", "timesteps": []}, "timesteps is [], expected numbers that fall"),
    ({"rule": "renoise", "timesteps": [1000, True]}, "timesteps is [1000, True], expected numbers"),
    ({"rule": "renoise", "timesteps": 1000}, "timesteps is 1000, expected a list of numbers"),
    ({"rule": "renoise", "timesteps": [1000], "sigmas": [1, 0.5]}, "sigmas has 2 numbers, expected 1 as timesteps"),
    ({"chunk_frames": 3, "recache_sink": 1}, "recache_sink is 1, expected true or false")])
def test_schedules_of_sora_json_that_cannot_be(tmp_path, folders, capsys, values, says):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    (copy / "sora.json").write_text(json.dumps(values))
    assert says in refused(capsys, tmp_path / "out.gguf", copy)


# ---------------------------------------------------------------- weight files

@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_file_keeps_its_schedule(folders, generator, recipe):
    once = export_parts(folders, generator.parent / "once.gguf", transformer=generator, recipe=recipe)
    again = export(generator.parent / "once.gguf", generator.parent / "again.gguf")
    assert schedule_of(again) == schedule_of(once) and "scheduler.timesteps" in schedule_of(again)
    assert keys(again)["default.guidance"] == 1.0


def test_a_weight_file_takes_another_schedule(folders, generator):
    export_parts(folders, generator.parent / "once.gguf", transformer=generator, recipe="rcm")
    again = export(generator.parent / "once.gguf", generator.parent / "again.gguf", "--recipe", "longlive")
    values = schedule_of(again)
    assert values["scheduler.timesteps"] == WARPED and "scheduler.noise_scale" not in values
    assert values["causal.window"] == 12
    plain = keys(export(generator.parent / "once.gguf", generator.parent / "plain.gguf", "--rule", "multistep",
                        "--steps", 30, "--guidance", 5))
    assert "scheduler.timesteps" not in plain and plain["scheduler.rule"] == "multistep"
    assert (plain["default.steps"], plain["default.guidance"]) == (30, 5.0)
