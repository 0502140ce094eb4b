"""What one mask of the graph says about query i and key j: proven bounds, and what is left over as operands.

A mask is a boolean tensor (True or False = visible), or a tensor that is added to the scores: 0 where a key is visible
(or a real bias), -inf or ``finfo.min`` where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .formula import FALSE, TRUE, All, AtMost, Formula, negated, unknowns
from .index_algebra import ZERO, Affine, Element
from .index_cases import Cases
from .index_values import Evaluator
from .mask_reasons import reason

Operand = tuple[fx.Node, bool]
# Fills that hide in every wider dtype too; float16's hides in float16 only.
WIDE = tuple(torch.finfo(d).min for d in (torch.float64, torch.float32, torch.bfloat16))


@dataclass(frozen=True)
class Level:
    """The scores that a mask meets: their sizes (``Facts.size``), and which of their axes are queries and keys.

    ``tag`` is the caller's: it tells levels of one shape apart.
    """

    shape: tuple[Any, ...]
    query: int = -2
    key: int = -1
    tag: Any = None

    @classmethod
    def of(cls, facts: Facts, shape: Iterable[Any], query: int = -2, key: int = -1, tag: Any = None) -> Level:
        return cls(tuple(facts.size(s) for s in shape), query, key, tag)

    def variables(self) -> tuple[int, int]:
        return self.query % len(self.shape), self.key % len(self.shape)


@dataclass(frozen=True)
class Bound:
    """``j <= i + offset`` (upper) or ``j >= i + offset``; ``offset`` is an int or a sympy expression of sizes.

    ``node`` is a boolean mask of the graph that implies the bound and is implied by the mask (with False: whose
    negation does), to be used where no flag says it; None if the graph has only an additive mask.
    """

    upper: bool
    offset: Any
    node: Operand | None = None


@dataclass(frozen=True)
class Length:
    """``j <= i + node + offset`` with ``node`` an integer tensor of one element: a cache filled up to a length.

    ``i + node + offset + 1`` keys are visible to query ``i``. The mask stays an operand; this is for attention over
    caches, which can take the length itself.
    """

    node: fx.Node
    offset: Any


@dataclass(frozen=True)
class Proof:
    """A key is visible iff all ``bounds`` hold and all ``operands`` (a mask, True if True keeps) say so.

    For an additive mask, ``fills`` are the values that hide, ``bias`` is what else it adds. ``why`` is one sentence
    about the operands, "" if there are none. ``lengths`` belong to operands. ``computed`` are the calls that were read.
    """

    bounds: tuple[Bound, ...] = ()
    operands: tuple[Operand, ...] = ()
    fills: frozenset[float] = frozenset()
    bias: fx.Node | None = None
    lengths: tuple[Length, ...] = ()
    why: str = ""
    computed: frozenset[fx.Node] = frozenset()


def prove(facts: Facts, mask: fx.Node, level: Level, keep: bool = True) -> Proof | str:
    """What is proven of a boolean mask (``keep``: True means visible) or of one that is added to the scores.

    A string says why nothing is: such a mask stays as it is. Remembered for each mask, since layers share it.
    """
    key = ("mask_proof", mask, level.shape, level.variables(), keep)
    found = facts.memo.get(key)
    if found is None or (isinstance(found, Proof) and not all(map(_alive, _nodes(found)))):
        found = facts.memo[key] = _Prover(facts, level).prove(mask, keep)
    return found  # type: ignore[no-any-return]


def _nodes(p: Proof) -> Iterator[fx.Node]:
    yield from (n for n, _ in p.operands)
    yield from (b.node[0] for b in p.bounds if b.node is not None)
    yield from (length.node for length in p.lengths)
    if p.bias is not None:
        yield p.bias


def _alive(n: fx.Node) -> bool:
    return n.prev.next is n


class _Prover:
    def __init__(self, facts: Facts, level: Level) -> None:
        self.facts = facts
        self.level = level
        self.ev = Evaluator(facts, level.shape)
        self.query, self.key = level.variables()
        self.bounds: list[Bound] = []
        self.operands: dict[Operand, None] = {}
        self.lengths: dict[Length, None] = {}
        self.why: list[str] = []

    def prove(self, mask: fx.Node, keep: bool) -> Proof | str:
        index = self._index(mask)
        if index is None:
            return f"%{mask.name} does not have the shape of the scores"
        if self.facts.val(mask).dtype == torch.bool:
            visible = self.ev.formula(mask, index)
            return self._solved(visible if keep else negated(visible))
        cases = self.ev.cases(mask, index)
        if cases is None or not self.facts.val(mask).dtype.is_floating_point:
            return f"%{mask.name} is no mask of 0 and -inf or finfo.min"
        return self._additive(mask, cases)

    def _additive(self, mask: fx.Node, cases: Cases) -> Proof | str:
        """0 or one real bias in some places, -inf or finfo.min in all others."""
        shown = [(f, leaf) for f, leaf in cases if not isinstance(leaf, float)]
        fills = frozenset(leaf for _, leaf in cases if isinstance(leaf, float))
        lowest = torch.finfo(self.facts.val(mask).dtype).min
        bad = [f for f in sorted(fills) if f not in (-math.inf, lowest, *WIDE)]
        if bad:
            return f"%{mask.name} adds {bad[0]}, which is neither -inf nor finfo.min"
        if len(shown) != 1:
            return f"%{mask.name} adds {'nothing but fills' if not shown else 'several kinds of values'}"
        ((visible, leaf),) = shown
        if leaf == ZERO:
            return self._solved(visible, fills)
        if isinstance(leaf, Element) and leaf.node is not mask and fills and self._aligned(leaf):
            return self._solved(visible, fills, leaf.node)
        return f"%{mask.name}: {reason(self.facts, leaf)}"

    def _solved(
        self, visible: Formula, fills: frozenset[float] = frozenset(), bias: fx.Node | None = None
    ) -> Proof | str:
        if visible == FALSE:
            return "it hides every key"
        if not self._solve(visible, visible.origin):
            return self.why[-1]
        why = self.why[0] if self.operands else ""
        bounds, operands, lengths = tuple(self.bounds), tuple(self.operands), tuple(self.lengths)
        return Proof(bounds, operands, fills, bias, lengths, why, self.ev.read)

    def _solve(self, f: Formula, within: Operand | None) -> bool:
        """Collect bounds and operands whose conjunction is ``f``; False, with nothing collected, if that cannot be.

        ``within`` holds ``f`` or a conjunction that ``f`` is a part of.
        """
        if f == TRUE:
            return True
        within = f.origin or within
        if isinstance(f, AtMost) and (bound := self._bound(f, within)) is not None:
            self.bounds.append(bound)
            return True
        if isinstance(f, All):
            saved = list(self.bounds), dict(self.operands), dict(self.lengths)
            if all([self._solve(p, within) for p in f.parts]):
                return True
            self.bounds, self.operands, self.lengths = saved
        self.why.append(self._why(f))
        if f.origin is None:
            return False
        self.operands[f.origin] = None
        if isinstance(f, AtMost) and (length := self._length(f.a)) is not None:
            self.lengths[length] = None
        return True

    def _bound(self, f: AtMost, node: Operand | None) -> Bound | None:
        terms = f.a.terms
        if self.ev.own[self.key] == ZERO:
            return None
        query = 0 if self.ev.own[self.query] == ZERO else 1
        if terms == ({self.key: 1, self.query: -1} if query else {self.key: 1}):
            return Bound(True, -f.a.const, node)
        if terms == ({self.key: -1, self.query: 1} if query else {self.key: -1}):
            return Bound(False, f.a.const, node)
        return None

    def _length(self, a: Affine) -> Length | None:
        unknown = [t for t in a.terms if isinstance(t, Element)]
        if len(unknown) != 1 or a.terms[unknown[0]] != -1:
            return None
        (element,) = unknown
        if any(i != ZERO for i in element.at) or any(s != 1 for s in self.facts.val(element.node).shape):
            return None
        rest = Affine({t: c for t, c in a.terms.items() if t != element}, 0)
        own = [Affine({v: 1}, 0) if self.ev.own[v] != ZERO else ZERO for v in (self.key, self.query)]
        return Length(element.node, -a.const) if rest == own[0].plus(own[1], -1) else None

    def _index(self, mask: fx.Node) -> tuple[Affine, ...] | None:
        """The scores' own index, broadcast to the mask."""
        sizes = [self.facts.size(s) for s in self.facts.val(mask).shape]
        skip = len(self.level.shape) - len(sizes)
        if skip < 0:
            return None
        found = []
        for size, own, full in zip(sizes, self.ev.own[skip:], self.ev.target[skip:], strict=True):
            if size != 1 and not self.ev.space.same(size, full):
                return None
            found.append(ZERO if size == 1 else own)
        return tuple(found)

    def _aligned(self, e: Element) -> bool:
        return self._index(e.node) == e.at

    def _why(self, f: Formula) -> str:
        unknown = next(unknowns(f), None)
        if unknown is not None:
            return reason(self.facts, unknown)
        if isinstance(f, AtMost):
            return "it compares indices otherwise than j <= i + c and j > i + c"
        return "it is an alternative of conditions" if not isinstance(f, All) else "one of its conditions is no bound"


__all__ = ["Bound", "Length", "Level", "Operand", "Proof", "prove"]
