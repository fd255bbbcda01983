"""The weights of a weight file as the states that they were exported from.

    python train/train.py --out build/further --base models/demo.gguf      # where a run may start
    python train/base.py models/demo.gguf build/demo                       # a diffusers folder, as before the export

A weight file holds no moments of the optimisers and no light encoder.  The former grow again within some hundred
steps; the latter is fitted back to Wan's own encoder (vae.train_light), as that once was to it.
"""
import pathlib
import sys
import tempfile

import model
import pipeline
import tokenizer
import vae
from common import save_atomically

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from export.files import open_file
from export.names import SHARED, TIED, count_upsamples, our_name
from export.writer import PREFIX


def _unfolded(values, shape):
    """A weight in its own shape: the VAE's convolutions are matrices in the file, their input channels innermost."""
    if len(shape) > 2 and values.dim() == 2:
        values = values.view(shape[0], -1, shape[1]).transpose(1, 2)
    return values.reshape(shape)


def _state(part, module, file):
    """The state dict of a part, for a module of that shape."""
    state = module.state_dict()
    keys = [key for key in state if key != TIED]
    for key, name in zip(keys, count_upsamples(keys) if part == "vae" else keys):
        values = file.tensors[PREFIX[part] + our_name(part, name)].rows()
        state[key] = _unfolded(values, state[key].shape) if part == "vae" else values.reshape(state[key].shape)
    if part == "text_encoder":
        state[TIED] = state[SHARED]
    return state


def read(path, words):
    """(state of TextToVideo, the autoencoder) of a weight file that training made.

    words: the tokenizer's folder; a file with other tokens is refused.
    """
    file, ours = open_file(path), tokenizer.Tokenizer(words)
    if file.value("tokenizer.ggml.tokens") != ours.pieces():
        sys.exit(f"base.py: {path} has other tokens than this world")
    state = {}
    for part, module in (("text_encoder", model.new_text_encoder(len(ours))), ("transformer", model.new_transformer())):
        state |= {f"{part}.{key}": values for key, values in _state(part, module, file).items()}
    autoencoder = vae.new_vae()
    autoencoder.load_state_dict(_state("vae", autoencoder, file))
    return state, autoencoder


def unpack(path, out, words):
    """Writes OUT/base.ckpt, the state of TextToVideo, and the VAE's OUT/decoder.ckpt and OUT/encoder.ckpt."""
    state, autoencoder = read(path, words)
    vae.unpack(out, autoencoder)
    save_atomically(state, out / "base.ckpt")


def main():
    path, folder = map(pathlib.Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as work:
        words = pathlib.Path(work) / "tokenizer"
        tokenizer.save(words)
        state, autoencoder = read(path, words)
        pipeline.save(folder, words, state, autoencoder.state_dict())


if __name__ == "__main__":
    main()
