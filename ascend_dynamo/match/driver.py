"""Runs patterns over a graph: by precedence, to a bounded fixpoint, one verified rewrite at a time."""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import GraphUnit, Match, NoMatch, PassResult
from ascend_dynamo.errors import ExpectError, PatternError
from ascend_dynamo.ir import effects
from ascend_dynamo.ir.effects import remove_dead
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.match.commit import Undone, commit
from ascend_dynamo.match.explain import Search, unmet
from ascend_dynamo.match.index import Entry, Index, count_ops
from ascend_dynamo.match.language import DeclarativePattern
from ascend_dynamo.match.lazy import one_recompile, recompile_when_called
from ascend_dynamo.match.matcher import match_alternative
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.match.sites import forced_regions, place
from ascend_dynamo.match.why import Why
from ascend_dynamo.report.records import CompileRecord, Fired, Quarantined

log = logging.getLogger("ascend_dynamo.match")

REWRITES_PER_NODE = 4  # the bound of the fixpoint
LINEAGE = 24  # a value that is the result of so many rewrites of one another is taken to be in a cycle
MISSES = 50


def run_patterns(
    unit: GraphUnit, registry: Registry, options: Any, record: CompileRecord, *, explain: bool = True
) -> PassResult:
    """Rewrite ``unit`` by the patterns of ``registry`` until none fires; fills fired, missed and quarantined.

    A pattern that raises or breaks its promise is left out of this compilation and named. ``explain=False`` leaves
    ``record.missed`` empty unless ``options.expect`` needs it.

    Raises:
        PatternError: a pattern is faulty and ``options.strict``.
        ExpectError: ``options.expect`` is not met, or (strict) a forced region did not fuse; holds the near misses.
    """
    run = _Run(unit, registry, options, record)
    with one_recompile(unit.prologue):
        run.sweep()
    complaints = unmet(record, options, run.forced)
    if explain or complaints:
        tried = [p for p in run.active if p.name not in run.quarantined]
        shut = [p for p in registry if p.level > options.level and _enabled(options, p.name)]
        search = Search(unit.gm, run.facts, run.dtypes, options.level)
        record.missed.extend(search.near_misses(tried, shut, run.failed, MISSES))
    if complaints:
        raise ExpectError("\n".join(line for c in complaints for line in c.lines(record)))
    if run.commits:
        remove_dead(unit.gm.graph)
        recompile_when_called(unit.gm)
    return PassResult(run.commits > 0)


def _enabled(options: Any, name: str) -> bool:
    return bool(options.enabled(name)) if hasattr(options, "enabled") else bool(options.patterns.get(name, True))


