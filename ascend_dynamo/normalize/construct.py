"""Smart constructors of the layout ops: what they build is in normal form, merged with what it stands on.

Inside a graph a value is its dtype, shape and elements; whether a layout op views or copies is immaterial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ascend_dynamo.ir.sym import known, known_eq, same_shape
from ascend_dynamo.normalize.work import Call, Size, Value, Work, dtype_of, like_of, shape_of

_aten = torch.ops.aten


def reshape(w: Work, x: Value, shape: Sequence[Size]) -> Value:
    """``x`` with its elements, in row-major order, laid out in ``shape``."""
    while _target(x) is _aten.reshape.default:
        x = _source(x)
    if same_shape(shape_of(x), shape):
        return x
    merged = _unflatten_linear(w, x, shape)
    if merged is not None:
        return merged
    return _call(w, _aten.reshape.default, x, (list(map(w.size, shape)),), shape)


def permute(w: Work, x: Value, dims: Sequence[int]) -> Value:
    """``x`` with axis ``i`` of the result being axis ``dims[i]`` of ``x``; dims are non-negative."""
    while _target(x) is _aten.permute.default:
        inner = _args(x)[1]
        dims = [inner[d] for d in dims]
        x = _source(x)
    if list(dims) == list(range(len(dims))):
        return x
    shape = shape_of(x)
    return _call(w, _aten.permute.default, x, (list(dims),), [shape[d] for d in dims])


def expand(w: Work, x: Value, shape: Sequence[Size]) -> Value:
    """``x`` with its axes of size one repeated to ``shape``; missing leading axes are added first."""
    missing = len(shape) - len(shape_of(x))
    if missing:
        x = reshape(w, x, [*[1] * missing, *shape_of(x)])
    while _target(x) is _aten.expand.default:
        x = _source(x)
    if same_shape(shape_of(x), shape):
        return x
    return _call(w, _aten.expand.default, x, (list(map(w.size, shape)),), shape)


def cut(w: Work, x: Value, dim: int, start: Size, length: Size, step: int = 1) -> Value:
    """``length`` elements of axis ``dim`` from ``start`` (not negative) on, every ``step``-th."""
    shape = list(shape_of(x))
    if step == 1 and known_eq(shape[dim], length):
        return x
    if step == 1 and _target(x) is _aten.slice.Tensor:
        _, inner_dim, inner_start, _, inner_step = _args(x)
        if inner_dim == dim and inner_step == 1 and known(_size(inner_start) >= 0):
            return cut(w, _source(x), dim, _size(inner_start) + start, length)
    if step == 1 and _target(x) is _aten.cat.default and _args(x)[1] == dim:
        piece = _piece(x, dim, start, length)
        if piece is not None:
            return cut(w, piece[0], dim, piece[1], length)
    if step == 1 and _target(x) is _aten.slice_scatter.default:
        behind = _behind_write(x, dim, start, length)
        if behind is not None:
            return cut(w, behind[0], dim, behind[1], length)
    # The last step may reach past the end by less than a step: close at the axis' end then.
    end = start + length * step if step == 1 else _stepped_end(shape[dim], start, length, step)
    shape[dim] = length
    return _call(w, _aten.slice.Tensor, x, (dim, w.size(start), w.size(end), step), shape)


def cat(w: Work, xs: Sequence[Value], dim: int, shape: Sequence[Size], dtype: torch.dtype) -> Value | None:
    """The concatenation of ``xs``; None if pieces differ in dtype (cat promotes them) and nothing can be said."""
    if any(dtype_of(x) != dtype for x in xs):
        return None
    # torch lets empty 1-D tensors into any cat.
    pieces = [x for x in xs if not _is_zero(_axis(x, dim, len(shape)))] or list(xs[:1])
    pieces = _join_slices(w, pieces, dim)
    if len(pieces) == 1 and same_shape(shape_of(pieces[0]), shape):
        return pieces[0]
    nodes = [w.node(x) for x in pieces]
    return Call(_aten.cat.default, (nodes, dim), tuple(shape), like_of(nodes[0]), dtype)


def _axis(x: Value, dim: int, rank: int) -> Size:
    shape = shape_of(x)
    return shape[dim] if len(shape) == rank else 0


def _is_zero(size: Size) -> bool:
    return type(size) is int and size == 0


def _join_slices(w: Work, pieces: list[Value], dim: int) -> list[Value]:
    """Neighbouring slices of one source become one slice."""
    joined: list[Value] = []
    for piece in pieces:
        if joined:
            both = _adjacent(joined[-1], piece, dim)
            if both is not None:
                source, start, length = both
                joined[-1] = cut(w, source, dim, start, length)
                continue
        joined.append(piece)
    return joined


def _adjacent(a: Value, b: Value, dim: int) -> tuple[Value, int, int] | None:
    if _target(a) is not _aten.slice.Tensor or _target(b) is not _aten.slice.Tensor:
        return None
    (sa, da, a0, a1, ka), (sb, db, b0, b1, kb) = _args(a), _args(b)
    if sa is not sb or not da == db == dim or not ka == kb == 1:
        return None
    if not all(type(v) is int and v >= 0 for v in (a0, a1, b0, b1)) or a1 != b0:
        return None
    return sa, a0, b1 - a0


def _piece(x: Value, dim: int, start: Size, length: Size) -> tuple[Value, int] | None:
    """The operand of a cat that holds the whole range, and the range's start in it (static sizes only)."""
    if type(start) is not int or type(length) is not int:
        return None
    offset = 0
    for operand in _args(x)[0]:
        size = shape_of(operand)[dim]
        if type(size) is not int:
            return None
        if offset <= start and start + length <= offset + size:
            return operand, start - offset
        offset += size
    return None


