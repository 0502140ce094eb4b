"""GELU and SiLU by hand, their fusions with a neighbour, and SwiGLU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot

from ascend_dynamo.patterns import gelu, silu, swiglu

BY_HAND = [(f, p) for p in gelu.PATTERNS for f in p.eager]


@pytest.mark.parametrize(("fn", "pattern"), BY_HAND, ids=lambda p: getattr(p, "__name__", getattr(p, "name", None)))
def test_gelu_by_hand(fn, pattern):
    x = torch.randn(3, 7) * 3
    result = fuse(fn, (x,), "gelu_erf", "gelu_tanh")
    assert result.fired == [pattern.name]
    assert ("approximate=" in result.after) == (pattern.name == "gelu_tanh")
    assert_same(fn, (x,), result)


def test_gelu_snapshot():
    snapshot("gelu", fuse(gelu.erf_divided, (torch.randn(3, 7),)), fuse(gelu.tanh_power, (torch.randn(3, 7),)))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142)),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * (x + 1) * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
    ],
    ids=["quick", "rounded root", "other cubic", "rounded constant", "other factor", "no half"],
)
def test_what_is_not_gelu_stays(fn):
    assert fuse(fn, (torch.randn(3, 7),)).fired == []


@pytest.mark.parametrize("fn", [silu.by_sigmoid, silu.by_exp], ids=lambda f: f.__name__)
def test_silu_by_hand(fn):
    x = torch.randn(3, 7)
    result = fuse(fn, (x,), "silu")
    assert result.fired == ["silu"]
    assert_same(fn, (x,), result)


PAIRS = {
    "gelu_add": (lambda x, y: y + F.gelu(x), (3, 8), (3, 8)),
    "gelu_mul": (lambda x, y: F.gelu(x, approximate="tanh") * y, (3, 8), (3, 8)),
    "bias_gelu": (lambda x, y: F.gelu(x + y), (3, 8), (8,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_gelu_and_its_neighbour(name, dtype):
    fn, first, second = PAIRS[name]
    args = (torch.randn(first, dtype=dtype), torch.randn(second, dtype=dtype))
    result = fuse(fn, args, name, level=1)
    assert result.fired == [name]
    assert_same(fn, args, result, exact=True)


def test_pairs_snapshot():
    snapshot("gelu_pairs", *(fuse(f, (torch.randn(a), torch.randn(b)), n) for n, (f, a, b) in PAIRS.items()))


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("gelu_add", lambda x, y: torch.add(F.gelu(x), y, alpha=2)),
        ("gelu_add", lambda x, y: (g := F.gelu(x), g + y)),
        ("gelu_add", lambda x, y: F.gelu(x) + y.double()),
        ("gelu_mul", lambda x, y: F.gelu(x) / y),
        ("bias_gelu", lambda x, y: F.gelu(torch.add(x, y[0], alpha=3))),
        ("bias_gelu", lambda x, y: F.gelu(x + y)),
    ],
    ids=["alpha", "gelu returned", "promotion", "quotient", "scaled bias", "no bias vector"],
)
def test_what_is_not_quite_it_stays(name, fn):
    args = (torch.randn(3, 8), torch.randn(3, 8))
    assert fuse(fn, args, name).fired == []


@pytest.mark.parametrize("fn", swiglu.Swiglu.eager, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_of_halves(fn, dtype):
    t = torch.randn(2, 5, 24, dtype=dtype)
    result = fuse(fn, (t,), "swiglu", level=1)
    assert result.fired == ["swiglu"]
    assert_same(fn, (t,), result, exact=True)


def _swapped(t, u):
    a, b = t.chunk(2, -1)
    return a * F.silu(b)


def _gap(t, u):
    return F.silu(t[..., :8]) * t[..., 16:]


def _strided(t, u):
    return F.silu(t[..., ::2]) * t[..., 1::2]


def _two_tensors(t, u):
    return F.silu(t) * u


def _silu_returned(t, u):
    a, b = t.chunk(2, -1)
    s = F.silu(a)
    return s * b, s


def _other_axis(t, u):
    a, b = t.chunk(2, 0)
    return F.silu(a) * b


@pytest.mark.parametrize(
    ("fn", "code", "found"),
    [
        (_swapped, "arg", "12:24]"),
        (_gap, "arg", "0:8] and"),
        (_strided, "arg", ":2]"),
        (_two_tensors, "op", "two separate tensors"),
        (_silu_returned, "users", "the graph's output"),
        (_other_axis, "op", "two separate tensors"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_swiglu_near_misses(fn, code, found):
    result = fuse(fn, (torch.randn(2, 5, 24), torch.randn(2, 5, 24)), "swiglu")
    missed = result.missed("swiglu")
    assert result.fired == [] and missed.code == code and found in missed.reason
