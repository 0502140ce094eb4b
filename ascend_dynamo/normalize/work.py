"""The state of one normalisation: where we are, what was computed already, and how results enter the graph.

Rules return *results* instead of editing the graph: a node that has the value already, a ``Call`` to make, an int, or
None to keep the node. A ``Call`` that replaces the current node is written into that node, so most rewrites need
neither a new node nor a new value; equal calls are made once (hash-consing is the CSE).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.fakes import FakeCache, fake_mode_of
from ascend_dynamo.ir.provenance import copy_provenance
from ascend_dynamo.ir.sym import SymEmitter

Size = int | torch.SymInt


class Call(NamedTuple):
    """A call to make. ``shape`` and ``dtype`` describe its value; ``like`` is a tensor on the same device."""

    target: Any
    args: tuple[Any, ...]
    shape: tuple[Size, ...]
    like: torch.Tensor
    dtype: torch.dtype

    @property
    def kwargs(self) -> dict[str, Any]:
        return {}


Value = fx.Node | Call


class Work:
    """One normalisation of one graph, walked forward; ``cur`` is the node under the rules."""

    def __init__(self, unit: GraphUnit) -> None:
        self.unit = unit
        self.graph = unit.gm.graph
        self.sizes = SymEmitter(self.graph)
        self.fakes = FakeCache(fake_mode_of(unit.gm))
        self.cur: fx.Node = next(iter(self.graph.nodes))
        self.changed = 0
        self._table: dict[Any, fx.Node] = {}

    def size(self, size: Size) -> int | fx.Node:
        """A size as a graph argument."""
        return size if type(size) is int else self.sizes.emit(size, self.cur)

    def node(self, value: Value) -> fx.Node:
        """The node of a value: an equal earlier call, or a new one in front of the current node."""
        if isinstance(value, fx.Node):
            return value
        key = call_key(value.target, value.args)
        node = self._table.get(key)
        if node is None:
            with self.graph.inserting_before(self.cur):
                node = self.graph.call_function(value.target, value.args)
            node.meta["val"] = self.fakes.tensor(value.shape, value.like, value.dtype)
            copy_provenance(self.cur, node)
            self._table[key] = node
            self.changed += 1
        return node

    def place(self, value: Value) -> None:
        """Let ``value`` take the place of the current node."""
        node = self.cur
        if isinstance(value, fx.Node):
            if value is not node:
                self.replace(node, value)
            return
        key = call_key(value.target, value.args)
        found = self._table.get(key)
        if found is not None:
            self.replace(node, found)
            return
        self._table[key] = node
        if node.target is not value.target:
            node.target = value.target
            self.changed += 1
            node.args, node.kwargs = value.args, {}
        elif node.kwargs or node.args != value.args:
            self.changed += 1
            node.args, node.kwargs = value.args, {}

    def merge(self, node: fx.Node) -> None:
        """Replace a kept node, which may be merged, by an equal earlier one, if there is one."""
        key = call_key(node.target, node.args, node.kwargs)
        found = self._table.setdefault(key, node)
        if found is not node:
            self.replace(node, found)

    def constant(self, value: torch.Tensor, like: torch.Tensor) -> fx.Node:
        """A get_attr node for a constant of the graph; ``like`` is its fake value."""
        gm = self.unit.gm
        name = f"_ascend_folded{sum(1 for b in gm._buffers if b.startswith('_ascend_folded'))}"
        gm.register_buffer(name, value, persistent=False)
        with self.graph.inserting_before(self.cur):
            node = self.graph.get_attr(name)
        node.meta["val"] = like
        copy_provenance(self.cur, node)
        return node

    def replace(self, node: fx.Node, by: Any) -> None:
        """Let ``by`` (a node, a list of nodes or a literal) take over every use of ``node``."""
        self.changed += 1
        if isinstance(by, fx.Node):
            node.replace_all_uses_with(by)
            return
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n: by if n is node else n)  # type: ignore[assignment]
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: by if n is node else n)  # type: ignore[assignment]


def call_key(target: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
    """A hashable key, equal only for equal calls: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    # By id: hashing an operator overload takes longer than all the rest.
    key = (id(target), tuple([a if type(a) is fx.Node else _key(a) for a in args]))
    if kwargs:
        key = (*key, tuple((k, _key(v)) for k, v in sorted(kwargs.items())))  # type: ignore[assignment]
    return key


def _key(a: Any) -> Any:
    t = type(a)
    if t is fx.Node or t is int:
        return a
    if isinstance(a, (list, tuple)):
        return tuple([_key(v) for v in a])
    if t is float:
        return ("float", repr(a))
    if t is bool:
        return ("bool", a)
    if t is slice:
        return ("slice", _key(a.start), _key(a.stop), _key(a.step))
    return a if a.__hash__ is not None else ("id", id(a))


def shape_of(value: Value) -> tuple[Size, ...]:
    """The sizes of a value."""
    return value.shape if isinstance(value, Call) else value.meta["val"].shape


def dtype_of(value: Value) -> torch.dtype:
    return value.dtype if isinstance(value, Call) else value.meta["val"].dtype


def like_of(value: Value) -> torch.Tensor:
    return value.like if isinstance(value, Call) else value.meta["val"]
