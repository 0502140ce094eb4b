"""The report as one standalone HTML file: styles and script inline, nothing fetched."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ascend_dynamo.memory.timeline import caption, svg
from ascend_dynamo.report.align import align
from ascend_dynamo.report.diff import columns, hunks
from ascend_dynamo.report.page import PAGE
from ascend_dynamo.report.records import CompileRecord
from ascend_dynamo.report.tables import Table, tables
from ascend_dynamo.report.text import heading, summary

if TYPE_CHECKING:
    from ascend_dynamo.report.explain import Explanation

_NUMERIC = {"times", "size", "nodes replaced", "matched", "ms", "share"}


def page(e: Explanation) -> str:
    """The HTML text of an explanation."""
    breaks = tuple((str(n), reason) for reason, n in sorted(e.graph_breaks.items(), key=lambda kv: -kv[1]))
    body = _table(Table("Graph breaks", ("times", "reason"), breaks)) if breaks else ""
    body += "\n".join(_graph(r, opened=len(e.records) == 1) for r in e.records)
    head = "<br>".join(escape(line) for line in summary(e).splitlines())
    chosen = ", ".join(f"{k}={v!r}" for k, v in e.options.items()) or "default options"
    return PAGE.substitute(title=escape(e.model), head=head, options=escape(chosen), torch=escape(e.torch), body=body)


def _graph(r: CompileRecord, *, opened: bool) -> str:
    notes = "".join(f"<p class=note>{escape(n)}</p>" for n in r.notes)
    found = "\n".join(_table(t) for t in tables(r))
    state = " open" if opened else ""
    return (
        f"<section><details{state}><summary><h2>{escape(heading(r))}</h2></summary>"
        f"{notes}{found}{_timeline(r)}{_diff(r.before, r.after)}</details></section>"
    )


def _timeline(r: CompileRecord) -> str:
    if r.memory is None or not r.memory.blocks:
        return ""
    note = f"<p class=note>{escape(caption(r.memory))}</p>"
    return f"<h3>Memory timeline</h3>{note}<div class=scroll>{svg(r.memory)}</div>"


def _table(t: Table) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in t.head)
    number = [h in _NUMERIC for h in t.head]
    body = "".join(f"<tr>{''.join(map(_td, row, number))}</tr>" for row in t.rows)
    note = f"<p class=note>{escape(t.note)}</p>" if t.note else ""
    return f"<h3>{escape(t.title)}</h3>{note}<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _td(text: str, number: bool) -> str:
    return f"<td{' class=n' if number else ''}>{escape(text)}</td>"


def _diff(before: str, after: str) -> str:
    rows = align(before, after)
    removed, added = (sum(row.kind == kind for row in rows) for kind in ("removed", "added"))
    if not removed and not added:
        return "<h3>Diff</h3><p class=note>The graph did not change.</p>"
    lines = ["<tr><th>before</th><th>after</th></tr>"]
    for shown, hidden in hunks(rows, 3):
        if hidden:
            lines.append(f"<tr class=gap><td colspan=2>{hidden} unchanged</td></tr>")
        for left, right, same in columns(shown):
            lines.append(f"<tr>{_cell(left, 'same' if same else 'del')}{_cell(right, 'same' if same else 'add')}</tr>")
    title = f"Diff: {removed} lines removed, {added} added"
    diff = f"<div class=scroll><table class=diff>{''.join(lines)}</table></div>"
    whole = f"<details class=whole><summary>The whole graph, after</summary><pre>{escape(after)}</pre></details>"
    return f"<details class=diffbox open><summary><h3>{title}</h3></summary>{diff}{whole}</details>"


def _cell(text: str | None, kind: str) -> str:
    return "<td class=none></td>" if text is None else f"<td class={kind}>{escape(text)}</td>"
