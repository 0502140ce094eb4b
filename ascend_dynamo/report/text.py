"""The report as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ascend_dynamo.report.diff import unified
from ascend_dynamo.report.records import CompileRecord
from ascend_dynamo.report.tables import Table, tables

if TYPE_CHECKING:
    from ascend_dynamo.report.explain import Explanation

_WIDEST = 60  # characters of a table cell; longer text wraps inside its cell
_MISSES = 10


def report(e: Explanation, *, colour: bool = False, diff: bool = True) -> str:
    """The whole explanation: a summary, then each graph with its tables and its diff."""
    lines = [summary(e)]
    for reason, n in sorted(e.graph_breaks.items(), key=lambda kv: -kv[1]):
        lines.append(f"graph break ({n}x): {reason}")
    for r in e.records:
        lines += ["", *_graph(r, colour, diff)]
    return "\n".join(lines)


def summary(e: Explanation) -> str:
    """Two lines: how many graphs and how long, what fired."""
    n = len(e.records)
    head = f"{e.model}: {n} graph{'' if n == 1 else 's'} compiled, first call {e.seconds:.2f} s"
    if e.records:
        head += f", target {e.records[0].target}"
    counts = ", ".join(f"{name} x{k}" for name, k in e.fired.most_common())
    return f"{head}\nfired: {counts or 'nothing'}"


def heading(r: CompileRecord) -> str:
    """One line per graph: its number, its size before and after."""
    kind = ", training graph: compiled without fusions" if r.training else ""
    return f"graph {r.index}: {r.nodes_before} -> {r.nodes_after} nodes{kind}"


def _graph(r: CompileRecord, colour: bool, diff: bool) -> list[str]:
    title = heading(r)
    lines = [title, "=" * len(title), *(f"note: {note}" for note in r.notes)]
    for table in tables(r, miss_limit=_MISSES):
        lines += ["", *format_table(table)]
    if diff:
        shown = unified(r.before, r.after, colour=colour)
        lines += ["", "Diff", "----", shown or "The graph did not change."]
    return lines


def format_table(t: Table) -> list[str]:
    """Aligned columns; long cells wrap inside their column."""
    cells = [[textwrap.wrap(c, _WIDEST, break_long_words=False) or [""] for c in row] for row in (t.head, *t.rows)]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(t.head))]
    lines = [t.title, "-" * len(t.title), *textwrap.wrap(t.note, 2 * _WIDEST)]
    for row in cells:
        for k in range(max(len(cell) for cell in row)):
            parts = [(cell[k] if k < len(cell) else "").ljust(w) for cell, w in zip(row, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
    return lines
