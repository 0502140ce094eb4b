"""Casts: only ``prims.convert_element_type``; no-op casts vanish, and so does a lossless widening before a cast."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ascend_dynamo.normalize.layout import Rule
from ascend_dynamo.normalize.schema import bind
from ascend_dynamo.normalize.work import Call, Value, Work

_aten, _prims = torch.ops.aten, torch.ops.prims
_CONVERT = _prims.convert_element_type.default


def convert(x: fx.Node, dtype: torch.dtype) -> Value:
    """``x`` in ``dtype``."""
    while x.target is _CONVERT:
        source: Any = x.args[0]
        if not lossless(source.meta["val"].dtype, x.meta["val"].dtype):
            break
        x = source
    val = x.meta["val"]
    return x if val.dtype == dtype else Call(_CONVERT, (x, dtype), tuple(val.shape), val, dtype)


@lru_cache(maxsize=512)
def lossless(a: torch.dtype, b: torch.dtype) -> bool:
    """True if every value of ``a`` is one of ``b``: casting on from ``b`` then gives what casting from ``a`` gives."""
    if a == b:
        return True
    if a.is_complex or b.is_complex:
        return False
    if a == torch.bool:
        return True
    if b == torch.bool:
        return False
    if a.is_floating_point:
        if not b.is_floating_point:
            return False
        fa, fb = torch.finfo(a), torch.finfo(b)
        return fa.bits < fb.bits and fa.eps >= fb.eps and fa.max <= fb.max and fa.tiny * fa.eps >= fb.tiny * fb.eps
    ia = torch.iinfo(a)
    if b.is_floating_point:
        return max(ia.max, -ia.min) <= 2 / torch.finfo(b).eps and ia.max <= torch.finfo(b).max
    ib = torch.iinfo(b)
    return ib.min <= ia.min and ia.max <= ib.max


def _convert(w: Work, n: fx.Node) -> Value | None:
    x: Any = n.args[0]
    return convert(x, n.meta["val"].dtype)


def _to_copy(w: Work, n: fx.Node) -> Value | None:
    x: Any = n.args[0]
    have, want = x.meta["val"], n.meta["val"]
    return convert(x, want.dtype) if have.device == want.device and have.layout == want.layout else None


def _integer(w: Work, n: fx.Node) -> Value | None:
    """ceil, floor, round and trunc leave integers alone."""
    x: Any = n.args[0]
    val = x.meta["val"]
    same = not val.dtype.is_floating_point and not val.dtype.is_complex and n.meta["val"].dtype == val.dtype
    return x if same else None


def _typed(w: Work, n: fx.Node) -> Value | None:
    """``.to`` in its composite overloads (only seen when a graph was traced below autograd)."""
    return _to_copy(w, n) if isinstance(bind(n)[0], fx.Node) else None


_TO = (_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other, _aten.type_as.default)
RULES: Mapping[Any, Rule] = {
    _CONVERT: _convert,
    _aten._to_copy.default: _to_copy,
    **dict.fromkeys(
        (_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other, _aten.type_as.default), _typed
    ),
    **dict.fromkeys(
        (_aten.ceil.default, _aten.floor.default, _aten.round.default, _aten.trunc.default, _aten.fix.default), _integer
    ),
}
