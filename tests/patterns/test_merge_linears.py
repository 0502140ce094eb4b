"""Linears of one input become one; gate and up become SwiGLU; weights that others can see stay alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, run, snapshot

X = (2, 3, 16)


def weights(*rows, dtype=torch.float32, wide=16):
    return tuple(torch.randn(n, wide, dtype=dtype) for n in rows)


def qkv(x, q, k, v):
    return F.linear(x, q) * 2, F.linear(x, k) * 3, F.linear(x, v) * 4


def swiglu(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def swiglu_up_first(x, gate, up):
    u = F.linear(x, up)
    return u * F.silu(F.linear(x, gate))


def swiglu_by_sigmoid(x, gate, up):
    g = F.linear(x, gate)
    return (g * torch.sigmoid(g)) * F.linear(x, up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_query_sizes(dtype):
    args = (torch.randn(X, dtype=dtype), *weights(16, 8, 8, dtype=dtype))
    result = fuse(qkv, args, "merge_linears", params=(1, 2, 3))
    assert result.fired == ["merge_linears"] and result.ops("aten.linear") == 1
    assert_same(qkv, args, result)


def test_snapshot():
    args = (torch.randn(X), *weights(16, 8, 8))
    both = fuse(swiglu_up_first, (torch.randn(X), *weights(24, 24)), params=(1, 2))
    snapshot("merge_linears", fuse(qkv, args, "merge_linears", params=(1, 2, 3)), both)


def test_biases_merge_with_the_weights():
    def fn(x, q, k, a, b):
        return F.linear(x, q, a) + 1, F.linear(x, k, b) + 1

    args = (torch.randn(X), *weights(16, 8), torch.randn(16), torch.randn(8))
    result = fuse(fn, args, "merge_linears", params=(1, 2, 3, 4))
    assert result.fired == ["merge_linears"] and result.after.count("prologue concat0") == 2
    assert_same(fn, args, result)


def whisper(x, q, k, v, a, b):
    return F.linear(x, q, a) + 1, F.linear(x, k) + 1, F.linear(x, v, b) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_without_bias_go_with_queries_and_values_of_their_shape(dtype):
    args = (torch.randn(X, dtype=dtype), *weights(16, 16, 16, dtype=dtype), *torch.randn(2, 16, dtype=dtype))
    result = fuse(whisper, args, "merge_linears", params=(1, 2, 3, 4, 5))
    assert result.fired == ["merge_linears"] and result.ops("aten.linear") == 1
    assert_same(whisper, args, result)


def test_one_bias_alone_is_padded_without_a_copy():
    def fn(x, k, v, b):
        return F.linear(x, k) + 1, F.linear(x, v, b) + 1

    args = (torch.randn(X), *weights(16, 16), torch.randn(16))
    result = fuse(fn, args, "merge_linears", params=(1, 2, 3))
    assert result.fired == ["merge_linears"] and result.after.count("prologue concat0") == 1
    assert_same(fn, args, result)


def test_snapshot_of_a_missing_bias():
    args = (torch.randn(X), *weights(16, 16, 16), torch.randn(16), torch.randn(16))
    snapshot("merge_linears_bias", fuse(whisper, args, "merge_linears", params=(1, 2, 3, 4, 5)))


def test_a_linear_of_another_shape_without_bias_stays_alone():
    def fn(x, q, v, wide, a, b):  # a parallel MLP beside the attention
        return F.linear(x, q, a) + 1, F.linear(x, v, b) + 1, F.linear(x, wide) + 1

    args = (torch.randn(X), *weights(16, 16, 64), torch.randn(16), torch.randn(16))
    result = fuse(fn, args, "merge_linears", params=(1, 2, 3, 4, 5))
    assert result.fired == ["merge_linears"] and result.ops("aten.linear") == 2
    assert result.missed("merge_linears").code in ("arg", "op")
    assert_same(fn, args, result)


def test_linears_without_bias_merge_beside_a_wide_one_with_a_bias():
    def fn(x, q, k, v, wide, b):  # GPT-J
        return F.linear(x, q) + 1, F.linear(x, k) + 1, F.linear(x, v) + 1, F.linear(x, wide, b) + 1

    args = (torch.randn(X), *weights(16, 16, 16, 64), torch.randn(64))
    result = fuse(fn, args, "merge_linears", params=(1, 2, 3, 4, 5))
    assert result.fired == ["merge_linears"] and result.ops("aten.linear") == 2
    assert_same(fn, args, result)


def test_biases_of_two_dtypes_stay_apart():
    def fn(x, k, q, v, a, b):  # the first has no bias, and could go with either
        return F.linear(x, k) + 1, F.linear(x, q, a) + 1, F.linear(x, v, b.to(x.dtype)) + 1

    args = (torch.randn(X), *weights(16, 16, 16), torch.randn(16), torch.randn(16, dtype=torch.bfloat16))
    result = fuse(fn, args, "merge_linears", params=(1, 2, 3, 4, 5))
    assert result.ops("aten.linear") == 2
    assert_same(fn, args, result)


@pytest.mark.parametrize("fn", [swiglu, swiglu_up_first, swiglu_by_sigmoid], ids=lambda f: f.__name__)
def test_gate_and_up_feed_swiglu_whatever_their_order(fn):
    args = (torch.randn(X), *weights(24, 24))
    result = fuse(fn, args, params=(1, 2))
    assert [p for p in result.fired if p != "silu"] == ["merge_linears", "swiglu"]
    assert result.ops("aten.linear") == 1 and result.ops("ascend.swiglu") == 1 and result.ops("aten.slice.Tensor") == 0
    assert_same(fn, args, result)


def test_one_weight_used_twice_is_not_merged():
    def fn(x, y, q, k):
        return F.linear(x, q) + 1, F.linear(x, k) + 1, F.linear(y, q)

    args = (torch.randn(X), torch.randn(X), *weights(16, 16))
    result = fuse(fn, args, "merge_linears", params=(2, 3))
    missed = result.missed("merge_linears")
    assert result.fired == [] and missed.code == "alias" and "tied or shared" in missed.reason


def test_a_tied_weight_leaves_the_others_to_merge():
    def fn(x, ids, q, k, v):
        return F.linear(x, q) + 1, F.linear(x, k) + 1, F.linear(x, v) + 1, F.embedding(ids, q)

    args = (torch.randn(X), torch.zeros(2, dtype=torch.int64), *weights(16, 8, 8))
    result = fuse(fn, args, "merge_linears", params=(2, 3, 4))
    assert result.fired == ["merge_linears"] and result.ops("aten.linear") == 2
    assert_same(fn, args, result)


def test_a_computed_weight_is_not_merged():
    def fn(x, q, k):
        return F.linear(x, q * 2) + 1, F.linear(x, k) + 1

    result = fuse(fn, (torch.randn(X), *weights(16, 16)), "merge_linears", params=(1, 2))
    missed = result.missed("merge_linears")
    assert result.fired == [] and "computed in the graph" in missed.reason and missed.fix


def test_weights_that_are_inputs_are_not_merged():
    result = fuse(qkv, (torch.randn(X), *weights(16, 8, 8)), "merge_linears")
    assert result.fired == [] and result.missed("merge_linears").code == "arg"


def test_two_inputs_are_two_linears():
    def fn(x, y, q, k):
        return F.linear(x, q) + 1, F.linear(y, k) + 1

    args = (torch.randn(X), torch.randn(X), *weights(16, 16))
    assert fuse(fn, args, "merge_linears", params=(2, 3)).fired == []


def test_returned_results_do_not_become_views_of_one_tensor():
    def fn(x, q, k, v):
        return F.linear(x, q), F.linear(x, k).reshape(6, 2, 4), F.linear(x, v) + 1

    args = (torch.randn(X), *weights(16, 8, 8))
    result = fuse(fn, args, "merge_linears", params=(1, 2, 3))
    assert result.fired == ["merge_linears"] and result.ops("aten.clone") == 1
    assert_same(fn, args, result)
    first, second, third = (out.untyped_storage().data_ptr() for out in run(result.unit, args))
    assert len({first, second, third}) == 3


def test_mixed_dtypes_stay_apart():
    def fn(x, y, q, k):
        return F.linear(x, q) + 1, F.linear(x.double(), k) + 1

    args = (torch.randn(X), torch.randn(X), *weights(16), *weights(16, dtype=torch.float64))
    assert fuse(fn, args, "merge_linears", params=(2, 3)).fired == []


def test_a_vector_weight_is_not_merged():
    def fn(x, q, k):
        return F.linear(x, q) + 1, F.linear(x, k) + 1

    args = (torch.randn(X), torch.randn(16), torch.randn(16))
    result = fuse(fn, args, "merge_linears", params=(1, 2))
    missed = result.missed("merge_linears")
    assert result.fired == [] and missed.code == "shape"


def test_a_lonely_linear_is_no_near_miss():
    result = fuse(lambda x, w: F.linear(x, w) + 1, (torch.randn(X), *weights(16)), "merge_linears", params=(1,))
    assert result.fired == [] and result.missed("merge_linears").progress == 0.0
