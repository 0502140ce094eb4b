"""Assertions that cannot fail, whatever the data: what Dynamo writes down about the size of a ``nonzero``.

They are true by what the operators are, not by what the tracer believes (it believes them because they are asserted).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def cannot_fail(node: fx.Node) -> bool:
    """True for ``_assert_scalar(c)`` with c: 0 <= a size, or the count of a ``nonzero`` <= the number of elements."""
    if node.target is not _aten._assert_scalar.default:
        return False
    condition = node.args[0]
    if condition is True:
        return True
    if not isinstance(condition, fx.Node) or len(condition.args) != 2:
        return False
    size, bound = condition.args
    if not isinstance(size, fx.Node) or size.target is not _aten.sym_size.int or not isinstance(bound, int):
        return False
    if condition.target is operator.ge:
        return bound <= 0
    return condition.target is operator.le and _most(size.args[0], size.args[1]) <= bound


def _most(n: Any, axis: Any) -> float:
    """The most elements that axis 0 of a ``nonzero`` of fixed sizes can have; infinity for anything else."""
    if not isinstance(n, fx.Node) or n.target is not _aten.nonzero.default or axis != 0:
        return float("inf")
    count = 1
    for size in n.args[0].meta["val"].shape:  # type: ignore[union-attr]
        if not isinstance(size, int):
            return float("inf")
        count *= size
    return count
