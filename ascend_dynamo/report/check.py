"""``ascend-dynamo patterns check``: lint the registry, fuzz every pattern, tell what was found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ascend_dynamo.contracts import Pattern
from ascend_dynamo.match import Registry
from ascend_dynamo.match.finding import Finding
from ascend_dynamo.match.fuzz import fuzz
from ascend_dynamo.match.lint import lint
from ascend_dynamo.report.progress import Progress


@dataclass
class CheckResult:
    """What was checked and what was found; ``seconds`` by pattern, lint under its own name."""

    patterns: tuple[str, ...]
    budget: int
    seed: int
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check(patterns: Sequence[Pattern], among: Sequence[Pattern], *, budget: int, seed: int) -> CheckResult:
    """Lint ``among`` (the whole registry) as far as it concerns ``patterns``, then fuzz each of ``patterns``.

    ``budget`` is the number of cases per pattern; the same ``seed`` draws the same cases.
    """
    names = tuple(p.name for p in patterns)
    result = CheckResult(names, budget, seed)
    with Progress(len(patterns) + 1, "patterns check") as progress:
        start = time.perf_counter()
        result.findings += [f for f in lint(Registry(among)) if f.pattern in names or f.pattern == ""]
        result.seconds["lint"] = time.perf_counter() - start
        progress.step("lint")
        for p in patterns:
            start = time.perf_counter()
            result.findings += fuzz(p, budget=budget, seed=seed, among=[q for q in among if q.name != p.name])
            result.seconds[p.name] = time.perf_counter() - start
            progress.step(p.name)
    return result


def check_lines(r: CheckResult) -> list[str]:
    """The result as text: findings by pattern, then one line in sum."""
    lines = [str(f) for f in r.findings]
    faulty = {f.pattern for f in r.findings}
    head = f"{len(r.patterns)} patterns, {r.budget} cases each, seed {r.seed}, {sum(r.seconds.values()):.0f} s"
    found = f"{len(r.findings)} findings in {len(faulty)} patterns" if faulty else "no findings"
    return [*lines, f"{head}: {found}"]
