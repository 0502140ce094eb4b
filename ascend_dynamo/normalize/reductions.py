"""Reductions name their axes from the back: ``mean(x, [-1])`` whatever the rank, so that ranks share a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.normalize.layout import Rule
from ascend_dynamo.normalize.work import Value, Work

_aten = torch.ops.aten


def _dims(w: Work, n: fx.Node) -> Value | None:
    x, dims = n.args[0], n.args[1] if len(n.args) > 1 else None
    if not isinstance(x, fx.Node):
        return None
    rank = x.meta["val"].dim()
    if isinstance(dims, (list, tuple)):
        back: Any = [_back(d, rank) for d in dims]  # type: ignore[arg-type]
    elif type(dims) is int:
        back = _back(dims, rank)
    else:
        return None
    if back != dims:
        n.args = (x, back, *n.args[2:])
        w.changed += 1
    return None


def _back(dim: int, rank: int) -> int:
    return dim - rank if dim >= 0 and rank else dim


_REDUCTIONS = (
    _aten.mean.dim,
    _aten.sum.dim_IntList,
    _aten.amax.default,
    _aten.amin.default,
    _aten.var.correction,
    _aten.var.dim,
    _aten.std.correction,
    _aten.var_mean.correction,
    _aten.logsumexp.default,
    _aten.prod.dim_int,
    _aten.any.dim,
    _aten.all.dim,
    _aten.argmax.default,
    _aten.argmin.default,
    _aten.max.dim,
    _aten.min.dim,
    _aten.cumsum.default,
    _aten._softmax.default,
    _aten._log_softmax.default,
    _aten._safe_softmax.default,
)

RULES: Mapping[Any, Rule] = dict.fromkeys(_REDUCTIONS, _dims)
