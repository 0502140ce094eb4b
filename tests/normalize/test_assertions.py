"""Only assertions that hold whatever the data go; those that say something stay."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from ascend_dynamo.normalize.assertions import cannot_fail

aten = torch.ops.aten


def assertion(compare, bound, source=aten.nonzero.default, axis=0, shape=(4, 5)):
    """``_assert_scalar(compare(source(x).size(axis), bound))`` for x of that shape."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(shape)
    size = graph.call_function(aten.sym_size.int, (graph.call_function(source, (x,)), axis))
    condition = graph.call_function(compare, (size, bound))
    return graph.call_function(aten._assert_scalar.default, (condition, "says something"))


@pytest.mark.parametrize("compare, bound", [(operator.ge, 0), (operator.ge, -1), (operator.le, 20), (operator.le, 21)])
def test_what_nonzero_guarantees_goes(compare, bound):
    assert cannot_fail(assertion(compare, bound))


@pytest.mark.parametrize(
    "node",
    [
        assertion(operator.le, 19),
        assertion(operator.ge, 1),
        assertion(operator.lt, 20),
        assertion(operator.eq, 20),
        assertion(operator.le, 20, axis=1),
        assertion(operator.le, 20, source=aten._unique.default),
    ],
    ids=["fewer than all", "some", "not all", "all", "another axis", "another operator"],
)
def test_others_stay(node):
    assert not cannot_fail(node)
