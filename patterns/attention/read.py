"""Reading single calls on the way from a softmax to q k^T: is there a product above, what scales, what masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .._calls import arg, arguments, aten, commuted, convert, is_call, number

PRODUCTS = (aten.matmul.default, aten.bmm.default)
_ELEMENTWISE = frozenset(
    (
        convert,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.tanh.default,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.reshape.default,
        aten.permute.default,
        aten.clamp.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.neg.default,
        aten.exp.default,
    )
)
_FAR = 48  # calls to look at: more than stand between any q k^T and its softmax


def leads_to_product(n: Any, facts: Facts) -> bool:
    """True if a product of two activations is found above ``n`` through elementwise and layout calls only."""
    return nearest_product(n, facts) is not None


def nearest_product(n: Any, facts: Facts) -> fx.Node | None:
    """That product; looking for it is cheap, unlike the real walk."""
    pending: list[Any] = [n]
    seen: set[fx.Node] = set()
    while pending and len(seen) < _FAR:
        n = pending.pop(0)
        if not isinstance(n, fx.Node) or n in seen:
            continue
        seen.add(n)
        if is_product(n, facts):
            return n
        if n.op == "call_function" and n.target in _ELEMENTWISE:
            pending.extend(n.all_input_nodes)
    return None


def is_product(n: fx.Node, facts: Facts) -> bool:
    """True for a product of two activations: matmul, or a linear whose weight is none of the model's."""
    if is_call(n, aten.linear.default):
        return len(n.args) == 2 and not facts.is_param(arg(n, 1))
    return is_call(n, *PRODUCTS, aten.baddbmm.default)


def scaled_by(n: Any, facts: Facts) -> tuple[fx.Node, float] | None:
    """(x, c) if ``n`` is ``x * c`` or ``x / (1/c)`` with a number or a constant of one element."""
    if is_call(n, aten.mul.Tensor):
        for x, c in commuted(n):
            factor = _one_number(c, facts)
            if isinstance(x, fx.Node) and factor is not None:
                return x, factor
    if is_call(n, aten.div.Tensor) and isinstance(arg(n, 0), fx.Node):
        c = _one_number(arg(n, 1), facts)
        if c and arguments(n).get("rounding_mode") is None:
            return arg(n, 0), 1.0 / c
    return None


def _one_number(x: Any, facts: Facts) -> float | None:
    """A number, or the only element of a constant tensor without axes."""
    if not isinstance(x, fx.Node):
        return number(x)
    value = facts.val(x)
    return constant(x, facts) if isinstance(value, torch.Tensor) and value.dim() == 0 else None


_Masked = tuple[fx.Node, fx.Node, bool, "float | None", set[fx.Node]]


def masked(n: fx.Node, facts: Facts) -> _Masked | None:
    """(scores, mask, True if True keeps, fill, calls) of a masking call; fill None if it is not a constant.

    ``calls`` read the scores for their shape only: ``full_like(scores, fill)``.
    """
    if is_call(n, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        call = arguments(n)
        return call["self"], call["mask"], False, constant(call["value"], facts), set()
    if is_call(n, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        call = arguments(n)
        a, b, condition = call["self"], call["other"], call["condition"]
        for x, fill, keep in ((a, b, True), (b, a, False)):
            if isinstance(x, fx.Node) and leads_to_product(x, facts):
                extra = {fill} if is_call(fill, aten.full_like.default) else set()
                return x, condition, keep, constant(fill, facts), extra
    return None


def constant(x: Any, facts: Facts) -> float | None:
    """The value of a number or of a constant tensor of equal elements."""
    if not isinstance(x, fx.Node):
        return number(x)
    while is_call(x, aten.expand.default, aten.reshape.default):
        x = arg(x, 0)
    if is_call(x, convert):
        inner = constant(arg(x, 0), facts)
        kind = facts.val(x).dtype
        return inner if inner is None or _held(inner, kind) else None
    if is_call(x, aten.full.default, aten.full_like.default, aten.scalar_tensor.default):
        written = number(arg(x, 0 if is_call(x, aten.scalar_tensor.default) else 1))
        # A finite number that overflows the dtype is an infinity by accident: what was meant is anybody's guess.
        return written if written is not None and _held(written, facts.val(x).dtype) else None
    values = facts.numbers(x)
    if not values or any(v != values[0] for v in values) or isinstance(values[0], (bool, complex)):
        return None
    return float(values[0])


def _held(value: float, kind: torch.dtype) -> bool:
    """True if a finite ``value`` stays finite in ``kind``."""
    return not kind.is_floating_point or not math.isfinite(value) or abs(value) <= torch.finfo(kind).max
