"""The normal form (``docs/architecture.md``): one walk forward over the graph, every rule looking only at producers.

Each node's arguments are in normal form when it is visited, and what rules build is too, so one walk reaches the
fixpoint: normalising twice is normalising once. Values are not computed again: a rewritten layout op keeps the dtype
and shape of what it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import GraphUnit, PassResult
from ascend_dynamo.ir.effects import is_pure
from ascend_dynamo.normalize import casts, composites, fold, layout, reductions, scalars
from ascend_dynamo.normalize.memory import Memory, record_strides
from ascend_dynamo.normalize.schema import trim
from ascend_dynamo.normalize.work import Work

RULES: Mapping[Any, Any] = {
    **layout.RULES,
    **casts.RULES,
    **scalars.RULES,
    **composites.RULES,
    **reductions.RULES,
}
# These always show all their arguments.
_EXPLICIT = frozenset({torch.ops.aten.slice.Tensor, torch.ops.aten.cat.default})

__all__ = ["RULES", "normalize"]


def normalize(unit: GraphUnit) -> PassResult:
    """Bring ``unit.gm`` into normal form, in place.

    Adds no guard, keeps every write and every random draw in order, and never lets an output share memory with an input
    or another output where the given graph did not.
    """
    graph = unit.gm.graph
    record_strides(graph)
    memory = Memory(graph)
    w = Work(unit)
    constants: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            if node not in memory.pinned:
                w.cur = node
                _visit(w, node)
        elif node.op == "get_attr" and node not in memory.pinned:
            first = constants.setdefault(node.target, node)
            if first is not node:
                w.replace(node, first)
    clones = _clones(graph)
    copies = memory.restore_copies(graph)
    removed = _remove_unused(graph)
    # A clone that went and came back is no change.
    unit.gm.recompile()
    changed = w.changed > copies or removed > copies or _clones(graph) != clones
    return PassResult(changed, (f"{w.changed} rewrites, {removed} nodes removed, {copies} copies kept",))


def _visit(w: Work, node: fx.Node) -> None:
    target = node.target
    if target in fold.SIZE_TARGETS:
        size = fold.fold_size(w, node)
        if size is not None:
            if size is not node:
                w.replace(node, size)
            return
    constant = fold.fold_constant(w, node)
    if constant is not None:
        w.replace(node, constant)
        return
    rule = RULES.get(target)
    result = rule(w, node) if rule is not None else None
    if result is not None:
        w.place(result)
        return
    if node.target not in _EXPLICIT and trim(node):
        w.changed += 1
    w.merge(node)


def _clones(graph: fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))


def _remove_unused(graph: fx.Graph) -> int:
    removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and is_pure(node):
            graph.erase_node(node)
            removed += 1
    return removed
