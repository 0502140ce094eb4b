"""Lint: each fault of a pattern or of a registry is found and named; the built-in patterns have none."""

from __future__ import annotations

import random
from typing import Any

import torch
from match_support import RELU_ADD, SAME, fused, ops, relu_add
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern, Registry, declare
from ascend_dynamo.match.lint import lint, lint_pattern

aten = torch.ops.aten


def checks(*patterns: Any) -> dict[str, str]:
    return {f.check: f"{f.pattern}: {f.sentence}" for f in lint(Registry(patterns))}


class OneOrder(ProceduralPattern):
    """exp(x) + y, found only in this order."""

    name = "one_order"
    anchors = (aten.add.Tensor,)
    domain = SAME
    eager = (lambda x, y: torch.exp(x) + y,)

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        e = anchor.args[0]
        if not isinstance(e, fx.Node) or e.target is not aten.exp.default or len(anchor.args) > 2 or anchor.kwargs:
            return NoMatch("op", anchor, "exp(x) + y", "another")
        return Match(self.name, anchor, frozenset((anchor, e)), {"x": e.args[0], "y": anchor.args[1]}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        return (b.op(ops.fused.default, m.inputs["x"], m.inputs["y"]),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return torch.randn(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)


def test_a_right_pattern_has_no_findings():
    assert lint(Registry([RELU_ADD])) == []


def test_a_missing_commuted_twin():
    assert "with the operands of %add (aten.add.Tensor) exchanged" in checks(OneOrder())["commuted twin"]


def test_anchors_must_be_overloads():
    class Packet(OneOrder):
        anchors = (aten.add,)

    class Anchorless(OneOrder):
        anchors = ()

    assert "no overload" in checks(Packet())["anchors"]
    assert "never tried" in checks(Anchorless())["anchors"]


def test_faults_of_tracing_are_findings():
    arity = declare("arity", eager=relu_add, replace=lambda x, y: (ops.fused(x, y), x), domain=SAME)
    assert "the replacement returns 2" in checks(arity)["tracing"]
    dtype = declare("dtype", eager=relu_add, replace=lambda x, y: ops.fused(x, y).double(), domain=SAME)
    assert "gives torch.float64" in checks(dtype)["tracing"]
    literal = declare(
        "literal", eager=lambda x, y: torch.relu(x + y) * hash(tuple(x.shape)), replace=fused, domain=SAME
    )
    assert "varies and is no expression" in checks(literal)["tracing"]


def test_duplicates_across_patterns():
    twin = declare("twin", eager=lambda a, b: torch.relu(a + b), replace=lambda a, b: ops.fused(a, b), domain=Domain(
        shapes={"a": ("*B", "H"), "b": ("*B", "H")}))  # fmt: skip
    found = checks(RELU_ADD, declare("again", eager=relu_add, replace=fused, domain=SAME))
    assert found["duplicate"] == "again: spelling 0 is what relu_add finds already"
    assert "shadowed" in found
    assert "shadowed" in checks(RELU_ADD, twin)


def test_a_rule_that_a_broader_one_shadows():
    narrow = declare(
        "narrow", eager=lambda x, y: torch.relu(torch.exp(x) + y), replace=lambda x, y: ops.fused(x, y), domain=SAME
    )
    assert "relu_add come first" in checks(RELU_ADD, narrow)["shadowed"]
    wide = declare(
        "wide", eager=lambda x, y: torch.relu(torch.exp(x) + y), replace=lambda x, y: ops.fused(x, y), domain=SAME,
        before=("relu_add",),
    )  # fmt: skip
    assert checks(RELU_ADD, wide) == {}


def test_a_rewrite_that_contains_its_own_pattern():
    p = declare("own", eager=relu_add, replace=lambda x, y: torch.relu(y + x), domain=SAME)
    found = checks(p)
    assert "termination" in found


def test_unused_dims_and_unknown_names():
    p = declare("names", eager=relu_add, replace=fused, domain=Domain(dims={"K": (1, None)}, shapes=SAME.shapes),
                before=("nobody",), emits=("match_test.other",))  # fmt: skip
    found = checks(p)
    assert '"K", which no shape mentions' in found["domain"]
    assert '"nobody"' in found["order"] and "match_test.other" in found["emits"]


def test_inputs_that_do_not_fit_the_spelling():
    class Unfit(OneOrder):
        def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
            return torch.randn(3, 4), torch.randn(5)

    assert any(f.check == "inputs" for f in lint_pattern(Unfit()))
