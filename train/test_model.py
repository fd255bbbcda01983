"""Quick checks that the training code computes what diffusers and sentencepiece compute, and resumes what it began.

    python -m pytest train/test_model.py
"""
import argparse
import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import base
import causal
import common
import draw
import latents
import model
import pipeline
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
        ours = net(x, sigma, *model.pad([tokenizer.Tokenizer(words)("a red star falls")], model.TOKENS))
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


def matrices_after_a_step(gradients):
    """Three matrices after a step of Muon by the mean of gradients over the workers."""
    params = [torch.nn.Parameter(torch.zeros(4, 6 + i)) for i in range(3)]
    for p, gradient in zip(params, gradients):
        p.grad = gradient
    workers = dist.get_world_size() if dist.is_initialized() else 1
    common.sum_over_workers([p.grad for p in params], 1 / workers)
    common.Muon(params, 0.1).step()
    return [p.detach() for p in params]


def gradients_of(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 6 + i, generator=generator) for i in range(3)]


def step_of_worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(matrices_after_a_step(gradients_of(rank)), folder / f"{rank}.pt")


def test_two_workers_step_as_one_that_has_the_mean_of_their_gradients(tmp_path):
    multiprocessing.spawn(step_of_worker, (tmp_path,), 2)
    mean = [(a + b) / 2 for a, b in zip(gradients_of(0), gradients_of(1))]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), matrices_after_a_step(mean))


def test_only_one_process_trains_in_a_folder(tmp_path):
    with train.lock(tmp_path), pytest.raises(SystemExit, match="another process is training"):
        train.lock(tmp_path)
    train.lock(tmp_path).close()


def test_a_subject_has_the_same_latents_in_each_of_its_places():
    scene = next(s for s in (latents.shard_scene(0, i) for i in range(1000))
                 if s.background == "plain" and s.subjects[0].motion == "jump")
    light = vae.LightEncoder().eval()
    with torch.no_grad():
        left, right = (light(vae.to_tensor(draw.draw(dataclasses.replace(scene, dx=dx)))[None])
                       for dx in (-abs(scene.dx), abs(scene.dx)))
    assert torch.allclose(left[..., 2:-3], right[..., 3:-2], atol=0.05)  # all but the borders, where padding shows


def test_a_run_goes_on_only_with_the_options_that_it_began_with(tmp_path):
    args = argparse.Namespace(out=tmp_path, **{name: 7 for name in train.STREAM_OPTIONS})
    train.keep_options(args)
    train.keep_options(args)
    args.workers = 8
    with pytest.raises(SystemExit, match="--workers 7, not 8"):
        train.keep_options(args)


def test_a_run_may_change_its_length_until_its_rate_falls():
    short, long = transformer.from_nothing(1000), transformer.from_nothing(2000)
    long.check_length(step=500, before=1000)
    short.check_length(step=900, before=1000)
    assert short.rate(501) < long.rate(501)
    for course, before in ((long, 1000), (short, 2000)):
        with pytest.raises(SystemExit, match=f"at step 501 a run of {before} steps"):
            course.check_length(501, before)


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


def test_a_light_encoder_learns_the_latents_of_wans_own(tmp_path, monkeypatch):
    distances, others = [], vae.LightEncoder().requires_grad_(False)  # a new one of Wan's makes nearly the same of all
    monkeypatch.setattr(vae, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(vae, "encode", lambda autoencoder, x: others(x))
    monkeypatch.setattr(vae.Log, "write", lambda self, **row: distances.append(row["loss"]))
    torch.manual_seed(0)
    common.save_atomically({"model": vae.new_vae().state_dict()}, tmp_path / "autoencoder.ckpt")
    for steps in (1, 30):
        vae.train_light(tmp_path, steps, seed=0, count=2)
    assert distances[1] < 0.9 * distances[0]


def test_a_further_run_changes_the_decoder_and_not_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "evaluate", lambda *_: 0.0)
    finished = vae.new_vae().state_dict()
    common.save_atomically({"model": finished}, tmp_path / "autoencoder.ckpt")
    vae.train_light(tmp_path, 1, seed=0, count=2, narrow=True)
    vae.train_decoder(tmp_path, 1, seed=0, count=2, narrow=True, peak=vae.FURTHER_PEAK)
    state = vae.load(tmp_path)[0].state_dict()
    learned = {name for name in state if not torch.equal(state[name], finished[name])}
    assert learned and all(name.startswith(("decoder", "post_quant_conv")) for name in learned)
    assert all(torch.allclose(state[name], finished[name], atol=0.05) for name in learned)


