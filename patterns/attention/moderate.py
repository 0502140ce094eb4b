"""Whether a term that is added to scores is of their size: a bias, and no mask that was computed elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .._calls import LAYOUT, aten, convert, is_call, number

LARGEST = 1e4  # what people write to hide a key is at least this
_MOVING = frozenset(
    (
        *LAYOUT,
        convert,
        aten.cat.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.clone.default,
    )
)
_ARITHMETIC = frozenset(
    (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.neg.default,
        aten.abs.default,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.masked_fill.Scalar,
        aten.minimum.default,
    )
)
# What is computed from products with weights is a score itself; powers of slopes and sigmoids are small.
_SCORES = frozenset(
    (
        aten.matmul.default,
        aten.bmm.default,
        aten.linear.default,
        aten.pow.Tensor_Tensor,
        aten.pow.Scalar,
        aten.reciprocal.default,
        aten.sigmoid.default,
        aten.tanh.default,
    )
)


def moderate(facts: Facts, n: fx.Node) -> bool:
    """True if ``n`` is made of embeddings, positions and products, and of no large number or float input.

    Positions (integers) are taken to be moderate, as scores are.
    """
    seen: set[fx.Node] = set()
    todo: list[Any] = [n]
    while todo:
        x = todo.pop()
        if not isinstance(x, fx.Node):
            if (value := number(x)) is not None and not (math.isfinite(value) and abs(value) < LARGEST):
                return False
            continue
        val = facts.val(x)
        if x in seen or not isinstance(val, torch.Tensor) or not val.dtype.is_floating_point:
            continue
        seen.add(x)
        if len(seen) > 100:
            return False
        if is_call(x, *_SCORES):
            continue
        if is_call(x, aten.embedding.default) and facts.is_param(x.args[0]):  # type: ignore[arg-type]
            continue  # rows of a learnt table; a buffer that is added as it is may well be a mask of -inf
        if is_call(x, *_MOVING):
            todo += x.all_input_nodes
            continue
        if is_call(x, *_ARITHMETIC):
            todo += x.args
            continue
        if is_call(x, aten.full.default, aten.scalar_tensor.default):
            todo.append(x.args[-1])
            continue
        if is_call(x, aten.zeros.default, aten.ones.default, aten.arange.default, aten.arange.start):
            continue
        numbers = facts.numbers(x) if x.op == "get_attr" else None
        if numbers is None:
            return False
        todo += list(numbers)
    return True
