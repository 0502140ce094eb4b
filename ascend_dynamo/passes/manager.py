"""The pass manager: orders passes by what they declare, runs and times them."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterable, Iterator

import networkx as nx

from ascend_dynamo.contracts import GraphUnit, Pass
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord

log = logging.getLogger("ascend_dynamo.passes")


def ordered(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """``passes`` in an order that honours every ``before`` and ``after``; ties keep the given order.

    Raises:
        ValueError: two passes share a name, or the declarations contradict each other.
    """
    given = list(passes)
    by_name = {p.name: p for p in given}
    if len(by_name) < len(given):
        raise ValueError(f"two passes have the same name: {sorted(p.name for p in given)}")
    graph = nx.DiGraph()
    graph.add_nodes_from(by_name)
    for p in given:
        graph.add_edges_from((p.name, other) for other in p.before if other in by_name)
        graph.add_edges_from((other, p.name) for other in p.after if other in by_name)
    position = {p.name: i for i, p in enumerate(given)}
    try:
        names = list(nx.lexicographical_topological_sort(graph, key=position.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
        raise ValueError(f"the passes' before/after contradict each other: {cycle}") from None
    return tuple(by_name[name] for name in names)


def run_passes(passes: Iterable[Pass], unit: GraphUnit, options: Options, record: CompileRecord) -> None:
    """Run ``passes`` in order on ``unit``; notes and seconds go to ``record``."""
    for p in ordered(passes):
        start = time.perf_counter()
        with collector_paused():
            result = p.run(unit, options)
        record.seconds[p.name] = time.perf_counter() - start
        record.notes.extend(result.notes)
        log.debug("%s: %s in %.1f ms", p.name, "changed" if result.changed else "same", 1e3 * record.seconds[p.name])


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: one sweep over a process with torch in it takes longer than all passes."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
