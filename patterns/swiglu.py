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

from ._calls import arg, ascend, aten, commuted, is_call, leaks, refuse
from ._window import emit_window, joined, window


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
        silu, other = next(((s, o) for s, o in commuted(anchor) if is_call(s, aten.silu.default)), (None, None))
        if silu is None:
            return refuse(facts, "op", anchor, "a product with aten.silu", "no silu operand")
        gate, up = window(facts, arg(silu, 0)), window(facts, other)
        if gate is None or up is None or gate.source is not up.source:
            fix = "gate and up must come from one linear; see why merge_linears did not merge them"
            return refuse(facts, "op", anchor, "gate and up sliced from one tensor", "two separate tensors", 0.6, fix)
        both = joined(gate, up)
        if both is None or both.step != 1:
            swapped = joined(up, gate) is not None
            fix = "swap the two halves of the projection's weight" if swapped else ""
            return refuse(facts, "arg", anchor, "the gate, then up, side by side", f"{gate} and {up}", 0.9, fix)
        nodes = frozenset((silu, anchor))
        leak = leaks(facts, nodes, (anchor,), 0.9)
        if leak:
            return leak
        return Match(self.name, anchor, nodes, {"gate_up": both}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        return (b.op(ascend.swiglu.default, emit_window(b, m.inputs["gate_up"])),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        shape = (rng.choice([1, 2]), rng.choice([1, 3, 5]), 4 * rng.choice([1, 3, 8]))
        return (torch.randn(shape, dtype=dtype),)


PATTERNS = (Swiglu(),)
