"""Reading the pieces of rotary spellings: the two members of each pair, how they are put together, the tables."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arg, arguments, aten, is_call, number, rank, refuse
from ._window import Window, joined, window, woven


def negated(n: Any) -> fx.Node | None:
    """``v`` if ``n`` is ``-v`` (neg, or a product with -1), else None."""
    if is_call(n, aten.neg.default):
        return arg(n, 0)
    if is_call(n, aten.mul.Tensor) and number(arg(n, 1)) == -1.0:
        return arg(n, 0)
    return None


def members(facts: Facts, first: Any, second: Any, interleaved: bool) -> Window | None:
    """The window of which ``first`` and ``second`` hold the first and second member of each pair, else None.

    Half layout: ``x[..., :K]`` and ``x[..., K:]``. Interleaved: ``x[..., ::2]`` and ``x[..., 1::2]``.
    """
    join = woven if interleaved else joined
    return join(window(facts, first), window(facts, second))


def stacked_pair(facts: Facts, n: Any, interleaved: bool) -> tuple[Any, Any, tuple[fx.Node, ...]] | None:
    """(first, second, nodes in between) if ``n`` puts two tensors together as the members of its pairs, else None.

    Half layout: ``cat([first, second], -1)``. Interleaved: stacked on a new last axis, which is then flattened away.
    """
    inner: list[fx.Node] = []
    if interleaved:
        if not is_call(n, aten.reshape.default):
            return None
        inner.append(n)
        n = arg(n, 0)
    if not is_call(n, aten.cat.default):
        return None
    parts, dim = arg(n, 0), arguments(n)["dim"]
    if len(parts) != 2 or dim not in (-1, rank(facts, n) - 1):
        return None
    inner.append(n)
    first, second = parts
    if not interleaved:
        return first, second, tuple(inner)
    if not flattens_pairs(facts, inner[0], n):
        return None
    sources: list[Any] = []
    for part in (first, second):
        if not is_call(part, aten.reshape.default) or not _adds_last_axis(facts, part):
            return None
        inner.append(part)
        sources.append(arg(part, 0))
    return sources[0], sources[1], tuple(inner)


def flattens_pairs(facts: Facts, flat: fx.Node, pairs: fx.Node) -> bool:
    """``[..., K, 2] -> [..., 2K]``."""
    wide, narrow = facts.val(flat).shape, facts.val(pairs).shape
    same = len(wide) == len(narrow) - 1 and all(
        facts.known(s == t) for s, t in zip(wide[:-1], narrow[:-2], strict=True)
    )
    return same and facts.known(narrow[-1] == 2)


def _adds_last_axis(facts: Facts, n: fx.Node) -> bool:
    """``[...] -> [..., 1]``."""
    source, shape = facts.val(arg(n, 0)).shape, facts.val(n).shape  # type: ignore[arg-type]
    same = len(shape) == len(source) + 1 and all(facts.known(s == t) for s, t in zip(source, shape[:-1], strict=True))
    return same and facts.known(shape[-1] == 1)


def broadcast_table(facts: Facts, anchor: fx.Node, x: fx.Node, table: fx.Node) -> NoMatch | None:
    """A refusal unless ``table`` [..., D] broadcasts to ``x`` without enlarging it, with all of D present."""
    shape, full = facts.val(table).shape, facts.val(x).shape
    fits = len(shape) <= len(full) and all(
        facts.known(s == 1) or facts.known(s == t) for s, t in zip(reversed(shape), reversed(full), strict=False)
    )
    if fits and len(shape) and facts.known(shape[-1] == full[-1]):
        return None
    return refuse(facts, "shape", anchor, f"tables that broadcast to {list(full)}", f"{list(shape)}", 0.8)
