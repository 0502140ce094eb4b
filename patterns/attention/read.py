"""Reading single calls on the way from a softmax to q k^T: is there a product above, what scales, what masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .._calls import arg, arguments, aten, commuted, convert, is_call, number

PRODUCTS = (aten.matmul.default, aten.bmm.default)
_TRANSPARENT = (
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


def leads_to_product(n: Any, depth: int = 12) -> bool:
    """True if a matmul is found above ``n`` through elementwise and layout calls only: cheap, before the real walk."""
    if not isinstance(n, fx.Node) or depth == 0:
        return False
    if is_call(n, *PRODUCTS):
        return True
    return is_call(n, *_TRANSPARENT) and any(leads_to_product(a, depth - 1) for a in n.all_input_nodes)


def scaled_by(n: Any) -> tuple[fx.Node, float] | None:
    """(x, c) if ``n`` is ``x * c`` or ``x / (1/c)`` with a number."""
    if is_call(n, aten.mul.Tensor):
        for x, c in commuted(n):
            if isinstance(x, fx.Node) and number(c) is not None:
                return x, float(c)
    if is_call(n, aten.div.Tensor) and isinstance(arg(n, 0), fx.Node):
        c = number(arg(n, 1))
        if c and arguments(n).get("rounding_mode") is None:
            return arg(n, 0), 1.0 / c
    return None


def masked(n: fx.Node, facts: Facts) -> tuple[fx.Node, fx.Node, bool, float | None] | None:
    """(scores, mask, True if True keeps, fill) of a masking call; fill None if it is not a constant."""
    if is_call(n, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        call = arguments(n)
        return call["self"], call["mask"], False, constant(call["value"], facts)
    if is_call(n, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        call = arguments(n)
        a, b, condition = call["self"], call["other"], call["condition"]
        if isinstance(a, fx.Node) and leads_to_product(a):
            return a, condition, True, constant(b, facts)
        if isinstance(b, fx.Node) and leads_to_product(b):
            return b, condition, False, constant(a, facts)
    return None


def constant(x: Any, facts: Facts) -> float | None:
    """The value of a number or of a constant tensor of equal elements."""
    if not isinstance(x, fx.Node):
        return number(x)
    while is_call(x, aten.expand.default, aten.reshape.default, convert):
        x = arg(x, 0)
    value = facts.const(x)
    if value is None or value.numel() == 0:
        return None
    first = value.flatten()[0]
    if not bool((value == first).all()):
        return None
    # A finite number that overflows the dtype is an infinity by accident: what was meant is anybody's guess.
    written = next((a for a in reversed(x.args) if number(a) is not None), None)
    overflowed = written is not None and math.isfinite(float(written)) and not bool(torch.isfinite(first))  # type: ignore[arg-type]
    return None if overflowed else float(first)
