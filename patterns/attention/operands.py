"""q, k and v of an attention as [B, H, S, D], whatever layout they come in.

Grouped heads are found behind repeat_kv, and numbers that q or k are multiplied with become part of the scale.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from .._calls import LAYOUT, arg, convert, dtype, is_call, lossless, refuse
from .frame import Atoms, Axes, Frame, layout_chain
from .read import scaled_by


@dataclass(frozen=True)
class Operand:
    """``node`` with its axes, one of which is ``features``; ``factor`` multiplies it in place of ``nodes``."""

    node: fx.Node
    axes: Axes
    features: Atoms
    factor: float = 1.0
    nodes: frozenset[fx.Node] = frozenset()

    def atoms(self, frame: Frame) -> set[int]:
        """All atoms but those of the features."""
        inner = frame.leaves(self.features)
        return {atom for atoms in self.axes for atom in frame.leaves(atoms) if atom not in inner}


def find_operand(
    frame: Frame, n: fx.Node, axes: Axes, features: Atoms, *, grouped: bool = False, scaled: bool = False
) -> Operand:
    """``n``; with ``grouped`` from in front of repeat_kv, with ``scaled`` from in front of products with numbers."""
    node, axes = frame.ungrouped(n, axes) if grouped else (n, axes)
    found = Operand(node, axes, features)
    while scaled:
        inner = _unscaled(frame, n, found)
        if inner is None:
            break
        found = inner
        n = found.node
    return found


def _unscaled(frame: Frame, below: fx.Node, o: Operand) -> Operand | None:
    """The operand in front of one product with a number, if nothing else uses what lies between."""
    facts = frame.facts
    above = frame.above(o.node, o.axes)
    source, axes = above if above is not None else (o.node, o.axes)
    found = scaled_by(source, facts)
    if found is None or dtype(facts, found[0]) != dtype(facts, source) or not found[1] > 0:
        return None
    nodes = [*layout_chain(below, source), source]
    if nodes[-1] is not source or any(len(n.users) != 1 for n in nodes):
        return None
    return Operand(found[0], axes, o.features, o.factor * found[1], o.nodes | set(nodes))


def emit(b: Builder, frame: Frame, o: Operand, groups: Iterable[Iterable[int]], target: torch.dtype) -> fx.Node:
    """The operand with one axis per group, in dtype ``target`` (which it has, but for upcasts that are left out)."""
    n = frame.emit(b, o.node, o.axes, list(groups), fill=True)
    return n if n.meta["val"].dtype == target else b.op(convert, n, target)


def common_dtype(facts: Facts, q: fx.Node, k: fx.Node, v: fx.Node) -> torch.dtype | NoMatch:
    """The dtype in which attention runs: v's, if q and k have it or are upcasts from it, else the widest."""
    target = dtype(facts, v)
    if all(dtype(facts, n) == target or _holds(facts, n, target) for n in (q, k)):
        return target
    wide = dtype(facts, q)
    if dtype(facts, k) == wide and wide in (torch.float32, torch.float64) and lossless(target, wide):
        return wide
    found = f"q in {wide}, k in {dtype(facts, k)}, v in {target}"
    return refuse(facts, "dtype", k, "q, k and v of one dtype", found, 0.8, "cast q, k and v alike")


def _holds(facts: Facts, n: fx.Node, narrow: torch.dtype) -> bool:
    """True if every element of ``n`` is a value of ``narrow``: it was upcast from it, whatever layout followed."""
    while is_call(n, *LAYOUT):
        n = arg(n, 0)
    return is_call(n, convert) and dtype(facts, arg(n, 0)) == narrow and lossless(narrow, dtype(facts, n))
