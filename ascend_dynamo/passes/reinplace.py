"""The last of our passes: what changes a dead value writes in place, and nothing of a cache's size is copied.

Graphs have value semantics up to here: a cache comes in, ``index_copy`` (or a functional cache write) makes a new one,
and ``copy_`` at the end writes that back. Where ``homes.py`` proves that nobody reads the old value late, the call is
made in place on the input (``index_copy_``, ``ascend.kv_write``, the mutating operator itself) and the ``copy_``, which
would copy a buffer onto itself, goes. What cannot be proven is left as it was, which is right and copies; the record's
notes name it. The target's own kernel takes the place of an in-place operator that it has one for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import GraphUnit, PassResult
from ascend_dynamo.ir import effects, regions
from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.ir.functionalized import Functionalized, View, read_functionalized
from ascend_dynamo.passes.homes import (
    CAT,
    COPY,
    IN_PLACE,
    SCATTER,
    TWINS,
    Home,
    bases_of,
    made,
    part_of,
    parts_of,
    plan,
    result_base,
    written_by_twin,
)

_aten = torch.ops.aten
Lower = Callable[[GraphUnit, GraphFacts, fx.Node], bool]


@dataclass(frozen=True)
class Reinplace:
    """``lower`` is asked to put the target's kernel in the place of each in-place operator of the dialect."""

    lower: Lower | None = None
    name: str = "reinplace"
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset({"lower"})

    def run(self, g: GraphUnit, options: Any) -> PassResult:
        copies = _epilogue(g.gm.graph)
        facts = GraphFacts(g.gm, g.params, g.weights)
        homes = plan(g.gm.graph, facts, copies)
        notes = tuple(
            f"reinplace: %{h.input.name} is copied: {h.refused}"
            for h in homes
            if h.refused and _updates(h.copy.args[1])
        )
        proven = [h for h in homes if not h.refused and h.events]
        edit = _Edit(g, facts, {n: h for h in proven for n in h.path if h.kind.get(n) == "call"})
        for home in proven:
            edit.keep(home)
        for home in proven:
            edit.home(home)
        fresh = edit.fresh()
        if not proven and not fresh:
            return PassResult(False, notes)
        effects.remove_dead(g.gm.graph)
        for node in edit.new:
            if self.lower is not None:
                self.lower(g, facts, node)
        g.gm.recompile()
        if proven:
            notes = (f"reinplace: {len(proven)} inputs are written in place", *notes)
        if fresh:
            notes = (*notes, f"reinplace: {fresh} writes go to memory that the graph allocates")
        return PassResult(True, notes)


