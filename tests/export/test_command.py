"""The command line of export.py: outputs, errors, exit statuses."""

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, command, digest, export, refused


def test_sora_runs_what_was_written(tmp_path, folders, baseline):
    result = subprocess.run([ROOT / "sora", "-m", folders / "baseline.gguf", "-s", "16x16", "-f", "1", "--steps", "1",
                             "-g", "1", "-o", tmp_path / "out.y4m", "a red fox"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_out_of_memory_is_no_fault_of_the_file(tmp_path, folders, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    for where in ("export.containers.Safetensors.read", "export.writer.Planned.convert"):
        with monkeypatch.context() as patch:
            patch.setattr(where, refuse)
            assert command.main([str(folders / "diffusers"), "-o", str(tmp_path / "out.gguf")]) == 3
    assert capsys.readouterr().err.splitlines() == ["export.py: out of memory"] * 2


def test_outputs_that_cannot_be_written(tmp_path, folders, capsys):
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "folder", tmp_path / "nowhere/out.gguf", Path("/dev/null")):
        assert command.main([str(folders / "diffusers"), "-o", str(output)]) == 2
    assert [line.split(": ")[-1] for line in capsys.readouterr().err.splitlines()] == [
        "expected a regular file or a new name", f"no such folder as {tmp_path / 'nowhere'}",
        "expected a regular file or a new name"]
    assert Path("/dev/null").is_char_device()


def test_what_is_converted_is_not_overwritten(tmp_path, folders, capsys):
    copy = shutil.copytree(folders / "diffusers", tmp_path / "copy")
    output = copy / "transformer/diffusion_pytorch_model.safetensors"
    before = output.read_bytes()
    assert command.main([str(copy), "-o", str(output)]) == 2
    assert "is an input file and would be overwritten" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_an_interrupted_export_leaves_the_old_file(tmp_path, folders, monkeypatch):
    output = tmp_path / "out.gguf"
    output.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("export.writer.fill_digest", interrupt)
    assert command.main([str(folders / "diffusers"), "-o", str(output)]) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"] and output.read_text() == "old"


def test_a_disk_that_is_full(tmp_path, folders):
    """A limit on the file's size fails like a full disk: while writing, after the check of free space."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    (tmp_path / "out.gguf").write_text("old")
    result = subprocess.run([sys.executable, ROOT / "export.py", folders / "diffusers", "-o", tmp_path / "out.gguf"],
                            preexec_fn=limit, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (3, f"export.py: {tmp_path / 'out.gguf'}: File too large\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"] and (tmp_path / "out.gguf").read_text() == "old"


def test_a_disk_without_room_is_said_before_the_work(tmp_path, folders, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12345))
    monkeypatch.setattr(command, "write", None)
    assert command.main([str(folders / "diffusers"), "-o", str(tmp_path / "out.gguf")]) == 3
    assert "bytes, the disk has 12,345 left" in capsys.readouterr().err


def test_a_fault_of_its_own_is_one_line(tmp_path, folders, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_sources", lambda *_: {}["nothing"])
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers")
    assert line.startswith("export.py: internal error: KeyError: 'nothing' (test_command.py:")


def test_names_and_arguments_that_are_no_utf8(tmp_path, folders, baseline, capsys):
    line = refused(capsys, tmp_path / "out.gguf", folders / "diffusers", "--negative", "\udcff")
    assert "--negative is '\\udcff', expected UTF-8" in line
    vae = Path(os.fsdecode(os.fsencode(tmp_path) + b"/vae\xff \xc3\xbc.gguf"))
    shutil.copy(folders / "baseline.gguf", vae)
    file = export(folders / "diffusers", tmp_path / "out.gguf", "--type", "f32", "--vae", vae)
    assert digest(file) == digest(baseline)
    assert "vae\ufffd ü.gguf" in file.fields["sora.source.names"].contents()
    copy = shutil.copytree(folders / "diffusers", vae.with_suffix(""))  # safetensors and torch cannot open such a path
    result = subprocess.run([sys.executable, ROOT / "export.py", copy, "-o", copy / "out.gguf"], capture_output=True)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1 and b"is not valid UTF-8" in result.stderr


def test_an_old_python_is_named(tmp_path):
    """Old Pythons must be able to parse export.py. The test replaces sys.version_info."""
    text = (ROOT / "export.py").read_text().replace("import sys\n", "import sys\nsys.version_info = (3, 8, 1)\n", 1)
    (tmp_path / "export.py").write_text(text)
    result = subprocess.run([sys.executable, tmp_path / "export.py"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "export.py: this is Python 3.8, expected 3.11 or later\n")


def test_a_package_that_is_missing_is_named(tmp_path):
    shutil.copy(ROOT / "export.py", tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/__init__.py").touch()
    (tmp_path / "export/command.py").write_text("import unheard_of_package\n")
    result = subprocess.run([sys.executable, tmp_path / "export.py"], capture_output=True, text=True)
    assert result.stderr == "export.py: No module named 'unheard_of_package': pip install -r requirements.txt\n"
    assert result.returncode == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as raised:
        command.main(["--help"])
    assert raised.value.code == 0
    page = (ROOT / "docs/options.md").read_text().split("## export.py")[1]
    listed = set(re.findall(r"(?<![\w-])--[a-z\d-]+", capsys.readouterr().out))
    assert len(listed) > 25 and listed == set(re.findall(r"`(?:-\w`, `)?(--[a-z\d-]+)", page))


@pytest.mark.parametrize("option, says", [
    ("--type=q9", "argument --type: invalid choice: 'q9'"), ("--width=x", "argument --width: invalid int value: 'x'"),
    ("--frame-rate=8", "unrecognized arguments: --frame-rate=8")])
def test_a_wrong_option_is_one_line(capsys, option, says):
    with pytest.raises(SystemExit) as raised:
        command.main(["x", "-o", "y", option])
    line = capsys.readouterr().err
    assert raised.value.code == 2 and line.count("\n") == 1 and line.startswith(f"export.py: {says}")
