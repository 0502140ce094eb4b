"""Mutating custom operators as AOTAutograd leaves them: ``auto_functionalized`` calls, read once for everybody.

The call takes the memory that the operator writes as *bases* and returns the operator's results and, behind them, the
bases as they are afterwards. Version 1 passes the written arguments themselves; version 2 passes each base once and
says how every written argument is a view of one: all of it, a slice, or by strides.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

_V1, _V2 = torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2


@dataclass(frozen=True)
class View:
    """A written argument: base ``base``, all of it ("whole"), ``spec`` = (dim, start, end) of it ("slice"), or
    ``spec`` = (size, stride, storage offset) in its storage ("strided")."""

    base: int
    kind: Literal["whole", "slice", "strided"] = "whole"
    spec: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Functionalized:
    """One call. ``plain`` holds the arguments that are only read; ``views`` the written ones (None: not given).

    Result ``i`` of the call is result ``i`` of ``op`` for i < ``first`` (None if it has none); result ``first + j`` is
    base ``j`` afterwards; a base is None where version 1 was not given the argument.
    """

    node: fx.Node
    op: Any
    plain: dict[str, Any]
    views: dict[str, View | None]
    bases: tuple[fx.Node | None, ...]
    first: int

    def results(self) -> dict[int, fx.Node]:
        """The nodes that take a result, by its index; the last of equal ones."""
        return {n.args[1]: n for n in self.node.users if n.target is operator.getitem}  # type: ignore[misc]


def read_functionalized(n: fx.Node) -> Functionalized | None:
    """``n`` as a call of a mutating operator; None if it is none, or one whose written arguments are lists."""
    if n.op != "call_function" or n.target not in (_V1, _V2) or not n.args:
        return None
    op: Any = n.args[0]
    if not isinstance(op, torch._ops.OpOverload) or any(u.target is not operator.getitem for u in n.users):
        return None
    if any(r.alias_info is not None for r in op._schema.returns):
        return None
    written = [a for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if any(not str(a.type).removeprefix("Optional[").startswith("Tensor") for a in written):
        return None
    given: dict[str, Any] = dict(n.kwargs)
    bases: list[Any] = list(given.pop("_all_bases", ()))
    given.pop("_only_clone_these_tensors", None)
    views: dict[str, View | None] = {}
    for a in written:
        views[a.name] = _v1(given, a.name, bases) if n.target is _V1 else _v2(given, a.name)
    names = {a.name for a in op._schema.arguments}
    if not names.issuperset(given) or not all(b is None or isinstance(b, fx.Node) for b in bases):
        return None
    return Functionalized(n, op, given, views, tuple(bases), max(1, len(op._schema.returns)))


def _v1(given: dict[str, Any], name: str, bases: list[Any]) -> View | None:
    """Every written argument has a place among the bases, given or not."""
    value = given.pop(name, None)
    bases.append(value)
    return None if value is None else View(len(bases) - 1)


def _v2(given: dict[str, Any], name: str) -> View | None:
    prefix = f"_{name}_"
    spec = {key: given.pop(prefix + key) for key in _KEYS if prefix + key in given}
    base = spec.get("base_index")
    if base is None:
        return None
    if "storage_offset" in spec:
        return View(base, "strided", (spec["size"], spec["stride"], spec["storage_offset"]))
    if "slice_dim" in spec:
        return View(base, "slice", (spec["slice_dim"], spec["slice_start"], spec["slice_end"]))
    return View(base)


_KEYS = ("base_index", "alias", "size", "stride", "storage_offset", "slice_dim", "slice_start", "slice_end")
