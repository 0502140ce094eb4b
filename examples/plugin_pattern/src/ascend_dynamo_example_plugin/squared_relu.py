"""Squared ReLU -> ``example.squared_relu``.

Before (``x: T[*B, H]``)::

    h = relu(x)
    y = h * h

after: ``y = example.squared_relu(x)``. The same operations in the same order, so level 1: bit-exact.
"""

import torch
import torch.nn.functional as F

import ascend_dynamo_example_plugin.op  # noqa: F401  registers the operator
from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare


def product(x):
    h = F.relu(x)
    return h * h


def square(x):
    return F.relu(x).square()


def fused(x):
    return torch.ops.example.squared_relu(x)


PATTERNS = (
    declare(
        "squared_relu",
        eager=(product, square),
        replace=fused,
        domain=Domain(dims={"H": (1, None)}, shapes={"x": ("*B", "H")}),
        level=1,
    ),
)
