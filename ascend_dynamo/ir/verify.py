"""The verifier: what must hold of a graph after every pass and every committed rewrite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.errors import VerifyError
from ascend_dynamo.ir import effects
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.ir.fakes import FakeCache, fake_mode_of
from ascend_dynamo.ir.provenance import short_src
from ascend_dynamo.ir.sym import same_shape


@dataclass(frozen=True)
class Promise:
    """What a graph promises to its callers: taken before a pass, checked after it."""

    outputs: tuple[Any, ...]
    aliases: frozenset[tuple[int, int]]  # pairs of outputs, or (output, -1 - input), that may share memory
    guards: int
    writes: int  # arguments that calls write
    written: frozenset[int]  # inputs whose memory is written


def promise(unit: GraphUnit) -> Promise:
    """Dtype and shape of every output, which outputs may alias what, the number of guards and of writes."""
    outputs = _outputs(unit.gm)
    values = tuple(o.meta.get("val") if isinstance(o, fx.Node) else o for o in outputs)
    writes, written = _writes(unit.gm)
    return Promise(values, _aliases(unit.gm, outputs), compat.guard_count(fake_mode_of(unit.gm)), writes, written)


def verify(unit: GraphUnit, before: Promise | None = None, changed: Iterable[fx.Node] = ()) -> None:
    """Check the graph; with ``before``, also that its promises still hold; re-derive the values of ``changed``.

    Raises:
        VerifyError: names the node and the user's line.
    """
    _structure(unit)
    for node in changed:
        check_value(node, fake_mode_of(unit.gm))
    if before is not None:
        _promises(unit, before)


def check_value(node: fx.Node, mode: Any) -> None:
    """Run a call on the values of its arguments; its value must have the same dtype and shape.

    A call whose value cannot be derived without adding a guard is left alone.

    Raises:
        VerifyError: the call fails, or gives another dtype or shape.
    """
    if node.op != "call_function":
        return
    try:
        derived = FakeCache(mode).run(node.target, node.args, dict(node.kwargs))
    except Exception as e:
        if compat.is_guard_error(e):
            return  # its strides depend on sizes that nobody knows; nothing can be said
        raise VerifyError(f"{_where(node)} cannot run on its arguments: {e}") from e
    for have, got in zip(pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(derived), strict=True):
        if isinstance(have, torch.Tensor) and not _same(have, got):
            raise VerifyError(f"{_where(node)} is recorded as {_show(have)}, but computes {_show(got)}")


def _structure(unit: GraphUnit) -> None:
    graph = unit.gm.graph
    seen: set[fx.Node] = set()
    calls_began = False
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise VerifyError(f"{_where(node)} uses %{source.name}, which comes later or was removed")
            if node not in source.users:
                raise VerifyError(f"{_where(node)} is not among the users of %{source.name}")
        if node.op == "placeholder" and calls_began:
            raise VerifyError(f"{_where(node)} is an input behind the first call")
        calls_began = calls_began or node.op != "placeholder"
        if node.op == "call_function":
            if "val" not in node.meta:
                raise VerifyError(f"{_where(node)} has no value: add calls with the builder")
            if isinstance(node.target, torch._ops.OpOverloadPacket):
                raise VerifyError(f"{_where(node)} calls an overload packet: name the overload ({node.target}.default)")
        seen.add(node)
    extra = sum(PROLOGUE in n.meta for n in graph.find_nodes(op="placeholder"))
    results = len(_outputs(unit.prologue))
    if extra != results:
        raise VerifyError(f"the graph takes {extra} prologue values, but the prologue computes {results}")


def _promises(unit: GraphUnit, before: Promise) -> None:
    outputs = _outputs(unit.gm)
    if len(outputs) != len(before.outputs):
        raise VerifyError(f"the graph returned {len(before.outputs)} values, and now returns {len(outputs)}")
    for i, (now, was) in enumerate(zip(outputs, before.outputs, strict=True)):
        value = now.meta.get("val") if isinstance(now, fx.Node) else now
        if isinstance(was, torch.Tensor):
            if not isinstance(value, torch.Tensor) or not _same(was, value):
                raise VerifyError(f"output {i} was {_show(was)}, and now is {_show(value)} from {_where(now)}")
        elif not isinstance(was, (torch.SymInt, torch.SymFloat, torch.SymBool)) and value != was:
            raise VerifyError(f"output {i} was {was!r}, and now is {value!r}")
    for i, j in sorted(_aliases(unit.gm, outputs) - before.aliases):
        other = f"output {j}" if j >= 0 else f"input {-1 - j}"
        raise VerifyError(f"output {i} may now share memory with {other}; it did not before ({_where(outputs[i])})")
    guards = compat.guard_count(fake_mode_of(unit.gm))
    if guards != before.guards:
        raise VerifyError(f"the pass added {guards - before.guards} guards: use facts.known instead of comparing sizes")
    writes, written = _writes(unit.gm)
    if writes < before.writes:
        raise VerifyError(f"the graph made {before.writes} writes to memory, and now makes {writes}")
    for i in sorted(before.written - written):
        raise VerifyError(f"the graph wrote its input {i}, and now does not")
    for i in sorted(written - before.written):
        raise VerifyError(f"the graph now writes its input {i}, which it only read")


def _writes(gm: fx.GraphModule) -> tuple[int, frozenset[int]]:
    """How many arguments are written by calls, and which inputs own memory that is."""
    inputs = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    targets = [t for n in gm.graph.nodes for t in effects.written(n)]
    return len(targets), frozenset(inputs[r] for t in targets for r in effects.roots(t) if r in inputs)


def _aliases(gm: fx.GraphModule, outputs: tuple[Any, ...]) -> frozenset[tuple[int, int]]:
    inputs = {n: -1 - i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    pairs: set[tuple[int, int]] = set()
    owners: dict[fx.Node, list[int]] = {}
    for i, output in enumerate(outputs):
        if not isinstance(output, fx.Node) or not isinstance(output.meta.get("val"), torch.Tensor):
            continue
        for root in effects.roots(output):
            if root in inputs:
                pairs.add((i, inputs[root]))
            for j in owners.setdefault(root, []):
                pairs.add((i, j))
            owners[root].append(i)
    return frozenset(pairs)


def _outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    (output,) = gm.graph.find_nodes(op="output")
    return tuple(pytree.tree_leaves(output.args))


def _same(a: torch.Tensor, b: Any) -> bool:
    return isinstance(b, torch.Tensor) and a.dtype == b.dtype and same_shape(a.shape, b.shape)


def _show(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _where(node: Any) -> str:
    if not isinstance(node, fx.Node):
        return repr(node)
    where = short_src(node)
    return f"%{node.name} = {node.target}" + (f" ({where})" if where else "")
