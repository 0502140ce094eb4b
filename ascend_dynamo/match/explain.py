"""Near misses: for every pattern that could have ended at a node, how far it got and what stopped it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, Match, NoMatch
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.language import DeclarativePattern
from ascend_dynamo.match.sites import place
from ascend_dynamo.report.records import CompileRecord, Missed


def near_misses(
    gm: fx.GraphModule,
    patterns: Sequence[Any],
    shut: Sequence[Any],
    facts: Facts,
    level: int,
    limit: int,
    failed: Mapping[tuple[str, fx.Node], None],
) -> list[Missed]:
    """The ``limit`` nearest misses of the finished graph, one per pattern and node, nearest first.

    ``failed`` are the sites at which the driver tried in vain; ``shut`` the patterns whose level was not allowed.
    """
    by_name = {p.name: p for p in patterns}
    found: list[tuple[float, int, Missed]] = []
    for order, (name, node) in enumerate(failed):
        if name in by_name and node.prev.next is node:
            reason = _reason(by_name[name], node, facts)
            if reason is not None:
                found.append((-reason.progress, order, _missed(name, node, reason, facts)))
    for pattern in shut:
        for order, node in enumerate(gm.graph.nodes):
            if node.op == "call_function" and _fits(pattern, node, facts):
                expected, got = f"level O{pattern.level}", f"level O{level}"
                reason = NoMatch(
                    "level", node, expected, got, 1.0, facts.src(node), f'set options={{"level": {pattern.level}}}'
                )
                found.append((-1.0, order, _missed(pattern.name, node, reason, facts)))
    return [m for _, _, m in heapq.nsmallest(limit, found, key=lambda item: item[:2])]


def _missed(name: str, node: fx.Node, reason: NoMatch, facts: Facts) -> Missed:
    return Missed(
        name,
        node.name,
        reason.code,
        str(reason),
        reason.progress,
        reason.src or facts.src(node),
        reason.fix,
        facts.region(node),
    )


def _reason(pattern: Any, node: fx.Node, facts: Facts) -> NoMatch | None:
    found = pattern.match(node, facts)
    if isinstance(found, NoMatch):
        return found
    point = place(found, pattern.users, facts)
    return point if isinstance(point, NoMatch) else None


def _fits(pattern: Any, node: fx.Node, facts: Facts) -> bool:
    if isinstance(pattern, DeclarativePattern):
        try:
            if node.target not in pattern.anchors:
                return False
        except PatternError:
            return False
    elif node.target not in pattern.anchors:
        return False
    return isinstance(pattern.match(node, facts), Match)


def unmet(record: CompileRecord, options: Any, forced: Mapping[str, Iterable[str]]) -> list[str]:
    """One line per expectation that does not hold: counts of ``options.expect``, and (strict) forced regions."""
    lines: list[str] = []
    for name, count in options.expect.items():
        fired = record.count(name)
        if fired != count:
            lines.append(f'expected pattern "{name}" to fire {count} times, it fired {fired} times; nearest misses:')
    if options.strict:
        for region, names in forced.items():
            for name in names:
                inside = [f for f in record.fired if f.region.startswith(region)]
                if not any(f.pattern == name or f"ascend.{name}" in f.emits for f in inside):
                    lines.append(f'region "{region}": pattern "{name}" did not fire in it; nearest misses:')
    return lines
