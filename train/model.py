"""The text encoder and the video transformer: UMT5EncoderModel of transformers and WanTransformer3DModel of diffusers.

Both are small.  The transformer's weights are diffusers', its pass is written here: a sample is a sequence of chunks of
latent frames, each of which sees some of the others and reads a prompt of its own. Where there is one chunk, the pass
is diffusers'. One thing differs, and changes no result: Wan attends to all 512 text positions, of which all but the
prompt's are zeros.  Zeros have equal keys and values, so one of them with its logit raised by log(count) stands for
all; twenty times less work for the prompts of this world.
"""
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

import vae

TEXT_LEN = 512  # text positions that Wan attends to
TOKENS = 24  # longest caption in training, with its </s>
TEXT_DIM = 128
TRANSFORMER = dict(patch_size=(1, 3, 3), num_attention_heads=8, attention_head_dim=32, in_channels=vae.Z,
                   out_channels=vae.Z, text_dim=TEXT_DIM, freq_dim=128, ffn_dim=576, num_layers=5, cross_attn_norm=True,
                   qk_norm="rms_norm_across_heads", rope_max_seq_len=64)


def new_text_encoder(vocabulary):
    """A UMT5 encoder of three layers, 0.5 million weights.

    Its only notion of order is the bias that attention gives to distances.  The stock initialisation leaves that so
    near zero that a star and a box stay in one bag of words: which of the two comes first is then never learned.
    """
    encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0))
    for block in encoder.encoder.block:
        nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight, std=1.0)
    return encoder


def new_transformer():
    """A WanTransformer3DModel, initialised so that every part is heard from the first step."""
    model = WanTransformer3DModel(**TRANSFORMER)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            nn.init.zeros_(module.bias)
    for block in model.blocks:
        for out in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
            out.weight.data.mul_((2 * len(model.blocks)) ** -0.5)
        _turn_from_padding(block.attn2)
    nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    return model


def _turn_from_padding(attn):
    """Starts cross-attention with its back to the zero positions, which outnumber the prompt's forty to one.

    A zero's key is the bias alone: a direction that queries, by their own bias, begin opposed to.
    """
    sign = torch.randint(0, 2, attn.to_k.bias.shape).float() * 2 - 1
    attn.to_k.bias.data = 0.1 * sign
    attn.to_q.bias.data = -1.3 * sign


def embed(text_encoder, ids, mask):
    """Text states [B, L+1, D] and their logit bias [B, 1, 1, L+1]; the last position stands for all the zeros.

    ids, mask: [B, L], mask 1 for the prompt's tokens and its </s>.
    """
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    states = torch.cat([states, torch.zeros_like(states[:, :1])], 1)
    zeros = (TEXT_LEN - mask.sum(1, keepdim=True)).float().log()
    bias = torch.where(mask > 0, 0.0, -1e4)
    return states, torch.cat([bias, zeros], 1)[:, None, None]


def pad(ids_list, length):
    """Lists of ids, none longer than `length` -> (ids, mask) [B, length] int64, padded with <pad> 0."""
    ids = torch.zeros(len(ids_list), length, dtype=torch.long)
    mask = torch.zeros(len(ids_list), length, dtype=torch.long)
    for row, x in enumerate(ids_list):
        ids[row, :len(x)] = torch.tensor(x)
        mask[row, :len(x)] = 1
    return ids, mask


