"""What flash_attention is tested against: its formula in float64, one query at a time, and its sample inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, Sample


def attend_f64(
    scores: Tensor, visible: Tensor, values: Tensor, sink: float | None = None, empty_row: str = "nan"
) -> Tensor:
    """One query: scores [Sk], visible [Sk], values [Sk,Dv] -> [Dv], by exponentials relative to the largest score."""
    chosen = torch.nonzero(visible).flatten()
    if len(chosen) == 0:
        if sink is not None or empty_row == "zero":
            return torch.zeros_like(values[0]) if len(values) else values.new_zeros(values.shape[-1])
        return values.sum(0) / len(values) if empty_row == "uniform" else torch.full_like(values[0], math.nan)
    scores, values = scores[chosen], values[chosen]
    top = scores.max() if sink is None else torch.maximum(scores.max(), scores.new_tensor(sink))
    weights = torch.exp(scores - top)
    total = weights.sum() + (0.0 if sink is None else math.exp(sink - float(top)))
    return torch.einsum("j,jd->d", weights / total, values)


def flash_attention_f64(
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
    (b, hq, sq, _), (hk, sk), dv = q.shape, k.shape[1:3], v.shape[-1]
    offset = sk - sq if causal == "bottom_right" else 0
    full = (b, hq, sq, sk)
    bias = None if bias is None else bias.expand(full)
    mask = None if mask is None else mask.expand(full)
    y = q.new_empty((b, hq, sq, dv))
    for n in range(b):
        for h in range(hq):
            keys, values = k[n, h * hk // hq], v[n, h * hk // hq]
            for i in range(sq):
                scores = torch.einsum("d,jd->j", q[n, h, i], keys) * scale
                if softcap > 0:
                    e = torch.exp(-2 * scores / softcap)
                    scores = softcap * (1 - e) / (1 + e)
                seen = [
                    (causal == "none" or j <= i + offset)
                    and (window < 0 or j > i + offset - window)
                    and (mask is None or bool(mask[n, h, i, j]))
                    and (bias is None or float(bias[n, h, i, j]) != -math.inf)
                    for j in range(sk)
                ]
                if bias is not None:
                    scores = scores + bias[n, h, i]
                sink = None if sinks is None else float(sinks[h])
                y[n, h, i] = attend_f64(scores, torch.tensor(seen, dtype=torch.bool), values, sink, empty_row)
    return y


def value_scale(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """max |v| of the head that a query reads."""
    top = v.abs().nan_to_num(0.0, 0.0, 0.0).amax(dim=(-2, -1), keepdim=True) if v.numel() else v.new_zeros(1, 1, 1, 1)
    return top.repeat_interleave(q.shape[1] // max(k.shape[1], 1), dim=1) if v.numel() else top


def flash_attention_samples(d: Draw) -> Iterator[Sample]:
    def qkv(sq: int = 5, sk: int = 7, hq: int = 4, hk: int = 2, dim: int = 8, dv: int = 8) -> tuple[Tensor, ...]:
        q = d.normal(2, sq, hq, dim).transpose(1, 2)
        return q, d.normal(2, hk, sk, dim), d.normal(2, hk, sk, dv)

    lowest = torch.finfo(d.dtype).min
    hole = d.bools(2, 1, 5, 7)
    hole[0, :, 2] = False
    additive = torch.zeros(2, 1, 5, 7, dtype=d.dtype).masked_fill(~hole, -math.inf)
    finite = torch.zeros(2, 1, 5, 7, dtype=d.dtype).masked_fill(~hole, lowest)
    s = {"scale": 0.3}
    yield Sample(qkv(), s, "grouped heads")
    yield Sample(qkv(hk=4), {**s, "causal": "top_left"}, "top left")
    yield Sample(qkv(), {**s, "causal": "bottom_right"}, "bottom right")
    yield Sample(qkv(sq=6, sk=6), {**s, "causal": "bottom_right"}, "square")
    yield Sample(qkv(sq=1), {**s, "causal": "bottom_right", "empty_row": "zero"}, "decode")
    yield Sample(qkv(dv=4), s, "values of another size")
    yield Sample(qkv(sq=1, hk=1, dv=4), s, "decode on latents")
    yield Sample(qkv(), {**s, "bias": d.normal(1, 4, 5, 7)}, "bias")
    yield Sample(qkv(), {**s, "bias": d.normal(5, 7, dtype=torch.float32), "mask": hole[:1]}, "bias and mask")
    for empty_row in ("nan", "uniform", "zero"):
        yield Sample(qkv(), {**s, "mask": hole, "empty_row": empty_row}, f"masked row, {empty_row}")
        yield Sample(qkv(), {**s, "bias": additive, "empty_row": empty_row}, f"-inf bias row, {empty_row}")
        yield Sample(qkv(sq=7, sk=5), {**s, "causal": "bottom_right", "empty_row": empty_row}, f"Sq > Sk, {empty_row}")
        yield Sample(
            qkv(), {**s, "mask": hole, "softcap": 5.0, "empty_row": empty_row}, f"softcap, masked row, {empty_row}"
        )
    if d.dtype != torch.float16:  # float16's finfo.min absorbs no score once it is computed in float32
        yield Sample(qkv(), {**s, "bias": finite}, "finfo.min bias")
    yield Sample(qkv(), {**s, "causal": "bottom_right", "window": 3}, "sliding window")
    yield Sample(qkv(), {**s, "window": 2, "mask": hole[:1, :, :1], "empty_row": "zero"}, "window without causal")
    yield Sample(qkv(), {**s, "softcap": 2.0, "causal": "bottom_right"}, "softcap")
    yield Sample(qkv(), {**s, "sinks": d.normal(4)}, "sinks")
    yield Sample(qkv(), {**s, "sinks": d.normal(4), "mask": hole, "softcap": 4.0}, "sinks, masked row, softcap")
