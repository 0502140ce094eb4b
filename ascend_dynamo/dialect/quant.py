"""Quantisation: dynamic_quant and quant_linear (W8A8 static and dynamic, weight-only int8 and int4, block scales)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo.dialect._quant_checks import (
    dynamic_quant_f64,
    dynamic_quant_samples,
    dynamic_quant_scale,
    quant_linear_f64,
    quant_linear_samples,
    quant_linear_scale,
)
from ascend_dynamo.dialect.spec import OpSpec

_ACTS = ("none", "static", "dynamic")


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token: scale = max|row| / 127, q = round(row / scale) to nearest even.

    x [*B,K] floating. Returns q [*B,K] int8 and scale [*B] float32, so that x ~ q * scale. A zero row gives q = 0 and
    scale 0; a row with an infinity or NaN gives q = 0 and a scale that is not finite, so that only that row is
    poisoned.
    """
    q, scale = _quantise_rows(x)
    return q.to(torch.int8).contiguous(), scale.to(torch.float32)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which scales and quotients are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """dynamic_quant before its casts: integral values, and scales, in the wide dtype."""
    wide = x.to(_wide(x))
    scale = wide.abs().amax(dim=-1) / 127.0
    usable = (scale > 0) & (scale < float("inf"))
    q = torch.round(wide / torch.where(usable, scale, 1.0).unsqueeze(-1)).clamp(-127, 127)
    return torch.where(usable.unsqueeze(-1), q, 0.0), scale


def _dynamic_quant_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def unpack_weight(weight: Tensor, bits: int) -> Tensor:
    """int8 [N,K] as it is; uint8 [N,K/2] -> int8 [N,K], low nibble first, values stored plus 8."""
    if bits == 8:
        return weight
    pairs = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)
    return pairs.to(torch.int8) - 8


def spread_scale(scale: Tensor, block_n: int, block_k: int, n: int, k: int) -> Tensor:
    """Block scales [ceil(N/block_n), ceil(K/block_k)] -> one per weight [N,K] (or [N,1] for block_k = -1)."""
    scale = scale.unsqueeze(-1) if scale.dim() == 1 else scale
    if block_n != 1:
        scale = scale.repeat_interleave(block_n, dim=0)[:n]
    return scale if block_k < 0 else scale.repeat_interleave(block_k, dim=1)[:, :k]


def quant_linear(
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
    """x w^T + bias with quantised weights, w = (weight - weight_zero) * weight_scale.

    weight is int8 [N,K] (bits=8) or uint8 [N,K/2] (bits=4: low nibble first, value + 8). One scale (and zero point, if
    any) serves block_n rows by block_k columns (-1: all columns): weight_scale [ceil(N/block_n), ceil(K/block_k)], or
    [N] for one per channel. x [*B,K]; result [*B,N] in ``out`` (default: x.dtype if floating, else float32).
    - act="none": weight only. w is computed in float32, rounded to x.dtype, then aten.linear.
    - act="dynamic": x is quantised as by dynamic_quant, per token and per block_k columns (K a multiple of block_k).
    - act="static": x_scale (one element) is a calibrated scale, q = clamp(round(x / x_scale), -128, 127).
    - x int8: quantised already; x_scale has one element or is [*B] per token; act must be "none".
    The quantised products are summed exactly, per block_k columns, scaled and added in float32. With quantised x,
    weight_zero must be None and bits 8.

    Raises:
        ValueError: a combination that the list does not contain.
    """
    _check(x, weight_zero, x_scale, act, bits, block_k)
    dtype = out or (x.dtype if x.is_floating_point() else torch.float32)
    levels = unpack_weight(weight, bits)
    n, k = levels.shape
    if x.is_floating_point() and act == "none":
        w = levels.to(_wide(x))
        if weight_zero is not None:
            w = w - spread_scale(weight_zero, block_n, block_k, n, k)
        w = (w * spread_scale(weight_scale, block_n, block_k, n, k)).to(x.dtype)
        return F.linear(x, w, None if bias is None else bias.to(x.dtype)).to(dtype).contiguous()
    groups = (1, k) if block_k < 0 else (k // block_k, block_k)
    q, scale = _quantise(x.unflatten(-1, groups), x_scale, act)  # [*B,G,g] and broadcastable to [*B,G]
    dots = torch.einsum("...gk,ngk->...gn", q.to(torch.float64), levels.unflatten(-1, groups).to(torch.float64))
    per_row = spread_scale(weight_scale, block_n, -1, n, k).to(scale.dtype)  # [N,G]
    y = (dots.to(scale.dtype) * scale.unsqueeze(-1) * per_row.t()).sum(-2)
    return (y if bias is None else y + bias.to(scale.dtype)).to(dtype).contiguous()


def _quantise(x: Tensor, x_scale: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    """Integral values [*B,G,g] and their scales, broadcastable to [*B,G]."""
    if act == "dynamic":
        return _quantise_rows(x)
    assert x_scale is not None
    if act == "static":
        scale = x_scale.to(_wide(x)).reshape(1)
        return torch.round(x.to(scale.dtype) / scale).clamp(-128, 127), scale
    scale = x_scale.to(_wide(x_scale))
    return x, scale.reshape(1) if scale.dim() == 0 or scale.shape == (1,) else scale.unsqueeze(-1)


def _check(x: Tensor, weight_zero: Tensor | None, x_scale: Tensor | None, act: str, bits: int, block_k: int) -> None:
    integer = not x.is_floating_point()
    problem = ""
    if act not in _ACTS:
        problem = f"act={act!r} is none of {_ACTS}"
    elif bits not in (4, 8):
        problem = f"bits={bits} is neither 4 nor 8"
    elif integer and (act != "none" or x_scale is None):
        problem = f"x is {x.dtype}, quantised already: it needs act='none' and x_scale, found act={act!r}"
    elif act == "static" and x_scale is None:
        problem = "act='static' needs x_scale"
    elif (integer or act != "none") and (bits != 8 or weight_zero is not None):
        problem = "quantised activations need bits=8 and no weight_zero"
    elif (integer or act == "static") and block_k >= 0:
        problem = f"block_k={block_k} needs act='none' on floating x, or act='dynamic'"
    if problem:
        raise ValueError(f"quant_linear: {problem}")


def _quant_linear_fake(
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
    _check(x, weight_zero, x_scale, act, bits, block_k)
    dtype = out or (x.dtype if x.is_floating_point() else torch.float32)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


SPECS = (
    OpSpec(
        "dynamic_quant",
        "(Tensor x) -> (Tensor q, Tensor scale)",
        dynamic_quant,
        _dynamic_quant_fake,
        dynamic_quant_f64,
        c_ulp=2.0,
        samples=dynamic_quant_samples,
        row_scale=dynamic_quant_scale,
    ),
    OpSpec(
        "quant_linear",
        "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, *, Tensor? weight_zero=None,"
        ' Tensor? x_scale=None, str act="none", int bits=8, int block_n=1, int block_k=-1, ScalarType? out=None)'
        " -> Tensor",
        quant_linear,
        _quant_linear_fake,
        quant_linear_f64,
        c_ulp=3.0,
        samples=quant_linear_samples,
        row_scale=quant_linear_scale,
    ),
)
