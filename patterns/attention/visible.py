"""Which keys a query sees: masks that are proven causal, sliding or always true become flags of ``flash_attention``.

``visibility`` takes the masks and additive terms of one attention and gives back what the operator needs: ``causal``,
``window``, what remains of masks and terms, and ``empty_row``. A mask of which nothing is proven stays as it is. What
remains of a conjunction is its smallest part: of ``causal & padding`` the padding [B,1,1,Sk].

An additive mask ``where(keep, 0, fill)`` may be taken for ``keep`` iff rows without a visible key keep their value:

* ``fill`` -inf: such a row is NaN (0 in SDPA), whatever else is added to it;
* ``fill`` finfo.min: scores vanish in it, so such a row is the mean of all values; but if another mask or a bias that
  may hide keys is added too, it is the mean of those hidden once. Then every row must provably see a key.

The order of the terms does not matter then: -inf and finfo.min stay what they are when a moderate bias is added. Scores
are taken to be far above finfo.min.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .._calls import rank
from .mask_proof import Bound, Length, Level, Proof, prove
from .moderate import LARGEST, moderate

ABSORBS = -1e30  # a fill in which every score vanishes: not float16's


@dataclass(frozen=True)
class Mask:
    """A boolean mask at ``level``; ``keep``: True means visible; hidden scores become ``fill``."""

    node: fx.Node
    level: Level
    keep: bool = True
    fill: float = -math.inf


@dataclass(frozen=True)
class Added:
    """``factor * node`` is added to the scores at ``level``."""

    node: fx.Node
    level: Level
    factor: float = 1.0


@dataclass(frozen=True)
class Visible:
    """The operands and flags of ``flash_attention``. ``moot``: every row provably sees a key, so ``empty_row`` says
    nothing. ``why`` has a sentence for each mask that is still an operand; ``lengths`` are what is known about those
    that compare keys with the length of a cache. ``computed`` are the calls that the proofs have read.
    """

    causal: str = "none"
    window: int = -1
    masks: tuple[Mask, ...] = ()
    biases: tuple[Added, ...] = ()
    empty_row: str = "nan"
    moot: bool = False
    assumes: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    lengths: tuple[Length, ...] = ()
    computed: frozenset[fx.Node] = frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """What to report: the assumptions, and why masks are still operands."""
        return (*self.assumes, *(f"a mask is still computed: {w}" for w in self.why if self.masks or self.biases))


@dataclass(frozen=True)
class _Source:
    """A mask or term with its proof (a string: why there is none) and the values that hide in it."""

    given: Mask | Added
    proof: Proof | str
    fills: frozenset[float]


def visibility(
    facts: Facts, masks: Sequence[Mask], biases: Sequence[Added], sizes: tuple[Any, Any], zero: bool = False
) -> Visible | None:
    """Masks and additive terms as flags, where that is proven, and the operands that remain.

    ``sizes`` is (Sq, Sk). ``zero`` says that a row hidden by -inf or by a boolean mask is 0 (SDPA), not NaN. None if
    ``flash_attention`` has no ``empty_row`` for these masks and terms together.
    """
    sq, sk = (facts.size(s) for s in sizes)
    hidden = [_Source(m, prove(facts, m.node, m.level, m.keep), frozenset((m.fill,))) for m in masks]
    given = [_read(facts, a) for a in biases]
    added = [s for s in given if not _is_zero(s)]
    hiding, plain = [s for s in added if s.fills], [s for s in added if not s.fills]
    for taken, left in ((hiding, plain), ([], added)) if hiding else (([], added),):
        found = _flags_and_masks(facts, [*hidden, *taken], (sq, sk))
        if found is None or (taken and not _pays(facts, found, taken)):
            continue
        rest = [a for s in (*taken, *left) if (a := _bias(s, s in taken)) is not None]
        loud = [a for a in rest if not _calm(facts, a)]
        others = [s for s in left if s.given in loud]
        empty = _empty_row(found, hidden, taken, others, bool(rest), zero)
        if empty is not None:
            read = found.computed.union(*(s.proof.computed for s in given if isinstance(s.proof, Proof)))
            why = [_why(s) for s in (*hidden, *taken, *others)] + [_beside(s) for s in left if s.fills]
            return replace(
                found,
                biases=tuple(rest),
                empty_row=empty[0],
                moot=found.moot and not loud,
                assumes=empty[1],
                why=tuple(dict.fromkeys(w for w in (*found.why, *why) if w)),
                computed=read,
            )
    return None


def visible_in_sdpa(facts: Facts, mask: fx.Node, shape: Sequence[Any]) -> Visible:
    """The boolean or additive mask of ``aten.scaled_dot_product_attention``, whose scores have ``shape``."""
    level = Level.of(facts, shape)
    boolean = facts.val(mask).dtype == torch.bool
    masks, biases = ([Mask(mask, level)], []) if boolean else ([], [Added(mask, level)])
    found = visibility(facts, masks, biases, (shape[-2], shape[-1]), zero=True)
    return found or Visible(biases=tuple(biases), empty_row="zero", why=(f"%{mask.name} may hide whole rows",))


def as_flags(facts: Facts, masks: Sequence[Mask], sizes: tuple[Any, Any]) -> Visible:
    """Boolean masks alone, whatever their fills mean: the same keys are visible, ``empty_row`` is the caller's."""
    sources = [_Source(m, prove(facts, m.node, m.level, m.keep), frozenset()) for m in masks]
    found = _flags_and_masks(facts, sources, (facts.size(sizes[0]), facts.size(sizes[1])))
    assert found is not None  # a boolean mask can always stay as it is
    return replace(found, why=tuple(dict.fromkeys((*found.why, *(w for s in sources if (w := _why(s)))))))


