"""Rotary embedding on the first channels, the rest passed through -> ``ascend.rotary(..., rotary_dim=R)``.

Before (GPT-NeoX, Phi; ``x: T[B, N, S, D]``, tables ``T[B, 1, S, R]``, ``R < D``)::

    r = ascend.rotary(slice(x, 3, 0, R), cos, sin)
    y = cat([r, slice(x, 3, R, D)], 3)

after: ``y = ascend.rotary(x, cos, sin, rotary_dim=R)``. Bit exact.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, arguments, ascend, aten, dtype, is_call, leaks, rank, refuse
from ._window import Window, emit_window, window


def neox(x, cos, sin):  # type: ignore[no-untyped-def]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    r = cos.shape[-1]
    rot, rest = x[..., :r], x[..., r:]
    x1, x2 = rot.chunk(2, dim=-1)
    return torch.cat((rot * cos + torch.cat((-x2, x1), dim=-1) * sin, rest), dim=-1)


class RotaryPartial(ProceduralPattern):
    name = "rotary_partial"
    level = 1
    benefit = 3
    anchors = (aten.cat.default,)
    domain = Domain(shapes={"x": ("B", "N", "S", "D"), "cos": ("B", "S", "2*K"), "sin": ("B", "S", "2*K")})
    eager = (neox,)
    emits = frozenset({"ascend.rotary"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        parts, dim = arg(anchor, 0), arguments(anchor)["dim"]
        if len(parts) != 2 or not is_call(parts[0], ascend.rotary.default) or dim not in (-1, rank(facts, anchor) - 1):
            return refuse(facts, "op", anchor, "cat([ascend.rotary(...), the rest], -1)", "another cat")
        rotated, rest = parts
        call = arguments(rotated)
        front, back = window(facts, call["x"]), window(facts, rest)
        if front is None or back is None or front.source is not back.source:
            return refuse(facts, "op", anchor, "both parts sliced from one tensor", "two tensors", 0.5)
        if front.step != 1 or back.step != 1 or back.start != front.start + front.count:
            return refuse(facts, "shape", anchor, "adjacent parts [0:R] and [R:D]", f"{front} and {back}", 0.7)
        if call["rotary_dim"] != -1:
            return refuse(
                facts, "arg", anchor, "a rotation of the whole slice", f"rotary_dim={call['rotary_dim']}", 0.7
            )
        if dtype(facts, rotated) != dtype(facts, rest):
            fix = "keep the tables in the dtype of x"
            return refuse(
                facts, "dtype", anchor, f"a rotation in {dtype(facts, rest)}", f"{dtype(facts, rotated)}", 0.8, fix
            )
        nodes = frozenset((anchor, rotated))
        leak = leaks(facts, nodes, (anchor,), 0.9)
        if leak:
            return leak
        inputs = {key: call[key] for key in ("cos", "sin", "interleaved")}
        inputs["x"] = Window(front.source, front.start, front.count + back.count)
        inputs["cut"] = front.count
        return Match(self.name, anchor, nodes, inputs, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        x, cos, sin = emit_window(b, m.inputs["x"]), m.inputs["cos"], m.inputs["sin"]
        interleaved, cut = m.inputs["interleaved"], m.inputs["cut"]
        return (b.op(ascend.rotary.default, x, cos, sin, interleaved=interleaved, rotary_dim=cut),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, s, r = rng.choice([1, 2]), rng.choice([1, 3, 5]), 2 * rng.choice([1, 3])
        tables = (torch.randn((rng.choice([1, b]), s, r), dtype=dtype) for _ in range(2))
        return (torch.randn((b, rng.choice([1, 3]), s, r + rng.choice([1, 4])), dtype=dtype), *tables)


PATTERNS = (RotaryPartial(),)
