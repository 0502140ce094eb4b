"""The driver: precedence, fixpoint, rollback, quarantine, termination, validation, caching of traces."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from match_support import RELU_ADD, SAME, captured, count, fused, ops, pair_of, relu_add
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.errors import PatternError
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.match import ProceduralPattern, Registry, declare, run_patterns
from ascend_dynamo.match.evaluate import run_unit
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord

aten = torch.ops.aten


def run(unit, *patterns, **options):
    record = CompileRecord()
    run_patterns(unit, Registry(patterns), Options(**options), record)
    return record


def text(unit):
    return graph_text(unit, sources=False)


class Relu(ProceduralPattern):
    """relu(x) -> whatever ``make`` builds."""

    anchors = (aten.relu.default,)
    domain = Domain(shapes={"x": ("*B", "H")})
    eager = (torch.relu,)

    def __init__(self, name: str, make: Any = None, **attributes: Any) -> None:
        self.name = name
        self.make = make
        for key, value in attributes.items():
            setattr(self, key, value)

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        return Match(self.name, anchor, frozenset((anchor,)), {"x": anchor.args[0]}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> Any:
        return self.make(b, m.inputs["x"])

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return (torch.randn(3, 5, dtype=dtype),)


def single(b, x):
    return (b.op(ops.single.default, x),)


def test_benefit_then_declaration_decides_and_before_comes_first():
    def model(x):
        return torch.relu(x)

    def winner(*patterns):
        (fired,) = run(captured(model, torch.randn(3, 5)), *patterns).fired
        return fired.pattern

    a, b = Relu("a", single), Relu("b", single)
    assert winner(a, b) == "a" and winner(b, a) == "b"
    assert winner(a, Relu("b", single, benefit=2)) == "b"
    assert winner(a, Relu("b", single, level=1)) == "b"
    assert winner(a, Relu("b", single, before=frozenset({"a"}))) == "b"
    assert winner(Relu("a", single, after=frozenset({"b"})), b) == "b"


def test_rewrites_feed_each_other_to_a_fixpoint():
    first = Relu("first", single)
    second = declare(
        "second",
        eager=lambda x: torch.sigmoid(ops.single(x)),
        replace=lambda x: torch.tanh(x),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    for order in ((first, second), (second, first)):
        unit = captured(lambda x: torch.sigmoid(torch.relu(x)), torch.randn(3, 5))
        record = run(unit, *order)
        assert [f.pattern for f in record.fired] == ["first", "second"]
        assert count(unit, aten.tanh.default) == 1 and count(unit, ops.single.default) == 0


def test_a_lost_user_unblocks_a_site():
    drop = declare(
        "drop",
        eager=lambda x: torch.neg(torch.sigmoid(x)),
        replace=lambda x: torch.tanh(x),
        domain=Domain(shapes={"x": ("*B", "H")}),
        after=("relu_sigmoid",),
    )
    blocked = declare(
        "relu_sigmoid",
        eager=lambda x: torch.relu(torch.sigmoid(x)),
        replace=lambda x: torch.exp(x),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    # sigmoid(x) is shared by relu and neg: neither may fire alone, and nothing changes.
    unit = captured(lambda x: torch.relu(torch.sigmoid(x)) + torch.neg(torch.sigmoid(x)), torch.randn(3, 5))
    assert not run(unit, drop, blocked).fired
    # cos(...) is rewritten away, and with it goes the other user of the sigmoid.
    forget = declare(
        "forget",
        eager=lambda x: torch.cos(torch.sigmoid(x)),
        replace=lambda x: torch.sin(x),
        users="duplicate",
        domain=Domain(shapes={"x": ("*B", "H")}),
        after=("relu_sigmoid",),
    )
    unit = captured(lambda x: torch.relu(torch.sigmoid(x)) + torch.cos(torch.sigmoid(x)), torch.randn(3, 5))
    record = run(unit, forget, blocked)
    assert sorted(f.pattern for f in record.fired) == ["forget", "relu_sigmoid"]


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda b, x: (b.op(aten.sum.dim_IntList, x, [-1]),), "changes the shape"),
        (lambda b, x: (b.op(torch.ops.prims.convert_element_type.default, x, torch.float64),), "changes the dtype"),
        (lambda b, x: (), "returned 0 nodes for 1 outputs"),
        (lambda b, x: (3.0,), "not a node"),
        (lambda b, x: single(b, x) and 1 / 0, "ZeroDivisionError"),
        (lambda b, x: (b.op(aten.reshape.default, x, [1, 2]),), "RuntimeError"),
    ],
)
def test_a_faulty_rewrite_is_rolled_back_quarantined_and_named(make, complaint, caplog):
    unit = captured(lambda x: torch.relu(x) + torch.relu(x + 1), torch.randn(3, 5))
    before = text(unit)
    with caplog.at_level(logging.ERROR, "ascend_dynamo"):
        record = run(unit, Relu("faulty", make))
    assert text(unit) == before and not record.fired
    (q,) = record.quarantined
    assert q.pattern == "faulty" and complaint in q.error and q.site == "relu"
    assert len([r for r in caplog.records if "faulty" in r.getMessage()]) == 1
    with pytest.raises(PatternError, match="faulty"):
        run(captured(torch.relu, torch.randn(3, 5)), Relu("faulty", make), strict=True)


def test_the_other_patterns_go_on_after_a_quarantine():
    unit = captured(lambda x, y: torch.relu(x + y), *pair_of(3, 5))
    record = run(unit, Relu("faulty", lambda b, x: 1 / 0, benefit=9), RELU_ADD)
    assert record.count("relu_add") == 1 and record.quarantined


def test_a_match_that_raises_is_quarantined():
    class Raises(Relu):
        def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
            raise KeyError("eps")

    record = run(captured(torch.relu, torch.randn(3, 5)), Raises("raises", single))
    assert record.quarantined[0].error == "KeyError: 'eps'"


def test_a_rewrite_that_re_creates_its_match_is_stopped():
    again = Relu("again", lambda b, x: (b.op(aten.relu.default, b.op(aten.neg.default, x)),))
    record = run(captured(torch.relu, torch.randn(3, 5)), again)
    assert "re-creates what it matches" in record.quarantined[0].error
    # Two patterns that undo each other
    to = Relu("to", lambda b, x: (b.op(aten.sigmoid.default, x),))
    back = declare(
        "back",
        eager=lambda x: torch.sigmoid(x),
        replace=lambda x: torch.relu(x),
        domain=Domain(shapes={"x": ("*B", "H")}),
    )
    record = run(captured(torch.relu, torch.randn(3, 5)), to, back)
    assert len(record.quarantined) == 1 and record.quarantined[0].pattern in ("to", "back")


def test_validation_catches_a_wrong_rewrite_in_place():
    wrong = declare("wrong", eager=relu_add, replace=lambda x, y: ops.fused(x, x), domain=SAME)
    unit = captured(relu_add, *pair_of(3, 5))
    before = text(unit)
    record = run(unit, wrong, validate=True)
    assert text(unit) == before
    assert "validation of the match at %relu failed in float64" in record.quarantined[0].error
    assert run(captured(relu_add, *pair_of(3, 5)), RELU_ADD, validate=True).count("relu_add") == 1


def test_validation_sees_prologue_values():
    def merged(b, x):
        w = next(n for n in x.graph.find_nodes(op="placeholder") if n is not x.args[0])
        return (b.op(aten.relu.default, b.op(aten.linear.default, x.args[0], b.prologue("concat0", w))),)

    class Merge(Relu):
        def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
            x = anchor.args[0]
            if x.args[1].meta.get("ascend_prologue"):
                return NoMatch("op", anchor, "a plain weight", "a merged one")
            return Match(self.name, anchor, frozenset((anchor, x)), {"x": x}, (anchor,))

        def rewrite(self, b: Builder, m: Match) -> Any:
            return merged(b, m.inputs["x"])

    x, w = torch.randn(3, 5), torch.randn(4, 5)
    unit = captured(lambda x, w: torch.relu(torch.nn.functional.linear(x, w)), x, w, params=(1,))
    record = run(unit, Merge("merge"), strict=True, validate=True)
    assert record.count("merge") == 1
    torch.testing.assert_close(run_unit(unit, [x, w])[0], torch.relu(x @ w.t()))


def test_patterns_are_traced_once_and_only_for_the_dtypes_at_hand():
    calls = []

    def counted(x, y):
        calls.append(x.dtype)
        return torch.relu(x + y)

    p = declare("counted", eager=counted, replace=fused, domain=SAME)
    assert calls == []
    run(captured(relu_add, *pair_of(3, 5)), p)
    first = len(calls)
    assert set(calls) == {torch.float32} and first <= 4
    run(captured(relu_add, *pair_of(3, 5)), p)
    assert len(calls) == first


def test_the_result_does_not_depend_on_hashing():
    texts = set()
    for _ in range(3):
        unit = captured(lambda x, y: torch.relu(x + y) * torch.relu(x + 2 * y), *pair_of(3, 5))
        run(unit, RELU_ADD, Relu("other", single))
        texts.add(text(unit))
    assert len(texts) == 1


def test_misses_are_bounded_and_nearest_first():
    def model(x):
        for _ in range(80):
            x = torch.relu(torch.add(x, x, alpha=2))
        return x

    record = run(captured(model, torch.randn(3, 5)), RELU_ADD)
    assert len(record.missed) == 50
    assert all(a.progress >= b.progress for a, b in zip(record.missed, record.missed[1:], strict=False))
