"""The calls that masks are built of, each as a rule for one element of its result.

A rule ``(evaluator, call, index)`` gives a ``Formula`` (FORMULAS: boolean results), ``Cases`` (CASES: numbers), or what
the call's dtype asks for (PIECEWISE: calls that choose between elements), and None where it knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .._calls import arguments, aten, convert
from .formula import TRUE, Formula, at_most, either, every, negated
from .index_algebra import ZERO, Affine, Element
from .index_cases import Cases, Leaf, compared, leaf_of, mapped, rounded, value_of
from .index_layout import Index, broadcast, shape

if TYPE_CHECKING:
    from .index_values import Evaluator

Rule = Callable[["Evaluator", fx.Node, Index], Any]


def _compare(how: str) -> Rule:
    def rule(ev: Evaluator, n: fx.Node, index: Index) -> Formula | None:
        a, b = n.args[:2]
        for x, y in ((a, b), (b, a)):  # a number that the other side's dtype rounds is left alone
            if isinstance(x, float) and isinstance(y, fx.Node) and rounded(x, ev.facts.val(y).dtype) != x:
                return None
        left, right = ev.operand(n, a, index), ev.operand(n, b, index)
        return None if left is None or right is None else compared(ev.space, how, left, right)

    return rule


def _logical(combine: Callable[..., Formula]) -> Rule:
    def rule(ev: Evaluator, n: fx.Node, index: Index) -> Formula | None:
        a, b = (ev.truth(n, x, index) for x in n.args[:2])
        return None if a is None or b is None else combine(ev.space, (a, b))

    return rule


def _unequal(space: Any, parts: tuple[Formula, Formula]) -> Formula:
    a, b = parts
    return every(space, (either(space, (a, b)), either(space, (negated(a), negated(b)))))


def _not(ev: Evaluator, n: fx.Node, index: Index) -> Formula | None:
    f = ev.truth(n, n.args[0], index)
    return None if f is None else negated(f)


def _to_bool(ev: Evaluator, n: fx.Node, index: Index) -> Formula | None:
    return ev.truth(n, n.args[0], index)


def _elementwise(fn: Callable[..., Leaf | None]) -> Rule:
    """``fn(evaluator, dtype, *leaves)`` for each combination of cases of the first arguments that it takes."""

    def rule(ev: Evaluator, n: fx.Node, index: Index) -> Cases | None:
        call = arguments(n)
        if call.get("alpha", 1) != 1 or call.get("rounding_mode", "floor") != "floor":
            return None
        kind = ev.facts.val(n).dtype
        operands = [ev.operand(n, x, index) for x in n.args[: fn.__code__.co_argcount - 2]]
        if any(x is None for x in operands):
            return None
        return mapped(ev.space, lambda *leaves: fn(ev, kind, *leaves), *operands)  # type: ignore[arg-type]

    return rule


def _number(x: float, kind: torch.dtype) -> Leaf | None:
    """The result of float arithmetic, as ``kind`` stores it."""
    if math.isnan(x) or not kind.is_floating_point:
        return None
    return leaf_of(y) if math.isfinite(y := rounded(x, kind)) else y


def _add(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    if isinstance(a, Affine) and isinstance(b, Affine):
        return a.plus(b)
    if a == ZERO or b == ZERO:
        return b if a == ZERO else a
    x, y = value_of(a), value_of(b)
    return None if x is None or y is None else _number(float(x) + float(y), kind)


def _negative(leaf: Leaf) -> Leaf | None:
    if isinstance(leaf, Affine):
        return leaf.scaled(-1)
    return -leaf if isinstance(leaf, float) else None


def _sub(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    if b == ZERO:
        return a
    minus = _negative(b)
    return None if minus is None else _add(ev, kind, a, minus)


def _rsub(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    return _sub(ev, kind, b, a)


def _mul(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    x, y = value_of(a), value_of(b)
    if x == 1 or y == 1:
        return b if x == 1 else a
    if x is not None and y is not None and not (isinstance(x, int) and isinstance(y, int)):
        return _number(float(x) * float(y), kind)
    for factor, other in ((x, b), (y, a)):
        if isinstance(factor, int) and isinstance(other, Affine):
            return other.scaled(factor)
    return None


def _div(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    x, y = value_of(a), value_of(b)
    if y == 1:
        return a
    return None if x is None or not y else _number(float(x) / float(y), kind)


def _floor_divide(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    by = value_of(b)
    if kind.is_floating_point or not isinstance(a, Affine) or not isinstance(by, int) or by <= 0:
        return None
    return ev.space.quotient(a, by)


def _remainder(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
    whole = _floor_divide(ev, kind, a, b)
    return whole if whole is None else a.plus(whole, -value_of(b))  # type: ignore[union-attr,operator,arg-type]


def _neg(ev: Evaluator, kind: torch.dtype, a: Leaf) -> Leaf | None:
    return _negative(a)


def _extreme(sign: int) -> Callable[..., Leaf | None]:
    def pick(ev: Evaluator, kind: torch.dtype, a: Leaf, b: Leaf) -> Leaf | None:
        x, y = value_of(a), value_of(b)
        if x is not None and y is not None:
            return a if sign * x >= sign * y else b
        if not (isinstance(a, Affine) and isinstance(b, Affine)):
            return None
        d = a.plus(b, -1).scaled(sign)
        if any(True for _ in a.unknowns()) or any(True for _ in b.unknowns()):
            return None
        return b if ev.space.never_positive(d) else a if ev.space.never_positive(d.scaled(-1)) else None

    return pick


def _abs(ev: Evaluator, n: fx.Node, index: Index) -> Cases | None:
    cases = ev.operand(n, n.args[0], index)
    if cases is None or len(cases) != 1 or not isinstance(a := cases[0][1], Affine) or any(True for _ in a.unknowns()):
        return None
    negative = at_most(ev.space, a.shift(1))
    return ev.choose(n, negative, ((TRUE, a.scaled(-1)),), ((TRUE, a),))


def _converted(ev: Evaluator, n: fx.Node, index: Index) -> Cases | None:
    """A cast keeps every value that the new dtype has; an unknown float only where it is widened."""
    source: Any = n.args[0]
    cases = ev.cases(source, index)
    have, want = ev.facts.val(source).dtype, ev.facts.val(n).dtype
    if cases is None or (have == want):
        return cases
    if have.is_floating_point and not want.is_floating_point and any(isinstance(leaf, float) for _, leaf in cases):
        return None
    wider = have.is_floating_point and want.is_floating_point and torch.promote_types(have, want) == want
    if any(isinstance(leaf, Element) for _, leaf in cases) and not wider:
        return None
    return mapped(ev.space, lambda x: _number(x, want) if isinstance(x, float) and not wider else x, cases)


def _arange(ev: Evaluator, n: fx.Node, index: Index) -> Cases | None:
    call = arguments(n)
    start, step = call.get("start", 0), call.get("step", 1)
    if isinstance(start, float) and start == int(start):
        start = int(start)
    if isinstance(start, float) or not isinstance(step, int):
        return None
    return ((TRUE, index[0].scaled(step).shift(ev.facts.size(start))),)


def _cumsum(ev: Evaluator, n: fx.Node, index: Index) -> Cases | None:
    """The running sum of a constant."""
    call = arguments(n)
    source, d = call["self"], call["dim"] % max(len(index), 1)
    if not index or ev.facts.val(n).dtype.is_floating_point:
        return None
    anywhere = ev.space.fresh(shape(ev.space, source)[d])
    cases = ev.cases(source, (*index[:d], anywhere, *index[d + 1 :]))
    if cases is None or len(cases) != 1 or not isinstance(value := value_of(cases[0][1]), int):
        return None
    return ((TRUE, index[d].shift(1).scaled(value)),)


def _where(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    call = arguments(n)
    condition = ev.truth(n, call["condition"], index)
    if condition is None:
        return None
    return ev.choose(n, condition, _element(ev, n, call["self"], index), _element(ev, n, call["other"], index))


def _masked_fill(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    call = arguments(n)
    hide = ev.truth(n, call["mask"], index)
    if hide is None:
        return None
    return ev.choose(n, hide, _element(ev, n, call["value"], index), _element(ev, n, call["self"], index))


def _element(ev: Evaluator, n: fx.Node, x: Any, index: Index) -> Any:
    """An operand that the call passes on unchanged."""
    if not isinstance(x, fx.Node) or not isinstance(ev.facts.val(x), torch.Tensor):
        return ev.filled(n, x)
    if (ev.facts.val(x).dtype == torch.bool) != (ev.facts.val(n).dtype == torch.bool):
        return None
    return ev.truth(n, x, index) if ev.facts.val(n).dtype == torch.bool else ev.operand(n, x, index)


def _triangle(sign: int) -> Rule:
    """tril keeps column - row <= diagonal, triu column - row >= diagonal; the rest is zero."""

    def rule(ev: Evaluator, n: fx.Node, index: Index) -> Any:
        call = arguments(n)
        if len(index) < 2:
            return None
        beyond = index[-1].plus(index[-2], -1).shift(-ev.facts.size(call["diagonal"])).scaled(sign)
        return ev.choose(n, at_most(ev.space, beyond), ev.element(n, call["self"], index), ev.filled(n, 0))

    return rule


def _cat(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    call = arguments(n)
    pieces, d = call["tensors"], call["dim"]
    if len(pieces) > 8 or any(len(shape(ev.space, p)) != len(index) for p in pieces):
        return None
    ends = []
    end: Any = 0
    for p in pieces:
        end = end + shape(ev.space, p)[d]
        ends.append(end)
    result = None
    for k in range(len(pieces) - 1, -1, -1):
        start = ends[k - 1] if k else 0
        own = ev.element(n, pieces[k], (*index[:d], index[d].shift(-start), *index[d + 1 :]))
        # in front of the end of piece k and, since pieces before it come first, behind its start
        inside = at_most(ev.space, index[d].shift(1 - ends[k]))
        result = own if k == len(pieces) - 1 else ev.choose(n, inside, own, result)
        if result is None:
            return None
    return result


def _pad(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    call = arguments(n)
    source, pad = call["self"], call["pad"]
    sizes = shape(ev.space, source)
    inner, inside = list(index), []
    for k in range(len(pad) // 2):
        d = len(index) - 1 - k
        inner[d] = index[d].shift(-ev.facts.size(pad[2 * k]))
        inside += [at_most(ev.space, inner[d].scaled(-1)), at_most(ev.space, inner[d].shift(1 - sizes[d]))]
    return ev.choose(n, every(ev.space, inside), ev.element(n, source, tuple(inner)), ev.filled(n, call["value"]))


def _gather(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    """``x[i, :, j]`` with integer tensors that are functions of the indices."""
    source, given = n.args[0], list(n.args[1])  # type: ignore[arg-type]
    sizes = shape(ev.space, source)  # type: ignore[arg-type]
    given += [None] * (len(sizes) - len(given))
    at = [d for d, i in enumerate(given) if i is not None]
    if not at or any(ev.facts.val(given[d]).dtype not in (torch.int64, torch.int32) for d in at):
        return None
    rank = max(ev.facts.val(given[d]).dim() for d in at)
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    ours, rest = index[start : start + rank], list(index[:start] + index[start + rank :])
    inner: list[Affine] = []
    for d, i in enumerate(given):
        if i is None:
            inner.append(rest.pop(0))
            continue
        position = _position(ev, i, shape(ev.space, n)[start : start + rank], ours, sizes[d])
        if position is None:
            return None
        inner.append(position)
    return ev.element(n, source, tuple(inner))


def _index_select(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    call = arguments(n)
    source, d = call["self"], call["dim"] % max(len(index), 1)
    sizes = shape(ev.space, n)
    position = _position(ev, call["index"], (sizes[d],), (index[d],), shape(ev.space, source)[d])
    return None if position is None else ev.element(n, source, (*index[:d], position, *index[d + 1 :]))


def _position(ev: Evaluator, i: fx.Node, target: tuple[Any, ...], index: Index, size: Any) -> Affine | None:
    """The value of index tensor ``i``, counted from the front."""
    inner = broadcast(ev.space, shape(ev.space, i), target, index)
    cases = None if inner is None else ev.cases(i, inner)
    if cases is None or len(cases) != 1 or not isinstance(value := cases[0][1], Affine):
        return None
    if ev.space.never_positive(value.scaled(-1)):
        return value
    return value.shift(size) if ev.space.never_positive(value.shift(1)) else None


def _full(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    call = arguments(n)
    value = call["s"] if "s" in call else call["fill_value"]
    return ev.filled(n, value)


def _ones(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    return ev.filled(n, 1)


def _zeros(ev: Evaluator, n: fx.Node, index: Index) -> Any:
    return ev.filled(n, 0)


def _all_of(rule: Rule, *targets: Any) -> dict[Any, Rule]:
    return dict.fromkeys(targets, rule)


_AND, _OR, _XOR = _logical(every), _logical(either), _logical(_unequal)
FORMULAS: Mapping[Any, Rule] = {
    **{
        getattr(getattr(aten, how), kind): _compare(how)
        for how in ("le", "lt", "ge", "gt", "eq", "ne")
        for kind in ("Tensor", "Scalar")
    },
    **_all_of(_AND, aten.logical_and.default, aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.mul.Tensor),
    **_all_of(_OR, aten.logical_or.default, aten.bitwise_or.Tensor, aten.bitwise_or.Scalar),
    **_all_of(_XOR, aten.logical_xor.default, aten.bitwise_xor.Tensor),
    **_all_of(_not, aten.logical_not.default, aten.bitwise_not.default),
    convert: _to_bool,
}
CASES: Mapping[Any, Rule] = {
    **_all_of(_arange, aten.arange.default, aten.arange.start, aten.arange.start_step),
    aten.add.Tensor: _elementwise(_add),
    aten.sub.Tensor: _elementwise(_sub),
    aten.rsub.Scalar: _elementwise(_rsub),
    aten.mul.Tensor: _elementwise(_mul),
    aten.div.Tensor: _elementwise(_div),
    aten.neg.default: _elementwise(_neg),
    **_all_of(_elementwise(_floor_divide), aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode),
    **_all_of(_elementwise(_remainder), aten.remainder.Scalar, aten.remainder.Tensor),
    aten.minimum.default: _elementwise(_extreme(-1)),
    aten.maximum.default: _elementwise(_extreme(1)),
    aten.abs.default: _abs,
    aten.cumsum.default: _cumsum,
    convert: _converted,
}
PIECEWISE: Mapping[Any, Rule] = {
    **_all_of(_where, aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf),
    **_all_of(_masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    aten.tril.default: _triangle(1),
    aten.triu.default: _triangle(-1),
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.index.Tensor: _gather,
    aten.index_select.default: _index_select,
    **_all_of(_full, aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default),
    **_all_of(_ones, aten.ones.default, aten.ones_like.default, aten.new_ones.default),
    **_all_of(_zeros, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default),
}

__all__ = ["CASES", "FORMULAS", "PIECEWISE"]
