"""Arguments by schema: positional where they can be, defaults filled in or left out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

_SIMPLE = (int, float, bool, str, type(None))


class Signature(NamedTuple):
    """Positional argument names and defaults, and the defaults of keyword-only arguments. No default: ``REQUIRED``."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    keywords: dict[str, Any]


class _Required:
    def __repr__(self) -> str:
        return "<required>"


REQUIRED = _Required()


@lru_cache(maxsize=4096)
def signature(target: Any) -> Signature | None:
    """The signature of an operator overload, None for any other callable."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    positional = [a for a in target._schema.arguments if not a.kwarg_only]
    keywords = {a.name: _default(a) for a in target._schema.arguments if a.kwarg_only}
    return Signature(tuple(a.name for a in positional), tuple(_default(a) for a in positional), keywords)


def bind(n: fx.Node) -> list[Any]:
    """All positional arguments of a call, defaults filled in."""
    sig = signature(n.target)
    assert sig is not None
    args = list(n.args)
    for i in range(len(args), len(sig.names)):
        args.append(n.kwargs.get(sig.names[i], sig.defaults[i]))
    return args


def trim(n: fx.Node) -> bool:
    """Write the call in its shortest form: positional where possible, nothing that equals its default."""
    sig = signature(n.target)
    if sig is None:
        return False
    args: list[Any] = list(n.args)
    kwargs: dict[str, Any] = dict(n.kwargs)
    if kwargs:
        moved = [i for i in range(len(args), len(sig.names)) if sig.names[i] in kwargs]
        for i in range(len(args), moved[-1] + 1 if moved else 0):
            args.append(kwargs.pop(sig.names[i], sig.defaults[i]))
        kwargs = {k: v for k, v in kwargs.items() if k not in sig.keywords or not _equal(v, sig.keywords[k])}
    while args and _equal(args[-1], sig.defaults[len(args) - 1]):
        args.pop()
    changed = False
    if len(args) != len(n.args):
        n.args = tuple(args)
        changed = True
    if len(kwargs) != len(n.kwargs):
        n.kwargs = kwargs
        changed = True
    return changed


def _default(argument: Any) -> Any:
    return argument.default_value if argument.has_default_value() else REQUIRED


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return isinstance(default, (list, tuple)) and len(value) == len(default) and all(map(_equal, value, default))
    return value is default or (type(value) in _SIMPLE and type(default) in _SIMPLE and value == default)
