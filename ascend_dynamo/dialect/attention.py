"""Scaled dot product attention over whole keys and values: flash_attention (Dao et al. 2022).

Soft capping is Gemma 2's, sinks are gpt-oss's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo._torch_compat import known
from ascend_dynamo.dialect._attention_checks import flash_attention_f64, flash_attention_samples, value_scale
from ascend_dynamo.dialect.spec import OpSpec

_CAUSAL = ("none", "top_left", "bottom_right")
_EMPTY_ROW = ("nan", "uniform", "zero")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float,
    causal: str = "none",
    window: int = -1,
    softcap: float = 0.0,
    empty_row: str = "nan",
) -> Tensor:
    """softmax(cap(q k^T * scale) + bias, over the visible keys) v.

    q [B,Hq,Sq,D], k [B,Hk,Sk,D], v [B,Hk,Sk,Dv] of one dtype, Hq % Hk == 0 (query head h reads head h // (Hq/Hk));
    result [B,Hq,Sq,Dv] in q.dtype, laid out as [B,Sq,Hq,Dv] in memory. cap(s) = softcap * tanh(s / softcap) if
    softcap > 0. bias (float) and mask (bool, True = visible) are broadcastable to [B,Hq,Sq,Sk]; sinks [Hq] are logits
    of one more key per head without a value. Query i sees key j iff mask allows it, bias is not -inf, j <= i + offset
    unless causal is "none", and j > i + offset - window if window >= 0; offset is Sk - Sq for bottom_right, else 0. A
    row that sees no key gives NaN (empty_row="nan": a plain softmax over -inf), the mean of all v ("uniform": one
    over finfo.min), or 0 ("zero": aten.scaled_dot_product_attention); with sinks it gives 0, since the sink takes
    all.

    What k and v hold at invisible keys must be finite.

    Without sinks and softcap this is aten.scaled_dot_product_attention, empty rows being repaired where there can be
    any.

    Raises:
        ValueError: causal or empty_row has an unknown value.
    """
    if causal not in _CAUSAL or empty_row not in _EMPTY_ROW:
        raise ValueError(
            f"flash_attention: causal={causal!r}, empty_row={empty_row!r}; expected one of {_CAUSAL} and {_EMPTY_ROW}"
        )
    if softcap > 0 or sinks is not None:
        keep = _visible(q, k, mask, causal, window)
        y = _plain(q, k, v, bias, keep, sinks, scale, softcap)
    else:
        y, keep = _through_sdpa(q, k, v, bias, mask, scale, causal, window, plain_nan=empty_row != "zero")
    if sinks is not None:
        return _as_bshd(y)
    kernel_gives = "nan" if softcap > 0 else "zero"
    if empty_row != kernel_gives and not _never_empty(q, k, bias, mask, causal, window):
        y = _repair(y, _empty_rows(bias, keep), v, empty_row)
    return _as_bshd(y)


def _as_bshd(y: Tensor) -> Tensor:
    """The promised layout: [B,H,S,D] with the memory order of [B,S,H,D]; nothing to do after a fused kernel."""
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _never_empty(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, causal: str, window: int) -> bool:
    """True where every query provably sees a key. Adds no guard."""
    if bias is not None or mask is not None:
        return False
    sq, sk = q.shape[-2], k.shape[-2]
    if not known(sk >= 1) or window == 0:
        return False
    if causal == "bottom_right":
        return known(sq <= sk)
    return window < 0 or known(sq <= sk)


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: str, window: int) -> Tensor | None:
    """The boolean mask of ``causal`` and ``window`` combined with ``mask``; None if every key is visible."""
    if causal != "none" or window >= 0:
        sq, sk = q.shape[-2], k.shape[-2]
        i = torch.arange(sq, device=q.device).unsqueeze(-1)
        if causal == "bottom_right":
            i = i + (sk - sq)
        j = torch.arange(sk, device=q.device)
        if causal != "none":
            mask = j <= i if mask is None else mask & (j <= i)
        if window >= 0:
            mask = j > i - window if mask is None else mask & (j > i - window)
    return mask


def _through_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: str,
    window: int,
    plain_nan: bool,
) -> tuple[Tensor, Tensor | None]:
    """aten's attention and, if it was needed, the boolean mask.

    Its CPU kernel without a mask turns a row of NaN into 0 if there are fewer keys than a vector register holds (16);
    with a mask it does not. ``plain_nan`` asks for NaN, as a plain softmax gives.
    """
    sq, sk = q.shape[-2], k.shape[-2]
    if plain_nan and mask is None and bias is None and known(sk < 16):
        mask = torch.ones((sq, sk), dtype=torch.bool, device=q.device)
    gqa = not known(q.shape[1] == k.shape[1])
    if causal == "bottom_right" and known(sq == 1) and window < 0:
        causal = "none"  # the one query is the last: it sees everything
    is_causal = causal == "top_left" or (causal == "bottom_right" and known(sq == sk))
    if is_causal and bias is None and mask is None and window < 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa), None
    keep = _visible(q, k, mask, causal, window)
    if bias is None:
        attn_mask = keep
    else:
        attn_mask = bias if bias.dtype in (q.dtype, torch.float32) and q.dtype != torch.float64 else bias.to(q.dtype)
        if keep is not None:
            attn_mask = torch.where(keep, attn_mask, -math.inf)
    while attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)  # fused kernels take a mask of rank 2 or 4, not 3
    if gqa and known(sq == 1) and _other_value_size(q, v) and _same_for_heads(attn_mask):
        # Values of another size take aten's plain path, which repeats the keys: 100 times slower than heads as queries.
        folded = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[-1])
        y = F.scaled_dot_product_attention(folded, k, v, attn_mask=attn_mask, scale=scale)
        return y.reshape(*q.shape[:3], v.shape[-1]), keep
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=gqa), keep


def _other_value_size(q: Tensor, v: Tensor) -> bool:
    return isinstance(q.shape[-1], int) and isinstance(v.shape[-1], int) and q.shape[-1] != v.shape[-1]


def _same_for_heads(mask: Tensor | None) -> bool:
    """True if a mask [..., Sq, Sk] is known to treat all heads alike."""
    return mask is None or mask.dim() < 3 or known(mask.shape[-3] == 1)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    b, h, s, d = x.shape
    return x if known(h == heads) else x.unsqueeze(2).expand(b, h, heads // h, s, d).reshape(b, heads, s, d)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Softmax spelled out, half precision computed in float32, NaN for an empty row (0 with sinks)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.shape[1]
    k, wide_v = _repeat_heads(k, heads).to(dtype), _repeat_heads(v, heads).to(dtype)
    scores = torch.matmul(q.to(dtype), k.transpose(-1, -2)) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.to(dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    if sinks is None:
        p = torch.softmax(scores, dim=-1)
    else:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        p = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    return torch.matmul(p, wide_v).to(q.dtype)


def _empty_rows(bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """[..., Sq, 1], True where no key is visible; broadcastable to the result."""
    visible = keep
    if bias is not None:
        finite = bias != -math.inf
        visible = finite if keep is None else keep & finite
    assert visible is not None  # without bias, mask, causal and window no row is empty
    return ~visible.any(dim=-1, keepdim=True)


def _repair(y: Tensor, empty: Tensor, v: Tensor, empty_row: str) -> Tensor:
    if empty_row != "uniform":
        return y.masked_fill(empty, math.nan if empty_row == "nan" else 0.0)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    mean = v.mean(dim=-2, keepdim=True, dtype=dtype).to(y.dtype)
    return torch.where(empty, _repeat_heads(mean, y.shape[1]), y)


def _fake(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    b, h, s, _d = q.shape
    d = v.shape[-1]
    return torch.empty_strided((b, h, s, d), (s * h * d, d, h * d, 1), dtype=q.dtype, device=q.device)


SPECS = (
    OpSpec(
        "flash_attention",
        "(Tensor q, Tensor k, Tensor v, *, Tensor? bias=None, Tensor? mask=None, Tensor? sinks=None, float scale,"
        ' str causal="none", int window=-1, float softcap=0., str empty_row="nan") -> Tensor',
        flash_attention,
        _fake,
        flash_attention_f64,
        c_ulp=8.0,
        samples=flash_attention_samples,
        row_scale=value_scale,
        autocast="lower",
    ),
)
