"""Reading one expert of a loop over experts, and laying the weights of all of them side by side.

An expert is ``linear(act(gate) * up, w_down)``, gate and up two linears of one input or the halves of one. Its weights
are parameters of its own, or ``w[e]`` of a parameter of all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from ._calls import arg, arguments, aten, commuted, dtype, is_call, rank, refuse, same_shape
from ._experts_products import halves, read_glu

FIX = "give each expert its own plain parameters, or index one parameter of all experts by the expert's number"


@dataclass(frozen=True)
class Weight:
    """A weight [N, K] (or a bias [N]); ``swapped``: [K, N]. With ``index`` it is ``node[index]``."""

    node: fx.Node
    index: int | None
    swapped: bool = False


@dataclass(frozen=True)
class Linear:
    rows: fx.Node
    weight: Weight
    bias: Weight | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Expert:
    """``first`` is one linear to [gate, up], or the two of them."""

    source: fx.Node
    first: tuple[Linear, ...]
    down: Linear
    options: dict[str, Any]
    nodes: tuple[fx.Node, ...]


def read_expert(facts: Facts, n: fx.Node) -> Expert | NoMatch:
    """The expert whose results are ``n``."""
    down = _linear(facts, n)
    if down is None:
        return refuse(facts, "op", n, "an expert that ends in a linear", f"{n.target}", 0.3)
    glu = read_glu(facts, down.rows)
    if isinstance(glu, NoMatch):
        return glu
    nodes = [*down.nodes, *glu.nodes]
    source, turns = halves(facts, glu)
    options = {**glu.options, **({"interleaved": True} if turns else {})}
    parts = (glu.gate, glu.up) if source is None else (source,)
    found = [_linear(facts, part) for part in parts]
    first = tuple(p for p in found if p is not None)
    if len(first) != len(parts) or any(p.rows is not first[0].rows for p in first):
        return refuse(facts, "op", down.rows, "gate and up as linears of one input, the gate first", "others", 0.5)
    nodes += [glu.gate, glu.up, *(m for p in first for m in p.nodes)]
    return Expert(first[0].rows, first, down, options, tuple(nodes))


def _linear(facts: Facts, n: fx.Node) -> Linear | None:
    """linear(rows, w, b), rows @ w, or rows @ w + b."""
    if is_call(n, aten.linear.default):
        call = arguments(n)
        weight, bias = _weight(facts, call["weight"], False), call["bias"]
        return Linear(call["input"], weight, None if bias is None else _weight(facts, bias, False), (n,))
    if is_call(n, aten.matmul.default, aten.mm.default) and rank(facts, arg(n, 1)) == 2:
        return Linear(arg(n, 0), _weight(facts, arg(n, 1), True), None, (n,))
    if is_call(n, aten.add.Tensor) and arguments(n)["alpha"] == 1:
        for product, bias in commuted(n):
            if not isinstance(bias, fx.Node) or rank(facts, bias) != 1 or is_call(product, aten.add.Tensor):
                continue
            inner = _linear(facts, product) if isinstance(product, fx.Node) and same_shape(facts, product, n) else None
            if inner is not None and inner.bias is None:
                return Linear(inner.rows, inner.weight, _weight(facts, bias, False), (n, *inner.nodes))
    return None


def _weight(facts: Facts, n: fx.Node, swapped: bool) -> Weight:
    while is_call(n, aten.permute.default) and list(arg(n, 1)) == [1, 0]:
        n, swapped = arg(n, 0), not swapped
    row = arg(n, 0) if is_call(n, aten.reshape.default) else n
    if is_call(row, aten.slice.Tensor):
        call = arguments(row)
        base, shape = call["self"], facts.val(row).shape
        one = isinstance(shape[0], int) and shape[0] == 1 and len(shape) == rank(facts, n) + 1
        same = one and all(facts.known(a == b) for a, b in zip(shape[1:], facts.val(n).shape, strict=True))
        if same and call["dim"] == 0 and isinstance(call["start"], int):
            return Weight(base, call["start"], swapped)
    return Weight(n, None, swapped)


@dataclass(frozen=True)
class Stack:
    """The weights [E, N, K] (biases [E, N]) of all experts: ``node`` (``swapped``: [E, K, N]), or ``parts`` to be
    laid one below the other."""

    experts: int
    parts: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    swapped: bool = False

    @property
    def own(self) -> bool:
        return len(self.parts) > 1

    def emit(self, b: Builder) -> fx.Node:
        if self.own:
            return b.op(aten.reshape.default, b.prologue("concat0", *self.parts), list(self.shape))
        node = self.parts[0]
        if not self.swapped:
            return node
        if is_call(node, aten.permute.default) and list(arg(node, 1)) == [0, 2, 1]:
            source: fx.Node = arg(node, 0)
            return source
        return b.op(aten.permute.default, node, [0, 2, 1])


def stack(facts: Facts, rows: Sequence[tuple[Weight, ...]], at: fx.Node) -> Stack | NoMatch:
    """The weights of experts 0, 1, ..., in this order; each has one, or two that come one below the other."""
    first = rows[0][0]
    if first.index is not None:
        return _batched(facts, rows, at)
    parts = tuple(w.node for row in rows for w in row)
    if any(w.index is not None or w.swapped for row in rows for w in row):
        return refuse(facts, "arg", at, "weights [N, K] of the experts' own", "others", 0.8, FIX)
    for p in parts:
        if not facts.is_param(p):
            return refuse(facts, "arg", at, "experts whose weights are parameters", f"%{p.name}, computed", 0.8, FIX)
        if len(p.users) != 1 or parts.count(p) != 1:
            return refuse(facts, "alias", at, "weights used by one expert", f"%{p.name}, used twice", 0.8, FIX)
    sizes = [tuple(facts.val(p).shape) for p in parts]
    if not all(isinstance(s, int) for shape in sizes for s in shape) or len(set(sizes)) != 1:
        return refuse(facts, "shape", at, "experts of one fixed size", f"{sizes[0]} and others", 0.8)
    if len({dtype(facts, p) for p in parts}) != 1:
        return refuse(facts, "dtype", at, "experts of one dtype", "several", 0.8)
    why = facts.why_not_mergeable(parts)
    if why:
        return refuse(facts, "alias", at, "weights that nobody else can see", why, 0.9, FIX)
    return Stack(len(rows), parts, (len(rows), sizes[0][0] * len(rows[0]), *sizes[0][1:]))


def _batched(facts: Facts, rows: Sequence[tuple[Weight, ...]], at: fx.Node) -> Stack | NoMatch:
    first = rows[0][0]
    wanted = "gate and up in one parameter, indexed by the expert's number"
    for e, row in enumerate(rows):
        if len(row) != 1 or row[0].node is not first.node or row[0].swapped != first.swapped or row[0].index != e:
            return refuse(facts, "arg", at, wanted, f"other weights for expert {e}", 0.8)
    shape = tuple(facts.val(first.node).shape)
    if not all(isinstance(s, int) for s in shape) or shape[0] != len(rows):
        return refuse(facts, "shape", at, f"weights of {len(rows)} experts", f"{list(shape)}", 0.8)
    shape = (shape[0], shape[2], shape[1]) if first.swapped else shape
    return Stack(len(rows), (first.node,), shape, first.swapped)
