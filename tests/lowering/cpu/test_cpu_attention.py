"""ascend_cpu.flash_attention against float64: heads, masks, windows, caps, sinks, empty rows, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_support import assert_in_budget, ops
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_dynamo.dialect import SPECS

PATHS = {"kernel": ops.flash_attention, "portable": ops.flash_attention_portable}


def meaning(
    q, k, v, *, bias=None, mask=None, sinks=None, scale, causal="none", window=-1, softcap=0.0, empty_row="nan"
):
    """Plain attention, one row at a time, in the dtype of its arguments."""
    group = q.shape[1] // k.shape[1]
    sq, sk = q.shape[2], k.shape[2]
    s = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(group, 1)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    i, j = torch.arange(sq)[:, None] + (sk - sq if causal == "bottom_right" else 0), torch.arange(sk)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if causal != "none":
        seen = j <= i
    if window >= 0:
        seen = seen & (j > i - window)
    seen = seen.expand(s.shape) if mask is None else seen & mask.expand(s.shape)
    s = torch.where(seen, s, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    empty = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(s, -1)[..., :sk].masked_fill(empty, 0.0)
    v = v.repeat_interleave(group, 1)
    y = torch.einsum("bhij,bhjd->bhid", p, v)
    if empty_row == "uniform":
        return torch.where(empty, v.mean(2, keepdim=True), y)
    return y.masked_fill(empty, 0.0 if empty_row == "zero" else math.nan)


def check(op, q, k, v, **kw):
    got = op(q, k, v, **kw)
    exact = meaning(q.double(), k.double(), v.double(), **kw)
    assert got.stride() == torch.empty(got.transpose(1, 2).shape).transpose(1, 2).stride()
    ulps = 2.0 if q.dtype is torch.bfloat16 else SPECS["flash_attention"].c_ulp
    assert_in_budget(got, meaning(q, k, v, **kw), exact, v.double().abs().amax(), ulps)


sizes = st.one_of(st.integers(1, 20), st.sampled_from([33, 48, 63, 100, 130, 257]))
dims = st.sampled_from([1, 2, 7, 8, 16, 17, 33, 64, 80, 128])


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=150)
@given(
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    sq=sizes,
    sk=sizes,
    d=dims,
    dv=dims,
    causal=st.sampled_from(["none", "top_left", "bottom_right"]),
    window=st.sampled_from([-1, 0, 1, 5, 40, 1 << 40]),
    biased=st.sampled_from(["", "full", "row", "float", "head", "queries"]),
    masked=st.sampled_from(["", "full", "keys", "queries"]),
    softcap=st.sampled_from([0.0, 0.0, 3.0]),
    sinks=st.booleans(),
    empty_row=st.sampled_from(["nan", "zero", "uniform"]),
    seed=st.integers(0, 1000),
)
def test_any_case(path, batch, heads, sq, sk, d, dv, causal, window, biased, masked, softcap, sinks, empty_row, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).bfloat16()

    hq, hk = heads
    kw = {"scale": d**-0.5, "causal": causal, "softcap": softcap, "empty_row": empty_row, "window": window}
    bias_shapes = {"full": (batch, hq, sq, sk), "row": (batch, 1, 1, sk), "float": (1, 1, sq, sk), "head": (hq, 1, sk)}
    bias_shapes["queries"] = (1, hq, sq, 1)
    if biased:
        kw["bias"] = draw(*bias_shapes[biased]).to(torch.float32 if biased == "float" else torch.bfloat16)
    if masked:
        shape = {"full": (batch, hq, sq, sk), "keys": (batch, 1, 1, sk), "queries": (1, 1, sq, 1)}[masked]
        kw["mask"] = torch.rand(*shape, generator=g) < 0.7
    if sinks:
        kw["sinks"] = draw(hq)
    q, k = draw(batch, sq, hq, d).transpose(1, 2), draw(batch, hk, sk, d)
    check(PATHS[path], q, k, draw(batch, sk, hk, dv).transpose(1, 2), **kw)


@settings(max_examples=100)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2), (4, 1), (5, 1), (8, 1), (14, 2), (9, 1), (32, 1)]),
    sk=st.one_of(st.integers(1, 40), st.sampled_from([511, 512, 513, 1100])),
    d=dims,
    dv=st.sampled_from([1, 16, 31, 64, 65, 128, 150]),
    causal=st.sampled_from(["none", "top_left", "bottom_right"]),
    biased=st.sampled_from(["", "row", "head"]),
    masked=st.booleans(),
    window=st.sampled_from([-1, -1, 20]),
    capped=st.booleans(),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_one_query(heads, sk, d, dv, causal, biased, masked, window, capped, sinks, dtype, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    kw = {"scale": d**-0.5, "causal": causal, "softcap": 4.0 if capped else 0.0, "window": window}
    if biased:
        kw["bias"] = draw(1, 1, 1, sk) if biased == "row" else draw(2, heads[0], 1, sk).bfloat16()
    if masked:
        kw["mask"] = torch.rand(2, 1, 1, sk, generator=g) < 0.5
    if sinks:
        kw["sinks"] = draw(heads[0])
    check(ops.flash_attention, draw(2, heads[0], 1, d), draw(2, heads[1], sk, d), draw(2, heads[1], sk, dv), **kw)


def qkv(sq=40, sk=300, d=64, heads=4):
    return [torch.randn(1, heads, s, d).bfloat16() for s in (sq, sk, sk)]


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
def test_additive_causal_mask(lowest):
    """Blocks that the mask hides are skipped, and a finite one still gives the mean where it covers a whole row."""
    q, k, v = qkv(200, 400)
    dtype = torch.float32 if lowest < -3.39e38 else torch.bfloat16
    bias = torch.full((200, 400), lowest, dtype=dtype).triu(201)[None, None]
    check(ops.flash_attention, q, k, v, scale=0.125, bias=bias)
    if lowest > -math.inf:
        bias[..., 17, :] = lowest
        check(ops.flash_attention, q, k, v, scale=0.125, bias=bias)


def test_a_poisoned_row_does_not_spread():
    q, k, v = qkv()
    q[0, 1, 7] = math.nan
    got = ops.flash_attention(q, k, v, scale=0.125)
    expected = torch.zeros(1, 4, 40, 64, dtype=torch.bool)
    expected[0, 1, 7] = True
    assert torch.equal(got.isnan(), expected)


def test_masked_keys_may_hold_anything():
    q, k, v = qkv()
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 250:] = False
    expected = ops.flash_attention(q, k, v, scale=0.125, mask=mask)
    k[:, :, 250:] = math.nan
    assert torch.equal(ops.flash_attention(q, k, v, scale=0.125, mask=mask), expected)


def test_large_scores():
    q, k, v = qkv(20, 100)
    check(ops.flash_attention, q * 100, k * 100, v, scale=1.0)
    check(ops.flash_attention, q, k, v, scale=-0.5)
    check(ops.flash_attention, q, k, v, scale=0.0)


def test_layouts():
    q, k, v = qkv(30, 90)
    assert torch.equal(
        ops.flash_attention(q, k, v, scale=0.125),
        ops.flash_attention(*(t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)), scale=0.125),
    )
    bias = torch.randn(90, 30).bfloat16().T[None, None]
    check(ops.flash_attention, q, k, v, scale=0.125, bias=bias)
    cache = torch.randn(1, 4, 512, 64).bfloat16()
    check(ops.flash_attention, q, cache[:, :, :77], cache[:, :, 100:177], scale=0.125)


@pytest.mark.parametrize("sq, sk", [(300, 300), (1, 3000)])
def test_same_bits_for_any_number_of_threads(sq, sk):
    q, k, v = qkv(sq, sk)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.flash_attention(q, k, v, scale=0.125, causal="bottom_right")
        torch.set_num_threads(3)
        for _ in range(3):
            assert torch.equal(ops.flash_attention(q, k, v, scale=0.125, causal="bottom_right"), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    q, k, v = (t.to(dtype) for t in qkv(10, 20))
    check(ops.flash_attention, q, k, v, scale=0.125, causal="bottom_right")


def test_no_keys():
    q, k, v = qkv(3, 0)
    assert ops.flash_attention(q, k, v, scale=1.0).isnan().all()
    assert torch.equal(ops.flash_attention(q, k, v, scale=1.0, empty_row="zero"), torch.zeros_like(q))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"causal": "yes"}, "causal must be"),
        ({"empty_row": "mean"}, "empty_row must be"),
        ({"mask": torch.ones(1, 1, 1, 300)}, "mask must be bool"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.flash_attention(*qkv(), scale=1.0, **change)
    q, k, v = qkv()
    with pytest.raises(ValueError, match="must be"):
        ops.flash_attention(q, k[..., :32], v, scale=1.0)


def test_schema_and_fake():
    q, k, v = qkv(5, 9)
    bias = torch.randn(1, 1, 5, 9).bfloat16()
    for case in ({}, {"bias": bias}, {"causal": "bottom_right"}):
        torch.library.opcheck(
            ops.flash_attention.default,
            (q, k, v),
            {"scale": 0.1, **case},
            test_utils=("test_schema", "test_faketensor"),
        )
