"""What a token gives to expert e of a loop, [.., 1]: the weights of its slots whose id is e.

Spelled ``(weights * (ids == e)).sum(-1)``, ``where(ids == e, weights, 0).sum(-1)``, or as column e of a matrix [T, E]:
``zeros.scatter(-1, ids, weights)`` or ``(one_hot(ids, E) * weights[..., None]).sum(-2)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from ._calls import arg, arguments, aten, commuted, convert, dtype, is_call, number, rank, same_shape

ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FULL = (aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Share:
    """``casts``: the dtypes through which the weights go, in order. ``distinct``: right only if no id comes twice."""

    expert: int
    ids: fx.Node
    weights: fx.Node
    casts: tuple[torch.dtype, ...]
    distinct: bool
    nodes: tuple[fx.Node, ...]


def looks_like_share(facts: Facts, n: Any) -> bool:
    """A cheap test, before the expensive ones: [.., 1] made of a sum, a slice or an index."""
    if not isinstance(n, fx.Node) or n.op != "call_function":
        return False
    shape: Any = getattr(facts.val(n), "shape", ())
    if len(shape) < 2 or not (isinstance(shape[-1], int) and shape[-1] == 1):
        return False
    while is_call(n, aten.reshape.default, convert):
        n = arg(n, 0)
    return is_call(n, aten.sum.dim_IntList, aten.slice.Tensor, aten.index.Tensor)


def strip(facts: Facts, n: Any) -> tuple[Any, tuple[torch.dtype, ...], list[fx.Node]]:
    """(``n`` without reshapes and casts, the casts' dtypes in the order in which they happen, the calls)."""
    casts: list[torch.dtype] = []
    nodes: list[fx.Node] = []
    while is_call(n, aten.reshape.default, convert):
        nodes.append(n)
        if n.target is convert:
            casts.insert(0, dtype(facts, n))
        n = arg(n, 0)
    return n, tuple(casts), nodes


def read_share(facts: Facts, n: Any) -> Share | None:
    n, casts, nodes = strip(facts, n)
    if is_call(n, aten.sum.dim_IntList) and _sums(facts, n, -1):
        for weights, hit, more in _masked(facts, arg(n, 0)):
            one = read_hit(facts, hit)
            if one is not None and same_shape(facts, one[1], weights) and same_shape(facts, weights, arg(n, 0)):
                e, ids, inner = one
                return Share(e, ids, weights, casts, False, (*nodes, n, *more, *inner))
        return None
    if not is_call(n, aten.slice.Tensor):
        return None
    call = arguments(n)
    matrix, axis, e, count = call["self"], call["dim"] % rank(facts, n), call["start"], facts.val(n).shape
    if not isinstance(e, int) or not isinstance(count[axis], int) or count[axis] != 1:
        return None
    nodes.append(n)
    if is_call(matrix, aten.permute.default) and rank(facts, matrix) == 2:
        nodes.append(matrix)
        matrix, axis = arg(matrix, 0), arg(matrix, 1)[axis]
    if axis != rank(facts, matrix) - 1:
        return None
    found = _matrix(facts, matrix)
    if found is None:
        return None
    ids, weights, inner_casts, distinct, inner = found
    return Share(e, ids, weights, (*inner_casts, *casts), distinct, (*nodes, *inner))


def read_hit(facts: Facts, n: Any) -> tuple[int, fx.Node, tuple[fx.Node, ...]] | None:
    """(e, ids, calls) of ``ids == e`` as booleans or numbers."""
    nodes: tuple[fx.Node, ...] = ()
    if is_call(n, convert):
        nodes, n = (n,), arg(n, 0)
    if not is_call(n, aten.eq.Scalar) or dtype(facts, arg(n, 0)) not in _INTEGERS:
        return None
    e = arg(n, 1)
    whole = isinstance(e, int) and not isinstance(e, bool) and e >= 0
    return (e, arg(n, 0), (*nodes, n)) if whole else None


def read_one_hot(facts: Facts, n: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(ids [.., k], calls) of ``ids[..., None] == arange(E)`` as booleans or numbers."""
    nodes: tuple[fx.Node, ...] = ()
    if is_call(n, convert):
        nodes, n = (n,), arg(n, 0)
    if not is_call(n, aten.eq.Tensor):
        return None
    for column, numbers in commuted(n):
        from_zero = is_call(numbers, aten.arange.default) or (
            is_call(numbers, aten.arange.start, aten.arange.start_step)
            and arguments(numbers)["start"] == 0
            and arguments(numbers).get("step", 1) == 1
        )
        ids = last_axis_added(facts, column)
        if from_zero and ids is not None and rank(facts, numbers) == 1 and dtype(facts, ids) in _INTEGERS:
            return ids, (*nodes, n, numbers, column)
    return None


def last_axis_added(facts: Facts, n: Any) -> fx.Node | None:
    """x if ``n`` is ``x[..., None]``."""
    if not is_call(n, aten.reshape.default):
        return None
    source: fx.Node = arg(n, 0)
    shape, inner = facts.val(n).shape, facts.val(source).shape
    if len(shape) != len(inner) + 1 or not (isinstance(shape[-1], int) and shape[-1] == 1):
        return None
    return source if all(facts.known(a == b) for a, b in zip(shape, inner, strict=False)) else None


def is_zero(facts: Facts, n: Any) -> bool:
    """True if every element is the number 0."""
    if is_call(n, *ZEROS):
        return True
    if is_call(n, *_FULL):
        value = arg(n, 0 if n.target is aten.scalar_tensor.default else 1)
        return number(value) == 0
    return number(n) == 0


def _sums(facts: Facts, n: fx.Node, axis: int) -> bool:
    call = arguments(n)
    axes = rank(facts, call["self"])
    return call["dtype"] is None and [d % axes for d in call["dim"] or ()] == [axes + axis]


def _masked(facts: Facts, n: Any) -> list[tuple[fx.Node, Any, tuple[fx.Node, ...]]]:
    """(weights, where they count, calls) of weights that are 0 elsewhere."""
    if is_call(n, aten.mul.Tensor):
        return [(w, hit, (n,)) for w, hit in commuted(n) if isinstance(w, fx.Node) and isinstance(hit, fx.Node)]
    if is_call(n, aten.where.self) and is_zero(facts, arg(n, 2)):
        return [(arg(n, 1), arg(n, 0), (n, arg(n, 2)))]
    return []


Matrix = tuple[fx.Node, fx.Node, tuple[torch.dtype, ...], bool, tuple[fx.Node, ...]]


def _matrix(facts: Facts, n: Any) -> Matrix | None:
    """(ids, weights, casts, whether ids must differ, calls) of the matrix of all weights [.., E]."""
    casts: list[torch.dtype] = []
    nodes: list[fx.Node] = []
    while is_call(n, convert):
        casts.insert(0, dtype(facts, n))
        nodes.append(n)
        n = arg(n, 0)
    if is_call(n, aten.scatter.src):
        zeros, axis, ids, weights = (arg(n, i) for i in range(4))
        last = rank(facts, n) - 1
        lead = zip(facts.val(n).shape[:-1], facts.val(ids).shape[:-1], strict=False)
        whole = same_shape(facts, ids, weights) and all(facts.known(a == b) for a, b in lead)
        if whole and is_zero(facts, zeros) and axis in (-1, last) and rank(facts, ids) == last + 1:
            return ids, weights, tuple(casts), True, (*nodes, n, zeros)
    if is_call(n, aten.sum.dim_IntList) and _sums(facts, n, -2):
        for column, hot, more in _masked(facts, arg(n, 0)):
            found, weights = read_one_hot(facts, hot), last_axis_added(facts, column)
            if found is not None and weights is not None and same_shape(facts, found[0], weights):
                return found[0], weights, tuple(casts), False, (*nodes, n, *more, *found[1], column)
    return None
