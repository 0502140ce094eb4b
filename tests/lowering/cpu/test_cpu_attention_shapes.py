"""ascend_cpu.flash_attention where its work is divided otherwise: latent heads, split keys, skipped keys, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_support import assert_in_budget, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_attention import check, meaning

MIN = torch.finfo(torch.float32).min


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(seed: int, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([1, 3, 8, 16, 40, 100]),
    sq=st.sampled_from([1, 1, 2, 5]),
    sk=st.sampled_from([1, 17, 500, 513, 1030, 2100]),
    sizes=st.sampled_from([(576, 512), (40, 32), (130, 128)]),
    causal=st.sampled_from(["none", "top_left", "bottom_right"]),
    window=st.sampled_from([-1, -1, 30, 700]),
    biased=st.sampled_from(["", "keys", "empty"]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_latent_heads_over_split_keys(heads, sq, sk, sizes, causal, window, biased, sinks, dtype, seed):
    """All heads share one key head whose first part is the value, as in the decode step of latent attention."""
    draw, (d, dv) = drawn(seed, dtype), sizes
    kw = {"scale": d**-0.5, "causal": causal, "window": window, "empty_row": ("nan", "zero", "uniform")[seed % 3]}
    if biased:
        kw["bias"] = draw(1, 1, 1, sk)
        kw["bias"][..., sk // 2 :] = -math.inf if biased == "keys" else MIN
        if biased == "empty":
            kw["bias"] = kw["bias"].clamp(min=torch.finfo(dtype).min).fill_(-math.inf)
    if sinks:
        kw["sinks"] = draw(heads)
    k = draw(2, 1, sk, d)
    check(ops.flash_attention, draw(2, sq, heads, d).transpose(1, 2), k, k[..., :dv], **kw)


@pytest.mark.usefixtures("threads")
@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (8, 1), (3, 3)]),
    sq=st.sampled_from([1, 2, 16, 33, 100, 300]),
    sk=st.sampled_from([1, 15, 128, 129, 700]),
    d=st.sampled_from([64, 80, 96, 128, 256, 300]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "causal": st.sampled_from(["top_left", "bottom_right"]),
            "window": st.sampled_from([1, 64, 200]),
            "softcap": st.just(20.0),
            "empty_row": st.sampled_from(["zero", "uniform"]),
        },
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_head_sizes_dtypes_and_threads(heads, sq, sk, d, options, dtype, seed):
    draw, (hq, hk) = drawn(seed, dtype), heads
    q, k, v = draw(1, sq, hq, d).transpose(1, 2), draw(1, hk, sk, d), draw(1, sk, hk, d).transpose(1, 2)
    check(ops.flash_attention, q, k, v, scale=d**-0.5, **options)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values [B, H, S, D] in memory in different ways."""
    b, h, s, d = x.shape
    padded = torch.full((b + 1, h, s + 3, d + 5), math.nan, dtype=x.dtype)
    padded[:b, :, 2 : s + 2, 3 : d + 3] = x
    return {
        "BSHD": x.transpose(1, 2).contiguous().transpose(1, 2),
        "SBHD": x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        "keys last": x.transpose(2, 3).contiguous().transpose(2, 3),
        "part of a cache": padded[:b, :, 2 : s + 2, 3 : d + 3],
        "every other": torch.stack((x, x.new_full((), math.nan).expand_as(x)), -1).flatten(-2)[..., ::2],
        "reversed batch": x.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("sq", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_any_layout_gives_the_same_bits(sq: int, dtype: torch.dtype) -> None:
    draw = drawn(0, dtype)
    q, k, v = draw(2, 4, sq, 33), draw(2, 2, 70, 33), draw(2, 2, 70, 20)
    expected = ops.flash_attention(q, k, v, scale=0.2)
    all_layouts = [layouts(t) for t in (q, k, v)]
    for name in all_layouts[0]:
        got = ops.flash_attention(*(each[name] for each in all_layouts), scale=0.2)
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("sq", [1, 30])
def test_expanded_operands(sq: int) -> None:
    draw = drawn(1, torch.bfloat16)
    q, k = draw(1, 1, sq, 64).expand(3, 4, sq, 64), draw(1, 1, 50, 64).expand(3, 2, 50, 64)
    mask = (torch.rand(50) < 0.5).expand(3, 1, sq, 50)
    bias = draw(4, 1, 1).expand(4, sq, 50)
    check(ops.flash_attention, q, k, k, scale=0.1, mask=mask, bias=bias)
    check(ops.flash_attention, q, k, k, scale=0.1, bias=draw(50, sq).T)
    check(ops.flash_attention, q, k, k, scale=0.1, bias=draw(()).float(), mask=torch.tensor(True))


@pytest.mark.parametrize("fill", [-math.inf, MIN, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 1), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_static_cache_is_read_as_far_as_it_is_filled(fill: float, heads: tuple[int, int], dtype: torch.dtype) -> None:
    draw, slots, filled = drawn(2, dtype), 2000, 130
    q, k, v = draw(1, heads[0], 1, 64), draw(1, heads[1], slots, 64), draw(1, heads[1], slots, 64)
    bias = torch.zeros(1, 1, 1, slots, dtype=torch.float32)
    bias[..., filled:] = fill
    short = ops.flash_attention(q, k[:, :, :filled], v[:, :, :filled], scale=0.1)
    for hide in ({"bias": bias}, {"mask": bias == 0}):
        assert_in_budget(
            ops.flash_attention(q, k, v, scale=0.1, **hide),
            short,
            meaning(q.double(), k[:, :, :filled].double(), v[:, :, :filled].double(), scale=0.1),
            v.double().abs().amax(),
            8.0,
        )
    # Where every key carries the finite fill, the row is their mean.
    if fill > -math.inf:
        check(ops.flash_attention, q, k, v, scale=0.1, bias=torch.full_like(bias, fill))
        bias[..., :filled] = -math.inf
        check(ops.flash_attention, q, k, v, scale=0.1, bias=bias)


@pytest.mark.parametrize("sq", [1, 4, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_poison_stays_in_its_row(sq: int, value: float, dtype: torch.dtype) -> None:
    draw = drawn(3, dtype)
    q, k, v = draw(2, 4, sq, 64), draw(2, 4, 600, 64), draw(2, 4, 600, 64)
    q[1, 2, sq - 1, 5] = value
    got = ops.flash_attention(q, k, v, scale=0.1, causal="bottom_right")
    expected = torch.zeros_like(got, dtype=torch.bool)
    expected[1, 2, sq - 1] = True
    assert torch.equal(got.isnan(), expected)
    q[1, 2, sq - 1, 5] = 0.0
    v[0, 1, 3, 7] = value
    got = ops.flash_attention(q, k, v, scale=0.1, causal="bottom_right")
    exact = meaning(q.double(), k.double(), v.double(), scale=0.1, causal="bottom_right")
    assert torch.equal(got.isnan(), exact.isnan()) and torch.equal(got.isinf(), exact.isinf())