def _read(facts: Facts, a: Added) -> _Source:
    proof = prove(facts, a.node, a.level)
    hides = isinstance(proof, Proof) and 0 < a.factor < math.inf
    return _Source(a, proof, frozenset(f * a.factor for f in proof.fills) if hides else frozenset())  # type: ignore[union-attr]


def _is_zero(s: _Source) -> bool:
    return isinstance(s.proof, Proof) and replace(s.proof, computed=frozenset()) == Proof()


def _why(s: _Source) -> str:
    return s.proof if isinstance(s.proof, str) else s.proof.why


def _beside(s: _Source) -> str:
    """Why a proven additive mask is added all the same."""
    assert isinstance(s.proof, Proof)
    if not s.proof.bounds:
        return f"%{s.given.node.name} costs as little as what it hides"
    return f"%{s.given.node.name} hides keys otherwise than flags say, or whole rows"


def _calm(facts: Facts, a: Added) -> bool:
    """True if a term that is added hides nothing."""
    return abs(a.factor) <= LARGEST and moderate(facts, a.node)


def _finite(s: _Source) -> bool:
    """True for a mask of 0 and finite numbers."""
    return bool(s.fills) and -math.inf not in s.fills and isinstance(s.proof, Proof) and s.proof.bias is None


def _bias(s: _Source, taken: bool) -> Added | None:
    """What a term adds; of one that is taken for a mask, what it adds where it hides nothing."""
    assert isinstance(s.given, Added)
    if not taken:
        return s.given
    return replace(s.given, node=s.proof.bias) if isinstance(s.proof, Proof) and s.proof.bias is not None else None


def _empty_row(
    found: Visible, hidden: list[_Source], taken: list[_Source], loud: list[_Source], biased: bool, zero: bool
) -> tuple[str, tuple[str, ...]] | None:
    """What a row without a visible key gives, and what that rests on; None if ``empty_row`` has no name for it.

    ``loud`` are the terms that stay and may hide keys; ``biased``: any terms stay.
    """
    fills = frozenset[float]().union(*(s.fills for s in (*hidden, *taken)))
    nothing = "zero" if zero else "nan"
    vanish = () if fills <= {-math.inf} else ("scores are above finfo.min",)
    finite = not loud or (len(loud) == 1 and _finite(loud[0]))
    if found.moot and biased and finite and not (loud and vanish):
        return "zero", (*vanish, "the bias is finite, so no row is empty")  # nothing to repair
    if not vanish:
        return nothing, ()
    if loud:
        return None
    if found.moot:
        return nothing, vanish
    one = len(fills) == 1 and len(taken) + bool(hidden) == 1
    absorbs = max(fills) <= ABSORBS or not (taken or biased)
    return ("uniform", vanish) if one and absorbs else None


