"""The tables of a report, as plain rows: one source for the text and the HTML form."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from ascend_dynamo.memory.record import MemoryBlock, MemoryRecord
from ascend_dynamo.memory.timeline import caption
from ascend_dynamo.memory.units import show_bytes
from ascend_dynamo.report.records import CompileRecord, Missed

_NUMBER = re.compile(r"(?<=[A-Za-z])_\d+\b")  # node names differ from layer to layer by this only
_PLACE = re.compile(r" at %\S+( \(\S+:\d+\))?$")


@dataclass(frozen=True)
class Table:
    """A titled table; ``note`` is one sentence above it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def where(src: tuple[str, int] | None, *, root: str | None = None) -> str:
    """``file:line``, relative to the working directory if the file is below it."""
    if src is None:
        return "?"
    path = src[0]
    base = os.getcwd() if root is None else root
    if path.startswith(base + os.sep):
        path = path[len(base) + 1 :]
    elif "site-packages" + os.sep in path:
        path = path.split("site-packages" + os.sep)[-1]
    return f"{path}:{src[1]}"


def fired(r: CompileRecord) -> Table:
    """One row per pattern and user's line, the most frequent first."""
    count: Counter[tuple[str, str, str]] = Counter()
    replaced: Counter[tuple[str, str, str]] = Counter()
    assumes: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for f in r.fired:
        key = (f.pattern, where(f.src), f.region)
        count[key] += 1
        replaced[key] += f.replaced
        assumes[key].update(f.assumes)
    rows = [
        (key[0], str(n), str(replaced[key]), key[1], key[2], "; ".join(sorted(assumes[key])))
        for key, n in sorted(count.items(), key=lambda kv: (kv[0][0], -kv[1], kv[0][1]))
    ]
    head = ("pattern", "times", "nodes replaced", "where", "region", "proven")
    return _without_empty_columns(Table("Fired", head, tuple(rows)))


def missed(r: CompileRecord, limit: int | None = None) -> Table:
    """Near misses, nearest first; the same miss in every layer is one row. ``limit`` keeps the first rows."""
    count: Counter[tuple[str, str, str, str]] = Counter()
    first: dict[tuple[str, str, str, str], Missed] = {}
    for m in r.missed:
        key = (m.pattern, _NUMBER.sub("", m.reason), where(m.src), m.fix)
        count[key] += 1
        if key not in first or m.progress > first[key].progress:
            first[key] = m
    order = sorted(count, key=lambda k: (-first[k].progress, -count[k], k))
    rows = [(k[0], f"{first[k].progress:.0%}", str(count[k]), k[2], _short(first[k]), k[3]) for k in order]
    note = ""
    if limit is not None and len(rows) > limit:
        note = f"The nearest {limit} of {len(rows)}; the HTML and JSON reports have all."
        rows = rows[:limit]
    head = ("pattern", "matched", "times", "where", "what stopped it", "what it would take")
    return _without_empty_columns(Table("Near misses", head, tuple(rows), note))


def _short(m: Missed) -> str:
    """The reason without what other columns say: the place at its end, and the fix."""
    reason = m.reason.removesuffix(f"; {m.fix}") if m.fix else m.reason
    return _PLACE.sub("", reason)


def quarantined(r: CompileRecord) -> Table:
    rows = tuple((q.pattern, q.site, q.error) for q in r.quarantined)
    return Table("Quarantined", ("pattern", "site", "error"), rows, "These failed and were left out.")


def lowered(r: CompileRecord) -> Table:
    """One row per operator, path and reason."""
    count = Counter((d.op, d.path, d.reason) for d in r.lowered)
    rows = [(op, path, str(n), reason) for (op, path, reason), n in sorted(count.items())]
    return Table("Lowering", ("operator", "path", "times", "reason"), tuple(rows))


def memory(r: CompileRecord, limit: int = 10) -> Table:
    """Who is live at the peak, the largest first; equal ones (the same line of every layer) in one row."""
    head = ("size", "times", "operator", "node", "where", "formula")
    if r.memory is None:
        return Table("Live at the peak of memory", head, ())
    groups: dict[tuple[str, str, str, str], list[MemoryBlock]] = defaultdict(list)
    for b in r.memory.live():
        groups[show_bytes(b.bytes), b.op + (" (output)" if b.output else ""), where(b.src), b.formula].append(b)
    rows = [(size, str(len(g)), op, f"%{g[0].id}", at, f) for (size, op, at, f), g in groups.items()][:limit]
    return _without_empty_columns(Table("Live at the peak of memory", head, tuple(rows), _memory_note(r.memory)))


def _memory_note(m: MemoryRecord) -> str:
    parts = [
        f"{caption(m)[:1].upper()}{caption(m)[1:]}.",
        f"Weights {show_bytes(m.weights + m.derived)}, other inputs {show_bytes(m.inputs)}, "
        f"in all {show_bytes(m.total)}.",
    ]
    if m.recorded is not None and m.ratio is not None:
        parts.append(f"A recorded call had {show_bytes(m.recorded)} of intermediates: the plan is {m.ratio:.2f} of it.")
    if m.names:
        parts.append(
            "Sizes: " + ", ".join(f"{k} = {m.sizes.get(k, '?')} ({name})" for k, name in m.names.items()) + "."
        )
    return " ".join(parts)


def seconds(r: CompileRecord) -> Table:
    """Time per pass in milliseconds, in the order in which they ran, with the share of the sum."""
    total = sum(r.seconds.values()) or 1.0
    rows = tuple((name, f"{s * 1e3:.1f}", f"{s / total:.0%}") for name, s in r.seconds.items())
    return Table("Time per pass", ("pass", "ms", "share"), rows)


def tables(r: CompileRecord, *, miss_limit: int | None = None) -> list[Table]:
    """All tables of one graph that have something to say."""
    found = [fired(r), missed(r, miss_limit), quarantined(r), lowered(r), memory(r), seconds(r)]
    return [t for t in found if t.rows]


def _without_empty_columns(t: Table) -> Table:
    keep = [i for i in range(len(t.head)) if any(row[i] for row in t.rows)]
    return Table(
        t.title,
        tuple(t.head[i] for i in keep),
        tuple(tuple(row[i] for i in keep) for row in t.rows),
        t.note,
    )
