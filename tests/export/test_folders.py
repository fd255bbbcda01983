"""Which files of a folder are the weights: shards, indices, variants, leftovers."""

import json
import os
import shutil

import pytest
import torch
from helpers import digest, export, export_parts, parts, refused
from safetensors.torch import save_file

STEM = "diffusion_pytorch_model"


def shards(folder, weights, variant="", index=True, factor=1):
    """A folder with two shards and their index, under diffusers' names."""
    names, half = list(weights), len(weights) // 2
    files = [f"{STEM}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[:half], names[half:])):
        save_file({k: weights[k] * factor for k in part}, folder / file)
    if index:
        write_index(folder / f"{STEM}.safetensors.index{variant}.json",
                    {k: files[i >= half] for i, k in enumerate(names)})
    return files


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def converted(folders, path):
    """The digest of an export with this path as the transformer."""
    output = (path if path.is_dir() else path.parent) / "out.gguf"
    return digest(export_parts(folders, output, transformer=path))


def refusal(capsys, folders, place):
    options = parts(folders) | {"--transformer": place}
    return refused(capsys, place / "out.gguf", *(x for pair in options.items() for x in pair))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(place, folders, weights, baseline, index, variant):
    shards(place, weights, variant, index)
    assert converted(folders, place) == digest(baseline)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_shard_that_is_missing(place, folders, weights, capsys, index, lost):
    (place / shards(place, weights, index=index)[lost]).unlink()
    line = refusal(capsys, folders, place)
    assert (f"{STEM}-0000{lost + 1}-of-00002.safetensors: named by" if index else
            f"{STEM}-*.safetensors: shard {lost + 1} of 2 is missing") in line


AMBIGUOUS = {  # what lies beside the shards, or instead of them
    "two files": (False, lambda p, w: [save_file(w, p / f"{STEM}{v}.safetensors") for v in ("", ".fp16")]),
    "an index and a file": (True, lambda p, w: save_file(w, p / f"{STEM}.fp16.safetensors")),
    "two indices": (True, lambda p, w: shards(p, w, ".bf16", factor=2)),
    "shards of two": (True, lambda p, w: shards(p, w, ".bf16", index=False, factor=2)),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_of_several_sets_of_weights_one_must_be_named(place, folders, weights, baseline, capsys, kind):
    sharded, add = AMBIGUOUS[kind]
    if sharded:
        shards(place, weights)
    add(place, weights)
    line = refusal(capsys, folders, place)
    assert "several sets of weights (" in line and line.endswith("), expected one: give its file's path")
    name = f"{STEM}.safetensors" + (".index.json" if sharded else "")
    assert name in line
    assert converted(folders, place / name) == digest(baseline)


@pytest.mark.parametrize("name", ["._" + STEM + ".safetensors", ".cache.safetensors", ".DS_Store"])
def test_hidden_files_are_none_of_the_weights(place, folders, weights, baseline, name):
    save_file(weights, place / f"{STEM}.safetensors")
    save_file({"x": torch.zeros(1)}, place / name)
    assert converted(folders, place) == digest(baseline)


def test_of_two_kinds_of_files_safetensors_counts(place, folders, weights, baseline):
    save_file(weights, place / f"{STEM}.safetensors")
    torch.save({k: v * 2 for k, v in weights.items()}, place / f"{STEM}.bin")
    assert converted(folders, place) == digest(baseline)


@pytest.mark.parametrize("name, says", [
    ("../../../etc/passwd", "names '../../../etc/passwd', expected a file beside it"), (3, "names 3, expected a file"),
    ("missing.safetensors", "missing.safetensors: named by"), (None, "names None, expected a file beside it")])
def test_an_index_names_files_beside_it(place, folders, weights, capsys, name, says):
    write_index(place / f"{STEM}.safetensors.index.json", {k: name for k in weights})
    assert says in refusal(capsys, folders, place)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(place, folders, capsys, content):
    (place / f"{STEM}.safetensors.index.json").write_text(content)
    assert "index.json: " in refusal(capsys, folders, place)


def test_a_folder_without_weights(place, folders, capsys):
    assert f"{place}: no weight file in this folder" in refusal(capsys, folders, place)


@pytest.mark.parametrize("layout, names", [("original", ["models_t5_a.pth", "models_t5_b.pth"]),
                                           ("original", ["Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"])])
def test_two_files_for_one_part(tmp_path, folders, baseline, capsys, layout, names):
    copy = shutil.copytree(folders / layout, tmp_path / "copy")
    part = "vae" if "VAE" in names[0] else "text-encoder"
    first = next(copy.glob("Wan*_VAE*" if part == "vae" else "models_t5_*"))
    files = [shutil.copy(first, copy / name) if first.name != name else first for name in names]
    if first.name not in names:
        first.unlink()
    line = refused(capsys, tmp_path / "out.gguf", copy)
    assert f"{names[0]} and {names[1]}, expected one: give it with --{part}" in line
    file = export(copy, tmp_path / "out.gguf", "--type", "f32", f"--{part}", files[0])
    assert digest(file) == digest(baseline)


# ---------------------------------------------------------------- ways to name a checkpoint

@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["wan2.2/Wan2.1-T2V-1.3B", "low_noise_tests/model", "ck with spaces ü"])
def test_a_folders_name_decides_nothing(tmp_path, folders, baseline, layout, name):
    copy = shutil.copytree(folders / layout, tmp_path / name)
    assert digest(export(copy, tmp_path / "out.gguf", "--type", "f32")) == digest(baseline)


def test_the_cache_of_the_hub(tmp_path, folders, baseline):
    """Snapshots of the hub's cache are links to files named by their hash."""
    for number, file in enumerate(f for f in (folders / "diffusers").rglob("*") if f.is_file()):
        blob, link = tmp_path / f"blobs/{number:040x}", tmp_path / "snapshot" / file.relative_to(folders / "diffusers")
        blob.parent.mkdir(exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        os.symlink(blob, link)
    assert digest(export(tmp_path / "snapshot", tmp_path / "out.gguf", "--type", "f32")) == digest(baseline)


@pytest.mark.parametrize("layout, path", [("original", "."), ("original", "../original/"),
                                          ("diffusers", "model_index.json")])
def test_ways_to_name_a_folder(tmp_path, folders, baseline, monkeypatch, layout, path):
    monkeypatch.chdir(folders / layout)
    file = export(path, tmp_path / "out.gguf", "--type", "f32")
    assert digest(file) == digest(baseline)
    assert all("/" not in n or n.startswith(("google", "vae", "text", "tok", "tra", "sch")) for n in
               file.fields["sora.source.names"].contents())


def test_a_transformer_alone_is_no_checkpoint(tmp_path, folders, capsys):
    line = refused(capsys, tmp_path / "out.gguf", folders / "original/diffusion_pytorch_model.safetensors")
    assert "no text encoder is given, expected one in CHECKPOINT or --text-encoder" in line


def test_a_name_of_the_hub_is_no_path(tmp_path, capsys):
    line = refused(capsys, tmp_path / "out.gguf", "Wan-AI/Wan2.1-T2V-1.3B")
    assert "Wan-AI/Wan2.1-T2V-1.3B: no such file or folder" in line
