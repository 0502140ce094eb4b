"""A cache that grows by concatenation (DynamicCache) grows in a buffer with room to spare.

Before (``past: T[B, H, S, D]`` an input, ``new: T[B, H, n, D]``)::

    k = cat([past, new], 2)      # all of the cache, for every layer and step; attended to, and returned

after: ``k = ascend.kv_append(past, new)``, which copies the new tokens and, once in a while, the old ones. Also where
only the last tokens of the result are returned (a sliding window). The same values at any level; level 2, for what is
returned lies in memory as [tokens, B, H, D] and may share it with ``past`` (``dialect/kv_append.py`` says what that
asks of callers). ``patterns={"kv_append": False}`` switches it off.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, ascend, aten, dtype, is_call, rank, refuse
from .attention.cache_writers import stores_of, writers_of

REACH = 48  # calls between the tokens and the attention that they are looked for behind


def appended(q, k, v, past_k, past_v):  # type: ignore[no-untyped-def]
    k, v = torch.cat((past_k, k), -2), torch.cat((past_v, v), -2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def sliding(q, k, v, past_k, past_v):  # type: ignore[no-untyped-def]
    k, v = torch.cat((past_k, k), -2), torch.cat((past_v, v), -2)
    return F.scaled_dot_product_attention(q, k, v), k[:, :, 1:], v[:, :, 1:]


class KVAppend(ProceduralPattern):
    name = "kv_append"
    level = 2
    benefit = 6
    anchors = (aten.cat.default,)
    domain = Domain()
    eager = (appended, sliding)
    emits = frozenset({"ascend.kv_append"})
    after = frozenset({"sdpa", "eager_attention", "mla_absorb"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        pieces = arg(anchor, 0)
        if len(pieces) != 2 or arg(anchor, 1) != 2 or rank(facts, anchor) != 4:
            return refuse(facts, "arg", anchor, "cat([past, new]) along the tokens of [B, H, tokens, D]", "another cat")
        past, new = pieces
        if past.op != "placeholder" or facts.is_param(past):
            return refuse(facts, "op", anchor, "old tokens that are an input", f"%{past.name}", 0.2)
        if dtype(facts, past) != dtype(facts, new):
            return refuse(facts, "dtype", anchor, "old and new tokens of one dtype", "two", 0.4)
        if facts.val(past).device != facts.val(new).device:
            return refuse(facts, "arg", anchor, "old and new tokens on one device", "two", 0.4)
        if not any(store.node.op == "output" for store in stores_of(facts, anchor, 2)):
            return refuse(facts, "op", anchor, "a cache that is returned", "one that is forgotten or copied", 0.5)
        writer = next(iter(writers_of(facts, past)), None)
        if writer is not None:
            found = f"a write by %{writer.name}"
            return refuse(facts, "mutation", writer, f"%{past.name} as it came in", found, 0.7)
        if not _attended(anchor):
            return refuse(facts, "op", anchor, "tokens that an attention reads", "none behind", 0.7)
        return Match(self.name, anchor, frozenset((anchor,)), {"past": past, "new": new}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        return (b.op(ascend.kv_append.default, m.inputs["past"], m.inputs["new"]),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, h, s, n, d = (
            rng.choice([1, 2]),
            rng.choice([1, 3]),
            rng.choice([2, 5]),
            rng.choice([1, 2]),
            rng.choice([2, 4]),
        )
        new = (torch.randn(b, h, n, d, dtype=dtype) for _ in range(3))
        return (*new, *(torch.randn(b, h, s, d, dtype=dtype) for _ in range(2)))


def _attended(n: fx.Node) -> bool:
    """True if an attention is found among the next calls behind ``n``."""
    todo, seen = [n], {n}
    while todo and len(seen) < REACH:
        for user in todo.pop(0).users:
            if is_call(user, ascend.flash_attention.default, ascend.mla_attention.default):
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


PATTERNS = (KVAppend(),)
