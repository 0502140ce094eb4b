"""Parts of an input's memory: paths of views from the whole of it, which can be compared, and emitted as views."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import sympy
import torch
from torch import fx

from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.ir.sym import expr, known, known_eq, same_shape

_aten = torch.ops.aten


class Step(NamedTuple):
    """``permute`` (its dims), ``reshape`` (the new shape) or ``slice`` (dim, start, end, step); sizes are values."""

    kind: Literal["permute", "reshape", "slice"]
    args: tuple[Any, ...]


Path = tuple[Step, ...]
_KINDS: dict[Any, Literal["permute", "reshape", "slice"]] = {
    _aten.permute.default: "permute",
    _aten.reshape.default: "reshape",
    _aten.slice.Tensor: "slice",
}


def step_of(n: fx.Node) -> Step | None:
    """The layout call ``n`` of the normal form as a step from its first argument; None if it is none."""
    kind = _KINDS.get(n.target) if n.op == "call_function" else None
    if kind is None or n.kwargs:
        return None
    args: Any = n.args[1:] if kind == "slice" else n.args[1]
    return Step(kind, tuple(value(a) for a in args)) if kind != "slice" or len(args) == 4 else None


def value(a: Any) -> Any:
    """The int or SymInt that a graph argument stands for."""
    return a.meta["val"] if isinstance(a, fx.Node) else a


def same_step(a: Step, b: Step) -> bool:
    return a.kind == b.kind and same_shape(a.args, b.args)


def back(n: fx.Node) -> Step:
    """The step from the value of the permute or reshape ``n`` to the value of its argument."""
    source: Any = n.args[0]
    if n.target is _aten.permute.default:
        dims: Any = n.args[1]
        return Step("permute", tuple(dims.index(i) for i in range(len(dims))))
    return Step("reshape", tuple(source.meta["val"].shape))


def contains(outer: Path, inner: Path) -> bool:
    """True if ``inner`` is known to be ``outer`` or a part of it."""
    return len(outer) <= len(inner) and all(same_step(a, b) for a, b in zip(outer, inner, strict=False))


def disjoint(a: Path, b: Path) -> bool:
    """True if two parts are known to have no element in common: they part at two slices of one axis."""
    for x, y in zip(a, b, strict=False):
        if same_step(x, y):
            continue
        if x.kind != "slice" or y.kind != "slice" or not known_eq(x.args[0], y.args[0]):
            return False
        return known(x.args[2] <= y.args[1]) or known(y.args[2] <= x.args[1])
    return False


def strided(whole: torch.Tensor, size: Any, stride: Any, offset: Any) -> Path | None:
    """``as_strided(whole, size, stride, offset)`` as a path that fixes the index of some axes; None if it is not one.

    A path, unlike an offset from the start of the storage, means the same wherever the memory lies.
    """
    axes: list[int] = []
    rest = list(range(whole.dim()))
    for n, s in zip(size, stride, strict=True):
        fits = [d for d in rest if known_eq(whole.shape[d], n) and known_eq(whole.stride(d), s)]
        if not fits or (axes and fits[0] < axes[-1]):
            return None
        axes.append(fits[0])
        rest.remove(fits[0])
    units = {d: expr(whole.stride(d)) for d in rest}
    left: Any = sympy.sympify(expr(offset)) - sympy.sympify(expr(whole.storage_offset()))
    path: list[Step] = []
    shape = list(whole.shape)
    smallest = units[rest[-1]] if rest else 1
    count = sympy.cancel(left / smallest)
    for d in rest:
        unit = sympy.cancel(sympy.sympify(units[d]) / smallest)
        if not (unit.is_Integer and count.is_Integer and unit > 0 and isinstance(shape[d], int)):
            return None
        index = int(count // unit)
        if not 0 <= index < shape[d]:
            return None
        count -= index * unit
        path.append(Step("slice", (d, index, index + 1, 1)))
        shape[d] = 1
    if count != 0:
        return None
    return (*path, Step("reshape", tuple(whole.shape[d] for d in axes))) if rest else ()


def view(path: Path, whole: torch.Tensor) -> torch.Tensor:
    """The part as a view of ``whole`` (a fake tensor). Raises RuntimeError where there is no such view."""
    for step in path:
        if step.kind == "permute":
            whole = whole.permute(step.args)
        elif step.kind == "reshape":
            whole = _aten.view.default(whole, list(step.args))
        else:
            whole = _aten.slice.Tensor(whole, *step.args)
    return whole


def emit(b: GraphBuilder, whole: fx.Node, path: Path) -> fx.Node:
    """The part as a view of the node ``whole``."""
    for step in path:
        if step.kind == "permute":
            whole = b.op(_aten.permute.default, whole, list(step.args))
        elif step.kind == "reshape":
            whole = b.op(_aten.view.default, whole, list(step.args))
        else:
            whole = b.op(_aten.slice.Tensor, whole, *step.args)
    return whole
