"""Which axis of a value is which axis of its source, seen through permute, reshape, expand and full slices.

Labels. ``dI`` is axis I of the source. Where reshapes split it, ``dI.K`` is its K-th piece, outer to inner. ``A*B`` is
one axis made of A (outer) and B (inner). ``xJ`` is the J-th axis made by an expand (copies of the same data), and
``1`` an axis of size one that holds no axis of the source. So, from a linear's output ``[B, S, H*D]``,

    BSHD heads   reshape [B,S,H,D]                       ("d0", "d1", "d2.0", "d2.1")
    BHSD heads   reshape, permute [B,H,S,D]              ("d0", "d2.0", "d1", "d2.1")
    flattened    reshape [B*S, H*D]                      ("d0*d1", "d2")
    repeat_kv    [B,Hk,S,D] expand, reshape [B,Hk*G,S,D] ("d0", "d1*x0", "d2", "d3")   G consecutive heads share one
    tiled heads  the copies outside                      ("d0", "x0*d1", "d2", "d3")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ascend_dynamo.ir.sym import expr, known_eq

_aten = torch.ops.aten
_BROADCAST = -1


@dataclass(frozen=True)
class Atom:
    """A piece of an axis: ``axis`` of the source (or of an expand, for ``axis`` < 0), ``path`` orders the pieces."""

    axis: int
    size: Any
    path: tuple[int, ...] = ()


Axes = tuple[tuple[Atom, ...], ...]


def trace_axes(n: fx.Node) -> tuple[fx.Node, Axes]:
    """The source of ``n`` and, per axis of ``n``, the pieces of source axes that it is made of, outer to inner.

    A layout op that cannot be followed (a partial slice, sizes that are not known to divide) is itself the source.
    """
    chain: list[fx.Node] = []
    node = n
    while _is_layout(node):
        chain.append(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    while True:
        axes = _follow(node, chain)
        if isinstance(axes, tuple):
            return node, axes
        node = chain[axes]
        chain = chain[:axes]


def axes(n: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """``trace_axes`` as labels (see the head of this file)."""
    source, traced = trace_axes(n)
    pieces: dict[int, list[tuple[int, ...]]] = {}
    copies: list[int] = []
    for atom in (a for axis in traced for a in axis):
        if atom.axis < 0 and atom.axis not in copies:
            copies.append(atom.axis)
        pieces.setdefault(atom.axis, []).append(atom.path)
    order = {axis: sorted(paths) for axis, paths in pieces.items()}
    copies.sort(reverse=True)
    return source, tuple(_label(axis, order, copies) for axis in traced)


def _label(axis: tuple[Atom, ...], order: dict[int, list[tuple[int, ...]]], copies: list[int]) -> str:
    parts: list[str] = []
    i = 0
    while i < len(axis):
        atom = axis[i]
        whole = order[atom.axis]
        name = f"x{copies.index(atom.axis)}" if atom.axis < 0 else f"d{atom.axis}"
        run = axis[i : i + len(whole)]
        if [(a.axis, a.path) for a in run] == [(atom.axis, path) for path in whole]:
            parts.append(name)
            i += len(whole)
        else:
            parts.append(f"{name}.{whole.index(atom.path)}")
            i += 1
    return "*".join(parts) or "1"


def _is_layout(n: fx.Node) -> bool:
    if n.op != "call_function":
        return False
    if n.target in (_aten.permute.default, _aten.reshape.default, _aten.expand.default):
        return True
    return n.target is _aten.slice.Tensor and _full_slice(n)


def _full_slice(n: fx.Node) -> bool:
    source = n.args[0]
    assert isinstance(source, fx.Node)
    dim: Any = n.args[1] if len(n.args) > 1 else 0
    step: Any = n.args[4] if len(n.args) > 4 else 1
    return step == 1 and known_eq(n.meta["val"].shape[dim], source.meta["val"].shape[dim])


def _follow(source: fx.Node, chain: list[fx.Node]) -> Axes | int:
    """The axes behind ``chain`` (last element first), or the index of the layout op that cannot be followed."""
    state: list[list[Atom]] = [[Atom(i, expr(s))] for i, s in enumerate(source.meta["val"].shape)]
    copies = 0
    for i in range(len(chain) - 1, -1, -1):
        op = chain[i]
        shape = [expr(s) for s in op.meta["val"].shape]
        if op.target is _aten.permute.default:
            dims: Any = op.args[1]
            state = [state[d] for d in dims]
        elif op.target is _aten.expand.default:
            state = [[] for _ in range(len(shape) - len(state))] + state
            for d, size in enumerate(shape):
                if size != 1 and all(a.size == 1 for a in state[d]):
                    copies += 1
                    state[d] = [Atom(-copies, size)]
        elif op.target is _aten.reshape.default:
            split = _reshape(state, shape)
            if split is None:
                return i
            state = split
    return tuple(tuple(axis) for axis in state)


def _reshape(state: list[list[Atom]], shape: list[Any]) -> list[list[Atom]] | None:
    """Redistribute the pieces over ``shape``, splitting pieces where sizes divide; None if that cannot be shown."""
    flat = [a for axis in state for a in axis if a.size != 1]
    ones = [[a for a in axis if a.size == 1] for axis in state]
    result: list[list[Atom]] = []
    queue = flat[::-1]
    for size in shape:
        taken: list[Atom] = []
        rest = size
        while rest != 1:
            if not queue:
                return None
            atom = queue.pop()
            if atom.size == rest:
                taken.append(atom)
                break
            smaller = _divide(rest, atom.size)
            if smaller is not None:
                taken.append(atom)
                rest = smaller
                continue
            inner = _divide(atom.size, rest)
            if inner is None:
                return None
            taken.append(Atom(atom.axis, rest, (*atom.path, 0)))
            queue.append(Atom(atom.axis, inner, (*atom.path, 1)))
            break
        result.append(taken)
    if queue:
        return None
    # Axes of size one carry no data: give each source axis of size one back to an axis of size one, in order.
    spare = [one for axis in ones for one in axis]
    for axis in result:
        if not axis and spare:
            axis.append(spare.pop(0))
    return result


def _divide(a: Any, b: Any) -> Any | None:
    """a / b if that is known to be a whole size, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    _, denominator = quotient.as_numer_denom()
    if denominator != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient
