"""Plain attention as people write it: the fuzz oracle of ``eager_attention``, and inputs for it."""

from __future__ import annotations

import math
import random
from typing import Any

import torch


def repeat_kv(x, n):  # type: ignore[no-untyped-def]
    b, h, s, d = x.shape
    return x if n == 1 else x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def transformers_eager(q, k, v, mask):  # type: ignore[no-untyped-def]
    n = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, n), repeat_kv(v, n)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.3 + mask
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def divided_mask_first(q, k, v, mask):  # type: ignore[no-untyped-def]
    scores = mask + (q @ k.mT) / math.sqrt(q.shape[-1])
    return scores.softmax(-1).type_as(v) @ v


def softcapped(q, k, v, mask):  # type: ignore[no-untyped-def]
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5
    scores = torch.tanh(scores / 3.0) * 3.0 + mask
    return torch.matmul(torch.softmax(scores.float(), dim=-1).to(v.dtype), v)


def two_biases(q, k, v, mask, position):  # type: ignore[no-untyped-def]
    scores = torch.matmul(q, k.transpose(3, 2)) + position
    scores = scores + mask
    return torch.matmul(torch.softmax(scores.float(), dim=-1).type_as(scores), v)


def filled(q, k, v, hide):  # type: ignore[no-untyped-def]
    scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(hide, -math.inf)
    return scores.softmax(dim=-1) @ v


def chosen(q, k, v, keep):  # type: ignore[no-untyped-def]
    scores = q @ k.transpose(-1, -2) * 0.4
    scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def three_axes(q, k, v):  # type: ignore[no-untyped-def]
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.2, dim=-1), v)


def upcast_queries(q, k, v):  # type: ignore[no-untyped-def]
    weights = torch.softmax(q.float() @ k.float().transpose(-1, -2) * 0.3, dim=-1)
    return weights.to(v.dtype) @ v


SPELLINGS = (
    transformers_eager,
    divided_mask_first,
    softcapped,
    two_biases,
    filled,
    chosen,
    three_axes,
    upcast_queries,
)


def fuzz_inputs(rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
    """q, k, v and the masks of one spelling, with hidden keys and sometimes a row that sees none."""
    b, sq, sk, d = rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([1, 4, 6]), rng.choice([2, 8])
    hk = rng.choice([1, 2])
    hq = hk * rng.choice([1, 3]) if spelling == 0 else hk
    q, k = torch.randn(b, hq, sq, d, dtype=dtype), torch.randn(b, hk, sk, d, dtype=dtype)
    v = torch.randn(b, hk, sk, rng.choice([2, d]), dtype=dtype)
    if spelling == 6:
        return q[:, 0], k[:, 0], v[:, 0]
    if spelling == 7:
        return q, k, v
    hide = torch.rand(b, rng.choice([1, hq]), sq, sk) < 0.3
    if spelling == 4:
        return q, k, v, hide
    if spelling == 5:
        return q, k, v, ~hide
    # finfo.min in float16 is absorbed by no score, so a fully masked row is not the mean there: keep one key visible
    fill = rng.choice([-math.inf, torch.finfo(dtype).min]) if dtype != torch.float16 else -math.inf
    mask = torch.zeros(hide.shape, dtype=dtype).masked_fill(hide, fill)
    if spelling == 3:
        return q, k, v, mask, torch.randn(1, hq, sq, sk, dtype=dtype)
    return q, k, v, mask


__all__ = ["SPELLINGS", "fuzz_inputs", "repeat_kv"]
