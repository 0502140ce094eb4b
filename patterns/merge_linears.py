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

Whisper's keys have no bias, its queries and values have one. Linears of the shape of one that has a bias go with it:
they come last, and the merged bias ends in zeros, put there in the graph (a few elements; a merged *copy* of the biases
would not see writes to them). Others without a bias, such as a wide MLP beside them, stay apart.

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


def whisper(x, w0, w1, w2, b0, b2):  # type: ignore[no-untyped-def]
    return F.linear(x, w0, b0), F.linear(x, w1), F.linear(x, w2, b2)


def gate_up(x, w0, w1):  # type: ignore[no-untyped-def]
    return F.linear(x, w1) * F.silu(F.linear(x, w0))


class MergeLinears(ProceduralPattern):
    name = "merge_linears"
    level = 2
    benefit = 5
    anchors = (aten.linear.default,)
    reads = (aten.linear.default,)
    depth = 1
    domain = Domain(shapes={"x": ("*B", "H")})
    eager = (qkv, qkv_bias, gate_up, whisper)
    emits = frozenset({"aten.linear"})
    before = frozenset({"swiglu"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        x = linear_arguments(anchor)[0]
        siblings = [u for u in x.users if is_call(u, aten.linear.default) and linear_arguments(u)[0] is x]
        if len(siblings) < 2:
            return refuse(facts, "op", anchor, "a second linear of the same input", "only this one")
        refusal = _unfit(facts, anchor)
        if refusal is not None:
            return refusal
        alike = [s for s in siblings if s is anchor or _goes_with(facts, anchor, s)]
        group = _mergeable(facts, anchor, sorted(_one_bias(facts, anchor, alike), key=_merge_order))
        if isinstance(group, NoMatch):
            return group
        if len(group) < 2:
            others = (_unfit(facts, s) for s in siblings if s is not anchor)
            if (why := next((w for w in others if w is not None), None)) is not None:
                return why
            found = "linears with other dtypes or regions, or some with and some without bias"
            return refuse(facts, "arg", anchor, "a second linear that goes with this one", found, 0.5, FIX)
        weights = tuple(linear_arguments(n)[1] for n in group)
        biases = tuple(bias for n in group if (bias := linear_arguments(n)[2]) is not None)
        escaping = tuple(n for n in group if _escapes(n))
        inputs = {"x": x, "weights": weights, "biases": biases, "copies": escaping if len(escaping) > 1 else ()}
        return Match(self.name, anchor, frozenset(group), inputs, tuple(group))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        weights, biases = m.inputs["weights"], m.inputs["biases"]
        parts = [b.prologue("concat0", *weights)] + ([_bias(b, weights, biases)] if biases else [])
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
        rows = ((rng.choice([1, 6]), 2, 3), (rng.choice([1, 6]), 2, 3), (4, 4), (5, 5, 5))[spelling]
        weights = [torch.randn((n, wide), dtype=dtype) for n in rows]
        biased = ((), rows, (), rows[:2])[spelling]
        return (x, *weights, *(torch.randn(n, dtype=dtype) for n in biased))


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
        and dtype(facts, weight) == dtype(facts, w)
        and (bias is None or b is None or dtype(facts, bias) == dtype(facts, b))
        and facts.region(anchor) == facts.region(other)
    )


def _one_bias(facts: Facts, anchor: fx.Node, alike: list[fx.Node]) -> list[fx.Node]:
    """Those of ``alike`` that have a bias, with those that miss one but have the shape of one that has it; or, for an
    anchor that is none of these, those without a bias."""
    biased = [n for n in alike if linear_arguments(n)[2] is not None]
    shapes = {tuple(facts.val(linear_arguments(n)[1]).shape) for n in biased}
    kinds = {dtype(facts, linear_arguments(n)[2]) for n in biased}
    if len(kinds) > 1:  # the anchor has none, and may go with no two of them
        return [n for n in alike if n not in biased]
    group = [n for n in alike if n in biased or tuple(facts.val(linear_arguments(n)[1]).shape) in shapes]
    return group if anchor in group else [n for n in alike if n not in group]


def _mergeable(facts: Facts, anchor: fx.Node, alike: list[fx.Node]) -> list[fx.Node] | NoMatch:
    """As many of ``alike`` as can be merged, the anchor among them."""

    def why_not(group: list[fx.Node]) -> str:
        columns = zip(*(linear_arguments(n)[1:] for n in group), strict=True)
        present = (tuple(p for p in column if p is not None) for column in columns)
        reasons = (facts.why_not_mergeable(column) for column in present if column)
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


def _merge_order(n: fx.Node) -> tuple[bool, bool, fx.Node]:
    """Program order, but what has no bias last, and what goes into SiLU first."""
    return linear_arguments(n)[2] is None, not any(is_call(u, aten.silu.default) for u in n.users), n


def _bias(b: Builder, weights: tuple[fx.Node, ...], biases: tuple[fx.Node, ...]) -> fx.Node:
    """The merged bias: one storage for those there are, zeros after them for the linears without one."""
    merged = b.prologue("concat0", *biases) if len(biases) > 1 else biases[0]
    missing = sum(w.meta["val"].shape[0] for w in weights[len(biases) :])
    if not missing:
        return merged
    kind = merged.meta["val"]
    zeros = b.op(aten.full.default, [missing], 0.0, dtype=kind.dtype, device=kind.device)
    return b.op(aten.cat.default, [merged, zeros], 0)


def _escapes(n: fx.Node) -> bool:
    """True if the graph returns ``n`` or a view of it."""
    return any(u.op == "output" or (is_call(u, *LAYOUT) and _escapes(u)) for u in n.users)


PATTERNS = (MergeLinears(),)
