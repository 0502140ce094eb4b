"""Norms and activations that hand on int8: add_rms_norm_quant, add_rms_norm_dynamic_quant, swiglu_quant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect._quant_checks import dynamic_quant_f64
from ascend_dynamo.dialect.activation import silu_f64, swiglu
from ascend_dynamo.dialect.norm import add_rms_norm
from ascend_dynamo.dialect.quant import dynamic_quant
from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample

_OPTIONS = "float weight_offset=0., ScalarType compute=float32, bool cast_before_weight=False"


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """add_rms_norm, then static int8: q = clamp(round(y / scale) + zero_point, -128, 127), y rounded in x.dtype first.

    x, residual [*B,N], weight [N] or None; scale and zero_point have one element or are [N]; options as in rms_norm,
    over one axis. Returns q [*B,N] int8 and h = x + residual.
    """
    y, h = add_rms_norm(x, residual, weight, eps, **options)
    q = torch.round(y.to(torch.float32) / scale.to(torch.float32))
    if zero_point is not None:
        q = q + zero_point
    return q.clamp(-128, 127).to(torch.int8), h


def _add_rms_norm_quant_fake(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape)


def _norm_f64(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    h = x + residual
    y = h / torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + eps)
    return (y if weight is None else y * (weight + weight_offset)), h


def _add_rms_norm_quant_f64(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    weight_offset: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    y, h = _norm_f64(x, residual, weight, eps, weight_offset)
    return (y / scale + (0 if zero_point is None else zero_point)).clamp(-128, 127), h


def _static_scale(x: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _quotient_scale(x, residual), x.abs() + residual.abs()


def _quotient_scale(x: Tensor, residual: Tensor) -> Tensor:
    """127, times how much larger the largest operand of the addition is than the row's mean sum."""
    h = x + residual
    rms = h.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6
    return 127 * ((x.abs() + residual.abs()).amax(-1, keepdim=True) / rms).clamp(min=1.0)


def add_rms_norm_dynamic_quant(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """add_rms_norm, then dynamic_quant of y, y rounded in x.dtype first.

    x, residual [*B,N], weight [N] or None; options as in rms_norm, over one axis. Returns q [*B,N] int8, scale [*B]
    float32 and h = x + residual.
    """
    y, h = add_rms_norm(x, residual, weight, eps, **options)
    return (*dynamic_quant(y), h)


def _add_rms_norm_dynamic_quant_fake(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape),
    )


def _add_rms_norm_dynamic_quant_f64(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, weight_offset: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, h = _norm_f64(x, residual, weight, eps, weight_offset)
    return (*dynamic_quant_f64(y), h)


def _dynamic_scale(x: Tensor, residual: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = _quotient_scale(x, residual)
    largest = _add_rms_norm_dynamic_quant_f64(x, residual, *args, **options)[1]
    return q, largest * q[..., 0] / 127, x.abs() + residual.abs()


def swiglu_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """swiglu, then dynamic_quant of its result, rounded in the input dtype first.

    gate_up [*B,2I]. Returns q [*B,I] int8 and scale [*B] float32.
    """
    return dynamic_quant(swiglu(gate_up))


def _swiglu_quant_fake(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    *lead, width = gate_up.shape
    return (
        gate_up.new_empty((*lead, width // 2), dtype=torch.int8),
        gate_up.new_empty(tuple(lead), dtype=torch.float32),
    )


def _swiglu_quant_f64(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = torch.tensor_split(gate_up, 2, dim=-1)
    return dynamic_quant_f64(silu_f64(gate) * up)


def _swiglu_quant_scale(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.new_tensor(127.0), _swiglu_quant_f64(gate_up)[1].abs()


def _samples(d: Draw) -> Iterator[Sample]:
    x, r, w = d.normal(2, 5, 24), d.normal(2, 5, 24), d.normal(24)
    yield Sample((x, r, w, 1e-6), {"cast_before_weight": True}, "Llama")
    yield Sample((x, r, w, 1e-6), {"weight_offset": 1.0}, "Gemma")
    yield Sample((x.transpose(0, 1), r.transpose(0, 1), None, 1e-6), {}, "strided, no weight")


def _static_samples(d: Draw) -> Iterator[Sample]:
    one = torch.tensor([0.02])
    yield from (Sample((*s.args, one), s.kwargs, s.note) for s in _samples(d))
    x, r, w = d.normal(3, 24), d.normal(3, 24), d.normal(24)
    per_channel = d.uniform(24, low=0.01, high=0.05, dtype=torch.float32)
    zero = d.ints(24, low=-20, high=20).float()
    yield Sample((x, r, w, 1e-6, per_channel), {"zero_point": zero}, "per channel, zero point")


def _swiglu_samples(d: Draw) -> Iterator[Sample]:
    yield Sample((d.normal(2, 3, 16),))
    yield Sample((d.normal(3, 2, 16, scale=8.0).transpose(0, 1),), {}, "strided")


SPECS = (
    OpSpec(
        "add_rms_norm_quant",
        "(Tensor x, Tensor residual, Tensor? weight, float eps, Tensor scale, *, Tensor? zero_point=None,"
        f" {_OPTIONS}) -> (Tensor q, Tensor h)",
        add_rms_norm_quant,
        _add_rms_norm_quant_fake,
        _add_rms_norm_quant_f64,
        c_ulp=4.0,
        samples=_static_samples,
        row_scale=_static_scale,
    ),
    OpSpec(
        "add_rms_norm_dynamic_quant",
        f"(Tensor x, Tensor residual, Tensor? weight, float eps, *, {_OPTIONS}) -> (Tensor q, Tensor scale, Tensor h)",
        add_rms_norm_dynamic_quant,
        _add_rms_norm_dynamic_quant_fake,
        _add_rms_norm_dynamic_quant_f64,
        c_ulp=4.0,
        samples=_samples,
        row_scale=_dynamic_scale,
    ),
    OpSpec(
        "swiglu_quant",
        "(Tensor gate_up) -> (Tensor q, Tensor scale)",
        swiglu_quant,
        _swiglu_quant_fake,
        _swiglu_quant_f64,
        c_ulp=4.0,
        samples=_swiglu_samples,
        row_scale=_swiglu_quant_scale,
    ),
)
