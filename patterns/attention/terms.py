"""The biases and masks of one attention, brought into the order that ``flash_attention`` evaluates: bias, then mask.

Masks that are the last to act become the operand ``mask``. One that a bias follows, or a finite fill beside a bias, is
itself a bias: ``where(keep, x, -inf) + b = x + (where(keep, 0, -inf) + b)``, and with the lowest number of a dtype in
place of -inf that number absorbs every score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from .._calls import LAYOUT, arg, arguments, aten, convert, dtype, is_call, lossless, refuse
from .frame import Axes, Frame
from .read import constant

ABSORBS = 2.0**100  # a fill of at least this size: no score of a working model changes it when added


@dataclass(frozen=True)
class Term:
    """``factor * node`` added to the scores; or, with a ``fill``, a mask (``keep``: True is visible).

    ``level`` are the scores that it meets, a shape and its axes, to which ``node`` broadcasts.
    """

    node: fx.Node
    axes: Axes
    level: tuple[tuple[Any, ...], Axes]
    factor: float = 1.0
    keep: bool = True
    fill: float | None = None

    @property
    def is_mask(self) -> bool:
        return self.fill is not None

    @property
    def written(self) -> float:
        """What masked scores are once every later factor has been applied."""
        assert self.fill is not None
        return self.fill * self.factor


@dataclass(frozen=True)
class Plan:
    """``masks``, then ``biases`` (innermost first, with what else must be written as one); ``empty_row`` and why.

    ``blind``: a mask is among the biases that replaces scores, even NaN; rows that it hides need scores of 0.
    """

    masks: tuple[Term, ...]
    biases: tuple[Term, ...]
    empty_row: str
    assumes: tuple[str, ...] = ()
    blind: bool = False


def plan(terms: Sequence[Term], facts: Facts, sinks: bool) -> Plan | NoMatch:
    """Terms as the walk met them, outermost first, as masks and a bias; with ``sinks`` no row is empty."""
    lowest = [t for t in terms if t.is_mask and t.written != -math.inf]
    if lowest and len(lowest) == len(terms):
        return Plan(tuple(terms), (), "uniform", ("scores are above finfo.min",))
    weak = next((t for t in lowest if abs(t.written) < ABSORBS), None)
    if weak is not None:
        found = f"a fill of {weak.written} beside other masks or biases"
        return refuse(facts, "unproven", weak.node, "a fill that no score changes", found, 0.8, "fill with -inf")
    count = next((i for i, t in enumerate(terms) if not t.is_mask or t.written != -math.inf), len(terms))
    masks, rest = tuple(terms[:count]), tuple(reversed(terms[count:]))
    blind = bool(lowest) or (sinks and any(t.is_mask for t in rest))  # without sinks, such a row of -inf is NaN anyway
    if not masks and len(rest) == 1 and abs(rest[0].factor) <= 1 and finite(facts, rest[0].node):
        return Plan(masks, rest, "zero", ("the bias is finite, so no row is empty",))
    return Plan(masks, rest, "nan", ("finfo.min absorbs the scores",) if lowest else (), blind)


def emit_mask(b: Builder, frame: Frame, masks: Sequence[Term], groups: Sequence[Any]) -> fx.Node | None:
    """The masks as one, True where all of them let a key be seen, with axes like ``groups``; None without masks."""
    total: fx.Node | None = None
    for t in masks:
        n = t.node if t.keep else b.op(aten.logical_not.default, t.node)
        n = frame.emit(b, n, t.axes, groups)
        total = n if total is None else b.op(aten.logical_and.default, total, n)
    return total


def emit_blind(b: Builder, frame: Frame, terms: Sequence[Term], groups: Sequence[Any]) -> fx.Node:
    """True for the rows that the masks among ``terms`` hide altogether: [.., Sq or 1, 1]."""
    seen = emit_mask(b, frame, [t for t in terms if t.is_mask], groups)
    return b.op(aten.logical_not.default, b.op(aten.any.dim, seen, -1, True))


def emit_bias(b: Builder, frame: Frame, terms: Sequence[Term], groups: Sequence[Any]) -> fx.Node | None:
    """What the terms, innermost first, add to the scores, with axes like ``groups``; None without terms."""
    total: fx.Node | None = None
    for t in terms:
        n = frame.emit(b, t.node, t.axes, groups)
        if t.is_mask:
            rest = b.op(aten.scalar_tensor.default, 0.0, dtype=torch.float32) if total is None else _wide(b, total)
            fill = b.op(aten.scalar_tensor.default, t.written, dtype=rest.meta["val"].dtype)
            total = b.op(aten.where.self, n, *((rest, fill) if t.keep else (fill, rest)))
            continue
        if t.factor != 1.0:
            n = b.op(aten.mul.Tensor, _wide(b, n), t.factor)
        total = n if total is None else b.op(aten.add.Tensor, n, total)
    return total


def _wide(b: Builder, n: fx.Node) -> fx.Node:
    """``n`` in float32 at least: what is computed with a bias must not round it."""
    kind = torch.promote_types(n.meta["val"].dtype, torch.float32)
    return n if n.meta["val"].dtype == kind else b.op(convert, n, kind)


def fits(facts: Facts, n: fx.Node, kind: torch.dtype) -> bool:
    """True if ``kind`` holds every element of ``n`` (perhaps rounded): it was upcast from it, or is constant."""
    m: Any = n
    while is_call(m, *LAYOUT, convert):
        if lossless(dtype(facts, m), kind):
            return True
        m = arg(m, 0)
    return lossless(dtype(facts, m), kind)


def finite(facts: Facts, bias: fx.Node) -> bool:
    """True if the bias is chosen between two finite constants: the usual mask of 0 and finfo.min."""
    n: Any = bias
    while is_call(n, aten.expand.default, aten.reshape.default, aten.permute.default, aten.slice.Tensor):
        n = arg(n, 0)
    if not is_call(n, aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf):
        return False
    values = [constant(arguments(n)[side], facts) for side in ("self", "other")]
    return all(value is not None and math.isfinite(value) for value in values)
