"""Routers as models write them: the fuzz oracle of ``moe_gate``. Each returns (weights, ids)."""

from __future__ import annotations

import random
from typing import Any

import torch

GROUPS, KEPT, TOP = 4, 2, 3


def mixtral(logits):  # type: ignore[no-untyped-def]
    weights, ids = torch.topk(torch.softmax(logits.float(), dim=-1), TOP, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def qwen(logits):  # type: ignore[no-untyped-def]
    weights, ids = torch.topk(torch.softmax(logits, dtype=torch.float, dim=-1), TOP, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def olmoe(logits):  # type: ignore[no-untyped-def]
    weights, ids = torch.topk(torch.softmax(logits, dtype=torch.float, dim=-1), TOP, dim=-1)
    return weights.to(logits.dtype), ids


def gpt_oss(logits):  # type: ignore[no-untyped-def]
    weights, ids = torch.topk(logits, TOP, dim=-1)
    return torch.softmax(weights, dim=1, dtype=weights.dtype), ids


def topk_then_wide_softmax(logits):  # type: ignore[no-untyped-def]
    weights, ids = logits.topk(TOP)
    return weights.float().softmax(-1).type_as(logits), ids


def sigmoid_greedy(logits):  # type: ignore[no-untyped-def]
    scores = logits.float().sigmoid()
    weights, ids = scores.topk(TOP, dim=-1)
    return weights / (weights.sum(-1, keepdim=True) + 1e-9), ids


def deepseek_v2(logits):  # type: ignore[no-untyped-def]
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    size = scores.shape[-1] // GROUPS
    group_scores = scores.view(-1, GROUPS, size).max(dim=-1).values
    group_idx = torch.topk(group_scores, k=KEPT, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(-1, GROUPS, size).reshape(-1, scores.shape[-1])
    scores = scores.masked_fill(~score_mask.bool(), 0.0)
    weights, ids = torch.topk(scores, k=TOP, dim=-1, sorted=False)
    return weights * 16.0, ids


def deepseek_v3(logits, bias):  # type: ignore[no-untyped-def]
    scores = logits.float().sigmoid()
    choice = scores + bias
    size = scores.shape[-1] // GROUPS
    group_scores = choice.view(-1, GROUPS, size).topk(2, dim=-1)[0].sum(dim=-1)
    group_idx = torch.topk(group_scores, k=KEPT, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(-1, GROUPS, size).reshape(-1, scores.shape[-1])
    choice = choice.masked_fill(~score_mask.bool(), float("-inf"))
    ids = torch.topk(choice, k=TOP, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


def glm4_moe(logits, bias):  # type: ignore[no-untyped-def]
    scores = logits.float().sigmoid()
    choice = scores + bias
    worth = choice.view(-1, 1, scores.shape[-1]).topk(2, dim=-1)[0].sum(dim=-1)
    best = torch.topk(worth, k=1, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(worth).scatter_(1, best, 1)
    mask = mask.unsqueeze(-1).expand(-1, 1, scores.shape[-1]).reshape(-1, scores.shape[-1])
    ids = torch.topk(choice.masked_fill(~mask.bool(), float("-inf")), k=TOP, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20), ids


def grouped_boolean(logits, bias):  # type: ignore[no-untyped-def]
    scores = torch.sigmoid(logits.float())
    choice = (scores + bias).unflatten(-1, (GROUPS, -1))
    best = choice.topk(2, dim=-1).values.sum(-1).topk(KEPT, dim=-1).indices
    allowed = torch.zeros(choice.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
    ids = torch.where(allowed.unsqueeze(-1), choice, -torch.inf).flatten(-2).topk(TOP, dim=-1).indices
    return scores.gather(-1, ids), ids


SPELLINGS = (
    mixtral,
    qwen,
    olmoe,
    gpt_oss,
    topk_then_wide_softmax,
    sigmoid_greedy,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    grouped_boolean,
)


def fuzz_inputs(rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
    """Logits [T, E] without ties, also after rounding, and the correction bias [E] of those that have one."""
    tokens, experts = rng.choice([1, 3, 7]), rng.choice([8, 16])
    logits = torch.stack([torch.randperm(experts) for _ in range(tokens)]).to(dtype) / 4 - 1
    if SPELLINGS[spelling] in (deepseek_v3, glm4_moe, grouped_boolean):
        return logits, torch.randperm(experts).to(torch.float32 if dtype != torch.float64 else dtype) / 100
    return (logits,)
