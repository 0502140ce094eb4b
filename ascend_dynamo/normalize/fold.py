"""Sizes and small constants that are known while compiling."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.ir.sym import expr
from ascend_dynamo.normalize.work import Work

_aten = torch.ops.aten
LIMIT = 64  # elements; larger constants stay computed (a causal mask built from arange must stay readable)

SIZE_TARGETS = frozenset(
    {
        _aten.sym_size.int,
        _aten.sym_numel.default,
        _aten.sym_stride.int,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        torch.sym_max,
        torch.sym_min,
    }
)


def fold_size(w: Work, n: fx.Node) -> int | fx.Node | None:
    """An integer node as a literal, or as the first node that holds the same size; None for other values."""
    val = n.meta.get("val")
    if type(val) is int:
        return val
    if not isinstance(val, torch.SymInt):
        return None
    e = expr(val)
    if isinstance(e, int):
        return e
    held = w.sizes.find(e, n)
    return n if held is None else held


def fold_constant(w: Work, n: fx.Node) -> fx.Node | None:
    """The constant that ``n`` computes, if its inputs are small constants that nobody writes and ``n`` is pure."""
    inputs = n.all_input_nodes
    if not inputs or any(i.op != "get_attr" for i in inputs):
        return None
    val = n.meta.get("val")
    values = {i: getattr(w.unit.gm, str(i.target), None) for i in inputs}
    if not isinstance(val, torch.Tensor) or val.device.type != "cpu" or not _small(val):
        return None
    if not all(isinstance(v, torch.Tensor) and _small(v) for v in values.values()):
        return None
    if any(compat.is_fake(v) for v in values.values()):
        return None
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), values.__getitem__)
    with compat.no_dispatch_modes(), torch.no_grad():
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        result = result.clone(memory_format=torch.contiguous_format)
    return w.constant(result, val)


def _small(t: torch.Tensor) -> bool:
    return all(type(s) is int for s in t.shape) and t.numel() <= LIMIT and t.layout == torch.strided
