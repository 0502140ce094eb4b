"""SiLU(gate) * up with gate and up the two halves of one tensor -> ``ascend.swiglu``.

Before (``t: T[*B, 2I]``, the merged output of the gate and the up projection)::

    gate = slice(t, -1, 0, I)
    up   = slice(t, -1, I, 2I)
    y    = silu(gate) * up

after: ``y = ascend.swiglu(t)``. Two separate projections become one tensor by ``merge_linears``, which puts the gate
first; where that was refused there is nothing to fuse here without a copy. ``up`` before ``gate`` is refused: the op
applies SiLU to the first half.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import ascend, aten, commuted, is_call, last_axis_slice, leaks, refuse


def chunked(t):  # type: ignore[no-untyped-def]
    gate, up = t.chunk(2, dim=-1)
    return F.silu(gate) * up


def split_commuted(t):  # type: ignore[no-untyped-def]
    gate, up = t.split(t.shape[-1] // 2, dim=-1)
    return up * F.silu(gate)


def middle(t):  # type: ignore[no-untyped-def]
    n = t.shape[-1] // 4
    return F.silu(t[..., n : 2 * n]) * t[..., 2 * n : 3 * n]


class Swiglu(ProceduralPattern):
    name = "swiglu"
    level = 1
    benefit = 4
    anchors = (aten.mul.Tensor,)
    domain = Domain(shapes={"t": ("*B", "2*I")})
    eager = (chunked, split_commuted, middle)
    emits = frozenset({"ascend.swiglu"})
    after = frozenset({"merge_linears", "silu"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        for silu, up in commuted(anchor):
            if is_call(silu, aten.silu.default):
                break
        else:
            return refuse(facts, "op", anchor, "a product with aten.silu", "no silu operand")
        gate = silu.args[0]
        halves = last_axis_slice(facts, gate), last_axis_slice(facts, up)
        if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
            fix = "gate and up must come from one linear; see why merge_linears did not merge them"
            found = "two separate tensors"
            return refuse(facts, "op", anchor, "gate and up sliced from one tensor", found, 0.6, fix)
        source, start, middle_ = halves[0]
        _, second, end = halves[1]
        if facts.known(end == start):
            fix = "swap the two halves of the projection's weight"
            return refuse(facts, "arg", anchor, "the gate in front of up", "up in front of the gate", 0.9, fix)
        if not (facts.known(middle_ == second) and facts.known(middle_ - start == end - second)):
            return refuse(facts, "shape", anchor, "adjacent halves of one size", f"[{start}:{middle_}] and [{second}:{end}]", 0.8)  # fmt: skip
        nodes = frozenset((silu, anchor))
        leak = leaks(facts, nodes, (anchor,), 0.9)
        if leak:
            return leak
        inputs = {"source": source, "start": start, "end": end}
        inputs["whole"] = facts.known(start == 0) and facts.known(end == facts.val(source).shape[-1])
        return Match(self.name, anchor, nodes, inputs, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        t = m.inputs["source"]
        if not m.inputs["whole"]:
            last = t.meta["val"].dim() - 1
            t = b.op(aten.slice.Tensor, t, last, m.inputs["start"], m.inputs["end"], 1)
        return (b.op(ascend.swiglu.default, t),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        shape = (rng.choice([1, 2]), rng.choice([1, 3, 5]), 4 * rng.choice([1, 3, 8]))
        return (torch.randn(shape, dtype=dtype),)


PATTERNS = (Swiglu(),)
