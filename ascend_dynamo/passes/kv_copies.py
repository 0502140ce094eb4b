"""What of a finished graph still copies a cache: the figure that must be zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir import effects
from ascend_dynamo.ir.functionalized import read_functionalized
from ascend_dynamo.passes.homes import COPY, IN_PLACE, SCATTER, TWINS, written_by_twin

_aten, _ascend = torch.ops.aten, torch.ops.ascend
_JOINS = frozenset({_aten.cat.default, _aten.constant_pad_nd.default})
_COPIES = frozenset(
    {_aten.clone.default, _aten.roll.default, _aten.index_select.default, _aten.index.Tensor, SCATTER, *IN_PLACE}
)


def kv_copies(unit: GraphUnit, at_least: int | None = None) -> tuple[str, ...]:
    """The calls of ``unit`` that put all of a cache, or of a part of one, into other memory; one line for each.

    Caches are the inputs of three axes or more that the graph writes, reads as pages or joins new tokens to;
    parameters are none. Counted are clones, cats, functional writes, rolls, gathers and what is copied back to an
    input. Parts smaller than ``at_least`` elements (default: 1/64 of the smallest cache) are not counted.
    """
    graph = unit.gm.graph
    inputs = [n for n in graph.find_nodes(op="placeholder") if _large(n) and n.name not in unit.params]
    calls = [n for n in graph.nodes if n.op == "call_function"]
    caches = {n for n in inputs if any(_keeps(user, n) for user in n.users)}
    caches |= {r for n in calls for t in effects.written(n) for r in effects.roots(t) if r in inputs}
    if not caches:
        return ()
    sizes = {n: _elements(n) for n in caches}
    least = max(1, min(sizes.values()) // 64) if at_least is None else at_least
    held: set[fx.Node] = set(caches)  # caches, views of them, and copies
    found: list[str] = []
    for n in calls:
        sources = [s for s in n.all_input_nodes if s in held]
        if not sources:
            continue
        if any(v in held for v in effects.viewed(n)):
            held.add(n)
            continue
        copied = [s for s in _copied(n) if s in held and _elements(s) >= least]
        if copied:
            held.add(n)
            found.append(f"%{n.name} = {n.target} copies %{copied[0].name} ({_elements(copied[0])} elements)")
    return tuple(found)


def _large(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= 3


def _keeps(user: fx.Node, n: fx.Node) -> bool:
    """True if ``user`` reads ``n`` as pages, or joins new tokens to it and the result is returned."""
    name = str(user.target)
    if name.startswith("ascend.kv_append") or user.target in _JOINS:
        return any(u.op == "output" for u in user.users)
    at = 1 if name.startswith("ascend.paged_attention") else 2 if name.startswith("ascend.mla_attention") else 0
    paged = at or name.startswith("ascend.kv_gather")
    return bool(paged) and n in user.args[at : at + 2]


def _elements(n: fx.Node) -> int:
    value = n.meta.get("val")
    total = 1
    for size in value.shape if isinstance(value, torch.Tensor) else ():
        total *= compat.size_hint(size)
    return total


def _copied(n: fx.Node) -> list[fx.Node]:
    """The operands of which a call copies everything that it reads."""
    target: Any = n.target
    if target in _COPIES:
        source = n.args[0]
        whole = isinstance(source, fx.Node) and _elements(n) * 2 >= _elements(source)
        return [source] if whole else []  # type: ignore[list-item]
    if target in _JOINS:
        pieces = n.args[0] if isinstance(n.args[0], (list, tuple)) else (n.args[0],)
        return [p for p in pieces if isinstance(p, fx.Node)]
    if target is COPY:
        return [n.args[1]] if isinstance(n.args[1], fx.Node) else []
    if target in TWINS:
        return written_by_twin(n)
    if target is _ascend.kv_gather.default:
        return [n.args[0]]  # type: ignore[list-item]
    call = read_functionalized(n)
    return [b for b in call.bases if b is not None] if call is not None else []
