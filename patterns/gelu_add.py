"""GELU + Add -> ``ascend.gelu_add``.

Before (``x, y: T[*B, H]``)::

    g = gelu(x, approximate=a)
    z = g + y

after: ``z = ascend.gelu_add(x, y, approximate=a)``. ``alpha`` other than 1 and a ``y`` that broadcasts are refused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare


def gelu_then_add(x, y, approximate):  # type: ignore[no-untyped-def]
    return F.gelu(x, approximate=approximate) + y


def fused(x, y, approximate):  # type: ignore[no-untyped-def]
    return torch.ops.ascend.gelu_add(x, y, approximate=approximate)


PATTERNS = (
    declare(
        "gelu_add",
        eager=(gelu_then_add,),
        replace=fused,
        domain=Domain(dims={"H": (1, None)}, shapes={"x": ("*B", "H"), "y": ("*B", "H")}),
        level=1,
        benefit=2,
        choices={"approximate": ("none", "tanh")},
        emits=("ascend.gelu_add",),
    ),
)
