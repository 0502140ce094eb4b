"""ascend_cpu.linear against float64: every tail, layout and epilogue, poisoned rows, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from cpu_support import assert_in_budget, kernels, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

ACTS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}
PATHS = {"linear": ops.linear, "linear_portable": ops.linear_portable}


def meaning(x, w, bias, epilogue, other):
    mul = epilogue == "mul" or epilogue.endswith("_mul")
    act = "none" if epilogue == "mul" else epilogue.removesuffix("_mul")
    y = ACTS[act](F.linear(x, w, bias))
    return y if other is None else y * other if mul else y + other


def sums(x, w, bias, epilogue, other):
    """A bound of the absolute sum of all terms of an element, per row."""
    s = F.linear(x.abs(), w.abs(), None if bias is None else bias.abs())
    if epilogue.startswith("swiglu"):
        s = s.chunk(2, -1)[0] * s.chunk(2, -1)[1] * 2
    if other is not None:
        s = s * other.abs() if epilogue.endswith("mul") else s + other.abs()
    return s.amax(-1, keepdim=True)


def check(op, x, w, bias=None, epilogue="none", other=None):
    got = op(x, w, bias, epilogue, other)
    wide = [None if t is None else t.double() for t in (x, w, bias)]
    o = None if other is None else other.double()
    exact, eager = meaning(*wide, epilogue, o), meaning(x, w, bias, epilogue, other)
    assert got.is_contiguous()
    if exact.numel():
        # Our gelu is good to 1.5e-7: nothing in bf16, and a unit and a half of float.
        assert_in_budget(got, eager, exact, sums(*wide, epilogue, o), ulps=1.0 if x.dtype is torch.bfloat16 else 4.0)
    else:
        assert got.shape == exact.shape and got.dtype == x.dtype


rows = st.one_of(st.integers(0, 18), st.integers(30, 35), st.integers(46, 66), st.sampled_from([97, 145]))
columns = st.one_of(st.integers(0, 18), st.integers(60, 70), st.sampled_from([129, 200]))
depth = st.one_of(st.integers(0, 5), st.integers(30, 36), st.integers(62, 66), st.sampled_from([127, 256, 257, 300]))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=200)
@given(
    m=rows,
    n=columns,
    k=depth,
    epilogue=st.sampled_from([*ACTS, "mul", "gelu_mul", "silu_mul", "swiglu_mul"]),
    with_bias=st.booleans(),
    with_other=st.booleans(),
    gap=st.sampled_from([0, 1, 7, 32]),
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_size(path, m, n, k, epilogue, with_bias, with_other, gap, dtype, seed):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    weights = 2 * n if epilogue.startswith("swiglu") else n
    x, w = draw(m, k + gap)[:, :k], draw(weights, k + 2 * gap)[:, :k]
    bias = draw(weights) if with_bias else None
    other = draw(m, n + gap)[:, :n] if with_other or epilogue.endswith("mul") else None
    check(PATHS[path], x, w, bias, epilogue, other)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (4, 1, 6, 5), (2, 0, 5)])
def test_leading_axes(shape):
    check(ops.linear, torch.randn(*shape).bfloat16(), torch.randn(7, 5).bfloat16())


@pytest.mark.parametrize("m", [2, 40])
def test_layouts(m):
    w = torch.randn(33, 64).bfloat16()
    check(ops.linear, torch.randn(64, m).bfloat16().T, w)
    check(ops.linear, torch.randn(m, 3, 64).bfloat16().transpose(0, 1), w)
    check(ops.linear, torch.randn(m, 2, 64).bfloat16()[:, 0], w)
    check(ops.linear, torch.randn(1, 64).bfloat16().expand(m, 64), w)
    check(ops.linear, torch.randn(m, 64).bfloat16(), torch.randn(64, 33).bfloat16().T)
    check(ops.linear, torch.randn(m, 64).bfloat16(), w[:1].expand(33, 64))
    check(ops.linear, torch.randn(m, 64).bfloat16(), w, torch.randn(66).bfloat16()[::2])
    check(ops.linear, torch.randn(m, 64).bfloat16(), w, None, "none", torch.randn(33, m).bfloat16().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_on_aten(dtype):
    x, w, b = torch.randn(9, 32, dtype=dtype), torch.randn(20, 32, dtype=dtype), torch.randn(20, dtype=dtype)
    check(ops.linear, x, w, b, "gelu", torch.randn(9, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m,n,k", [(1, 300, 1024), (16, 100, 1024), (128, 200, 768)])
def test_model_sizes(m, n, k, dtype):
    x, w, bias = torch.randn(m, k), torch.randn(n, k) * 0.02, torch.randn(n)
    check(ops.linear, x.to(dtype), w.to(dtype), bias.to(dtype), "gelu")


def test_rows_are_packed_in_parts():
    x, w, other = torch.randn(400, 12000).bfloat16(), torch.randn(9, 12000).bfloat16(), torch.randn(400, 9).bfloat16()
    check(ops.linear, x, w, None, "none", other)


def test_mixed_dtypes_are_left_to_aten():
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(torch.randn(2, 8).bfloat16(), torch.randn(4, 8))


@pytest.mark.parametrize("m", [1, 3, 4, 50])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_in_its_row_and_column(m, poison):
    x, w = torch.randn(m, 77).bfloat16(), torch.randn(37, 77).bfloat16()
    x[m // 2, 76] = poison
    w[20, 3] = poison
    got, eager = ops.linear(x, w), F.linear(x.double(), w.double())
    assert torch.equal(got.isnan(), eager.isnan())
    assert torch.equal(got.isinf(), eager.isinf())
    clean = torch.ones(m, 37, dtype=torch.bool)
    clean[m // 2], clean[:, 20] = False, False
    assert got[clean].isfinite().all()


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("act", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activations_at_the_edges(act, m):
    inf = float("inf")
    special = [0.0, -0.0, inf, -inf, float("nan"), 1e38, -1e38, 100.0, -100.0, -12.0, -5.5, 3.0, 1e-30, -1e-30, 88.0]
    values = torch.tensor(special).bfloat16()
    identity = torch.eye(1).bfloat16()
    x = values.view(-1, 1).repeat(m, 1)[: max(m, len(special))]
    got = ops.linear(x, identity, None, act)[:, 0].double()
    wide = x[:, 0].double()
    # ATen's vectorised float gelu gives NaN at infinity; the formula does not.
    exact = wide * 0.5 * (1 + torch.erf(wide * 0.5**0.5)) if act == "gelu" else ACTS[act](wide)
    assert torch.equal(got.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(got[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()])
    assert (got[finite] - exact[finite]).abs().le(2**-8 * exact[finite].abs() + 1e-6).all()


def test_a_write_to_the_weight_shows():
    w = torch.nn.Parameter(torch.randn(16, 32).bfloat16(), requires_grad=False)
    x = torch.randn(2, 32).bfloat16()
    before = ops.linear(x, w)
    w.data.mul_(2)
    assert torch.equal(ops.linear(x, w), before * 2)


@pytest.mark.parametrize("m", [1, 200])
def test_same_bits_for_any_number_of_threads(m):
    x, w = torch.randn(m, 300).bfloat16(), torch.randn(500, 300).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.linear(x, w)
        torch.set_num_threads(3)
        for _ in range(3):
            assert torch.equal(ops.linear(x, w), alone)
    finally:
        torch.set_num_threads(threads)


def test_callers_do_not_share_scratch():
    inputs = [(torch.randn(m, 96).bfloat16(), torch.randn(64, 96).bfloat16()) for m in (1, 3, 20, 70, 150, 31)]
    expected = [ops.linear(*i) for i in inputs]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(30):
            if not torch.equal(ops.linear(*inputs[n]), expected[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert not wrong


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), "must be"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), "bias"),
        ((torch.ones(2, 3), torch.ones(4, 3), None, "gulu"), "unknown epilogue 'gulu'"),
        ((torch.ones(2, 3), torch.ones(4, 3), None, "mul"), "needs the argument other"),
        ((torch.ones(2, 3), torch.ones(5, 3), None, "swiglu"), "even number"),
        ((torch.ones(2, 3), torch.ones(4, 3), None, "none", torch.ones(4)), "other must be"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(*args)


def test_schema_and_fake():
    x, w = torch.randn(2, 3, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.linear.default, (x, w), test_utils=utils)
    torch.library.opcheck(ops.linear.default, (x, w, torch.randn(16).bfloat16(), "swiglu"), test_utils=utils)


def test_compiled_with_a_symbolic_number_of_rows():
    w = torch.randn(16, 32).bfloat16()
    f = torch.compile(lambda x: ops.linear(x, w, None, "gelu"), backend="aot_eager", dynamic=True, fullgraph=True)
    for m in (5, 9, 40):
        x = torch.randn(m, 32).bfloat16()
        assert torch.equal(f(x), ops.linear(x, w, None, "gelu"))


def test_isa_is_named():
    assert kernels.isa() in ("portable", "avx512_bf16", "amx_bf16")
