"""Plans by placing one buffer after the other into the gaps between those that are already placed.

Greedy-by-size (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020) is one of the
orders; the others follow the orders that MiniMalloc (Moffitt, ASPLOS 2023) and TelaMalloc (Maas et al., ASPLOS 2022)
found useful. All are deterministic: ties go to the buffer that was given first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np

from ascend_dynamo.memory.buffers import Ints
from ascend_dynamo.memory.problem import Problem


class _Skyline:
    """What is placed, by offset."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._count = 0
        # rows: start, end, offset, top
        self._placed = np.empty((4, len(problem)), np.int64)

    def add(self, row: int, offset: int) -> None:
        p, k, placed = self._problem, self._count, self._placed
        at = int(placed[2, :k].searchsorted(offset, side="right"))
        placed[:, at + 1 : k + 1] = placed[:, at:k].copy()
        placed[:, at] = p.start[row], p.end[row], offset, offset + p.size[row]
        self._count = k + 1

    def find(self, row: int, *, best: bool) -> int:
        """The lowest offset where the buffer fits, or with ``best`` the one in the tightest gap; else on top."""
        p, k, placed = self._problem, self._count, self._placed
        near = (placed[0, :k] < p.end[row]) & (placed[1, :k] > p.start[row])
        bottoms = placed[2, :k][near]
        if not len(bottoms):
            return 0
        tops = np.empty(len(bottoms) + 1, np.int64)
        tops[0] = 0
        np.maximum.accumulate(placed[3, :k][near], out=tops[1:])
        align = int(p.align[row])
        if align > 1:
            tops = -(-tops // align) * align
        room = bottoms - tops[:-1]
        fits = np.flatnonzero(room >= p.size[row])
        if not len(fits):
            return int(tops[-1])
        return int(tops[fits[room[fits].argmin()] if best else fits[0]])


def place(problem: Problem, order: Ints, *, best: bool = False) -> Ints:
    """The offsets when buffers are placed in this order, around the reserved regions."""
    offsets = problem.fixed.copy()
    skyline = _Skyline(problem)
    for row in np.flatnonzero(offsets >= 0):
        skyline.add(int(row), int(offsets[row]))
    for row in order:
        if offsets[row] < 0:
            offsets[row] = skyline.find(int(row), best=best)
            skyline.add(int(row), int(offsets[row]))
    return offsets


def greedy_by_size(problem: Problem) -> Ints:
    """The baseline: largest first, each into the tightest gap."""
    return place(problem, np.argsort(-problem.size, kind="stable"), best=True)


def contention(problem: Problem) -> Ints:
    """For each buffer, the most bytes that are live at any point of its lifetime."""
    times = np.unique(problem.start)  # the live bytes only grow where something starts
    change = np.zeros(len(times) + 1, np.int64)
    first = times.searchsorted(problem.start)
    last = times.searchsorted(problem.end)
    np.add.at(change, first, problem.size)
    np.add.at(change, last, -problem.size)
    live = change.cumsum()
    return np.array([live[a:b].max() for a, b in zip(first, last, strict=True)], np.int64)


def orders(problem: Problem) -> Iterator[tuple[str, Ints]]:
    """Orders worth trying, the most promising first."""
    size, span = problem.size, problem.end - problem.start
    area = size.astype(np.float64) * span
    live = contention(problem)
    keys: list[tuple[str, tuple[np.ndarray, ...]]] = [
        ("size", (-size,)),
        ("area", (-area,)),
        ("lifetime", (-size, -span)),
        ("contention", (-size, -live)),
        ("contention and lifetime", (-size, -span, -live)),
        ("contention and area", (-area, -live)),
        ("start", (-size, problem.start)),
        ("end", (-size, -problem.end)),
        ("size and lifetime", (-span, -size)),
    ]
    for name, columns in keys:
        yield name, np.lexsort(columns)


PLACEMENTS = 12_000  # how many buffers may be placed in all: about half a second
CHANGES = 40_000  # likewise for the local search


def best(problem: Problem, target: int) -> tuple[Ints, str]:
    """The lowest plan of several orders, and its name; stops at ``target``. Never above greedy-by-size."""
    found, name = greedy_by_size(problem), "greedy by size"
    height = problem.height(found)
    tries = (
        (f"{order}, {fit} fit", rows, fit == "best") for order, rows in orders(problem) for fit in ("first", "best")
    )
    for tried, rows, tight in itertools.islice(tries, max(3, PLACEMENTS // max(1, len(problem)))):
        if height <= target:
            break
        offsets = place(problem, rows, best=tight)
        if problem.height(offsets) < height:
            found, height, name = offsets, problem.height(offsets), tried
    return found, name


def improve(problem: Problem, offsets: Ints, target: int, *, seconds: float, seed: int = 0) -> Ints:
    """Local search over orders, from the order of the given offsets: what reaches the top moves ahead, and pairs swap.

    A change stays if the plan is not higher. The same seed gives the same plan wherever ``seconds`` do not end the
    search before its number of changes does.
    """
    rng = np.random.default_rng(seed)
    deadline = time.monotonic() + seconds
    found, height = offsets, problem.height(offsets)
    order = np.lexsort((-problem.size, offsets))
    for _ in range(CHANGES // max(1, len(problem))):
        if height <= target or time.monotonic() > deadline:
            break
        changed = order.copy()
        ends = (found + problem.size)[order]
        top = int(rng.choice(np.flatnonzero(ends == height)))
        _move(changed, top, int(rng.integers(0, top + 1)))
        if rng.random() < 0.5:
            a, b = rng.integers(0, len(order), 2)
            changed[[a, b]] = changed[[b, a]]
        tried = place(problem, changed)
        if problem.height(tried) <= height:
            order, found, height = changed, tried, problem.height(tried)
    return found


def _move(order: Ints, source: int, target: int) -> None:
    """One element further to the front."""
    row = order[source]
    order[target + 1 : source + 1] = order[target:source].copy()
    order[target] = row
