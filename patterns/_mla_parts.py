"""The parts of a latent attention: one vector per token, and the part of each head that a linear makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from ._calls import LAYOUT, arg, arguments, aten, is_call, rank, refuse

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """One vector per token, ``[B, 1, S, C]`` as an attention wants its only key head.

    ``dims`` are the axes of ``node`` that hold batch and token (or both in one; no batch if it is one) and C, in this
    order; the others have size one.
    """

    node: fx.Node
    dims: tuple[int, ...]
    shape: tuple[Any, Any, Any, Any]

    @property
    def tokens(self) -> tuple[fx.Node, int]:
        """``node`` and its axis of tokens."""
        return self.node, self.dims[-2]

    def emit(self, b: Builder) -> fx.Node:
        """The vectors in their shape: a view, unless batch and token are exchanged in ``node``."""
        n, rank = self.node, self.node.meta["val"].dim()
        if rank == 4 and self.dims in ((0, 2, 3), (2, 3)):
            return n
        if list(self.dims) != sorted(self.dims):
            n = b.op(aten.permute.default, n, [*self.dims, *(d for d in range(rank) if d not in self.dims)])
        return b.op(aten.reshape.default, n, list(self.shape))


@dataclass(frozen=True)
class HeadWeights:
    """``weight[rows].reshape(heads, width, R)[:, part]``: what one part of each head is made with, ``[H, M, R]``."""

    weight: fx.Node
    rows: tuple[int, int]
    heads: int
    width: int
    part: tuple[int, int]

    @property
    def size(self) -> int:
        """M, the width of the part."""
        return self.part[1] - self.part[0]

    def emit(self, b: Builder) -> fx.Node:
        """A view of the weight: nothing is copied if that is contiguous."""
        total, depth = self.weight.meta["val"].shape
        n = self.weight
        if self.rows != (0, total):
            n = b.op(aten.slice.Tensor, n, 0, *self.rows, 1)
        n = b.op(aten.reshape.default, n, [self.heads, self.width, depth])
        return n if self.part == (0, self.width) else b.op(aten.slice.Tensor, n, 1, *self.part, 1)


@dataclass(frozen=True)
class Projection:
    """``latent @ weights[h].T`` for each head h; ``nodes`` are the calls that compute it."""

    latent: Rows
    weights: HeadWeights
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Sizes:
    """What keys and values have in common: [batch, heads, tokens, ...]."""

    batch: Any
    heads: Any
    tokens: Any


def projection(facts: Facts, n: fx.Node, labels: Labels, sizes: Sizes) -> Projection | NoMatch:
    """``n`` as the part of each head of ``linear(latent, weight)``; ``labels`` are those of its axes B, H, S, M.

    The part may be cut out of each head behind the split into heads, in front of it, or both.
    """
    source = facts.axes(n)[0]
    nodes = list(between(n, source))
    part = None
    if is_call(source, aten.slice.Tensor) and labels[3] == f"d{arg(source, 1)}":
        part = _range(source)
        above, outer = facts.axes(arg(source, 0))
        followed = through(labels, outer)
        if part is None or followed is None:
            return refuse(facts, "shape", source, "a fixed part of each head", "another slice", 0.3)
        nodes += [source, *between(arg(source, 0), above)]
        source, labels = above, followed
    rows = None
    if is_call(source, aten.slice.Tensor) and arg(source, 1) == rank(facts, source) - 1:
        rows = _range(source)
        if rows is None:
            return refuse(facts, "shape", source, "fixed rows of the weight", "another slice", 0.3)
        nodes.append(source)
        source = arg(source, 0)
    if not is_call(source, aten.linear.default):
        return refuse(facts, "op", source, "a linear of the latents, split into heads", f"%{source.name}", 0.3)
    call = arguments(source)
    if call["bias"] is not None:
        return refuse(facts, "arg", source, "a projection of the latents without bias", "one with a bias", 0.6)
    shape, last = facts.val(call["weight"]).shape, rank(facts, source) - 1
    rows = rows or (0, shape[0])
    if not all(isinstance(s, int) for s in (*shape, *rows, sizes.heads)) or (rows[1] - rows[0]) % sizes.heads:
        return refuse(facts, "shape", source, "a weight of fixed size, so many rows a head", f"{list(shape)}", 0.5)
    if labels[1] != f"d{last}.0" or labels[3] != f"d{last}.1":
        return refuse(facts, "shape", source, "the rows of the weight head by head", f"axes {labels}", 0.5)
    latent = per_token(facts, call["input"], (labels[0], labels[2], f"d{last}"), sizes)
    if latent is None:
        return refuse(facts, "shape", source, "one latent per token, the same for all heads", f"axes {labels}", 0.5)
    width = (rows[1] - rows[0]) // sizes.heads
    weights = HeadWeights(call["weight"], rows, sizes.heads, width, part or (0, width))
    return Projection(latent, weights, (*nodes, source))


def per_token(facts: Facts, source: fx.Node, labels: Labels, sizes: Sizes) -> Rows | None:
    """``source`` as one vector per token, ``labels`` being those of B, S and C in it; None if it has other axes."""
    batch, token, last = labels
    shape = facts.val(source).shape
    flat = token.removesuffix(".1")
    if token.endswith(".1") and batch == f"{flat}.0":
        places = [axis(flat), axis(last)]
    elif facts.known(sizes.batch == 1):
        places = [axis(token), axis(last)]
    else:
        places = [axis(batch), axis(token), axis(last)]
    dims = tuple(p for p in places if p is not None)
    if len(set(dims)) != len(places) or not isinstance(shape[dims[-1]], int):
        return None
    if not all(facts.known(s == 1) for d, s in enumerate(shape) if d not in dims):
        return None
    flat_tokens = token.endswith(".1") and batch == f"{flat}.0"
    if not flat_tokens and len(dims) > 1 and facts.known(shape[dims[-2]] != sizes.tokens):
        return None  # the program does not run
    return Rows(source, dims, (sizes.batch, 1, sizes.tokens, shape[dims[-1]]))


def through(labels: Labels, outer: Labels) -> Labels | None:
    """Labels of a value in the source of its source, if every axis is a whole one of the source (or of size one)."""
    places = [axis(label) for label in labels]
    if any(p is None and label != "1" for p, label in zip(places, labels, strict=True)):
        return None
    return tuple("1" if p is None else outer[p] for p in places)


def axis(label: str) -> int | None:
    """The axis that a label names, if it names one whole axis."""
    return int(label[1:]) if label.startswith("d") and label[1:].isdigit() else None


def between(n: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The layout calls from ``n`` up to ``source``."""
    found: list[fx.Node] = []
    while n is not source and is_call(n, *LAYOUT):
        found.append(n)
        n = arg(n, 0)
    return found


def _range(n: fx.Node) -> tuple[int, int] | None:
    """Where a slice of step one lies, if that is fixed."""
    start, end, step = n.args[2:]
    return (start, end) if isinstance(start, int) and isinstance(end, int) and step == 1 else None
