"""Axis labels say where the elements are: checked against the elements themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ascend_dynamo.capture import trace
from ascend_dynamo.ir.layout import axes, trace_axes
from ascend_dynamo.normalize import normalize


def last_value(fn: Callable[..., Any], *args: torch.Tensor) -> fx.Node:
    unit = trace(fn, args)
    normalize(unit)
    (output,) = unit.gm.graph.find_nodes(op="output")
    value = output.args[0][0]
    while value.target is torch.ops.aten.clone.default:
        value = value.args[0]
    return value


B, S, H, D, G = 2, 3, 4, 8, 5


@pytest.mark.parametrize(
    ("shape", "fn", "labels"),
    [
        ((B, S, H * D), lambda x: x.view(B, S, H, D), ("d0", "d1", "d2.0", "d2.1")),
        ((B, S, H * D), lambda x: x.view(B, S, H, D).transpose(1, 2), ("d0", "d2.0", "d1", "d2.1")),
        ((B, S, H * D), lambda x: x.view(B, S, D, H).permute(0, 3, 1, 2), ("d0", "d2.1", "d1", "d2.0")),
        ((B, S, H * D), lambda x: x.view(B * S, H * D), ("d0*d1", "d2")),
        ((B, H, S, D), lambda x: x.transpose(1, 2).reshape(B, S, H * D), ("d0", "d2", "d1*d3")),
        (
            (B, H, S, D),
            lambda x: x[:, :, None].expand(B, H, G, S, D).reshape(B, H * G, S, D),
            ("d0", "d1*x0", "d2", "d3"),
        ),
        ((B, H, S, D), lambda x: x.repeat(1, G, 1, 1), ("d0", "x0*d1", "d2", "d3")),
        ((B, 1, 1, S), lambda x: x.expand(B, H, S, S), ("d0", "x0", "x1", "d3")),
        ((B, S), lambda x: x[:, None, None, :], ("d0", "1", "1", "d1")),
        ((1, H, 1, D), lambda x: x.transpose(1, 2).reshape(1, 1, H * D), ("d0", "d2", "d1*d3")),
        ((S, D), lambda x: x.view(S, 2, 2, 2).flatten(1), None),
    ],
)
def test_labels(shape: tuple[int, ...], fn: Callable[..., Any], labels: tuple[str, ...] | None) -> None:
    source, found = axes(last_value(fn, torch.ones(shape)))
    assert source.op == "placeholder"
    assert found == (labels or tuple(f"d{i}" for i in range(len(shape))))


def test_what_cannot_be_followed_is_the_source() -> None:
    node = last_value(lambda x: x[:, 1:].transpose(0, 1), torch.ones(4, 6))
    source, labels = axes(node)
    assert source.target is torch.ops.aten.slice.Tensor
    assert labels == ("d1", "d0")
    node = last_value(lambda x: x.transpose(0, 1).reshape(3, 8).transpose(0, 1), torch.ones(6, 4))
    assert axes(node)[0].target is torch.ops.aten.reshape.default


def test_symbolic_sizes_divide() -> None:
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.ones(7, 5, H * D), symbolic_context=context)
    node = last_value(lambda t: t.view(t.shape[0], -1, H, D).transpose(1, 2), x)
    assert axes(node)[1] == ("d0", "d2.0", "d1", "d2.1")
    node = last_value(lambda t: t.view(t.shape[0] * t.shape[1], H, D).unflatten(0, (t.shape[0], -1)), x)
    assert axes(node)[1] == ("d0", "d1", "d2.0", "d2.1")


@given(seed=st.integers(0, 10**9))
def test_labels_tell_where_the_elements_are(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4)))

    def chain(x: torch.Tensor) -> torch.Tensor:
        draw = random.Random(seed)
        for _ in range(5):
            kind = draw.randrange(3)
            if kind == 0:
                x = x.permute(draw.sample(range(x.dim()), x.dim()))
            elif kind == 1 and x.numel() <= 200:
                x = x.unsqueeze(draw.randrange(x.dim() + 1))
                x = x.expand(*[draw.choice([2, 3]) if s == 1 and draw.random() < 0.5 else s for s in x.shape])
            else:
                x = x.reshape(_factors(x.numel(), draw))
        return x

    data = torch.arange(torch.Size(shape).numel()).reshape(shape)
    node = last_value(chain, data)
    source, traced = trace_axes(node)
    if source.op != "placeholder":
        return
    assert torch.equal(_gather(data, traced), chain(data))


def _factors(n: int, rng: random.Random) -> list[int]:
    sizes = []
    while n > 1:
        f = rng.choice([d for d in range(1, n + 1) if n % d == 0])
        sizes.append(f)
        n //= f
    return sizes or [1]


def _gather(data: torch.Tensor, traced: Any) -> torch.Tensor:
    """Rebuild the value from its axes: index arithmetic only, none of the code under test."""
    atoms = [a for axis in traced for a in axis]
    stride = {}
    for i in range(data.dim()):
        inner = 1
        for a in sorted((a for a in atoms if a.axis == i), key=lambda a: a.path, reverse=True):
            stride[a] = inner
            inner *= a.size
        assert inner in (data.shape[i], 1)
    shape = [torch.Size([a.size for a in axis]).numel() for axis in traced]
    index = [torch.zeros([a.size for a in atoms], dtype=torch.long) for _ in range(data.dim())]
    for k, a in enumerate(atoms):
        if a.axis >= 0:
            along = [1] * len(atoms)
            along[k] = a.size
            index[a.axis] = index[a.axis] + (torch.arange(a.size) * stride[a]).reshape(along)
    return data[tuple(index)].reshape(shape)
