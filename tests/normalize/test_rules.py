"""One small graph per rule of the normal form, and the cases in which a rule must not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ascend_dynamo.capture import make_unit, trace
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.normalize import normalize
from ascend_dynamo.normalize.casts import lossless

aten, prims = torch.ops.aten, torch.ops.prims


def calls(fn: Callable[..., Any], *args: torch.Tensor) -> list[str]:
    """The calls of the normal form of ``fn``, one line each, without dtypes and shapes."""
    unit = trace(fn, args)
    normalize(unit)
    lines = graph_text(unit, sources=False).splitlines()
    return [line.split(" = ", 1)[-1] for line in lines if not line.endswith("= input")]


X = torch.ones(2, 3, 4)
I = torch.ones(2, 3, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.permute(0, 1, 2),
        lambda x: x.transpose(0, 1).transpose(1, 0),
        lambda x: x.view(6, 4).view(2, 3, 4),
        lambda x: x[:, :, :],
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: torch.cat([x]),
        lambda x: torch.cat([x[:1], x[1:]], 0),
        lambda x: torch.cat([x, x], 1)[:, 3:],
        lambda x: x.repeat(1, 1, 1),
        lambda x: x.expand(2, 3, 4),
        lambda x: F.pad(x, (0, 0, 0, 0)),
        lambda x: x.contiguous().clone(),
        lambda x: x.to(torch.float32),
        lambda x: x.double().float(),
        lambda x: x * 1,
        lambda x: x / 1.0,
        lambda x: x - 0.0,
        lambda x: x.pow(1),
        lambda x: torch.slice_scatter(x * 2, x, 0),
        lambda x: torch.stack(x.unbind(0), 0),
        lambda x: torch.cat(x.chunk(2, -1), -1),
    ],
)
def test_identities_vanish_and_the_result_stays_a_copy(fn: Callable[..., Any]) -> None:
    shares = fn(X).data_ptr() == X.data_ptr()
    assert calls(fn, X) == (["return (%x0)"] if shares else ["aten.clone(%x0)", "return (%0)"])


@pytest.mark.parametrize(
    "fn",
    [lambda x: x + 0, lambda x: x.ceil(), lambda x: x.round(), lambda x: x.trunc(), lambda x: x.floor()],
)
def test_integers_have_more_identities(fn: Callable[..., Any]) -> None:
    assert calls(fn, I) in (["return (%x0)"], ["aten.clone(%x0)", "return (%0)"])
    assert len(calls(fn, X)) == 2
    assert "clone" not in calls(fn, X)[0]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + 0.0,  # -0.0 becomes 0.0
        lambda x: x - (-0.0),
        lambda x: x[..., ::2],
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x.to(torch.bfloat16).float(),
        lambda x: x.div(1, rounding_mode="floor"),
    ],
)
def test_what_looks_like_an_identity_stays(fn: Callable[..., Any]) -> None:
    assert "clone" not in calls(fn, X)[0]
    assert len(calls(fn, X)) >= 2


def test_integer_division_by_one_changes_the_dtype() -> None:
    assert calls(lambda x: x / 1, I) == ["aten.div.Tensor(%x0, 1)", "return (%0)"]
    assert "mul" in calls(lambda x: x * 1.0, I)[0]


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.transpose(0, -1), "aten.permute(%x0, [2, 1, 0])"),
        (lambda x: x.movedim(0, -1), "aten.permute(%x0, [1, 2, 0])"),
        (lambda x: x.transpose(0, 1).permute(2, 0, 1), "aten.permute(%x0, [2, 1, 0])"),
        (lambda x: x.view(-1, 4), "aten.reshape(%x0, [6, 4])"),
        (lambda x: x.flatten(), "aten.reshape(%x0, [24])"),
        (lambda x: x.flatten().unflatten(0, (4, 6)), "aten.reshape(%x0, [4, 6])"),
        (lambda x: x[:, 1:], "aten.slice.Tensor(%x0, 1, 1, 3, 1)"),
        (lambda x: x[:, -2:], "aten.slice.Tensor(%x0, 1, 1, 3, 1)"),
        (lambda x: x[:, 1:][:, 1:], "aten.slice.Tensor(%x0, 1, 2, 3, 1)"),
        (lambda x: x[..., ::2], "aten.slice.Tensor(%x0, 2, 0, 4, 2)"),
        (lambda x: x.narrow(2, 1, 2), "aten.slice.Tensor(%x0, 2, 1, 3, 1)"),
        (lambda x: x.chunk(2, -1)[1], "aten.slice.Tensor(%x0, 2, 2, 4, 1)"),
        (lambda x: x.split([1, 3], -1)[1], "aten.slice.Tensor(%x0, 2, 1, 4, 1)"),
        (lambda x: x.pow(2), "aten.mul.Tensor(%x0, %x0)"),
        (lambda x: x.pow(0.5), "aten.sqrt(%x0)"),
        (lambda x: x.square(), "aten.mul.Tensor(%x0, %x0)"),
        (lambda x: torch.add(x, 2, alpha=3), "aten.add.Tensor(%x0, 2, alpha=3)"),
        (lambda x: x.to(torch.bfloat16), "prims.convert_element_type(%x0, bf16)"),
        (lambda x: x.mean(2, keepdim=True), "aten.mean.dim(%x0, [-1], True)"),
        (lambda x: torch.softmax(x, 1), "aten._softmax(%x0, -2, False)"),
    ],
)
def test_one_spelling(fn: Callable[..., Any], expected: str) -> None:
    assert calls(fn, X)[0] == expected


def test_selecting_is_slicing_and_reshaping() -> None:
    assert calls(lambda x: x[:, -1], X)[:2] == ["aten.slice.Tensor(%x0, 1, 2, 3, 1)", "aten.reshape(%0, [2, 4])"]
    assert calls(lambda x: x.unbind(1)[0], X)[0] == "aten.slice.Tensor(%x0, 1, 0, 1, 1)"


def test_repeating_is_expanding() -> None:
    assert calls(lambda x: x.repeat(1, 2, 1), X)[:3] == [
        "aten.reshape(%x0, [1, 2, 1, 3, 1, 4])",
        "aten.expand(%0, [1, 2, 2, 3, 1, 4])",
        "aten.reshape(%1, [2, 6, 4])",
    ]
    assert calls(lambda x: x.expand(5, 4), torch.ones(4))[:2] == [
        "aten.reshape(%x0, [1, 4])",
        "aten.expand(%0, [5, 4])",
    ]


def test_half_precision_roots_stay_powers() -> None:
    assert calls(lambda x: x.pow(0.5), X.half())[0] == "aten.pow.Tensor_Scalar(%x0, 0.5)"


def test_products_with_a_transposed_weight_are_linear() -> None:
    x, w, b = torch.ones(2, 5, 8), torch.ones(3, 8), torch.ones(3)
    linear = ["aten.linear(%x0, %x1, %x2)", "return (%0)"]
    assert calls(lambda x, w, b: aten.addmm(b, x.view(10, 8), w.t()).view(2, 5, 3), x, w, b) == linear
    assert calls(lambda x, w: aten.mm(x.view(10, 8), w.t()).view(2, 5, 3), x, w)[0] == "aten.linear(%x0, %x1)"
    assert calls(lambda x, w: x @ w.T, x, w)[0] == "aten.linear(%x0, %x1)"
    assert calls(lambda a, b: torch.bmm(a, b.mT), x, x.clone())[1] == "aten.matmul(%x0, %0)"


@pytest.mark.parametrize("kwargs", [{"beta": 2}, {"alpha": 2}])
def test_scaled_addmm_stays(kwargs: dict[str, int]) -> None:
    x, w, b = torch.ones(5, 8), torch.ones(3, 8), torch.ones(3)
    assert "addmm" in calls(lambda x, w, b: torch.addmm(b, x, w.t(), **kwargs), x, w, b)[1]


def test_equal_calls_are_made_once_but_outputs_stay_apart() -> None:
    assert calls(lambda x: (x.exp() + x.exp(),), X) == ["aten.exp(%x0)", "aten.add.Tensor(%0, %0)", "return (%1)"]
    assert calls(lambda x: (x.exp(), x.exp()), X) == ["aten.exp(%x0)", "aten.clone(%0)", "return (%0, %1)"]


@pytest.mark.parametrize(("a", "b"), [(1, 1.0), (1, True), (0.0, -0.0)])
def test_numbers_that_compare_equal_are_not_the_same_argument(a: Any, b: Any) -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.where(x > 0, a, b), torch.full((2,), a), torch.full((2,), b)

    x = torch.ones(2)
    unit = trace(fn, (x,))
    normalize(unit)
    for expected, actual in zip(fn(x), fx.Interpreter(unit.gm).run(x), strict=True):
        assert expected.dtype == actual.dtype
        assert torch.equal(torch.signbit(expected.double()), torch.signbit(actual.double()))


def test_random_draws_are_neither_merged_nor_removed() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        return torch.rand_like(x) - torch.rand_like(x)

    assert sum("rand_like" in line for line in calls(fn, X)) == 3


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.float64, True),
        (torch.bfloat16, torch.float16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.float32, torch.bfloat16, False),
        (torch.int8, torch.float16, True),
        (torch.int16, torch.float16, False),
        (torch.int16, torch.bfloat16, False),
        (torch.int32, torch.float32, False),
        (torch.int32, torch.float64, True),
        (torch.int64, torch.float64, False),
        (torch.uint8, torch.int8, False),
        (torch.uint8, torch.int16, True),
        (torch.int8, torch.uint8, False),
        (torch.bool, torch.float16, True),
        (torch.float32, torch.bool, False),
        (torch.float32, torch.int64, False),
    ],
)
def test_which_casts_lose_nothing(a: torch.dtype, b: torch.dtype, expected: bool) -> None:
    assert lossless(a, b) is expected


def in_place(fn: Callable[..., Any], *args: torch.Tensor) -> GraphUnit:
    """A graph that writes in its middle, as custom operators and generated graphs may."""
    return make_unit(make_fx(fn, tracing_mode="fake")(*args))


def test_writes_in_the_middle_pin_what_they_touch() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        view, copy = x[:1], x.clone()
        before = x + 1
        x.mul_(3)
        own = before.clone()
        own.add_(1)
        return view * 1, copy, before, x + 1, own

    x = torch.arange(6.0).reshape(2, 3)
    unit = in_place(fn, x)
    normalize(unit)
    text = graph_text(unit)
    a, b = x.clone(), x.clone()
    for expected, actual in zip(fn(a), fx.Interpreter(unit.gm).run(b), strict=True):
        assert torch.equal(expected, actual), text
    assert torch.equal(a, b)
    normalize(unit)
    assert graph_text(unit) == text


def test_opaque_calls_keep_what_they_were_promised() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(x.t().contiguous(), (2, 2), (1, 2))

    unit = trace(fn, (torch.arange(6.0).reshape(2, 3),))
    normalize(unit)
    (node,) = unit.gm.graph.find_nodes(op="call_function", target=aten.as_strided.default)
    assert node.meta["promised_strides"] == ((2, 1),)
    normalize(unit)
    assert node.meta["promised_strides"] == ((2, 1),)


def test_small_constants_fold_and_large_ones_do_not() -> None:
    scale = torch.tensor([2.0, 3.0])
    assert calls(lambda x: x * (scale * 2), torch.ones(2))[0].startswith("const")
    assert len(calls(lambda x: x * (scale * 2), torch.ones(2))) == 3
    large = torch.ones(100)
    assert len(calls(lambda x: x * (large * 2), torch.ones(100))) == 4


def test_provenance_survives() -> None:
    compiled: list[GraphUnit] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        from ascend_dynamo import _torch_compat as compat

        def compiler(g: fx.GraphModule, _: Any) -> Any:
            unit = make_unit(g)
            normalize(unit)
            compiled.append(unit)
            return g

        return compat.aot_compile(gm, inputs, compiler)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x[:, -1].relu()

    torch.compile(model, backend=backend)(X)
    text = graph_text(compiled[0])
    assert text.count("# test_rules.py:") == 3, text


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: aten.mul.Scalar(x, 0.5), "aten.mul.Tensor(%x0, 0.5)"),
        (lambda x: aten.add.Scalar(x, 1, 2), "aten.add.Tensor(%x0, 1, alpha=2)"),
        (lambda x: aten.div.Scalar(x, 2), "aten.div.Tensor(%x0, 2)"),
        (lambda x: aten.eq.Scalar(x, 2), "aten.eq.Scalar(%x0, 2)"),
        (lambda x: aten.rsub.Tensor(x, x.exp()), "aten.sub.Tensor(%0, %x0)"),
        (lambda x: aten.rsub.Tensor(x, x.exp(), alpha=2), "aten.rsub.Tensor(%x0, %0, alpha=2)"),
        (lambda x: aten.slice.Tensor(x, 1, 1), "aten.slice.Tensor(%x0, 1, 1, 3, 1)"),
        (lambda x: aten.slice.Tensor(x, 1, 7, 9), "aten.slice.Tensor(%x0, 1, 3, 3, 1)"),
        (lambda x: prims.convert_element_type(x, torch.int32), "prims.convert_element_type(%x0, i32)"),
        (lambda x: aten.select_scatter(x, x[:, 0], 1, 2), "aten.slice_scatter(%x0, %0, 1, 2, 3, 1)"),
    ],
)
def test_overloads_called_below_autograd(fn: Callable[..., Any], expected: str) -> None:
    unit = make_unit(make_fx(fn, tracing_mode="fake")(X))
    normalize(unit)
    assert f" = {expected}\n" in graph_text(unit, sources=False)
    want, got = fn(X), fx.Interpreter(unit.gm).run(X)
    assert torch.equal(want, got)
