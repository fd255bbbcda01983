"""The tiny decoder: its tensors in the weight file, what stays when the file is converted again, what is refused."""

import numpy as np
import torch
from helpers import digest, export, keys, refused, tensors

import reference_tiny

WAN = reference_tiny.Case("", 16, 1, (8, 6, 5, 4))


def write(path, case=WAN, change=lambda weights: None):
    """A checkpoint of taehv.py with random weights. Returns them."""
    weights = reference_tiny.random_weights(case, seed=1)
    change(weights)
    torch.save(weights, path)
    return weights


def test_tensors(folders, tmp_path):
    weights = write(tmp_path / "tiny.pth")
    out = export(folders / "diffusers", tmp_path / "model.gguf", "--vae-tiny", tmp_path / "tiny.pth", "--type", "f32")
    stored = tensors(out)
    assert keys(out)["vae.tiny.widths"] == list(WAN.widths)
    assert sum(name.startswith("vae.tiny.") for name in stored) == len(weights) - 1  # one is of the encoder

    now, before = np.split(weights["decoder.4.conv.0.weight"].numpy(), 2, axis=1)
    taps = stored["vae.tiny.4.conv.0.weight"][1].reshape(8, 2, 3, 3, 8)
    for tap, values in enumerate((before, now)):
        assert np.array_equal(taps[:, tap], np.moveaxis(values, 1, -1))
    assert np.array_equal(stored["vae.tiny.22.bias"][1], 2 * weights["decoder.22.bias"].numpy() - 1)


def test_converted_again(folders, tmp_path):
    write(tmp_path / "tiny.pth")
    first = export(folders / "diffusers", tmp_path / "first.gguf", "--vae-tiny", tmp_path / "tiny.pth")
    again = export(tmp_path / "first.gguf", tmp_path / "again.gguf")
    assert digest(first) == digest(again) and keys(again)["vae.tiny.widths"] == list(WAN.widths)

    write(tmp_path / "other.pth", reference_tiny.Case("", 16, 1, (3, 5, 7, 9)))
    other = export(tmp_path / "first.gguf", tmp_path / "other.gguf", "--vae-tiny", tmp_path / "other.pth")
    assert keys(other)["vae.tiny.widths"] == [3, 5, 7, 9]


def test_refused(folders, tmp_path, capsys):
    def line(case=WAN, change=lambda weights: None):
        write(tmp_path / "tiny.pth", case, change)
        return refused(capsys, tmp_path / "model.gguf", folders / "diffusers", "--vae-tiny", tmp_path / "tiny.pth")

    assert "has 12 latent channels, expected 16 for the VAE" in line(reference_tiny.Case("", 12, 1, WAN.widths))
    assert "has 12 channels of a patch of pixels, expected 3" in line(reference_tiny.Case("", 16, 2, WAN.widths))
    assert "vae tiny's 9.conv.2.bias is missing" in line(change=lambda w: w.pop("decoder.9.conv.2.bias"))
    assert "is no tensor of the vae tiny" in line(change=lambda w: w.update({"decoder.23.bias": torch.zeros(3)}))
    other = {"decoder.0.weight": torch.zeros(8, 16, 1, 1)}
    assert 'kind "super" cannot be run yet' in line(change=lambda w: w.update(other))
