"""Matrix products that arrive in pieces become the composites that patterns look for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.ir.sym import same_shape
from ascend_dynamo.normalize.layout import Rule
from ascend_dynamo.normalize.schema import bind
from ascend_dynamo.normalize.work import Call, Value, Work

_aten = torch.ops.aten


def _weight(b: Any) -> fx.Node | None:
    """``w`` if ``b`` is the transpose of the matrix ``w``."""
    if isinstance(b, fx.Node) and b.target is _aten.permute.default and list(b.args[1]) == [1, 0]:  # type: ignore
        source = b.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


def _call(n: fx.Node, target: Any, *args: Any) -> Call:
    val = n.meta["val"]
    return Call(target, args, tuple(val.shape), val, val.dtype)


def _mm(w: Work, n: fx.Node) -> Value | None:
    """``mm(x [M, K], w.T [K, N])`` is ``linear(x, w)``; any other product of matrices is a matmul."""
    a, b = n.args[:2]
    weight = _weight(b)
    return _call(n, _aten.linear.default, a, weight) if weight is not None else _call(n, _aten.matmul.default, a, b)


def _addmm(w: Work, n: fx.Node) -> Value | None:
    """``addmm(bias [N], x [M, K], w.T [K, N])`` with beta = alpha = 1 is ``linear(x, w, bias)``."""
    bias, a, b = bind(n)[:3]
    weight = _weight(b)
    if weight is None or n.kwargs.get("beta", 1) != 1 or n.kwargs.get("alpha", 1) != 1:
        return None
    if not same_shape(bias.meta["val"].shape, n.meta["val"].shape[-1:]):
        return None
    return _call(n, _aten.linear.default, a, weight, bias)


def _matmul(w: Work, n: fx.Node) -> Value | None:
    """``matmul(x [..., K], w.T [K, N])`` is ``linear(x, w)``."""
    a, b = n.args[:2]
    weight = _weight(b)
    matrix = isinstance(a, fx.Node) and a.meta["val"].dim() >= 2
    return _call(n, _aten.linear.default, a, weight) if weight is not None and matrix else None


def _bmm(w: Work, n: fx.Node) -> Value | None:
    return _call(n, _aten.matmul.default, *n.args[:2])


RULES: Mapping[Any, Rule] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.matmul.default: _matmul,
    _aten.bmm.default: _bmm,
}
