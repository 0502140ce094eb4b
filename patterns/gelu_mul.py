"""GELU * up -> ``ascend.gelu_mul`` (GeGLU: Gemma, T5 v1.1).

Before (``gate, up: T[*B, H]``)::

    g = gelu(gate, approximate=a)
    z = g * up

after: ``z = ascend.gelu_mul(gate, up, approximate=a)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare


def gelu_then_mul(gate, up, approximate):  # type: ignore[no-untyped-def]
    return F.gelu(gate, approximate=approximate) * up


def fused(gate, up, approximate):  # type: ignore[no-untyped-def]
    return torch.ops.ascend.gelu_mul(gate, up, approximate=approximate)


PATTERNS = (
    declare(
        "gelu_mul",
        eager=(gelu_then_mul,),
        replace=fused,
        domain=Domain(dims={"H": (1, None)}, shapes={"gate": ("*B", "H"), "up": ("*B", "H")}),
        level=1,
        benefit=2,
        choices={"approximate": ("none", "tanh")},
        emits=("ascend.gelu_mul",),
    ),
)
