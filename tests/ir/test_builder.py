"""Building: values, provenance, prologue inputs, traced rewrites, and taking everything out again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.capture import trace
from ascend_dynamo.contracts import Builder, Facts, GraphUnit
from ascend_dynamo.errors import PatternError
from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.ir.verify import verify
from ascend_dynamo.normalize import normalize

aten = torch.ops.aten
X, W1, W2 = torch.randn(2, 8), torch.randn(3, 8), torch.randn(5, 8)


def two_linears() -> tuple[GraphUnit, GraphFacts, GraphBuilder]:
    unit = trace(lambda x, a, b: (F.linear(x, a), F.linear(x, b)), (X, W1, W2))
    normalize(unit)
    names = [n.name for n in unit.gm.graph.find_nodes(op="placeholder")]
    unit.params = tuple(names[1:])
    facts = GraphFacts(unit.gm, unit.params)
    before = unit.gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0]
    before.meta["stack_trace"] = 'File "/home/me/model.py", line 7, in forward\n'
    before.meta["custom"] = {"ascend_region": "fuse:x"}
    return unit, facts, GraphBuilder(unit, facts, before, before)


def test_it_is_a_builder_with_facts() -> None:
    unit, facts, b = two_linears()
    builder: Builder = b
    asked: Facts = facts
    node = builder.op(aten.relu.default, unit.gm.graph.find_nodes(op="placeholder")[0])
    assert asked.val(node).shape == (2, 8)
    assert asked.src(node) == ("/home/me/model.py", 7)
    assert asked.region(node) == "fuse:x"
    assert not asked.is_param(node)


def test_equal_calls_share_one_fake_run() -> None:
    unit, facts, b = two_linears()
    x = unit.gm.graph.find_nodes(op="placeholder")[0]
    runs = []
    compute = facts.fakes._compute
    facts.fakes._compute = lambda *a: runs.append(a) or compute(*a)  # type: ignore[method-assign, func-returns-value]
    first, second = b.op(aten.exp.default, x), b.op(aten.exp.default, x)
    assert first.meta["val"] is second.meta["val"]
    assert len(runs) == 1
    assert b.op(aten.add.Tensor, x, 1).meta["val"].dtype == torch.float32
    b.op(aten.add.Tensor, x, 1.0)
    assert len(runs) == 3


def test_a_failing_operator_raises_its_own_error() -> None:
    unit, _, b = two_linears()
    x = unit.gm.graph.find_nodes(op="placeholder")[0]
    with pytest.raises(RuntimeError):
        b.op(aten.mm.default, x, x)
    assert b.new_nodes == []


def test_prologue_merges_weights() -> None:
    unit, facts, b = two_linears()
    x, w1, w2 = unit.gm.graph.find_nodes(op="placeholder")
    merged = b.prologue("concat0", w1, w2)
    assert b.prologue("concat0", w1, w2) is merged
    other = b.prologue("concat0", w2, w1)
    assert other is not merged
    assert merged.meta["val"].shape == (8, 8)
    assert facts.may_alias(merged, w1)
    assert not facts.may_alias(merged, x)
    assert facts.is_static(merged)
    assert not facts.is_param(merged)
    linear = b.op(aten.linear.default, x, merged)
    first, second = unit.gm.graph.find_nodes(op="call_function", target=aten.linear.default)[-2:]
    first.replace_all_uses_with(b.op(aten.slice.Tensor, linear, 1, 0, 3, 1))
    second.replace_all_uses_with(b.op(aten.slice.Tensor, linear, 1, 3, 8, 1))
    verify(unit)
    derived = fx.Interpreter(unit.prologue).run(W1, W2)
    assert torch.equal(derived[0], torch.cat([W1, W2]))
    assert torch.equal(derived[1], torch.cat([W2, W1]))
    got = fx.Interpreter(unit.gm).run(X, W1, W2, *derived)
    torch.testing.assert_close(got, (F.linear(X, W1), F.linear(X, W2)))
    assert "%p0: f32[8, 8] = prologue concat0" in graph_text(unit)


def test_prologue_of_a_prologue_value() -> None:
    unit, _, b = two_linears()
    _, w1, w2 = unit.gm.graph.find_nodes(op="placeholder")
    merged = b.prologue("concat0", w1, w2)
    b.prologue("concat0", merged, w1)
    derived = fx.Interpreter(unit.prologue).run(W1, W2)
    assert torch.equal(derived[1], torch.cat([W1, W2, W1]))
    verify(unit)


@pytest.mark.parametrize(
    ("transform", "argument", "message"),
    [
        ("concat0", 0, "not a parameter"),
        ("pack", 1, "no prologue transform 'pack'"),
        ("nowhere.to.be:found", 1, "cannot import"),
        ("math:pi", 1, "no prologue transform"),
    ],
)
def test_prologue_refuses(transform: str, argument: int, message: str) -> None:
    unit, _, b = two_linears()
    text = graph_text(unit)
    with pytest.raises(PatternError, match=message):
        b.prologue(transform, unit.gm.graph.find_nodes(op="placeholder")[argument])
    assert graph_text(unit) == text


def test_erase_takes_everything_out() -> None:
    unit, _, b = two_linears()
    x, w1, w2 = unit.gm.graph.find_nodes(op="placeholder")
    text, prologue = graph_text(unit), graph_text(unit.prologue)
    b.trace(lambda t: (t * 2).sum(-1), b.op(aten.linear.default, x, b.prologue("concat0", w1, w2)))
    assert graph_text(unit) != text
    b.erase()
    assert graph_text(unit) == text
    assert graph_text(unit.prologue) == prologue
    verify(unit)


def test_traced_rewrites_are_traced_once_and_in_normal_form() -> None:
    unit, _, b = two_linears()
    x = unit.gm.graph.find_nodes(op="placeholder")[0]
    traced: list[Any] = []

    def rewrite(t: torch.Tensor, k: float) -> tuple[torch.Tensor, ...]:
        traced.append(t)
        return t.view(4, 4).t().pow(2) * k, t.unsqueeze(0).squeeze(0)

    first = b.trace(rewrite, x, 0.5)
    second = b.trace(rewrite, x, 0.5)
    assert len(traced) == 1
    b.trace(rewrite, x, 0.25)
    assert len(traced) == 2
    assert [n.target for n in b.new_nodes[:3]] == [aten.reshape.default, aten.permute.default, aten.mul.Tensor]
    assert first[0].meta["val"] is second[0].meta["val"]
    assert first[1] is not None


def test_traced_rewrites_bring_their_constants() -> None:
    unit, _, b = two_linears()
    x = unit.gm.graph.find_nodes(op="placeholder")[0]
    table = torch.arange(100.0).reshape(100, 1)[:2]
    (out,) = b.trace(lambda t: t + table, x)
    (output,) = unit.gm.graph.find_nodes(op="output")
    output.args = ((out,),)
    b.new_nodes.clear()
    verify(unit)
    assert torch.equal(fx.Interpreter(unit.gm).run(X, W1, W2)[0], X + table)


def test_symbolic_rewrites_add_no_guard() -> None:
    mode, (x,) = compat.symbolic_fakes([torch.ones(6, 10)])
    unit = trace(lambda t: (t * 2,), [x])
    normalize(unit)
    facts = GraphFacts(unit.gm)
    call = unit.gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[0]
    b = GraphBuilder(unit, facts, call, call)
    node = unit.gm.graph.find_nodes(op="placeholder")[0]
    guards = compat.guard_count(mode)
    for _ in range(2):
        (out,) = b.trace(lambda t: t.view(-1, 1, t.shape[1]).transpose(0, 1).reshape(-1) * t.shape[0], node)
    (output,) = unit.gm.graph.find_nodes(op="output")
    output.args = ((out,),)
    assert compat.guard_count(mode) == guards
    verify(unit)
    x2 = torch.randn(3, 7)
    assert torch.equal(fx.Interpreter(unit.gm).run(x2)[0], x2.reshape(-1) * 3)
    rows = b.op(aten.reshape.default, node, [x.shape[0] * x.shape[1]])
    assert isinstance(rows.args[1][0], fx.Node)  # type: ignore[index]
    with pytest.raises(Exception, match=r"[Gg]uard|must match"):
        b.op(aten.add.Tensor, node, rows)
    assert compat.guard_count(mode) == guards
