"""The weights of a weight file as the states that they were exported from.

    python train/train.py --out build/further --base models/demo.gguf      # where a run may start
    python train/base.py models/demo.gguf build/demo                       # a diffusers folder, to be exported again

A weight file holds no moments of the optimisers; they grow again within some hundred steps.
"""
import argparse
import pathlib
import sys
import tempfile

import model
import pipeline
import tokenizer
import vae
from common import save_atomically

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from export.containers import Gguf
from export.defaults import keys_defaults
from export.names import SHARED, TIED, count_upsamples, our_name
from export.parts import KINDS


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
        values = file.tensors[KINDS[part].prefix + our_name(part, name)].rows()
        state[key] = _unfolded(values, state[key].shape) if part == "vae" else values.reshape(state[key].shape)
    if part == "text_encoder":
        state[TIED] = state[SHARED]
    return state


def _open(path):
    """The reader of a weight file; exits with one line if it is none."""
    try:
        return Gguf(path)
    except (ValueError, OSError) as error:
        sys.exit(f"base.py: {path} is no weight file ({error})")


def text_to_video(path, words):
    """The state of TextToVideo in a weight file. words: the tokenizer's folder; a file with other tokens is refused."""
    file, ours = _open(path), tokenizer.Tokenizer(words)
    if file.keys.get("tokenizer.ggml.tokens") != ours.pieces():
        sys.exit(f"base.py: {path} has other tokens than this world")
    parts = {"text_encoder": model.new_text_encoder(len(ours)), "transformer": model.new_transformer()}
    return {f"{part}.{key}": values for part, module in parts.items()
            for key, values in _state(part, module, file).items()}


def autoencoder(path):
    """The VAE of a weight file, ready for use."""
    result = vae.new_vae()
    result.load_state_dict(_state("vae", result, _open(path)))
    return result.eval().requires_grad_(False)


def unpack(path, out, words):
    """Writes OUT/base.ckpt, the state of TextToVideo, and OUT/base-vae.ckpt, that of the VAE."""
    state = text_to_video(path, words)
    save_atomically({"model": autoencoder(path).state_dict()}, out / "base-vae.ckpt")
    save_atomically(state, out / "base.ckpt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")
    with tempfile.TemporaryDirectory() as work:
        words = pathlib.Path(work) / "tokenizer"
        tokenizer.save(words)
        pipeline.save(args.folder, words, text_to_video(args.model, words), autoencoder(args.model).state_dict(),
                      run=keys_defaults(_open(args.model).keys))


if __name__ == "__main__":
    main()
