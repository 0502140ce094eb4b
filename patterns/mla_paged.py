"""Latent attention whose latents live in pages reads the pages.

Before (``q: T[B, H, Sq, N+P]``, caches ``[blocks, size, 1, R]`` and ``[.., 1, P]``, L tokens a sequence)::

    c, r = ascend.kv_gather(ckv_cache, table, L), ascend.kv_gather(rope_cache, table, L)
    k, v = [c @ W_UK | r expanded to the heads], c @ W_UV                     # for all heads and past tokens
    y = ascend.flash_attention(q, k, v, ...)

after: ``y = (ascend.mla_attention(q_nope @ W_UK, q_rope, ckv_cache, rope_cache, table, ...)) @ W_UV``: neither are
latents gathered, nor keys and values made of them. Where that pays is where absorbing pays (``mla_absorb``). Level 2.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, arguments, ascend, aten, is_call, leaks, refuse
from ._mla import LatentAttention, find_latent
from ._mla_parts import Rows
from ._pages import Gathered, Lengths, gathered, one_batch, packed, packed_mask, per_token_mask, unpacked, visibility
from .mla_absorb import keys_from_which_it_pays, latents_to_values, queries_to_latents
from .spellings import mla as spelled


def decode(q, c_cache, r_cache, table, w):  # type: ignore[no-untyped-def]
    length = table.shape[1] * c_cache.shape[1]
    c, r = (ascend.kv_gather(cache, table, length).squeeze(1) for cache in (c_cache, r_cache))
    return spelled.written(q, c, r, w)


def masked(q, c_cache, r_cache, table, w, keep):  # type: ignore[no-untyped-def]
    c, r = (ascend.kv_gather(cache, table, keep.shape[-1]).squeeze(1) for cache in (c_cache, r_cache))
    return spelled.flat_masked(q, c, r, w, keep)


class MlaPaged(ProceduralPattern):
    name = "mla_paged"
    level = 2
    benefit = 9
    c_ulp = 8.0
    anchors = (ascend.flash_attention.default,)
    domain = Domain()
    eager = (decode, masked)
    emits = frozenset({"ascend.mla_attention"})
    before = frozenset({"mla_absorb"})
    after = frozenset({"sdpa", "eager_attention", "merge_linears"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        found = find_latent(facts, anchor)
        if isinstance(found, NoMatch):
            return found
        pages: list[Gathered] = []
        for rows in (found.latent, found.rope):
            side = _paged(facts, anchor, rows)
            if isinstance(side, NoMatch):
                return side
            pages.append(side)
        latent, rope = pages
        call = arguments(anchor)
        batch, _, queries, _ = facts.val(call["q"]).shape
        keys = found.latent.shape[2]
        refusal = one_batch(facts, anchor, latent, rope) or _plain(facts, anchor, call)
        if refusal is None and call["mask"] is not None:
            refusal = per_token_mask(facts, anchor, call["mask"], (batch, None, queries, keys))
        if refusal is not None:
            return refusal
        causal = visibility(facts, anchor, call, queries, keys)
        if isinstance(causal, NoMatch):
            return causal
        sizes = found.w_uk.size, found.w_uv.size, found.latent.shape[3], found.rope.shape[3]
        pays = keys_from_which_it_pays(queries, *sizes)
        if pays is None or not (facts.known(keys >= pays) or _decodes(facts, queries, keys, pays)):
            wanted = "few queries against many keys" if pays is None else f"at least {pays} keys"
            return refuse(facts, "cost", anchor, wanted, f"{queries} queries against {keys} keys", 0.95)
        refusal = leaks(facts, found.nodes, (anchor,), 0.95)
        if refusal is not None:
            return refusal
        lengths = Lengths.of(facts, batch, queries, keys)
        ready = lengths.ready(anchor)
        inputs = {"mla": found, "call": call, "latent": latent, "rope": rope, "causal": causal}
        inputs |= {"lengths": lengths, "ready": ready}
        inputs["read"] = [n for n in (found.q, call["mask"], latent.cache, rope.cache, latent.table) if n is not None]
        computed = frozenset(n for n in (*latent.nodes, *rope.nodes, *ready) if n not in found.nodes)
        return Match(self.name, anchor, found.nodes, inputs, (anchor,), computed=computed)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        mla: LatentAttention = m.inputs["mla"]
        lengths: Lengths = m.inputs["lengths"]
        call, latent, rope = m.inputs["call"], m.inputs["latent"], m.inputs["rope"]
        starts, lens = lengths.emit(b, m.inputs["ready"])
        options: dict[str, Any] = {"scale": call["scale"], "causal": m.inputs["causal"]}
        if call["mask"] is not None:
            options["mask"] = packed_mask(b, call["mask"], lengths.batch, lengths.queries, lengths.keys)
        q_latent = packed(b, queries_to_latents(b, mla.query(b, mla.nope), mla.w_uk))
        q_rope = packed(b, mla.query(b, mla.roped))
        caches = [_one_head(b, g.cache) for g in (latent, rope)]
        y = b.op(ascend.mla_attention.default, q_latent, q_rope, *caches, latent.table, starts, lens, **options)
        return (latents_to_values(b, unpacked(b, y, lengths.batch, lengths.queries), mla.w_uv),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        q, c, r, w, *keep = spelled.fuzz_inputs(rng, dtype, 2 * spelling)
        batch, length = c.shape[:2]
        size = rng.choice([1, 2, 4]) if spelling else 1
        columns = -(-length // size)
        blocks = batch * columns + 1
        table = torch.randperm(blocks, dtype=torch.int32)[: batch * columns].reshape(batch, columns)
        caches = [torch.randn(blocks, size, 1, x.shape[2], dtype=dtype) for x in (c, r)]
        return (q, *caches, table, w, *keep)


def _paged(facts: Facts, anchor: fx.Node, rows: Rows) -> Gathered | NoMatch:
    """Rows per token that are gathered from pages of one head; reshapes in between only regroup batch and token."""
    n, between = rows.node, []
    while is_call(n, aten.reshape.default) and list(rows.dims) == sorted(rows.dims):
        between.append(n)
        n = arg(n, 0)
    found = gathered(facts, n)
    if isinstance(found, NoMatch):
        return found
    sizes = zip(facts.val(n).shape, rows.shape, strict=False)
    if list(rows.dims) != sorted(rows.dims) or not all(facts.known(a == b) for a, b in sizes):
        return refuse(facts, "shape", anchor, "one latent per token in the pages", f"{rows.shape}", 0.7)
    if found.scale is not None or len(found.nodes) > 1:
        return refuse(facts, "dtype", anchor, "latents stored as they are used", "quantised or cast ones", 0.8)
    return replace(found, nodes=(*between, *found.nodes))


def _decodes(facts: Facts, queries: Any, keys: Any, pays: int) -> bool:
    """One query against nobody knows how many keys: a matter of cost only, and a cache is seldom all but empty."""
    return isinstance(queries, int) and queries == 1 and not facts.known(keys < pays)


def _plain(facts: Facts, anchor: fx.Node, call: dict[str, Any]) -> NoMatch | None:
    for name, without in (("window", -1), ("softcap", 0.0), ("sinks", None)):
        if call[name] != without:
            return refuse(facts, "arg", anchor, f"latent attention without {name}", f"{name}={call[name]}", 0.8)
    return None


def _one_head(b: Builder, cache: fx.Node) -> fx.Node:
    """[blocks, size, 1, C] as [blocks, size, C]."""
    blocks, size, _, width = cache.meta["val"].shape
    return b.op(aten.reshape.default, cache, [blocks, size, width])


PATTERNS = (MlaPaged(),)
