"""What equal means: each clause of the definition accepts what it should and refuses what it should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ascend_dynamo.dialect.equal import (
    ALGEBRA,
    TOLERANCE,
    Disagreement,
    agree,
    agree_choice,
    assert_close_f64,
    bitwise,
    significant_strides,
)

NAN, INF = math.nan, math.inf


def test_as_wrong_as_eager_is_right_and_twice_is_the_limit():
    exact = torch.tensor([[1.0, 2.0], [100.0, 200.0]], dtype=torch.float64)
    eager = (exact + torch.tensor([[0.01, 0.0], [0.0, 0.0]])).float()
    assert agree((exact + torch.tensor([[0.0, 0.019], [0.0, 0.0]])).float(), eager, exact) is None
    found = agree((exact + torch.tensor([[0.0, 0.021], [0.0, 0.0]])).float(), eager, exact)
    assert found is not None and found.index == (0, 1) and 1.0 < found.excess < 1.1
    # the budget of one row is not another's
    assert agree((exact + torch.tensor([[0.0, 0.0], [0.0, 0.019]])).float(), eager, exact) is not None


def test_a_result_near_eager_but_twice_as_far_from_the_truth_is_refused():
    exact = torch.zeros(1, 4, dtype=torch.float64)
    assert agree(torch.full((1, 4), 0.25), torch.full((1, 4), 0.1), exact) is not None
    assert agree(torch.full((1, 4), -0.15), torch.full((1, 4), 0.1), exact) is None


def test_rounding_budget_scales_with_what_was_added_up():
    a, b = torch.tensor([[1e4, -1e4, 1.0]]), torch.tensor([1.0, 1.0, 1.0])
    exact = (a.double() * b).sum(-1, keepdim=True)
    wrong = exact.float() + 0.003
    assert agree(wrong, exact.float(), exact) is not None
    scale = (a.abs() * b).sum(-1, keepdim=True)
    assert agree(wrong, exact.float(), exact, row_scale=scale) is None
    assert agree(wrong, exact.float(), exact, row_scale=(scale,)) is None


def test_float64_tells_the_two_gelus_and_two_epsilons_apart():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64).unsqueeze(0)
    erf, tanh = F.gelu(x), F.gelu(x, approximate="tanh")
    assert agree(tanh, erf, erf) is not None and agree(erf * (1 + ALGEBRA), erf, erf) is None
    norms = [F.rms_norm(x, (50,), None, eps) for eps in (1e-5, 1e-6)]
    assert agree(norms[0], norms[1], norms[1]) is not None
    assert agree(tanh.bfloat16(), erf.bfloat16(), erf) is None  # which bfloat16 cannot


def test_special_values_keep_their_places_and_signs():
    row = torch.tensor([[1.0, NAN, INF, -INF], [1.0, 2.0, 3.0, 4.0]])
    assert agree(row.clone(), row, row.double()) is None
    spread, flipped, lost = row.clone(), row.clone(), row.clone()
    spread[1, 0], flipped[0, 2], lost[0, 1] = NAN, -INF, 0.0
    assert "NaN position at [1, 0]" in str(agree(spread, row, row.double()))
    assert "infinity at [0, 2] is -inf, expected inf" in str(agree(flipped, row, row.double()))
    assert "NaN position at [0, 1]" in str(agree(lost, row, row.double()))
    # float16 overflows where float64 does not: eager decides
    big = torch.tensor([1e6], dtype=torch.float64)
    assert agree(big.half(), big.half(), big) is None and agree(big.half(), None, big) is None
    assert agree(torch.tensor([6e4]).half(), big.half(), big) is not None


def test_shape_dtype_count_and_strides():
    x = torch.randn(2, 3)
    assert "shape (3, 2), expected (2, 3)" in str(agree(x.t(), x, x.double()))
    assert "dtype torch.float16, expected torch.float32" in str(agree(x.half(), x, x.double()))
    assert "2 outputs, expected 1" in str(agree((x, x), (x,), (x.double(),)))
    strided = x.t().contiguous().t()
    assert agree(strided, x, x.double()) is None
    assert "strides" in str(agree(strided, x, x.double(), strides=True)) and "strides" in str(
        bitwise(strided, x, strides=True)
    )
    assert significant_strides(torch.zeros(1, 4)[:, ::2]) == (2,) and significant_strides(torch.zeros(0, 4)) == ()
    assert agree(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).double()) is None
    assert agree((x, None, 3), (x, None, 3), (x, None, 3)) is None and agree((x, 4), (x, 3), (x, 3)) is not None
    assert agree((x, x + 1), (x, x), (x.double(), x.double())).output == 1


def test_without_f64_eager_is_the_truth():
    x = torch.randn(3, 5)
    assert agree(x * (1 + 1e-7), x) is None and agree(x * (1 + 1e-5), x) is not None


def test_integers_are_exact_unless_the_truth_says_where_they_round():
    q = torch.tensor([[3, -7]], dtype=torch.int8)
    assert agree(q, q, q) is None and "integer at [0, 1] is -7" in str(
        agree(q, q + torch.tensor([[0, 1]], dtype=torch.int8))
    )
    assert agree(q, None, torch.tensor([[2.51, -7.49]], dtype=torch.float64)) is None
    assert agree(q, None, torch.tensor([[2.4, -7.0]], dtype=torch.float64)) is not None
    assert agree(torch.tensor([True]), torch.tensor([False])) is not None


def test_complex_results():
    z = torch.randn(2, 3, dtype=torch.complex64)
    assert agree(z, z, z.to(torch.complex128)) is None and bitwise(z, z) is None
    assert agree(z * 1.001, z, z.to(torch.complex128)) is not None and bitwise(z * 1.001, z) is not None


def test_zero_dimensional_and_denormal_results():
    assert agree(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0).double()) is None
    assert agree(torch.tensor(1.1), torch.tensor(1.0), torch.tensor(1.0).double()) is not None
    assert agree(torch.tensor([1e-45]), torch.tensor([0.0]), torch.tensor([0.0]).double()) is None


def test_bitwise():
    x = torch.tensor([0.0, NAN, 1.0])
    assert bitwise(x, x.clone()) is None and bitwise((x,), (x, x)) is not None
    assert "bits at [0]" in str(bitwise(torch.tensor([-0.0, NAN, 1.0]), x))
    assert bitwise(x.nan_to_num(0.0), x) is not None and bitwise(x.double(), x) is not None and bitwise(3, 3) is None


def test_choices_may_swap_only_within_the_margin():
    scores = torch.tensor([[0.5, 0.5 + 1e-9, 0.1]], dtype=torch.float64)
    first, second, third = (torch.tensor([[i]]) for i in range(3))
    assert agree_choice(first, second, scores, 1e-6) is None
    assert "scores differ by 0.4" in str(agree_choice(third, second, scores, 1e-6))
    assert agree_choice(torch.tensor([[1, 0]]), torch.tensor([[0, 1]]), scores, 0.0) is None  # order is immaterial


def test_assertion_carries_the_reason():
    with pytest.raises(AssertionError, match="value at"):
        assert_close_f64(torch.ones(2), torch.zeros(2), torch.zeros(2).double(), torch.float32)
    assert str(Disagreement("why")) == "why"


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 100), st.floats(1.5, 30))
def test_correct_rounding_agrees_and_more_than_the_budget_does_not(dtype, seed, factor):
    exact = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    eager = exact.to(dtype)
    assert agree(eager, eager, exact) is None and agree(eager, None, exact, c_ulp=1.0) is None
    off = exact + factor * 4.0 * TOLERANCE[dtype].eps * exact.abs().amax(-1, keepdim=True)
    assert agree(off.to(dtype), eager, exact) is not None
