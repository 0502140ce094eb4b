"""The plan of an attention's terms with what is proven of its masks said by flags (``visible.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts

from .frame import Axes, Frame
from .groups import Groups
from .mask_proof import Level
from .terms import Plan, Term
from .visible import Added, Mask, Visible, as_flags, visibility


@dataclass(frozen=True)
class Flagged(Plan):
    """A plan that ``causal`` and ``window`` are a part of. ``why`` says why masks are still operands."""

    causal: str = "none"
    window: int = -1
    why: tuple[str, ...] = ()
    computed: frozenset[fx.Node] = frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to report: the assumptions, and why masks are still operands."""
        return (*self.assumes, *(f"a mask is still computed: {w}" for w in self.why if self.masks or self.biases))

    @property
    def options(self) -> dict[str, Any]:
        """The flags as arguments of ``flash_attention``."""
        return {
            **({"causal": self.causal} if self.causal != "none" else {}),
            **({"window": self.window} if self.window >= 0 else {}),
        }


def whole(terms: Sequence[Term], frame: Frame, g: Groups, zero: bool) -> Flagged | None:
    """All terms (outermost first) with flags; None if nothing is won or ``flash_attention`` cannot say them together.

    ``zero`` says that a row that -inf hides gives 0.
    """
    if not terms or any(t.is_mask and not t.written < 0 for t in terms):
        return None
    places = [_Place(t, frame, g) for t in terms]
    masks = [Mask(p.term.node, p.level, p.term.keep, p.term.written) for p in places if p.term.is_mask]
    biases = [Added(p.term.node, p.level, p.term.factor) for p in places if not p.term.is_mask]
    v = visibility(frame.facts, masks, biases, (frame.size(g.rows), frame.size(g.keys)), zero)
    if v is None:
        return None
    won = v.causal != "none" or v.window >= 0 or len(v.masks) + len(v.biases) < len(terms)
    if not won and v.empty_row != "zero":
        return None
    return _flagged(v, places, v.empty_row, frame.facts)


def masks_only(made: Plan, empty_row: str, frame: Frame, g: Groups) -> Flagged:
    """A plan whose masks are said by flags as far as that is proven; the rest of it stays."""
    places = [_Place(t, frame, g) for t in made.masks]
    masks = [Mask(p.term.node, p.level, p.term.keep) for p in places]
    v = as_flags(frame.facts, masks, (frame.size(g.rows), frame.size(g.keys)))
    found = _flagged(v, places, empty_row, frame.facts)
    return replace(found, biases=made.biases, assumes=made.assumes, blind=made.blind)


class _Place:
    """The scores that a term meets, with axes in front for rows and keys where they have none of their own."""

    def __init__(self, t: Term, frame: Frame, g: Groups) -> None:
        self.term = t
        rows, keys = frame.leaves(g.rows), frame.leaves(g.keys)
        shape, own = list(t.level[0]), [frame.leaves(atoms) for atoms in t.level[1]]
        for role in (keys, rows):
            if not role or role not in own:
                own.insert(0, role)
                shape.insert(0, frame.size(role))
        self.axes: Axes = tuple(own)
        query = own.index(rows)
        key = next(i for i, atoms in enumerate(own) if atoms == keys and i != query)
        self.level = Level.of(frame.facts, shape, query, key, self.axes)

    def as_term(self, n: fx.Node, facts: Facts, **more: Any) -> Term:
        """A tensor that broadcasts to the same scores, as a term."""
        shape = facts.val(n).shape
        tail = self.axes[len(self.axes) - len(shape) :]
        axes = tuple(() if facts.known(s == 1) else atoms for s, atoms in zip(shape, tail, strict=True))
        return Term(node=n, axes=axes, level=self.term.level, **more)


def _flagged(v: Visible, places: Iterable[_Place], empty_row: str, facts: Facts) -> Flagged:
    at = {p.level: p for p in places}
    masks = [at[m.level].as_term(m.node, facts, keep=m.keep, fill=-math.inf) for m in v.masks]
    biases = [at[a.level].as_term(a.node, facts, factor=a.factor) for a in reversed(v.biases)]  # innermost first
    return Flagged(tuple(masks), tuple(biases), empty_row, v.assumes, False, v.causal, v.window, v.why, v.computed)
