"""Arithmetic with Python numbers: one overload, identities removed exactly where the bits cannot change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.ir.sym import same_shape
from ascend_dynamo.normalize.layout import Rule
from ascend_dynamo.normalize.schema import bind
from ascend_dynamo.normalize.work import Call, Value, Work

_aten = torch.ops.aten
# The overloads whose second operand may be a Python number where the schema says Tensor; comparisons may not.
_ARITHMETIC = (_aten.add, _aten.sub, _aten.mul, _aten.div, _aten.true_divide)
_TO_TENSOR: dict[Any, Any] = {op.Scalar: op.Tensor for op in _ARITHMETIC}


def _scalar_overload(w: Work, n: fx.Node) -> Value | None:
    """``add.Scalar(x, 1)`` is ``add.Tensor(x, 1)``; then the rules of ``add.Tensor`` apply."""
    args = bind(n)
    n.target = _TO_TENSOR[n.target]
    # alpha is positional in add.Scalar and keyword-only in add.Tensor.
    n.args, n.kwargs = tuple(args[:2]), {"alpha": args[2]} if len(args) > 2 and args[2] != 1 else {}
    w.changed += 1
    rule = RULES.get(n.target)
    return rule(w, n) if rule else None


def _unchanged(x: Any, n: fx.Node) -> fx.Node | None:
    """``x`` if it has the dtype and shape of the result."""
    if not isinstance(x, fx.Node):
        return None
    have, want = x.meta["val"], n.meta["val"]
    if not isinstance(have, torch.Tensor) or have.dtype != want.dtype:
        return None
    return x if same_shape(have.shape, want.shape) else None


def _is(a: Any, number: int) -> bool:
    return type(a) in (int, float) and a == number


def _add(w: Work, n: fx.Node) -> Value | None:
    a, b = n.args[:2]
    if _is(b, 0) and not n.meta["val"].dtype.is_floating_point and not n.meta["val"].dtype.is_complex:
        return _unchanged(a, n)  # for floats x + 0.0 turns -0.0 into 0.0
    return None


def _sub(w: Work, n: fx.Node) -> Value | None:
    a, b = n.args[:2]
    positive_zero = _is(b, 0) and math.copysign(1.0, float(b)) > 0  # type: ignore[arg-type]
    return _unchanged(a, n) if positive_zero and not n.kwargs and not n.meta["val"].dtype.is_complex else None


def _mul(w: Work, n: fx.Node) -> Value | None:
    a, b = n.args[:2]
    if n.meta["val"].dtype.is_complex:
        return None
    if _is(b, 1):
        return _unchanged(a, n)
    return _unchanged(b, n) if _is(a, 1) else None


def _div(w: Work, n: fx.Node) -> Value | None:
    a, b = n.args[:2]
    return _unchanged(a, n) if _is(b, 1) and not n.meta["val"].dtype.is_complex else None


def _pow(w: Work, n: fx.Node) -> Value | None:
    x, exponent = n.args[:2]
    val = n.meta["val"]
    if not isinstance(x, fx.Node) or type(exponent) not in (int, float):
        return None
    if exponent == 1:
        return _unchanged(x, n)
    if x.meta["val"].dtype != val.dtype or val.dtype == torch.bool:
        return None
    if exponent == 2:
        return Call(_aten.mul.Tensor, (x, x), tuple(val.shape), val, val.dtype)
    # In float16, CPU's pow rounds otherwise than sqrt and rsqrt do.
    exact = val.dtype.is_floating_point and val.dtype != torch.float16
    if exponent == 0.5 and exact:
        return Call(_aten.sqrt.default, (x,), tuple(val.shape), val, val.dtype)
    if exponent == -0.5 and exact:
        return Call(_aten.rsqrt.default, (x,), tuple(val.shape), val, val.dtype)
    return None


def _square(w: Work, n: fx.Node) -> Value | None:
    x: Any = n.args[0]
    val = n.meta["val"]
    return (
        Call(_aten.mul.Tensor, (x, x), tuple(val.shape), val, val.dtype) if x.meta["val"].dtype == val.dtype else None
    )


def _rsub(w: Work, n: fx.Node) -> Value | None:
    """``rsub(a, b)`` is ``b - a`` if ``b`` is a tensor; with a number it stays: ``sub`` starts with a tensor."""
    a, b = n.args[:2]
    if not isinstance(b, fx.Node) or not isinstance(b.meta["val"], torch.Tensor) or n.kwargs or len(n.args) > 2:
        return None
    val = n.meta["val"]
    return Call(_aten.sub.Tensor, (b, a), tuple(val.shape), val, val.dtype)


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(_TO_TENSOR, _scalar_overload),
    _aten.add.Tensor: _add,
    _aten.sub.Tensor: _sub,
    _aten.mul.Tensor: _mul,
    _aten.div.Tensor: _div,
    _aten.pow.Tensor_Scalar: _pow,
    _aten.square.default: _square,
    _aten.rsub.Tensor: _rsub,
}
