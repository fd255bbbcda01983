"""Quick checks that the training code computes what diffusers and sentencepiece compute, and resumes what it began.

    python -m pytest train/test_model.py
"""
import argparse
import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer

import base
import common
import draw
import model
import pipeline
import stretches
import tokenizer
import train
import transformer
import vae
import world


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


def test_transformers_and_sentencepiece_agree_on_every_text(words):
    ours, theirs = tokenizer.Tokenizer(words), AutoTokenizer.from_pretrained(words)
    texts = [world.caption(world.scene(0, i), np.random.default_rng(i)) for i in range(300)]
    for text in texts + ["", "A Red STAR falls!", "  two   spaces ", "Ein Stern fällt", "\u65e5\u672c"]:
        assert ours(text) == theirs(text).input_ids


def test_words_of_the_world_are_single_pieces(words):
    ours = tokenizer.Tokenizer(words)
    assert all(len(ours(word)) == 2 for word in world.vocabulary())


def test_a_whole_clip_equals_the_cached_walk():
    torch.manual_seed(0)
    whole = vae.new_vae().eval()
    walked = AutoencoderKLWan(**vae.CONFIG).eval()
    walked.load_state_dict(whole.state_dict())
    with torch.no_grad():
        z = torch.randn(1, vae.Z, 3, 4, 4)
        assert torch.allclose(vae.decode(whole, z).clamp(-1, 1), walked.decode(z).sample, atol=1e-5)
        x = torch.randn(1, 3, 9, 32, 32)
        assert torch.allclose(vae.encode(whole, x), walked.encode(x).latent_dist.mean, atol=1e-5)


def test_one_zero_position_stands_for_all_of_them(words, tmp_path):
    torch.manual_seed(0)
    net = transformer.TextToVideo(len(tokenizer.Tokenizer(words))).eval()
    torch.nn.init.normal_(net.transformer.proj_out.weight, std=0.05)
    pipeline.save(tmp_path / "pipe", words, net.state_dict(), vae.new_vae().state_dict(), torch.float32)
    wan = pipeline.WanPipeline.from_pretrained(tmp_path / "pipe")
    with torch.no_grad():
        states = wan._get_t5_prompt_embeds(["a red star falls"], max_sequence_length=512)
        x, sigma = torch.randn(1, vae.Z, 3, 12, 12), torch.tensor([0.7])
        theirs = wan.transformer(x, 1000 * sigma, states, return_dict=False)[0]
        ids = model.pad([tokenizer.Tokenizer(words)("a red star falls")], model.TOKENS)
        ours = net(x[:, None], sigma[:, None], *ids, torch.tensor([[0]]), first=[0], sees=[[0]])[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_text_encoder_hears_the_order_of_words_from_the_start(words):
    torch.manual_seed(0)
    ours = tokenizer.Tokenizer(words)
    encoder, red = model.new_text_encoder(len(ours)).eval(), ours("red")[0]

    def state_of_red(text):
        ids = ours(text)
        with torch.no_grad():
            return encoder(input_ids=torch.tensor([ids])).last_hidden_state[0, ids.index(red)]

    first = state_of_red("a red star falls and a blue box jumps")
    last = state_of_red("a blue box jumps and a red star falls")
    assert (first - last).norm() > 0.2 * first.norm()


def test_an_update_of_muon_is_nearly_orthogonal():
    u = common.orthogonalise(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)))
    assert torch.linalg.svdvals(u).min() > 0.5 and torch.linalg.svdvals(u).max() < 1.3


def test_only_one_process_trains_in_a_folder(tmp_path):
    with train.lock(tmp_path), pytest.raises(SystemExit, match="another process is training"):
        train.lock(tmp_path)
    train.lock(tmp_path).close()


def test_a_run_goes_on_only_with_the_options_that_it_began_with(tmp_path):
    args = argparse.Namespace(out=tmp_path, **{name: 7 for name in train.STREAM_OPTIONS})
    train.keep_options(args)
    train.keep_options(args)
    args.clips = 8
    with pytest.raises(SystemExit, match="--clips 7, not 8"):
        train.keep_options(args)


