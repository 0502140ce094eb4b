"""Propositions about indices: what a boolean mask says at (b, h, i, j), simplified as far as it can be proven.

A formula is ``Truth``, an inequality ``AtMost(a)``: a <= 0, an element of an unknown boolean tensor (``Given``), or
``All`` / ``Some`` of others. Simplification is exact for every index in the ``Space``. ``origin`` names a boolean node
of the graph that holds the formula's value in a shape that broadcasts to the scores (with False: holds its negation).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from torch import fx

from .index_algebra import Affine, Element, Space

Origin = tuple[fx.Node, bool]


@dataclass(frozen=True)
class Formula:
    origin: Origin | None = field(default=None, compare=False, kw_only=True)


@dataclass(frozen=True)
class Truth(Formula):
    value: bool


@dataclass(frozen=True)
class AtMost(Formula):
    """``a <= 0``."""

    a: Affine


@dataclass(frozen=True)
class Given(Formula):
    """An element of a boolean tensor of unknown values, or its negation."""

    element: Element
    value: bool = True


@dataclass(frozen=True)
class All(Formula):
    parts: tuple[Formula, ...]


@dataclass(frozen=True)
class Some(Formula):
    parts: tuple[Formula, ...]


TRUE, FALSE = Truth(True), Truth(False)


def negated(f: Formula) -> Formula:
    origin = None if f.origin is None else (f.origin[0], not f.origin[1])
    if isinstance(f, Truth):
        return FALSE if f.value else TRUE
    if isinstance(f, AtMost):
        return AtMost(f.a.scaled(-1).shift(1), origin=origin)
    if isinstance(f, Given):
        return Given(f.element, not f.value, origin=origin)
    assert isinstance(f, (All, Some))
    parts = tuple(negated(p) for p in f.parts)
    return Some(parts, origin=origin) if isinstance(f, All) else All(parts, origin=origin)


def held_by(f: Formula, node: fx.Node) -> Formula:
    """``f`` with ``node`` as its origin, unless it has one (deeper in the graph, so smaller)."""
    return f if f.origin is not None or isinstance(f, Truth) else replace(f, origin=(node, True))


def at_most(space: Space, a: Affine) -> Formula:
    """``a <= 0``."""
    if space.never_positive(a):
        return TRUE
    return FALSE if space.always_positive(a) else AtMost(a)


def implies(space: Space, f: Formula, g: Formula) -> bool:
    """True if ``g`` holds wherever ``f`` does, by simple reasons."""
    if g == TRUE or f in (FALSE, g):
        return True
    if isinstance(f, All) and any(implies(space, p, g) for p in f.parts):
        return True
    if isinstance(g, Some) and any(implies(space, f, p) for p in g.parts):
        return True
    if not (isinstance(f, AtMost) and isinstance(g, AtMost)) or any(True for _ in f.a.unknowns()):
        return False  # unknown numbers that cancel may be so large that one of the sums overflows
    return space.never_positive(g.a.plus(f.a, -1))


def excludes(space: Space, f: Formula, g: Formula) -> bool:
    """True if ``f`` and ``g`` never hold together, by simple reasons."""
    return implies(space, f, negated(g))


def every(space: Space, parts: Iterable[Formula]) -> Formula:
    """The conjunction."""
    flat: list[Formula] = []
    for p in parts:
        flat.extend(p.parts if isinstance(p, All) and _loose(p) else (p,))
    kept: list[Formula] = []
    for p in flat:
        if p == FALSE:
            return FALSE
        if p == TRUE or any(implies(space, q, p) for q in kept):
            continue
        kept = [q for q in kept if not implies(space, p, q)]
        kept.append(p)
    for k, p in enumerate(kept):
        narrow = _within(space, p, kept[:k] + kept[k + 1 :])
        if narrow is not p:
            return every(space, [*kept[:k], narrow, *kept[k + 1 :]])
    if any(excludes(space, p, q) for p, q in combinations(kept, 2)):
        return FALSE
    if not kept:
        return TRUE
    return kept[0] if len(kept) == 1 else All(tuple(kept))


def _loose(p: All) -> bool:
    """True if taking ``p`` apart loses no node that holds a part of it."""
    return p.origin is None or all(q.origin is not None for q in p.parts)


def either(space: Space, parts: Iterable[Formula]) -> Formula:
    """The disjunction."""
    return negated(every(space, (negated(p) for p in parts)))


def _within(space: Space, p: Formula, others: list[Formula]) -> Formula:
    """``p`` where ``others`` hold: alternatives that they exclude are dropped."""
    if not isinstance(p, Some):
        return p
    if any(implies(space, q, part) for q in others for part in p.parts):
        return TRUE
    open_ = [part for part in p.parts if not any(excludes(space, q, part) for q in others)]
    if len(open_) == len(p.parts):
        return p
    if not open_:
        return FALSE
    return open_[0] if len(open_) == 1 else Some(tuple(open_))  # without p's origin: it differs where others fail


def unknowns(f: Formula) -> Iterator[Any]:
    """What a formula says about other things than index variables."""
    if isinstance(f, Given):
        yield f.element
    elif isinstance(f, AtMost):
        yield from f.a.unknowns()
    elif isinstance(f, (All, Some)):
        for p in f.parts:
            yield from unknowns(p)
