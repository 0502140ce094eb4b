"""Two or more linears of one input -> one linear over their concatenated weights, and slices of its result.

Before (QKV with grouped heads; ``x: T[*B, H]``, biases all present or all absent)::

    q = linear(x, wq, bq)      # wq: T[Nq, H]
    k = linear(x, wk, bk)      # wk: T[Nk, H]
    v = linear(x, wv, bv)

after::

    w, b = prologue concat0(wq, wk, wv), concat0(bq, bk, bv)     # once per weight identity, by aliasing
    y = linear(x, w, b)
    q, k, v = slice(y, -1, 0, Nq), slice(y, -1, Nq, Nq + Nk), slice(y, -1, Nq + Nk, Nq + 2 Nk)

The same holds for gate and up, for the two down projections of latent attention, for any linears of one input. A
linear whose result goes into SiLU comes first, so that gate and up lie as ``ascend.swiglu`` wants them. A matmul of
another width may block its sums differently: level 2.

A weight is merged only if nobody else can see it: a distinct 2-D parameter, used once in the graph, and not tied,
shared, quantised or already a part of something else.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import LAYOUT, arguments, aten, dtype, is_call, rank, refuse

FIX = "give each linear its own plain parameters"


def qkv(x, w0, w1, w2):  # type: ignore[no-untyped-def]
    return F.linear(x, w0), F.linear(x, w1), F.linear(x, w2)


def qkv_bias(x, w0, w1, w2, b0, b1, b2):  # type: ignore[no-untyped-def]
    return F.linear(x, w0, b0), F.linear(x, w1, b1), F.linear(x, w2, b2)


def gate_up(x, w0, w1):  # type: ignore[no-untyped-def]
    return F.linear(x, w1) * F.silu(F.linear(x, w0))


class MergeLinears(ProceduralPattern):
    name = "merge_linears"
    level = 2
    benefit = 5
    anchors = (aten.linear.default,)
    domain = Domain(shapes={"x": ("*B", "H")})
    eager = (qkv, qkv_bias, gate_up)
    emits = frozenset({"aten.linear"})
    before = frozenset({"swiglu"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        x, _, bias = linear_arguments(anchor)
        siblings = [u for u in x.users if is_call(u, aten.linear.default) and linear_arguments(u)[0] is x]
        if len(siblings) < 2:
            return refuse(facts, "op", anchor, "a second linear of the same input", "only this one")
        refusal = _unfit(facts, anchor)
        if refusal is not None:
            return refusal
        alike = [s for s in siblings if s is anchor or _goes_with(facts, anchor, s)]
        group = _mergeable(facts, anchor, sorted(alike, key=_merge_order))
        if isinstance(group, NoMatch):
            return group
        if len(group) < 2:
            others = (_unfit(facts, s) for s in siblings if s is not anchor)
            if (why := next((w for w in others if w is not None), None)) is not None:
                return why
            found = "linears with other dtypes or regions, or some with and some without bias"
            return refuse(facts, "arg", anchor, "a second linear that goes with this one", found, 0.5, FIX)
        weights = tuple(linear_arguments(n)[1] for n in group)
        biases = () if bias is None else tuple(linear_arguments(n)[2] for n in group)
        escaping = tuple(n for n in group if _escapes(n))
        inputs = {"x": x, "weights": weights, "biases": biases, "copies": escaping if len(escaping) > 1 else ()}
        return Match(self.name, anchor, frozenset(group), inputs, tuple(group))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        weights, biases = m.inputs["weights"], m.inputs["biases"]
        parts = [b.prologue("concat0", *weights)] + ([b.prologue("concat0", *biases)] if biases else [])
        merged = b.op(aten.linear.default, m.inputs["x"], *parts)
        last = merged.meta["val"].dim() - 1
        pieces: list[fx.Node] = []
        start = 0
        for node, weight in zip(m.outputs, weights, strict=True):
            end = start + weight.meta["val"].shape[0]
            piece = b.op(aten.slice.Tensor, merged, last, start, end, 1)
            # Two results of the graph must not become views of one tensor.
            pieces.append(b.op(aten.clone.default, piece) if node in m.inputs["copies"] else piece)
            start = end
        return tuple(pieces)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        wide = rng.choice([1, 3, 8])
        x = torch.randn((rng.choice([1, 2]), rng.choice([1, 3]), wide), dtype=dtype)
        rows = (4, 4) if spelling == 2 else (rng.choice([1, 6]), 2, 3)
        weights = [torch.randn((n, wide), dtype=dtype) for n in rows]
        biases = [torch.randn(n, dtype=dtype) for n in rows] if spelling == 1 else []
        return (x, *weights, *biases)


def linear_arguments(n: fx.Node) -> tuple[Any, Any, Any]:
    """(input, weight, bias or None) of an ``aten.linear``."""
    call = arguments(n)
    return call["input"], call["weight"], call["bias"]


def _unfit(facts: Facts, n: fx.Node) -> NoMatch | None:
    """Why this linear can be merged with no other, or None."""
    _, weight, bias = linear_arguments(n)
    for kind, p, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if p is None:
            continue
        if not facts.is_param(p):
            return refuse(
                facts, "arg", n, f"a {kind} that is a parameter", f"%{p.name}, computed in the graph", 0.4, FIX
            )
        if rank(facts, p) != dims or not all(isinstance(s, int) for s in facts.val(p).shape):
            return refuse(facts, "shape", n, f"a {kind} of {dims} fixed sizes", f"{list(facts.val(p).shape)}", 0.4)
        others = [u for u in p.users if u is not n]
        if others:
            found = f"%{p.name}, also used by %{others[0].name} (tied or shared)"
            return refuse(facts, "alias", n, f"a {kind} used once", found, 0.6, FIX)
    return None


def _goes_with(facts: Facts, anchor: fx.Node, other: fx.Node) -> bool:
    (_, weight, bias), (_, w, b) = linear_arguments(anchor), linear_arguments(other)
    return (
        _unfit(facts, other) is None
        and (bias is None) == (b is None)
        and dtype(facts, weight) == dtype(facts, w)
        and (bias is None or dtype(facts, bias) == dtype(facts, b))
        and facts.region(anchor) == facts.region(other)
    )


def _mergeable(facts: Facts, anchor: fx.Node, alike: list[fx.Node]) -> list[fx.Node] | NoMatch:
    """As many of ``alike`` as can be merged, the anchor among them."""

    def why_not(group: list[fx.Node]) -> str:
        columns = zip(*(linear_arguments(n)[1:] for n in group), strict=True)
        reasons = (facts.why_not_mergeable(column) for column in columns if column[0] is not None)
        return next(filter(None, reasons), "")

    if not why_not(alike):
        return alike
    group, reason = [anchor], ""
    for n in alike:
        wider = [s for s in alike if s in group or s is n]
        why = why_not(wider) if n is not anchor else ""
        group, reason = (wider, reason) if not why else (group, why)
    if len(group) > 1:
        return group
    return refuse(facts, "alias", anchor, "weights that nobody else can see", reason, 0.8, FIX)


def _merge_order(n: fx.Node) -> tuple[bool, fx.Node]:
    """Program order, but what goes into SiLU first."""
    return not any(is_call(u, aten.silu.default) for u in n.users), n


def _escapes(n: fx.Node) -> bool:
    """True if the graph returns ``n`` or a view of it."""
    return any(u.op == "output" or (is_call(u, *LAYOUT) and _escapes(u)) for u in n.users)


PATTERNS = (MergeLinears(),)
