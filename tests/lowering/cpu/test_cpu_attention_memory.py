"""ascend_cpu.flash_attention holds nothing that grows with the square of the sequence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cpu_support import ops

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from _memory import peak_of

LENGTH, HEADS, DIM = 2048, 4, 64
LINEAR = 4 * HEADS * LENGTH * DIM * 4  # q, k, v and the result in float32
SCORES = HEADS * LENGTH * LENGTH * 4  # eight times that
BLOCKS = 32 << 20  # scores of a block of queries, in the several steps of the portable form


def draw(dtype: torch.dtype, dv: int = DIM) -> list[torch.Tensor]:
    return [torch.randn(1, LENGTH, HEADS, d).to(dtype).transpose(1, 2) for d in (DIM, DIM, dv)]


CASES = {
    "plain": {},
    "causal": {"causal": "top_left"},
    "window": {"causal": "bottom_right", "window": 100},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": torch.zeros(HEADS)},
    "padding": {"bias": torch.zeros(1, 1, 1, LENGTH)},
    "alibi": {"bias": torch.randn(1, HEADS, 1, LENGTH)},
    "per row": {"bias": torch.randn(1, HEADS, LENGTH, 1)},
    "key mask": {"mask": torch.ones(1, 1, 1, LENGTH, dtype=torch.bool), "empty_row": "uniform"},
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is only known on Linux")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_linear(case: str, dtype: torch.dtype) -> None:
    q, k, v = draw(dtype)
    _, peak = peak_of(lambda: ops.flash_attention(q, k, v, scale=0.1, **CASES[case]))
    assert peak < 1.5 * LINEAR < SCORES / 5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is only known on Linux")
@pytest.mark.parametrize("case", ["causal", "sinks", "padding"])
def test_the_portable_form_holds_a_block_of_scores(case: str) -> None:
    q, k, v = draw(torch.float32, dv=32)
    _, peak = peak_of(lambda: ops.flash_attention_portable(q, k, v, scale=0.1, **CASES[case]))
    assert peak < LINEAR + BLOCKS < SCORES


def test_what_is_measured_is_the_peak() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is only known on Linux")
    _, peak = peak_of(lambda: torch.ones(16 << 20).sum())
    assert 64e6 < peak < 80e6
