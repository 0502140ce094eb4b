"""Derived weights: made once, made again when a source changes, and never stale."""

import sys
import types

import pytest
import torch

from ascend_dynamo.capture import trace
from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.ir.transforms import Transform
from ascend_dynamo.runtime.prologue import Artifact, Bound

aten = torch.ops.aten


@pytest.fixture
def doubled(monkeypatch):  # type: ignore[no-untyped-def]
    """A copying transform in a module of its own; counts how often it ran on real weights."""
    module = types.ModuleType("ascend_dynamo_test_transforms")
    module.runs = 0

    def double(w: torch.Tensor) -> torch.Tensor:
        module.runs += type(w) is not torch._subclasses.FakeTensor
        return w * 2

    module.double = Transform(double)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def unit_with(transform: str, *rows: int):  # type: ignore[no-untyped-def]
    """``x @ transform(weights).T`` with the weights as parameters."""
    weights = [torch.randn(n, 4) for n in rows]
    unit = trace(lambda x, *w: torch.nn.functional.linear(x, torch.cat(w)), (torch.randn(2, 4), *weights))
    placeholders = unit.gm.graph.find_nodes(op="placeholder")
    unit.params = tuple(p.name for p in placeholders[1:])
    (linear,) = unit.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    builder = GraphBuilder(unit, GraphFacts(unit.gm, unit.params), linear, linear)
    merged = builder.prologue(transform, *placeholders[1:])
    linear.replace_input_with(linear.args[1], merged)
    unit.gm.graph.eliminate_dead_code()
    unit.gm.recompile()
    return unit, weights


def bound(unit, **kwargs) -> Bound:  # type: ignore[no-untyped-def]
    return Artifact(lambda args: unit.gm(*args), unit).bind(**kwargs)


def test_merged_weights_follow_every_write() -> None:
    unit, weights = unit_with("concat0", 3, 2)
    run, x = bound(unit), torch.randn(2, 4)

    def check() -> None:
        torch.testing.assert_close(run([x, *weights])[0], torch.nn.functional.linear(x, torch.cat(weights)))

    check()
    address = run.extras[0].value.data_ptr()
    weights[0].mul_(2)
    weights[1].data.add_(1)
    check()
    assert run.extras[0].value.data_ptr() == address
    weights[0].data = torch.randn(3, 4)
    check()
    weights[1] = torch.randn(2, 4)
    check()


def test_weights_that_became_shared_are_copied_and_said(caplog) -> None:  # type: ignore[no-untyped-def]
    unit, weights = unit_with("concat0", 3, 2)
    run, x = bound(unit), torch.randn(2, 4)
    twin = weights[0].detach()
    for _ in range(2):
        out = run([x, *weights])[0]
        torch.testing.assert_close(out, torch.nn.functional.linear(x, torch.cat(weights)))
    assert [r.message for r in caplog.records if "shares its memory" in r.message].__len__() == 1
    assert twin.data_ptr() == weights[0].data_ptr()


def test_copied_weights_are_made_once_per_identity(doubled) -> None:  # type: ignore[no-untyped-def]
    unit, (weight,) = unit_with("ascend_dynamo_test_transforms:double", 3)
    run, x = bound(unit), torch.randn(2, 4)
    for _ in range(3):
        torch.testing.assert_close(run([x, weight])[0], torch.nn.functional.linear(x, 2 * weight))
    assert doubled.runs == 1
    weight.mul_(3)
    torch.testing.assert_close(run([x, weight])[0], torch.nn.functional.linear(x, 2 * weight))
    assert doubled.runs == 2
    other = torch.randn(3, 4)
    torch.testing.assert_close(run([x, other])[0], torch.nn.functional.linear(x, 2 * other))


def test_strict_mode_notices_data_writes_into_copied_weights(doubled) -> None:  # type: ignore[no-untyped-def]
    unit, (weight,) = unit_with("ascend_dynamo_test_transforms:double", 3)
    run, x = bound(unit, strict=True), torch.randn(2, 4)
    run([x, weight])
    weight.data.mul_(5)
    torch.testing.assert_close(run([x, weight])[0], torch.nn.functional.linear(x, 2 * weight))


def test_a_prologue_value_may_build_on_another(doubled) -> None:  # type: ignore[no-untyped-def]
    unit, weights = unit_with("concat0", 3, 2)
    (linear,) = unit.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    builder = GraphBuilder(unit, GraphFacts(unit.gm, unit.params), linear, linear)
    twice = builder.prologue("ascend_dynamo_test_transforms:double", linear.args[1])
    linear.replace_input_with(linear.args[1], twice)
    unit.gm.recompile()
    x = torch.randn(2, 4)
    out = Artifact(lambda args: unit.gm(*args), unit).bind()([x, *weights])[0]
    torch.testing.assert_close(out, torch.nn.functional.linear(x, 2 * torch.cat(weights)))
