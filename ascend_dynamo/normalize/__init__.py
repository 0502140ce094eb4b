"""The normal form (``docs/architecture.md``): one walk forward over the graph, every rule looking only at producers.

Each node's arguments are in normal form when it is visited, and what rules build is too, so one walk reaches the
fixpoint: normalising twice is normalising once. Values are not computed again: a rewritten layout op keeps the dtype
and shape of what it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from ascend_dynamo.contracts import GraphUnit, PassResult
from ascend_dynamo.ir.effects import is_pure, node_effects
from ascend_dynamo.normalize import (
    assertions,
    casts,
    composites,
    fold,
    functionalized,
    layout,
    reductions,
    scalars,
    scatter,
)
from ascend_dynamo.normalize.memory import Memory
from ascend_dynamo.normalize.schema import Signature, signature, trim
from ascend_dynamo.normalize.work import Work

RULES: Mapping[Any, layout.Rule] = {
    **layout.RULES,
    **scatter.RULES,
    **casts.RULES,
    **scalars.RULES,
    **composites.RULES,
    **reductions.RULES,
    **functionalized.RULES,
}
# These always show all their arguments.
_EXPLICIT = frozenset({torch.ops.aten.slice.Tensor, torch.ops.aten.cat.default, torch.ops.aten.slice_scatter.default})

__all__ = ["RULES", "normalize"]


class _Target(NamedTuple):
    """What the walk needs to know about a call target."""

    ident: int  # of the target
    rule: layout.Rule | None
    trimmed: Signature | None  # None: arguments stay as they are
    size: bool
    mergeable: bool  # a function of its arguments


def normalize(unit: GraphUnit) -> PassResult:
    """Bring ``unit.gm`` into normal form, in place.

    Adds no guard, keeps every write and every random draw in order, and never lets an output share memory with an input
    or another output where the given graph did not.
    """
    graph = unit.gm.graph
    memory = Memory(graph)
    w = Work(unit)
    targets: dict[int, _Target] = {}  # by id, since hashing an overload is slow
    constants: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node in memory.pinned:
            continue
        if node.op == "call_function":
            w.cur = node
            target = targets.get(id(node.target))
            if target is None:
                target = targets[id(node.target)] = _describe(node)
            _visit(w, node, target, bool(constants))
        elif node.op == "get_attr":
            first = constants.setdefault(node.target, node)
            if first is not node:
                w.replace(node, first)
    clones = _clones(graph)
    copies = memory.restore_copies(graph)
    removed = _remove_unused(graph)
    # A clone that went and came back is no change.
    changed = w.changed > copies or removed > copies or _clones(graph) != clones
    unit.gm.recompile()
    return PassResult(changed, (f"{w.changed} rewrites, {removed} nodes removed, {copies} copies kept",))


def _describe(node: fx.Node) -> _Target:
    effects = node_effects(node)
    explicit = node.target in _EXPLICIT
    return _Target(
        id(node.target),
        RULES.get(node.target),
        None if explicit else signature(node.target),
        node.target in fold.SIZE_TARGETS,
        effects.pure and not effects.opaque,
    )


def _visit(w: Work, node: fx.Node, target: _Target, constants: bool) -> None:
    if target.size:
        size = fold.fold_size(w, node)
        if size is not None:
            if size is not node:
                w.replace(node, size)
            return
    if constants and target.mergeable:
        constant = fold.fold_constant(w, node)
        if constant is not None:
            w.replace(node, constant)
            return
    if target.rule is not None:
        result = target.rule(w, node)
        if result is not None:
            w.place(result)
            return
        if id(node.target) != target.ident:  # a rule may also rename the call, and keep it
            target = _describe(node)
    if target.trimmed is not None and trim(node, target.trimmed):
        w.changed += 1
    if target.mergeable:
        w.merge(node)


def _clones(graph: fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))


def _remove_unused(graph: fx.Graph) -> int:
    removed = 0
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "get_attr"):
            continue
        if is_pure(node) or assertions.cannot_fail(node):
            graph.erase_node(node)
            removed += 1
    return removed
