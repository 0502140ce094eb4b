"""Loops over experts as models write them: the fuzz oracle of ``moe_loop``. Each routes by the top-k of ``logits``."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from .experts import TOP, route

EXPERTS = 3


def masked_weights(x, logits, *own):  # type: ignore[no-untyped-def]
    """Linears of the experts' own; a token's weight is the sum over its slots that name the expert."""
    weights, ids = route(logits)
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        gate, up, down = own[3 * e : 3 * e + 3]
        share = (weights * (ids == e)).sum(-1, keepdim=True).to(x.dtype)
        y += F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) * share
    return y


def scattered_weights(x, logits, *own):  # type: ignore[no-untyped-def]
    """Columns of a scattered matrix; gate and up in one linear, with biases."""
    weights, ids = route(logits)
    matrix = torch.zeros_like(logits).scatter_(1, ids, weights.to(logits.dtype))
    total = 0
    for e in range(EXPERTS):
        w_up, w_down, b_up, b_down = own[4 * e : 4 * e + 4]
        gate, up = F.linear(x, w_up, b_up).chunk(2, -1)
        total = total + matrix[:, e, None] * F.linear(up * F.gelu(gate), w_down, b_down)
    return total


def batched_where(x, logits, up, down):  # type: ignore[no-untyped-def]
    """One parameter of all experts, applied from the right."""
    weights, ids = route(logits)
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        gate, up_ = (x @ up[e]).chunk(2, -1)
        share = torch.where(ids == e, weights, 0).sum(-1)
        y += (((F.silu(gate) * up_) @ down[e]) * share[:, None]).to(x.dtype)
    return y


def batched_one_hot(x, logits, up, down, up_bias, down_bias):  # type: ignore[no-untyped-def]
    weights, ids = route(logits)
    matrix = (F.one_hot(ids, EXPERTS) * weights.unsqueeze(-1)).sum(1)
    y = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(EXPERTS):
        gate, up_ = F.linear(x, up[e], up_bias[e]).chunk(2, -1)
        y = y + F.linear(F.relu(gate) * up_, down[e], down_bias[e]) * matrix[:, e : e + 1]
    return y.to(x.dtype)


SPELLINGS = (masked_weights, scattered_weights, batched_where, batched_one_hot)


def fuzz_inputs(rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
    """x [T, H], logits [T, E], and the weights of E experts, separate or batched as the spelling wants them."""
    fn = SPELLINGS[spelling]
    tokens, wide, inner = rng.choice([1, 3, 6]), rng.choice([4, 8]), rng.choice([2, 6])
    x = torch.randn(tokens, wide, dtype=dtype)
    logits = torch.stack([torch.randperm(EXPERTS) for _ in range(tokens)]).to(dtype) / TOP

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.4).to(dtype)

    def each(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [draw(*shape) for _ in range(EXPERTS) for shape in shapes]

    if fn is masked_weights:
        return (x, logits, *each((inner, wide), (inner, wide), (wide, inner)))
    if fn is scattered_weights:
        return (x, logits, *each((2 * inner, wide), (wide, inner), (2 * inner,), (wide,)))
    if fn is batched_where:
        return x, logits, draw(EXPERTS, wide, 2 * inner), draw(EXPERTS, inner, wide)
    up, down = draw(EXPERTS, 2 * inner, wide), draw(EXPERTS, wide, inner)
    return x, logits, up, down, draw(EXPERTS, 2 * inner), draw(EXPERTS, wide)
