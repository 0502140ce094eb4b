"""Attention: scaled_dot_product_attention and the plain spelling, grouped heads, masks, and what must be left alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.contracts import NoMatch
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.patterns.attention import sdpa
from ascend_dynamo.patterns.spellings import attention as spelled

ATTENTION = ("sdpa", "eager_attention")


def qkv(dtype=torch.float32, hq=4, hk=4, sq=5, sk=7, d=8, dv=8):
    q, k = torch.randn(2, hq, sq, d, dtype=dtype), torch.randn(2, hk, sk, d, dtype=dtype)
    return q, k, torch.randn(2, hk, sk, dv, dtype=dtype)


def additive(dtype=torch.float32, fill=-math.inf, empty=True):
    hide = torch.rand(2, 1, 5, 7) < 0.4
    hide[..., 0] = False
    hide[0, 0, 2] = empty
    return torch.zeros(2, 1, 5, 7, dtype=dtype).masked_fill(hide, fill)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", sdpa.Sdpa.eager, ids=lambda f: f.__name__)
def test_sdpa(fn, dtype):
    grouped = fn in (sdpa.grouped, sdpa.repeated)
    args = qkv(dtype, hk=2 if grouped else 4)
    if fn is sdpa.boolean:
        keep = torch.rand(2, 1, 5, 7) < 0.5
        keep[0, 0, 2] = False
        args = (*args, keep)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["sdpa"]
    if grouped:
        assert "aten.expand" not in result.after
    assert_same(fn, args, result)


def test_sdpa_scale_causal_and_masks_are_handed_over():
    after = fuse(sdpa.plain, qkv(d=16), *ATTENTION).after
    assert "scale=0.25" in after and "empty_row='zero'" in after
    after = fuse(sdpa.causal, qkv(), *ATTENTION).after
    assert "causal='top_left'" in after and "scale=0.3" in after
    mask = torch.randn(5, 7)
    fn = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)  # noqa: E731
    result = fuse(fn, (*qkv(), mask), *ATTENTION)
    assert "bias=%x3" in result.after
    assert_same(fn, (*qkv(), mask), result)


def test_sdpa_of_three_axes():
    q, k, v = (t[:, 0] for t in qkv())
    args = (q, k, v, torch.rand(2, 5, 7) < 0.7)
    result = fuse(sdpa.boolean, args, *ATTENTION)
    assert result.fired == ["sdpa"]
    assert_same(sdpa.boolean, args, result)


def test_sdpa_with_a_batch_that_broadcasts_stays():
    q, k, v = qkv()
    missed = fuse(sdpa.plain, (q, k[:1], v[:1]), *ATTENTION).missed("sdpa")
    assert missed.code == "shape" and "one batch" in missed.reason


def test_sdpa_masks_follow_heads_that_are_reordered():
    def fn(q, k, v, mask):  # the copies of the heads are outside: query head h reads key head h % 2
        k, v = (t[:, None].expand(2, 2, 2, 7, 8).reshape(2, 4, 7, 8) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = (*qkv(hk=2), torch.randn(2, 4, 5, 7))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["sdpa"] and "aten.expand" not in result.after
    assert_same(fn, args, result)


def _sdpa_call():
    unit = fuse(sdpa.boolean, (*qkv(), torch.rand(5, 7) < 0.7), "rms_norm").unit
    (call,) = unit.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return call, GraphFacts(unit.gm, unit.params)


SDPA_REFUSALS = [
    (0, (2, 4, 5), torch.float32, "q, k, v all of three or all of four axes"),
    (0, (2, 4, 5, 8), torch.bfloat16, "q, k, v of one dtype"),
    (0, (2, 4, 5, 6), torch.float32, "one head size of q and k"),
    (0, (2, 6, 5, 8), torch.float32, "as many heads in k as in v"),
    (0, (3, 4, 5, 8), torch.float32, "one batch of q, k and v"),
    (2, (2, 4, 6, 8), torch.float32, "as many values as keys"),
    (3, (3, 7), torch.bool, "a mask that broadcasts to the scores"),
]


@pytest.mark.parametrize(("which", "shape", "dtype", "expected"), SDPA_REFUSALS)
def test_sdpa_of_sizes_that_do_not_fit_stays(which, shape, dtype, expected):
    call, facts = _sdpa_call()
    call.args[which].meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    found = sdpa.Sdpa().match(call, facts)
    assert isinstance(found, NoMatch) and expected in found.expected, found


def test_sdpa_without_head_size_has_no_scale():
    call, facts = _sdpa_call()
    for n in call.args[:2]:
        n.meta["val"] = torch.empty((2, 4, n.meta["val"].shape[2], 0), device="meta")
    found = sdpa.Sdpa().match(call, facts)
    assert isinstance(found, NoMatch) and "a fixed head size" in found.expected


def test_sdpa_with_both_a_mask_and_is_causal_stays():
    # torch refuses it too, but a graph may hold it
    call, facts = _sdpa_call()
    call.args = (*call.args[:4], 0.0, True)
    call.kwargs = {}
    found = sdpa.Sdpa().match(call, facts)
    assert isinstance(found, NoMatch) and "is_causal" in found.expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("fn", [spelled.transformers_eager, spelled.divided_mask_first, spelled.softcapped])
def test_additive_masks_keep_their_empty_rows(fn, fill, dtype):
    args = (*qkv(dtype), additive(dtype, fill))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_grouped_heads_go_in_ungrouped():
    args = (*qkv(torch.bfloat16, hk=2), additive(torch.bfloat16))
    result = fuse(spelled.transformers_eager, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "aten.expand" not in result.after
    assert_same(spelled.transformers_eager, args, result)


def test_one_key_head_broadcasts():
    def fn(q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v

    args = qkv(hk=1)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_tiled_heads_are_not_grouped_heads():
    def fn(q, k, v):
        k, v = (t[:, None].expand(2, 2, 2, 7, 8).reshape(2, 4, 7, 8) for t in (k, v))
        return torch.softmax(q @ k.mT, -1) @ v

    args = qkv(hk=2)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_two_biases_add_up():
    args = (*qkv(), additive(), torch.randn(1, 4, 5, 7))
    result = fuse(spelled.two_biases, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and result.ops("aten.add.Tensor") == 1
    assert_same(spelled.two_biases, args, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [spelled.filled, spelled.chosen], ids=lambda f: f.__name__)
def test_boolean_masks(fn, dtype):
    hide = additive(torch.float32) != 0
    args = (*qkv(dtype), hide if fn is spelled.filled else ~hide)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert ("empty_row='uniform'" in result.after) == (fn is spelled.chosen)
    assert_same(fn, args, result)


def test_two_masks_of_one_fill():
    def fn(q, k, v, a, b):
        scores = (q @ k.mT).masked_fill(a, -math.inf)
        return torch.where(b, scores, -math.inf).softmax(-1) @ v

    args = (*qkv(), torch.rand(5, 7) < 0.3, torch.rand(2, 1, 5, 7) < 0.7)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_a_bias_under_a_mask_of_minus_infinity():
    def fn(q, k, v, bias, hide):
        return (q @ k.mT * 0.5 + bias).masked_fill(hide, -math.inf).softmax(-1) @ v

    args = (*qkv(), torch.randn(4, 5, 7), torch.rand(5, 7) < 0.4)
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


def test_a_mask_of_zero_and_finfo_min_needs_no_repair():
    def fn(q, k, v, keep):
        mask = torch.where(keep, 0.0, torch.finfo(q.dtype).min)
        return torch.softmax(q @ k.mT + mask, -1) @ v

    args = (*qkv(), additive() == 0)
    result = fuse(fn, args, *ATTENTION)
    assert "empty_row='zero'" in result.after and result.record.fired[0].assumes
    assert_same(fn, args, result)


def test_three_axes_and_lossless_upcasts():
    q, k, v = (t[:, 0] for t in qkv())
    result = fuse(spelled.three_axes, (q, k, v), *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(spelled.three_axes, (q, k, v), result)
    args = qkv(torch.bfloat16)
    result = fuse(spelled.upcast_queries, args, *ATTENTION)
    assert result.fired == ["eager_attention"] and "convert_element_type" not in result.after
    assert_same(spelled.upcast_queries, args, result)


def test_snapshot():
    llama = fuse(spelled.transformers_eager, (*qkv(torch.bfloat16, hk=2), additive(torch.bfloat16)), *ATTENTION)
    masked = fuse(spelled.chosen, (*qkv(), additive() == 0), *ATTENTION)
    snapshot("eager_attention", llama, masked)
    snapshot("sdpa", fuse(sdpa.causal, qkv(), *ATTENTION), fuse(sdpa.repeated, qkv(hk=2), *ATTENTION))


def _other_dim(q, k, v, m):
    return torch.softmax(q @ k.mT + m, -2) @ v


def _alpha(q, k, v, m):
    return torch.softmax(torch.add(q @ k.mT, m, alpha=2), -1) @ v


def _weights_too(q, k, v, m):
    p = torch.softmax(q @ k.mT + m, -1)
    return p @ v, p


def _bias_inside_scale(q, k, v, m):
    return torch.softmax((q @ k.mT + m) * 0.5, -1) @ v


def _soft_mask(q, k, v, m):
    return torch.softmax((q @ k.mT).masked_fill(m != 0, -1e4), -1) @ v


def _other_cap(q, k, v, m):
    return torch.softmax(torch.tanh(q @ k.mT / 3.0) * 2.0 + m, -1) @ v


def _rounded_scores(q, k, v, m):
    return torch.softmax((q @ k.mT).bfloat16().float() + m, -1) @ v


def _rounded_weights(q, k, v, m):
    return torch.softmax(q @ k.mT + m, -1).bfloat16().float() @ v


def _scaled_weights(q, k, v, m):
    return (torch.softmax(q @ k.mT + m, -1) * 0.5) @ v


def _bias_under_finite_mask(q, k, v, m):
    low = torch.finfo(torch.float32).min
    return torch.softmax((q @ k.mT + m).masked_fill(m != 0, low), -1) @ v


def _scores_too(q, k, v, m):
    s = q @ k.mT
    return torch.softmax(s + m, -1) @ v, s


def _relu(q, k, v, m):
    return torch.softmax((q @ k.mT).relu() + m, -1) @ v


NEAR = [
    (_other_dim, "arg", "another dim than the product with v"),
    (_alpha, "arg", "alpha=2"),
    (_weights_too, "users", "the graph's output"),
    (_soft_mask, "unproven", "-10000.0"),
    (_rounded_scores, "dtype", "torch.float32 to torch.bfloat16"),
    (_rounded_weights, "dtype", "found torch.bfloat16"),
    (_scores_too, "users", "the graph's output"),
    (_relu, "op", "aten.relu"),
]


@pytest.mark.parametrize("fn", [_bias_inside_scale, _other_cap, _scaled_weights, _bias_under_finite_mask])
def test_orders_that_algebra_allows(fn):
    args = (*qkv(), additive(empty=True))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)


@pytest.mark.parametrize(("fn", "code", "found"), NEAR, ids=lambda p: getattr(p, "__name__", None))
def test_near_misses_say_what_stopped_them(fn, code, found):
    args = (*qkv(), additive(empty=False))
    result = fuse(fn, args, *ATTENTION)
    missed = result.missed("eager_attention")
    assert result.fired == [] and missed.code == code and found in missed.reason, missed


def test_other_softmaxes_are_no_attention():
    def router(x, w):
        return torch.softmax(F.linear(x, w), -1).topk(2)

    assert fuse(router, (torch.randn(4, 8), torch.randn(6, 8)), *ATTENTION).fired == []


def test_queries_without_a_batch_axis_serve_all_heads():
    def fn(q, k, v):
        return torch.softmax(q @ k.mT, -1) @ v

    args = (torch.randn(2, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 4))
    result = fuse(fn, args, *ATTENTION)
    assert result.fired == ["eager_attention"]
    assert_same(fn, args, result)
