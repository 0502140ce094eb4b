"""Writes into parts of a tensor: a chain of them that covers the whole tensor is a concatenation.

``y = empty(..., A + B); y[..., :A] = a; y[..., A:] = b`` arrives as two ``slice_scatter`` of ``copy``. Once every
position along the written axis is written, nothing of the old ``y`` is left, and ``y`` is ``cat([a, b])``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from ascend_dynamo.ir.sym import known, known_eq, same_shape
from ascend_dynamo.normalize.casts import convert
from ascend_dynamo.normalize.construct import cat, expand, reshape
from ascend_dynamo.normalize.layout import Rule, from_front, size_of
from ascend_dynamo.normalize.schema import bind
from ascend_dynamo.normalize.work import Call, Size, Value, Work, dtype_of, like_of, shape_of

_aten = torch.ops.aten
_SCATTER = _aten.slice_scatter.default


class _Write(NamedTuple):
    """``piece`` lies at ``start : start + length`` of the written axis."""

    start: Size
    length: Size
    piece: Value

    @property
    def end(self) -> Size:
        return self.start + self.length


def _slice_scatter(w: Work, n: fx.Node) -> Value | None:
    into, piece, dim, start, _, step = bind(n)
    shape = shape_of(into)
    dim %= len(shape)
    begin = from_front(0 if start is None else size_of(start), shape[dim])
    if begin is None or type(step) is not int or not _same_device(into, piece):
        return None
    if step != 1:
        whole = same_shape(shape, shape_of(piece))
        return convert(piece, dtype_of(into)) if whole else None
    return _scatter(w, into, convert(piece, dtype_of(into)), dim, begin)


def _select_scatter(w: Work, n: fx.Node) -> Value | None:
    """One position of an axis is a slice of length one."""
    into, piece, dim, index = bind(n)[:4]
    shape = list(shape_of(into))
    dim %= len(shape)
    begin = from_front(size_of(index), shape[dim])
    if begin is None or not _same_device(into, piece):
        return None
    shape[dim] = 1
    return _scatter(w, into, reshape(w, convert(piece, dtype_of(into)), shape), dim, begin)


def _copy(w: Work, n: fx.Node) -> Value | None:
    """``copy(into, x)`` is ``x`` with the dtype and the shape of ``into``."""
    into, x = n.args[:2]
    if not isinstance(into, fx.Node) or not isinstance(x, fx.Node) or not _same_device(into, x):
        return None
    return expand(w, convert(x, dtype_of(into)), shape_of(into))


def _scatter(w: Work, into: fx.Node, piece: Value, dim: int, begin: Size) -> Value:
    """``into`` with ``piece`` written at ``begin`` of axis ``dim``: a concatenation if nothing of ``into`` is left."""
    shape = shape_of(into)
    if known(begin > shape[dim]):
        begin = shape[dim]
    writes = [_Write(begin, shape_of(piece)[dim], piece)]
    base: Any = into
    while True:
        pieces = _tiling(writes, shape[dim])
        if pieces is not None:
            whole = cat(w, pieces, dim, shape, dtype_of(into))
            assert whole is not None  # every piece has the dtype of what it was written to
            return whole
        parts, base = _made_of(base, dim)
        if not parts or not all(_visible(p, writes) or _hidden(p, writes) for p in parts):
            break
        writes += [p for p in parts if not _hidden(p, writes)]
    end = writes[0].end
    args = (into, w.node(piece), dim, w.size(begin), w.size(end), 1)
    return Call(_SCATTER, args, tuple(shape), like_of(into), dtype_of(into))


def _made_of(n: Any, dim: int) -> tuple[list[_Write], Any]:
    """The parts along ``dim`` that ``n`` was made of, and what they were written into. Both are in normal form."""
    if not isinstance(n, fx.Node):
        return [], None
    if n.target is _SCATTER:
        base, piece, axis, start, _, step = bind(n)
        along = axis == dim and step == 1
        return ([_Write(size_of(start), shape_of(piece)[dim], piece)], base) if along else ([], None)
    if n.target is not _aten.cat.default or n.args[1] != dim:
        return [], None
    like = n.meta["val"]
    if any(dtype_of(p) != like.dtype or len(shape_of(p)) != like.dim() for p in n.args[0]):  # type: ignore[union-attr,arg-type]
        return [], None  # cat promotes dtypes and lets empty vectors pass
    parts: list[_Write] = []
    position: Size = 0
    for piece in n.args[0]:  # type: ignore[union-attr]
        parts.append(_Write(position, shape_of(piece)[dim], piece))  # type: ignore[arg-type]
        position = parts[-1].end
    return parts, None


def _visible(earlier: _Write, later: list[_Write]) -> bool:
    """True if nothing of ``earlier`` is overwritten, as far as is known."""
    return all(known(earlier.end <= x.start) or known(x.end <= earlier.start) for x in later)


def _hidden(earlier: _Write, later: list[_Write]) -> bool:
    """True if one later write is known to overwrite all of ``earlier``."""
    return any(known(x.start <= earlier.start) and known(earlier.end <= x.end) for x in later)


def _tiling(writes: list[_Write], size: Size) -> list[Value] | None:
    """The pieces in order, if they are known to lie end to end from 0 to ``size``."""
    rest = list(writes)
    found: list[Value] = []
    position: Size = 0
    while rest:
        index = next((i for i, x in enumerate(rest) if known_eq(x.start, position)), None)
        if index is None:
            return None
        write = rest.pop(index)
        found.append(write.piece)
        position = write.end
    return found if known_eq(position, size) else None


def _same_device(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].device == b.meta["val"].device)


RULES: Mapping[Any, Rule] = {
    _SCATTER: _slice_scatter,
    _aten.select_scatter.default: _select_scatter,
    _aten.copy.default: _copy,
}
