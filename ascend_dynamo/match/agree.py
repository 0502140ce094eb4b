"""Comparing before and after: the algebra in float64, then rounding at the site's own dtype (or bits, at level O1)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.dialect import is_dialect_op, spec_of
from ascend_dynamo.dialect.equal import agree, bitwise

UNITS = 4.0  # roundings of the dtype that a result may be off beyond what eager is off
_aten = torch.ops.aten
_LAYOUT = frozenset((_aten.permute.default, _aten.reshape.default))
_DOTS = frozenset({_aten.linear.default, _aten.matmul.default, _aten.bmm.default})
_LIFTABLE = frozenset({"aten", "prims", "ascend", "_operator"})


def liftable(nodes: Iterable[fx.Node]) -> bool:
    """False if one of the calls is of a namespace whose kernels may compute in float32 whatever they are given."""
    return {getattr(n.target, "namespace", "_operator") for n in nodes if n.op == "call_function"} <= _LIFTABLE


def differs_in_algebra(was: Any, now: Any, exact: bool = True) -> str:
    """How two results computed in float64 differ beyond 1e-10 of a row ("" if they do not); ``exact=False``: beyond
    the rounding of float32, for operators that cannot be lifted."""
    found = agree(now, was, was) if exact else agree(now, None, was, dtype=torch.float32, c_ulp=UNITS)
    return "" if found is None else f"({found})"


def differs_at_dtype(
    was: Any, now: Any, exact: Any, level: int = 2, budget: Budget | None = None, dtype: torch.dtype | None = None
) -> str:
    """How ``now`` is further from ``exact`` than ``was`` and some rounding allow; at level O1 how its bits differ.

    ``dtype`` is what was rounded to on the way, if that is less than the precision of the result."""
    budget = budget or Budget()
    found = (
        bitwise(now, was)
        if level <= 1
        else agree(
            now,
            was,
            exact,
            dtype=dtype,
            c_ulp=budget.c_ulp,
            row_scale=None if budget.row_scale is None else [budget.row_scale],
        )
    )
    return "" if found is None else f"({found})"


@dataclass(frozen=True)
class Budget:
    """What an operator grants its kernels: units of rounding, and the size of what is added up in a row."""

    c_ulp: float = UNITS
    row_scale: torch.Tensor | None = None


PLAIN = Budget()  # of every other operator


def budget_of(node: fx.Node, lifted: Mapping[fx.Node, Any]) -> Budget:
    """The budget of the operator that makes ``node``, on float64 values: itself, a part of its result, or its result in
    another layout. Dialect operators declare theirs; a product of matrices may add up in any order."""
    if node.target in _LAYOUT and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        found = budget_of(source, lifted)
        if found.row_scale is None or source not in lifted:
            return found
        args = fx.node.map_arg(tuple(node.args[1:]), lambda n: lifted.get(n, n.meta.get("val")))
        return Budget(found.c_ulp, node.target(found.row_scale.expand_as(lifted[source]), *args))  # type: ignore[operator]
    index = None
    if node.target is operator.getitem:
        node, index = node.args  # type: ignore[assignment]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: lifted.get(n, n.meta.get("val")))
    if node.target in _DOTS and all(n in lifted for n in node.all_input_nodes):
        # What an operand may be off by, as a kernel of its own operator, goes through the product too.
        granted = [budget_of(a, lifted) if isinstance(a, fx.Node) else PLAIN for a in node.args]
        # Of an operand that was drawn, not computed, the inputs have no values: it is off by nothing.
        granted = [PLAIN if compat.is_fake(own.row_scale) else own for own in granted]
        operands: list[Any] = [a.abs() if isinstance(a, torch.Tensor) else a for a in args]
        for i, own in enumerate(granted):
            if own.row_scale is not None:
                operands[i] = torch.maximum(operands[i], own.row_scale.expand_as(operands[i]))
        units = UNITS + sum(own.c_ulp for own in granted if own.row_scale is not None)
        return Budget(units, node.target(*operands))  # type: ignore[operator]
    if not is_dialect_op(node.target):
        return PLAIN
    spec = spec_of(node.target)
    scale = spec.scale64(*args, **kwargs)
    return Budget(max(UNITS, spec.c_ulp), scale if scale is None or index is None else scale[index])
