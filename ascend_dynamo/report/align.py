"""Align two graph texts, blind to the numbering of values.

A rewrite renumbers everything behind it, so a plain text diff of two graphs shows noise. Lines are compared by what
does not change: the type, the operator, its literals, the names of graph inputs, and the user's source line; numbered
values (``%12``) count as "some value". Lines that are unique in both texts (those that name a weight, mostly) anchor
the alignment first (a patience diff), and the gaps between the anchors are aligned by longest common subsequence.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

Kind = Literal["same", "removed", "added"]

_NUMBERED = re.compile(r"%\d+\b")
_LARGEST_GAP = 4_000_000  # cells of the quadratic aligner; a larger gap is shown as removed, then added


@dataclass(frozen=True)
class Row:
    """One line of the alignment: ``left`` is None for an added line, ``right`` is None for a removed one."""

    kind: Kind
    left: str | None
    right: str | None


def line_key(line: str) -> str:
    """What makes two lines of a graph text "the same": everything but value numbers and spacing."""
    return " ".join(_NUMBERED.sub("%_", line).split())


def align(before: str, after: str) -> list[Row]:
    """Align two graph texts line by line; the rows read from top to bottom give either text back in full."""
    a, b = before.splitlines(), after.splitlines()
    ka, kb = [line_key(x) for x in a], [line_key(x) for x in b]
    rows: list[Row] = []
    i = j = 0
    for x, y in [*_matched(ka, kb, 0, len(ka), 0, len(kb)), (len(a), len(b))]:
        rows += [Row("removed", line, None) for line in a[i:x]]
        rows += [Row("added", None, line) for line in b[j:y]]
        if x < len(a):
            rows.append(Row("same", a[x], b[y]))
        i, j = x + 1, y + 1
    return rows


def _matched(a: Sequence[str], b: Sequence[str], alo: int, ahi: int, blo: int, bhi: int) -> Iterator[tuple[int, int]]:
    while alo < ahi and blo < bhi and a[alo] == b[blo]:
        yield alo, blo
        alo, blo = alo + 1, blo + 1
    tail = 0
    while alo < ahi - tail and blo < bhi - tail and a[ahi - 1 - tail] == b[bhi - 1 - tail]:
        tail += 1
    ahi, bhi = ahi - tail, bhi - tail
    anchors = _anchors(a, b, alo, ahi, blo, bhi)
    if anchors:
        for x, y in anchors:
            yield from _matched(a, b, alo, x, blo, y)
            yield x, y
            alo, blo = x + 1, y + 1
        yield from _matched(a, b, alo, ahi, blo, bhi)
    elif (ahi - alo) * (bhi - blo) <= _LARGEST_GAP:
        matcher = SequenceMatcher(None, a[alo:ahi], b[blo:bhi], autojunk=False)
        for block in matcher.get_matching_blocks():
            for k in range(block.size):
                yield alo + block.a + k, blo + block.b + k
    for k in range(tail):
        yield ahi + k, bhi + k


def _anchors(a: Sequence[str], b: Sequence[str], alo: int, ahi: int, blo: int, bhi: int) -> list[tuple[int, int]]:
    """Pairs of lines unique on both sides, thinned to the longest run that keeps the order of both."""
    count_a, count_b = Counter(a[alo:ahi]), Counter(b[blo:bhi])
    where = {b[j]: j for j in range(blo, bhi) if count_b[b[j]] == 1}
    pairs = [(i, where[a[i]]) for i in range(alo, ahi) if count_a[a[i]] == 1 and a[i] in where]
    tops: list[int] = []  # smallest last j of an increasing run of each length
    ends: list[int] = []  # index into pairs of that run's end
    previous: list[int] = []
    for n, (_, j) in enumerate(pairs):
        length = bisect_left(tops, j)
        previous.append(ends[length - 1] if length else -1)
        if length == len(tops):
            tops.append(j)
            ends.append(n)
        else:
            tops[length], ends[length] = j, n
    chain: list[tuple[int, int]] = []
    n = ends[-1] if ends else -1
    while n >= 0:
        chain.append(pairs[n])
        n = previous[n]
    return chain[::-1]
