"""What an operator does besides computing: writes, aliases, draws random numbers, or acts on the world."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

# Namespaces whose operators are functions of their arguments whenever their schema says so.
_KNOWN_NAMESPACES = frozenset({"aten", "prims", "ascend", "ascend_cpu", "ascend_capture"})
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "symm_mem"})
_PURE_MODULES = frozenset({"_operator", "operator", "math", "builtins"})
# View-like by implementation although the schema does not say so.
_HIDDEN_VIEWS = frozenset({_aten._unsafe_view.default})
# The result, or its legality, depends on strides and not only on values.
_STRIDED = frozenset(
    {
        _aten.as_strided.default,
        _aten.as_strided_scatter.default,
        _aten.view.dtype,
        _aten.view_as_real.default,
        _aten.view_as_complex.default,
        _aten._reshape_alias.default,
        _aten.sym_stride.int,
        _aten.sym_storage_offset.default,
        _aten.is_contiguous.default,
        _aten.set_.source_Tensor,
    }
)
_SDPA = _aten.scaled_dot_product_attention.default  # random only when it drops out
_KNOWN_CALLS = frozenset({torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float, torch.sym_ite})


@dataclass(frozen=True)
class Effects:
    """``writes`` and ``views`` name arguments: an int for a positional one, a str for a keyword-only one.

    ``views`` are the arguments that results may alias; ``other`` is an effect that is neither a write of an argument
    nor a random draw (assertions, collectives, higher-order operators, unknown callables); ``opaque`` means that the
    operator may look at the strides of its inputs.
    """

    writes: tuple[int | str, ...] = ()
    views: tuple[int | str, ...] = ()
    random: bool = False
    other: bool = False
    opaque: bool = False

    @property
    def pure(self) -> bool:
        return not (self.writes or self.random or self.other)


_PURE = Effects()


@lru_cache(maxsize=4096)
def effects_of(target: Any) -> Effects:
    """The effects of a call target, from its schema and tags."""
    if not isinstance(target, torch._ops.OpOverload):
        known = target in _KNOWN_CALLS or getattr(target, "__module__", "") in _PURE_MODULES
        if known or getattr(math, getattr(target, "__name__", ""), None) is target:
            return _PURE
        return Effects(other=True, opaque=True)
    schema = target._schema
    aliases = {s for r in schema.returns if r.alias_info is not None for s in r.alias_info.before_set}
    writes: list[int | str] = []
    views: list[int | str] = []
    for i, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is None:
            continue
        key = argument.name if argument.kwarg_only else i
        if info.is_write:
            writes.append(key)
        if aliases & info.before_set or "*" in info.after_set:  # (a -> *): elements of a returned list
            views.append(key)
    if target in _HIDDEN_VIEWS:
        views.append(0)
    namespace = target.namespace
    random = torch.Tag.nondeterministic_seeded in target.tags
    other = namespace in _COLLECTIVES or (not schema.returns and not writes)
    opaque = namespace not in _KNOWN_NAMESPACES or target in _STRIDED or random
    return Effects(tuple(writes), tuple(views), random, other, opaque)


def node_effects(node: fx.Node) -> Effects:
    """The effects of a node; placeholders, constants and the output have none of their own."""
    if node.op == "call_function":
        if node.target is _SDPA and not (len(node.args) > 4 and node.args[4]) and not node.kwargs.get("dropout_p"):
            return _PURE
        return effects_of(node.target)
    if node.op in ("call_module", "call_method"):
        return Effects(other=True, opaque=True)
    return _PURE


def is_pure(node: fx.Node) -> bool:
    """True if the node may be removed when unused, and moved or merged with an equal one when no write intervenes."""
    return node_effects(node).pure


def is_opaque(node: fx.Node) -> bool:
    """True if the node's result may depend on the strides of its inputs."""
    return node_effects(node).opaque


def argument(node: fx.Node, key: int | str) -> Any:
    """The argument that an ``Effects`` entry names, or None if the call leaves it out."""
    if isinstance(key, str):
        return node.kwargs.get(key)
    if key < len(node.args):
        return node.args[key]
    if isinstance(node.target, torch._ops.OpOverload):
        return node.kwargs.get(node.target._schema.arguments[key].name)
    return None


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose memory the node writes."""
    return _nodes(node, node_effects(node).writes)


def viewed(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes whose memory the node's result may share."""
    if node.op == "call_function" and node.target is operator.getitem:
        source = node.args[0]
        return viewed(source) if isinstance(source, fx.Node) else ()
    return _nodes(node, node_effects(node).views)


def roots(node: fx.Node) -> frozenset[fx.Node]:
    """The nodes that may own the memory of ``node``'s value: itself, unless it may be a view."""
    found: set[fx.Node] = set()
    todo, seen = [node], {node}
    while todo:
        n = todo.pop()
        sources = viewed(n)
        if not sources:
            found.add(n)
        for s in sources:
            if s not in seen:
                seen.add(s)
                todo.append(s)
    return frozenset(found)


def _nodes(node: fx.Node, keys: tuple[int | str, ...]) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    for key in keys:
        value = argument(node, key)
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, fx.Node):
                found.append(v)
    return tuple(found)


def remove_dead(graph: fx.Graph) -> bool:
    """Erase calls and constants that nobody uses and that do nothing; returns whether there were any."""
    removed = False
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr") and (node.op == "get_attr" or is_pure(node)):
            graph.erase_node(node)
            removed = True
    return removed
