"""Calls with every argument filled in by schema, so that a pattern can compare them position by position."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_MISSING = object()


class Slots:
    """The arguments of an overload in schema order: names, defaults, and which are keyword-only."""

    __slots__ = ("defaults", "keyword", "names", "target")

    def __init__(self, target: Any, arguments: Any) -> None:
        self.target = target  # keeps the target alive, and with it the id under which these slots are known
        self.names = tuple(a.name for a in arguments)
        self.defaults = tuple(a.default_value if a.has_default_value() else _MISSING for a in arguments)
        self.keyword = tuple(a.kwarg_only for a in arguments)


_slots: dict[int, Slots | None] = {}  # by id: hashing an overload is slow

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


def slots(target: Any) -> Slots | None:
    """The arguments that a call target declares; None if it has no schema."""
    found = _slots.get(id(target), _MISSING)
    if found is _MISSING:
        schema = getattr(target, "_schema", None)
        if schema is None:
            return None
        found = _slots[id(target)] = Slots(target, schema.arguments)
    return found  # type: ignore[return-value]


def canonical(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of a call in schema order with the defaults filled in; never drops an argument."""
    args, kwargs = node.args, node.kwargs
    table = slots(node.target)
    if table is None:
        return (*args, *kwargs.values()) if kwargs else args
    rest = table.defaults[len(args) :]
    if not kwargs:
        return args + rest if rest else args
    return args + tuple(map(kwargs.get, table.names[len(args) :], rest))


def split(target: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Canonical arguments as a call's ``(args, kwargs)`` in normal form: what equals its default is left out."""
    table = slots(target)
    if table is None:
        return args, {}
    positional: list[Any] = []
    kwargs: dict[str, Any] = {}
    needed = 0
    for value, name, default, keyword in zip(args, table.names, table.defaults, table.keyword, strict=True):
        given = not same_literal(value, default)
        if not keyword:
            positional.append(value)
            needed = len(positional) if given else needed
        elif given:
            kwargs[name] = value
    return tuple(positional[:needed]), kwargs


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
