"""Latent attention as models write it: the fuzz oracle of ``mla_absorb``, and inputs for it.

``q`` [B, H, Sq, N+P] queries, ``c`` [B, S, R] latents, ``r`` [B, S, P] rotary keys, ``w`` [H*(N+V), R]; N is 8, V is 6.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

N, V = 8, 6


def written(q, c, r, w):  # type: ignore[no-untyped-def]
    """transformers 5: latents with a head axis, keys written into a new tensor."""
    c, r = c.unsqueeze(1), r.unsqueeze(1)
    kv = F.linear(c, w).view(c.shape[0], c.shape[2], -1, N + V).transpose(1, 2)
    k_nope, v = torch.split(kv, [N, V], dim=-1)
    k = kv.new_empty(*kv.shape[:-1], N + r.shape[-1])
    k[..., :N].copy_(k_nope)
    k[..., N:].copy_(r.expand(-1, k_nope.shape[1], -1, -1))
    return F.scaled_dot_product_attention(q, k, v, scale=0.4)


def joined_bias(q, c, r, w, bias):  # type: ignore[no-untyped-def]
    """DeepSeek's own: three axes, keys joined, the rotary key in front, a plain softmax."""
    b, s, _ = c.shape
    kv = F.linear(c, w).view(b, s, q.shape[1], N + V).transpose(1, 2)
    k_nope, v = kv[..., :N], kv[..., N:]
    k = torch.cat((r.view(b, s, 1, -1).transpose(1, 2).expand(-1, q.shape[1], -1, -1), k_nope), dim=-1)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + bias
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype), v)


def flat_masked(q, c, r, w, keep):  # type: ignore[no-untyped-def]
    """Tokens in one axis, keys and values from two rows of one weight, heads behind tokens until the end."""
    b, s, _ = c.shape
    h = q.shape[1]
    kv = F.linear(c.reshape(b * s, -1), w)
    k_nope = kv[:, : h * N].reshape(b, s, h, N)
    v = kv[:, h * N :].reshape(b, s, h, V).transpose(1, 2)
    k = torch.cat((k_nope, r[:, :, None].expand(b, s, h, r.shape[-1])), dim=-1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def two_weights(q, c, r, w, w_v):  # type: ignore[no-untyped-def]
    """Keys and values by two linears of the same latents."""
    b, s, _ = c.shape
    h = q.shape[1]
    k_nope = F.linear(c, w).view(b, s, h, N).transpose(1, 2)
    v = F.linear(c, w_v).view(b, s, h, V).transpose(1, 2)
    k = torch.cat((k_nope, r.unsqueeze(1).expand(b, h, s, r.shape[-1])), dim=-1)
    return F.scaled_dot_product_attention(q, k, v)


SPELLINGS = (written, joined_bias, flat_masked, two_weights)


def fuzz_inputs(rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
    """Arguments for ``SPELLINGS[spelling]``: one or two queries against many keys."""
    b, h, sq, s = rng.choice([1, 2]), rng.choice([2, 3]), rng.choice([1, 1, 2]), rng.choice([8, 13])
    rank, rope = rng.choice([8, 16]), rng.choice([2, 4])
    fn = SPELLINGS[spelling]
    rows = h * (N if fn is two_weights else N + V)
    q, c = torch.randn(b, h, sq, N + rope, dtype=dtype), torch.randn(b, s, rank, dtype=dtype)
    r, w = torch.randn(b, s, rope, dtype=dtype), torch.randn(rows, rank, dtype=dtype) / rank**0.5
    if fn is joined_bias:
        return q, c, r, w, torch.randn(b, 1, sq, s, dtype=dtype)
    if fn is flat_masked:
        return q, c, r, w, torch.rand(b, 1, sq, s) < 0.7
    return (q, c, r, w, torch.randn(h * V, rank, dtype=dtype)) if fn is two_weights else (q, c, r, w)
