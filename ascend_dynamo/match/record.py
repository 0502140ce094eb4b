"""A quick tracer for the small functions of patterns: records dispatched calls straight into a graph.

It gives what ``capture.trace`` gives for functions without writes and without tensors of their own, at a tenth of its
cost; for the others it says so, and the caller captures them in full.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_dynamo.capture import KeepComposites, make_unit
from ascend_dynamo.contracts import GraphUnit


class _Beyond(Exception):
    """The function does something that only a full capture can express."""


class _Module(fx.GraphModule):
    """A module that is read and never run: generating its Python code would cost more than tracing."""

    def recompile(self) -> Any:
        return None


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.nodes: dict[int, tuple[fx.Node, torch.Tensor]] = {}

    def track(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta["val"] = tensor
        self.nodes[id(tensor)] = (node, tensor)

    def node(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found = self.nodes.get(id(value))
            if found is None:
                raise _Beyond
            return found[0]
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.node, value))
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        several = isinstance(out, (list, tuple)) and any(isinstance(o, torch.Tensor) for o in out)
        if not several and not isinstance(out, torch.Tensor):
            return out
        if func._schema.is_mutable:
            raise _Beyond
        node = self.graph.call_function(func, self.node(args), {k: self.node(v) for k, v in kwargs.items()})
        if not several:
            if id(out) in self.nodes:
                raise _Beyond
            self.track(out, node)
            return out
        node.meta["val"] = tuple(out)
        for i, value in enumerate(out):
            if isinstance(value, torch.Tensor):
                self.track(value, self.graph.call_function(operator.getitem, (node, i)))
        return out


def record(fn: Callable[..., Any], args: Sequence[Any], mode: Any) -> GraphUnit | None:
    """``fn(*args)`` as a captured graph, or None if it needs a full capture.

    Tensors among ``args`` are fakes of ``mode``. The module of the unit has no code: it is for reading. Raises what
    ``fn`` raises.
    """
    graph = fx.Graph()
    recorder = _Recorder(graph)
    for i, a in enumerate(args):
        if isinstance(a, torch.Tensor):
            recorder.track(a, graph.placeholder(f"arg{i}"))
    try:
        with torch.no_grad(), mode, recorder, KeepComposites():
            out = fn(*args)
        graph.output(recorder.node(tuple(out) if isinstance(out, (tuple, list)) else (out,)))
    except _Beyond:
        return None
    return make_unit(_Module({}, graph))
