"""Strides that were promised are restored, by a copy only where one is needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ascend_dynamo
from ascend_dynamo.capture import trace
from ascend_dynamo.lowering.retrace import restride, retrace


@pytest.mark.parametrize(
    "strides",
    [(12, 4, 1), (1, 2, 6), (4, 8, 1), (24, 8, 2), (0, 4, 1), (12, 4, 0)],
    ids=["same", "reversed", "swapped", "gaps", "expanded", "broadcast"],
)
def test_restride_gives_the_asked_strides(strides: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4)
    if 0 in strides:
        dim = strides.index(0)
        x = x.narrow(dim, 0, 1).expand(2, 3, 4)
    out = restride(x, strides)
    assert out.stride() == strides and torch.equal(out, x)


def test_restride_is_free_where_strides_agree() -> None:
    x = torch.randn(2, 1, 4)
    assert restride(x, (4, 99, 1)) is x  # a stride on an axis of size 1 means nothing
    assert restride(torch.empty(0, 4), (9, 9)).numel() == 0
    assert restride(3, (1,)) == 3 and restride(x, None) is x


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.permutations(range(4)), st.tuples(*[st.integers(1, 4)] * 4))
def test_restride_permutations(order: list[int], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    target = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
    out = restride(x, target.stride())
    assert torch.equal(out, x)
    assert all(a == b for a, b, n in zip(out.stride(), target.stride(), shape, strict=True) if n > 1)


def test_retrace_restores_the_strides_of_outputs() -> None:
    unit = trace(lambda x: x.permute(1, 0).contiguous(), (torch.randn(3, 5),))
    unit.out_strides = ((1, 5),)
    gm = retrace(unit, {})
    x = torch.randn(3, 5)
    (out,) = gm(x)
    assert out.stride() == (1, 5) and torch.equal(out, x.t())


def test_retrace_applies_decompositions() -> None:
    unit = trace(torch.sin, (torch.randn(3),))
    gm = retrace(unit, {torch.ops.aten.sin.default: torch.cos})
    assert torch.equal(gm(torch.zeros(2))[0], torch.ones(2))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "f", [lambda x: torch.cumsum(x, 0), lambda x: torch.bmm(x[None], x[None]), lambda x: x[torch.tensor([0, 2])]]
)
@torch.no_grad()
def test_symbolic_strides_and_constants_in_a_real_graph(f, dynamic: bool) -> None:  # type: ignore[no-untyped-def]
    torch.compiler.reset()
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True})
    x = torch.randn(5, 5)
    torch.testing.assert_close(torch.compile(f, backend=backend, dynamic=dynamic)(x), f(x))
    assert not backend.records[0].quarantined
