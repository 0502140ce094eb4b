"""What the CPU kernels gain over ATen's, in seconds: the numbers behind ``CpuLowering.cost``.

The constants were measured on an AMD EPYC with AVX-512-BF16 (``benchmarks/linear.py`` prints them anew); only their
order of magnitude matters. On a processor with AMX, ATen's tiles win where the arithmetic dominates, so there a gain is
claimed only where memory does, and MKL's fp32 needs no help.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FEW_ROWS = 16  # rows of x up to which reading the weight dominates
_PASSES, _STREAM = 4, 10e9  # over scores that are written out, at this many bytes/s


@dataclass(frozen=True)
class _Rates:
    """Attention and linears, flop/s a thread: ATen's, ours; bytes/s of weight at which ATen's extra pass over it goes.

    No ``linear``: there is no such kernel."""

    prefill: tuple[float, float]
    decode: tuple[float, float]
    linear: tuple[float, float] | None = None
    weight: float = 1.0


_RATES = {
    # oneDNN reorders a plain bf16 weight on every call; its large products are as fast as ours.
    torch.bfloat16: _Rates((0.05e12, 0.14e12), (2.4e9, 29e9), (0.212e12, 0.211e12), 18e9),
    torch.float32: _Rates((0.058e12, 0.085e12), (6.6e9, 18e9), (0.090e12, 0.101e12), 60e9),
    # In float32, and rounded.
    torch.float16: _Rates((0.018e12, 0.075e12), (1.4e9, 8.8e9)),
}


def _rates(dtype: torch.dtype, isa: str, rows: int) -> _Rates | None:
    if isa == "portable" or (isa == "amx_bf16" and (dtype is not torch.bfloat16 or rows > FEW_ROWS)):
        return None
    return _RATES.get(dtype)


def linear_gain(m: int, n: int, k: int, dtype: torch.dtype, *, isa: str, threads: int) -> float:
    """Seconds that ``ascend_cpu.linear`` saves on x [m, k] and a plain weight [n, k] against ``aten.linear``.

    0 where the operator would call ATen itself: ``isa`` (from ``kernels.isa()``) or dtype without a kernel.
    """
    rates = _rates(dtype, isa, m)
    if rates is None or rates.linear is None:
        return 0.0
    aten, ours = rates.linear
    return n * k * dtype.itemsize / rates.weight + 2 * m * n * k / threads * (1 / aten - 1 / ours)


def attention_gain(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    *,
    causal: bool,
    isa: str,
    threads: int,
    fused: bool = True,
) -> float:
    """Seconds that ``ascend_cpu.flash_attention`` saves against the reference.

    That is ATen's flash attention if ``fused``; else the scores are written and read again, whatever the processor and
    the dtype, and ours (which keeps a block of them) saves that at least.
    """
    scores = batch * heads * queries * keys
    gain = 0.0 if fused else _PASSES * 4 * scores / _STREAM
    rates = _rates(dtype, isa, queries)
    if rates is not None:
        work = 4 * scores * dim * (0.5 if causal and queries > 1 else 1.0)
        aten, ours = rates.decode if queries <= 2 else rates.prefill
        gain += work / threads * (1 / aten - 1 / ours)
    return gain