def _epilogue(graph: fx.Graph) -> list[fx.Node]:
    """``copy_`` of a value to an input that nothing else writes."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for n in graph.nodes:
        for target in effects.written(n):
            for root in effects.roots(target):
                writers.setdefault(root, []).append(n)
    found = []
    for root, calls in writers.items():
        (copy, *others) = calls
        if root.op == "placeholder" and not others and copy.target is COPY and copy.args[0] is root:
            value = root.meta.get("val")
            if isinstance(value, torch.Tensor) and value.layout == torch.strided and copy.args[1] is not root:
                found.append(copy)
    return found


def _updates(n: Any) -> bool:
    """True if ``n`` is, through layout, a change of a part of something: worth a note where it is copied."""
    while regions.step_of(n) is not None:
        n = n.args[0]
    return n.target in IN_PLACE or n.target in (SCATTER, CAT) or result_base(n) is not None


@dataclass
class _Edit:
    unit: GraphUnit
    facts: GraphFacts
    results: dict[fx.Node, Home]  # results of functional calls -> the home in which they live
    new: list[fx.Node] = field(default_factory=list)
    done: set[fx.Node] = field(default_factory=set)

    def keep(self, home: Home) -> None:
        """Copy what the graph returns, right where it is computed; before anything is replaced."""
        (output,) = self.unit.gm.graph.find_nodes(op="output")
        for leaf in home.cloned:
            b = GraphBuilder(self.unit, self.facts, leaf.next, leaf)
            output.replace_input_with(leaf, b.op(_aten.clone.default, leaf))

    def home(self, home: Home) -> None:
        graph = self.unit.gm.graph
        for node, path in list(home.path.items()):
            kind = home.kind.get(node)
            if kind == "write":
                b = self._builder(node)
                view = regions.emit(b, home.input, path)
                self.new.append(b.op(IN_PLACE[node.target], view, *node.args[1:], **node.kwargs))
                node.replace_all_uses_with(view)
            elif kind in ("scatter", "cat"):
                b = self._builder(node)
                view = regions.emit(b, home.input, path)
                for i, (piece, step) in enumerate(parts_of(node)):
                    if (node, i) not in home.kept:
                        b.op(COPY, regions.emit(b, view, (step,)), piece)
                node.replace_all_uses_with(view)
            elif kind == "call" and node not in self.done:
                self._call(node.args[0])  # type: ignore[arg-type]
        home.copy.replace_all_uses_with(home.input)
        graph.erase_node(home.copy)

    def fresh(self) -> int:
        """What the graph allocates and then writes is written where it is allocated, each time anew; how many."""
        count = 0
        for n in list(self.unit.gm.graph.nodes):
            if n.target in IN_PLACE and made(n.args[0]):
                b = self._builder(n)
                base = b.op(n.args[0].target, *n.args[0].args, **n.args[0].kwargs)
                self.new.append(b.op(IN_PLACE[n.target], base, *n.args[1:], **n.kwargs))
                n.replace_all_uses_with(base)
                count += 1
                continue
            call, bases = read_functionalized(n), bases_of(n).values()
            paths = [part_of(call, v) for v in call.views.values() if v is not None] if call is not None else []
            if bases and all(map(made, bases)) and None not in paths:
                self._call(n)
                count += 1
        return count

    def _builder(self, node: fx.Node) -> GraphBuilder:
        return GraphBuilder(self.unit, self.facts, node, node)

    def _call(self, call: fx.Node) -> None:
        """A functional call, all its results at once."""
        b = self._builder(call)
        taken = {n.args[1]: n for n in call.users}
        self.done.update(taken.values())
        found = read_functionalized(call)
        if found is None:
            op, names = TWINS[call.target]
            places = [self._place(b, base, taken.get(i)) for i, base in enumerate(written_by_twin(call))]
            swap = iter(places)
            given = zip((a.name for a in op._schema.arguments), call.args, strict=False)
            args = [next(swap) if name in names else a for name, a in given]
            kwargs = {k: next(swap) if k in names else v for k, v in call.kwargs.items()}
            self.new.append(b.op(op, *args, **kwargs))
        else:
            places = [
                base if base is None else self._place(b, base, taken.get(found.first + j))  # type: ignore[misc]
                for j, base in enumerate(found.bases)
            ]
            written = {k: None if v is None else _part(b, found, places[v.base], v) for k, v in found.views.items()}
            result = _invoke(b, found, written)
            self.new.append(result)
            for index in range(found.first):
                if index in taken:
                    alone = len(found.op._schema.returns) < 2
                    own = result if alone else b.op(operator.getitem, result, index)
                    taken.pop(index).replace_all_uses_with(own)
        first = 0 if found is None else found.first
        for at, user in taken.items():
            user.replace_all_uses_with(places[at - first])  # type: ignore[index,operator]
        for user in list(call.users):
            self.unit.gm.graph.erase_node(user)
        self.unit.gm.graph.erase_node(call)

    def _place(self, b: GraphBuilder, base: fx.Node, result: fx.Node | None) -> fx.Node:
        """The memory that is written for a base: its place, or another constant one."""
        home = None if result is None else self.results.get(result)
        if home is None or result is None:
            return b.op(base.target, *base.args, **base.kwargs)  # type: ignore[arg-type]
        return regions.emit(b, home.input, home.path[result])


def _part(b: GraphBuilder, found: Functionalized, base: fx.Node, view: View) -> fx.Node:
    path = part_of(found, view)
    assert path is not None  # homes.py asked
    return regions.emit(b, base, path)


def _invoke(b: GraphBuilder, found: Functionalized, written: dict[str, fx.Node | None]) -> fx.Node:
    given = {**found.plain, **written}
    args, kwargs = [], {}
    for a in found.op._schema.arguments:
        if a.kwarg_only:
            if given.get(a.name) is not None:
                kwargs[a.name] = given[a.name]
        else:
            args.append(given.get(a.name, a.default_value if a.has_default_value() else None))
    return b.op(found.op, *args, **kwargs)
