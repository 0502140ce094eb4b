"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int = -1) -> Tensor:
    """Rotate pairs of channels: x * cos + rotate(x) * sin on the first ``rotary_dim`` channels, the rest unchanged.

    x [..., D]; cos and sin [..., R], R = rotary_dim (-1: D), even, broadcastable to x, with both members of each pair
    present: what transformers calls cos and sin. Half layout (interleaved=False): channel i pairs with i + R/2,
    rotate(x) = cat(-x2, x1). Interleaved: 2i pairs with 2i + 1, and cos, sin repeat each value twice. Two products and
    a sum in the dtype to which torch promotes x, cos and sin, which is the result's dtype (bit-equal to transformers).
    """
    whole = rotary_dim < 0
    part = x if whole else x[..., :rotary_dim]
    if interleaved:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    y = part * cos + turned * sin
    if not whole:
        y = torch.cat((y, x[..., rotary_dim:].to(y.dtype)), dim=-1)
    return y.contiguous()


def _fake(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int = -1) -> Tensor:
    same = x.dtype == cos.dtype == sin.dtype
    dtype = x.dtype if same else torch.promote_types(torch.result_type(x, cos), sin.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _f64(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, rotary_dim: int = -1) -> Tensor:
    """Each pair as a complex number times the unit complex number of its angle."""
    r = x.shape[-1] if rotary_dim < 0 else rotary_dim
    even = torch.arange(0, r, 2) if interleaved else torch.arange(r // 2)
    odd = even + 1 if interleaved else even + r // 2
    z = torch.complex(x[..., even], x[..., odd])
    # cos and sin may differ within a pair: the real part uses the first member's, the imaginary part the second's
    real = (z * torch.complex(*torch.broadcast_tensors(cos[..., even], sin[..., even]))).real
    imag = (z * torch.complex(*torch.broadcast_tensors(cos[..., odd], sin[..., odd]))).imag
    y = x.clone()
    y[..., even], y[..., odd] = real, imag
    return y


def _row_scale(x: Tensor, cos: Tensor, sin: Tensor, **_: object) -> Tensor:
    return x.abs().amax(-1, keepdim=True) * (cos.abs().amax(-1, keepdim=True) + sin.abs().amax(-1, keepdim=True))


def _samples(d: Draw) -> Iterator[Sample]:
    x = d.normal(2, 5, 3, 8).transpose(1, 2)
    angles = d.uniform(2, 1, 5, 4, low=0, high=9, dtype=torch.float64)
    half = torch.cat((angles, angles), -1)
    cos, sin = half.cos().to(d.dtype), half.sin().to(d.dtype)
    yield Sample((x, cos, sin), {}, "half")
    twice = angles.repeat_interleave(2, -1)
    yield Sample((x, twice.cos().to(d.dtype), twice.sin().to(d.dtype)), {"interleaved": True}, "interleaved")
    yield Sample((d.normal(2, 3, 5, 12), cos, sin), {"rotary_dim": 8}, "partial")
    yield Sample((x, cos.float(), sin.float()), {}, "float32 tables")
    yield Sample((x, cos[0, 0], sin[0, 0]), {}, "tables without a batch axis")
    yield Sample((x, d.normal(8), d.normal(8)), {"interleaved": True}, "tables that are no rotation")


SPECS = (
    OpSpec(
        "rotary",
        "(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False, int rotary_dim=-1) -> Tensor",
        rotary,
        _fake,
        _f64,
        c_ulp=3.0,
        samples=_samples,
        row_scale=_row_scale,
    ),
)
