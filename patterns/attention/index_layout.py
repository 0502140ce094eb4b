"""Which element of its source an element of a layout op is: the index maps of permute, reshape, expand, slice, flip."""

from __future__ import annotations

from typing import Any

from torch import fx

from .._calls import arguments, aten, is_call
from .index_algebra import ZERO, Affine, Space

Index = tuple[Affine, ...]
LAYOUT_CALLS = frozenset(
    (
        aten.permute.default,
        aten.reshape.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.flip.default,
        aten.clone.default,
    )
)


def source_index(space: Space, n: fx.Node, index: Index) -> Index | None:
    """The index into the first argument of a layout call that its element ``index`` is read from, if that is known."""
    call = arguments(n)
    if is_call(n, aten.permute.default):
        found: list[Any] = [None] * len(index)
        for i, d in zip(index, call["dims"], strict=True):
            found[d] = i
        return tuple(found)
    source = shape(space, call["self"])
    if is_call(n, aten.expand.default):
        return broadcast(space, source, shape(space, n), index)
    if is_call(n, aten.reshape.default):
        return reshaped(space, source, shape(space, n), index)
    if is_call(n, aten.slice.Tensor):
        d, step = call["dim"], call["step"]
        start = 0 if call["start"] is None else space.facts.size(call["start"])
        if not isinstance(step, int) or not space.not_positive(-start):
            return None
        return (*index[:d], index[d].scaled(step).shift(start), *index[d + 1 :])
    if is_call(n, aten.flip.default):
        dims = [d % len(index) for d in call["dims"]]
        return tuple(i.scaled(-1).shift(source[d] - 1) if d in dims else i for d, i in enumerate(index))
    return index if is_call(n, aten.clone.default) else None


def shape(space: Space, n: fx.Node) -> tuple[Any, ...]:
    return tuple(space.facts.size(s) for s in space.facts.val(n).shape)


def broadcast(space: Space, sizes: tuple[Any, ...], target: tuple[Any, ...], index: Index) -> Index | None:
    """The index into a tensor of ``sizes`` that broadcasts to ``target``."""
    skip = len(target) - len(sizes)
    return None if skip < 0 else _expanded(space, sizes, target[skip:], index[skip:])


def _expanded(space: Space, source: tuple[Any, ...], target: tuple[Any, ...], index: Index) -> Index | None:
    found = []
    for s, t, i in zip(source, target, index, strict=True):
        if isinstance(s, int) and s == 1:
            found.append(ZERO)
        elif space.same(s, t):
            found.append(i)
        else:
            return None
    return tuple(found)


def reshaped(space: Space, source: tuple[Any, ...], target: tuple[Any, ...], index: Index) -> Index | None:
    """Row-major reshape from ``source`` to ``target``: axes that agree are kept, groups of axes go through their
    common linear index, which is taken apart again where it can be divided.
    """
    found: list[Affine] = [ZERO] * len(source)
    mine = [d for d, s in enumerate(source) if s != 1]
    theirs = [d for d, s in enumerate(target) if s != 1]
    while mine and theirs:
        if space.same(source[mine[0]], target[theirs[0]]):
            found[mine.pop(0)] = index[theirs.pop(0)]
            continue
        if space.same(source[mine[-1]], target[theirs[-1]]):
            found[mine.pop()] = index[theirs.pop()]
            continue
        break
    if not mine and not theirs:
        return tuple(found)
    sizes = [source[d] for d in mine] + [target[d] for d in theirs]
    if not mine or not theirs or not all(isinstance(s, int) for s in sizes[1 : len(mine)] + sizes[len(mine) + 1 :]):
        return None
    linear = ZERO
    for d in theirs:
        linear = linear.scaled(target[d] if d != theirs[0] else 1).plus(index[d])
    for d in reversed(mine[1:]):
        whole = space.quotient(linear, source[d])
        found[d] = linear.plus(whole, -source[d])
        linear = whole
    found[mine[0]] = linear
    return tuple(found)
