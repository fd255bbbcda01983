"""The default settings of a run that export.py stores in the weight file."""

import json
import shutil

import pytest
from export.defaults import DEFAULTS
from helpers import change_json, export, keys, refused


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


@pytest.mark.parametrize("values, says", [
    ({"stepps": 3}, "sora.json: stepps: unknown setting, expected one of name, width"),
    ({"steps": "3"}, "steps is '3', expected a number"),
    ({"steps": True}, "steps is True, expected a number"), ({"steps": 5000}, "steps is 5000, expected 1 to 1000"),
    ({"steps": 0}, "steps is 0, expected 1 to 1000"), ({"steps": None}, "steps is None, expected a number"),
    ({"guidance": float("nan")}, "guidance is nan, expected 0 to 1000"),
    ({"shift": float("inf")}, "shift is inf, expected 0.001 to 1000"),
    ({"width": 100}, "width is 100, expected a multiple of 16"), ({"frames": 6}, "frames is 6, expected 4k+1"),
    ({"fps": 2147483648}, "fps is 2147483648, expected N or N:D"), ({"fps": "0"}, "fps is '0', expected N or N:D"),
    ({"sampler": "ddim"}, "sampler is 'ddim', expected one of unipc, euler, dpm++"),
    ({"precision": "f64"}, "precision is 'f64', expected one of f32, bf16, int8"),
    ({"negative_prompt": 3}, "negative_prompt is 3, expected a text"),
    ({"negative_prompt": "half a character: \udcff"}, "expected UTF-8 without a character 0"),
    ({"name": "a\0b"}, "expected UTF-8 without a character 0")])
def test_defaults_that_cannot_be(tmp_path, folders, capsys, values, says):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    (copy / "sora.json").write_text(json.dumps(values))
    assert says in refused(capsys, tmp_path / "out.gguf", copy)


def test_every_default_is_an_option(tmp_path, folders):
    options = {"name": "x", "width": 96, "height": 64, "frames": 9, "fps": "23.976", "steps": 3, "guidance": 2.5,
               "negative": "blurry", "precision": "bf16", "sampler": "euler", "shift": 5, "rule": "multistep",
               "chunk-frames": 2, "window": 8, "sink": 1, "positions": "relative", "context-noise": 20}
    of_experts = {"boundary", "guidance_2"}  # tests/export/test_experts.py
    assert len(options) == len([name for name, row in DEFAULTS.items() if row.help and name not in of_experts])
    file = keys(export(folders / "diffusers", tmp_path / "out.gguf",
                       *(x for name, value in options.items() for x in (f"--{name}", value))))
    del options["fps"]
    names = {"negative_prompt" if name == "negative" else name.replace("-", "_"): name for name in options}
    assert {name: file[DEFAULTS[name].key] for name in names} == {name: options[names[name]] for name in names}
    assert (file["default.fps_num"], file["default.fps_den"]) == (2997, 125)
