"""Reading a hand-written RMSNorm: up from the reciprocal root to the input, down from the product to the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arg, arguments, aten, commuted, convert, dtype, is_call, lossless, number, rank, refuse


@dataclass
class Statistic:
    """``root(mean(h * h) + eps)``: the ``h`` in it, whether each step is the reference's own, and the calls."""

    h: fx.Node
    eps: float
    ndim: int
    exact: bool
    nodes: list[fx.Node]


@dataclass
class Weighted:
    """What follows the normalised ``n``: the weight and where it enters, and the last call."""

    last: fx.Node
    weight: fx.Node | None = None
    offset: float = 0.0
    cast_first: bool = False
    nodes: list[fx.Node] = field(default_factory=list)


def statistic(facts: Facts, root: fx.Node) -> Statistic | NoMatch:
    """Read ``root(mean(h * h, last axes, keepdim) + eps)``, ``root`` being rsqrt or sqrt."""
    inner = arg(root, 0)
    if not is_call(inner, aten.add.Tensor):
        return refuse(facts, "op", root, "the root of mean(x * x) + eps", "the root of something else")
    found = next(((m, number(e)) for m, e in commuted(inner) if isinstance(m, fx.Node) and number(e) is not None), None)
    if found is None or arguments(inner)["alpha"] != 1:
        return refuse(facts, "arg", inner, "eps as a number", "a tensor", 0.2, "pass eps as a Python number")
    mean, eps = found
    assert eps is not None
    nodes, exact = [root, inner, mean], True
    if not is_call(mean, aten.mean.dim):
        total = _mean_by_sum(facts, mean)
        if total is None:
            return refuse(facts, "op", mean, "the mean of x * x", f"{mean.target}", 0.3)
        nodes.append(total)
        mean, exact = total, False
    call = arguments(mean)
    square, dims = call["self"], call["dim"] or ()
    ndim = len(dims)
    axes = rank(facts, square)
    if sorted(d % axes for d in dims) != list(range(axes - ndim, axes)) or not call["keepdim"]:
        found_dims = f"dim={list(dims)}, keepdim={call['keepdim']}"
        return refuse(facts, "arg", mean, "a mean over the last axes, kept", found_dims, 0.4)
    if call["dtype"] not in (None, dtype(facts, square)):
        return refuse(facts, "dtype", mean, "a mean in the dtype of x * x", f"dtype={call['dtype']}", 0.4)
    if not is_call(square, aten.mul.Tensor) or arg(square, 0) is not arg(square, 1):
        return refuse(facts, "op", mean, "the mean of x * x", "the mean of something else", 0.4)
    nodes.append(square)
    h = arg(square, 0)
    assert isinstance(h, fx.Node)
    return Statistic(h, eps, ndim, exact, nodes)


def _mean_by_sum(facts: Facts, n: fx.Node) -> fx.Node | None:
    """The sum in ``sum(x, dims) / N``, N the number of elements summed."""
    if not is_call(n, aten.div.Tensor, aten.mul.Tensor):
        return None
    total, factor = arg(n, 0), number(arg(n, 1))
    if factor is None or not is_call(total, aten.sum.dim_IntList) or arguments(n).get("rounding_mode") is not None:
        return None
    call = arguments(total)
    sizes = [facts.val(call["self"]).shape[d] for d in call["dim"] or ()]
    if not sizes or not all(isinstance(s, int) for s in sizes):
        return None
    count = math.prod(sizes)
    by = factor if is_call(n, aten.div.Tensor) else 1.0 / factor if factor else 0.0
    return total if math.isclose(by, count, rel_tol=1e-12) else None


def weighted(facts: Facts, n: fx.Node, x: torch.dtype, sizes: tuple[Any, ...]) -> Weighted:
    """Follow the only user of ``n`` through casts and the product with a weight [*sizes], as far as it goes."""
    compute = dtype(facts, n)
    best = Weighted(n)
    cast = _only(n, convert)
    if cast is not None and dtype(facts, cast) == x:
        best = Weighted(cast, nodes=[cast])
        product = _product(facts, cast, sizes)
        if product is not None:
            node, weight, offset, inner = product
            return Weighted(node, weight, offset, True, [cast, node, *inner])
        return best
    product = _product(facts, n, sizes)
    if product is None:
        return best
    node, weight, offset, inner = product
    if dtype(facts, node) != compute:
        return best
    found = Weighted(node, weight, offset, False, [node, *inner])
    cast = _only(node, convert)
    if cast is not None and x != compute and dtype(facts, cast) == x:
        found.last = cast
        found.nodes.append(cast)
    return found


def _only(n: fx.Node, target: Any) -> fx.Node | None:
    user = next(iter(n.users)) if len(n.users) == 1 else None
    return user if is_call(user, target) else None


def _product(
    facts: Facts, n: fx.Node, sizes: tuple[Any, ...]
) -> tuple[fx.Node, fx.Node, float, tuple[fx.Node, ...]] | None:
    """(product, weight, offset, calls on the weight) if the only user of ``n`` is ``n * (offset + weight)``."""
    node = _only(n, aten.mul.Tensor)
    if node is None:
        return None
    factor = next((w for y, w in commuted(node) if y is n), None)
    if not isinstance(factor, fx.Node) or factor is n or not _is_vector(facts, factor, sizes):
        return None
    weight, offset, calls = factor, 0.0, []
    if is_call(factor, aten.add.Tensor) and arguments(factor)["alpha"] == 1:
        for w, c in commuted(factor):
            value = number(c)
            if isinstance(w, fx.Node) and value is not None and _is_vector(facts, w, sizes):
                weight, offset, calls = w, value, [factor]
                break
    # A cast of the weight to the dtype of the product is what the product does anyway.
    if is_call(weight, convert) and dtype(facts, weight) == dtype(facts, n):
        source = arg(weight, 0)
        assert isinstance(source, fx.Node)
        if lossless(dtype(facts, source), dtype(facts, weight)):
            calls.append(weight)
            weight = source
    if calls and offset and dtype(facts, factor) != dtype(facts, n):
        return None
    # What the weight is made of may serve other norms too; then it stays.
    inner = tuple(c for i, c in enumerate(calls) if all(u is node or u in calls[:i] for u in c.users))
    return node, weight, offset, inner


def _is_vector(facts: Facts, n: fx.Node, sizes: tuple[Any, ...]) -> bool:
    shape = facts.val(n).shape
    return len(shape) == len(sizes) and all(facts.known(s == t) for s, t in zip(shape, sizes, strict=True))
