"""The VAE: diffusers' AutoencoderKLWan, small, and the stages that train it.

    pixels [B, 3, F, H, W] in [-1, 1]  <->  latents [B, Z, 1 + (F-1)/4, H/8, W/8]

Training Wan's encoder and decoder together costs twice the decoder alone and starts slowly.  So the decoder begins
with a light encoder (principal components of 4x8x8 blocks and a small residual net) that is thrown away, on short
stretches of clips.  Wan's own encoder is regressed onto the light one's latents.  Then both halves of Wan's VAE learn
together, on whole clips: what is small and moves (flakes, bubbles, legs) is in the latents only if the encoder is told
that it was missed.

The latents leave the light encoder through a batch norm without weights, so every channel has mean 0 and deviation 1,
and the decoder sees them with noise on: a latent that is slightly off, as the transformer's will be, still decodes
well.

diffusers runs the VAE frame by frame with caches.  Without caches its up- and downsampling skip the temporal
convolution, so WholeClipResample does what the cached walk does, over the whole clip at once, which is what a gradient
needs.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm, patchify, unpatchify
from torch import nn

import draw
import world
from common import Log, Optimisers, products, rate, replacing, save_atomically
from world import FRAMES, SIZE

Z = 16
CONFIG = dict(base_dim=32, z_dim=Z, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
              patch_size=2, in_channels=12, out_channels=12, latents_mean=[0.0] * Z, latents_std=[1.0] * Z,
              scale_factor_temporal=4, scale_factor_spatial=8)


class WholeClipResample(WanResample):
    """WanResample over a whole clip: the first frame has no past and skips the temporal convolution, as with caches."""

    def forward(self, x, feat_cache=None, feat_idx=None):
        if self.mode == "upsample3d" and x.shape[2] > 1:
            first, rest = x[:, :, :1], self.time_conv(x[:, :, 1:])
            b, c2, t, h, w = rest.shape
            rest = rest.view(b, 2, c2 // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c2 // 2, 2 * t, h, w)
            x = torch.cat([first, rest], 2)
        b, c, t, h, w = x.shape
        x = self.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
        x = x.view(b, t, *x.shape[1:]).transpose(1, 2)
        if self.mode == "downsample3d" and t > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
        return x


def new_vae():
    """An AutoencoderKLWan of CONFIG with random weights, for whole clips without caches."""
    vae = AutoencoderKLWan(**CONFIG)
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.__class__ = WholeClipResample
    return vae


def decode(vae, z):
    """Pixels [B, 3, F, H, W], unclamped, of latents z [B, Z, T, H/8, W/8]."""
    return unpatchify(vae.decoder(vae.post_quant_conv(z)), CONFIG["patch_size"])


def encode(vae, x):
    """Latents [B, Z, T, H/8, W/8] of pixels x [B, 3, F, H, W]: the mean that Wan's own encoder gives."""
    return vae.quant_conv(vae.encoder(patchify(x, CONFIG["patch_size"]))).chunk(2, 1)[0]


class _Residual(nn.Module):
    """x [B, width, T, h, w] plus a convolution of it within each frame."""

    def __init__(self, width):
        super().__init__()
        self.norm = WanRMS_norm(width, images=False)  # over channels alone: no frame depends on another
        self.conv = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.mix = nn.Conv3d(width, width, 1)

    def forward(self, x):
        return x + self.mix(F.silu(self.conv(self.norm(x))))


