"""Near misses: for every pattern that could have ended at a node, how far it got and what stopped it."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, Match, NoMatch
from ascend_dynamo.match.language import DeclarativePattern
from ascend_dynamo.match.sites import place
from ascend_dynamo.report.records import CompileRecord, Missed

TRIED = 50  # sites of a pattern at which the driver failed
UNTRIED = 12  # sites of a pattern that the index ruled out: that it has the anchor's operator says little
WORTH = 0.3  # how much of a pattern must be there for such a site to be worth a line


@dataclass(frozen=True)
class Search:
    """Explains one graph after all rewriting, on which the patterns of ``dtypes`` have been traced."""

    gm: fx.GraphModule
    facts: Facts
    dtypes: Sequence[torch.dtype]
    level: int

    def near_misses(
        self, patterns: Sequence[Any], shut: Sequence[Any], failed: Mapping[tuple[str, fx.Node], None], limit: int
    ) -> list[Missed]:
        """The ``limit`` nearest misses, one per pattern and node, nearest first.

        Of a pattern that sets ``reports_all`` every site that is worth a line is among them, whatever the limit.
        ``failed`` are the sites at which the driver tried in vain; ``shut`` the patterns whose level is not allowed.
        """
        calls = self.gm.graph.nodes
        by_op: dict[Any, list[fx.Node]] = {}
        for node in calls:
            if node.op == "call_function":
                by_op.setdefault(node.target, []).append(node)
        found: list[tuple[float, int, Missed]] = []
        always: list[tuple[float, int, Missed]] = []
        for pattern in patterns:
            every = getattr(pattern, "reports_all", False)
            sites = [n for name, n in failed if name == pattern.name and n.prev.next is n][: None if every else TRIED]
            others = [n for op in self.anchors(pattern) for n in by_op.get(op, ()) if n not in sites][:UNTRIED]
            for node in (*sites, *others):
                reason = self.reason(pattern, node)
                if reason is not None and (node in sites or reason.progress >= WORTH):
                    into = always if every and reason.progress >= WORTH else found
                    into.append((-reason.progress, len(found), self.missed(pattern.name, node, reason)))
        for pattern in shut:
            fix = f'set options={{"level": {pattern.level}}}'
            for node in [n for op in self.anchors(pattern) for n in by_op.get(op, ())]:
                if isinstance(self.match(pattern, node), Match):
                    want, have = f"level O{pattern.level}", f"level O{self.level}"
                    reason = NoMatch("level", node, want, have, 1.0, self.facts.src(node), fix)
                    found.append((-1.0, len(found), self.missed(pattern.name, node, reason)))
        nearest = heapq.nsmallest(max(limit - len(always), 0), found, key=lambda item: item[:2])
        return [m for _, _, m in sorted((*always, *nearest), key=lambda item: item[0])]

    def anchors(self, pattern: Any) -> Iterable[Any]:
        if isinstance(pattern, DeclarativePattern):
            return dict.fromkeys(a.anchor for a in pattern.alternatives_for(self.dtypes))
        return tuple(pattern.anchors)

    def match(self, pattern: Any, node: fx.Node) -> Any:
        if isinstance(pattern, DeclarativePattern):
            return pattern.match(node, self.facts, self.dtypes)
        return pattern.match(node, self.facts)

    def reason(self, pattern: Any, node: fx.Node) -> NoMatch | None:
        """Why ``pattern`` is not rewritten at ``node``; None if it could be (the bound on rewriting was reached)."""
        found = self.match(pattern, node)
        if isinstance(found, NoMatch):
            return found
        point = place(found, pattern.users, self.facts)
        return point if isinstance(point, NoMatch) else None

    def missed(self, name: str, node: fx.Node, reason: NoMatch) -> Missed:
        src = reason.src or self.facts.src(node)
        region = self.facts.region(node)
        return Missed(name, node.name, reason.code, str(reason), reason.progress, src, reason.fix, region)


@dataclass(frozen=True)
class Complaint:
    """An expectation that does not hold, about one pattern."""

    pattern: str
    sentence: str

    def lines(self, record: CompileRecord) -> list[str]:
        """The sentence, then the nearest misses of the pattern (if it has none, of any)."""
        own = [m for m in record.missed if m.pattern == self.pattern]
        misses = [f"  {m.pattern} at %{m.anchor}: {m.reason}" for m in (own or record.missed)[:8]]
        return [self.sentence + ("; nearest misses:" if misses else "; nothing came near"), *misses]


def unmet(record: CompileRecord, options: Any, forced: Mapping[str, Iterable[str]]) -> list[Complaint]:
    """Every expectation that does not hold: counts of ``options.expect``, and (strict) forced regions."""
    found: list[Complaint] = []
    for name, count in options.expect.items():
        fired = record.count(name)
        if fired != count:
            sentence = f'expected pattern "{name}" to fire {count} times, it fired {fired} times'
            found.append(Complaint(name, sentence))
    if options.strict:
        for region, names in forced.items():
            for name in names:
                inside = [f for f in record.fired if f.region.startswith(region)]
                if not any(f.pattern == name or f"ascend.{name}" in f.emits for f in inside):
                    found.append(Complaint(name, f'region "{region}": pattern "{name}" did not fire in it'))
    return found