class _Run:
    def __init__(self, unit: GraphUnit, registry: Registry, options: Any, record: CompileRecord) -> None:
        self.unit = unit
        self.options = options
        self.record = record
        self.strict = bool(options.strict)
        self.facts = GraphFacts(unit.gm, unit.params, unit.weights)
        self.quarantined: set[str] = set()
        self.commits = 0
        self.heap: list[tuple[tuple[int, ...], fx.Node, int, Entry]] = []
        self.queued: set[tuple[fx.Node, Entry]] = set()
        self.watch: dict[fx.Node, list[tuple[fx.Node, Entry]]] = {}
        self.fresh: list[fx.Node] = []  # new calls, of which the sites above have not been told
        self.lineage: dict[fx.Node, Counter[str]] = {}
        self.failed: dict[tuple[str, fx.Node], None] = {}
        nodes = list(unit.gm.graph.nodes)
        self.dtypes: list[torch.dtype] = []
        self.limit = REWRITES_PER_NODE * len(nodes) + 64
        self.forced = forced_regions(nodes, self.facts)
        self.pure = all(map(effects.is_pure, {n.target: n for n in nodes}.values()))
        self.active = [p for p in registry if p.level <= options.level and _enabled(options, p.name)]
        self.index = Index(self.entries(registry, nodes), count_ops(nodes))
        for node in nodes:
            self.push(node)

    def entries(self, registry: Registry, nodes: list[fx.Node]) -> list[Entry]:
        """One entry per alternative of the dtypes that the graph has; tracing happens here, at first use."""
        present = {n.meta["val"].dtype for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)}
        self.dtypes = sorted(present, key=str)
        precedence = registry.precedence()
        found: list[Entry] = []
        for p in self.active:
            rank = precedence[p.name]
            if not isinstance(p, DeclarativePattern):
                found.append(Entry(rank, p, None))
                continue
            try:
                alternatives = dict.fromkeys(a for d in self.dtypes for a in p.alternatives(d))
            except PatternError as error:
                self.quarantine(p.name, error, "tracing")
                continue
            found.extend(Entry((*rank, i), p, a) for i, a in enumerate(alternatives))
        return found

    def push(self, node: fx.Node) -> None:
        if id(node.target) not in self.index.anchors:
            return
        for entry in self.index.candidates(node):
            self.enqueue(node, entry)

    def retry(self, node: fx.Node, distance: int, ops: frozenset[int]) -> None:
        """Queue what a call of ``ops``, ``distance`` above, may let match at ``node``."""
        if id(node.target) not in self.index.anchors:
            return
        for entry in self.index.candidates(node):
            if entry.may_see(distance, ops):
                self.enqueue(node, entry)

    def enqueue(self, node: fx.Node, entry: Entry) -> None:
        key = (node, entry)
        if key not in self.queued:
            self.queued.add(key)
            heapq.heappush(self.heap, (entry.rank, node, len(self.queued), entry))

    def sweep(self) -> None:
        """Work the queue off. What a rewrite may have enabled below the current precedence waits until all of one
        stratum has been tried; then those sites are queued again, all at once.
        """
        heap = self.heap
        stratum = 0
        while heap or self.fresh:
            if self.fresh and (not heap or heap[0][0][0] > stratum):
                self.requeue()
                continue
            rank, node, _, entry = heapq.heappop(heap)
            stratum = rank[0]
            self.queued.discard((node, entry))
            if node.prev.next is not node or entry.pattern.name in self.quarantined:
                continue
            try:
                found = self.match(node, entry)
            except Exception as error:
                self.quarantine(entry.pattern.name, error, node.name)
                continue
            if isinstance(found, Match):
                self.apply(found, entry)
            else:
                self.failed[(entry.pattern.name, node)] = None

    def match(self, node: fx.Node, entry: Entry) -> Match | NoMatch | None:
        if entry.alternative is None:
            return entry.pattern.match(node, self.facts)
        return match_alternative(entry.pattern, entry.alternative, node, self.facts, Why())

    def apply(self, m: Match, entry: Entry) -> None:
        p = entry.pattern
        point = place(m, p.users, self.facts, self.pure)
        if isinstance(point, NoMatch):
            self.failed[(p.name, m.anchor)] = None
            # Once the node in the way loses a user, this site may fire after all.
            self.watch.setdefault(point.node, []).append((m.anchor, entry))
            return
        ancestry = self.ancestry(m)
        if self.commits >= self.limit or ancestry[p.name] >= LINEAGE:
            found = "re-creates what it matches" if ancestry[p.name] >= LINEAGE else "takes part in endless rewriting"
            self.quarantine(
                p.name,
                PatternError(f'pattern "{p.name}" {found}: stopped after {self.commits} rewrites'),
                m.anchor.name,
            )
            return
        region, src, anchor = self.facts.region(m.anchor), self.facts.src(m.anchor), m.anchor.name
        sources = {s for n in m.nodes for s in n.all_input_nodes}
        try:
            new = commit(self.unit, self.facts, p, m, point, self.options)
        except Undone as error:
            self.quarantine(p.name, error.cause, anchor)
            return
        self.commits += 1
        self.record.fired.append(Fired(p.name, anchor, src, len(m.nodes), m.assumes, region, tuple(sorted(p.emits))))
        self.pure = self.pure and all(effects.is_pure(n) for n in new)
        ancestry[p.name] += 1
        for node in new:
            self.lineage[node] = ancestry
        self.revisit(new, sources)

    def ancestry(self, m: Match) -> Counter[str]:
        """How many rewrites of each pattern the matched nodes come from; a node of the model itself has none."""
        total: Counter[str] | None = None
        for n in m.nodes:
            own = self.lineage.get(n)
            if own is None:
                return Counter()
            total = own if total is None else total | own
        return Counter(total or {})

    def revisit(self, new: list[fx.Node], sources: set[fx.Node]) -> None:
        """Queue what has new operators just below it, and the sites that a lost user unblocks."""
        self.fresh.extend(new)
        for node in new:
            self.push(node)
            ops = frozenset((id(node.target),))
            for user in node.users:
                self.retry(user, 1, ops)
                for second in user.users:
                    self.retry(second, 2, ops)
        for source in sources:
            for node, entry in self.watch.pop(source, ()):
                self.enqueue(node, entry)

    def requeue(self) -> None:
        """Queue every site that may see a call which rewrites have added since the last time."""
        ring = [n for n in self.fresh if n.prev.next is n]
        ops = frozenset(id(n.target) for n in ring)
        self.fresh.clear()
        seen: set[fx.Node] = set(ring)
        for distance in range(self.index.reach(ops)):
            upper: list[fx.Node] = []
            for node in ring:
                self.retry(node, distance, ops)
                for user in node.users:
                    if user not in seen:
                        seen.add(user)
                        upper.append(user)
            ring = upper

    def quarantine(self, name: str, error: BaseException, site: str) -> None:
        message = f"{type(error).__name__}: {error}"
        if self.strict:
            if isinstance(error, PatternError):
                raise error
            raise PatternError(f'pattern "{name}" failed at {site}: {message}') from error
        self.quarantined.add(name)
        self.record.quarantined.append(Quarantined(name, message, site))
        log.error('pattern "%s" is left out of this compilation; it failed at %s: %s', name, site, message)