def _pays(facts: Facts, found: Visible, hiding: list[_Source]) -> bool:
    """True if flags are won, or operands that grow with the number of keys only."""
    if found.causal != "none" or found.window >= 0 or not found.masks:
        return True
    return any(_has_queries(facts, s.given) for s in hiding) and not any(_has_queries(facts, m) for m in found.masks)


def _has_queries(facts: Facts, x: Mask | Added) -> bool:
    sizes = facts.val(x.node).shape
    axis = x.level.query % len(x.level.shape) - len(x.level.shape)
    return rank(facts, x.node) >= -axis and facts.size(sizes[axis]) != 1


def _flags_and_masks(facts: Facts, sources: list[_Source], sizes: tuple[Any, Any]) -> Visible | None:
    """Flags for the bounds of all sources and masks for the rest; None if there is a bound that can be neither."""
    bounds: list[tuple[Bound, Level]] = []
    masks: dict[Mask, None] = {}
    lengths: dict[Length, None] = {}
    for s in sources:
        level = s.given.level
        if isinstance(s.proof, str):
            assert isinstance(s.given, Mask)  # an additive term without a proof hides nothing
            masks[s.given] = None
            continue
        masks.update(dict.fromkeys(Mask(n, level, keep) for n, keep in s.proof.operands))
        lengths.update(dict.fromkeys(s.proof.lengths))
        bounds += [(b, level) for b in s.proof.bounds]
    everything = [b for b, _ in bounds]
    for said in (everything, [b for b in everything if b.upper], [b for b in everything if not b.upper], []):
        flags = _flags(facts, said, sizes)
        unsaid = [(b.node, level) for b, level in bounds if b not in said]
        if flags is None or any(node is None for node, _ in unsaid):
            continue
        masks.update(dict.fromkeys(Mask(node[0], level, node[1]) for node, level in unsaid if node is not None))
        why = tuple(f"it is j {'<=' if b.upper else '>='} i + {b.offset}" for b, _ in bounds if b not in said)
        moot = not masks and _never_empty(facts, *flags, sizes)
        read = frozenset[fx.Node]().union(*(s.proof.computed for s in sources if isinstance(s.proof, Proof)))
        return Visible(*flags, masks=tuple(masks), moot=moot, why=why, lengths=tuple(lengths), computed=read)
    return None


def _flags(facts: Facts, bounds: list[Bound], sizes: tuple[Any, Any]) -> tuple[str, int] | None:
    """(causal, window) that say exactly ``bounds``."""
    sq, sk = sizes
    uppers = list(dict.fromkeys(b.offset for b in bounds if b.upper))
    lowers = list(dict.fromkeys(b.offset for b in bounds if not b.upper))
    for causal, offset in (("none", 0), ("top_left", 0), ("bottom_right", sk - sq)):
        if causal == "none":
            fits = not uppers
        else:  # one bound is the diagonal (or every key is on its right side), and the others follow from it
            exact = any(_at_most(facts, u, offset) for u in uppers) or _at_most(facts, sk - 1, offset)
            fits = exact and all(_at_most(facts, offset, u) for u in uppers)
        if not fits:
            continue
        if not lowers:
            return causal, -1
        tightest = next((c for c in lowers if all(_at_most(facts, other, c) for other in lowers)), None)
        window = sympy.Integer(0) if tightest is None else sympy.sympify(offset + 1 - tightest)
        if window.is_Integer and window >= 1:
            return causal, int(window)
    return None


def _at_most(facts: Facts, a: Any, b: Any) -> bool:
    """True if ``a <= b`` is known."""
    d = a - b
    if isinstance(d, (int, sympy.Integer)):
        return int(d) <= 0
    relation = sympy.Le(d, 0)
    return relation is sympy.true or (relation is not sympy.false and facts.known(relation))


def _never_empty(facts: Facts, causal: str, window: int, sizes: tuple[Any, Any]) -> bool:
    """True if every query provably sees a key."""
    sq, sk = sizes
    if causal == "bottom_right":
        return _at_most(facts, sq, sk)
    if not _at_most(facts, 1, sk):
        return False
    return window < 0 or _at_most(facts, sq, sk - 1 + window)
