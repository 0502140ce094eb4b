"""Reading calls of the normal form: by schema name with defaults filled in, and refusing with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch, ReasonCode

aten = torch.ops.aten
ascend = torch.ops.ascend
convert = torch.ops.prims.convert_element_type.default
LAYOUT = frozenset((aten.permute.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor))


def is_call(n: Any, *targets: Any) -> bool:
    """True if ``n`` is a call of one of the given overloads."""
    return isinstance(n, fx.Node) and n.op == "call_function" and n.target in targets


def arg(n: fx.Node, i: int) -> Any:
    """Positional argument ``i``; typed Any, because fx types it as everything that an argument can be."""
    return n.args[i]


def arguments(n: fx.Node) -> dict[str, Any]:
    """All arguments of a call by schema name; what the call leaves out has the schema's default."""
    names, defaults = _schema(n.target)
    return {**defaults, **dict(zip(names, n.args, strict=False)), **n.kwargs}


@lru_cache(maxsize=1024)
def _schema(target: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of all arguments of an overload, and the defaults of those that have one."""
    schema = target._schema.arguments
    return tuple(s.name for s in schema), {s.name: s.default_value for s in schema if s.has_default_value()}


def number(x: Any) -> float | None:
    """A Python number as float, else None: symbolic sizes and tensors are not literals."""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def refuse(
    facts: Facts, code: ReasonCode, n: fx.Node, expected: str, found: str, progress: float = 0.0, fix: str = ""
) -> NoMatch:
    """A refusal at ``n`` with the user's source line filled in."""
    return NoMatch(code, n, expected, found, progress, facts.src(n), fix)


def dtype(facts: Facts, n: fx.Node) -> torch.dtype:
    return facts.val(n).dtype


def rank(facts: Facts, n: fx.Node) -> int:
    return facts.val(n).dim()


def same_shape(facts: Facts, a: fx.Node, b: fx.Node) -> bool:
    """True if both are tensors of one rank and every size is known to be equal."""
    va, vb = facts.val(a), facts.val(b)
    if not (isinstance(va, torch.Tensor) and isinstance(vb, torch.Tensor)):
        return False
    return va.dim() == vb.dim() and all(facts.known(s == t) for s, t in zip(va.shape, vb.shape, strict=True))


def commuted(n: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Both orders of the first two arguments of a commutative call."""
    a, b = arg(n, 0), arg(n, 1)
    return (a, b), (b, a)


def lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """True if every value of ``source`` is exactly a value of ``target`` (floating point only)."""
    if source == target:
        return True
    if not (source.is_floating_point and target.is_floating_point):
        return False
    return torch.promote_types(source, target) == target


def leaks(facts: Facts, nodes: Iterable[fx.Node], outputs: Iterable[fx.Node], progress: float) -> NoMatch | None:
    """A refusal if a replaced node that is not an output of the match is used outside of it."""
    inside, kept = set(nodes), set(outputs)
    for n in sorted(inside - kept, key=lambda n: n.name):
        outside = [u for u in n.users if u not in inside]
        if outside:
            what = "the graph's output" if outside[0].op == "output" else f"%{outside[0].name}"
            fix = "do not return or reuse this intermediate"
            return refuse(facts, "users", n, "an intermediate used only by the fusion", f"also used by {what}",
                          progress, fix)  # fmt: skip
    return None
