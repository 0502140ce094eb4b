"""Reading the pieces of rotary spellings: the two members of each pair, how they are put together, the tables."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arguments, aten, is_call, number, rank, refuse


def negated(n: Any) -> fx.Node | None:
    """``v`` if ``n`` is ``-v`` (neg, or a product with -1), else None."""
    if is_call(n, aten.neg.default):
        return n.args[0]
    if is_call(n, aten.mul.Tensor) and number(n.args[1]) == -1.0:
        return n.args[0]
    return None


def pair_slices(facts: Facts, first: Any, second: Any, interleaved: bool) -> fx.Node | None:
    """The ``x`` of which ``first`` and ``second`` hold the first and second member of each pair, else None.

    Half layout: ``x[..., :D/2]`` and ``x[..., D/2:]``. Interleaved: ``x[..., ::2]`` and ``x[..., 1::2]``, D even.
    """
    if not (is_call(first, aten.slice.Tensor) and is_call(second, aten.slice.Tensor)):
        return None
    a, b = arguments(first), arguments(second)
    x = a["self"]
    if b["self"] is not x:
        return None
    size = facts.val(x).shape[-1]
    last = rank(facts, x) - 1
    for call in (a, b):
        if call["dim"] not in (-1, last) or call["step"] != (2 if interleaved else 1):
            return None
        call["start"] = 0 if call["start"] is None else call["start"]
        if call["end"] is None or (isinstance(call["end"], int) and call["end"] >= 2**62):
            call["end"] = size
        if isinstance(call["start"], fx.Node) or isinstance(call["end"], fx.Node):
            return None
    if not facts.known(size % 2 == 0):
        return None
    if interleaved:
        # x[::2] may stop at D or D - 1: the last even index is D - 2 either way
        ends = facts.known(a["end"] >= size - 1) and facts.known(b["end"] >= size)
        return x if a["start"] == 0 and b["start"] == 1 and ends else None
    cut = a["end"]
    halves = a["start"] == 0 and facts.known(cut == b["start"]) and facts.known(b["end"] >= size)
    return x if halves and facts.known(cut * 2 == size) else None


def stacked_pair(facts: Facts, n: Any, interleaved: bool) -> tuple[Any, Any, tuple[fx.Node, ...]] | None:
    """(first, second, nodes in between) if ``n`` puts two tensors together as the members of its pairs, else None.

    Half layout: ``cat([first, second], -1)``. Interleaved: stacked on a new last axis, which is then flattened away.
    """
    inner: list[fx.Node] = []
    if interleaved:
        if not is_call(n, aten.reshape.default):
            return None
        inner.append(n)
        n = n.args[0]
    if not is_call(n, aten.cat.default):
        return None
    parts, dim = n.args[0], arguments(n)["dim"]
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
        sources.append(part.args[0])
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
    source, shape = facts.val(n.args[0]).shape, facts.val(n).shape  # type: ignore[arg-type]
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