def _behind_write(x: Value, dim: int, start: Size, length: Size) -> tuple[Value, Size] | None:
    """What holds the range of a ``slice_scatter``, and the range's start in it: all of what was written, or none."""
    base, piece, axis, begin, _, step = _args(x)
    if axis != dim or step != 1:
        return None
    begin, count = _size(begin), shape_of(piece)[dim]
    if known(begin <= start) and known(start + length <= begin + count):
        return piece, start - begin
    if known(start + length <= begin) or known(begin + count <= start):
        return base, start
    return None


def _stepped_end(size: Size, start: Size, length: Size, step: int) -> Size:
    end = start + length * step
    return end if known(end <= size) else size


def _unflatten_linear(w: Work, x: Value, shape: Sequence[Size]) -> Value | None:
    """reshape(linear(reshape(y), w, b)) is linear(y, w, b) when only the leading axes were flattened."""
    if not isinstance(x, fx.Node) or x.target not in (_aten.linear.default, _aten.matmul.default) or not shape:
        return None
    flat = x.args[0]
    assert isinstance(flat, fx.Node)
    if flat.target is not _aten.reshape.default or len(shape_of(x)) != 2:
        return None
    y = flat.args[0]
    assert isinstance(y, fx.Node)
    if not known_eq(shape[-1], shape_of(x)[-1]) or not same_shape(shape_of(y)[:-1], shape[:-1]):
        return None
    if not known_eq(shape_of(y)[-1], shape_of(flat)[-1]):
        return None
    return Call(x.target, (y, *x.args[1:]), tuple(shape), like_of(x), dtype_of(x))


def _call(w: Work, target: Any, x: Value, rest: tuple[Any, ...], shape: Sequence[Size]) -> Call:
    return Call(target, (w.node(x), *rest), tuple(shape), like_of(x), dtype_of(x))


def _target(x: Value) -> Any:
    return x.target


def _source(x: Value) -> fx.Node:
    source = x.args[0]
    assert isinstance(source, fx.Node)
    return source


def _args(x: Value) -> Any:
    return x.args


def _size(a: Any) -> Size:
    return a.meta["val"] if isinstance(a, fx.Node) else a
