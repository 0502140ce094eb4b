"""bias + GELU -> ``ascend.bias_gelu``.

Before (``x: T[*B, H]``, ``bias: T[H]``)::

    s = x + bias
    z = gelu(s, approximate=a)

after: ``z = ascend.bias_gelu(x, bias, approximate=a)``. A bias that is already inside a linear stays there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare


def add_then_gelu(x, bias, approximate):  # type: ignore[no-untyped-def]
    return F.gelu(x + bias, approximate=approximate)


def fused(x, bias, approximate):  # type: ignore[no-untyped-def]
    return torch.ops.ascend.bias_gelu(x, bias, approximate=approximate)


PATTERNS = (
    declare(
        "bias_gelu",
        eager=(add_then_gelu,),
        replace=fused,
        domain=Domain(dims={"H": (1, None)}, shapes={"x": ("*B", "N", "H"), "bias": ("H",)}),
        level=1,
        benefit=2,
        choices={"approximate": ("none", "tanh")},
        emits=("ascend.bias_gelu",),
    ),
)
