"""Exact search for offsets within a capacity: ``exact.cpp``, compiled once into the cache, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ascend_dynamo import native
from ascend_dynamo.errors import BuildError
from ascend_dynamo.memory.buffers import Ints
from ascend_dynamo.memory.problem import Problem

log = logging.getLogger("ascend_dynamo.memory")

_SOURCE = Path(__file__).with_name("exact.cpp")
_POINTER = ctypes.POINTER(ctypes.c_int64)


@dataclass(frozen=True)
class Found:
    """What a search came to: offsets, or proof that there are none, or neither in the time that it had."""

    offsets: Ints | None
    impossible: bool


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled search; None, with a warning, where it cannot be compiled."""
    library = native.Library(
        name="ascend_plan",
        title="memory planner",
        folder="planner",
        sources=((_SOURCE, native.FLAGS),),
        log="ascend_dynamo.memory",
    )
    try:
        loaded = ctypes.CDLL(str(native.build(library)))
    except (BuildError, OSError) as e:
        log.warning("memory plans are made by the heuristic alone, the exact search is not there: %s", e)
        return None
    search = loaded.ascend_plan_exact
    search.restype = ctypes.c_int
    number, columns = ctypes.c_int64, [_POINTER] * 7
    search.argtypes = [number, number, *columns, number, number, ctypes.c_double, ctypes.c_uint64, _POINTER]
    return loaded


def available() -> bool:
    """Whether there is a compiled search."""
    return _library() is not None


def cliques(problem: Problem) -> tuple[int, Ints, Ints]:
    """Points in time of which one is in the lifetimes of any buffers that are live together: how many, and for each
    buffer the first one in its life and the one after the last. They lie where a start is followed by an end."""
    count = len(problem)
    times = np.concatenate([problem.end, problem.start])
    order = np.argsort(times, kind="stable")
    starts = order >= count
    closes = np.zeros(2 * count, np.int64)
    closes[1:] = starts[:-1] & ~starts[1:]
    index = np.empty(2 * count, np.int64)
    index[order] = closes.cumsum()
    return int(closes.sum()), np.ascontiguousarray(index[count:]), np.ascontiguousarray(index[:count])


def search(problem: Problem, capacity: int, *, seconds: float, steps: int = 2**60, seed: int = 0) -> Found:
    """Offsets within ``capacity``, by depth-first search with restarts.

    The same seed and steps give the same result wherever ``seconds`` do not end the search first.
    """
    library = _library()
    if library is None or seconds <= 0:
        return Found(None, False)
    sections, first, last = cliques(problem)
    unit = problem.unit()
    stacked = -(-problem.size // unit) * unit
    offsets = np.empty(len(problem), np.int64)
    columns = (first, last, problem.end - problem.start, problem.size, stacked, problem.align, problem.fixed)
    outcome = library.ascend_plan_exact(
        len(problem),
        sections,
        *(np.ascontiguousarray(c).ctypes.data_as(_POINTER) for c in columns),
        capacity,
        steps,
        seconds,
        seed,
        offsets.ctypes.data_as(_POINTER),
    )
    return Found(offsets if outcome == 1 else None, outcome == 0)
