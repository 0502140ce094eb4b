"""Arguments by schema: positional where they can be, defaults filled in or left out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

_SIMPLE = frozenset({int, float, bool, str, type(None)})


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
    args = list(n.args)
    sig = signature(n.target)
    assert sig is not None
    for i in range(len(args), len(sig.names)):
        args.append(n.kwargs.get(sig.names[i], sig.defaults[i]))
    return args


def trim(n: fx.Node, sig: Signature) -> bool:
    """Write the call in its shortest form: positional where possible, nothing that equals its default."""
    args: Any = n.args
    kwargs: Any = n.kwargs
    if not kwargs and (not args or type(args[-1]) is fx.Node):
        return False
    count = len(kwargs)
    if kwargs:
        kwargs = dict(kwargs)
        moved = [i for i in range(len(args), len(sig.names)) if sig.names[i] in kwargs]
        if moved:
            rest = range(len(args), moved[-1] + 1)
            args = (*args, *(kwargs.pop(sig.names[i], sig.defaults[i]) for i in rest))
        kwargs = {k: v for k, v in kwargs.items() if k not in sig.keywords or not _equal(v, sig.keywords[k])}
    keep = len(args)
    while keep and _equal(args[keep - 1], sig.defaults[keep - 1]):
        keep -= 1
    changed = False
    if keep != len(n.args):
        n.args = tuple(args[:keep])
        changed = True
    if len(kwargs) != count:
        n.kwargs = kwargs
        changed = True
    return changed


def _default(argument: Any) -> Any:
    return argument.default_value if argument.has_default_value() else REQUIRED


def _equal(value: Any, default: Any) -> bool:
    if default is REQUIRED:
        return False
    if isinstance(value, (list, tuple)):
        return isinstance(default, (list, tuple)) and len(value) == len(default) and all(map(_equal, value, default))
    return value is default or (type(value) in _SIMPLE and type(default) in _SIMPLE and value == default)
