"""Fixtures of all tests of export.py: random checkpoints by make_checkpoint.py."""

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import make_checkpoint  # noqa: E402
from helpers import export  # noqa: E402


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with one random checkpoint as diffusers/, original/ and sharded/."""
    root = tmp_path_factory.mktemp("checkpoints")
    text_encoder = {"d_ff": 96}  # rows of a multiple of 32 for q8_0; others are not
    make_checkpoint.make(root / "diffusers", seed=1, text_encoder=text_encoder)
    make_checkpoint.make(root / "original", seed=1, text_encoder=text_encoder, layout="original")
    make_checkpoint.make(root / "sharded", seed=1, text_encoder=text_encoder, shard="200KB")
    return root


@pytest.fixture(scope="session")
def baseline(folders):
    """A reader of the diffusers folder's export in f32, with each tensor written in one slice."""
    return export(folders / "diffusers", folders / "baseline.gguf", "--type", "f32")


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Makes slices small, so that most tensors are read and written in several.
    The baseline is written in one slice."""
    monkeypatch.setattr("export.writer.SLICE", 3000)
    monkeypatch.setattr("export.containers.REMAP", 100000)


@pytest.fixture
def weights(folders):
    """The transformer's tensors under the original release's names."""
    return load_file(folders / "original/diffusion_pytorch_model.safetensors")


@pytest.fixture
def place(tmp_path, folders):
    """A folder for a transformer's files, with a config.json that states the number of heads."""
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copy(folders / "original/config.json", folder)
    return folder