def test_what_a_run_goes_on_from_are_the_weights_of_the_file(words, tmp_path):
    torch.manual_seed(0)
    net = transformer.TextToVideo(len(tokenizer.Tokenizer(words)))
    autoencoder = vae.new_vae()
    for p in [*net.parameters(), *autoencoder.parameters()]:
        p.data = torch.randn_like(p).half().float()
    pipeline.save(tmp_path / "pipe", words, net.state_dict(), autoencoder.state_dict())
    subprocess.run([sys.executable, train.ROOT / "export.py", tmp_path / "pipe", "-o", tmp_path / "m.gguf"], check=True)
    base.unpack(tmp_path / "m.gguf", tmp_path, words)
    found, (theirs, _) = torch.load(tmp_path / "base.ckpt", weights_only=True), vae.load(tmp_path)
    assert all(torch.equal(found[name], weight) for name, weight in net.state_dict().items())
    assert all(torch.equal(theirs.state_dict()[name], weight) for name, weight in autoencoder.state_dict().items())


def test_a_file_with_other_tokens_is_no_base(words, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Tokenizer, "pieces", lambda self: ["another"])
    with pytest.raises(SystemExit, match="demo.gguf has other tokens than this world"):
        base.unpack(train.ROOT / "models" / "demo.gguf", tmp_path, words)
    assert not list(tmp_path.iterdir())


