"""The forms of attention in use today, spelled out as models spell them, without the linears around them.

A form is a function of (q, k, v, *more) and a way to draw its arguments; q is [B, Hq, Sq, D], k and v [B, Hk, Sk, D or
Dv], all three views of [B, S, H, D] in prefill, as projections leave them, and caches [B, H, S, D] in decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH, CACHED = 1024, 4096  # tokens of a prefill, keys of a decode step


@dataclass(frozen=True)
class Form:
    """One row: the function, the shape of its problem, and its further arguments (drawn for a dtype)."""

    call: Callable[..., Tensor]
    heads: tuple[int, int]
    dims: tuple[int, int]
    decode: bool = False
    more: Callable[[torch.dtype], tuple[Tensor, ...]] = lambda dtype: ()
    dtype: str = "bf16"

    def arguments(self) -> tuple[Tensor, ...]:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[self.dtype]
        g = torch.Generator().manual_seed(0)
        (hq, hk), (d, dv) = self.heads, self.dims
        keys, queries = (CACHED, 1) if self.decode else (LENGTH, LENGTH)

        def draw(length: int, heads: int, dim: int) -> Tensor:
            x = torch.randn(1, length, heads, dim, generator=g).to(dtype).transpose(1, 2)
            return x.contiguous() if self.decode else x

        q, k = draw(queries, hq, d), draw(keys, hk, d)
        v = k[..., :dv] if self.call is latent else draw(keys, hk, dv)
        return (q, k, v, *self.more(dtype))


def repeat(x: Tensor, times: int) -> Tensor:
    b, h, s, d = x.shape
    return x if times == 1 else x[:, :, None].expand(b, h, times, s, d).reshape(b, h * times, s, d)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, softcap: float = 0.0) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = repeat(k, times), repeat(v, times)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return attend(q, k, v, additive(hidden, q.dtype))


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return attend(q, k, v, additive((j > i) | (j <= i - 256), q.dtype), softcap=50.0)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, softcap=50.0)


def sinks(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = repeat(k, times), repeat(v, times)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
    scores = scores + additive(hidden, q.dtype)
    sink = logits.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([scores, sink], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return torch.matmul(torch.softmax(both, dim=-1)[..., :-1], v)


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return attend(q, k, v, (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(k.shape[2], device=q.device)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return attend(q, k, v, (slopes[:, None, None] * places)[None].to(q.dtype) + additive(hidden, q.dtype))


def relative(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bucket: Tensor) -> Tensor:
    bias = torch.nn.functional.embedding(bucket, table).permute(2, 0, 1).unsqueeze(0)
    scores = torch.matmul(q, k.transpose(3, 2)) + bias
    return torch.matmul(torch.softmax(scores.float(), dim=-1).type_as(scores), v)


def latent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key head for all: the absorbed form of multi-head latent attention in decode."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 192**-0.5
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def _keep(dtype: torch.dtype) -> tuple[Tensor, ...]:
    keep = torch.ones(1, LENGTH, dtype=torch.int64)
    keep[:, -LENGTH // 10 :] = 0
    return (keep,)


def _buckets(dtype: torch.dtype) -> tuple[Tensor, ...]:
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    return torch.randn(32, 12, generator=torch.Generator().manual_seed(1)).to(dtype), (i - j).abs().clamp(max=31)


def _per_head(heads: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    return lambda dtype: (torch.linspace(0.01, 0.5, heads).to(dtype),)


FORMS: dict[str, Form] = {
    "causal, 2 heads a key head": Form(causal, (16, 8), (128, 128)),
    "causal, fp32": Form(causal, (16, 8), (128, 128), dtype="fp32"),
    "causal, fp16": Form(causal, (16, 8), (128, 128), dtype="fp16"),
    "window and softcap, D 256": Form(windowed, (8, 4), (256, 256)),
    "softcap, fp16": Form(capped, (8, 4), (128, 128), dtype="fp16"),
    "sinks, 8 heads a key head": Form(sinks, (64, 8), (64, 64), more=_per_head(64)),
    "padding, D 64": Form(padded, (12, 12), (64, 64), more=_keep),
    "padding, D 64, fp32": Form(padded, (12, 12), (64, 64), more=_keep, dtype="fp32"),
    "ALiBi": Form(alibi, (16, 16), (64, 64), more=_per_head(16)),
    "T5 bias, fp32": Form(relative, (12, 12), (64, 64), more=_buckets, dtype="fp32"),
    "MLA prefill, D 192, Dv 128": Form(causal, (16, 16), (192, 128)),
    "decode, 2 heads a key head": Form(attend, (16, 8), (128, 128), decode=True),
    "decode, 8 heads a key head": Form(attend, (32, 4), (128, 128), decode=True),
    "decode, fp32": Form(attend, (12, 12), (64, 64), decode=True, dtype="fp32"),
    "decode, sinks": Form(sinks, (64, 8), (64, 64), decode=True, more=_per_head(64)),
    "decode, MLA absorbed": Form(latent, (16, 1), (576, 512), decode=True),
}
