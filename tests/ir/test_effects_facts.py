"""What operators do besides computing, and what the facts say about a graph."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ascend_dynamo.capture import make_unit, trace
from ascend_dynamo.ir.effects import argument, effects_of, is_opaque, is_pure, roots, written
from ascend_dynamo.ir.facts import GraphFacts

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "writes", "views", "pure", "opaque"),
    [
        (aten.add.Tensor, (), (), True, False),
        (aten.add_.Tensor, (0,), (0,), False, False),
        (aten.add.out, ("out",), ("out",), False, False),
        (aten.copy_.default, (0,), (0,), False, False),
        (aten.view.default, (), (0,), True, False),
        (aten._unsafe_view.default, (), (0,), True, False),
        (aten.split.Tensor, (), (0,), True, False),
        (aten.clone.default, (), (), True, False),
        (aten.as_strided.default, (), (0,), True, True),
        (aten.view.dtype, (), (0,), True, True),
        (aten.rand.default, (), (), False, True),
        (aten._assert_async.msg, (), (), False, False),
        (torch.ops.higher_order.auto_functionalized_v2, (), (), False, True),
        (operator.add, (), (), True, False),
        (torch.sym_max, (), (), True, False),
        (trace, (), (), False, True),  # an unknown callable may do anything
    ],
)
def test_effects(target: Any, writes: Any, views: Any, pure: bool, opaque: bool) -> None:
    effects = effects_of(target)
    assert (effects.writes, effects.views, effects.pure, effects.opaque) == (writes, views, pure, opaque)


def test_attention_is_random_only_when_it_drops_out() -> None:
    graph = fx.Graph()
    q = graph.placeholder("q")
    quiet = graph.call_function(aten.scaled_dot_product_attention.default, (q, q, q, None, 0.0, True))
    noisy = graph.call_function(aten.scaled_dot_product_attention.default, (q, q, q, None, 0.1))
    named = graph.call_function(aten.scaled_dot_product_attention.default, (q, q, q), {"dropout_p": 0.1})
    assert [is_pure(n) for n in (quiet, noisy, named)] == [True, False, False]
    assert not is_opaque(quiet)
    assert is_pure(q)
    assert not is_pure(graph.call_method("add", (q,)))


def test_roots_follow_views_and_stop_at_copies() -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x.t().split([1, 1])
        return a[0], b.clone(), x + 1

    unit = make_unit(make_fx(fn, tracing_mode="fake")(torch.ones(3, 2)))
    x = next(iter(unit.gm.graph.nodes))
    (output,) = unit.gm.graph.find_nodes(op="output")
    view, copy, fresh = output.args[0]
    assert roots(view) == {x}
    assert roots(copy) == {copy}
    facts = GraphFacts(unit.gm)
    assert facts.may_alias(view, x)
    assert not facts.may_alias(view, copy)
    assert not facts.may_alias(fresh, x)


def test_effects_between() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        a = x + 1
        x.mul_(2)
        return a + x

    unit = make_unit(make_fx(fn, tracing_mode="fake")(torch.ones(3)))
    x, add, mul, last, output = unit.gm.graph.nodes
    facts = GraphFacts(unit.gm)
    assert facts.effects_between(add, last) == (mul,)
    assert facts.effects_between(mul, output) == ()
    assert written(mul) == (x,)
    with unit.gm.graph.inserting_before(last):
        new = unit.gm.graph.call_function(aten.zero_.default, (x,))
    facts.added(new)
    assert facts.effects_between(add, last) == (mul, new)
    unit.gm.graph.erase_node(new)
    assert facts.effects_between(add, last) == (mul,)
    assert argument(add, "alpha") is None


def test_constants_that_nobody_writes() -> None:
    table = torch.tensor([1.0, 2.0])
    unit = trace(lambda x: (x * table, torch.full((3,), 7), torch.full((x.shape[0],), 0.5)), [torch.ones(2)])
    facts = GraphFacts(unit.gm)
    (constant,) = unit.gm.graph.find_nodes(op="get_attr")
    found = facts.const(constant)
    assert found is not None
    assert torch.equal(found, table)
    fulls = unit.gm.graph.find_nodes(op="call_function", target=aten.full.default)
    assert [facts.const(n).tolist() for n in fulls] == [[7, 7, 7], [0.5, 0.5]]  # type: ignore[union-attr]
    assert facts.const(next(iter(unit.gm.graph.nodes))) is None
    with unit.gm.graph.inserting_after(constant):
        unit.gm.graph.call_function(aten.zero_.default, (constant,))
    assert GraphFacts(unit.gm).const(constant) is None


def test_where_a_node_comes_from() -> None:
    unit = trace(lambda x: x + 1, [torch.ones(2)])
    facts = GraphFacts(unit.gm)
    node = unit.gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    inside = torch.__file__
    node.meta["stack_trace"] = (
        f'File "/me/model.py", line 3, in forward\n  a\nFile "{inside}", line 9, in relu\nFile "<eval>", line 1, in x\n'
    )
    assert facts.src(node) == ("/me/model.py", 3)
    node.meta["custom"] = {"ascend_region": "no_fuse"}
    assert facts.region(node) == "no_fuse"
    del node.meta["stack_trace"], node.meta["custom"]
    assert facts.src(node) is None
    assert facts.region(node) == ""
