"""Calls with every argument filled in by schema, so that a pattern can compare them position by position."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_MISSING = object()
_Slots = tuple[tuple[str, Any, bool], ...]  # (name, default, keyword only) of every argument
_slots: dict[Any, _Slots | None] = {}

COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.eq.Tensor,
        aten.ne.Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.logical_xor.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
        operator.add,
        operator.mul,
    }
)


def slots(target: Any) -> _Slots | None:
    """Name, default and keyword-only flag of every argument of an overload; None if it has no schema."""
    try:
        return _slots[target]
    except KeyError:
        schema = getattr(target, "_schema", None)
        found: _Slots | None = None
        if schema is not None:
            found = tuple(
                (a.name, a.default_value if a.has_default_value() else _MISSING, a.kwarg_only) for a in schema.arguments
            )
        _slots[target] = found
        return found


def canonical(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of a call in schema order with the defaults filled in; never drops an argument."""
    args, kwargs = node.args, node.kwargs
    table = slots(node.target)
    if table is None:
        return (*args, *kwargs.values()) if kwargs else args
    if not kwargs and len(args) == len(table):
        return args
    return tuple(args[i] if i < len(args) else kwargs.get(name, default) for i, (name, default, _) in enumerate(table))


def split(target: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Canonical arguments as a call's ``(args, kwargs)`` in normal form: what equals its default is left out."""
    table = slots(target)
    if table is None:
        return args, {}
    positional: list[Any] = []
    kwargs: dict[str, Any] = {}
    for value, (name, default, keyword) in zip(args, table, strict=True):
        if same_literal(value, default):
            if not keyword:
                positional.append(_MISSING)
        elif keyword:
            kwargs[name] = value
        else:
            positional.append(value)
    while positional and positional[-1] is _MISSING:
        positional.pop()
    defaults = [default for _, default, keyword in table if not keyword]
    return tuple(defaults[i] if value is _MISSING else value for i, value in enumerate(positional)), kwargs


def same_literal(a: Any, b: Any) -> bool:
    """Strict equality of literals: True is not 1, 0.0 is not -0.0, but 2 and 2.0 are the same number."""
    if a is b:
        return True
    if isinstance(a, bool) or isinstance(b, bool):
        return False
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return (a == b and (a != 0 or str(float(a)) == str(float(b)))) or (a != a and b != b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_literal, a, b))
    return type(a) is type(b) and bool(a == b) if isinstance(a, (str, torch.dtype, torch.device)) else False
