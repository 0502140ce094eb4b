"""What is not attention, or not provably: every refusal of the recogniser, with the reason that users read."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_support import ATTENTION, qkv
from pattern_support import assert_same, fuse

NINF = -math.inf
LOW = torch.finfo(torch.float32).min


def _softmaxed(change):
    """softmax of changed scores, times v."""
    return lambda q, k, v, x: change(q @ k.mT, x).softmax(-1) @ v


def _weighted(change):
    """v, weighted by changed weights."""
    return lambda q, k, v, x: change((q @ k.mT).softmax(-1), x) @ v


def _exp(s):
    return torch.exp(s - s.amax(-1, keepdim=True))


def _by_hand(finish):
    return lambda q, k, v, x: finish(q @ k.mT, _exp(q @ k.mT), v, x)


def _with_column(finish, column=lambda x: x[:, :, :, :1]):
    def fn(q, k, v, x):
        return finish(torch.cat([q @ k.mT, column(x)], -1).softmax(-1), v)

    return fn


def _uses(p, v):
    return p[..., :-1] @ v, p


SOFTMAX = {
    "exp without a sum": (_by_hand(lambda s, e, v, x: e @ v), "op", "exponentials that are not summed"),
    "sum with eps": (
        _by_hand(lambda s, e, v, x: (e / (e.sum(-1, True) + 1e-6)) @ v),
        "op",
        "expected the exponentials over their sum, found aten.add.Tensor",
    ),
    "max of the columns": (
        lambda q, k, v, x: (lambda e: (e / e.sum(-1, True)) @ v)(torch.exp(q @ k.mT - (q @ k.mT).amax(-2, True))),
        "arg",
        "the maximum along the axis of the sum",
    ),
    "no max": (
        lambda q, k, v, x: (lambda e: (e / e.sum(-1, True)) @ v)(torch.exp(q @ k.mT)),
        "unproven",
        "exp of scores that may overflow",
    ),
    "a softcap that does not bound enough": (
        lambda q, k, v, x: (lambda e: (e / e.sum(-1, True)) @ v)(torch.exp(torch.tanh(q @ k.mT / 80.0) * 80.0)),
        "unproven",
        "exp of scores that may overflow",
    ),
    "a softmax that rounds": (
        lambda q, k, v, x: torch._safe_softmax(q @ k.mT, -1, dtype=torch.bfloat16) @ v.bfloat16(),
        "dtype",
        "found torch.float32 to torch.bfloat16",
    ),
    "sinks of merged axes": (
        lambda q, k, v, x: (
            torch.cat(
                [
                    q.reshape(8, 5, 8) @ k.reshape(8, 7, 8).mT,
                    x[:, 0, 0, 0].view(2, 1, 1, 1).expand(2, 4, 5, 1).reshape(8, 5, 1),
                ],
                -1,
            ).softmax(-1)[..., :7]
            @ v.reshape(8, 7, 8)
        ),
        "shape",
        "sinks of unknown axes",
    ),
    "three columns": (
        lambda q, k, v, x: torch.cat([q @ k.mT, x[..., :1], x[..., :1]], -1).softmax(-1)[..., :7] @ v,
        "op",
        "found 3 parts",
    ),
    "a row of sinks": (
        lambda q, k, v, x: torch.cat([q @ k.mT, x[:, :, :1]], -2).softmax(-1)[:, :, :5] @ v,
        "op",
        "found 2 parts along 2",
    ),
    "a column of scores": (_with_column(lambda p, v: p[..., :-1] @ v), "shape", "sinks that vary otherwise"),
    "the column is used": (_with_column(_uses), "users", "found no slice"),
    "another column dropped": (_with_column(lambda p, v: p[..., 1:] @ v), "arg", "another slice"),
    "product over another sum": (
        _by_hand(lambda s, e, v, x: ((e @ v) * x[..., :1]) / e.sum(-1, True)),
        "op",
        "expected weights @ v over the sum of the weights, found %matmul_2 used otherwise",
    ),
    "product rounded before it is divided": (
        _by_hand(lambda s, e, v, x: (e @ v).bfloat16() / e.sum(-1, True)),
        "dtype",
        "a product that is divided before it is rounded",
    ),
}

SCORES = {
    "negated": (_softmaxed(lambda s, x: s * -0.5), "arg", "a finite, positive scale"),
    "scale of rows": (_softmaxed(lambda s, x: s * x[..., :1]), "op", "aten.mul.Tensor"),
    "mask multiplied": (_softmaxed(lambda s, x: s * (x > 0)), "op", "aten.mul.Tensor"),
    "alpha": (_softmaxed(lambda s, x: torch.add(s, x, alpha=2)), "arg", "alpha=2"),
    "scores twice": (_softmaxed(lambda s, x: s + s.relu()), "op", "found 2 of them"),
    "bias less scores": (_softmaxed(lambda s, x: x - s), "op", "a bias less the scores"),
    "a number": (_softmaxed(lambda s, x: s + 1.5), "op", "scores + 1.5"),
    "integer bias": (_softmaxed(lambda s, x: s + (x > 0).long()), "dtype", "torch.int64"),
    "larger bias": (_softmaxed(lambda s, x: s + torch.stack([x, x])), "shape", "a bias that broadcasts"),
    "larger mask": (
        _softmaxed(lambda s, x: torch.where(torch.stack([x, x]) > 0, s, NINF)),
        "shape",
        "a mask that broadcasts",
    ),
    "finite fill": (_softmaxed(lambda s, x: s.masked_fill(x > 0, -1e9)), "unproven", "found -1000000000.0"),
    "lowest fill times 2": (_softmaxed(lambda s, x: s.masked_fill(x > 0, LOW) * 2.0), "unproven", "may overflow"),
    "mask in softcap": (
        _softmaxed(lambda s, x: torch.tanh(s.masked_fill(x > 0, NINF))),
        "unproven",
        "a mask inside it",
    ),
    "bias in softcap": (_softmaxed(lambda s, x: torch.tanh(s + x)), "unproven", "a bias inside it"),
    "two softcaps": (_softmaxed(lambda s, x: torch.tanh(torch.tanh(s))), "op", "tanh of tanh"),
    "rounded": (_softmaxed(lambda s, x: s.bfloat16().float()), "dtype", "torch.float32 to torch.bfloat16"),
    "clamped": (_softmaxed(lambda s, x: s.clamp(-1, 1)), "op", "aten.clamp"),
    "axes that cannot be followed": (
        lambda q, k, v, x: (q @ k.mT).reshape(2, 4, 7, 5).mT.softmax(-1) @ v,
        "unproven",
        "scores whose axes can be followed",
    ),
    "softmax over heads": (lambda q, k, v, x: (q @ k.mT).softmax(1) @ v, "arg", "another dim than the product with v"),
    "softmax and product over heads": (
        lambda q, k, v, x: (q @ k.mT).softmax(1).permute(0, 2, 3, 1) @ v[:, :1, :4].unsqueeze(1)[:, 0],
        "arg",
        "found along other axes",
    ),
    "softmax over rows": (lambda q, k, v, x: (q @ k.mT).softmax(-2) @ v, "arg", "another dim than the product with v"),
    "alpha of baddbmm": (
        lambda q, k, v, x: torch.baddbmm(x[0], q[0], k[0].mT, alpha=-1.0).softmax(-1) @ v[0],
        "arg",
        "alpha=-1.0",
    ),
    "q and k of another dtype": (
        lambda q, k, v, x: (q.bfloat16() @ k.bfloat16().mT).softmax(-1).half() @ v.half(),
        "dtype",
        "q, k and v of one dtype",
    ),
}

WEIGHTS = {
    "returned": (lambda q, k, v, x: (lambda p: (p @ v, p))((q @ k.mT).softmax(-1)), "users", "the graph's output"),
    "not multiplied": (lambda q, k, v, x: (q @ k.mT).softmax(-1).tanh(), "op", "aten.tanh"),
    "times itself": (lambda q, k, v, x: (lambda p: p @ p)((q @ q.mT).softmax(-1)), "op", "aten.matmul"),
    "squared": (_weighted(lambda p, x: p * p), "op", "aten.mul.Tensor"),
    "multiplied key by key": (_weighted(lambda p, x: p * x), "op", "weights multiplied key by key"),
    "masked by product": (_weighted(lambda p, x: p * x[:1, :1, :1]), "op", "weights multiplied key by key"),
    "zeroed": (_weighted(lambda p, x: p.masked_fill(x > 0, 0.0)), "unproven", "another mask"),
    "rounded": (_weighted(lambda p, x: p.bfloat16().float()), "dtype", "torch.bfloat16"),
    "transposed": (lambda q, k, v, x: (q @ k.mT).softmax(-1).mT @ q, "arg", "another dim than the product with v"),
    "of one batch, v of many": (lambda q, k, v, x: (q[:1] @ k[:1].mT).softmax(-1) @ v, "shape", "weights as large as"),
    "axes that cannot be followed": (
        lambda q, k, v, x: (q @ k.mT).softmax(-1).reshape(2, 4, 7, 5) @ x.mT[..., :5, :],
        "unproven",
        "weights whose axes can be followed",
    ),
    "a factor of another dtype": (
        _weighted(lambda p, x: (p.bfloat16() * x[..., :1]).float()),
        "dtype",
        "a factor of the dtype of the weights",
    ),
}


@pytest.mark.parametrize(
    ("fn", "code", "found"),
    [pytest.param(*case, id=f"{where}: {name}")
     for where, cases in (("softmax", SOFTMAX), ("scores", SCORES), ("weights", WEIGHTS))
     for name, case in cases.items()],
)  # fmt: skip
def test_the_reason(fn, code, found):
    args = (*qkv(), torch.randn(2, 4, 5, 7))
    result = fuse(fn, args, *ATTENTION)
    reasons = [m for m in result.record.missed if m.pattern == "eager_attention"]
    assert result.fired == []
    assert any(m.code == code and found in m.reason for m in reasons), reasons


def test_rows_divided_by_the_sums_of_other_rows():
    def fn(q, k, v):
        e = _exp(q @ k.mT)
        return (e @ v).transpose(1, 2) / e.sum(-1, True)

    missed = fuse(fn, qkv(hq=5, hk=5), *ATTENTION).missed("eager_attention")
    assert missed.code == "unproven" and "found other rows" in missed.reason


def test_a_bias_that_overflows_where_scores_are_rounded():
    def fn(q, k, v, bias):
        return ((q @ k.mT).float() + bias).to(q.dtype).softmax(-1) @ v

    args = (*qkv(torch.bfloat16), torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(1) > 0, LOW))
    missed = fuse(fn, args, *ATTENTION).missed("eager_attention")
    assert missed.code == "unproven" and "where it may overflow" in missed.reason


def test_a_fill_that_overflows_where_scores_are_rounded():
    def fn(q, k, v, hide):
        return (q @ k.mT).float().masked_fill(hide, LOW).to(q.dtype).softmax(-1) @ v

    args = (*qkv(torch.bfloat16), torch.ones(5, 7).triu(1) > 0)
    missed = fuse(fn, args, *ATTENTION).missed("eager_attention")
    assert missed.code == "unproven" and "may overflow to -inf" in missed.reason


def test_the_lowest_half_absorbs_no_score():
    def fn(q, k, v, hide, bias):
        return ((q @ k.mT).masked_fill(hide, torch.finfo(q.dtype).min) + bias).softmax(-1) @ v

    args = (*qkv(torch.float16), torch.ones(5, 7).triu(1) > 0, torch.randn(5, 7, dtype=torch.float16))
    missed = fuse(fn, args, *ATTENTION).missed("eager_attention")
    assert missed.code == "unproven" and "a fill of -65504.0 beside" in missed.reason


def test_no_key_of_fp16_is_bounded_by_a_softcap():
    def fn(q, k, v):
        e = torch.exp(torch.tanh(q @ k.mT / 20.0) * 20.0)
        return (e / e.sum(-1, True)) @ v

    missed = fuse(fn, qkv(torch.float16), *ATTENTION).missed("eager_attention")
    assert missed.code == "unproven" and "may overflow" in missed.reason


def test_a_scaled_query_of_another_sign_stays():
    def fn(q, k, v):
        return ((q * -0.5) @ k.mT).softmax(-1) @ v

    result = fuse(fn, qkv(), *ATTENTION)
    assert result.fired == ["eager_attention"] and "scale=1.0" in result.after
    assert_same(fn, (q := qkv()), fuse(fn, q, *ATTENTION))


def test_other_softmaxes_say_what_they_are_of():
    def router(x, w):
        return torch.softmax(F.linear(x, w), -1).topk(2)

    def pooling(x):
        return (torch.softmax(x.tanh() + 1.0, -2) * x).sum(-2)

    reason = (
        fuse(router, (torch.randn(4, 8), torch.randn(6, 8)), *ATTENTION, params=(1,)).missed("eager_attention").reason
    )
    assert "a linear with the weight %arg1_1 (router logits, a classifier), no q k^T above it" in reason
    reason = fuse(pooling, (torch.randn(4, 8, 3),), *ATTENTION).missed("eager_attention").reason
    assert "a softmax along axis 1 of 3 of %tanh = aten.tanh.default(...), no q k^T above it" in reason


def test_every_softmax_of_a_model_is_in_the_report():
    def model(q, k, v, *weights):
        x = (q @ k.mT).softmax(-1) @ v
        for w in weights:
            x = x * torch.softmax(F.linear(x.tanh().exp(), w), -1)
        return x

    args = (*qkv(), *(torch.randn(8, 8) for _ in range(40)))
    result = fuse(model, args, params=range(3, 43), level=2, validate=False)
    said = {m.anchor for m in result.record.missed if m.pattern == "eager_attention" and "router logits" in m.reason}
    assert result.count("flash_attention") == 1 and len(said) == 40
