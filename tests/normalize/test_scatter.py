"""Tensors that are made by writing their parts: concatenations where the parts are known to cover the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ascend_dynamo.capture import trace
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.normalize import normalize

Fn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
A, B = torch.arange(24.0).reshape(2, 3, 4), -torch.arange(12.0).reshape(2, 3, 2)


def text(fn: Fn, a: torch.Tensor = A, b: torch.Tensor = B) -> str:
    """The normal form of ``fn(a, b)``, which is checked to give what ``fn`` gives."""
    unit = trace(fn, (a, b))
    normalize(unit)
    (got,) = fx.Interpreter(unit.gm).run(a.clone(), b.clone())
    want = fn(a.clone(), b.clone())
    assert got.dtype == want.dtype and torch.equal(got, want)
    return graph_text(unit, sources=False)


def new(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], a.shape[-1] + b.shape[-1])


def halves(a, b):
    y = new(a, b)
    y[..., :4].copy_(a)
    y[..., 4:].copy_(b)
    return y


def last_first(a, b):
    y = new(a, b)
    y[..., -2:] = b
    y[..., :-2] = a
    return y


def written_twice(a, b):
    y = new(a, b)
    y[..., 1:3] = 7.0
    y[..., :4] = a
    y[..., 4:] = a[..., :2]
    y[..., 4:] = b
    return y


def one_by_one(a, b):
    y = a.new_zeros(4, *b.shape)
    for i in range(4):
        y[i] = a[..., i : i + 1] * b
    return y


def broadcast(a, b):
    y = new(a, b)
    y[..., :4] = a[:, :1]
    y[..., 4:] = b[:1]
    return y


def narrowed(a, b):
    y = torch.empty(2, 3, 6, dtype=torch.bfloat16)
    y[..., :4] = a / 3
    y[..., 4:] = b / 7
    return y


def over_an_input(a, b):
    a[..., :2] = b
    a[..., 2:] = b
    return a * 1


@pytest.mark.parametrize(
    "fn", [halves, last_first, written_twice, one_by_one, broadcast, narrowed, over_an_input], ids=lambda f: f.__name__
)
def test_what_is_written_whole_is_a_concatenation(fn: Fn) -> None:
    found = text(fn)
    assert "slice_scatter" not in found and "aten.copy(" not in found and "new_empty" not in found
    assert found.count("aten.cat(") == 1


def a_gap(a, b):
    y = torch.zeros(2, 3, 7)
    y[..., :4] = a
    y[..., 5:] = b
    return y


def short(a, b):
    y = torch.zeros(2, 3, 7)
    y[..., :4] = a
    y[..., 4:6] = b
    return y


def overlapping(a, b):
    y = torch.zeros(2, 3, 6)
    y[..., 3:5] = b
    y[..., :4] = a
    y[..., 5:] = b[..., :1]
    return y


def two_axes(a, b):
    y = torch.zeros(2, 3, 4)
    y[:, :1] = a[:, :1]
    y[..., 2:] = b
    return y


def every_second(a, b):
    y = torch.zeros(2, 3, 4)
    y[..., ::2] = b
    y[..., 1::2] = b
    return y


def promoted(a, b):
    y = torch.cat((a.bfloat16(), b), -1)
    y[..., 4:] = b[:1]
    return y


@pytest.mark.parametrize("fn", [promoted, a_gap, short, overlapping, two_axes, every_second], ids=lambda f: f.__name__)
def test_what_is_not_known_to_be_written_whole_stays(fn: Fn) -> None:
    found = text(fn)
    assert "slice_scatter" in found and "aten.copy(" not in found


def test_arguments_are_written_out() -> None:
    assert "aten.slice_scatter(%0, %1, 2, 2, 4, 1)" in text(lambda a, b: torch.slice_scatter(a * 2, b * 3, -1, -2))


def test_reads_see_what_was_written_or_what_was_there() -> None:
    def read(a, b):
        y = a * 2
        y[..., 1:3] = b
        return torch.stack((y[..., 2], y[..., 0], y[..., 3]))

    assert "slice_scatter" not in text(read)

    def across(a, b):
        y = a * 2
        y[..., 1:3] = b
        return y[..., :2] * 1

    assert "slice_scatter" in text(across)


def test_an_output_made_of_parts_is_no_view() -> None:
    def whole(a, b):
        y = torch.empty_like(a)
        y[:] = a
        return y

    assert "aten.clone(%x0)" in text(whole)


def test_sizes_may_be_symbolic() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(torch.ones(5, 6, 4), symbolic_context=context)

    def grow(a):
        y = a.new_empty(a.shape[0], a.shape[1] + 2, 4)
        y[:, : a.shape[1]] = a
        y[:, a.shape[1] :] = a[:, :1]
        return y

    unit = trace(grow, [fake], fake_mode=mode)
    normalize(unit)
    assert "aten.cat(" in graph_text(unit) and "slice_scatter" not in graph_text(unit)
    given = torch.randn(3, 7, 4)
    assert torch.equal(fx.Interpreter(unit.gm).run(given)[0], grow(given))
