"""``ascend-dynamo patterns check``: lint the registry, fuzz every pattern, try every grammar, tell what was found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from ascend_dynamo.contracts import Pattern
from ascend_dynamo.match import Registry
from ascend_dynamo.match.finding import Finding
from ascend_dynamo.match.fuzz import fuzz
from ascend_dynamo.match.grammar_check import GrammarResult, check_grammar, grammars_of
from ascend_dynamo.match.lint import lint
from ascend_dynamo.report import grammar as figures
from ascend_dynamo.report.progress import Progress


@dataclass
class CheckResult:
    """What was checked and what was found; ``seconds`` by pattern or grammar, lint under its own name."""

    patterns: tuple[str, ...]
    budget: int
    seed: int
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    grammars: list[GrammarResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = replace(self, grammars=[])
        return {**asdict(plain), "grammars": [figures.to_dict(g) for g in self.grammars]}


def check(
    patterns: Sequence[Pattern], among: Sequence[Pattern], *, budget: int, seed: int, spellings: int = 0
) -> CheckResult:
    """Lint ``among`` (the whole registry) as far as it concerns ``patterns``, then fuzz each of ``patterns``, then try
    ``spellings`` spellings of each grammar that they carry, under all of ``among``.

    ``budget`` is the number of cases per pattern; the same ``seed`` draws the same cases.
    """
    names = tuple(p.name for p in patterns)
    result = CheckResult(names, budget, seed)
    grammars = grammars_of(patterns) if spellings else ()
    with Progress(len(patterns) + 1 + spellings * len(grammars), "patterns check") as progress:
        start = time.perf_counter()
        result.findings += [f for f in lint(Registry(among)) if f.pattern in names or f.pattern == ""]
        result.seconds["lint"] = time.perf_counter() - start
        progress.step("lint")
        for p in patterns:
            start = time.perf_counter()
            result.findings += fuzz(p, budget=budget, seed=seed, among=[q for q in among if q.name != p.name])
            result.seconds[p.name] = time.perf_counter() - start
            progress.step(p.name)
        for grammar in grammars:
            start = time.perf_counter()
            name = f"grammar {grammar.name}"
            tried = check_grammar(grammar, among, spellings, seed, partial(progress.step, name))
            result.grammars.append(tried)
            result.findings += figures.findings(tried)
            result.seconds[name] = time.perf_counter() - start
    return result


def check_lines(r: CheckResult) -> list[str]:
    """The result as text: findings by pattern, the figures of the grammars, then one line in sum."""
    lines = [str(f) for f in r.findings if f.check != "grammar"]
    lines += [line for g in r.grammars for line in figures.lines(g)]
    faulty = {f.pattern for f in r.findings}
    head = f"{len(r.patterns)} patterns, {r.budget} cases each, seed {r.seed}, {sum(r.seconds.values()):.0f} s"
    found = f"{len(r.findings)} findings in {len(faulty)} patterns" if faulty else "no findings"
    return [*lines, f"{head}: {found}"]
