"""Who writes, reads and keeps the memory of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .._calls import arg, aten, is_call


@dataclass(frozen=True)
class Store:
    """``node`` (a ``copy_`` or the graph's output) keeps a value; ``whole`` says that it keeps all of its tokens."""

    node: fx.Node
    whole: bool


def stores_of(facts: Facts, n: fx.Node, tokens: int) -> list[Store]:
    """What keeps ``n`` beyond this graph: all of it, or its last tokens (a slice of axis ``tokens``)."""
    found: list[Store] = []
    for user in n.users:
        if _keeps(user, n):
            found.append(Store(user, True))
        elif is_call(user, aten.slice.Tensor) and arg(user, 1) == tokens and _to_the_end(facts, user):
            found += [Store(last, False) for last in user.users if _keeps(last, user)]
    return found


def writers_of(facts: Facts, base: fx.Node) -> list[fx.Node]:
    """Every call of the graph that may write the memory of ``base``, an input."""
    (output,) = base.graph.find_nodes(op="output")
    return [e for e in facts.effects_between(base, output) if any(_same_memory(facts, w, base) for w in _written(e))]


def readers_of(base: fx.Node) -> list[fx.Node]:
    """Every call that reads elements of ``base``, and not only a size of it."""
    return [n for n in base.users if n.target not in (aten.sym_size.int, aten.sym_numel.default)]


def _same_memory(facts: Facts, n: fx.Node, base: fx.Node) -> bool:
    """Inputs that are written do not overlap (AOTAutograd sees to it), which spares most questions."""
    return n is base if n.op == "placeholder" else facts.may_alias(n, base)


def _keeps(user: fx.Node, n: fx.Node) -> bool:
    return user.op == "output" or (is_call(user, aten.copy_.default) and arg(user, 1) is n)


def _to_the_end(facts: Facts, n: fx.Node) -> bool:
    source, dim, end = arg(n, 0), arg(n, 1), arg(n, 3)
    last = facts.val(end) if isinstance(end, fx.Node) else end
    return bool(arg(n, 4) == 1 and facts.known(last == facts.val(source).shape[dim]))


def _written(e: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes; all of them if its schema does not say."""
    target: Any = e.target
    if not isinstance(target, torch._ops.OpOverload):
        return list(e.all_input_nodes)
    if target is aten.copy_.default:
        return [arg(e, 0)]
    found: list[fx.Node] = []
    for i, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = e.args[i] if i < len(e.args) and not argument.kwarg_only else e.kwargs.get(argument.name)
        values = value if isinstance(value, (list, tuple)) else (value,)
        found += [v for v in values if isinstance(v, fx.Node)]
    return found
