"""What the CPU kernels gain over ATen's, in seconds: the numbers behind ``CpuLowering.cost``.

The constants were measured on two cores of an AMD EPYC with AVX-512-BF16 (``benchmarks/linear.py`` prints them anew);
only their order of magnitude matters. On a processor with AMX, ATen's tiles win where the arithmetic dominates, so
there a gain is claimed only where memory does.
"""

from __future__ import annotations

import torch

_REPACK = 18e9  # bytes/s of weight that oneDNN reorders, on every call
_DOT = 0.21e12  # flop/s a thread of large bf16 products, either kernel
_DOT_LOSS = 0.01  # by which ours is slower there
_FEW_ROWS = 16  # rows of x up to which reading the weight dominates
_ATEN_ATTENTION, _OUR_ATTENTION = 0.05e12, 0.14e12  # flop/s a thread, prefill
_ATEN_DECODE, _OUR_DECODE = 2.4e9, 12e9  # flop/s a thread, one query a head


def linear_gain(m: int, n: int, k: int, dtype: torch.dtype, *, isa: str, threads: int) -> float:
    """Seconds that ``ascend_cpu.linear`` saves on x [m, k] and a plain weight [n, k] against ``aten.linear``.

    0 where the operator would call ATen itself (``isa`` from ``kernels.isa()``, another dtype).
    """
    if dtype is not torch.bfloat16 or isa == "portable" or (isa == "amx_bf16" and m > _FEW_ROWS):
        return 0.0
    return 2 * n * k / _REPACK - _DOT_LOSS * 2 * m * n * k / (_DOT * threads)


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
) -> float:
    """Seconds that ``ascend_cpu.flash_attention`` saves against ATen's scaled_dot_product_attention."""
    if dtype is not torch.bfloat16 or isa == "portable" or (isa == "amx_bf16" and queries > _FEW_ROWS):
        return 0.0
    work = 4 * batch * heads * queries * keys * dim * (0.5 if causal and queries > 1 else 1.0)
    aten, ours = (_ATEN_DECODE, _OUR_DECODE) if queries <= 2 else (_ATEN_ATTENTION, _OUR_ATTENTION)
    return work / threads * (1 / aten - 1 / ours)
