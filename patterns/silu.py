"""SiLU spelled by hand -> ``aten.silu``.

Before: ``y = x * sigmoid(x)`` (``x: T[*B, H]``); after: ``y = aten.silu(x)``. One rounding instead of two: level 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare


def by_sigmoid(x):  # type: ignore[no-untyped-def]
    return x * torch.sigmoid(x)


def by_exp(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + torch.exp(-x))


def fused(x):  # type: ignore[no-untyped-def]
    return F.silu(x)


PATTERNS = (
    declare(
        "silu",
        eager=(by_sigmoid, by_exp),
        replace=fused,
        domain=Domain(dims={"H": (1, None)}, shapes={"x": ("*B", "H")}),
        level=2,
        benefit=1,
        emits=("aten.silu",),
        before=("merge_linears", "swiglu"),
    ),
)
