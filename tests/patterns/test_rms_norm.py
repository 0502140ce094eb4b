"""RMSNorm by hand and by aten, and the residual add in front of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.patterns.spellings import rms_norm as spellings

NORMS = ("rms_norm", "rms_norm_reordered")
OPTIONS = {
    "llama": "cast_before_weight=True",
    "t5": "cast_before_weight=True",
    "power": "cast_before_weight=True",
    "gemma": "weight_offset=1.0",
    "native": "compute=bf16",
    "stays_float": "out=f32",
    "two_axes": "ndim=2",
}


def inputs(dtype=torch.bfloat16, wide=16):
    return torch.randn(2, 5, wide, dtype=dtype), torch.randn(wide, dtype=dtype), 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fn", spellings.EXACT, ids=lambda f: f.__name__)
def test_the_references_own_order_is_bit_exact(fn, dtype):
    args = inputs(dtype)
    result = fuse(fn, args, "rms_norm", level=1)
    assert result.fired == ["rms_norm"]
    assert_same(fn, args, result, exact=True)


@pytest.mark.parametrize("fn", spellings.EXACT, ids=lambda f: f.__name__)
def test_where_the_weight_enters_is_kept(fn):
    after = fuse(fn, inputs(), "rms_norm").after
    option = OPTIONS.get(fn.__name__)
    assert "ascend.rms_norm(" in after and (option is None or option in after)
    if fn.__name__ in ("weight_inside", "no_weight"):
        assert "cast_before_weight" not in after and "out=" not in after


@pytest.mark.parametrize("fn", spellings.REORDERED, ids=lambda f: f.__name__)
def test_other_orders_fire_at_o2_only(fn):
    args = inputs(torch.float32)
    result = fuse(fn, args, *NORMS)
    assert result.fired == ["rms_norm_reordered"]
    assert_same(fn, args, result)
    assert fuse(fn, args, *NORMS, level=1).fired == []


def test_snapshot():
    results = [fuse(fn, inputs(), *NORMS) for fn in (spellings.llama, spellings.gemma, spellings.division)]
    snapshot("rms_norm", *results)


def test_a_float32_weight_promotes_the_result():
    def fn(x, w, eps):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return w * h.to(x.dtype)

    args = (torch.randn(2, 5, 16).bfloat16(), torch.randn(16), 1e-6)
    result = fuse(fn, args, "rms_norm")
    assert "out=f32" in result.after
    assert_same(fn, args, result, exact=True)


def test_a_cast_that_others_read_stays_for_them():
    def fn(x, w, eps):
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype), h + 1

    result = fuse(fn, inputs(), "rms_norm")
    assert result.fired == ["rms_norm"]
    assert_same(fn, inputs(), result, exact=True)


def test_two_weights_of_one_norm_share_the_plain_norm():
    def fn(x, w, v):
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * n, v * n

    args = (torch.randn(2, 5, 16), torch.randn(16), torch.randn(16))
    result = fuse(fn, args, "rms_norm")
    assert result.ops("ascend.rms_norm") == 1 and result.ops("aten.mul.Tensor") == 2
    assert_same(fn, args, result, exact=True)


def _square_other(x, w, eps):
    return w * (x * torch.rsqrt((x * (x + 1)).mean(-1, keepdim=True) + eps))


def _other_dim(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps))


def _alpha(x, w, eps):
    return w * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), eps, alpha=2)))


def _tensor_eps(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[:1]))


def _other_input(x, w, eps):
    return w * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _shared_statistic(x, w, eps):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return w * (x * r), r


def _rounded_root(x, w, eps):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + eps).to(x.dtype))


def _wrong_count(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps))


def _wide_mean(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + eps))


def _no_mean(x, w, eps):
    return w * (x * torch.rsqrt(x.pow(2) / 8 + eps))


def _in_place(x, w, eps):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    x.add_(1)
    return w * (x * r)


@pytest.mark.parametrize(
    ("fn", "code", "found"),
    [
        (_square_other, "op", "the mean of something else"),
        (_other_dim, "arg", "dim=[-2]"),
        (_tensor_eps, "arg", "a tensor"),
        (_other_input, "op", "something else"),
        (_shared_statistic, "users", "2 users"),
        (_rounded_root, "dtype", "rounded to torch.bfloat16"),
        (_wrong_count, "op", "aten.div"),
        (_wide_mean, "dtype", "dtype=torch.float64"),
        (_no_mean, "op", "aten.div"),
        (_in_place, "op", "something else"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_near_misses_say_what_stopped_them(fn, code, found):
    dtype = torch.bfloat16 if fn is _rounded_root else torch.float32
    result = fuse(fn, inputs(dtype), *NORMS)
    assert result.fired == []
    nearest = max((result.missed(n) for n in NORMS), key=lambda m: m.progress)
    assert nearest.code == code and found in nearest.reason


def test_alpha_counts():
    args = inputs(torch.float32)
    result = fuse(_alpha, args, *NORMS)
    assert_same(_alpha, args, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-5, None])
def test_aten_rms_norm(dtype, eps):
    def fn(x, w):
        return F.rms_norm(x, (16,), w, eps), F.rms_norm(x, (5, 16), None, eps)

    args = inputs(dtype)[:2]
    result = fuse(fn, args, "aten_rms_norm", level=1)
    assert result.count("aten_rms_norm") == 2
    assert_same(fn, args, result, exact=dtype != torch.float16)


def stream(x, residual, w):
    h = residual + x
    n = h.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * n.to(h.dtype), h * 2, h


def stream_inputs(dtype=torch.bfloat16):
    return torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype), torch.randn(16, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_residual_add_joins_the_norm_and_the_sum_lives_on(dtype):
    args = stream_inputs(dtype)
    result = fuse(stream, args, "rms_norm", "add_rms_norm", level=1)
    assert result.fired == ["rms_norm", "add_rms_norm"]
    assert result.ops("aten.add.Tensor") == 0
    assert_same(stream, args, result, exact=True)


def test_a_sum_reshaped_before_the_norm():
    def fn(x, r, w):
        h = (x + r).reshape(-1, 16)
        return F.rms_norm(h, (16,), w, 1e-6), h

    args = stream_inputs(torch.float32)
    result = fuse(fn, args, "aten_rms_norm", "add_rms_norm")
    assert result.count("add_rms_norm") == 1 and result.ops("aten.add.Tensor") == 0
    assert_same(fn, args, result)


def test_a_reshape_that_joins_two_of_the_norm_s_axes_stays():
    def fn(x, r):
        return F.rms_norm((x + r).reshape(2, 2, 5, 8), (5, 8), None, 1e-6)

    args = stream_inputs(torch.float32)[:2]
    result = fuse(fn, args, "aten_rms_norm", "add_rms_norm")
    assert result.count("add_rms_norm") == 0 and "a norm of aten.reshape" in result.missed("add_rms_norm").reason


def test_residual_snapshot():
    snapshot("add_rms_norm", fuse(stream, stream_inputs(), "rms_norm", "add_rms_norm"))


def test_of_two_norms_of_one_sum_the_first_takes_it():
    def fn(x, r, w, v):
        h = x + r
        return F.rms_norm(h, (16,), w, 1e-6), F.rms_norm(h, (16,), v, 1e-6)

    args = (*stream_inputs(torch.float32), torch.randn(16))
    result = fuse(fn, args, "aten_rms_norm", "add_rms_norm")
    assert result.count("add_rms_norm") == 1 and result.ops("ascend.rms_norm") == 1
    assert_same(fn, args, result)


@pytest.mark.parametrize(
    ("add", "code", "found"),
    [
        (lambda x, r: torch.add(x, r, alpha=2), "arg", "alpha=2"),
        (lambda x, r: x + r[:, :1], "shape", "[2, 5, 16] + [2, 1, 16]"),
        (lambda x, r: x + r.double(), "dtype", "torch.float32 + torch.float64"),
        (lambda x, r: x + 1.0, "arg", "a tensor plus a number"),
        (lambda x, r: x * r, "op", "a norm of aten.mul"),
    ],
    ids=["alpha", "broadcast", "promotion", "number", "product"],
)
def test_other_sums_stay(add, code, found):
    def fn(x, r, w):
        h = add(x, r)
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    result = fuse(fn, stream_inputs(torch.float32), "rms_norm", "add_rms_norm")
    assert result.count("add_rms_norm") == 0
    missed = result.missed("add_rms_norm")
    assert missed.code == code and found in missed.reason
