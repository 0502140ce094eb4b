"""Small constant tensors read as functions of their indices: what normalisation has folded (up to 64 elements)."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .formula import TRUE, Formula, at_most, every
from .index_algebra import Affine, constant
from .index_layout import Index

if TYPE_CHECKING:
    from .index_values import Evaluator


def read_table(ev: Evaluator, n: fx.Node, numbers: tuple[Any, ...], index: Index) -> Any:
    """An element of a constant: one value, an affine function of the indices, or two values, one of them in a band
    ``low <= column - row <= high`` (or ``low <= column <= high``). None if it is none of these.
    """
    sizes = tuple(ev.facts.val(n).shape)
    table = dict(zip(product(*(range(s) for s in sizes)), numbers, strict=True))
    for d, i in enumerate(index):  # positions that are known
        if i.number is not None:
            table = {k: v for k, v in table.items() if k[d] == i.number % max(sizes[d], 1)}
    if not table:
        return None
    active = [d for d in range(len(sizes)) if _varies(table, d)]
    reduced: dict[tuple[int, ...], Any] = {}
    for k, v in table.items():
        reduced.setdefault(tuple(k[d] for d in active), v)
    values = sorted(set(reduced.values()))
    if len(values) == 1:
        return ev.filled(n, values[0])
    where = [index[d] for d in active]
    if ev.facts.val(n).dtype != torch.bool and (line := _affine(reduced, where)) is not None:
        return ((TRUE, line),)
    if len(values) == 2 and len(active) <= 2:
        for inside, outside in (values, values[::-1]):
            band = _band(ev, {k for k, v in reduced.items() if v == inside}, set(reduced), where)
            if band is not None:
                return ev.choose(n, band, ev.filled(n, inside), ev.filled(n, outside))
    return None


def _varies(table: dict[tuple[int, ...], Any], d: int) -> bool:
    first: dict[tuple[int, ...], Any] = {}
    return any(first.setdefault((*k[:d], *k[d + 1 :]), v) != v for k, v in table.items())


def _affine(table: dict[tuple[int, ...], Any], where: list[Affine]) -> Affine | None:
    """``sum(slope * index) + base`` with whole numbers, if that is the whole table."""
    if any(v != v or v in (float("inf"), -float("inf")) or v != int(v) for v in table.values()):
        return None
    origin = min(table)
    base = int(table[origin])
    slopes = []
    for d in range(len(where)):
        step = tuple(x + (e == d) for e, x in enumerate(origin))
        if step not in table:
            return None
        slopes.append(int(table[step]) - base)
    base -= sum(s * x for s, x in zip(slopes, origin, strict=True))
    if any(int(v) != base + sum(s * x for s, x in zip(slopes, k, strict=True)) for k, v in table.items()):
        return None
    line = constant(base)
    for slope, i in zip(slopes, where, strict=True):
        line = line.plus(i, slope)
    return line


def _band(
    ev: Evaluator, inside: set[tuple[int, ...]], everywhere: set[tuple[int, ...]], where: list[Affine]
) -> Formula | None:
    """``low <= column (- row) <= high``, if it holds exactly ``inside``."""

    def distance(k: tuple[int, ...]) -> int:
        return k[-1] - (k[0] if len(k) == 2 else 0)

    low, high = min(map(distance, inside)), max(map(distance, inside))
    if inside != {k for k in everywhere if low <= distance(k) <= high}:
        return None
    a = where[-1] if len(where) == 1 else where[-1].plus(where[0], -1)
    parts = [at_most(ev.space, a.shift(-high)), at_most(ev.space, a.scaled(-1).shift(low))]
    # a bound that no element of the table crosses says nothing
    ends = [max(map(distance, everywhere)) <= high, min(map(distance, everywhere)) >= low]
    return every(ev.space, (p for p, idle in zip(parts, ends, strict=True) if not idle))
