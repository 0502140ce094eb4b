"""Which axes of an attention are batch, heads, grouped heads, rows and keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from ascend_dynamo.contracts import Builder, Facts, NoMatch

from .._calls import refuse
from .frame import Atoms, Axes, Frame


@dataclass(frozen=True)
class Groups:
    """The atoms of B, Hq (the last of them tell query heads of one key head apart), Hk, Sq and Sk."""

    batch: Atoms
    heads: Atoms
    key_heads: Atoms
    rows: Atoms
    keys: Atoms

    @property
    def scores(self) -> tuple[Atoms, Atoms, Atoms, Atoms]:
        return self.batch, self.heads, self.rows, self.keys


def find_groups(
    frame: Frame, axes: Axes, dim: int, stored: set[int], rows: Sequence[Iterable[int]], varied: set[int]
) -> Groups:
    """Roles of the axes ``axes`` of the scores, of which ``dim`` are the keys.

    ``stored`` are the atoms that k or v vary along: batch and key heads; along all others only queries differ. Of
    these, ``rows`` (the row axes of both products) and then ``varied`` (what masks and biases depend on) tell which
    count queries and which count heads that share keys. Any choice is right; this one keeps masks readable and small.
    """
    keys = frame.leaves(axes[dim])
    rest = [frame.leaves(atoms) for i, atoms in enumerate(axes) if i != dim]
    free = {atom for atoms in rest for atom in atoms if atom not in stored}
    common = set.intersection(*(set(frame.leaves(r)) for r in rows))
    candidates = [i for i, atoms in enumerate(rest) if atoms and (free & common).issuperset(atoms)]
    best = max(candidates, key=lambda i: (not varied.isdisjoint(rest[i]), i), default=None)
    queries = () if best is None else rest.pop(best)
    groups = tuple(atom for atoms in rest for atom in atoms if atom in free)
    shared = [tuple(atom for atom in atoms if atom not in free) for atoms in rest]
    if len(shared) == 1 and len(shared[0]) > 1:
        shared = [shared[0][:-1], shared[0][-1:]]
    batch = shared[0] if shared else ()
    key_heads = tuple(atom for atoms in shared[1:] for atom in atoms)
    return Groups(batch, (*key_heads, *groups), key_heads, queries, keys)


@dataclass(frozen=True)
class Sinks:
    """One logit per head: ``node`` with its axes."""

    node: fx.Node
    axes: Axes

    def emit(self, b: Builder, frame: Frame, g: Groups) -> fx.Node:
        return frame.emit(b, self.node, self.axes, [g.heads], fill=True)


def find_sinks(column: fx.Node, frame: Frame, axes: Axes, facts: Facts) -> Sinks | NoMatch:
    """The tensor behind a column of sinks beside scores with ``axes``: it was repeated for batch and rows."""
    source, labels = facts.axes(column)
    found: dict[str, Atoms] = {}
    sizes = facts.val(source).shape
    for atoms, label in zip(axes, labels, strict=True):
        parts = label.split("*")
        own = [part for part in parts if part.startswith("d")]
        if len(parts) == 1:
            found.update(dict.fromkeys(own, atoms))
        elif own:  # copies for the batch in front of the heads: scores [B*H, Sq, Sk]
            total, heads = frame.size(atoms), None if "." in parts[-1] else sizes[int(parts[-1][1:])]
            whole = len(parts) == 2 and parts[-1] in own and isinstance(total, int) and isinstance(heads, int)
            pieces = frame.split(atoms, [total // heads, heads]) if whole else None
            if pieces is None:
                return refuse(facts, "shape", column, "one sink per head", "sinks of unknown axes", 0.5)
            found[parts[-1]] = pieces[1]
    return Sinks(source, tuple(frame.whole(found, i) for i in range(len(sizes))))