def _turns(net, first, frames, rows, columns):
    """RoPE's cosines and sines [C, N, 1, d/2] of chunks of so many frames whose first ones have these numbers."""
    rope, sizes = net.rope, [net.rope.t_dim // 2, net.rope.h_dim // 2, net.rope.w_dim // 2]
    numbers, grid = [f + i for f in first for i in range(frames)], (frames, rows, columns, -1)
    out = []
    for table in (rope.freqs_cos, rope.freqs_sin):
        time, row, column = table[:, ::2].float().split(sizes, dim=1)  # each angle stands there twice
        time = time[numbers].unflatten(0, (len(first), frames))[:, :, None, None]
        parts = time, row[:rows, None], column[:columns]
        shape = (len(first), frames, rows, columns, -1)
        out.append(torch.cat([part.expand(shape) for part in parts], -1).flatten(1, 3)[:, :, None])
    return out


def _rotated(x, cos, sin):
    """RoPE of x [B, C, N, heads, d] on neighbouring pairs."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _attend(q, k, v, bias=0.0):
    """Attention of q [B, N, heads, d] to k, v [B, L, heads, d]; bias is added to the logits.

    Written out, since the backward pass of PyTorch's own attention is slow on a CPU where sequences are short.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def plain_block(block, x, e, turns, sees, text, bias, prompt_of):
    """One block of the transformer on tokens x [B, C, N, D]; arguments as in velocity. e [B, C, 6, D]: of time."""
    heads = (block.attn1.heads, -1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + e).unsqueeze(-3).unbind(-2)

    y, attn = block.norm1(x) * (1 + scale) + shift, block.attn1
    q = _rotated(attn.norm_q(attn.to_q(y).float()).unflatten(-1, heads), *turns)
    k = _rotated(attn.norm_k(attn.to_k(y).float()).unflatten(-1, heads), *turns)
    v = attn.to_v(y).unflatten(-1, heads)
    seen = [_attend(q[:, i], *(torch.cat([z[:, j] for j in places], 1) for z in (k, v)))
            for i, places in enumerate(sees)]
    x = x + attn.to_out[0](torch.stack(seen, 1)) * gate

    y, attn = block.norm2(x), block.attn2
    q = attn.norm_q(attn.to_q(y).float()).unflatten(-1, heads)
    k, v = attn.norm_k(attn.to_k(text).float()).unflatten(-1, heads), attn.to_v(text).unflatten(-1, heads)
    of = prompt_of.flatten()
    x = x + attn.to_out[0](_attend(q.flatten(0, 1), k[of], v[of], bias[of]).view(x.shape))

    return x + block.ffn(block.norm3(x) * (1 + ffn_scale) + ffn_shift) * ffn_gate


def velocity(net, x, sigma, states, bias, prompt_of, first, sees, run_block=plain_block):
    """The velocity, noise - clean, of chunks of latent frames, each of which sees some of the others.

    x [B, C, Z, t, h, w]: C chunks of t frames. sigma [B, C]: the noise level that each is told. states [P, L, D] and
    bias [P, 1, 1, L]: of prompts, as embed() makes them. prompt_of [B, C]: the prompt that each chunk reads. first [C]:
    the number of each chunk's first frame. sees [C]: the places of the chunks that each sees, itself among them.
    run_block: plain_block or compiled_block; all blocks have one shape, so it is compiled once.

    The graph of WanTransformer3DModel.forward, on tokens [B, C, N, D] with N = t * h/3 * w/3.
    """
    B, C, Z, t, h, w = x.shape
    _, ph, pw = net.config.patch_size
    rows, columns, embedder = h // ph, w // pw, net.condition_embedder
    patches = x.view(B, C, Z, t, rows, ph, columns, pw).permute(0, 1, 3, 4, 6, 2, 5, 7).flatten(5).flatten(2, 4)
    x = nn.functional.linear(patches, net.patch_embedding.weight.flatten(1), net.patch_embedding.bias).float()
    e0 = embedder.time_embedder(embedder.timesteps_proj(1000 * sigma.flatten())).float().unflatten(0, (B, C))
    e = embedder.time_proj(embedder.act_fn(e0)).float().unflatten(-1, (6, -1))
    text, turns = embedder.text_embedder(states), _turns(net, first, t, rows, columns)
    for block in net.blocks:
        x = run_block(block, x, e, turns, sees, text, bias, prompt_of)
    shift, scale = (net.scale_shift_table + e0.unsqueeze(-2)).unsqueeze(-3).unbind(-2)
    out = net.proj_out(net.norm_out(x) * (1 + scale) + shift)
    return out.view(B, C, t, rows, columns, ph, pw, Z).permute(0, 1, 7, 2, 3, 5, 4, 6).reshape(B, C, Z, t, h, w)


# The same compiled: a step takes three quarters of the time, after 20 seconds of compiling.
compiled_block = torch.compile(plain_block, dynamic=False)