def test_a_resumed_vae_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "evaluate", lambda *_: 0.0)

    def decoder(run):
        (tmp_path / run).mkdir(exist_ok=True)
        vae.train_vae(tmp_path / run, steps=4, seed=0, count=4)
        return torch.load(tmp_path / run / "vae.ckpt", weights_only=True)["model"]

    def save_and_stop(*args):
        common.save_atomically(*args)
        raise KeyboardInterrupt

    expected = decoder("whole")
    for steps_made in (1, 2):  # of the two in which the light encoder learns
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(vae, "SAVE_SECONDS", -1)
            patch.setattr(vae, "save_atomically", save_and_stop)
            decoder("parted")
        assert torch.load(tmp_path / "parted" / "vae.ckpt", weights_only=True)["step"] == steps_made
    resumed = decoder("parted")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_sample_of_chunks_computes_what_the_program_computes_with_its_cache(words, tmp_path):
    """Four chunks and a change of the prompt: every velocity of ./sora against one pass over the whole sequence."""
    bundled, prompts = train.ROOT / "models" / "demo.gguf", ["a red star falls", "the star jumps at night"]
    state = base.text_to_video(bundled, words)
    pipeline.save(tmp_path / "pipe", words, state, base.autoencoder(bundled).state_dict())
    subprocess.run([sys.executable, train.ROOT / "export.py", tmp_path / "pipe", "-o", tmp_path / "m.gguf"], check=True)
    subprocess.run([train.ROOT / "sora", "-m", tmp_path / "m.gguf", "-q", "-f", "61", "--dump", tmp_path / "dump", "-o",
                    tmp_path / "clip.y4m", "--at", f"1.8125 {prompts[1]}", prompts[0]], check=True)
    dumped = lambda name: torch.from_numpy(np.load(tmp_path / "dump" / f"{name}.npy"))  # [Z, frames, h, w]
    net = transformer.TextToVideo(len(tokenizer.Tokenizer(words))).eval()
    net.load_state_dict(state)
    layout = transformer.Layout("all", 1, (0, 1, 2), (0, 1, 2, 3))
    sigmas, noise = transformer.SIGMAS, dumped("noise").split(world.CHUNK, dim=1)
    drawn = [dumped(f"chunk{c:03d}.latents") for c in layout.drawn]
    ids = model.pad([tokenizer.Tokenizer(words)(text) for text in prompts], model.TOKENS)
    for step, sigma in enumerate(sigmas):
        noisy = [dumped(f"chunk{c:03d}.step{step - 1:03d}.latents") if step else noise[c] for c in layout.noisy]
        with torch.no_grad():
            found = net(torch.stack(drawn + noisy)[None], torch.tensor([[0.0] * 3 + [sigma] * 4]), *ids,
                        torch.tensor([[int(c >= 2) for c in layout.pieces]]), [world.CHUNK * c for c in layout.pieces],
                        layout.sees)[0, 3:]
        for c, velocity in zip(layout.noisy, found):
            theirs = dumped(f"chunk{c:03d}.step{step:03d}.cond.velocity")
            assert (velocity - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (c, step)


class Noise:
    """A Pool of stretches of noise whose sentence changes."""
    told = [range(4), range(4)]
    mistaken = [(i, np.zeros((stretches.CHUNKS[stretches.ANYWHERE], vae.Z, world.CHUNK, 6, 6))) for i in range(4)]

    def grow(self):
        return 8

    def stretch(self, i, where, rng):
        chunks = stretches.CHUNKS[where]
        latents = np.random.default_rng(int(i)).normal(size=(chunks, vae.Z, world.CHUNK, 6, 6))
        return latents, (["a red star"] * 2 + ["a"] * chunks)[:chunks]


@pytest.fixture
def own_past(monkeypatch):
    """The model makes a past every two steps, and all samples from anywhere have one of them."""
    monkeypatch.setattr(transformer, "OWN_EVERY", 2)
    monkeypatch.setattr(transformer, "OWN_SHARE", 1.0)


def test_a_run_that_was_ended_goes_on_as_if_nothing_had_happened(words, tmp_path, monkeypatch, own_past):
    """Over all layouts and on its own past, which begins before the end: steps 0 to 2, 3 and 4 to 9 of ten."""
    for layout in (*transformer.LAYOUTS, transformer.NEXT):
        monkeypatch.setattr(transformer, layout.name.upper(), dataclasses.replace(layout, samples=2))
    tokens = tokenizer.Tokenizer(words)
    course = transformer.Course(10, mixed=3, whole=4, own=4, peak=1.0)

    def train_run(run, pool):
        transformer.train(tmp_path / run, tokens, {}, pool, course, seed=0)
        return torch.load(tmp_path / run / "transformer.ckpt", weights_only=True)["average"]

    expected = train_run("whole", Noise())

    class Ended(Noise):
        def grow(self, steps=iter(range(10))):
            if next(steps) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return 8

    with pytest.raises(SystemExit, match="goes on"):
        train_run("parted", Ended())
    assert torch.load(tmp_path / "parted" / "transformer.ckpt", weights_only=True)["step"] == 6
    resumed = train_run("parted", Noise())
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert list((tmp_path / "whole" / "own").iterdir())


def test_the_past_is_what_the_model_made(words, tmp_path, own_past):
    """Also in a run that was made shorter, so that files of earlier steps are missing."""
    run = argparse.Namespace(step=8, course=transformer.Course(10, mixed=0, whole=0, own=2, peak=1.0), device="cpu",
                             go_on=lambda batch: batch.wanted + 1)
    batch = transformer.next_batch(tmp_path, run, Noise(), 0, tokenizer.Tokenizer(words))
    assert batch.layout is transformer.ANYWHERE
    assert torch.allclose(batch.past, batch.wanted + 1, atol=0.01)


def test_some_pasts_are_mistaken(words, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "MISTAKEN_SHARE", 0.5)
    run = argparse.Namespace(step=8, course=transformer.Course(10, mixed=0, whole=0, own=9, peak=1.0), device="cpu")
    batch = transformer.next_batch(tmp_path, run, Noise(), 0, tokenizer.Tokenizer(words))
    as_drawn = (batch.past == batch.wanted).flatten(1).all(1)
    mistaken = (batch.past == 0).flatten(1).all(1)
    assert (as_drawn ^ mistaken).all() and 0 < mistaken.sum() < len(mistaken)


def test_what_the_judge_asks_for_is_learned():
    """Every motion of a pair, and every relation, begins some stretch."""
    begins = [stretches.story_of(0, i, stretches.START).scenes[0] for i in range(1000)]
    assert {x.motion for s in begins if len(s.subjects) == 2 for x in s.subjects} == {
        *world.PAIR_MOTIONS, *world.RELATIONS}


def test_a_stretch_begins_where_its_sentences_say(words, tmp_path, monkeypatch):
    """A shard of each kind, encoded by handing the first channel through: windows have the latents of their frames."""
    monkeypatch.setattr(stretches, "STRETCHES", (4, 3))
    monkeypatch.setattr(stretches, "MISTAKEN", (0, 2))
    small = lambda x: torch.nn.functional.interpolate(x[:, :1, ::4], scale_factor=(1, 1 / 8, 1 / 8))
    for k in (0, 1):
        stretches.make_shard(k, tmp_path, 0, small, tokenizer.Tokenizer(words), narrow=False)
    pool = stretches.Pool(tmp_path)
    assert pool.grow() == 7
    for i, past in pool.mistaken:
        assert not np.array_equal(past, pool.latents[stretches.ANYWHERE][i])
    assert [i for i, _ in pool.mistaken] == [0, 1]
    for where in (stretches.START, stretches.ANYWHERE):
        for i, told in enumerate(pool.told[where]):
            assert (told["begin"] == 0) == (where == stretches.START)
            frame = world.first_frame(world.CHUNK * (told["begin"] + 2)) + 3  # the last of chunk 2's first latent frame
            story = stretches.story_of(0, 4 * where + i, where)
            expected = small(vae.to_tensor(draw.draw(story, first=frame, frames=1))[None])[0, :, 0]
            assert np.allclose(pool.latents[where][i][2, :, 0], expected.half(), atol=1e-3)
