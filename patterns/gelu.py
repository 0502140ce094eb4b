"""GELU spelled by hand -> ``aten.gelu``.

Before, exact (``x: T[*B, H]``)::

    y = x * 0.5 * (1 + erf(x / sqrt(2)))

before, tanh (GPT-2's ``gelu_new``)::

    y = 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))

after: ``y = aten.gelu(x, approximate="none" | "tanh")``. The one kernel rounds once where the spelling rounds at
every step, hence level 2. The two are different functions (they differ by up to 5e-4) and never stand for each other;
nor does the sigmoid approximation ("quick GELU"), which is left alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ascend_dynamo.contracts import Domain
from ascend_dynamo.match import declare

ROOT_HALF = math.sqrt(0.5)
ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def erf_divided(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def erf_multiplied(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + torch.erf(x * ROOT_HALF))


def erf_late_half(x):  # type: ignore[no-untyped-def]
    return x * (0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))))


def erf_outer_half(x):  # type: ignore[no-untyped-def]
    return 0.5 * (x * (1.0 + torch.erf(x / math.sqrt(2.0))))


def erf_late_half_multiplied(x):  # type: ignore[no-untyped-def]
    return x * (0.5 * (1.0 + torch.erf(x * ROOT_HALF)))


def erf_fused(x):  # type: ignore[no-untyped-def]
    return F.gelu(x)


def tanh_power(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + torch.tanh(ROOT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0))))


def tanh_products(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + torch.tanh(ROOT_2_OVER_PI * (x + 0.044715 * x * x * x)))


def tanh_factored(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + torch.tanh(x * ROOT_2_OVER_PI * (1.0 + 0.044715 * x * x)))


def tanh_rounded_constant(x):  # type: ignore[no-untyped-def]
    # transformers' FastGELU writes the constant with ten digits: 4e-11 relative
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def tanh_late_half(x):  # type: ignore[no-untyped-def]
    return x * (0.5 * (1.0 + torch.tanh(ROOT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3.0)))))


def tanh_fused(x):  # type: ignore[no-untyped-def]
    return F.gelu(x, approximate="tanh")


DOMAIN = Domain(dims={"H": (1, None)}, shapes={"x": ("*B", "H")})
FIRST = ("gelu_add", "bias_gelu", "gelu_mul")

PATTERNS = (
    declare(
        "gelu_erf",
        eager=(erf_divided, erf_multiplied, erf_late_half, erf_outer_half, erf_late_half_multiplied),
        replace=erf_fused,
        domain=DOMAIN,
        level=2,
        benefit=3,
        emits=("aten.gelu",),
        before=FIRST,
    ),
    declare(
        "gelu_tanh",
        eager=(tanh_power, tanh_products, tanh_factored, tanh_rounded_constant, tanh_late_half),
        replace=tanh_fused,
        domain=DOMAIN,
        level=2,
        benefit=3,
        emits=("aten.gelu",),
        before=FIRST,
    ),
)
