"""Layout ops: everything that moves elements without computing becomes permute, reshape, expand, slice and cat."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.ir.sym import known, known_eq, same_shape
from ascend_dynamo.normalize.construct import cat, cut, expand, permute, reshape
from ascend_dynamo.normalize.schema import bind
from ascend_dynamo.normalize.work import Call, Size, Value, Work, dtype_of, shape_of

_aten = torch.ops.aten
_END = 2**63 - 1  # what torch writes for "to the end"
Rule = Callable[[Work, fx.Node], "Value | None"]


def size_of(a: Any) -> Any:
    """The size that a graph argument holds."""
    return a.meta["val"] if isinstance(a, fx.Node) else a


def _to_reshape(w: Work, n: fx.Node) -> Value | None:
    return reshape(w, n.args[0], n.meta["val"].shape)  # type: ignore[arg-type]


def _to_expand(w: Work, n: fx.Node) -> Value | None:
    return expand(w, n.args[0], n.meta["val"].shape)  # type: ignore[arg-type]


def _same(w: Work, n: fx.Node) -> Value | None:
    source: Any = n.args[0]
    have, want = source.meta["val"], n.meta["val"]
    return source if have.dtype == want.dtype and have.device == want.device else None


def _permute(w: Work, n: fx.Node) -> Value | None:
    x, dims = bind(n)[:2]
    rank = len(shape_of(x))
    return permute(w, x, [d % rank for d in dims])


def _transpose(w: Work, n: fx.Node) -> Value | None:
    x, a, b = bind(n)[:3]
    return _swap(w, x, a, b)


def _reverse(w: Work, n: fx.Node) -> Value | None:
    x: Any = n.args[0]
    return permute(w, x, list(range(len(shape_of(x))))[::-1])


def _swap_last(w: Work, n: fx.Node) -> Value | None:
    return _swap(w, n.args[0], -2, -1)


def _swap(w: Work, x: Any, a: int, b: int) -> Value:
    dims = list(range(len(shape_of(x))))
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return permute(w, x, dims)


def _movedim(w: Work, n: fx.Node) -> Value | None:
    x, source, destination = bind(n)[:3]
    rank = len(shape_of(x))
    sources = [s % rank for s in (source if isinstance(source, (list, tuple)) else [source])]
    targets = [d % rank for d in (destination if isinstance(destination, (list, tuple)) else [destination])]
    place = dict(zip(targets, sources, strict=True))
    rest = iter(i for i in range(rank) if i not in sources)
    return permute(w, x, [place[i] if i in place else next(rest) for i in range(rank)])


def _slice(w: Work, n: fx.Node) -> Value | None:
    x, dim, start, end, step = bind(n)
    shape, out = shape_of(x), n.meta["val"].shape
    dim %= len(shape)
    begin = from_front(0 if start is None else size_of(start), shape[dim])
    if begin is None or type(step) is not int:
        # Where the slice begins is not known: only write the arguments out.
        last = w.size(shape[dim]) if end is None or (type(end) is int and end >= _END) else end
        args = (x, dim, 0 if start is None else start, last, step)
        return Call(_aten.slice.Tensor, args, tuple(out), x.meta["val"], dtype_of(x))
    if known(begin > shape[dim]):
        begin = shape[dim]
    return cut(w, x, dim, begin, out[dim], step)


def from_front(index: Size, size: Size) -> Size | None:
    """A possibly negative index counted from the front; None if its sign is not known."""
    if known(index >= 0):
        return index
    if known(index < 0):
        counted = index + size
        return counted if known(counted >= 0) else 0 if known(counted <= 0) else None
    return None


def _select(w: Work, n: fx.Node) -> Value | None:
    x, dim, index = bind(n)[:3]
    shape = shape_of(x)
    dim %= len(shape)
    start = from_front(size_of(index), shape[dim])
    if start is None:
        return None
    return reshape(w, cut(w, x, dim, start, 1), n.meta["val"].shape)


def _narrow(w: Work, n: fx.Node) -> Value | None:
    x, dim, start, length = bind(n)[:4]
    shape = shape_of(x)
    dim %= len(shape)
    if isinstance(size_of(start), torch.Tensor):
        return None
    begin = from_front(size_of(start), shape[dim])
    return None if begin is None else cut(w, x, dim, begin, size_of(length))


def _getitem(w: Work, n: fx.Node) -> Value | None:
    source, index = n.args
    if not isinstance(source, fx.Node) or type(index) is not int:
        return None
    if source.target in _UNBIND:
        x, dim = bind(source)[:2]
        shape = shape_of(x)
        dim %= len(shape)
        index %= len(source.meta["val"])
        return reshape(w, cut(w, x, dim, index, 1), n.meta["val"].shape)
    if source.target in _SPLIT:
        x, _, dim = bind(source)[:3]
        dim %= len(shape_of(x))
        pieces = [p.shape[dim] for p in source.meta["val"]]
        index %= len(pieces)
        return cut(w, x, dim, sum(pieces[:index]), pieces[index])
    return None


def _cat(w: Work, n: fx.Node) -> Value | None:
    xs, dim = bind(n)[:2]
    val = n.meta["val"]
    return cat(w, xs, dim % max(val.dim(), 1), val.shape, val.dtype)


def _stack(w: Work, n: fx.Node) -> Value | None:
    xs, dim = bind(n)[:2]
    val = n.meta["val"]
    dim %= val.dim()
    piece = list(val.shape)
    piece[dim] = 1
    return cat(w, [reshape(w, x, piece) for x in xs], dim, val.shape, val.dtype)


def _repeat(w: Work, n: fx.Node) -> Value | None:
    x, repeats = bind(n)[:2]
    times = [size_of(r) for r in repeats]
    shape = [*[1] * (len(times) - len(shape_of(x))), *shape_of(x)]
    if all(known_eq(t, 1) for t in times):
        return reshape(w, x, shape)
    apart = [s for size in shape for s in (1, size)]
    copies = [s for t, size in zip(times, shape, strict=True) for s in (t, size)]
    return reshape(w, expand(w, reshape(w, x, apart), copies), n.meta["val"].shape)


def _pad(w: Work, n: fx.Node) -> Value | None:
    return n.args[0] if same_shape(shape_of(n.args[0]), n.meta["val"].shape) and _no_pad(n) else None  # type: ignore


def _no_pad(n: fx.Node) -> bool:
    pad: Any = n.args[1]
    return all(type(p) is int and p == 0 for p in pad)


_SPLIT = frozenset({_aten.split.Tensor, _aten.split_with_sizes.default, _aten.split.sizes, _aten.chunk.default})
_UNBIND = frozenset({_aten.unbind.int})
_RESHAPES = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.view_copy.default,
    _aten.squeeze_copy.default,
    _aten.squeeze_copy.dim,
    _aten.unsqueeze_copy.default,
    _aten.view_as.default,
    _aten.reshape_as.default,
)
_COPIES = (
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.alias_copy.default,
    _aten.detach_copy.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
    _aten.lift.default,
)
RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(_RESHAPES, _to_reshape),
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys((_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default), _to_expand),
    _aten.expand_copy.default: _to_expand,
    _aten.permute.default: _permute,
    _aten.permute_copy.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.transpose_copy.int: _transpose,
    _aten.swapaxes.default: _transpose,
    _aten.swapdims.default: _transpose,
    _aten.t.default: _reverse,
    _aten.t_copy.default: _reverse,
    _aten.numpy_T.default: _reverse,
    _aten.mT.default: _swap_last,
    _aten.movedim.int: _movedim,
    _aten.movedim.intlist: _movedim,
    _aten.slice.Tensor: _slice,
    _aten.slice_copy.Tensor: _slice,
    _aten.select.int: _select,
    _aten.select_copy.int: _select,
    _aten.narrow.default: _narrow,
    _aten.narrow_copy.default: _narrow,
    operator.getitem: _getitem,
    _aten.cat.default: _cat,
    _aten.concat.default: _cat,
    _aten.stack.default: _stack,
    _aten.repeat.default: _repeat,
    _aten.constant_pad_nd.default: _pad,
}
