"""Spellings of attention beyond the plain one: softmax by hand, layouts, orders of scale, mask and bias, sinks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_support import ATTENTION, hidden, qkv
from pattern_support import assert_same, fuse, run

NINF = -math.inf


def _amax(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


def _max_unsqueezed(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    e = torch.exp(s - s.max(-1).values.unsqueeze(-1))
    return (e * e.sum(-1).unsqueeze(-1).reciprocal()) @ v


def _one_over(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, torch.finfo(q.dtype).min).float()
    e = (s - s.amax(-1, True)).exp()
    return (e * (1.0 / e.sum(-1, True))).to(v.dtype) @ v


def _logsumexp(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


def _log_softmax(q, k, v, hide):
    return (q @ k.mT * 0.3).masked_fill(hide, NINF).log_softmax(-1).exp() @ v


def _safe(q, k, v, hide):
    return torch._safe_softmax((q @ k.mT * 0.3).masked_fill(hide, NINF), -1) @ v


def _deferred(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


def _deferred_flat(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    y = torch.bmm(e.reshape(8, 5, 7), v.reshape(8, 7, 8)).view(2, 4, 5, 8)
    return (y * e.sum(-1, keepdim=True).reciprocal()).transpose(1, 2)


def _shifted(q, k, v, hide):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    return torch.softmax(s - s.max(-1, keepdim=True).values, -1) @ v


def _bounded(q, k, v, hide):
    e = torch.exp((torch.tanh(q @ k.mT / 9.0) * 9.0).masked_fill(hide, NINF))
    return (e / e.sum(-1, keepdim=True)) @ v


def _zeroed(q, k, v, hide):
    p = (q @ k.mT * 0.3).masked_fill(hide, NINF).softmax(-1)
    return p.masked_fill(hide, 0.0) @ v


def _zeroed_where(q, k, v, hide):
    s = torch.where(hide, torch.finfo(q.dtype).min, q @ k.mT * 0.3)
    return torch.where(hide, 0.0, s.softmax(-1)) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fn",
    [_amax, _max_unsqueezed, _one_over, _logsumexp, _log_softmax, _safe, _deferred, _deferred_flat, _shifted, _bounded,
     _zeroed, _zeroed_where],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_softmax_in_any_spelling(fn, dtype):
    args = (*qkv(dtype), hidden())
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    for left in ("aten.exp", "aten._softmax", "aten.amax", "aten.sum"):
        assert left + "(" not in result.after
    assert_same(fn, args, result)


EMPTY_ROWS = ((_amax, "nan"), (_one_over, "uniform"), (_safe, "zero"), (_zeroed, "zero"), (_bounded, "nan"))


@pytest.mark.parametrize(("fn", "empty_row"), EMPTY_ROWS)
def test_rows_without_a_key_give_what_the_spelling_gives(fn, empty_row):
    after = fuse(fn, (*qkv(), hidden()), *ATTENTION).after
    assert ("empty_row=" not in after) if empty_row == "nan" else (f"empty_row='{empty_row}'" in after)


# ---- layouts


def _flat(q, k, v, hide):
    s = torch.bmm(q.reshape(8, 5, 8), k.reshape(8, 7, 8).transpose(1, 2)).view(2, 4, 5, 7)
    p = s.masked_fill(hide, NINF).softmax(-1)
    return torch.bmm(p.view(8, 5, 7), v.reshape(8, 7, 8)).view(2, 4, 5, 8)


def _flat_softmax(q, k, v, hide):
    s = torch.bmm(q.reshape(8, 5, 8), k.reshape(8, 7, 8).transpose(1, 2)).view(2, 4, 5, 7)
    s = s.masked_fill(hide, NINF).view(8, 5, 7)
    return torch.bmm(s.softmax(-1), v.reshape(8, 7, 8))


def _einsum(q, k, v, hide):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(hide, NINF).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def _einsum_bqhk(q, k, v, hide):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    p = torch.einsum("bqhd,bkhd->bqhk", q, k).masked_fill(hide.transpose(1, 2), NINF).softmax(-1)
    return torch.einsum("bqhk,bkhd->bqhd", p, v)


def _transposed(q, k, v, hide):
    s = (k @ q.mT).masked_fill(hide.mT, NINF)
    return s.softmax(-2).mT @ v


def _values_first(q, k, v, hide):
    p = (q @ k.mT).masked_fill(hide, NINF).softmax(-1)
    return (v.mT @ p.mT).mT


def _keys_transposed(q, k, v, hide):
    kt = k.permute(0, 1, 3, 2).contiguous()
    return torch.matmul(q, kt).masked_fill(hide, NINF).softmax(3) @ v


def _sequence_first(q, k, v, hide):
    """Megatron: [S, B, H, D] in and out."""
    q, k, v = (t.permute(2, 0, 1, 3).reshape(t.shape[2], 8, 8) for t in (q, k, v))
    s = torch.baddbmm(torch.empty(8, 5, 7), q.transpose(0, 1), k.permute(1, 2, 0), beta=0.0, alpha=0.4)
    p = s.view(2, 4, 5, 7).masked_fill(hide, NINF).softmax(-1).view(8, 5, 7)
    return torch.bmm(p, v.transpose(0, 1)).view(2, 4, 5, 8).permute(2, 0, 1, 3).reshape(5, 2, 32)


@pytest.mark.parametrize(
    "fn",
    [_flat, _flat_softmax, _einsum, _einsum_bqhk, _transposed, _values_first, _keys_transposed, _sequence_first],
    ids=lambda f: f.__name__,
)
def test_layouts(fn):
    args = (*qkv(), hidden())
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "aten.matmul" not in result.after
    assert_same(fn, args, result)


def _five_axes(q, k, v):
    q = q.reshape(2, 2, 3, 5, 8)
    return ((q @ k.unsqueeze(2).mT).softmax(-1) @ v.unsqueeze(2)).reshape(2, 6, 5, 8)


def _grouped_einsum(q, k, v):
    p = torch.einsum("bhgqd,bhkd->bhgqk", q.reshape(2, 2, 3, 5, 8), k).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bqhgd", p, v).reshape(2, 5, 48)


def _interleaved(q, k, v):
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, dim=1)
    return (q @ k.mT).softmax(-1) @ v


def _flat_repeated(q, k, v):
    k, v = (t[:, :, None].expand(2, 2, 3, 7, 8).reshape(12, 7, 8) for t in (k, v))
    return torch.bmm(torch.bmm(q.reshape(12, 5, 8), k.mT).softmax(-1), v)


def _tiled(q, k, v):
    k, v = (t[:, None].expand(2, 3, 2, 7, 8).reshape(2, 6, 7, 8) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    "fn", [_five_axes, _grouped_einsum, _interleaved, _flat_repeated, _tiled], ids=lambda f: f.__name__
)
def test_key_heads_are_not_repeated(fn):
    args = qkv(hq=6, hk=2)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "aten.expand" not in result.after
    assert_same(fn, args, result)


def test_heads_folded_into_the_rows():
    """GPT-BigCode: one key head; queries [B, S * H, D]; the mask broadcasts over heads."""

    def fn(q, k, v, hide):
        s = torch.matmul(q.transpose(1, 2).reshape(2, 20, 8), k.transpose(1, 2)) * 0.3
        p = s.view(2, 5, 4, 7).masked_fill(hide.transpose(1, 2), NINF).softmax(-1).view(2, 20, 7)
        return torch.bmm(p, v).view(2, 5, 32)

    q, k, v = qkv(hk=1)
    args = (q, k[:, 0], v[:, 0], hidden(empty=False))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_two_axes_and_a_linear_of_activations():
    def fn(q, k, v):
        return F.linear(q, k).softmax(-1) @ v

    args = (torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 3))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


# ---- scale, bias and mask in any order


def _on_query(q, k, v, hide):
    return ((q * 0.25) @ k.mT).masked_fill(hide, NINF).softmax(-1) @ v


def _on_both(q, k, v, hide):
    return ((q / 2.0) @ (k * 0.5).mT).masked_fill(hide, NINF).softmax(-1) @ v


def _on_query_before_layout(q, k, v, hide):
    q = (q.transpose(1, 2).reshape(2, 5, 32) * 0.25).view(2, 5, 4, 8).transpose(1, 2)
    return (q @ k.mT).masked_fill(hide, NINF).softmax(-1) @ v


def _constant_tensor(q, k, v, hide):
    return (q @ k.mT / torch.sqrt(torch.tensor(16.0))).masked_fill(hide, NINF).softmax(-1) @ v


def _behind_the_mask(q, k, v, hide):
    return ((q @ k.mT).masked_fill(hide, NINF) * 0.25).softmax(-1) @ v


@pytest.mark.parametrize(
    "fn", [_on_query, _on_both, _on_query_before_layout, _constant_tensor, _behind_the_mask], ids=lambda f: f.__name__
)
def test_the_scale_is_one_number(fn):
    args = (*qkv(), hidden())
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "scale=0.25" in result.after
    assert "aten.mul" not in result.after and "aten.div" not in result.after
    assert_same(fn, args, result)


def test_a_scaled_query_that_is_used_otherwise_stays_scaled():
    def fn(q, k, v):
        q = q * 0.25
        return (q @ k.mT).softmax(-1) @ v, q

    args = qkv()
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "scale=1.0" in result.after
    assert_same(fn, args, result)


def _bias_in_scale(q, k, v, hide, bias):
    return ((q @ k.mT + bias).masked_fill(hide, NINF) * 0.5).softmax(-1) @ v


def _subtracted(q, k, v, hide, bias):
    return (q @ k.mT * 0.5 - bias).masked_fill(hide, NINF).softmax(-1) @ v


def _bias_over_mask(q, k, v, hide, bias):
    return ((q @ k.mT * 0.5).masked_fill(hide, NINF) + bias).softmax(-1) @ v


def _bias_over_lowest(q, k, v, hide, bias):
    return (torch.where(hide, torch.finfo(q.dtype).min, q @ k.mT) + bias).softmax(-1) @ v


def _lowest_over_bias(q, k, v, hide, bias):
    return torch.where(hide, torch.finfo(q.dtype).min, q @ k.mT + bias).softmax(-1) @ v


def _mixed_fills(q, k, v, hide, bias):
    s = torch.where(hide, torch.finfo(q.dtype).min, q @ k.mT + bias)
    return s.masked_fill(bias > 1.0, NINF).softmax(-1) @ v


def _bloom(q, k, v, hide, bias):
    alibi = bias[:, :, :1].reshape(8, 1, 7)
    s = alibi.baddbmm(q.reshape(8, 5, 8), k.reshape(8, 7, 8).mT, beta=0.5, alpha=0.25).view(2, 4, 5, 7)
    return s.masked_fill(hide, NINF).softmax(-1) @ v


def _softcap_scaled(q, k, v, hide, bias):
    return ((torch.tanh(q @ k.mT / 3.0) * 2.0 + bias) * 0.5).masked_fill(hide, NINF).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fn",
    [_bias_in_scale, _subtracted, _bias_over_mask, _bias_over_lowest, _lowest_over_bias, _mixed_fills, _bloom,
     _softcap_scaled],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_orders_of_scale_bias_and_mask(fn, dtype):
    args = (*qkv(dtype), hidden(), torch.randn(2, 4, 5, 7, dtype=dtype))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


@pytest.mark.parametrize("fn", [_bias_over_lowest, _lowest_over_bias, _mixed_fills], ids=lambda f: f.__name__)
def test_a_mask_hides_scores_that_are_no_numbers(fn):
    q, k, v = qkv()
    q[0, :, 2] = math.nan  # the row that sees nothing: its scores do not matter
    args = (q, k, v, hidden(), torch.randn(2, 4, 5, 7))
    result = fuse(fn, args, *ATTENTION)
    (y,) = run(result.unit, args)
    assert result.fired == ["eager_attention"]
    torch.testing.assert_close(y, fn(*args), equal_nan=True)


def test_a_safe_softmax_hides_no_nan_behind_a_bias():
    def fn(q, k, v, bias):
        return torch._safe_softmax(q @ k.mT + bias, -1) @ v

    q, k, v = qkv()
    q[1] = math.nan
    bias = torch.zeros(2, 1, 5, 7).masked_fill(hidden(), NINF)
    bias[1, 0, 3] = NINF
    result = fuse(fn, (q, k, v, bias), *ATTENTION)
    (y,) = run(result.unit, (q, k, v, bias))
    assert result.fired == ["eager_attention"] and not y[0].isnan().any()
    torch.testing.assert_close(y, fn(q, k, v, bias), equal_nan=True)


def test_scores_rounded_to_the_dtype_of_v():
    """Falcon: scores and bias in float32, softmax in the model's dtype."""

    def fn(q, k, v, bias):
        return ((q @ k.mT).float() + bias.float()).to(q.dtype).softmax(-1) @ v

    args = (*qkv(torch.bfloat16), torch.randn(4, 5, 7, dtype=torch.bfloat16))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_wide_queries_and_keys_run_wide():
    def fn(q, k, v):
        return (q @ k.mT).softmax(-1).to(v.dtype) @ v

    q, k, _ = qkv()
    args = (q, k, qkv(torch.bfloat16)[2])
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


