"""Which values of a graph may live in the memory of an input that is overwritten at the end: the proof of re-inplacing.

An input ``p`` with ``copy_(p, x)`` in the epilogue is a *home*. From ``x`` we walk back through the calls that change a
part of what they are given, and the layout in between, to ``p`` itself; every value on the way gets a place: the whole
of ``p``, or a part of it. Each call that changes something is an *event*: it will write its place in program order.

The plan stands if no reader comes late: whoever reads a value in a place runs before the next event that overlaps the
place, and an event reads nothing that it overwrites. Then copying is not needed, and ``copy_(p, x)`` does nothing.
Views of a value count as readers of it wherever they are read; what is not provably disjoint overlaps.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ascend_dynamo.ir import effects, regions
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.ir.functionalized import Functionalized, View, read_functionalized
from ascend_dynamo.ir.regions import Path, Step
from ascend_dynamo.ir.sym import same_shape

_aten, _ascend = torch.ops.aten, torch.ops.ascend
COPY = _aten.copy_.default
SCATTER = _aten.slice_scatter.default
CAT = _aten.cat.default
IN_PLACE: Mapping[Any, Any] = {
    _aten.index_copy.default: _aten.index_copy_.default,
    _aten.index_put.default: _aten.index_put_.default,
    _aten.index_add.default: _aten.index_add_.default,
    _aten.scatter.src: _aten.scatter_.src,
}
# twin -> (in-place operator, the names of the arguments that it writes in the order of the results)
TWINS: Mapping[Any, tuple[Any, tuple[str, ...]]] = {
    _ascend.kv_write_functional.default: (
        _ascend.kv_write.default,
        ("k_cache", "v_cache", "k_scale", "v_scale"),
    ),
    _ascend.mla_kv_write_functional.default: (_ascend.mla_kv_write.default, ("ckv_cache", "rope_cache")),
}

_CONSTRUCTORS = frozenset({_aten.zeros.default, _aten.full.default, _aten.empty.memory_format, _aten.ones.default})
Kind = Literal["view", "write", "scatter", "cat", "call"]


@dataclass(frozen=True)
class Event:
    """``node`` writes ``path`` at position ``at`` of the program."""

    at: int
    path: Path
    node: fx.Node


def result_base(n: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """For a result of a functional call that stands for written memory: the call, and that memory before."""
    if n.target is not operator.getitem or not isinstance(n.args[0], fx.Node):
        return None
    call: Any = n.args[0]
    index: Any = n.args[1]
    base = bases_of(call).get(index)
    return None if base is None else (call, base)


def bases_of(call: fx.Node) -> dict[int, fx.Node]:
    """The memory that a functional call changes, by the index of the result that stands for it afterwards."""
    if call.target in TWINS:
        return dict(enumerate(written_by_twin(call)))
    found = read_functionalized(call)
    return {} if found is None else {found.first + j: b for j, b in enumerate(found.bases) if b is not None}


def made(n: Any) -> bool:
    """True for a call that allocates and fills with a number: another such call is as good."""
    return isinstance(n, fx.Node) and n.target in _CONSTRUCTORS


def plan(graph: fx.Graph, facts: GraphFacts, copies: list[fx.Node]) -> list[Home]:
    """A home for the target of each of ``copies``.

    A call that changes several things is made in place for all of them or for none: a copy that is made only to be
    written looks like a useless one to compilers that take graphs to be functional.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    barred: dict[fx.Node, str] = {}
    while True:
        homes = [Home(copy, facts, position, barred) for copy in copies]
        placed = {n for h in homes if not h.refused for n in h.path}
        found: dict[fx.Node, str] = {}
        for call in {e.node for h in homes if not h.refused for e in h.events}:
            results = {u.args[1]: u for u in call.users if u.target is operator.getitem}
            for index, base in bases_of(call).items():
                if results.get(index) not in placed and not made(base):
                    found[call] = f"%{call.name} changes %{base.name} too, which has to be copied"
        if not found:
            return homes
        barred.update(found)


def part_of(found: Functionalized, view: View) -> Path | None:
    """Which part of its base a written argument is; None where only strides tell."""
    if view.kind == "whole":
        return ()
    if view.kind == "slice":
        return (Step("slice", (*(regions.value(s) for s in view.spec), 1)),)
    size, stride, offset = view.spec
    base: Any = found.bases[view.base]
    return regions.strided(base.meta["val"], _values(size), _values(stride), regions.value(offset))


