"""Rotary embedding spelled on the two halves with half-width tables -> ``ascend.rotary``.

Before (gpt-oss, DeepSeek-V3; ``x1, x2: T[B, N, S, K]``, ``c, s: T[B, 1, S, K]``)::

    y = cat([x1 * c - x2 * s, x2 * c + x1 * s], 3)                       # half layout
    y = the same two, stacked on a new last axis and flattened           # interleaved layout

after: ``y = ascend.rotary(x, cat([c, c], 3), cat([s, s], 3))``, or with each table value repeated twice and
``interleaved=True``. If ``x1`` and ``x2`` are the members of ``x`` in the same layout, ``x`` is taken; otherwise
(DeepSeek reads interleaved and writes halves) they are put together first. Bit exact: ``a - b`` is ``a + (-b)``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arguments, ascend, aten, commuted, dtype, is_call, leaks, refuse, same_shape
from ._rotary import broadcast_table, members, stacked_pair
from ._window import emit_window


def halves(x, c, s):  # type: ignore[no-untyped-def]
    x1, x2 = x.chunk(2, dim=-1)
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1)


def reads_interleaved(x, c, s):  # type: ignore[no-untyped-def]
    x1, x2 = x[..., ::2], x[..., 1::2]
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    return torch.cat((x1 * c - x2 * s, x1 * s + x2 * c), dim=-1)


def interleaved(x, c, s):  # type: ignore[no-untyped-def]
    x1, x2 = x[..., ::2], x[..., 1::2]
    c, s = c.unsqueeze(1), s.unsqueeze(1)
    return torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).flatten(-2)


class RotaryHalves(ProceduralPattern):
    name = "rotary_halves"
    level = 1
    benefit = 4
    anchors = (aten.cat.default, aten.reshape.default)
    reads = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.cat.default)
    depth = 5
    domain = Domain(shapes={"x": ("B", "N", "S", "2*K"), "c": ("B", "S", "K"), "s": ("B", "S", "K")})
    eager = (halves, reads_interleaved, interleaved)
    emits = frozenset({"ascend.rotary"})
    before = frozenset({"rotary_partial"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        woven = is_call(anchor, aten.reshape.default)
        parts = stacked_pair(facts, anchor, woven)
        if parts is None:
            return refuse(facts, "op", anchor, "the two halves of a rotation", "another layout")
        real, imag, inner = parts
        best = refuse(facts, "op", anchor, "cat([x1 * c - x2 * s, x2 * c + x1 * s])", "other halves", 0.2)
        # Where shapes leave it open which factor is x, it is the one that was cut into halves.
        for x1, x2, c, s in sorted(_factors(real, imag), key=lambda f: members(facts, f[0], f[1], woven) is None):
            refusal = _fits(facts, anchor, x1, x2, c, s)
            if refusal is not None:
                best = refusal
                continue
            nodes = frozenset((anchor, real, imag, *inner, *real.args[:2], *imag.args[:2]))
            leak = leaks(facts, nodes, (anchor,), 0.9)
            if leak is not None:
                return leak
            x = members(facts, x1, x2, woven)
            inputs = {"x": x, "x1": x1, "x2": x2, "c": c, "s": s, "interleaved": woven}
            return Match(self.name, anchor, nodes, inputs, (anchor,))
        return best

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        woven = m.inputs["interleaved"]
        where = m.inputs["x"]
        x = emit_window(b, where) if where else _together(b, m.inputs["x1"], m.inputs["x2"], woven)
        cos = _together(b, m.inputs["c"], m.inputs["c"], woven)
        sin = _together(b, m.inputs["s"], m.inputs["s"], woven)
        return (b.op(ascend.rotary.default, x, cos, sin, interleaved=woven),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, s, k = rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([1, 3, 4])
        tables = (torch.randn((rng.choice([1, b]), s, k), dtype=dtype) for _ in range(2))
        return (torch.randn((b, rng.choice([1, 3]), s, 2 * k), dtype=dtype), *tables)


def _factors(real: Any, imag: Any) -> Iterator[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
    """Every (x1, x2, c, s) with ``real = x1 * c - x2 * s`` and ``imag = x2 * c + x1 * s``.

    There are two if there is one: the product of two complex numbers commutes, and only shapes tell x from tables.
    """
    if not (is_call(real, aten.sub.Tensor) and is_call(imag, aten.add.Tensor)):
        return
    if arguments(real)["alpha"] != 1 or arguments(imag)["alpha"] != 1:
        return
    four = (*real.args[:2], *imag.args[:2])
    if not all(is_call(p, aten.mul.Tensor) and all(isinstance(a, fx.Node) for a in p.args) for p in four):
        return
    for x1, c in commuted(real.args[0]):
        for x2, s in commuted(real.args[1]):
            for second, first in commuted(imag):
                if {*second.args} == {x2, c} and {*first.args} == {x1, s}:
                    yield x1, x2, c, s


def _fits(facts: Facts, anchor: fx.Node, x1: fx.Node, x2: fx.Node, c: fx.Node, s: fx.Node) -> NoMatch | None:
    if dtype(facts, x1) != dtype(facts, x2) or not same_shape(facts, x1, x2):
        shapes = f"{list(facts.val(x1).shape)} and {list(facts.val(x2).shape)}"
        return refuse(facts, "shape", anchor, "halves of one shape and dtype", shapes, 0.7)
    return broadcast_table(facts, anchor, x1, c) or broadcast_table(facts, anchor, x1, s)


def _together(b: Builder, first: fx.Node, second: fx.Node, woven: bool) -> fx.Node:
    """``cat([first, second], -1)``, or with ``woven`` element by element."""
    *lead, k = first.meta["val"].shape
    if not woven:
        return b.op(aten.cat.default, [first, second], len(lead))
    pair = [b.op(aten.reshape.default, p, [*lead, k, 1]) for p in (first, second)]
    return b.op(aten.reshape.default, b.op(aten.cat.default, pair, len(lead) + 1), [*lead, 2 * k])


PATTERNS = (RotaryHalves(),)
