"""q, k and v of an attention: four axes each, grouped heads found behind repeat_kv, transposes undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from .._calls import LAYOUT, arg, aten, convert, dtype, is_call, lossless, rank, refuse


@dataclass(frozen=True)
class Operand:
    """How to get [B, H, S, D] from ``node``: ``swap`` the last two axes, ``ungroup`` the heads, add a head axis.

    ``groups`` is (source, axes of the source in the order B, H, S, D): the tensor in front of the ``expand`` that
    repeats its heads, so that k and v keep their few heads.
    """

    node: fx.Node
    swap: bool = False
    groups: tuple[fx.Node, tuple[int, ...]] | None = None


def find_operand(facts: Facts, n: fx.Node, *, swap: bool = False, grouped: bool = False) -> Operand:
    """``n`` as an operand; ``swap`` if its last two axes are exchanged; ``grouped`` to look behind repeat_kv."""
    return Operand(n, swap, _grouped(facts, n, swap) if grouped and rank(facts, n) == 4 else None)


def heads(facts: Facts, o: Operand) -> Any:
    """The number of heads that the operand will have; 1 for an operand of three axes."""
    if o.groups is not None:
        source, order = o.groups
        return facts.val(source).shape[order[1]]
    shape = facts.val(o.node).shape
    return shape[1] if len(shape) == 4 else 1


def sizes(facts: Facts, n: fx.Node, swap: bool) -> tuple[Any, Any, Any]:
    """(B, S, D) of an operand node."""
    shape = list(facts.val(n).shape)
    s, d = (shape[-1], shape[-2]) if swap else (shape[-2], shape[-1])
    return shape[0], s, d


def emit(b: Builder, o: Operand, target: torch.dtype) -> fx.Node:
    """The operand as [B, H, S, D] in dtype ``target`` (which it has, but for lossless upcasts that are left out)."""
    if o.groups is not None:
        n, order = o.groups
        extra = [d for d in range(n.meta["val"].dim()) if d not in order]
        if extra:  # axes of size one, wherever they are
            shape = [n.meta["val"].shape[d] for d in sorted(order)]
            n = b.op(aten.reshape.default, n, shape)
        n = _permuted(b, n, [sorted(order).index(d) for d in order])
    else:
        n = o.node
        dims = n.meta["val"].dim()
        if o.swap:
            n = _permuted(b, n, [*range(dims - 2), dims - 1, dims - 2])
        if dims == 3:
            batch, s, d = n.meta["val"].shape
            n = b.op(aten.reshape.default, n, [batch, 1, s, d])
    return n if n.meta["val"].dtype == target else b.op(convert, n, target)


def common_dtype(facts: Facts, q: fx.Node, k: fx.Node, v: fx.Node) -> torch.dtype | NoMatch:
    """The dtype in which attention runs: v's. q and k may be lossless upcasts from it."""
    target = dtype(facts, v)
    for name, n in (("q", q), ("k", k)):
        if dtype(facts, n) != target and not _holds(facts, n, target):
            found = f"{name} in {dtype(facts, n)}, v in {target}"
            return refuse(facts, "dtype", n, "q, k and v of one dtype", found, 0.8, "cast q, k and v alike")
    return target


def _holds(facts: Facts, n: fx.Node, narrow: torch.dtype) -> bool:
    """True if every element of ``n`` is a value of ``narrow``: it was upcast from it, whatever layout followed."""
    while is_call(n, *LAYOUT):
        n = arg(n, 0)
    return is_call(n, convert) and dtype(facts, arg(n, 0)) == narrow and lossless(narrow, dtype(facts, n))


def _permuted(b: Builder, n: fx.Node, dims: list[int]) -> fx.Node:
    return n if dims == list(range(len(dims))) else b.op(aten.permute.default, n, dims)


def _grouped(facts: Facts, n: fx.Node, swap: bool) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The source in front of the expand that repeats the heads of ``n`` [B, H, S, D], and where B, H, S, D are in it.

    Only ``head * copies`` (consecutive heads share one key head, torch's repeat_interleave) is grouped attention.
    """
    _, labels = facts.axes(n)
    order = [labels[0], labels[1], labels[3], labels[2]] if swap else list(labels)
    if not order[1].endswith("x0") or any("x" in label for i, label in enumerate(order) if i != 1):
        return None
    kept = order[1].removesuffix("x0").removesuffix("*")
    if "x" in kept:
        return None
    source = n
    while not is_call(source, aten.expand.default):
        if not is_call(source, aten.permute.default, aten.reshape.default):
            return None
        source = arg(source, 0)  # type: ignore[assignment]
    source = arg(source, 0)  # type: ignore[assignment]
    _, inner = facts.axes(source)
    if any("x" in label for label in inner):
        return None
    where = [inner.index(label) if label in inner else -1 for label in (order[0], order[2], order[3])]
    if -1 in where or len(set(where)) < 3:
        return None
    rest = [i for i in range(len(inner)) if i not in where]
    shape = facts.val(source).shape
    head = inner.index(kept) if kept in inner else next((i for i in rest if facts.known(shape[i] == 1)), -1)
    spare = [i for i in rest if i != head]
    if head < 0 or not all(facts.known(shape[i] == 1) for i in spare):
        return None
    return source, (where[0], head, where[1], where[2])
