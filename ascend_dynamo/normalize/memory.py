"""What memory allows: which nodes must stay exactly as captured, and which outputs must stay copies.

A captured graph is functional but for an epilogue of ``copy_`` to inputs, and the rules may then treat every value as a
value. Where a graph writes in its middle, everything that touches the written memory is *pinned*: left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ascend_dynamo.ir.effects import effects_of, node_effects, roots, viewed, written

_aten = torch.ops.aten
_COPY = _aten.copy_.default
Sinks = dict[tuple[fx.Node, int], frozenset[fx.Node]]


class Memory:
    """Facts about memory, taken from the graph as captured, before any rule runs.

    Opaque calls get ``meta["promised_strides"]``, one entry per tensor argument, if they have none yet.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.output: fx.Node = next(iter(graph.find_nodes(op="output")))
        self.writes = _scan(graph)
        self._sinks: Sinks = {}
        for i, leaf in enumerate(pytree.tree_leaves(self.output.args)):
            if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), torch.Tensor):
                self._sinks[self.output, i] = roots(leaf)
        for n in self.writes:
            if n.target is _COPY and isinstance(n.args[1], fx.Node):
                self._sinks[n, 1] = roots(n.args[1])
        self.pinned: frozenset[fx.Node] = frozenset() if self._epilogue(graph) else _pinned(graph, self.writes)

    def _epilogue(self, graph: fx.Graph) -> bool:
        """True if the graph only writes at its end, by ``copy_`` of values to inputs."""
        if not self.writes:
            return True
        if any(n.target is not _COPY or n.args[0].op != "placeholder" for n in self.writes):  # type: ignore[union-attr]
            return False
        targets = {n.args[0] for n in self.writes}
        first = self.writes[0]
        late = first.next
        while late.op != "output":
            if late.target is not _COPY:
                return False
            late = late.next
        done: set[Any] = set()
        for n in self.writes:
            if self._sinks.get((n, 1), frozenset()) & done:
                return False
            done.add(n.args[0])
        leaves = pytree.tree_leaves(self.output.args)
        return not any(
            owners & targets and leaves[i] not in targets and leaves[i] not in self.writes
            for (sink, i), owners in self._sinks.items()
            if sink is self.output
        )

    def restore_copies(self, graph: fx.Graph) -> int:
        """Put back the copies that callers can see; returns how many.

        An output that shared memory with nothing before must not share it with an input, a constant or another output
        now; and what is written to an input must have been read before an earlier write changes it.
        """
        count = 0
        done: set[fx.Node] = set()
        for n in self.writes:
            source: Any = n.args[1] if n.target is _COPY else None
            if isinstance(source, fx.Node) and (n, 1) in self._sinks:
                gained = roots(source) - self._sinks[n, 1]
                if gained & done:
                    n.update_arg(1, _copy(graph, source, self.writes[0]))
                    count += 1
            done.update(r for t in written(n) for r in roots(t))
        return count + self._restore_outputs(graph)

    def _restore_outputs(self, graph: fx.Graph) -> int:
        leaves, spec = pytree.tree_flatten(self.output.args)
        owners: list[tuple[frozenset[fx.Node], frozenset[fx.Node]]] = []
        count = 0
        for i, leaf in enumerate(leaves):
            before = self._sinks.get((self.output, i))
            if before is None or not isinstance(leaf, fx.Node):
                continue
            now = roots(leaf)
            lasting = {r for r in now - before if r.op in ("placeholder", "get_attr")}
            shares = any(now & other_now and not before & other for other, other_now in owners)
            if lasting or shares:
                leaves[i] = leaf = _copy(graph, leaf, self.writes[0] if self.writes else self.output)
                now = frozenset((leaf,))
                count += 1
            owners.append((before, now))
        if count:
            self.output.args = pytree.tree_unflatten(leaves, spec)
        return count


def _scan(graph: fx.Graph) -> list[fx.Node]:
    """The calls that write. On the way, notes what opaque calls were promised (``meta["promised_strides"]``)."""
    writes: list[fx.Node] = []
    plain: dict[int, bool] = {}  # by id of the target: neither writes nor looks at strides
    for n in graph.nodes:
        if n.op != "call_function":
            continue
        known = plain.get(id(n.target))
        if known is None:
            effects = effects_of(n.target)
            known = plain[id(n.target)] = not effects.writes and not effects.opaque
        if known:
            continue
        effects = node_effects(n)
        if effects.writes:
            writes.append(n)
        if effects.opaque and "promised_strides" not in n.meta:
            n.meta["promised_strides"] = _strides(n)
    return writes


def _strides(n: fx.Node) -> tuple[Any, ...]:
    """The strides of each tensor argument, None for one that is not strided."""
    tensors = [a.meta.get("val") for a in pytree.tree_leaves((n.args, n.kwargs)) if isinstance(a, fx.Node)]
    return tuple(
        tuple(t.stride()) if t.layout == torch.strided else None for t in tensors if isinstance(t, torch.Tensor)
    )


def _copy(graph: fx.Graph, value: fx.Node, before: fx.Node) -> fx.Node:
    """A copy of ``value``, made while it still has its value: in front of ``before`` (the first write)."""
    with graph.inserting_before(before):
        copy = graph.call_function(_aten.clone.default, (value,))
    copy.meta = {k: v for k, v in value.meta.items() if k not in ("ascend_prologue", "promised_strides")}
    return copy


def _pinned(graph: fx.Graph, writes: list[fx.Node]) -> frozenset[fx.Node]:
    """Every node whose memory is written, everything that may view it, and everything that reads it."""
    tainted: set[fx.Node] = {r for n in writes for t in written(n) for r in roots(t)}
    pinned: set[fx.Node] = set(tainted)
    for n in graph.nodes:
        if any(v in tainted for v in viewed(n)):
            tainted.add(n)
        if n in tainted or any(i in tainted for i in n.all_input_nodes):
            pinned.add(n)
    return frozenset(pinned)
