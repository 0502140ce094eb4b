"""Capture keeps composites whole, and nothing else changes: same results, autocast, mutation, no leftovers."""

import pytest
import torch
import torch.nn.functional as F

from ascend_dynamo.capture import KeepComposites, trace

aten = torch.ops.aten


def targets(unit):  # type: ignore[no-untyped-def]
    return [n.target for n in unit.gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("fn", "shapes", "op"),
    [
        (F.linear, [(2, 3, 4), (5, 4)], aten.linear.default),
        (torch.matmul, [(2, 3, 4), (4, 5)], aten.matmul.default),
        (lambda a, b: a @ b, [(2, 3, 4), (2, 4, 5)], aten.matmul.default),
        (lambda a, b: a.matmul(b), [(3, 4), (4, 5)], aten.matmul.default),
        (lambda x: F.layer_norm(x, (4,)), [(2, 4)], aten.layer_norm.default),
        (lambda x: F.rms_norm(x, (4,)), [(2, 4)], aten.rms_norm.default),
        (F.scaled_dot_product_attention, [(1, 2, 3, 4)] * 3, aten.scaled_dot_product_attention.default),
    ],
)
def test_composites_are_one_call(fn, shapes, op) -> None:  # type: ignore[no-untyped-def]
    args = [torch.randn(s) for s in shapes]
    unit = trace(fn, args)
    assert targets(unit) == [op]
    torch.testing.assert_close(unit.gm(*args)[0], fn(*args))


@torch.no_grad()
@pytest.mark.parametrize("weights", [False, True])
def test_torchs_own_attention_is_seen_into(weights: bool) -> None:
    m = torch.nn.MultiheadAttention(8, 2).eval()
    x = torch.randn(3, 1, 8)

    def fn(x):  # type: ignore[no-untyped-def]
        w, b, out = m.in_proj_weight, m.in_proj_bias, m.out_proj
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, w, b, None, None, False, 0.0, out.weight, out.bias, training=False, need_weights=weights
        )[0]

    unit = trace(fn, (x,))
    assert (aten.scaled_dot_product_attention.default in targets(unit)) is not weights
    assert targets(unit).count(aten.linear.default) == 2
    torch.testing.assert_close(unit.gm(x)[0], fn(x))


def test_what_cannot_be_kept_decomposes() -> None:
    x = torch.randn(2, 3, 4, 8)
    dropout = trace(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1), (x,))
    assert aten.scaled_dot_product_attention.default not in targets(dropout)
    vector = trace(torch.matmul, (torch.randn(4), torch.randn(4)))
    assert aten.matmul.default not in targets(vector)


def test_mutation_becomes_an_epilogue() -> None:
    unit = trace(lambda x: (x.add_(1), x * 2)[1], (torch.randn(3),))
    assert unit.mutated == {0} and targets(unit)[-1] is aten.copy_.default


def test_other_arguments_are_closed_over() -> None:
    unit = trace(lambda x, n, y: x * n + y, (torch.ones(2), 3, torch.ones(2)))
    assert torch.equal(unit.gm(torch.ones(2), torch.ones(2))[0], torch.full((2,), 4.0))
    assert unit.out_strides == ((1,),)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_like_eager(dtype: torch.dtype) -> None:
    x, w, q = torch.randn(3, 4), torch.randn(5, 4), torch.randn(1, 2, 3, 4)
    cases = [
        lambda: F.linear(x, w),
        lambda: x @ w.t(),
        lambda: F.scaled_dot_product_attention(q, q, q),
        lambda: F.layer_norm(x, (4,)),
        lambda: F.rms_norm(x, (4,)),
        lambda: F.linear(x.double(), w.double()),
    ]
    for case in cases:
        with torch.autocast("cpu", dtype):
            expected = case()
            with KeepComposites():
                got = case()
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_paused_and_left_modes_keep_nothing() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    keep = KeepComposites()
    seen: list[str] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Spy():
        with keep, keep.paused():
            F.linear(x, w)
        F.linear(x, w)
    assert "ascend_capture" not in seen
