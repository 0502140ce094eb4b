"""What a grammar check found, as figures: fused of true, by production and by pair of productions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import combinations
from typing import Any

from ascend_dynamo.match.finding import Finding
from ascend_dynamo.match.grammar_check import GrammarResult, Outcome

GOAL, OVERALL = 0.95, 0.99
PAIR = 20  # a pair of productions is judged once it came up so often: then one miss is still 95 %

Counts = dict[Any, tuple[int, int]]


def overall(result: GrammarResult) -> tuple[int, int]:
    """(fused, true) over all spellings that are the operator."""
    true = [o for o in result.outcomes if not o.near]
    return sum(o.fused for o in true), len(true)


def by_production(result: GrammarResult) -> Counts:
    """(fused, true) by (dimension, production), in the order of the grammar's dimensions; defaults included."""
    return _counted(result.outcomes, lambda o: o.spelling.choices.items())


def by_pair(result: GrammarResult) -> Counts:
    """(fused, true) by pair of productions that are both not a default."""
    return _counted(result.outcomes, lambda o: combinations(sorted(o.special), 2))


def _counted(outcomes: Iterable[Outcome], keys: Any) -> Counts:
    fused: Counter[Any] = Counter()
    true: Counter[Any] = Counter()
    for o in outcomes:
        if o.near:
            continue
        for key in keys(o):
            true[key] += 1
            fused[key] += o.fused
    return {key: (fused[key], n) for key, n in true.items()}


def below(counts: Counts, goal: float = GOAL, at_least: int = 1) -> list[tuple[Any, int, int]]:
    """What fuses more seldom than ``goal``, the worst first."""
    rows = [(key, fused, n) for key, (fused, n) in counts.items() if n >= at_least and fused < goal * n]
    return sorted(rows, key=lambda row: (row[1] / row[2], -row[2], str(row[0])))


def findings(result: GrammarResult) -> list[Finding]:
    """Every wrong result as a finding."""
    return [Finding(result.grammar, "grammar", e.sentence, e.choices) for e in result.wrong]


def to_dict(result: GrammarResult) -> dict[str, Any]:
    """Plain data for JSON: all figures, all examples."""
    fused, true = overall(result)
    return {
        "grammar": result.grammar,
        "op": result.op,
        "seed": result.seed,
        "spellings": len(result.outcomes),
        "true": true,
        "fused": fused,
        "near": len(result.outcomes) - true,
        "near_fused": sum(o.near and o.fused for o in result.outcomes),
        "productions": {f"{d}={p}": list(n) for (d, p), n in by_production(result).items()},
        "pairs": {f"{a[0]}={a[1]} {b[0]}={b[1]}": list(n) for (a, b), n in by_pair(result).items()},
        "wrong": [asdict(e) for e in result.wrong],
        "missed": [asdict(e) for e in result.missed],
    }


def lines(result: GrammarResult, shown: int = 8) -> Iterator[str]:
    """A short summary: wrong results with their source, then figures, then what fuses too seldom."""
    for e in result.wrong:
        yield f"{result.grammar}: grammar: {e.sentence} [{e.choices}], {e.times} times"
        yield from (f"    {line}" for line in e.source.splitlines())
    fused, true = overall(result)
    near = len(result.outcomes) - true
    wrong = sum(bool(o.wrong) for o in result.outcomes)
    share = f"{100 * fused / true:.1f} %" if true else "none"
    yield (
        f"grammar {result.grammar}: {true} spellings, {fused} fused ({share}, goal {100 * OVERALL:.0f} %); "
        f"{near} that are near it; {wrong} wrong"
    )
    for title, counts, least in (("production", by_production(result), 1), ("pair", by_pair(result), PAIR)):
        rows = below(counts, at_least=least)
        if rows:
            yield f"  {len(rows)} of {len(counts)} {title}s below {100 * GOAL:.0f} %:"
            for key, fused, n in rows[:shown]:
                yield f"    {_named(key)}: {fused} of {n}"
    for e in sorted(result.missed, key=lambda e: -e.times)[:shown]:
        yield f"  not fused ({e.times} times): {e.choices}: {e.sentence}"


def _named(key: Any) -> str:
    return "=".join(key) if isinstance(key[0], str) else " with ".join("=".join(k) for k in key)
