"""Liveness of an FX graph: who allocates, who shares memory with whom, and who is the last to touch it.

Views share the storage of their root, in-place writes through a view keep the root alive, the elements of a
multi-output operator are allocations of their own, outputs escape, and inputs and constants are nobody's activations.
Exact for a graph with exact fake values (what ``lowering/retrace.py`` makes). In the normal form, where strides of
inner nodes mean nothing, a ``reshape`` counts as a copy where the fake strides say that it is one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.ir import effects, provenance
from ascend_dynamo.ir.fakes import fake_mode_of
from ascend_dynamo.ir.sym import expr, numel
from ascend_dynamo.memory.buffers import Buffer
from ascend_dynamo.memory.lifetimes import Lifetime, Liveness, Size, Symbol
from ascend_dynamo.memory.views import is_dense, viewable

_aten = torch.ops.aten
Owner = tuple[fx.Node, int]  # the call that allocates, and which of its results

# The schema says "view", but the result may be a copy: it is one unless a view with its sizes exists.
_MAYBE = frozenset(
    {
        _aten.reshape.default,
        _aten.contiguous.default,
        _aten.flatten.using_ints,
        _aten.reshape_as.default,
        _aten.to.dtype,
        _aten.to.device,
        _aten.to.other,
        _aten.to.dtype_layout,
    }
)


def lifetimes_of(gm: fx.GraphModule, sizes: Mapping[str, int] | None = None) -> list[Buffer]:
    """The arena's buffers of a graph, for the planner: sizes of the first call, or those given by symbol name."""
    return liveness(gm).buffers(sizes)


def liveness(gm: fx.GraphModule) -> Liveness:
    """The lifetimes of every allocation of ``gm``; steps are its calls in program order. What an operator allocates for
    itself while it runs (workspace) is not seen."""
    return _Walk(gm).run()


class _Walk:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.owners: dict[fx.Node, frozenset[Owner]] = {}
        self.born: dict[Owner, int] = {}
        self.last: dict[Owner, int] = {}  # the end of the last step that may touch it
        self.labels: list[str] = []

    def run(self) -> Liveness:
        (output,) = self.gm.graph.find_nodes(op="output")
        inputs = [n for n in self.gm.graph.nodes if n.op in ("placeholder", "get_attr")]
        self.owners.update((n, frozenset()) for n in inputs)
        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                self._call(node)
        escaped = {o for n in output.all_input_nodes for o in self.owners[n]}
        steps = len(self.labels)
        found = [self._lifetime(o, steps, o in escaped) for o in self.born]
        return Liveness(
            tuple(sorted(found, key=lambda x: (x.start, x.id))),
            steps,
            symbols_of(self.gm),
            labels=tuple(self.labels),
        )

    def _call(self, node: fx.Node) -> None:
        shared = self._shared(node)
        if shared is not None and not _computes(node) and not _fresh_beside_views(node):
            self.owners[node] = shared  # a view is no step of its own
            self._touch(node)
            return
        start = len(self.labels)
        self.labels.append(_label(node))
        fresh = range(len(_results(node))) if shared is None else _fresh_beside_views(node)
        new = frozenset((node, i) for i in fresh if isinstance(_results(node)[i], torch.Tensor))
        for owner in new:
            self.born[owner] = start
            self.last[owner] = len(self.labels)
        self.owners[node] = new | (shared or frozenset())
        self._touch(node)

    def _touch(self, node: fx.Node) -> None:
        """The step of ``node`` is the last so far that touches its arguments."""
        now = len(self.labels)
        for n in (node, *node.all_input_nodes):
            for owner in self.owners[n]:
                self.last[owner] = max(self.last[owner], now)

    def _shared(self, node: fx.Node) -> frozenset[Owner] | None:
        """The allocations whose memory the node's value shares, or None if it is new."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source, index = node.args[0], node.args[1]
            own = frozenset(o for o in self.owners[source] if o == (source, index))
            return own or frozenset(o for o in self.owners[source] if o[0] is not source)
        sources = effects.viewed(node)
        if not sources or (node.target in _MAYBE and not _is_view(node, sources[0])):
            return None if _results(node) else frozenset()
        return frozenset(o for s in sources for o in self.owners[s])

    def _lifetime(self, owner: Owner, steps: int, escapes: bool) -> Lifetime:
        node, index = owner
        values = _results(node)
        value = values[index]
        return Lifetime(
            node.name if len(values) == 1 else f"{node.name}[{index}]",
            self.born[owner],
            steps if escapes else self.last[owner],
            storage_bytes(value),
            _label(node),
            provenance.src(node),
            output=escapes,
            device=value.device.type,
        )


def storage_bytes(value: torch.Tensor) -> Size:
    """The bytes that a new tensor takes: its elements, or what its strides span if that is more."""
    count = numel(value.shape)
    if not isinstance(count, int) or value.layout != torch.strided:
        return count * value.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True) if n) if count else 0
    return max(count, span if isinstance(span, int) else 0) * value.element_size()


def symbols_of(gm: fx.GraphModule) -> tuple[Symbol, ...]:
    """The size symbols that the inputs hold, each from the first input that has it."""
    env = compat.shape_env_of(fake_mode_of(gm))
    found: dict[str, Symbol] = {}

    def note(size: Any, index: int, dim: int | None) -> None:
        e = size if isinstance(size, int) else expr(size)
        if isinstance(e, sympy.Symbol) and e.name not in found:
            low, high = compat.symbol_range(e, env)
            hint = compat.size_hint(size) if size.node.has_hint() else None
            found[e.name] = Symbol(e.name, index, dim, hint, low, high, compat.symbol_source(e, env))

    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            note(value, i, None)
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                note(size, i, dim)
    return tuple(found.values())


def _results(node: fx.Node) -> tuple[Any, ...]:
    """The values of a call as a row; () if it makes no tensor."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value):
        return tuple(value)
    return ()


def _computes(node: fx.Node) -> bool:
    """A call that shares memory, and yet runs: an in-place operator."""
    return node.target is not operator.getitem and bool(effects.node_effects(node).writes)


def _label(node: fx.Node) -> str:
    return (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", node.name)
    )


def _fresh_beside_views(node: fx.Node) -> frozenset[int]:
    """Which results of an operator are new although others share memory with its arguments."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return frozenset()
    returns = node.target._schema.returns
    return frozenset(i for i, r in enumerate(returns) if r.alias_info is None) if len(returns) > 1 else frozenset()


def _is_view(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator that copies only where it must, must not."""
    old, new = source.meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return True
    if old.dtype != new.dtype or old.device != new.device:
        return False
    sizes, strides = ([compat.size_hint(s) for s in given] for given in (old.shape, old.stride()))
    if node.target is _aten.contiguous.default:
        return is_dense(sizes, strides)
    return viewable(sizes, strides, [compat.size_hint(s) for s in new.shape])
