"""Integers that depend on index variables, and when an inequality between them holds for every index.

``Affine`` is ``sum(coefficient * term) + constant``. A term is an index variable (an int: 0, 1, 2, ...), an ``Element``
of a tensor whose values nobody knows, or a ``Quotient``. Constants are ints or sympy expressions of symbolic sizes, and
are compared through ``Facts.known`` only. ``Space`` holds the range of each index variable.

Index arithmetic is taken not to overflow 32 and 64 bit integers where sizes are symbolic; where numbers are known, it
is checked (``Space.exact``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from ascend_dynamo.contracts import Facts


class Element(NamedTuple):
    """The element of tensor ``node`` at position ``at`` (one ``Affine`` per axis)."""

    node: fx.Node
    at: tuple[Affine, ...]


class Quotient(NamedTuple):
    """``floor(of / by)``."""

    of: Affine
    by: int


class Affine:
    """``sum(coefficient * term) + constant``; equal and hashed by value."""

    __slots__ = ("_hash", "const", "terms")

    def __init__(self, terms: dict[Any, int], const: Any) -> None:
        self.terms = {t: c for t, c in terms.items() if c}
        self.const = int(const) if isinstance(const, sympy.Integer) else const
        self._hash = hash((frozenset(self.terms.items()), self.const))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Affine) and self.terms == other.terms and self.const == other.const

    def __repr__(self) -> str:
        return " + ".join([*(f"{c}*{t}" for t, c in self.terms.items()), str(self.const)])

    @property
    def number(self) -> int | None:
        """The value, if it is one number."""
        return self.const if not self.terms and isinstance(self.const, int) else None

    def plus(self, other: Affine, times: int = 1) -> Affine:
        """``self + times * other``."""
        if not other.terms and not self.terms:
            return Affine({}, self.const + times * other.const)
        terms = dict(self.terms)
        for t, c in other.terms.items():
            terms[t] = terms.get(t, 0) + times * c
        return Affine(terms, self.const + times * other.const)

    def shift(self, by: Any) -> Affine:
        return Affine(self.terms, self.const + by)

    def scaled(self, by: int) -> Affine:
        return Affine({t: by * c for t, c in self.terms.items()}, self.const * by)

    def unknowns(self) -> Iterable[Any]:
        """The terms that are not index variables."""
        return (t for t in self.terms if not isinstance(t, int))


def constant(value: Any) -> Affine:
    return Affine({}, value)


def variable(v: int) -> Affine:
    return Affine({v: 1}, 0)


ZERO = constant(0)
_LIMITS = {torch.int64: 1 << 62, torch.int32: 1 << 30}
_PRECISION = {torch.float64: 1 << 53, torch.float32: 1 << 24, torch.float16: 1 << 11, torch.bfloat16: 1 << 8}


class Space:
    """The index variables with their sizes: variable ``v`` runs over 0 .. ``sizes[v] - 1``."""

    def __init__(self, facts: Facts, sizes: Iterable[Any]) -> None:
        self.facts = facts
        self.sizes = [facts.size(s) for s in sizes]
        self._signs: dict[Any, bool] = {}

    def fresh(self, size: Any) -> Affine:
        """A new index variable."""
        self.sizes.append(self.facts.size(size))
        return variable(len(self.sizes) - 1)

    def not_positive(self, e: Any) -> bool:
        """True if a constant is known to be <= 0."""
        if isinstance(e, int):
            return e <= 0
        found = self._signs.get(e)
        if found is None:
            relation = sympy.Le(e, 0)
            found = relation is sympy.true or (relation is not sympy.false and self.facts.known(relation))
            self._signs[e] = found
        return found

    def same(self, a: Any, b: Any) -> bool:
        """True if two constants are known to be equal."""
        d = a - b
        if isinstance(d, (int, sympy.Integer)):
            return d == 0
        return self.not_positive(d) and self.not_positive(-d)

    def highest(self, a: Affine) -> Any | None:
        """An upper bound over all indices, or None."""
        bound = a.const
        for t, c in a.terms.items():
            low, high = self._range(t)
            end = high if c > 0 else low
            if end is None:
                return None
            bound = bound + c * end
        return bound

    def lowest(self, a: Affine) -> Any | None:
        """A lower bound over all indices, or None."""
        bound = self.highest(a.scaled(-1))
        return None if bound is None else -bound

    def never_positive(self, a: Affine) -> bool:
        """True if ``a <= 0`` is known at every index."""
        bound = self.highest(a)
        return bound is not None and self.not_positive(bound)

    def always_positive(self, a: Affine) -> bool:
        """True if ``a > 0`` is known at every index."""
        return self.never_positive(a.scaled(-1).shift(1))

    def _range(self, term: Any) -> tuple[Any | None, Any | None]:
        if isinstance(term, int):
            return 0, self.sizes[term] - 1
        if isinstance(term, Quotient):
            low, high = self.lowest(term.of), self.highest(term.of)
            return tuple(e // term.by if isinstance(e, int) else None for e in (low, high))  # type: ignore[return-value]
        return None, None

    def exact(self, a: Affine, dtype: torch.dtype) -> bool:
        """True if ``a`` is a value of ``dtype`` at every index (for int32 and int64: if nothing speaks against it)."""
        low, high = self.lowest(a), self.highest(a)
        limit = _LIMITS.get(dtype)
        if limit is not None:
            ends = [e for e in (low, high, a.const) if isinstance(e, int)]
            return all(abs(e) < limit for e in ends) and all(abs(c) < 1 << 16 for c in a.terms.values())
        if not (isinstance(low, int) and isinstance(high, int)):
            return False
        if dtype in _PRECISION:
            return max(-low, high) <= _PRECISION[dtype]
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            return False
        info = torch.iinfo(dtype)
        return info.min <= low and high <= info.max

    def quotient(self, a: Affine, by: int) -> Affine:
        """``floor(a / by)`` for ``by > 0``."""
        whole = Affine({t: c // by for t, c in a.terms.items() if c % by == 0}, 0)
        rest = Affine({t: c for t, c in a.terms.items() if c % by}, a.const)
        if isinstance(rest.const, int):
            whole, rest = whole.shift(rest.const // by), rest.shift(-(rest.const // by) * by)
        if not rest.terms and rest.number is not None:
            return whole  # what is left lies in 0 .. by - 1
        if self.never_positive(rest.scaled(-1)) and self.never_positive(rest.shift(1 - by)):
            return whole
        low, high = self.lowest(rest), self.highest(rest)
        if isinstance(low, int) and isinstance(high, int) and low // by == high // by:
            return whole.shift(low // by)
        return whole.plus(Affine({Quotient(rest, by): 1}, 0))
