"""Show the difference of two graph texts: unified or side by side, plain or coloured.

The alignment (see ``align``) ignores the numbers of values, so only real changes show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from ascend_dynamo.report.align import Row, align

_COLOUR = {"removed": "\x1b[31m", "added": "\x1b[32m", "same": "", "gap": "\x1b[36m"}
_PREFIX = {"removed": "-", "added": "+", "same": " "}
_RESET = "\x1b[0m"


def unified(before: str, after: str, *, context: int = 3, colour: bool = False) -> str:
    """A unified diff. ``context`` unchanged lines are kept around each change; a negative one keeps everything.

    Returns "" if the graphs are the same up to numbering.
    """
    lines: list[str] = []
    for rows, hidden in hunks(align(before, after), context):
        if hidden:
            lines.append(_paint(f"@@ {hidden} line{'s' if hidden > 1 else ''} unchanged @@", "gap", colour))
        for row in rows:
            text = row.right if row.kind != "removed" else row.left
            lines.append(_paint(f"{_PREFIX[row.kind]}{text}", row.kind, colour))
    return "\n".join(lines)


def side_by_side(before: str, after: str, *, context: int = 3, width: int = 160, colour: bool = False) -> str:
    """Two columns within ``width`` characters: removed lines stand beside the added ones that replace them."""
    half = max(20, (width - 3) // 2)
    lines: list[str] = []
    for rows, hidden in hunks(align(before, after), context):
        if hidden:
            lines.append(_paint(f"@@ {hidden} line{'s' if hidden > 1 else ''} unchanged @@", "gap", colour))
        for left, right, same in columns(rows):
            mark = " " if same else "|" if left is not None and right is not None else "<" if left else ">"
            lhs = _paint(_fit(left or "", half), "same" if same else "removed", colour)
            rhs = _paint(_fit(right or "", half).rstrip(), "same" if same else "added", colour)
            lines.append(f"{lhs} {mark} {rhs}".rstrip())
    return "\n".join(lines)


def columns(rows: Sequence[Row]) -> Iterator[tuple[str | None, str | None, bool]]:
    """(left, right, same) per printed line: a run of changes puts its removed and added lines side by side."""
    removed: list[str] = []
    added: list[str] = []
    for row in rows:
        if row.left is not None and row.right is not None:
            yield from ((x, y, False) for x, y in zip_longest(removed, added))
            removed, added = [], []
            yield row.left, row.right, True
        elif row.left is not None:
            removed.append(row.left)
        elif row.right is not None:
            added.append(row.right)
    yield from ((x, y, False) for x, y in zip_longest(removed, added))


def hunks(rows: Sequence[Row], context: int) -> Iterator[tuple[list[Row], int]]:
    """Cut an alignment into (rows to show, unchanged rows hidden in front of them); nothing changed: no hunk."""
    changed = [n for n, row in enumerate(rows) if row.kind != "same"]
    if not changed:
        return
    if context < 0:
        yield list(rows), 0
        return
    shown = 0
    while changed:
        start = max(shown, changed[0] - context)
        end = changed[0]
        while changed and changed[0] <= end + 2 * context + 1:
            end = changed.pop(0)
        stop = min(len(rows), end + context + 1)
        yield list(rows[start:stop]), start - shown
        shown = stop
    if shown < len(rows):
        yield [], len(rows) - shown


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def _paint(text: str, kind: str, colour: bool) -> str:
    return f"{_COLOUR[kind]}{text}{_RESET}" if colour and _COLOUR[kind] else text
