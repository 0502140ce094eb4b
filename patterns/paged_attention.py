"""Attention to keys and values that were gathered from pages reads the pages.

Before (``q: T[B, Hq, Sq, D]``, caches ``[blocks, size, Hk, D]``, ``table: int32[B, columns]``, L tokens a sequence)::

    k, v = ascend.kv_gather(k_cache, table, L), ascend.kv_gather(v_cache, table, L)     # int8: with scales, and a cast
    y = ascend.flash_attention(q, k, v, mask=|causal=|window=|softcap=|sinks=)

after: ``y = unpack(ascend.paged_attention(pack(q), k_cache, v_cache, table, [0, Sq, 2 Sq, ...], [L, L, ...], ...))``,
with the boolean mask as ``[B * Sq, L]``. Nothing of the cache is copied any more. Both sides read a negative entry of
the table as a page of zeros. Level 2: the kernel adds up in another order.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arguments, ascend, dtype, refuse
from ._pages import (
    Gathered,
    Lengths,
    gathered,
    one_batch,
    packed,
    packed_mask,
    per_token_mask,
    replaced,
    unpacked,
    visibility,
)


def decode(q, k_cache, v_cache, table):  # type: ignore[no-untyped-def]
    length = table.shape[1] * k_cache.shape[1]
    k, v = (ascend.kv_gather(c, table, length) for c in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def masked(q, k_cache, v_cache, table, mask):  # type: ignore[no-untyped-def]
    k, v = (ascend.kv_gather(c, table, mask.shape[-1]) for c in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def prefill(q, k_cache, v_cache, table):  # type: ignore[no-untyped-def]
    k, v = (ascend.kv_gather(c, table, q.shape[2]) for c in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class PagedAttention(ProceduralPattern):
    name = "paged_attention"
    level = 2
    benefit = 12
    c_ulp = 8.0
    anchors = (ascend.flash_attention.default,)
    domain = Domain()
    eager = (decode, masked, prefill)
    emits = frozenset({"ascend.paged_attention"})
    after = frozenset({"sdpa", "eager_attention"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        call = arguments(anchor)
        found: list[Gathered] = []
        for name in ("k", "v"):
            operand = gathered(facts, call[name])
            if isinstance(operand, NoMatch):
                return operand
            found.append(operand)
        k, v = found
        refusal = one_batch(facts, anchor, k, v)
        if refusal is not None:
            return refusal
        batch, _, queries, _ = facts.val(call["q"]).shape
        keys = facts.val(call["k"]).shape[2]
        causal = visibility(facts, anchor, call, queries, keys)
        if isinstance(causal, NoMatch):
            return causal
        if (k.scale is None) != (v.scale is None) or dtype(facts, k.cache) != dtype(facts, v.cache):
            return refuse(facts, "dtype", anchor, "keys and values stored alike", "one of them quantised", 0.9)
        if call["mask"] is not None:
            refusal = per_token_mask(facts, anchor, call["mask"], (batch, None, queries, keys))
            if refusal is not None:
                return refusal
        nodes = replaced(facts, anchor, found)
        if isinstance(nodes, NoMatch):
            return nodes
        lengths = Lengths.of(facts, batch, queries, keys)
        ready = lengths.ready(anchor)
        inputs = {"call": call, "k": k, "v": v, "causal": causal, "lengths": lengths, "ready": ready}
        inputs["read"] = [
            n for n in (call["q"], call["mask"], call["sinks"], k.cache, v.cache, k.table) if n is not None
        ]
        computed = frozenset(n for n in (*k.nodes, *v.nodes, *ready) if n not in nodes)
        return Match(self.name, anchor, nodes, inputs, (anchor,), computed=computed)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        call, k, v = m.inputs["call"], m.inputs["k"], m.inputs["v"]
        lengths: Lengths = m.inputs["lengths"]
        starts, lens = lengths.emit(b, m.inputs["ready"])
        options: dict[str, Any] = {"scale": call["scale"], "causal": m.inputs["causal"]}
        if call["window"] >= 0:
            options["window"] = call["window"]
        if call["softcap"] > 0:
            options["softcap"] = call["softcap"]
        if call["sinks"] is not None:
            options["sinks"] = call["sinks"]
        if call["mask"] is not None:
            options["mask"] = packed_mask(b, call["mask"], lengths.batch, lengths.queries, lengths.keys)
        if k.scale is not None:
            options |= {"k_scale": k.scale, "v_scale": v.scale}
        q = packed(b, call["q"])
        y = b.op(ascend.paged_attention.default, q, k.cache, v.cache, k.table, starts, lens, **options)
        return (unpacked(b, y, lengths.batch, lengths.queries),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        batch, size, columns, hk = rng.choice([1, 2]), rng.choice([1, 2, 4]), rng.choice([1, 3]), rng.choice([1, 2])
        length = size * columns
        d, queries = rng.choice([2, 8]), length if spelling == 2 else rng.choice([1, min(2, length)])
        blocks = batch * columns + 1
        q = torch.randn(batch, hk * rng.choice([1, 3]), queries, d, dtype=dtype)
        caches = [torch.randn(blocks, size, hk, d, dtype=dtype) for _ in range(2)]
        table = torch.randperm(blocks, dtype=torch.int32)[: batch * columns].reshape(batch, columns)
        if rng.random() < 0.3:
            table[0, 0] = -1
        mask = torch.rand(batch, 1, queries, max(1, length - rng.choice([0, 1]))) < 0.7
        return (q, *caches, table, mask) if spelling == 1 else (q, *caches, table)


PATTERNS = (PagedAttention(),)
