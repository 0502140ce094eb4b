"""Hostile variants of a graph: one small change each, after which a careless pattern would still fire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.fakes import FakeCache, fake_mode_of
from ascend_dynamo.match.canonical import canonical, split

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default

_SWAPS: dict[Any, Any] = {
    aten.add.Tensor: aten.sub.Tensor,
    aten.sub.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.add.Tensor,
    aten.div.Tensor: aten.mul.Tensor,
    aten.maximum.default: aten.minimum.default,
    aten.minimum.default: aten.maximum.default,
    aten.rsqrt.default: aten.sqrt.default,
    aten.sqrt.default: aten.rsqrt.default,
    aten.silu.default: aten.sigmoid.default,
    aten.sigmoid.default: aten.tanh.default,
    aten.tanh.default: aten.sigmoid.default,
    aten.erf.default: aten.tanh.default,
    aten.exp.default: aten.tanh.default,
    aten.mean.dim: aten.sum.dim_IntList,
    aten.gelu.default: aten.silu.default,
    aten.relu.default: aten.abs.default,
}
_WORDS = {"none": "tanh", "tanh": "none"}


@dataclass(frozen=True)
class Mutation:
    """``apply`` changes a graph at the node of a given position; ``text`` says how."""

    text: str
    apply: Callable[[fx.Graph], None]


def mutations(unit: GraphUnit) -> Iterator[Mutation]:
    """Every mutation of a graph, in program order. Positions are indices into ``graph.nodes``."""
    nodes = list(unit.gm.graph.nodes)
    for i, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        label = f"%{node.name} = {node.target}"
        args = canonical(node)
        for k, a in enumerate(args):
            for text, value in _variants(a):
                yield Mutation(f"{label}: argument {k} {a!r} -> {text}", _set(i, k, value))
        if node.target in _SWAPS:
            other = _SWAPS[node.target]
            yield Mutation(f"{label} -> {other}", _retarget(i, other))
        if len(args) >= 2 and all(isinstance(a, fx.Node) for a in args[:2]):
            yield Mutation(f"{label}: first two arguments exchanged", exchange(i))
        yield from _rewired(i, node, nodes, label)
        yield from _dropped(i, node, label)
        if isinstance(node.meta.get("val"), torch.Tensor):
            yield Mutation(f"{label}: also returned", _returned(i))
            yield Mutation(f"{label}: an input is written just behind it", _written(i))


def _variants(a: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(a, bool):
        yield str(not a), not a
    elif isinstance(a, int):
        for v in (a + 1, a - 1, 2 * a if a not in (0, 1) else a + 2):
            yield str(v), v
    elif isinstance(a, float):
        for f in (a * 10, a * 1.5, -a):
            yield str(f), f
    elif isinstance(a, str) and a in _WORDS:
        yield _WORDS[a], _WORDS[a]
    elif a in (torch.float32, torch.bfloat16, torch.float16):
        other = torch.float32 if a != torch.float32 else torch.bfloat16
        yield str(other), other
    elif isinstance(a, (list, tuple)) and a:
        if all(type(x) is int for x in a):
            for j in range(len(a)):
                for d in (1, -1):
                    changed = [*a[:j], a[j] + d, *a[j + 1 :]]
                    yield str(changed), changed
        for j in range(len(a) - 1):
            exchanged = [*a[:j], a[j + 1], a[j], *a[j + 2 :]]
            yield f"elements {j} and {j + 1} exchanged", exchanged


def _set(i: int, k: int, value: Any) -> Callable[[fx.Graph], None]:
    def apply(graph: fx.Graph) -> None:
        node = _at(graph, i)
        by_name = {n.name: n for n in graph.nodes}
        mapped = fx.node.map_arg(value, lambda n: by_name[n.name])
        args = list(canonical(node))
        args[k] = mapped
        node.args, node.kwargs = split(node.target, tuple(args))

    return apply


def _retarget(i: int, other: Any) -> Callable[[fx.Graph], None]:
    def apply(graph: fx.Graph) -> None:
        node = _at(graph, i)
        node.target = other
        names = {a.name for a in other._schema.arguments}
        node.args = node.args[: len(other._schema.arguments)]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k in names}

    return apply


def exchange(i: int) -> Callable[[fx.Graph], None]:
    """Exchanges the first two arguments of the ``i``-th node."""

    def apply(graph: fx.Graph) -> None:
        node = _at(graph, i)
        node.args = (node.args[1], node.args[0], *node.args[2:])

    return apply


def _rewired(i: int, node: fx.Node, nodes: list[fx.Node], label: str) -> Iterator[Mutation]:
    """One operand replaced by another value of the same dtype and shape that exists by then."""
    for k, a in enumerate(node.args):
        if not isinstance(a, fx.Node) or not isinstance(a.meta.get("val"), torch.Tensor):
            continue
        alike = [
            (j, n)
            for j, n in enumerate(nodes[:i])
            if n is not a and _kind(n) == _kind(a) and n.op in ("placeholder", "call_function")
        ]
        for j, n in alike[:1] + alike[-1:][: len(alike) - 1]:
            yield Mutation(f"{label}: argument {k} %{a.name} -> %{n.name}", _operand(i, k, j))


def _kind(n: fx.Node) -> Any:
    value = n.meta.get("val")
    return (value.dtype, tuple(map(str, value.shape))) if isinstance(value, torch.Tensor) else n.name


def _operand(i: int, k: int, j: int) -> Callable[[fx.Graph], None]:
    def apply(graph: fx.Graph) -> None:
        node = _at(graph, i)
        node.update_arg(k, _at(graph, j))

    return apply


def _dropped(i: int, node: fx.Node, label: str) -> Iterator[Mutation]:
    """A call left out: its users read its first operand instead."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or _kind(first)[1:] != _kind(node)[1:]:
        return
    if node.target is convert or _kind(first) == _kind(node):

        def apply(graph: fx.Graph) -> None:
            gone = _at(graph, i)
            gone.replace_all_uses_with(gone.args[0])  # type: ignore[arg-type]
            graph.erase_node(gone)

        yield Mutation(f"{label}: left out", apply)


