"""Norms: rms_norm (Zhang and Sennrich 2019), add_rms_norm, add_layer_norm (Ba et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample

_RMS_OPTIONS = (
    "*, int ndim=1, float weight_offset=0., ScalarType compute=float32, bool cast_before_weight=False,"
    " ScalarType? out=None"
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    ndim: int = 1,
    weight_offset: float = 0.0,
    compute: torch.dtype = torch.float32,
    cast_before_weight: bool = False,
    out: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square norm over the last ``ndim`` axes: x / sqrt(mean(x^2) + eps) * (weight_offset + weight).

    x [*B, *N], weight [*N] or None, N being the last ndim axes; result like x in dtype ``out`` (default: x.dtype).
    The mean and the division are done in ``compute``. Then, bit for bit:
    - cast_before_weight=False: multiply by ``weight_offset + weight`` in ``compute``, then cast. With offset 1 this is
      Gemma's ``(n * (1 + w.float())).to(dtype)``; with offset 0 and compute=float32 it is aten.rms_norm.
    - cast_before_weight=True: cast to x.dtype, then ``weight * n`` in their promoted dtype: Llama's
      ``w * n.to(dtype)``. Pass out=that dtype to keep a float32 weight's promotion.
    T5 upcasts only the variance, but bfloat16 times float32 is computed in float32, so it is Llama's form too.
    """
    dims = tuple(range(-ndim, 0))
    n = x.to(compute)
    n = n * torch.rsqrt(n.pow(2).mean(dims, keepdim=True) + eps)
    if cast_before_weight:
        n = n.to(x.dtype)
    if weight is not None:
        w = weight if cast_before_weight else weight.to(compute)
        n = (weight_offset + w if weight_offset != 0 else w) * n
    return n.to(out or x.dtype).contiguous()


def _rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float, *, out: torch.dtype | None = None, **_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=out or x.dtype)


def _rms_norm_f64(
    x: Tensor, weight: Tensor | None, eps: float, *, ndim: int = 1, weight_offset: float = 0.0, **_: Any
) -> Tensor:
    rows = x.flatten(x.dim() - ndim)
    power = torch.einsum("...i,...i->...", rows, rows) / rows.shape[-1]
    y = rows / (power + eps).sqrt().unsqueeze(-1)
    if weight is not None:
        y = y * weight_offset + torch.einsum("...i,i->...i", y, weight.flatten())
    return y.reshape(x.shape)


def _rms_norm_samples(d: Draw) -> Iterator[Sample]:
    x, w = d.normal(2, 5, 24), d.normal(24)
    yield Sample((x, w, 1e-6), {"cast_before_weight": True}, "Llama")
    yield Sample((x, w, 1e-6), {"weight_offset": 1.0}, "Gemma")
    yield Sample((x, w, 1e-5), {}, "aten.rms_norm")
    yield Sample((x, None, 1e-5), {"out": torch.float32}, "no weight, float32 out")
    yield Sample((x.transpose(0, 1), w, 1e-6), {"cast_before_weight": True}, "strided input")
    yield Sample((d.normal(3, 4, 6), d.normal(4, 6), 1e-6), {"ndim": 2}, "two axes")
    yield Sample((d.normal(0, 24), w, 1e-6), {}, "no rows")
    yield Sample((x * 0, w, 1e-6), {}, "zeros")


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Residual addition, then rms_norm: h = x + residual, rounded in the input dtype; y = rms_norm(h, weight, eps).

    x and residual have one shape [*B, *N] and one dtype; options and y as in rms_norm. Returns (y, h).
    """
    h = (x + residual).contiguous()
    return rms_norm(h, weight, eps, **options), h


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, out: torch.dtype | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out or x.dtype), x.new_empty(x.shape)


def _add_rms_norm_f64(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, **options: Any
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _rms_norm_f64(h, weight, eps, **options), h


def _add_rms_norm_scale(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, weight_offset: float = 0.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Rounding h moves y by as much as the operands are larger than their sum."""
    ndim = options.get("ndim", 1)
    parts = (x.abs() + residual.abs()).amax(tuple(range(-ndim, 0)), keepdim=True)
    gain = 1.0 if weight is None else (weight.abs() + abs(weight_offset)).max()
    h = (x + residual).flatten(x.dim() - ndim)
    rms = (h.pow(2).mean(-1) + eps).sqrt().reshape(x.shape[: x.dim() - ndim] + (1,) * ndim)
    return gain * parts / rms, parts


def _add_rms_norm_samples(d: Draw) -> Iterator[Sample]:
    x, r, w = d.normal(2, 5, 24), d.normal(2, 5, 24), d.normal(24)
    yield Sample((x, r, w, 1e-6), {"cast_before_weight": True}, "Llama")
    yield Sample((x, r, w, 1e-6), {"weight_offset": 1.0}, "Gemma")
    yield Sample((x, r, None, 1e-6), {"out": torch.float32}, "no weight, float32 out")
    yield Sample((x.transpose(0, 1), r.transpose(0, 1), w, 1e-6), {}, "strided input")


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual addition, then aten.layer_norm over the last axis: h = x + residual in the input dtype, y = norm of h.

    x and residual [*B, N] of one dtype; weight and bias [N] or None. Returns (y, h), both like x.
    """
    h = (x + residual).contiguous()
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps).contiguous(), h


def _add_layer_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _add_layer_norm_f64(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + residual
    centred = h - h.sum(-1, keepdim=True) / h.shape[-1]
    y = centred * ((centred**2).sum(-1, keepdim=True) / h.shape[-1] + eps) ** -0.5
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), h


def _add_layer_norm_scale(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    parts = (x.abs() + residual.abs()).amax(-1, keepdim=True)
    gain = 1.0 if weight is None else weight.abs().max()
    h = x + residual
    variance = (h - h.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    y = gain * parts / (variance + eps).sqrt()
    return (y if bias is None else y + bias.abs().max()), parts


def _add_layer_norm_samples(d: Draw) -> Iterator[Sample]:
    x, r, w, b = d.normal(2, 5, 24), d.normal(2, 5, 24), d.normal(24), d.normal(24)
    yield Sample((x, r, w, b, 1e-5), {}, "affine")
    yield Sample((x, r, None, None, 1e-5), {}, "plain")
    yield Sample((x.transpose(0, 1), r.transpose(0, 1), w, None, 1e-5), {}, "strided input")


SPECS = (
    OpSpec(
        "rms_norm",
        f"(Tensor x, Tensor? weight, float eps, {_RMS_OPTIONS}) -> Tensor",
        rms_norm,
        _rms_norm_fake,
        _rms_norm_f64,
        c_ulp=3.0,
        samples=_rms_norm_samples,
        autocast="cuda_fp32",
    ),
    OpSpec(
        "add_rms_norm",
        f"(Tensor x, Tensor residual, Tensor? weight, float eps, {_RMS_OPTIONS}) -> (Tensor y, Tensor h)",
        add_rms_norm,
        _add_rms_norm_fake,
        _add_rms_norm_f64,
        c_ulp=3.0,
        samples=_add_rms_norm_samples,
        row_scale=_add_rms_norm_scale,
    ),
    OpSpec(
        "add_layer_norm",
        "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor h)",
        add_layer_norm,
        _add_layer_norm_fake,
        _add_layer_norm_f64,
        c_ulp=4.0,
        samples=_add_layer_norm_samples,
        row_scale=_add_layer_norm_scale,
    ),
)