def interrupted_at(step, batch_at):
    """batch_at, but whoever asks for the batch of `step` is interrupted."""
    def interrupted(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return batch_at(now, *rest)

    return interrupted


def test_a_resumed_run_equals_an_uninterrupted_one(words, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 8)
    monkeypatch.setattr(transformer, "EXTENTS", [(1, 2), (2, 2)])
    monkeypatch.setattr(transformer, "SHARDS", 1)
    tokens = tokenizer.Tokenizer(words)
    reader = {f"text_encoder.{n}": p for n, p in model.new_text_encoder(len(tokens)).state_dict().items()}
    for run in ("whole", "parted", "helped"):
        latents.shard_path(tmp_path / run / "latents", 0).parent.mkdir(parents=True)
        np.save(latents.shard_path(tmp_path / run / "latents", 0),
                np.random.default_rng(0).normal(size=(8, vae.Z, 2, 6, 6)).astype(np.float16))
    train_run = lambda run, **rest: transformer.train(tmp_path / run, tokens, reader, None,
                                                      transformer.from_nothing(4), seed=0, **rest)
    expected = train_run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformer, "SAVE_SECONDS", -1)  # a checkpoint after the first step, and then none for long
        patch.setattr(transformer, "batch_at", interrupted_at(3, transformer.batch_at))
        train_run("parted", saved=lambda: patch.setattr(transformer, "SAVE_SECONDS", 1000))
    assert torch.load(tmp_path / "parted" / "transformer.ckpt", weights_only=True)["step"] == 1  # of three steps made
    resumed = train_run("parted")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    helped = train_run("helped", helpers=2)
    assert all(torch.equal(expected[name], helped[name]) for name in expected)


def test_one_process_can_take_all_workers_parts_of_a_batch(words, monkeypatch):
    monkeypatch.setattr(transformer, "EXTENTS", [(1, 2)])
    course, tokens = transformer.from_nothing(4), tokenizer.Tokenizer(words)

    class Pool:
        def batch(self, indices, frames):
            return torch.tensor(indices)[:, None, None, None, None].float()

    whole, *parts = ([part.tolist() for part in transformer.Batches(ranks, course, 0, 2, Pool(), tokens)[3]]
                     for ranks in (range(2), [0], [1]))
    assert whole == [a + b for a, b in zip(*parts)] and parts[0] != parts[1]


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


def test_a_sample_of_the_causal_stage_computes_what_the_program_computes_with_its_cache(words, tmp_path):
    """Four chunks and a change of the prompt: every velocity of ./sora against one pass over the whole sequence."""
    bundled, prompts = train.ROOT / "models" / "demo.gguf", ["a red star falls", "the star jumps at night"]
    state = base.text_to_video(bundled, words)
    pipeline.save(tmp_path / "pipe", words, state, base.autoencoder(bundled).state_dict(), run=pipeline.RUN_CHUNKS)
    subprocess.run([sys.executable, train.ROOT / "export.py", tmp_path / "pipe", "-o", tmp_path / "m.gguf"], check=True)
    subprocess.run([train.ROOT / "sora", "-m", tmp_path / "m.gguf", "-q", "-f", "45", "--dump", tmp_path / "dump", "-o",
                    tmp_path / "clip.y4m", "--at", f"1.3125 {prompts[1]}", prompts[0]], check=True)
    dumped = lambda name: torch.from_numpy(np.load(tmp_path / "dump" / f"{name}.npy"))  # [Z, frames, h, w]
    net = transformer.TextToVideo(len(tokenizer.Tokenizer(words))).eval()
    net.load_state_dict(state)
    layout = causal.Layout("all", (0, 1, 2), (0, 1, 2, 3))
    sigmas, noise = pipeline.SIGMAS, dumped("noise").split(world.CHUNK, dim=1)
    drawn = [dumped(f"chunk{c:03d}.latents") for c in layout.drawn]
    ids = model.pad([tokenizer.Tokenizer(words)(text) for text in prompts], model.TOKENS)
    for step, sigma in enumerate(sigmas):
        noisy = [dumped(f"chunk{c:03d}.step{step - 1:03d}.latents") if step else noise[c] for c in layout.noisy]
        with torch.no_grad():
            found = model.chunk_velocity(
                net.transformer, torch.stack(drawn + noisy)[None], torch.tensor([[0.0] * 3 + [sigma] * 4]),
                *model.embed(net.text_encoder, *ids), torch.tensor([[int(c >= 2) for c in layout.chunks]]),
                [world.CHUNK * c for c in layout.chunks], layout.sees)[0, 3:]
        for c, velocity in zip(layout.noisy, found):
            theirs = dumped(f"chunk{c:03d}.step{step:03d}.cond.velocity")
            assert (velocity - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (c, step)
