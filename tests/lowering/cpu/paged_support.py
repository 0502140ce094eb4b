"""Attention over random pages, and what it must be: plain softmax over dense keys in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from cpu_support import assert_in_budget, ops
from hypothesis import settings
from torch import Tensor

ULPS = {torch.float32: 8.0, torch.bfloat16: 2.0, torch.float16: 2.0, torch.float64: 1.0}


def examples(n: int) -> int:
    """Of random cases: n, and in proportion more where the profile asks for more than usual (make soak)."""
    return n * int(settings.default.max_examples) // 50  # type: ignore[union-attr]


def dense(cache: Tensor, pages: list[int], length: int, scale: Tensor | None = None) -> Tensor:
    """[length, H, D] in float64, page by page."""
    size = cache.shape[1]
    rows = torch.zeros(length, *cache.shape[2:], dtype=torch.float64)
    for i, page in enumerate(pages[: -(-length // size)]):
        if page >= 0:
            count = min(size, length - i * size)
            x = cache[page, :count].double()
            rows[i * size : i * size + count] = x if scale is None else x * scale[page, :count].double().unsqueeze(-1)
    return rows


def visible(queries: int, keys: int, causal: bool, window: int, mask: Tensor | None) -> Tensor:
    p = torch.arange(keys - queries, keys).unsqueeze(-1)
    j = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool) if mask is None else mask[:, :keys].clone()
    if causal:
        seen &= j <= p
    if window >= 0:
        seen &= j > p - window
    return seen


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Any
) -> Tensor:
    """q [S,Hq,D], k and v [L,Hk,D] in float64, seen [S,L] -> [S,Hq,Dv]; 0 where nothing is seen."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("shd,lhd->hsl", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, scores.shape[1], 1)), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0) if not scores.isnan().any() else torch.softmax(scores, -1)
    weights = weights[..., : k.shape[0]].masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return torch.einsum("hsl,lhd->shd", weights, v)


@dataclass
class Case:
    """Arguments of one call: pages in shuffled order, some shared by two sequences, some never stored."""

    q: Tensor
    caches: tuple[Tensor, ...]
    table: Tensor
    starts: Tensor
    lengths: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    q_rope: Tensor | None = None  # latent attention: caches are latents and rotary keys

    @property
    def queries(self) -> tuple[Tensor, ...]:
        return (self.q,) if self.q_rope is None else (self.q, self.q_rope)

    @property
    def name(self) -> str:
        return "paged_attention" if self.q_rope is None else "mla_attention"

    def __call__(self, op: Any = None) -> Tensor:
        where = (self.table, self.starts, self.lengths)
        return (op or getattr(ops, self.name))(*self.queries, *self.caches, *where, **self.options)

    def exact(self) -> Tensor:
        o = self.options
        first, second = self.caches
        y = torch.zeros(*self.q.shape[:2], (second if self.q_rope is None else first).shape[-1], dtype=torch.float64)
        for b, length in enumerate(self.lengths.tolist()):
            begin, end = int(self.starts[b]), int(self.starts[b + 1])
            if begin == end or not length:
                continue
            pages = self.table[b].tolist()
            q = torch.cat([t[begin:end].double() for t in self.queries], -1)
            if self.q_rope is None:
                k, v = (dense(c, pages, length, o.get(s)) for c, s in ((first, "k_scale"), (second, "v_scale")))
            else:
                v = dense(first, pages, length).unsqueeze(1)
                k = torch.cat((v, dense(second, pages, length).unsqueeze(1)), -1)
            mask = o["mask"][begin:end] if o.get("mask") is not None else None
            seen = visible(end - begin, length, o.get("causal", True), o.get("window", -1), mask)
            y[begin:end] = softmax_attention(q, k, v, seen, o["scale"], o.get("softcap", 0.0), o.get("sinks"))
        return y

    def check(self, op: Any = None) -> Tensor:
        """The result, after it was found within the rounding budget of a row."""
        got = self(op)
        values = self.caches[1 if self.q_rope is None else 0]
        size = values.double().abs()
        if "v_scale" in self.options:
            size = size * self.options["v_scale"].double().abs().unsqueeze(-1)
        eager = self(getattr(torch.ops.ascend, self.name))
        top = size.nan_to_num(0.0, 0.0, 0.0).amax() if size.numel() else torch.zeros(())
        assert_in_budget(got, eager, self.exact(), top, ULPS[self.q.dtype])
        assert got.is_contiguous()
        return got


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and scales of [blocks, size, H, D]."""
    scale = x.abs().amax(-1) / 127
    return torch.round(x / scale.unsqueeze(-1)).to(torch.int8), scale


def build(
    seed: int,
    sequences: list[tuple[int, int]],
    *,
    size: int,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    padding: int = 0,
    holes: bool = False,
    shared: bool = False,
    masked: bool = False,
    sinks: bool = False,
    latent: bool = False,
    **options: Any,
) -> Case:
    """Sequences of (queries, keys); unused slots and pages hold NaN, unused table entries anything."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    (hq, hk), (d, dv) = heads, dims
    cache_dtype = cache_dtype or dtype
    need = [-(-keys // size) for _, keys in sequences]
    blocks = sum(need) + 3
    free = torch.randperm(blocks, generator=g).tolist()
    table = torch.randint(-5, 2**31 - 1, (len(sequences), max(need, default=0) + 2), generator=g, dtype=torch.int32)
    used = torch.zeros(blocks, size, dtype=torch.bool)
    for b, (_, keys) in enumerate(sequences):
        for i in range(need[b]):
            give = shared and b and i < need[b - 1] and i < need[b] - 1 and (i + 1) * size <= sequences[b - 1][1]
            page = int(table[b - 1, i]) if give else free.pop()
            table[b, i] = page
            used[page, : min(size, keys - i * size)] = True
        if holes:
            hidden = torch.rand(need[b], generator=g) < 0.3
            table[b, : need[b]][hidden] = -1
    starts = torch.tensor([0, *torch.tensor([n for n, _ in sequences]).cumsum(0).tolist()], dtype=torch.int32)
    tokens, lengths = int(starts[-1]) + padding, torch.tensor([n for _, n in sequences], dtype=torch.int32)
    options = {"scale": (d + (dv if latent else 0)) ** -0.5, **options}
    shapes = ((blocks, size, d), (blocks, size, dv)) if latent else ((blocks, size, hk, d), (blocks, size, hk, dv))
    caches = []
    for name, shape in zip("kv", shapes, strict=True):
        x = draw(*shape)
        if cache_dtype is torch.int8:
            x, scale = quantised(x)
            options[f"{name}_scale"] = scale.masked_fill(~used.unsqueeze(-1), math.nan)
        else:
            x = x.to(cache_dtype).masked_fill(~used.view(*used.shape, *[1] * (x.dim() - 2)), math.nan)
        caches.append(x)
    if masked:
        options["mask"] = torch.rand(tokens, max((n for _, n in sequences), default=0) + 3, generator=g) < 0.7
    if sinks:
        options["sinks"] = draw(hq)
    q = draw(tokens, hq, d).to(dtype)
    return Case(q, tuple(caches), table, starts, lengths, options, draw(tokens, hq, dv).to(dtype) if latent else None)
