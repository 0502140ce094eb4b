"""Grammars in general: drawing, shrinking, figures; with a small one of relu(x + y)."""

from __future__ import annotations

import random

import pytest
import torch
from match_support import ops
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern
from ascend_dynamo.match.canonical import canonical
from ascend_dynamo.match.grammar import Grammar, Needs, Program, Spelling
from ascend_dynamo.match.grammar_check import check_grammar, grammars_of, spellings
from ascend_dynamo.report import check
from ascend_dynamo.report import grammar as figures

aten = torch.ops.aten
DIMENSIONS = {
    "add": ("plus", "method", "alpha"),
    "relu": ("torch", "clamp", "maximum"),
    "dtype": ("float32", "bfloat16"),
    "size": ("static", "dynamic"),
    "cast": ("none", "half"),
}


def write(choices, rng):  # type: ignore[no-untyped-def]
    add = {"plus": "x + y", "method": "x.add(y)", "alpha": "torch.add(x, y, alpha=2)"}[choices["add"]]
    if choices["cast"] == "half":
        add = f"({add}).to(torch.float16).to(x.dtype)"
    relu = {
        "torch": "torch.relu(z)",
        "clamp": "z.clamp(min=0)",
        "maximum": "torch.maximum(z, torch.zeros_like(z))",
    }[choices["relu"]]
    shape = f"{rng.choice([2, 3])}, 4, dtype=torch.{choices['dtype']}"
    inputs = {name: f"torch.randn({shape})" for name in "xy"}
    dynamic = {"x": (0,), "y": (0,)} if choices["size"] == "dynamic" else {}
    return Program(inputs, (f"z = {add}", f"return {relu}"), dynamic)


NEEDS = (Needs("cast", ("half",), {"dtype": ("float32",)}),)
NEAR = frozenset({("add", "alpha"), ("cast", "half")})
RELU = Grammar("relu_of_sum", "add_then_relu", DIMENSIONS, write, NEEDS, NEAR)


