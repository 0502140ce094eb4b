"""The cost model says what was measured, in sign and rough size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_dynamo.lowering.cpu.cost import attention_gain, linear_gain

BF16, FP32 = torch.bfloat16, torch.float32
AVX: dict[str, Any] = {"isa": "avx512_bf16", "threads": 2}
ATTENTION: dict[str, Any] = dict(batch=1, heads=16, queries=128, keys=128, dim=128, dtype=BF16, causal=True, **AVX)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("m", [1, 8, 128])
def test_a_plain_weight_is_worth_reading_as_it_is(m, dtype):
    assert linear_gain(m, 4096, 1024, dtype, **AVX) > 1e-4


def test_many_bf16_rows_gain_nothing():
    assert abs(linear_gain(2048, 4096, 1024, BF16, **AVX)) < 2e-3
    assert linear_gain(65536, 4096, 1024, BF16, **AVX) < 0


@pytest.mark.parametrize(
    "case",
    [{"isa": "portable"}, {"dtype": torch.float16}, {"isa": "amx_bf16", "m": 128}, {"isa": "amx_bf16", "dtype": FP32}],
)
def test_no_gain_where_the_operator_calls_aten(case):
    args = {"m": 1, "n": 64, "k": 64, "dtype": BF16, **AVX, **case}
    assert linear_gain(**args) == 0


def test_attention_gains_where_it_was_measured():
    assert attention_gain(**ATTENTION) > 0
    assert attention_gain(**{**ATTENTION, "isa": "amx_bf16"}) == 0
    assert attention_gain(**{**ATTENTION, "isa": "amx_bf16", "queries": 1}) > 0
    assert attention_gain(**{**ATTENTION, "dtype": FP32}) > 0
    assert attention_gain(**{**ATTENTION, "dtype": FP32, "queries": 1}) > 0
    assert attention_gain(**{**ATTENTION, "dtype": torch.float16}) > 0
    assert attention_gain(**{**ATTENTION, "dtype": torch.float16, "isa": "amx_bf16"}) == 0
    assert attention_gain(**{**ATTENTION, "dtype": torch.float64}) == 0


@pytest.mark.parametrize("isa", ["portable", "amx_bf16", "avx512_bf16"])
def test_scores_that_the_reference_would_write_out_are_always_worth_avoiding(isa):
    for dtype in (BF16, FP32, torch.float16):
        case = {**ATTENTION, "isa": isa, "dtype": dtype}
        assert attention_gain(**case, fused=False) > attention_gain(**case, fused=True) >= 0
