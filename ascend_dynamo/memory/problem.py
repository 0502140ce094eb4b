"""Buffers as columns of numbers, and their parts that have no point in time in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ascend_dynamo.memory.buffers import Buffer, Ints

FREE = -1  # in ``fixed``: the planner chooses


@dataclass(frozen=True)
class Problem:
    """Buffers of more than 0 bytes as int64 columns; ``align`` is what each offset must be a multiple of."""

    start: Ints
    end: Ints
    size: Ints
    align: Ints
    fixed: Ints

    def __len__(self) -> int:
        return len(self.size)

    def take(self, rows: Ints) -> Problem:
        """Some of the buffers."""
        return Problem(self.start[rows], self.end[rows], self.size[rows], self.align[rows], self.fixed[rows])

    def height(self, offsets: Ints) -> int:
        """Bytes that a plan takes."""
        return int((offsets + self.size).max()) if len(self) else 0

    def unit(self) -> int:
        """Bytes of which every offset is a multiple."""
        return int(np.gcd.reduce(np.concatenate([self.align, np.maximum(self.fixed, 0)])))

    def bound(self) -> int:
        """Bytes that every plan needs. Where all offsets are multiples of g bytes, whatever lies below another buffer
        takes a multiple of g, so the peak counts rounded sizes, less the most that the rounding of one can add."""
        if not len(self):
            return 0
        unit = self.unit()
        stacked = -(-self.size // unit) * unit
        times = np.concatenate([self.end, self.start])
        order = np.argsort(times, kind="stable")
        live = np.concatenate([-stacked, stacked])[order].cumsum()
        raw = np.concatenate([-self.size, self.size])[order].cumsum()
        padded = int(live.max()) - int((stacked - self.size).max())
        held = self.fixed >= 0
        reserved = int((self.fixed + self.size)[held].max()) if held.any() else 0
        return max(int(raw.max()), padded, reserved)

    def sections(self) -> Iterator[Ints]:
        """The rows of each connected component of the overlap graph: between two of them, nothing is live."""
        order = np.lexsort((-self.end, self.start))
        reach = np.maximum.accumulate(self.end[order])
        cuts = np.flatnonzero(self.start[order][1:] >= reach[:-1]) + 1
        yield from np.split(order, cuts)


def problem_of(buffers: Sequence[Buffer], alignment: int) -> Problem:
    """The columns of checked buffers."""
    rows = [
        (b.start, b.end, b.size, math.lcm(alignment, b.alignment), FREE if b.offset is None else b.offset)
        for b in buffers
    ]
    columns = np.array(rows, np.int64).reshape(len(rows), 5).T
    return Problem(*(np.ascontiguousarray(c) for c in columns))