class AddRelu(ProceduralPattern):
    name = "add_then_relu"
    anchors = (aten.relu.default,)
    domain = Domain(shapes={})
    grammar = RELU

    def __init__(self, forget: str = "") -> None:
        self.forget = forget

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        nodes, add = {anchor}, anchor.args[0]
        while self.forget == "cast" and add.target is torch.ops.prims.convert_element_type.default:
            nodes.add(add)
            add = add.args[0]
        if add.target is not aten.add.Tensor or facts.val(add).dtype != facts.val(anchor).dtype:
            return NoMatch("op", anchor, "a sum", str(add.target), 0.5)
        x, y, alpha = canonical(add)
        if self.forget == "crash":
            raise RuntimeError("fell over")
        if alpha != 1 and self.forget != "alpha":
            return NoMatch("arg", add, "alpha 1", str(alpha), 0.6)
        return Match(self.name, anchor, frozenset({*nodes, add}), {"x": x, "y": y}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        return (b.op(ops.fused.default, m.inputs["x"], m.inputs["y"]),)


def spelled(**choices: str) -> Spelling:
    return Spelling(RELU.defaults() | choices, 1)


def test_draws_go_together_and_come_again():
    for pinned in RELU.productions():
        for seed in range(20):
            s = RELU.draw(random.Random(seed), pinned)
            assert s.choices[pinned[0]] == pinned[1]
            assert s.choices["cast"] == "none" or s.choices["dtype"] == "float32"
            assert s == RELU.draw(random.Random(seed), pinned)
    seen = {pair for s in spellings(RELU, 7) for pair in s.choices.items()}
    assert seen == set(RELU.productions()), "as many spellings as productions pin all of them"


def test_what_does_not_go_together():
    choices = RELU.defaults() | {"cast": "half", "dtype": "bfloat16"}
    assert RELU.settle(choices)["cast"] == "none"
    assert RELU.settle(choices, ["cast"])["dtype"] == "float32"
    with pytest.raises(ValueError, match="cast=half and dtype=bfloat16 do not go together"):
        RELU.settle(choices, ["cast", "dtype"])
    with pytest.raises(ValueError, match="the default of dtype must go with everything"):
        Grammar("g", "o", DIMENSIONS, write, (Needs("dtype", ("float32",), {"cast": ("none",)}),))
    narrow = (Needs("cast", ("half",), {"dtype": ("float32",)}), Needs("cast", ("half",), {"dtype": ("bfloat16",)}))
    with pytest.raises(ValueError, match="nothing goes together"):
        Grammar("g", "o", DIMENSIONS, write, narrow).draw(random.Random(0), ("cast", "half"))


def test_shrinking_keeps_what_matters():
    start = spelled(add="method", relu="clamp", dtype="bfloat16", size="dynamic")
    asked: list[Spelling] = []

    def still(s: Spelling) -> bool:
        asked.append(s)
        return s.choices["relu"] == "clamp" and s.choices["dtype"] == "bfloat16"

    found = RELU.shrink(start, still)
    assert RELU.special(found.choices) == [("relu", "clamp"), ("dtype", "bfloat16")] and found.seed == start.seed
    assert all(len(RELU.special(s.choices)) < 4 for s in asked)
    assert found.text(RELU) == "relu=clamp, dtype=bfloat16, seed=1"


def test_a_right_pattern_has_only_misses():
    result = check_grammar(RELU, [AddRelu()], 40)
    assert result.wrong == [] and figures.findings(result) == []
    assert [e.special for e in result.missed].count((("relu", "clamp"),)) == 1
    missed = next(e for e in result.missed if e.special == (("relu", "clamp"),))
    assert missed.times > 1 and missed.sentence == "no anchor was tried" and "z.clamp(min=0)" in missed.source
    counts = figures.by_production(result)
    assert counts["relu", "clamp"][0] == 0 and counts["add", "method"][0] > 0
    assert (("relu", "clamp"), 0, counts["relu", "clamp"][1]) in figures.below(counts)
    assert not any(key in RELU.near for key in counts), "what is near has no share to fuse"


@pytest.mark.parametrize(
    "forget, special", [("alpha", (("add", "alpha"),)), ("cast", (("cast", "half"),)), ("crash", ())]
)
def test_a_wrong_pattern_is_shown_in_its_simplest_spelling(forget, special):
    result = check_grammar(RELU, [AddRelu(forget)], 40)
    assert [e.special for e in result.wrong] == [special]
    (finding,) = figures.findings(result)
    assert (finding.pattern, finding.check) == ("relu_of_sum", "grammar")
    assert ("raises RuntimeError: fell over" if forget == "crash" else "differs in float64") in finding.sentence
    text = "\n".join(figures.lines(result))
    assert "def spelling(x, y):" in text and f"{result.wrong[0].times} times" in text
    assert sum(bool(o.wrong) for o in result.outcomes) == result.wrong[0].times


def test_a_spelling_that_does_not_run_is_a_finding():
    def broken(choices, rng):  # type: ignore[no-untyped-def]
        return Program({"x": "torch.ones(2)"}, ("return x + torch.ones(3)",))

    result = check_grammar(Grammar("broken", "o", DIMENSIONS, broken), [AddRelu()], 3)
    (only,) = result.wrong
    assert only.times == 3 and "the spelling does not run: RuntimeError" in only.sentence


def test_patterns_check_tries_grammars_once(monkeypatch):
    monkeypatch.setattr(check, "fuzz", lambda p, **k: [])
    other = AddRelu()
    assert grammars_of([AddRelu(), other, object()]) == (RELU,)
    patterns = [AddRelu("alpha")]
    result = check.check(patterns, patterns, budget=1, seed=2, spellings=12)
    assert [g.grammar for g in result.grammars] == ["relu_of_sum"] and "grammar relu_of_sum" in result.seconds
    assert any(f.check == "grammar" for f in result.findings)
    data = result.to_dict()["grammars"][0]
    assert data["spellings"] == 12 and data["true"] + data["near"] == 12 and data["productions"]["relu=torch"]
    assert any(line.startswith("grammar relu_of_sum: ") for line in check.check_lines(result))
    assert check.check(patterns, patterns, budget=1, seed=2).grammars == []
