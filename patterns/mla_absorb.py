"""Latent attention with few queries against many keys: the weights move to the queries and to the result.

Before (``c: T[B, S, R]`` the latents, ``r: T[B, 1, S, P]`` the rotary key, ``q: T[B, H, Sq, N+P]``)::

    kv = permute(reshape(linear(c, W), [B, S, H, N+V]), [0, 2, 1, 3])          # all heads of all past tokens
    k = cat([slice(kv, 3, 0, N), expand(r, [B, H, S, P])], 3)
    y = ascend.flash_attention(q, k, slice(kv, 3, N, N+V), ...)

after::

    W_UK, W_UV = reshape(W, [H, N+V, R])[:, :N], reshape(W, [H, N+V, R])[:, N:]   # views
    q' = cat([q_nope @ W_UK, q_rope], 3)                                          # [B, H, Sq, R+P]
    y' = ascend.flash_attention(q', cat([c, r], 3), c, ...)                       # one key head for all query heads
    y = y' @ W_UV^T

The same bilinear forms, associated otherwise (section 2.1.2 of the DeepSeek-V2 report, arXiv:2405.04434): level 2.

Cost. With L keys, in multiplications per batch and head, expanding takes ``L R (N+V) + Sq L (N+P+V)`` and absorbing
``Sq R (N+V) + Sq L (2R+P)``. Memory agrees: expanding writes and reads H (N+P+V) values per key, absorbing R+P. So
absorbing wins for one query from two keys on and never for a whole prompt (Sq = L). Small products run at the speed
of memory, not of arithmetic, so it is asked to halve the count. Sizes that are not known statically are not guessed.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import ascend, aten, leaks, refuse
from ._mla import LatentAttention, find_latent
from ._mla_parts import HeadWeights
from .attention.cache import cache_notes
from .spellings.mla import SPELLINGS, fuzz_inputs

GAIN = 2  # by which absorbing must divide the number of multiplications


class MlaAbsorb(ProceduralPattern):
    name = "mla_absorb"
    level = 2
    benefit = 8
    c_ulp = 8.0  # what flash_attention, whose products it associates otherwise, grants its kernels
    anchors = (ascend.flash_attention.default,)
    domain = Domain(shapes={"q": ("B", "H", "Sq", "N+P"), "c": ("B", "S", "R"), "r": ("B", "S", "P")})
    eager = SPELLINGS
    emits = frozenset({"aten.matmul"})
    after = frozenset({"sdpa", "eager_attention", "merge_linears"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        found = find_latent(facts, anchor)
        if isinstance(found, NoMatch):
            return found
        heads = found.w_uk.size, found.w_uv.size
        keys = keys_from_which_it_pays(found.queries, *heads, found.latent.shape[3], found.rope.shape[3])
        if keys is None or not facts.known(found.latent.shape[2] >= keys):
            which = f"{found.queries} queries against {found.latent.shape[2]} keys"
            wanted = "few queries against many keys" if keys is None else f"at least {keys} keys"
            return refuse(facts, "cost", anchor, wanted, which, 0.9)
        refusal = leaks(facts, found.nodes, (anchor,), 0.95)
        if refusal is not None:
            return refusal
        pays = f"with {found.queries} queries a head, absorbing pays from {keys} keys on"
        assumes = (pays, *cache_notes(facts, *(rows.tokens for rows in (found.latent, found.rope))))
        return Match(self.name, anchor, found.nodes, {"mla": found}, (anchor,), assumes)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        mla: LatentAttention = m.inputs["mla"]
        latent, rope = mla.latent.emit(b), mla.rope.emit(b)
        q_latent = queries_to_latents(b, mla.query(b, mla.nope), mla.w_uk)
        q = b.op(aten.cat.default, [q_latent, mla.query(b, mla.roped)], 3)
        k = b.op(aten.cat.default, [latent, rope], 3)
        y = b.op(ascend.flash_attention.default, q, k, latent, **mla.attention.kwargs)
        return (latents_to_values(b, y, mla.w_uv),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return fuzz_inputs(rng, dtype, spelling)


def keys_from_which_it_pays(queries: Any, nope: int, value: int, rank: int, rope: int) -> int | None:
    """The number of keys from which absorbing needs at most 1/GAIN of the multiplications.

    ``L E + L Sq A >= GAIN (Sq E + L Sq B)``, with E = R (N+V), A = N+P+V and B = 2R+P, solved for L. None: there is no
    such number, or how many queries there are is not known.
    """
    if not isinstance(queries, int):
        return None
    expand = rank * (nope + value)
    per_key = expand + queries * (nope + rope + value) - GAIN * queries * (2 * rank + rope)
    return -(-GAIN * queries * expand // per_key) if per_key > 0 else None


def queries_to_latents(b: Builder, q: fx.Node, weights: HeadWeights) -> fx.Node:
    """q [B, H, S, N] times the weights [H, N, R] of its head: [B, H, S, R].

    Heads lead, here and below, so that the weights are read where they lie: with batches in front, matmul would copy
    them for each.
    """
    batch, heads, tokens, width = q.meta["val"].shape
    q = b.op(aten.permute.default, q, [1, 0, 2, 3])
    q = b.op(aten.reshape.default, q, [heads, batch * tokens, width])
    q = b.op(aten.matmul.default, q, weights.emit(b))
    q = b.op(aten.reshape.default, q, [heads, batch, tokens, q.meta["val"].shape[2]])
    return b.op(aten.permute.default, q, [1, 0, 2, 3])


def latents_to_values(b: Builder, y: fx.Node, weights: HeadWeights) -> fx.Node:
    """y [B, H, S, R] times the transposed weights [H, V, R] of its head: [B, H, S, V].

    The weights come first: a bfloat16 matmul whose second operand is transposed copies it (four times slower here).
    """
    batch, heads, tokens, rank = y.meta["val"].shape
    y = b.op(aten.permute.default, y, [1, 3, 0, 2])
    y = b.op(aten.reshape.default, y, [heads, rank, batch * tokens])
    y = b.op(aten.matmul.default, weights.emit(b), y)
    y = b.op(aten.reshape.default, y, [heads, weights.size, batch, tokens])
    return b.op(aten.permute.default, y, [2, 0, 3, 1])


PATTERNS = (MlaAbsorb(),)