def _returned(i: int) -> Callable[[fx.Graph], None]:
    def apply(graph: fx.Graph) -> None:
        (output,) = graph.find_nodes(op="output")
        output.args = ((*output.args[0], _at(graph, i)),)  # type: ignore[misc]

    return apply


def _written(i: int) -> Callable[[fx.Graph], None]:
    def apply(graph: fx.Graph) -> None:
        inputs = [n for n in graph.find_nodes(op="placeholder") if _floating(n)]
        node = _at(graph, i)
        near = [n for n in node.all_input_nodes if n in inputs] or inputs
        if not near:
            raise ValueError("nothing to write")
        with graph.inserting_after(node):
            graph.call_function(aten.add_.Tensor, (near[0], 1.0))

    return apply


def _floating(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _at(graph: fx.Graph, i: int) -> fx.Node:
    for k, node in enumerate(graph.nodes):
        if k == i:
            return node
    raise IndexError(i)


class _Unrun(fx.GraphModule):
    """A copy that is interpreted: Python code for it would cost more than it is worth."""

    def recompile(self) -> Any:
        return None


def copy_unit(unit: GraphUnit) -> GraphUnit:
    """A copy that shares fake values and constants with the original, but no node."""
    gm, prologue = (_Unrun(g, _copy_graph(g.graph)) for g in (unit.gm, unit.prologue))
    return GraphUnit(gm, prologue, unit.params, unit.mutated, unit.out_strides, unit.weights)


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def mutated(unit: GraphUnit, mutation: Mutation) -> GraphUnit | None:
    """A changed copy in normal form with values derived anew, or None if the change makes no graph that runs."""
    from ascend_dynamo.normalize import normalize

    made = copy_unit(unit)
    try:
        mutation.apply(made.gm.graph)
        fakes = FakeCache(fake_mode_of(made.gm))
        for node in made.gm.graph.nodes:
            if node.op == "call_function":
                node.meta["val"] = fakes.run(node.target, node.args, dict(node.kwargs))
        normalize(made)
    except Exception:
        return None
    return made
