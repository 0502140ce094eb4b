"""Numbers that depend on index variables by cases: the value of one element of a tensor.

``Cases`` is ``((formula, leaf), ...)``: exactly one formula holds at each index, and the element is its leaf: an
``Affine`` integer, a float that is none (``-inf``, ``finfo.min``, 0.5), or an ``Element`` of an unknown float tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch

from .formula import FALSE, TRUE, AtMost, Formula, at_most, either, every, implies, negated
from .index_algebra import Affine, Element, Space, constant

Leaf = Affine | float | Element
Cases = tuple[tuple[Formula, Leaf], ...]
MOST = 6  # cases; a mask has two


def number_leaf(x: Any, dtype: torch.dtype) -> Leaf | None:
    """A Python number as it is stored in ``dtype``; None where it overflows (what was meant is anybody's guess)."""
    if isinstance(x, bool) or (isinstance(x, int) and abs(x) < 1 << 62):
        if not dtype.is_floating_point:
            return constant(int(x))
        x = float(x)
    if not isinstance(x, float) or not dtype.is_floating_point:
        return None
    stored = rounded(x, dtype)
    if math.isnan(stored) or (math.isinf(stored) and not math.isinf(x)):
        return None
    return leaf_of(stored)


def leaf_of(x: float) -> Leaf:
    """Whole numbers of moderate size as integers, so that there is one form of each."""
    return constant(int(x)) if abs(x) < 1 << 53 and x == int(x) else x


def rounded(x: float, dtype: torch.dtype) -> float:
    """``x`` in the precision of ``dtype``, round half to even, overflowing to infinity."""
    if dtype == torch.float64 or math.isinf(x) or math.isnan(x):
        return x
    try:
        if dtype == torch.float16:
            return float(struct.unpack("e", struct.pack("e", x))[0])
        single = float(struct.unpack("f", struct.pack("f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)
    if dtype != torch.bfloat16:
        return single
    (bits,) = struct.unpack("I", struct.pack("f", single))
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return float(struct.unpack("f", struct.pack("I", bits & 0xFFFFFFFF))[0])


def value_of(leaf: Leaf) -> float | int | None:
    """The leaf as one number, if it is one."""
    if isinstance(leaf, Affine):
        return leaf.number
    return leaf if isinstance(leaf, float) else None


def gathered(space: Space, cases: list[tuple[Formula, Leaf]]) -> Cases | None:
    """Cases with equal leaves joined, impossible ones dropped; None if there are too many."""
    found: dict[Leaf, Formula] = {}
    for f, leaf in cases:
        if f != FALSE:
            found[leaf] = f if leaf not in found else either(space, (found[leaf], f))
    if not found or len(found) > MOST:
        return None
    return tuple((f, leaf) for leaf, f in found.items())


def mapped(space: Space, fn: Callable[..., Leaf | None], *operands: Cases) -> Cases | None:
    """``fn`` of one leaf of each operand, in every combination that can be."""
    rows: list[tuple[Formula, tuple[Leaf, ...]]] = [(TRUE, ())]
    for cases in operands:
        rows = [(every(space, (f, g)), (*leaves, leaf)) for f, leaves in rows for g, leaf in cases]
        rows = [row for row in rows if row[0] != FALSE]
        if len(rows) > MOST * 4:
            return None
    found = []
    for f, leaves in rows:
        leaf = fn(*leaves)
        if leaf is None:
            return None
        found.append((f, leaf))
    return gathered(space, found)


def chosen(space: Space, condition: Formula, then: Cases, other: Cases) -> Cases | None:
    """``then`` where the condition holds, else ``other``; one case, where both agree in what they are chosen for."""
    if condition == TRUE:
        return then
    if condition == FALSE:
        return other
    if len(then) == len(other) == 1:
        a, b = then[0][1], other[0][1]
        if a == b:
            return then
        if isinstance(a, Affine) and isinstance(b, Affine):
            for where, keep in ((condition, other), (negated(condition), then)):
                if _equal_where(space, where, a, b):
                    return keep
    no = negated(condition)
    rows = [(every(space, (condition, f)), leaf) for f, leaf in then]
    return gathered(space, rows + [(every(space, (no, f)), leaf) for f, leaf in other])


def _equal_where(space: Space, where: Formula, a: Affine, b: Affine) -> bool:
    difference = a.plus(b, -1)
    if any(True for _ in difference.unknowns()):
        return False
    return implies(space, where, AtMost(difference)) and implies(space, where, AtMost(difference.scaled(-1)))


_NUMBERS: dict[str, Callable[[Any, Any], bool]] = {
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def compared(space: Space, how: str, a: Cases, b: Cases) -> Formula | None:
    """The formula of ``a <how> b`` for how in le, lt, ge, gt, eq, ne; None where it is not known."""
    rows: list[Formula] = []
    for f, left in a:
        for g, right in b:
            region = every(space, (f, g))
            if region == FALSE:
                continue
            relation = _relation(space, how, left, right)
            if relation is None:
                return None
            rows.append(either(space, (negated(region), relation)))
    return every(space, rows)


def _relation(space: Space, how: str, a: Leaf, b: Leaf) -> Formula | None:
    x, y = value_of(a), value_of(b)
    if x is not None and y is not None:
        return TRUE if _NUMBERS[how](x, y) else FALSE
    if not (isinstance(a, Affine) and isinstance(b, Affine)):
        for infinite, sign in ((x, 1), (y, -1)):  # integers are finite
            if isinstance(infinite, float) and math.isinf(infinite) and not isinstance(a if sign < 0 else b, Element):
                return TRUE if _NUMBERS[how](sign * infinite, 0) else FALSE
        return None
    d = a.plus(b, -1)
    if how in ("eq", "ne"):
        equal = every(space, (at_most(space, d), at_most(space, d.scaled(-1))))
        return equal if how == "eq" else negated(equal)
    if set(a.unknowns()) | set(b.unknowns()) != set(d.unknowns()):
        return None  # numbers of any size would cancel: only true as long as none of the sums overflows
    if how in ("ge", "gt"):
        d = d.scaled(-1)
    return at_most(space, d.shift(1) if how in ("lt", "gt") else d)
