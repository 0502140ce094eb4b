"""The grammar of attention: every production can be written, nothing is wrong, and the check itself is checked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from careless_attention import FAULTS, Careless
from pattern_support import ALL

from ascend_dynamo.match.grammar import Spelling
from ascend_dynamo.match.grammar_check import (
    Captured,
    capture_spelling,
    check_grammar,
    spellings,
    try_captured,
    try_spelling,
)
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.patterns.spellings.grammar import ATTENTION
from ascend_dynamo.report import grammar as figures

PINNED = Path(__file__).with_name("grammar_productions.txt")


def spelled(**choices: str) -> Spelling:
    return Spelling(ATTENTION.settle(ATTENTION.defaults() | choices, choices), 3)


def test_productions_are_only_ever_added():
    """The file may only grow: what was recognised once stays in the grammar."""
    have = [f"{d}={p}" for d, p in ATTENTION.productions()]
    pinned = PINNED.read_text().split()
    assert [p for p in pinned if p not in have] == [], "productions have gone"
    assert [p for p in have if p not in pinned] == [], f"new productions: append them to {PINNED.name}"


def test_every_production_can_be_drawn_and_run():
    rng = random.Random(0)
    for pinned in ATTENTION.productions():
        spelling = ATTENTION.draw(rng, pinned)
        assert spelling.choices[pinned[0]] == pinned[1]
        fn, inputs = ATTENTION.program(spelling).build(spelling.seed)
        state = torch.random.get_rng_state()
        out = fn(*(t.clone() for t in inputs.values()))
        assert isinstance(out, (torch.Tensor, tuple)), spelling.text(ATTENTION)
        again = ATTENTION.program(spelling).build(spelling.seed)[1]
        for name, value in inputs.items():
            torch.testing.assert_close(again[name], value, rtol=0, atol=0, equal_nan=True)
        if "dropout_all" not in spelling.choices.values():
            assert torch.equal(torch.random.get_rng_state(), state)


def test_same_seed_same_spellings():
    a, b = (ATTENTION.draw(random.Random(5), ("mask", "tril")) for _ in range(2))
    assert a == b and ATTENTION.program(a).source(a.seed) == ATTENTION.program(b).source(b.seed)


def test_source_is_a_script_that_runs():
    spelling = spelled(gqa="repeat_kv", mask="causal_padding", softmax="amax", layout="packed_split")
    namespace: dict[str, object] = {}
    exec(ATTENTION.program(spelling).source(spelling.seed), namespace)
    assert callable(namespace["spelling"])


@pytest.mark.parametrize("choices", [{}, {"core": "sdpa"}, {"mask": "tril_offset", "gqa": "repeat_kv"}])
def test_plain_spellings_fuse(choices):
    outcome = try_spelling(ATTENTION, spelled(**choices), ALL)
    assert outcome.fused and not outcome.wrong, outcome


@pytest.mark.slow
def test_no_wrong_results_and_almost_all_fuse():
    result = check_grammar(ATTENTION, list(ALL), budget=60, seed=1, misses=4)
    assert result.wrong == [], result.wrong[0].sentence + "\n" + result.wrong[0].source
    fused, true = figures.overall(result)
    assert true >= 20 and fused >= figures.GOAL * true, "\n".join(figures.lines(result))


# ---- the check is checked


def test_a_careful_recogniser_is_right():
    result = check_grammar(ATTENTION, [Careless()], budget=50, seed=3, misses=0)
    assert [e.choices for e in result.wrong] == []
    assert any(o.fused for o in result.outcomes)


def test_planted_faults_are_caught():
    """All of them, with the default seed and budget of ``patterns check``."""
    careless = {forget: Registry([Careless(forget)]) for forget in FAULTS}
    for spelling in spellings(ATTENTION, 300):
        captured = capture_spelling(ATTENTION, spelling)
        assert isinstance(captured, Captured), captured
        for forget in list(careless):
            outcome = try_captured(ATTENTION, captured, careless[forget])
            if outcome.wrong:
                assert outcome.fused, f"{forget}: {outcome.wrong}"
                del careless[forget]
        if not careless:
            return
    raise AssertionError(f"300 spellings did not notice a recogniser that forgets {sorted(careless)}")