class LightEncoder(nn.Module):
    """pixels [B, 3, F, H, W] -> latents [B, Z, T, H/8, W/8], T = 1 + (F-1)/4.

    Each latent frame sees only its own four pixel frames; the first stands for one, which is shown to it four times.
    Starts as the principal components of 4x8x8 blocks, each scaled to deviation 1; a residual net, silent at first,
    learns what the decoder would rather know.
    """

    def __init__(self, width=64):
        super().__init__()
        block = dict(kernel_size=(4, 8, 8), stride=(4, 8, 8))
        self.linear = nn.Conv3d(3, Z, **block)
        self.blocks = nn.Conv3d(3, width, **block)
        self.residual = nn.Sequential(_Residual(width), _Residual(width))
        self.out = nn.Conv3d(width, Z, 1)
        nn.init.zeros_(self.out.weight)
        self.norm = nn.BatchNorm3d(Z, affine=False, momentum=0.01)

    @torch.no_grad()
    @products(narrow=False)
    def start_from_components(self, clips, seed):
        """Sets the linear part from a hundred stretches of four frames of Clips."""
        x = clips.batch(np.random.default_rng(seed), 100, 4)
        b, _, _, h, w = x.shape
        blocks = x.view(b, 3, 4, h // 8, 8, w // 8, 8).permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, 768)
        mean, covariance = blocks.mean(0), torch.cov(blocks.T)
        values, vectors = torch.linalg.eigh(covariance)
        weight = vectors[:, -Z:].T / values[-Z:, None].sqrt()
        self.linear.weight.copy_(weight.view_as(self.linear.weight))
        self.linear.bias.copy_(-weight @ mean)

    def forward(self, x):
        x = torch.cat([x[:, :, :1].expand(-1, -1, 3, -1, -1), x], 2)
        return self.norm(self.linear(x) + self.out(self.residual(self.blocks(x))))


def to_tensor(clips):
    """uint8 [..., F, H, W, 3] -> float [..., 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).movedim(-1, -4).float().contiguous().div_(127.5).sub_(1)


def reconstruction_loss(y, x):
    """L1 + L2 of pixels y, x [B, 3, F, H, W], with three times the weight where x has edges: flat areas are easy and
    would drown them."""
    edge = torch.zeros_like(x[:, :1])
    edge[..., 1:] += (x[..., 1:] - x[..., :-1]).abs().mean(1, keepdim=True)
    edge[..., 1:, :] += (x[..., 1:, :] - x[..., :-1, :]).abs().mean(1, keepdim=True)
    weight = 1 + 4 * edge.clamp(max=0.5)
    weight = weight / weight.mean()
    d = y - x
    return (weight * (d.abs() + 2 * d * d)).mean()


def psnr(y, x):
    """Decibels per clip, averaged; y, x: pixels [B, 3, F, H, W] in [-1, 1]."""
    error = ((y.clamp(-1, 1) - x) / 2).pow(2).flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


WEIGHTS = world.LEARNED_LAST | {"snow": 3, "sea": 3}  # flakes and bubbles are the last that the VAE learns


def drawn(seed, index):
    """The clip of a number: two seconds from anywhere in a story every second time, else the start of a scene, one in
    two of the hard ones.

    A cut comes where four frames begin that share a latent frame, as it does when a whole story is encoded.
    """
    if index % 4 == 0:
        return draw.draw(world.scene(seed, index, weights=WEIGHTS))
    if index % 4 == 2:
        return draw.draw(world.hard_scene(seed, index))
    story = world.story(seed, index, weights=WEIGHTS, sentences=4)
    last = world.first_frame(story.starts[-1]) // 4 + FRAMES // 4
    return draw.draw(story, first=4 * int(np.random.default_rng([seed, index, 3]).integers(last)))


class Clips:
    """Drawn clips, kept in a file, and random stretches of them."""

    def __init__(self, path, seed, count):
        if not path.exists():
            with replacing(path) as new:
                clips = np.lib.format.open_memmap(new, "w+", np.uint8, (count, FRAMES, SIZE, SIZE, 3))
                for i in range(count):
                    clips[i] = drawn(seed, i)
                clips.flush()
        self.clips = np.load(path, mmap_mode="r")

    def batch(self, rng, count, frames):
        """float [count, 3, frames, SIZE, SIZE]: as many frames in a row of each of so many clips."""
        clips = rng.integers(len(self.clips), size=count)
        starts = 4 * rng.integers((FRAMES - frames) // 4 + 1, size=count)
        return to_tensor(np.stack([self.clips[i, f:f + frames] for i, f in zip(clips, starts)]))


EVALUATION_SEED = 1  # of the clips that judge the VAE
SAVE_SECONDS = 90
PULL = 0.1  # of the latents' mean square to 1, beside the reconstruction's loss
BATCH = 2  # one clip alone would get convolutions from PyTorch that are four times slower
STRETCH = 9  # frames of each clip that train_vae sees, at a quarter of a whole one's price
NOISE = 0.03  # deviation of what is added to the latents that the decoder sees, in units of their own
SETTLED_NOISE = 0.12  # the same once the encoder stands still: the transformer's latents are off by more
LEARNING_SHARE = 0.5  # of train_vae's steps: then the light encoder stands still, as it will in use
ENCODING_SHARE = 0.25  # of train_autoencoder's steps: then the encoder stands still, and the latents are what they are


@torch.no_grad()
def evaluate(autoencoder, module, count):
    """PSNR in decibels, averaged over `count` whole clips that no stage trains on; leaves `module` in train mode."""
    module.eval()
    clips = (to_tensor(draw.draw(world.scene(EVALUATION_SEED, i)))[None] for i in range(count))
    result = float(np.mean([psnr(autoencoder(clip), clip) for clip in clips]))
    module.train()
    return result


def _parts(vae, light):
    """{checkpoint: what it holds, as one module}, in the order of the stages; each is loaded over those before it."""
    return {"base-vae": vae,
            "vae": nn.ModuleDict(dict(light=light, decoder=vae.decoder, post_quant_conv=vae.post_quant_conv)),
            "encoder": nn.ModuleDict(dict(encoder=vae.encoder, quant_conv=vae.quant_conv)), "autoencoder": vae}


def load(out):
    """(vae, light encoder) as those of the stages left them that have begun; ready for use."""
    vae, light = new_vae(), LightEncoder()
    for name, part in _parts(vae, light).items():
        if (out / f"{name}.ckpt").exists():
            part.load_state_dict(torch.load(out / f"{name}.ckpt", weights_only=True)["model"])
    return vae.eval().requires_grad_(False), light.eval().requires_grad_(False)


def _fit(out, name, module, steps, seed, count, loss_of, autoencoder, narrow, peak=1.0, falling=0.5):
    """Trains `module` up to `steps` steps into OUT/NAME.ckpt, from which it also resumes; the log is OUT/log/NAME.tsv.

    count: of the clips that are drawn. loss_of(clips, step): the loss of a step. autoencoder: pixels -> pixels, for the
    log. narrow: whether products are in bfloat16. peak: of the learning rate's factor, which falls over the last share
    `falling` of the steps.
    """
    optimisers = Optimisers(module.named_parameters(), 0.012, 2e-3, narrow)
    checkpoint, log, step, start = out / f"{name}.ckpt", Log(out / "log" / f"{name}.tsv"), 0, time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        step, start = state["step"], start - state["seconds"]
    if step >= steps:
        return
    clips, last_save = Clips(out / "clips.npy", seed, count), time.time()
    while step < steps:
        with products(narrow):
            loss = loss_of(clips, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, error_if_nonfinite=True)
        optimisers.set_factor(peak * rate(step, steps, 50, falling))
        optimisers.step()
        step += 1
        if step % 100 == 0 or step == steps:
            log.write(step=step, seconds=time.time() - start, loss=loss.item(),
                      psnr=evaluate(autoencoder, module, 64 if step == steps else 4))
        if time.time() - last_save > SAVE_SECONDS or step == steps:
            save_atomically({"model": module.state_dict(), "optimisers": optimisers.state_dict(), "step": step,
                             "seconds": time.time() - start}, checkpoint)
            last_save = time.time()


def _clips_and_noise(clips, step, seed, frames, deviation=NOISE):
    """So many frames of a few clips, and noise for their latents: those of a step."""
    x = clips.batch(np.random.default_rng([seed, step, frames]), BATCH, frames)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    noise = torch.randn(BATCH, Z, 1 + (frames - 1) // 4, SIZE // 8, SIZE // 8, generator=generator)
    return x, deviation * noise


def train_vae(out, steps, seed, count, compiled=False, narrow=False):
    """Trains decoder and light encoder together, on stretches of clips, into OUT/vae.ckpt.

    count: of the clips that are drawn for it. compiled: by torch.compile; a step then takes two thirds of the time.
    narrow: products in bfloat16.
    """
    torch.manual_seed(seed)
    vae, light = new_vae(), LightEncoder()
    reconstruct = lambda x, noise: reconstruction_loss(decode(vae, light(x) + noise).float(), x)
    reconstruct = torch.compile(reconstruct, dynamic=False, disable=not compiled)

    def loss_of(clips, step):
        if step == 0:
            light.start_from_components(clips, seed)
        light.norm.train(step < LEARNING_SHARE * steps)
        light.requires_grad_(step < LEARNING_SHARE * steps)
        x, noise = _clips_and_noise(clips, step, seed, STRETCH)
        return reconstruct(x, noise)

    _fit(out, "vae", _parts(vae, light)["vae"], steps, seed, count, loss_of, lambda x: decode(vae, light(x)), narrow)


def train_encoder(out, steps, seed, count, compiled=False, narrow=False):
    """Regresses Wan's own encoder onto the light encoder's latents, on whole clips too, into OUT/encoder.ckpt.

    The second half of quant_conv's output, the log-variance, is left at zero weights and a small constant: the latents
    are meant to be used at their mean.
    """
    torch.manual_seed(seed)
    vae, light = load(out)
    half = _parts(vae, light)["encoder"].requires_grad_(True)
    vae.quant_conv.weight.data[Z:] = 0
    vae.quant_conv.bias.data[Z:] = -8
    distance = lambda x: (encode(vae, x).float() - light(x).float()).square().mean()
    distance = torch.compile(distance, dynamic=False, disable=not compiled)
    loss_of = lambda clips, step: distance(clips.batch(np.random.default_rng([seed, step, 1]), BATCH, FRAMES))
    _fit(out, "encoder", half, steps, seed, count, loss_of, lambda x: decode(vae, encode(vae, x)), narrow)


def train_autoencoder(out, steps, seed, count, compiled=False, narrow=False):
    """Trains both halves of Wan's VAE together, on whole clips, into OUT/autoencoder.ckpt; arguments as above.

    Its causal convolutions reach eight latent frames back. Of a stretch they see three, and before them nothing: a
    decoder that learned on stretches alone lets a clip's background drift once there is more past than that.
    """
    vae = load(out)[0].train().requires_grad_(True)

    def loss_between(x, noise):
        z = encode(vae, x).float()
        return reconstruction_loss(decode(vae, z + noise).float(), x) + PULL * (z.square().mean() - 1).square()

    loss_between = torch.compile(loss_between, dynamic=False, disable=not compiled)

    def loss_of(clips, step):
        encodes = step < ENCODING_SHARE * steps
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(encodes)
        return loss_between(*_clips_and_noise(clips, step, seed, FRAMES, NOISE if encodes else SETTLED_NOISE))

    _fit(out, "autoencoder", vae, steps, seed, count, loss_of, lambda x: decode(vae, encode(vae, x)), narrow, peak=0.5,
         falling=0.75)
