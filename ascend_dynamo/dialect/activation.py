"""Activations with the elementwise work around them: GELU (Hendrycks and Gimpel 2016), GEGLU, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample


def gelu_add(x: Tensor, y: Tensor, *, approximate: str) -> Tensor:
    """gelu(x) + y, the gelu rounded in x.dtype first. ``approximate``: none | tanh.

    x [*S], y broadcastable to x. Result [*S] in the dtype to which torch promotes x and y.
    """
    return (F.gelu(x, approximate=approximate) + y).contiguous()


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """gelu(x + bias), the sum rounded in the promoted dtype first. ``approximate``: none | tanh.

    x [*B, N], bias [N] (or broadcastable to x). Result [*B, N] in the dtype to which torch promotes x and bias.
    """
    return F.gelu(x + bias, approximate=approximate).contiguous()


def gelu_mul(gate: Tensor, up: Tensor, *, approximate: str) -> Tensor:
    """gelu(gate) * up, the gelu rounded in gate.dtype first (GEGLU). ``approximate``: none | tanh.

    gate [*S], up broadcastable to gate. Result [*S] in the dtype to which torch promotes gate and up.
    """
    return (F.gelu(gate, approximate=approximate) * up).contiguous()


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the silu rounded in the input dtype first. gate_up [..., 2I]: gate, then up; result [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).contiguous()


def _binary_fake(x: Tensor, y: Tensor, *, approximate: str) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if x.dtype == y.dtype else torch.result_type(x, y))


def _swiglu_fake(gate_up: Tensor) -> Tensor:
    *lead, width = gate_up.shape
    return gate_up.new_empty((*lead, width // 2))


def gelu_f64(x: Tensor, approximate: str) -> Tensor:
    """GELU as written in its paper, in float64."""
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        # x * sigmoid(2 t) is x (1 + tanh t) / 2
        return x / (1 + torch.exp(-2 * inner))
    return x * 0.5 * torch.erfc(-x / math.sqrt(2))


def silu_f64(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu_add_f64(x: Tensor, y: Tensor, *, approximate: str) -> Tensor:
    return gelu_f64(x, approximate) + y


def _bias_gelu_f64(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    return gelu_f64(x + bias, approximate)


def _sum_scale(x: Tensor, y: Tensor, *, approximate: str) -> Tensor:
    """Below zero, 1 + erf cancels: GELU's error is relative to its argument, not to its value."""
    return (x.abs() + y.abs()).amax(-1, keepdim=True)


def _gelu_mul_f64(gate: Tensor, up: Tensor, *, approximate: str) -> Tensor:
    return gelu_f64(gate, approximate) * up


def _product_scale(gate: Tensor, up: Tensor, *, approximate: str) -> Tensor:
    return (gate * up).abs().amax(-1, keepdim=True)


def _swiglu_f64(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    return silu_f64(gate_up[..., :half]) * gate_up[..., half:]


def _binary_samples(d: Draw) -> Iterator[Sample]:
    for approximate in ("none", "tanh"):
        yield Sample((d.normal(2, 3, 8), d.normal(2, 3, 8)), {"approximate": approximate}, "same shape")
    yield Sample((d.normal(2, 3, 8, scale=4.0), d.normal(8)), {"approximate": "none"}, "broadcast")
    yield Sample((d.normal(2, 3, 8), d.normal(2, 3, 8, dtype=torch.float64)), {"approximate": "none"}, "mixed dtypes")
    yield Sample((d.normal(3, 2, 8).transpose(0, 1), d.normal(2, 3, 8)), {"approximate": "tanh"}, "strided")


def _swiglu_samples(d: Draw) -> Iterator[Sample]:
    yield Sample((d.normal(2, 3, 16),))
    yield Sample((d.normal(3, 2, 16, scale=8.0).transpose(0, 1),), {}, "strided")
    yield Sample((d.normal(0, 16),), {}, "no rows")


_BINARY = "*, str approximate) -> Tensor"
SPECS = (
    OpSpec(
        "gelu_add",
        f"(Tensor x, Tensor y, {_BINARY}",
        gelu_add,
        _binary_fake,
        _gelu_add_f64,
        c_ulp=4.0,
        samples=_binary_samples,
        row_scale=_sum_scale,
    ),
    OpSpec(
        "bias_gelu",
        f"(Tensor x, Tensor bias, {_BINARY}",
        bias_gelu,
        _binary_fake,
        _bias_gelu_f64,
        c_ulp=4.0,
        samples=_binary_samples,
        row_scale=_sum_scale,
    ),
    OpSpec(
        "gelu_mul",
        f"(Tensor gate, Tensor up, {_BINARY}",
        gelu_mul,
        _binary_fake,
        _gelu_mul_f64,
        c_ulp=4.0,
        samples=_binary_samples,
        row_scale=_product_scale,
    ),
    OpSpec(
        "swiglu",
        "(Tensor gate_up) -> Tensor",
        swiglu,
        _swiglu_fake,
        _swiglu_f64,
        c_ulp=4.0,
        samples=_swiglu_samples,
    ),
)
