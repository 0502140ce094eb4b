"""Experts as models write them: the fuzz oracle of ``moe_experts``. Each routes by the top-k of its ``logits``."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

TOP = 2


def route(logits):  # type: ignore[no-untyped-def]
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(TOP, dim=-1)
    return weights, ids


def grouped(x, logits, up, down):  # type: ignore[no-untyped-def]
    """transformers' grouped_mm: tokens sorted by expert, weights rounded to the dtype of x."""
    weights, ids = route(logits)
    k, expert_ids = ids.size(-1), ids.reshape(-1)
    ids_g, perm = torch.sort(expert_ids)
    weights_g = weights.to(x.dtype).reshape(-1)[perm]
    counts = torch.histc(ids_g.float(), bins=up.shape[0], min=0, max=up.shape[0] - 1)
    offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
    h = F.grouped_mm(x[perm // k], up.transpose(-2, -1), offs=offs)
    gate, up_ = h.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up_, down.transpose(-2, -1), offs=offs) * weights_g.unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return y[inverse].view(x.shape[0], k, -1).sum(dim=1).to(x.dtype)


def grouped_index_add(x, logits, up, down):  # type: ignore[no-untyped-def]
    """By hand: argsort, one_hot counts, and the results added where they belong."""
    weights, ids = route(logits)
    perm = ids.flatten().argsort()
    token = perm.div(TOP, rounding_mode="floor")
    offs = F.one_hot(ids, up.shape[0]).sum((0, 1)).cumsum(0).to(torch.int32)
    gate, up_ = F.grouped_mm(x[token], up.mT, offs=offs).chunk(2, -1)
    y = F.grouped_mm(up_ * F.gelu(gate, approximate="tanh"), down.mT, offs=offs)
    y = y * weights.flatten()[perm].unsqueeze(-1)
    return torch.zeros(x.shape, dtype=y.dtype).index_add(0, token, y).to(x.dtype)


def gpt_oss(x, logits, up, down, up_bias, down_bias):  # type: ignore[no-untyped-def]
    """Transposed weights with biases, gate and up in turn, clamped, (up + 1) * gate * sigmoid(alpha * gate)."""
    weights, ids = route(logits)
    k, expert_ids = ids.size(-1), ids.reshape(-1)
    ids_g, perm = torch.sort(expert_ids)
    offs = torch.cumsum(
        torch.histc(ids_g.float(), bins=up.shape[0], min=0, max=up.shape[0] - 1), dim=0, dtype=torch.int32
    )
    h = F.grouped_mm(x[perm // k], up, offs=offs) + up_bias[ids_g]
    gate, up_ = h[..., ::2], h[..., 1::2]
    gate, up_ = gate.clamp(min=None, max=0.7), up_.clamp(min=-0.7, max=0.7)
    y = F.grouped_mm((up_ + 1) * (gate * torch.sigmoid(gate * 1.702)), down, offs=offs) + down_bias[ids_g]
    y = y * weights.to(x.dtype).reshape(-1)[perm].unsqueeze(-1)
    return y[perm.argsort()].view(-1, k, x.shape[-1]).sum(dim=1)


def batched(x, logits, up, down):  # type: ignore[no-untyped-def]
    """transformers' batched_mm: every token with its own copy of its experts' weights."""
    weights, ids = route(logits)
    k, expert_ids = ids.size(-1), ids.reshape(-1)
    h = torch.bmm(up[expert_ids], x.repeat_interleave(k, dim=0).unsqueeze(-1)).squeeze(-1)
    gate, up_ = h.chunk(2, dim=-1)
    y = torch.bmm(down[expert_ids], (F.silu(gate) * up_).unsqueeze(-1)).squeeze(-1)
    y = y * weights.reshape(-1).unsqueeze(-1)
    return y.view(x.shape[0], k, -1).sum(dim=1).to(x.dtype)


def batched_transposed(x, logits, up, down, up_bias, down_bias):  # type: ignore[no-untyped-def]
    weights, ids = route(logits)
    k, expert_ids = ids.size(-1), ids.reshape(-1)
    h = torch.bmm(x.repeat_interleave(k, dim=0).unsqueeze(1), up[expert_ids]).squeeze(1) + up_bias[expert_ids]
    gate, up_ = h.chunk(2, dim=-1)
    y = torch.bmm((F.relu(gate) * up_).unsqueeze(1), down[expert_ids]).squeeze(1) + down_bias[expert_ids]
    return (y.view(x.shape[0], k, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(dim=1)


def many(x, logits, up, down):  # type: ignore[no-untyped-def]
    """The weights gathered as [tokens, k, ...], as in gpt-fast."""
    weights, ids = route(logits)
    gate, up_ = (up[ids] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)
    y = (down[ids] @ (F.silu(gate) * up_).unsqueeze(-1)).squeeze(-1)
    return (y * weights.to(x.dtype).unsqueeze(-1)).sum(1)


SPELLINGS = (grouped, grouped_index_add, gpt_oss, batched, batched_transposed, many)


def fuzz_inputs(rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
    """x [T, H], logits [T, E], the weights of E experts, and biases; sizes that ``grouped_mm`` takes."""
    fn = SPELLINGS[spelling]
    tokens, experts, wide, inner = rng.choice([2, 3, 6]), rng.choice([3, 5]), rng.choice([8, 16]), rng.choice([8, 24])
    x = torch.randn(tokens, wide, dtype=dtype)
    logits = torch.stack([torch.randperm(experts) for _ in range(tokens)]).to(dtype) / 2
    up, down = torch.randn(experts, 2 * inner, wide) * 0.3, torch.randn(experts, wide, inner) * 0.3
    transposed = fn in (gpt_oss, batched_transposed)
    up, down = (w.mT.contiguous().to(dtype) if transposed else w.to(dtype) for w in (up, down))
    if not transposed:
        return x, logits, up, down
    biases = torch.randn(experts, 2 * inner) * 0.3, torch.randn(experts, wide) * 0.3
    return (x, logits, up, down, *(b.to(dtype) for b in biases))
