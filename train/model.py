"""The text encoder and the video transformer: UMT5EncoderModel of transformers and WanTransformer3DModel of diffusers.

Both are small.  Two things differ from how diffusers runs them, and neither changes a result:

- Attention is written as plain matrix products, because PyTorch's fused attention is very slow backwards on a CPU.
- Wan attends to all 512 text positions, of which all but the prompt's are zeros.  Zeros have equal keys and values, so
  one of them with its logit raised by log(count) stands for all; twenty times less work for the prompts of this world.
"""
import math

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


class MatmulAttention:
    """Attention processor of WanAttention. text_bias [B, 1, 1, L] is added to the logits of cross-attention, if any."""

    text_bias = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        """hidden_states [B, N, C] -> [B, N, C], by attention to encoder_hidden_states [B, L, C] or, if None, to itself.

        rotary_emb: (cos, sin), each [1, N, 1, C / heads], for self-attention. attention_mask: unused, as in diffusers.
        """
        is_self = encoder_hidden_states is None
        context = hidden_states if is_self else encoder_hidden_states
        heads = (attn.heads, -1)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        k = attn.norm_k(attn.to_k(context)).unflatten(2, heads)
        v = attn.to_v(context).unflatten(2, heads).transpose(1, 2)
        if rotary_emb is not None:
            q, k = (_rotate(x, *rotary_emb) for x in (q, k))
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        if not is_self and self.text_bias is not None:
            logits = logits + self.text_bias
        out = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def _rotate(x, cos, sin):
    """RoPE of x [B, N, heads, D] on neighbouring pairs."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2].float(), sin[..., 1::2].float()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def new_transformer():
    """A WanTransformer3DModel with MatmulAttention, initialised so that every part is heard from the first step."""
    model = WanTransformer3DModel(**TRANSFORMER)
    model.set_attn_processor(MatmulAttention())
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


def velocity(transformer, x, sigma, states, bias):
    """The transformer's velocity, noise - clean, at latents x [B, Z, T, h, w] of noise level sigma [B]."""
    for block in transformer.blocks:
        block.attn2.processor.text_bias = bias
    return transformer(x, 1000 * sigma, states, return_dict=False)[0]


def pad(ids_list, length):
    """Lists of ids, none longer than `length` -> (ids, mask) [B, length] int64, padded with <pad> 0."""
    ids = torch.zeros(len(ids_list), length, dtype=torch.long)
    mask = torch.zeros(len(ids_list), length, dtype=torch.long)
    for row, x in enumerate(ids_list):
        ids[row, :len(x)] = torch.tensor(x)
        mask[row, :len(x)] = 1
    return ids, mask
