"""The rows that a loop hands to expert e: all, or those of the tokens that chose it.

The second is ``place, token = where(one_hot(ids, E).permute(2, 1, 0)[e])`` or ``token, place = where(ids == e)``: two
columns of a ``nonzero``. Its size depends on the data; nothing here asks about it but what the operators guarantee.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts

from ._calls import arg, arguments, aten, commuted, convert, is_call, rank
from ._loop_share import Share, last_axis_added, read_hit, read_one_hot, read_share, strip

_SLICED = (aten.slice.Tensor,)


@dataclass(frozen=True)
class Step:
    """One link: what came before, and rows * share added to it; ``token``: at these rows (None: at all of them).
    ``distinct``: right only if no token comes twice."""

    rest: Any
    term: Any
    token: fx.Node | None
    nodes: tuple[fx.Node, ...]
    distinct: bool = False


@dataclass(frozen=True)
class Chosen:
    """The tokens that chose ``expert`` [u], and at which of their k places [u]."""

    expert: int
    ids: fx.Node
    nonzero: fx.Node
    token_column: int
    nodes: tuple[fx.Node, ...]


def steps(n: Any) -> Iterator[Step]:
    """``n`` as a sum so far and what is added; the right operand first."""
    if is_call(n, aten.add.Tensor) and arguments(n)["alpha"] == 1:
        left, right = arg(n, 0), arg(n, 1)
        yield Step(left, right, None, (n,))
        yield Step(right, left, None, (n,))
    elif is_call(n, aten.index_add.default):
        call = arguments(n)
        if call["dim"] in (0, -2) and call["alpha"] == 1 and len(n.meta["val"].shape) == 2:
            yield Step(call["self"], call["source"], call["index"], (n,))
    elif is_call(n, aten.index_put.default):
        call = arguments(n)
        rest, index, values = call["self"], call["indices"], call["values"]
        if len(index) != 1 or not isinstance(index[0], fx.Node) or len(n.meta["val"].shape) != 2:
            return
        if call["accumulate"]:
            yield Step(rest, values, index[0], (n,))
            return
        casts: list[fx.Node] = []
        while is_call(values, convert):
            casts.append(values)
            values = arg(values, 0)
        if is_call(values, aten.add.Tensor) and arguments(values)["alpha"] == 1:
            for before, term in commuted(values):
                inner, more = before, []
                while is_call(inner, convert):
                    more.append(inner)
                    inner = arg(inner, 0)
                if is_call(inner, aten.index.Tensor) and arg(inner, 0) is rest and list(arg(inner, 1)) == index:
                    yield Step(rest, term, index[0], (n, *casts, values, *more, inner), True)


def read_chosen(facts: Facts, token: Any) -> Chosen | None:
    """The expert of which ``token`` lists the tokens."""
    column = _column(facts, token)
    if column is None:
        return None
    nonzero, at, nodes = column
    mask: Any = arg(nonzero, 0)
    hit = read_hit(facts, mask)
    if hit is not None:
        axes = [0, 1]
        expert, ids, more = hit
    else:
        found = _hot_slice(facts, mask)
        if found is None:
            return None
        expert, ids, axes, more = found
    if rank(facts, ids) != 2 or axes[at] != 0:
        return None
    return Chosen(expert, ids, nonzero, at, (*nodes, nonzero, *more))


def _column(facts: Facts, n: Any) -> tuple[fx.Node, int, tuple[fx.Node, ...]] | None:
    """(nonzero, column, calls) of one column of a ``nonzero`` as [u]."""
    if not is_call(n, aten.reshape.default) or rank(facts, n) != 1 or not is_call(arg(n, 0), *_SLICED):
        return None
    piece = arg(n, 0)
    call = arguments(piece)
    source, at = call["self"], call["start"]
    width = facts.val(piece).shape[1]
    if not is_call(source, aten.nonzero.default) or call["dim"] not in (1, -1) or facts.val(source).shape[1] != 2:
        return None
    return (source, at, (n, piece)) if isinstance(width, int) and width == 1 and at in (0, 1) else None


def _hot_slice(facts: Facts, n: Any) -> tuple[int, fx.Node, list[int], tuple[fx.Node, ...]] | None:
    """(e, ids, which axis of ids each axis is, calls) of row e of a one-hot mask of ids [T, k], permuted or not."""
    nodes: list[fx.Node] = [n]
    while is_call(n, convert):
        n = arg(n, 0)
        nodes.append(n)
    if not is_call(n, aten.reshape.default) or not is_call(arg(n, 0), *_SLICED) or rank(facts, n) != 2:
        return None
    piece = arg(n, 0)
    call = arguments(piece)
    hot, axis, expert = call["self"], call["dim"] % 3, call["start"]
    shape = facts.val(piece).shape
    if len(shape) != 3 or not isinstance(expert, int) or not isinstance(shape[axis], int) or shape[axis] != 1:
        return None
    kept = [s for i, s in enumerate(shape) if i != axis]
    if not all(facts.known(a == b) for a, b in zip(kept, facts.val(n).shape, strict=True)):
        return None
    nodes.append(piece)
    order = [0, 1, 2]
    while is_call(hot, aten.permute.default, convert):
        nodes.append(hot)
        if hot.target is aten.permute.default:
            order = [arg(hot, 1)[i] for i in order]
        hot = arg(hot, 0)
    found = read_one_hot(facts, hot)
    if found is None or order[axis] != 2:
        return None
    return expert, found[0], [a for i, a in enumerate(order) if i != axis], (*nodes, *found[1])


def read_chosen_share(facts: Facts, n: Any, chosen: Chosen, token: fx.Node) -> Share | None:
    """The weights of the tokens that chose an expert, [u, 1]: ``weights[token, place]``, or their shares at token."""
    n, casts, nodes = strip(facts, n)
    if not is_call(n, aten.index.Tensor):
        return None
    source, index = arg(n, 0), list(arg(n, 1))
    if len(index) == 1 and index[0] is token:
        whole = read_share(facts, source)
        if whole is None or whole.expert != chosen.expert or whole.ids is not chosen.ids:
            return None
        inner = (*nodes, n, source, *whole.nodes, *chosen.nodes)
        return Share(chosen.expert, chosen.ids, whole.weights, (*whole.casts, *casts), True, inner)
    if len(index) != 2 or index[0] is not token:
        return None
    place = _column(facts, index[1])
    if place is None or place[0] is not chosen.nonzero or place[1] == chosen.token_column:
        return None
    weights = last_axis_added(facts, source) if rank(facts, source) == 3 else source
    if weights is None or rank(facts, weights) != 2:
        return None
    shapes = zip(facts.val(weights).shape, facts.val(chosen.ids).shape, strict=True)
    if not all(facts.known(a == b) for a, b in shapes):
        return None
    seen = (*nodes, n, *place[2], *chosen.nodes, *((source,) if source is not weights else ()))
    return Share(chosen.expert, chosen.ids, weights, casts, False, seen)


def taken_at(facts: Facts, n: Any, token: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(x, calls) if ``n`` is rows ``token`` of x [T, H] or [1, T, H]."""
    nodes: list[fx.Node] = []
    shape = facts.val(n).shape
    while is_call(n, aten.reshape.default):
        nodes.append(n)
        n = arg(n, 0)
    if is_call(n, aten.index.Tensor):
        source, index = arg(n, 0), list(arg(n, 1))
    elif is_call(n, aten.index_select.default) and arg(n, 1) == 0:
        source, index = arg(n, 0), [arg(n, 2)]
    else:
        return None
    full = facts.val(source).shape
    lead = len(index) == 1 or (len(index) == 2 and index[0] is None and isinstance(full[0], int) and full[0] == 1)
    if not lead or index[-1] is not token or len(full) != len(index) + 1 or len(shape) != 2:
        return None
    return (source, (*nodes, n)) if facts.known(shape[1] == full[-1]) else None
