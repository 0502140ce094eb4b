"""LayerNorm by hand, and the residual add in front of aten.layer_norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.patterns import layer_norm


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, 16, dtype=dtype), torch.randn(16, dtype=dtype), torch.randn(16, dtype=dtype)


@pytest.mark.parametrize(
    "fn", [layer_norm.divided, layer_norm.multiplied, layer_norm.with_var], ids=lambda f: f.__name__
)
def test_by_hand(fn):
    args = (*inputs(), 1e-5)
    result = fuse(fn, args, "layer_norm")
    assert result.fired == ["layer_norm"]
    assert_same(fn, args, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upcast_without_bias(dtype):
    args = (*inputs(dtype)[:2], 1e-5)
    result = fuse(layer_norm.cohere, args, "layer_norm", "layer_norm_scale")
    assert result.fired == ["layer_norm_scale"]
    assert_same(layer_norm.cohere, args, result)


def test_snapshot():
    args = (*inputs(), 1e-6)
    results = [fuse(fn, args, "layer_norm") for fn in (layer_norm.divided, layer_norm.with_var)]
    snapshot("layer_norm", *results)


def test_bessels_correction_is_another_function():
    def fn(x, w, b):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * w + b

    assert fuse(fn, inputs(), "layer_norm").fired == []


def test_the_mean_of_another_axis_is_another_function():
    def fn(x, w, b):
        c = x - x.mean(1, keepdim=True)
        return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b

    assert fuse(fn, inputs(), "layer_norm").fired == []


def residual_inputs():
    return (torch.randn(2, 5, 16), *inputs())


def pre_norm(x, residual, w, b):
    h = residual + x
    return F.layer_norm(h, (16,), w, b), h


def test_residual_add_joins_the_norm():
    args = residual_inputs()
    result = fuse(pre_norm, args, "add_layer_norm", level=1)
    assert result.fired == ["add_layer_norm"] and result.ops("aten.add.Tensor") == 0
    assert_same(pre_norm, args, result, exact=True)
    snapshot("add_layer_norm", result)


def opt(x, residual, w, b):  # batch and sequence are flattened in the middle of a layer
    h = (residual + x).reshape(-1, 16)
    return (h + F.layer_norm(h, (16,), w, b)).view(2, 5, 16)


def opt_end(x, residual, w, b):  # nobody reads the reshaped sum but the norm
    h = (residual + x).view(2, 5, 16)
    return F.layer_norm(h, (16,), w, b), residual + x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_reshaped_before_the_norm(dtype):
    args = tuple(t.to(dtype) for t in residual_inputs())
    result = fuse(opt, args, "add_layer_norm", level=1)
    assert result.fired == ["add_layer_norm"] and result.ops("aten.add.Tensor") == 1
    assert_same(opt, args, result, exact=True)
    flat = (args[0].view(10, 16), args[1].view(10, 16), *args[2:])
    result = fuse(opt_end, flat, "add_layer_norm", level=1)
    assert result.fired == ["add_layer_norm"] and result.ops("aten.add.Tensor") == 0
    assert_same(opt_end, flat, result, exact=True)


def test_reshaped_sum_snapshot():
    snapshot("add_layer_norm_reshaped", fuse(opt, residual_inputs(), "add_layer_norm"))


def test_a_reshape_that_cuts_rows_stays():
    def fn(x, residual):
        return F.layer_norm((x + residual).view(2, 10, 8), (8,))

    result = fuse(fn, residual_inputs()[:2], "add_layer_norm")
    assert result.fired == [] and "a norm of aten.reshape" in result.missed("add_layer_norm").reason


def test_a_permuted_sum_stays():
    def fn(x, residual):
        return F.layer_norm((x + residual).transpose(0, 1), (16,))

    result = fuse(fn, residual_inputs()[:2], "add_layer_norm")
    assert result.fired == [] and "a norm of aten.permute" in result.missed("add_layer_norm").reason


def test_two_axes_stay():
    def fn(x, residual):
        return F.layer_norm(x + residual, (5, 16))

    result = fuse(fn, residual_inputs()[:2], "add_layer_norm")
    missed = result.missed("add_layer_norm")
    assert result.fired == [] and missed.code == "arg" and "last axis only" in missed.reason


def test_a_position_embedding_that_broadcasts_stays():
    def fn(x, position, w, b):
        return F.layer_norm(x + position, (16,), w, b)

    args = (torch.randn(2, 5, 16), torch.randn(1, 5, 16), *inputs()[1:])
    missed = fuse(fn, args, "add_layer_norm").missed("add_layer_norm")
    assert missed.code == "shape" and "[2, 5, 16] + [1, 5, 16]" in missed.reason and missed.fix


def test_hand_written_norm_takes_the_residual_too():
    def fn(x, residual, w, b):
        h = x + residual
        c = h - h.mean(-1, keepdim=True)
        return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6) * w + b, h

    args = residual_inputs()
    result = fuse(fn, args, "layer_norm", "add_layer_norm")
    assert result.fired == ["layer_norm", "add_layer_norm"]
    assert_same(fn, args, result)