# ---- sinks and head masks


def _sinks(q, k, v, hide, sinks):
    s = (q @ k.mT * 0.3).masked_fill(hide, NINF)
    s = torch.cat([s, sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    return (s - s.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def _sinks_first(q, k, v, hide, sinks):
    s = (q @ k.mT * 0.3).masked_fill(hide, torch.finfo(q.dtype).min)
    s = torch.cat([sinks.view(1, -1, 1, 1).expand(2, -1, 5, -1), s], -1)
    return torch.softmax(s, -1, dtype=torch.float32)[..., 1:].to(v.dtype) @ v


def _sinks_flat(q, k, v, hide, sinks):
    s = torch.bmm(q.reshape(8, 5, 8), k.reshape(8, 7, 8).mT).view(2, 4, 5, 7).masked_fill(hide, NINF).view(8, 5, 7)
    s = torch.cat([s, sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1).reshape(8, 5, 1)], -1)
    return torch.bmm(s.softmax(-1)[..., :-1], v.reshape(8, 7, 8))


def _one_sink(q, k, v, hide, sinks):
    s = torch.cat([(q @ k.mT).masked_fill(hide, NINF), sinks[:1].view(1, 1, 1, 1).expand(2, 4, 5, 1)], 3)
    return s.softmax(3)[..., :7] @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [_sinks, _sinks_first, _sinks_flat, _one_sink], ids=lambda f: f.__name__)
def test_sinks(fn, dtype):
    args = (*qkv(dtype), hidden(), torch.randn(4, dtype=dtype))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "sinks=" in result.after and "aten.cat" not in result.after
    assert_same(fn, args, result)


def test_head_masks_multiply_the_result():
    def fn(q, k, v, head_mask):
        return ((q @ k.mT).softmax(-1) * head_mask[None, :, None, None] / 2.0) @ v

    args = (*qkv(), torch.randn(4))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_inference_dropout_leaves_nothing():
    def fn(q, k, v):
        return F.dropout((q @ k.mT).softmax(-1), 0.3, training=False) @ v

    result = fuse(fn, qkv(), *ATTENTION)
    assert result.fired == ["eager_attention"] and "dropout" not in result.before