def _values(sizes: Any) -> tuple[Any, ...]:
    return tuple(regions.value(s) for s in sizes)


def written_by_twin(call: fx.Node) -> list[fx.Node]:
    """The arguments that the in-place operator of a twin writes, in the order of the results."""
    names = [a.name for a in call.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return [given[name] for name in TWINS[call.target][1] if given.get(name) is not None]  # type: ignore[misc]


class Home:
    """The plan for one input. ``refused`` says why it cannot stand, "" if it does."""

    def __init__(
        self, copy: fx.Node, facts: GraphFacts, position: Mapping[fx.Node, int], barred: Mapping[fx.Node, str]
    ) -> None:
        self.copy, self.facts, self.position, self.barred = copy, facts, position, barred
        self.input: fx.Node = copy.args[0]  # type: ignore[assignment]
        self.path: dict[fx.Node, Path] = {self.input: ()}
        self.born: dict[fx.Node, int] = {self.input: -1}
        self.kind: dict[fx.Node, Kind] = {}
        self.events: list[Event] = []
        self.kept: set[tuple[fx.Node, int]] = set()  # parts of a slice_scatter or cat that are in place already
        self.cloned: list[fx.Node] = []  # graph outputs that must not share memory with the input
        self.refused = self._place(copy.args[1], ()) or self._late()  # type: ignore[arg-type]

    def _place(self, n: fx.Node, path: Path) -> str:
        """Find a place for ``n`` and for what it is made of; the reason if there is none."""
        chain: list[tuple[fx.Node, Path, Kind]] = []
        source: fx.Node | None = n
        inner = path
        while source is not None and source not in self.path:
            n, path = source, inner
            below = self._below(n, path)
            if isinstance(below, str):
                return below
            kind, source, inner = below
            chain.append((n, path, kind))
        if source is not None and not _same(self.path[source], inner):
            return f"%{source.name} would have to be in two places"
        for n, path, kind in reversed(chain):
            reason = self._settle(n, path, kind)
            if reason:
                return reason
        return ""

    def _below(self, n: fx.Node, path: Path) -> tuple[Kind, fx.Node | None, Path] | str:
        """What ``n`` is a view or a change of (None: all of it is written), and the place of that."""
        source: Any = n.args[0] if n.args else None
        step = regions.step_of(n)
        if step is not None:
            if path and regions.same_step(step, path[-1]):
                return "view", source, path[:-1]
            if step.kind == "slice":
                return f"%{n.name} is a part of another value"
            return "view", source, (*path, regions.back(n))
        if n.target in IN_PLACE:
            return "write", source, path
        if n.target is SCATTER:
            return "scatter", source, path
        if n.target is CAT:
            return "cat", None, path
        written = result_base(n)
        if written is None:
            return f"%{n.name} is computed anew"
        call, base = written
        if call in self.barred:
            return self.barred[call]
        found = read_functionalized(call)
        if found is not None and any(v is not None and part_of(found, v) is None for v in found.views.values()):
            return f"%{call.name} writes a part that only strides describe"
        if sum(u.target is operator.getitem and u.args[1] == n.args[1] for u in call.users) > 1:
            return f"%{n.name} is taken twice"
        return "call", base, path

    def _settle(self, n: fx.Node, path: Path, kind: Kind) -> str:
        value = n.meta["val"]
        try:
            with self.facts.fakes.quiet():
                there = regions.view(path, self.input.meta["val"])
        except RuntimeError as error:
            return f"%{n.name} is no view of %{self.input.name}: {error}"
        if there.dtype != value.dtype or not same_shape(there.shape, value.shape):
            return f"%{n.name} has another dtype or shape than its place"
        self.path[n], self.kind[n] = path, kind
        at = self.position[n]
        if kind == "view":
            at = self.born[n.args[0]]  # type: ignore[index]
        elif kind == "write":
            self.events.append(Event(at, path, n))
        elif kind == "call":
            at = self.position[n.args[0]]  # type: ignore[index]
            self.events.append(Event(at, path, n.args[0]))  # type: ignore[arg-type]
        else:
            parts = parts_of(n)
            for i, (piece, step) in enumerate(parts):
                if self._attempt(piece, (*path, step)):
                    self.kept.add((n, i))
                else:
                    self.events.append(Event(at, (*path, step), n))
            if kind == "cat" and not any((n, i) in self.kept for i in range(len(parts))):
                return f"%{n.name} is computed anew"
        self.born[n] = at
        return ""

    def _attempt(self, n: fx.Node, path: Path) -> bool:
        """``_place``, undone where it fails."""
        before = dict(self.path), dict(self.born), dict(self.kind), list(self.events), set(self.kept)
        if not self._place(n, path):
            return True
        self.path, self.born, self.kind, self.events, self.kept = before
        return False

    def _late(self) -> str:
        """A reader that an event overtakes, or that an event itself is."""
        for home, path in self.path.items():
            born = self.born[home]
            for node, use, seen in self._uses(home, path):
                if use is self.copy and node is not self.copy.args[1]:
                    continue  # what it overwrites
                if use.op == "output":
                    reason = self._returned(home, node, seen, born)
                    if reason:
                        return reason
                    continue
                end, own = self.position[use], self._consumes(use, node)
                covered = (*path, _slice(use)) if own and use.target is SCATTER and use.args[0] is node else None
                for event in self.events:
                    if not born < event.at <= end or (event.at == end and own):
                        continue
                    if covered is not None and regions.contains(covered, event.path):
                        continue
                    if not regions.disjoint(event.path, seen):
                        return f"%{use.name} reads %{node.name} when %{event.node.name} has overwritten it"
        return ""

    def _returned(self, home: fx.Node, node: fx.Node, seen: Path, born: int) -> str:
        """The graph returns a value in the input's memory: a copy of it, made while it is there."""
        if home is self.input:
            return ""  # it was the input itself, which shows what is written
        for event in self.events:
            if born < event.at <= self.position[node] and not regions.disjoint(event.path, seen):
                return f"%{node.name} is returned, and %{event.node.name} overwrites it"
        if node not in self.cloned:
            self.cloned.append(node)
        return ""

    def _uses(self, home: fx.Node, path: Path) -> Iterator[tuple[fx.Node, fx.Node, Path]]:
        """Whoever reads ``home``, itself or through views that have no place: (what is read, the reader, where)."""
        todo: list[tuple[fx.Node, Path]] = [(home, path)]
        while todo:
            node, place = todo.pop()
            for user in node.users:
                if self.kind.get(user) == "view":
                    continue
                named = user.op == "output" or user is self.copy or user in self.path
                if not named and node in effects.viewed(user):
                    step = regions.step_of(user)
                    todo.append((user, (*place, step) if step is not None else place))
                    continue
                yield node, user, place

    def _consumes(self, use: fx.Node, node: fx.Node) -> bool:
        """True if ``use`` takes ``node`` only as what it changes in place, or as a part that is in place."""
        if use is self.copy:
            return use.args[1] is node
        if use in self.path and self.kind[use] == "write":
            return use.args[0] is node and _count(use, node) == 1
        if use in self.path and self.kind[use] == "scatter":
            return use.args[0] is not use.args[1] and (use.args[0] is node or (use, 0) in self.kept)
        if any(e.node is use for e in self.events):
            taken = [g for g in use.users if g in self.path]
            bases = [found[1] for g in taken if (found := result_base(g)) is not None]
            return bases.count(node) == 1 and _count(use, node) == 1
        return False


def parts_of(n: fx.Node) -> list[tuple[fx.Node, Step]]:
    """What a ``slice_scatter`` or a ``cat`` puts where."""
    if n.target is SCATTER:
        return [(n.args[1], _slice(n))]  # type: ignore[list-item]
    found: list[tuple[fx.Node, Step]] = []
    end: Any = 0
    for piece in n.args[0]:  # type: ignore[union-attr]
        start, end = end, end + piece.meta["val"].shape[n.args[1]]  # type: ignore[union-attr]
        found.append((piece, Step("slice", (n.args[1], start, end, 1))))  # type: ignore[arg-type]
    return found


def _slice(n: fx.Node) -> Step:
    return Step("slice", tuple(regions.value(a) for a in n.args[2:6]))


def _same(a: Path, b: Path) -> bool:
    return len(a) == len(b) and regions.contains(a, b)


def _nodes(tree: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tree, found.append)
    return found


def _count(use: fx.Node, node: fx.Node) -> int:
    return _nodes((use.args, use.kwargs)).count(node)
