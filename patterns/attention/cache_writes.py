"""The calls that put new tokens beside old ones: concatenation, indexed copies, slices, and a window that rolls on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import arg, arguments, aten, is_call, rank, refuse
from .._mla_parts import Labels, axis
from .cache_writers import writers_of

INDEX_COPY = (aten.index_copy.default, aten.index_copy_.default)
INDEX_PUT = (aten.index_put.default, aten.index_put_.default)
IN_PLACE = (aten.index_copy_.default, aten.index_put_.default)


@dataclass(frozen=True)
class Write:
    """``result`` holds the tokens of ``base`` and ``new`` ones at ``position`` of ``axis``; ``nodes`` read the base.

    ``count`` is how many tokens are new; ``position`` is None if it is an index tensor, ``index``.
    """

    kind: Any
    base: fx.Node
    new: fx.Node
    result: fx.Node
    axis: int
    start: Any
    count: Any
    index: fx.Node | None
    axes: Labels
    nodes: tuple[fx.Node, ...]

    @property
    def position(self) -> Any:
        return self.start if self.index is None else self.index

    @property
    def in_place(self) -> bool:
        return is_call(self.result, *IN_PLACE)

    def covered(self, facts: Facts, window: tuple[Any, Any]) -> bool:
        """True if the tokens ``window`` (start, end or None for all) of the result contain all that are new."""
        start, end = window
        if end is None:
            return facts.known(start == 0)
        if self.start is None:  # an index tensor may point anywhere
            size = facts.val(self.result).shape[self.axis]
            return facts.known(start == 0) and facts.known(end == size)
        return facts.known(start <= self.start) and facts.known(self.start + self.count <= end)


def read_write(facts: Facts, n: fx.Node, labels: Labels) -> Write | NoMatch:
    """``n`` as a write of new tokens; ``labels`` are those of B, H, S, D in ``n``."""
    tokens = axis(labels[2])
    if tokens is None:
        return refuse(facts, "shape", n, "an axis of tokens", f"axes {labels}", 0.2)
    if is_call(n, aten.cat.default):
        return _cat(facts, n, tokens, labels)
    if is_call(n, *INDEX_COPY):
        return _index_copy(facts, n, tokens, labels)
    if is_call(n, *INDEX_PUT):
        return _index_put(facts, n, tokens, labels)
    if is_call(n, aten.slice_scatter.default):
        return _slice_scatter(facts, n, tokens, labels)
    if n.op == "placeholder":
        writers = writers_of(facts, n)
        if len(writers) == 1 and is_call(writers[0], *IN_PLACE) and arg(writers[0], 0) is n:
            return read_write(facts, writers[0], labels)
        found = f"%{n.name} as it was: new tokens are written behind the read, or not at all"
        return refuse(facts, "op", n, "old and new tokens", found, 0.3)
    return refuse(facts, "op", n, "old tokens of an input and new ones", f"%{n.name}", 0.0)


def _cat(facts: Facts, n: fx.Node, tokens: int, labels: Labels) -> Write | NoMatch:
    pieces, dim = arg(n, 0), arg(n, 1)
    if dim != tokens:
        return refuse(facts, "arg", n, f"new tokens joined along axis {tokens}", f"axis {dim}", 0.4)
    if len(pieces) != 2:
        return refuse(facts, "arg", n, "cat([past, new])", f"{len(pieces)} pieces", 0.3)
    past, new = pieces
    start, count = (facts.val(piece).shape[tokens] for piece in pieces)
    nodes: tuple[fx.Node, ...] = (n,)
    kind = "dynamic"
    if is_call(past, aten.slice.Tensor) and arg(past, 1) == tokens and arg(past, 4) == 1:
        nodes, kind, past = (n, past), "sliding", arg(past, 0)
    if past.op != "placeholder":
        return refuse(facts, "op", n, "cat([past, new]) of an input", f"%{past.name} first", 0.2)
    return Write(kind, past, new, n, tokens, start, count, None, labels, nodes)


def _index_copy(facts: Facts, n: fx.Node, tokens: int, labels: Labels) -> Write | NoMatch:
    call = arguments(n)
    base, dim = call["self"], call["dim"] % rank(facts, n)
    if dim != tokens:
        return refuse(facts, "arg", n, f"new tokens copied along axis {tokens}", f"axis {dim}", 0.4)
    if base.op != "placeholder":
        return _no_input(facts, n, base)
    count = facts.val(call["source"]).shape[dim]
    return Write("static", base, call["source"], n, tokens, None, count, call["index"], labels, (n,))


def _index_put(facts: Facts, n: fx.Node, tokens: int, labels: Labels) -> Write | NoMatch:
    call = arguments(n)
    base, indices, values = call["self"], call["indices"], call["values"]
    if call["accumulate"]:
        return refuse(facts, "arg", n, "new tokens in place of old ones", "accumulate=True", 0.4)
    given = [i for i, index in enumerate(indices) if index is not None]
    if given != [tokens] or rank(facts, indices[tokens]) != 1 or facts.val(indices[tokens]).dtype == torch.bool:
        return refuse(facts, "arg", n, f"one vector of positions, along axis {tokens}", f"axes {given}", 0.4)
    index = indices[tokens]
    count = facts.val(index).shape[0]
    new = _unsqueezed(facts, values, base, tokens, count)
    if is_call(base, aten.roll.default):
        return _rolled(facts, n, base, index, new, tokens, labels)
    if base.op != "placeholder":
        return _no_input(facts, n, base)
    return Write("static", base, new, n, tokens, None, count, index, labels, (n,))


def _rolled(
    facts: Facts, n: fx.Node, roll: fx.Node, index: fx.Node, new: fx.Node, tokens: int, labels: Labels
) -> Write | NoMatch:
    """The oldest token leaves, the new one comes last."""
    call = arguments(roll)
    base, size = call["self"], facts.val(n).shape[tokens]
    dims = [d % rank(facts, n) for d in call["dims"]]
    place = facts.const(index)
    if list(call["shifts"]) != [-1] or dims != [tokens] or base.op != "placeholder":
        return refuse(facts, "arg", roll, "an input rolled by one token", f"{call['shifts']} along {dims}", 0.4)
    if place is None or place.tolist() not in ([-1], [size - 1] if isinstance(size, int) else [-1]):
        return refuse(facts, "arg", n, "the new token in the last place", "another place", 0.5)
    return Write("sliding", base, new, n, tokens, size - 1, 1, None, labels, (n, roll))


def _slice_scatter(facts: Facts, n: fx.Node, tokens: int, labels: Labels) -> Write | NoMatch:
    base, new, dim, start, _, step = (arg(n, i) for i in range(6))
    if dim != tokens or step != 1:
        return refuse(facts, "arg", n, f"new tokens side by side along axis {tokens}", f"axis {dim}, step {step}", 0.4)
    if base.op != "placeholder":
        return _no_input(facts, n, base)
    first = facts.val(start) if isinstance(start, fx.Node) else start
    return Write("static", base, new, n, tokens, first, facts.val(new).shape[tokens], None, labels, (n,))


def _no_input(facts: Facts, n: fx.Node, base: fx.Node) -> NoMatch:
    if is_call(base, *INDEX_COPY, *INDEX_PUT, aten.slice_scatter.default):
        return refuse(facts, "mutation", n, "one write of the cache", f"another by %{base.name}", 0.6)
    return refuse(facts, "op", n, "a cache that is an input", f"%{base.name}, a part or a change of one", 0.3)


def _unsqueezed(facts: Facts, values: fx.Node, base: fx.Node, tokens: int, count: Any) -> fx.Node:
    """The values in the shape of what they replace, if they only lost axes of size one on their way."""
    if is_call(values, aten.reshape.default):
        source = arg(values, 0)
        want = [count if i == tokens else s for i, s in enumerate(facts.val(base).shape)]
        have = facts.val(source).shape
        if len(have) == len(want) and all(facts.known(a == b) for a, b in zip(have, want, strict=True)):
            return source
    return values
