"""LayerNorm spelled by hand -> ``aten.layer_norm``.

Before (``x: T[*B, H]``, ``w, b: T[H]``)::

    c = x - mean(x, [-1], True)
    v = mean(c * c, [-1], True)
    y = c / sqrt(v + eps) * w + b

after: ``y = aten.layer_norm(x, [H], w, b, eps)``. The kernel computes in float32 and rounds once: level 2. A variance
with Bessel's correction (torch's default ``x.var(-1)``) is another function and stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare


def divided(x, w, b, eps):  # type: ignore[no-untyped-def]
    c = x - x.mean(-1, keepdim=True)
    return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + eps) * w + b


def multiplied(x, w, b, eps):  # type: ignore[no-untyped-def]
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps) * w + b


def with_var(x, w, b, eps):  # type: ignore[no-untyped-def]
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps) * w + b


def affine(x, w, b, eps):  # type: ignore[no-untyped-def]
    return F.layer_norm(x, (x.shape[-1],), w, b, eps)


def cohere(x, w, eps):  # type: ignore[no-untyped-def]
    h = x.to(torch.float32)
    c = h - h.mean(-1, keepdim=True)
    h = c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + eps)
    return (w.to(torch.float32) * h).to(x.dtype)


def scale_only(x, w, eps):  # type: ignore[no-untyped-def]
    return F.layer_norm(x, (x.shape[-1],), w, None, eps)


# float64 is left out: the upcast spelling would round it to float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = {"H": (2, None)}
# A centred input inside is an RMSNorm too; the larger fusion comes first.
LATER = ("rms_norm", "rms_norm_reordered", "add_layer_norm")

PATTERNS = (
    declare(
        "layer_norm",
        eager=(divided, multiplied, with_var),
        replace=affine,
        domain=Domain(DTYPES, DIMS, {"x": ("*B", "H"), "w": ("H",), "b": ("H",)}),
        level=2,
        benefit=5,
        scalars={"eps": (1e-8, 1e-2)},
        emits=("aten.layer_norm",),
        before=("layer_norm_scale", *LATER),
    ),
    declare(
        "layer_norm_scale",
        eager=(cohere,),
        replace=scale_only,
        domain=Domain(DTYPES, DIMS, {"x": ("*B", "H"), "w": ("H",)}),
        level=2,
        benefit=4,
        scalars={"eps": (1e-8, 1e-2)},
        emits=("aten.layer_norm",),
        before=LATER,
    ),
)
