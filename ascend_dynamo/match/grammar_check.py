"""Checking patterns against a grammar: random spellings, the share that fuses, and every result that is wrong.

A spelling is captured, normalised and rewritten by all patterns, as a model would be, and run against what it was and
against eager. Wrong ones and those that did not fuse are shrunk.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo import capture
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.dialect import SPECS
from ascend_dynamo.match.agree import UNITS
from ascend_dynamo.match.difference import difference
from ascend_dynamo.match.driver import run_patterns
from ascend_dynamo.match.fuzz import quiet
from ascend_dynamo.match.grammar import Grammar, Program, Spelling
from ascend_dynamo.match.mutate import copy_unit
from ascend_dynamo.match.record import record as recorded
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord

SHRUNK_MISSES = 40  # misses that are shrunk in one run; wrong results always are


@dataclass(frozen=True)
class Outcome:
    """What became of one spelling, whose ``special`` productions are not the default.

    ``wrong`` and ``reason`` (of a miss) are "" where there is nothing to say.
    """

    spelling: Spelling
    special: tuple[tuple[str, str], ...]
    near: bool
    fused: bool
    wrong: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Example:
    """A shrunk spelling that is wrong or did not fuse: what is special about it, what happened, and a script."""

    choices: str
    special: tuple[tuple[str, str], ...]
    sentence: str
    source: str
    times: int = 1


@dataclass
class GrammarResult:
    """All outcomes of one grammar, and the shrunk examples."""

    grammar: str
    op: str
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    wrong: list[Example] = field(default_factory=list)
    missed: list[Example] = field(default_factory=list)


def grammars_of(patterns: Iterable[Any]) -> tuple[Grammar, ...]:
    """The grammars that patterns carry in their ``grammar`` attribute, each once."""
    found = (getattr(p, "grammar", None) for p in patterns)
    return tuple({g.name: g for g in found if g is not None}.values())


def check_grammar(
    grammar: Grammar,
    patterns: Sequence[Any],
    budget: int,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
    misses: int = SHRUNK_MISSES,
) -> GrammarResult:
    """``budget`` spellings of ``grammar`` under ``patterns``; the same seed draws the same ones.

    At most ``misses`` spellings that did not fuse are shrunk. ``step`` is called after each spelling.
    """
    registry = Registry(patterns)
    result = GrammarResult(grammar.name, grammar.op, seed)
    for spelling in spellings(grammar, budget, seed):
        outcome = try_spelling(grammar, spelling, registry)
        result.outcomes.append(outcome)
        if outcome.wrong:
            _add(result.wrong, grammar, outcome, registry)
        elif outcome.reason and len(result.missed) < misses:
            _add(result.missed, grammar, outcome, registry)
        step()
    return result


def spellings(grammar: Grammar, budget: int, seed: int = 0) -> Iterator[Spelling]:
    """Random spellings; every production is pinned in turn, so that all come up before any is pinned twice."""
    rng = random.Random(f"{grammar.name} {seed}")
    order = [p for p in grammar.productions() if p[1] != grammar.dimensions[p[0]][0]]
    rng.shuffle(order)
    for i in range(budget):
        yield grammar.draw(rng, order[i % len(order)])


@dataclass(frozen=True)
class Captured:
    """A spelling as a normalised unit, its inputs, what eager gives for them, and whether it is near its grammar."""

    spelling: Spelling
    special: tuple[tuple[str, str], ...]
    near: bool
    unit: GraphUnit
    inputs: list[torch.Tensor]
    expected: list[Any]

    def became(self, fused: bool, wrong: str = "", reason: str = "") -> Outcome:
        return Outcome(self.spelling, self.special, self.near, fused, wrong, reason)


def try_spelling(grammar: Grammar, spelling: Spelling, registry: Registry) -> Outcome:
    """Capture one spelling, rewrite it, compare."""
    captured = capture_spelling(grammar, spelling)
    return captured if isinstance(captured, Outcome) else try_captured(grammar, captured, registry)


def capture_spelling(grammar: Grammar, spelling: Spelling) -> Captured | Outcome:
    """Run a spelling in eager and capture it; an outcome if one of these fails."""
    program = grammar.program(spelling)
    near = grammar.is_near(spelling.choices) or bool(program.why_near)
    special = tuple(grammar.special(spelling.choices))
    done = "the spelling does not run"
    try:
        fn, named = program.build(spelling.seed)
        with torch.no_grad(), compat.no_dispatch_modes():
            out = fn(*(t.clone() for t in named.values()))
        done = "capturing it fails"
        with quiet():
            unit = _captured(fn, named, program)
    except Exception as error:
        return Outcome(spelling, special, near, False, f"{done}: {type(error).__name__}: {error}")
    expected = list(out) if isinstance(out, (tuple, list)) else [out]
    return Captured(spelling, special, near, unit, list(named.values()), expected)


def try_captured(grammar: Grammar, captured: Captured, registry: Registry) -> Outcome:
    """Rewrite a copy of a captured spelling by the patterns of ``registry``, and compare."""
    record = CompileRecord()
    after = copy_unit(captured.unit)
    options = Options(level=3, plugins=(), strict=False, validate=False)
    with quiet():
        try:
            run_patterns(after, registry, options, record)
        except Exception as error:
            return captured.became(False, f"the driver raises {type(error).__name__}: {error}")
    fused = record.count(grammar.op) > 0
    if record.quarantined:
        first = record.quarantined[0]
        return captured.became(fused, f"{first.pattern} raises {first.error}")
    if record.fired:
        units = _units(grammar)
        fault = difference(captured.unit, after, captured.inputs, expected=captured.expected, c_ulp=units)
        if fault is not None:
            return captured.became(fused, fault.sentence)
    return captured.became(fused, "", "" if fused or captured.near else _reason(record, grammar.op, registry))


def _units(grammar: Grammar) -> float:
    return max(UNITS, SPECS[grammar.op].c_ulp) if grammar.op in SPECS else UNITS


def _captured(fn: Callable[..., Any], named: dict[str, torch.Tensor], program: Program) -> GraphUnit:
    from ascend_dynamo.normalize import normalize

    args: list[Any] = list(named.values())
    dynamic = any(program.dynamic.values())
    if dynamic:
        mode, args = compat.symbolic_fakes(args, [program.dynamic.get(name, ()) for name in named])
    else:
        mode = FakeTensorMode()
        args = [mode.from_tensor(a, static_shapes=True) for a in args]
    with torch.no_grad():
        unit = (None if dynamic else recorded(fn, args, mode)) or capture.trace(fn, args, fake_mode=mode)
        normalize(unit)
    return unit


def _reason(record: CompileRecord, op: str, registry: Registry) -> str:
    makers = {p.name for p in registry if f"ascend.{op}" in p.emits or p.name == op}
    misses = [m for m in record.missed if m.pattern in makers]
    if not misses:
        return "no anchor was tried"
    nearest = max(misses, key=lambda m: m.progress)
    return f"{nearest.pattern}: {nearest.reason}"


def _add(examples: list[Example], grammar: Grammar, outcome: Outcome, registry: Registry) -> None:
    """Shrink an outcome to a new example, unless one is known whose choices it has."""
    special = set(outcome.special)
    for i, e in enumerate(examples):
        if set(e.special) <= special and _kind(e.sentence) == _kind(outcome.wrong or outcome.reason):
            examples[i] = replace(e, times=e.times + 1)
            return
    examples.append(_shrunk(grammar, outcome, registry))


def _shrunk(grammar: Grammar, outcome: Outcome, registry: Registry) -> Example:
    """The simplest spelling of the same kind: for a difference any difference, for a miss any miss."""
    last = outcome

    def still(spelling: Spelling) -> bool:
        nonlocal last
        tried = try_spelling(grammar, spelling, registry)
        same = bool(tried.wrong) == bool(outcome.wrong) and _kind(tried.wrong or tried.reason) == _kind(
            outcome.wrong or outcome.reason
        )
        last = tried if same else last
        return same

    spelling = grammar.shrink(outcome.spelling, still)
    source = grammar.program(spelling).source(spelling.seed)
    return Example(spelling.text(grammar), last.special, last.wrong or last.reason, source)


_KINDS = ("differs", "does not run", "fails", "raises")


def _kind(sentence: str) -> str:
    """What a sentence is about; "" for nothing, "miss" for the reason of one."""
    return next((k for k in _KINDS if k in sentence), "miss" if sentence else "")
