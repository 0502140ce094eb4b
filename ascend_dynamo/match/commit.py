"""One rewrite: build, verify, then commit or roll back. The graph is never left half rewritten."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit, Match, Pattern
from ascend_dynamo.errors import PatternError
from ascend_dynamo.ir import effects
from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.ir.sym import same_shape
from ascend_dynamo.match.validate import validate_rewrite

aten = torch.ops.aten


class Undone(Exception):
    """The rewrite was rolled back because of ``cause``."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


def commit(
    unit: GraphUnit, facts: GraphFacts, pattern: Pattern, m: Match, point: fx.Node, options: Any
) -> list[fx.Node]:
    """Replace the outputs of ``m`` by what ``pattern`` builds in front of ``point``; returns the new nodes.

    Raises:
        Undone: the rewrite raised or broke a promise; the graph is as it was.
    """
    builder = GraphBuilder(unit, facts, point, m.anchor)
    guards = compat.guard_count(facts.fake_mode)
    try:
        results = pattern.rewrite(builder, m)
        results = (results,) if isinstance(results, fx.Node) else tuple(results)
        check(pattern.name, m, results)
        if compat.guard_count(facts.fake_mode) != guards:
            raise PatternError(f'pattern "{pattern.name}": match or rewrite added a guard; ask facts.known instead')
        results = tuple(_keep_apart(old, new, builder, facts) for old, new in zip(m.outputs, results, strict=True))
        if options.strict or options.validate:  # shapes that tracing has solved are not taken on trust
            for node in builder.new_nodes:
                _derive(pattern.name, node, facts)
        if options.validate:
            validate_rewrite(pattern.name, m, results, builder.new_nodes, unit.prologue)
    except Exception as error:
        builder.erase()
        raise Undone(error) from error
    new = set(builder.new_nodes)
    for old, result in zip(m.outputs, results, strict=True):
        if old is not result:
            old.replace_all_uses_with(result, delete_user_cb=lambda user: user not in new)
    graph = unit.gm.graph
    for node in sorted(m.nodes, reverse=True):
        if not node.users and node not in results and effects.is_pure(node):
            graph.erase_node(node)
    return list(builder.new_nodes)


def check(name: str, m: Match, results: tuple[Any, ...]) -> None:
    """The promise of a rewrite: one node per output, of the same dtype and of a shape known to be equal."""
    if len(results) != len(m.outputs):
        raise PatternError(f'pattern "{name}": rewrite returned {len(results)} nodes for {len(m.outputs)} outputs')
    for i, (old, new) in enumerate(zip(m.outputs, results, strict=True)):
        if not isinstance(new, fx.Node):
            raise PatternError(f'pattern "{name}": output {i} of the rewrite is {new!r}, not a node')
        was, now = old.meta.get("val"), new.meta.get("val")
        if not isinstance(was, torch.Tensor):
            continue
        if not isinstance(now, torch.Tensor) or now.dtype != was.dtype:
            found = getattr(now, "dtype", type(now).__name__)
            raise PatternError(f'pattern "{name}": the rewrite changes the dtype of output {i}: {was.dtype} to {found}')
        if not same_shape(now.shape, was.shape):
            raise PatternError(
                f'pattern "{name}": the rewrite changes the shape of output {i}: {list(was.shape)} to {list(now.shape)}'
            )


def _derive(name: str, node: fx.Node, facts: GraphFacts) -> None:
    """Run a new call on its arguments' values: it must give what it is recorded to give."""
    have = node.meta.get("val")
    if node.op != "call_function" or not isinstance(have, torch.Tensor):
        return
    got = facts.fakes.run(node.target, node.args, dict(node.kwargs))  # type: ignore[arg-type]
    if not isinstance(got, torch.Tensor) or got.dtype != have.dtype or not same_shape(got.shape, have.shape):
        raise PatternError(f'pattern "{name}": %{node.name} = {node.target} gives {got}, it is recorded as {have}')


def _keep_apart(old: fx.Node, new: fx.Node, builder: GraphBuilder, facts: GraphFacts) -> fx.Node:
    """``new``, copied if it would let a graph output share memory that ``old`` did not share."""
    if old is new or not any(user.op == "output" for user in old.users):
        return new
    gained = effects.roots(new) - effects.roots(old) - set(builder.new_nodes)  # memory of its own is no one else's
    if not gained:
        return new
    (output,) = old.graph.find_nodes(op="output")
    others = {r for n in output.all_input_nodes if n is not old for r in effects.roots(n)}
    if any(root.op in ("placeholder", "get_attr") or root in others for root in gained):
        return builder.op(aten.clone.default, new)
    return new
