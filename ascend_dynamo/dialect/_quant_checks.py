"""What quantisation is tested against: formulas in float64, one weight at a time, and sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, Sample


def dynamic_quant_f64(x: Tensor) -> tuple[Tensor, Tensor]:
    """The quotients before rounding, and the scales."""
    scale = torch.maximum(x.max(-1).values, -x.min(-1).values) / 127
    bad = ~((scale > 0) & torch.isfinite(scale)).unsqueeze(-1)
    return (x / scale.unsqueeze(-1)).masked_fill(bad, 0.0), scale


def dynamic_quant_scale(x: Tensor) -> tuple[Tensor, None]:
    """A quotient's error is relative to 127."""
    return x.new_tensor(127.0), None


def dynamic_quant_samples(d: Draw) -> Iterator[Sample]:
    x = d.normal(2, 5, 16)
    yield Sample((x,))
    yield Sample((d.normal(5, 2, 16, scale=30.0).transpose(0, 1),), {}, "strided")
    hostile = d.normal(4, 16)
    hostile[0] = 0
    hostile[1, 3] = float("inf")
    hostile[2, 5] = float("nan")
    yield Sample((hostile,), {}, "a zero, an infinite and a NaN row")


def _weight_f64(weight: Tensor, bits: int, zero: Tensor | None, scale: Tensor, block_n: int, block_k: int) -> Tensor:
    """One weight at a time."""
    rows, columns = weight.shape[0], weight.shape[1] * (2 if bits == 4 else 1)
    scale = scale.reshape(scale.shape[0], -1)
    w = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            low_or_high = int(weight[r, c // 2]) // (16 if c % 2 else 1)
            level = int(weight[r, c]) if bits == 8 else low_or_high % 16 - 8
            place = r // block_n, (c // block_k if block_k > 0 else 0)
            shift = 0.0 if zero is None else float(zero.reshape(scale.shape)[place])
            w[r, c] = (level - shift) * float(scale[place])
    return w


def _activation_f64(x: Tensor, x_scale: Tensor | None, act: str, block_k: int) -> Tensor:
    """x after its trip through int8; float32 values divide in float32, since where a quotient rounds is meaning."""
    if x.is_floating_point() and act == "none":
        return x
    single = x.float() if torch.equal(x.float().double(), x.double()) else x
    if act == "dynamic":
        grouped = single.reshape(*x.shape[:-1], -1, block_k if block_k > 0 else x.shape[-1])
        scale = grouped.abs().max(-1, keepdim=True).values / 127
        return (torch.round(grouped / scale) * scale.double()).double().nan_to_num(0.0).reshape(x.shape)
    assert x_scale is not None
    if act == "static":
        return torch.round(single / x_scale.to(single.dtype)).clamp(-128, 127).double() * x_scale
    return x.double() * (x_scale.unsqueeze(-1) if x_scale.dim() == x.dim() - 1 else x_scale)


def quant_linear_f64(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    weight_zero: Tensor | None = None,
    x_scale: Tensor | None = None,
    act: str = "none",
    bits: int = 8,
    block_n: int = 1,
    block_k: int = -1,
    out: torch.dtype | None = None,
) -> Tensor:
    w = _weight_f64(weight, bits, weight_zero, weight_scale, block_n, block_k)
    y = torch.matmul(_activation_f64(x, x_scale, act, block_k), w.t())
    return y if bias is None else y + bias


def quant_linear_scale(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    weight_zero: Tensor | None = None,
    x_scale: Tensor | None = None,
    act: str = "none",
    bits: int = 8,
    block_n: int = 1,
    block_k: int = -1,
    **_: Any,
) -> Tensor:
    w = _weight_f64(weight, bits, weight_zero, weight_scale, block_n, block_k).abs()
    y = torch.matmul(_activation_f64(x, x_scale, act, block_k).abs(), w.t())
    return (y if bias is None else y + bias.abs()).amax(-1, keepdim=True)


def quant_linear_samples(d: Draw) -> Iterator[Sample]:
    def weight(n: int = 6, k: int = 16) -> Tensor:
        return d.ints(n, k, low=-127, high=128, dtype=torch.int8)

    def scales(*shape: int) -> Tensor:
        return d.uniform(*shape, low=0.005, high=0.02, dtype=torch.float32)

    x, bias = d.normal(2, 3, 16), d.normal(6)
    packed = d.ints(6, 8, low=0, high=256, dtype=torch.uint8)
    yield Sample((x, weight(), scales(6), bias), {}, "weight only, int8")
    yield Sample((x, packed, scales(6)), {"bits": 4}, "weight only, int4")
    yield Sample((x, packed, scales(6, 4)), {"bits": 4, "block_k": 4, "weight_zero": d.normal(6, 4)}, "groups, zeros")
    yield Sample((x, weight(), scales(2, 2)), {"block_n": 4, "block_k": 8, "out": torch.float32}, "blocks")
    yield Sample((x, weight(), scales(6), bias), {"act": "dynamic"}, "W8A8 dynamic")
    yield Sample((x, weight(), scales(2, 2)), {"act": "dynamic", "block_n": 4, "block_k": 8}, "W8A8 dynamic, blocks")
    yield Sample((x, weight(), scales(6)), {"act": "static", "x_scale": scales(1)}, "W8A8 static")
    q = d.ints(2, 3, 16, low=-127, high=128, dtype=torch.int8)
    yield Sample((q, weight(), scales(6), bias), {"x_scale": scales(2, 3), "out": d.dtype}, "quantised x, per token")
    yield Sample((q, weight(), scales(6)), {"x_scale": scales(1)[0]}, "quantised x, one scale")
