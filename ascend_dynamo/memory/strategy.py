"""Which planner is asked when: orders first, then exact search, then local search and a higher target."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ascend_dynamo.memory import exact, heuristic
from ascend_dynamo.memory.buffers import Ints
from ascend_dynamo.memory.problem import Problem

LARGEST_SEARCH = 4000  # buffers: the search goes as deep as there are buffers
_SMALL_GAP, _SMALL_SHARE = 1e-3, 0.1  # a gap of 0.1 % is worth a tenth of the time


@dataclass
class Answer:
    """Offsets, what made the highest part of them, and the height below which there is provably no plan."""

    offsets: Ints
    method: str
    proven: int


def solve(problem: Problem, capacity: int | None, seconds: float) -> Answer:
    """Offsets within the capacity, or as low as can be found in about ``seconds``; never above greedy-by-size.

    Parts that share no point in time are planned one by one; a part need not be lower than the highest of the others.
    """
    deadline = time.monotonic() + seconds
    bound = problem.bound()
    target = bound if capacity is None else capacity
    answer = Answer(np.zeros(len(problem), np.int64), "nothing to place", bound)
    parts = []
    for rows in problem.sections() if len(problem) else ():
        part = problem.take(rows)
        placed, name = heuristic.best(part, target)
        answer.offsets[rows] = placed
        parts.append((part.height(placed), name, rows))
    reached = 0
    for height, name, rows in sorted(parts, key=lambda p: -p[0]):
        if height <= max(reached, target):
            if height > reached:
                reached, answer.method = height, name
            continue
        part = problem.take(rows)
        left = deadline - time.monotonic()
        if capacity is None and height <= bound * (1 + _SMALL_GAP):
            left = min(left, _SMALL_SHARE * seconds)
        made = _lower(part, answer.offsets[rows], name, max(reached, target), left, final=capacity is not None)
        answer.offsets[rows] = made.offsets
        answer.proven = max(answer.proven, made.proven)
        if part.height(made.offsets) > reached:
            reached, answer.method = part.height(made.offsets), made.method
    return answer


def _lower(part: Problem, offsets: Ints, name: str, target: int, seconds: float, *, final: bool) -> Answer:
    """Lower offsets than the given ones: to ``target`` if possible. With ``final`` nothing above it is of use."""
    answer = Answer(offsets, name, 0)
    if seconds <= 0:
        return answer  # no search was asked for, and none is compiled
    if not exact.available():
        answer.method += " (the exact search is not compiled)"
    elif len(part) <= LARGEST_SEARCH:
        _search(part, answer, target, seconds, final=final)
        return answer
    _improve(part, answer, target, seconds)
    return answer


def _search(part: Problem, answer: Answer, target: int, seconds: float, *, final: bool) -> None:
    """The target first, with most of the time; then halves the range between what failed and what is found."""
    deadline = time.monotonic() + seconds
    low, goal, share = target, target, 0.9 if final else 0.6
    while low < part.height(answer.offsets) and (left := deadline - time.monotonic()) > 0.01:
        found = exact.search(part, goal, seconds=left * share)
        if found.offsets is not None:
            answer.offsets, answer.method = found.offsets, "exact search"
        else:
            if found.impossible:
                answer.proven = max(answer.proven, goal + 1)
            if goal == target:
                _improve(part, answer, target, (deadline - time.monotonic()) * (1.0 if final else 0.3))
                if final:
                    return
            low = goal + 1
        goal, share = (low + part.height(answer.offsets) - 1) // 2, 0.3


def _improve(part: Problem, answer: Answer, target: int, seconds: float) -> None:
    improved = heuristic.improve(part, answer.offsets, target, seconds=seconds)
    if part.height(improved) < part.height(answer.offsets):
        answer.offsets, answer.method = improved, f"local search, {answer.method}"
