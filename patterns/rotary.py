"""Rotary embedding spelled with ``rotate_half`` or ``rotate_every_two`` -> ``ascend.rotary``.

Before, half layout (Llama, ``x: T[B, N, S, D]``, ``cos, sin: T[B, 1, S, D]`` or anything that broadcasts to ``x``)::

    x1, x2 = slice(x, 3, 0, D/2), slice(x, 3, D/2, D)
    y = x * cos + cat([-x2, x1], 3) * sin

before, interleaved layout (GPT-J)::

    x1, x2 = slice(x, 3, 0, D, 2), slice(x, 3, 1, D, 2)
    y = x * cos + reshape(cat([-x2, x1] each with a last axis of 1, 4), [B, N, S, D]) * sin

after: ``y = ascend.rotary(x, cos, sin, interleaved=...)``. Two products and a sum, as before: bit exact. Every part is
checked: the order and sign of the halves, where they are cut, the step of a slice, and that all come from one ``x``.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arguments, ascend, aten, commuted, is_call, leaks, refuse
from ._rotary import broadcast_table, members, negated, stacked_pair
from ._window import Window, window


def _rotate_half(x):  # type: ignore[no-untyped-def]
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _rotate_every_two(x):  # type: ignore[no-untyped-def]
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def half(x, cos, sin):  # type: ignore[no-untyped-def]
    return (x * cos.unsqueeze(1)) + (_rotate_half(x) * sin.unsqueeze(1))


def half_chunks(x, cos, sin):  # type: ignore[no-untyped-def]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1) + x * cos.unsqueeze(1)


def every_two(x, cos, sin):  # type: ignore[no-untyped-def]
    return (x * cos.unsqueeze(1)) + (_rotate_every_two(x) * sin.unsqueeze(1))


class Rotary(ProceduralPattern):
    name = "rotary"
    level = 1
    benefit = 4
    anchors = (aten.add.Tensor,)
    reads = (aten.mul.Tensor, aten.cat.default, aten.neg.default)
    depth = 5
    domain = Domain(shapes={"x": ("B", "N", "S", "2*K"), "cos": ("B", "S", "2*K"), "sin": ("B", "S", "2*K")})
    eager = (half, half_chunks, every_two)
    emits = frozenset({"ascend.rotary"})
    before = frozenset({"rotary_partial"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        best: NoMatch = refuse(facts, "op", anchor, "x * cos + rotate(x) * sin", "another sum")
        if arguments(anchor)["alpha"] != 1:
            return refuse(facts, "arg", anchor, "alpha=1", f"alpha={arguments(anchor)['alpha']}")
        for plain, turned in commuted(anchor):
            if not (is_call(plain, aten.mul.Tensor) and is_call(turned, aten.mul.Tensor)):
                continue
            for rotated, sin in commuted(turned):
                found = _rotation(facts, rotated)
                if found is None:
                    continue
                where, interleaved, inner = found
                pair = next(((y, t) for y, t in commuted(plain) if window(facts, y) == where), None)
                if pair is None or not isinstance(pair[1], fx.Node) or not isinstance(sin, fx.Node):
                    expected = f"the rotated {where} itself times cos"
                    best = refuse(facts, "op", plain, expected, "another tensor", 0.7)
                    continue
                x, table = pair
                refusal = broadcast_table(facts, anchor, x, table) or broadcast_table(facts, anchor, x, sin)
                nodes = frozenset((anchor, plain, turned, *inner))
                refusal = refusal or leaks(facts, nodes, (anchor,), 0.9)
                if refusal:
                    best = refusal
                    continue
                inputs = {"x": x, "cos": table, "sin": sin, "interleaved": interleaved}
                return Match(self.name, anchor, nodes, inputs, (anchor,))
        return best

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        x, cos, sin = m.inputs["x"], m.inputs["cos"], m.inputs["sin"]
        return (b.op(ascend.rotary.default, x, cos, sin, interleaved=m.inputs["interleaved"]),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, s, d = rng.choice([1, 2]), rng.choice([1, 3, 5]), 2 * rng.choice([1, 3, 4])
        tables = (torch.randn((rng.choice([1, b]), s, d), dtype=dtype) for _ in range(2))
        return (torch.randn((b, rng.choice([1, 3]), s, d), dtype=dtype), *tables)


def _rotation(facts: Facts, n: Any) -> tuple[Window, bool, tuple[fx.Node, ...]] | None:
    """(where x lies, interleaved, nodes in between) if ``n`` is rotate_half(x) or rotate_every_two(x)."""
    for interleaved in (False, True):
        parts = stacked_pair(facts, n, interleaved)
        if parts is None:
            continue
        first, second, inner = parts
        x2 = negated(first)
        source = members(facts, second, x2, interleaved)
        if x2 is not None and source is not None:
            return source, interleaved, (*inner, first)
    return None


PATTERNS = (Rotary(),)
