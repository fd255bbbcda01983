"""Saves what was trained as an ordinary diffusers folder: model_index.json, scheduler, tokenizer, text_encoder,
transformer, vae.  diffusers' WanPipeline.from_pretrained loads it, and export.py takes it like any other checkpoint.

    python train/pipeline.py build/train && python export.py build/train/snapshot -o demo.gguf
"""
import json
import os
import pathlib
import shutil
import sys

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import model
import vae
import world
from transformer import SHIFT, SIGMAS, WINDOW

# What export.py finds in sora.json beside a checkpoint, and puts into the file as its defaults. In f32 everybody gets
# the same clip, whatever the processor multiplies fastest.
RUN = dict(width=world.SIZE, height=world.SIZE, frames=world.FRAMES, fps=16, steps=len(SIGMAS), guidance=1.0,
           rule="euler", timesteps=[1000 * s for s in SIGMAS], sigmas=SIGMAS, chunk_frames=world.CHUNK,
           window=WINDOW, prompt_change="keep", negative_prompt="", name="sora.c demo", precision="f32")
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def _part(state, prefix):
    return {n[len(prefix):]: p for n, p in state.items() if n.startswith(prefix)}


def build(tokenizer_folder, text_to_video, vae_state):
    """A WanPipeline in float32. text_to_video: state dict of TextToVideo; vae_state: of AutoencoderKLWan."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    text_encoder, transformer = model.new_text_encoder(len(tokenizer)), model.new_transformer()
    autoencoder = vae.new_vae()
    text_encoder.load_state_dict(_part(text_to_video, "text_encoder."))
    transformer.load_state_dict(_part(text_to_video, "transformer."))
    autoencoder.load_state_dict(vae_state)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT,
                                        num_train_timesteps=1000)
    return WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder.eval(), vae=autoencoder.eval(),
                       transformer=transformer.eval(), scheduler=scheduler)


def save(folder, tokenizer_folder, text_to_video, vae_state, dtype=torch.float16, run=RUN):
    """Writes the folder under a temporary name and swaps it in, so that a reader never sees half of one.

    run: the settings of its sora.json.
    """
    folder = pathlib.Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline = build(tokenizer_folder, text_to_video, vae_state)
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        for p in part.parameters():
            p.data = p.data.to(dtype)
    pipeline.save_pretrained(new)
    shutil.copy(pathlib.Path(tokenizer_folder) / "spiece.model", new / "tokenizer")
    (new / "tokenizer" / "tokenizer.json").unlink()  # the same rules again; one description of them is enough
    (new / "sora.json").write_text(json.dumps(run, indent=2) + "\n")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def snapshot(out):
    """Writes OUT/snapshot/ from the checkpoints of a run, finished or not: the averaged weights."""
    average = torch.load(out / "transformer.ckpt", weights_only=True, map_location="cpu")["average"]
    save(out / "snapshot", out / "tokenizer", average, vae.load(out)[0].state_dict())


if __name__ == "__main__":
    snapshot(pathlib.Path(sys.argv[1]))
