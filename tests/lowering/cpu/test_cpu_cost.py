from __future__ import annotations

import pytest
import torch

from ascend_dynamo.lowering.cpu.cost import attention_gain, linear_gain

BF16 = torch.bfloat16


@pytest.mark.parametrize("m", [1, 8, 128])
def test_a_plain_weight_is_worth_reading_as_it_is(m):
    assert linear_gain(m, 4096, 1024, BF16, isa="avx512_bf16", threads=2) > 1e-4


def test_many_rows_gain_nothing():
    assert abs(linear_gain(2048, 4096, 1024, BF16, isa="avx512_bf16", threads=2)) < 2e-3
    assert linear_gain(65536, 4096, 1024, BF16, isa="avx512_bf16", threads=2) < 0


@pytest.mark.parametrize("case", [{"isa": "portable"}, {"dtype": torch.float32}, {"isa": "amx_bf16", "m": 128}])
def test_no_gain_where_the_operator_calls_aten(case):
    args = {"m": 1, "n": 64, "k": 64, "dtype": BF16, "isa": "avx512_bf16", "threads": 2, **case}
    assert linear_gain(**args) == 0


def test_attention_gains_and_does_not_claim_the_unmeasured():
    args = dict(batch=1, heads=16, queries=128, keys=128, dim=128, dtype=BF16, causal=True, threads=2)
    assert attention_gain(**args, isa="avx512_bf16") > 0
    assert attention_gain(**args, isa="amx_bf16") == 0
    assert attention_gain(**{**args, "queries": 1}, isa="amx_bf16") > 0
    assert attention_gain(**{**args, "dtype": torch.float32}, isa="avx512_bf16") == 0
