"""Where each buffer lies in one block of memory: dynamic storage allocation, offline.

Orders of placing first (``heuristic.py``), then exact search (``exact.cpp``) where they miss the bound; see there for
the papers.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from ascend_dynamo.errors import CapacityError, MemoryPlanError
from ascend_dynamo.memory.buffers import Buffer, check_buffers, lower_bound
from ascend_dynamo.memory.problem import problem_of
from ascend_dynamo.memory.strategy import solve


@dataclass(frozen=True)
class Plan:
    """Offsets of buffers.

    Attributes:
        offsets: bytes from the start of the block, by the buffers' ids.
        size: bytes of the block.
        lower_bound: the peak of live bytes: no plan can be smaller.
        optimal: no smaller plan exists (proven).
        method: how the plan was found.
        buffers: what was planned.
    """

    offsets: dict[str, int]
    size: int
    lower_bound: int
    optimal: bool
    method: str
    buffers: tuple[Buffer, ...] = field(repr=False, default=())

    def check(self) -> None:
        """Verify the plan by a sweep over time, with none of the planner's own code.

        Raises:
            MemoryPlanError: two live buffers overlap, one leaves the block, or an offset is not the reserved one.
        """
        for b in self.buffers:
            offset = self.offsets[b.id]
            if offset < 0 or offset + b.size > self.size:
                raise MemoryPlanError(f"buffer {b.id!r} at {offset} with {b.size} bytes leaves the {self.size} bytes")
            if offset % b.alignment and b.offset is None:
                raise MemoryPlanError(f"buffer {b.id!r} at {offset} is not aligned to {b.alignment} bytes")
            if b.offset is not None and offset != b.offset:
                raise MemoryPlanError(f"buffer {b.id!r} is reserved at {b.offset}, but was put at {offset}")
        clash = find_overlap(self.buffers, self.offsets)
        if clash is not None:
            a, b = clash
            raise MemoryPlanError(
                f"buffers {a.id!r} (offset {self.offsets[a.id]}, size {a.size}) and {b.id!r} (offset "
                f"{self.offsets[b.id]}, size {b.size}) overlap during [{max(a.start, b.start)}, {min(a.end, b.end)})"
            )


def find_overlap(buffers: Sequence[Buffer], offsets: dict[str, int]) -> tuple[Buffer, Buffer] | None:
    """Two buffers that are live at once and share a byte, or None.

    A sweep over time: the live buffers stay sorted by offset, so a newcomer can only collide with its neighbours.
    """
    events = [(b.end, 0, i) for i, b in enumerate(buffers)] + [(b.start, 1, i) for i, b in enumerate(buffers)]
    live: list[tuple[int, int]] = []
    for _, starts, i in sorted(events):
        b = buffers[i]
        if b.size == 0:
            continue
        key = (offsets[b.id], i)
        at = bisect.bisect_left(live, key)
        if not starts:
            del live[at]
            continue
        if at > 0 and live[at - 1][0] + buffers[live[at - 1][1]].size > key[0]:
            return buffers[live[at - 1][1]], b
        if at < len(live) and key[0] + b.size > live[at][0]:
            return buffers[live[at][1]], b
        live.insert(at, key)
    return None


def assign_offsets(
    buffers: Sequence[Buffer], *, capacity: int | None = None, alignment: int = 64, seconds: float = 10.0
) -> Plan:
    """Give each buffer an offset so that no two that are live at once share a byte.

    Args:
        buffers: what to place; those with an ``offset`` are reserved regions and stay where they are.
        capacity: bytes that the plan may take; None: as few as can be found.
        alignment: every offset is a multiple of this and of the buffer's own alignment.
        seconds: about the most time that the search may take, where placing in several orders is not enough; without a
            search, buffers are placed in half a second. Plans are repeatable wherever the search ends by itself.

    Raises:
        MemoryPlanError: the buffers make no sense (see ``check_buffers``).
        CapacityError: the capacity is below what every plan needs, or no plan within it was found in time.
    """
    buffers = tuple(buffers)
    check_buffers(buffers, alignment)
    bound = lower_bound(buffers)
    if capacity is not None and capacity < bound:
        raise CapacityError(
            f"the capacity of {capacity} bytes is {bound - capacity} bytes too small: {bound} bytes are live at once",
            needed=bound,
            capacity=capacity,
        )
    used = [b for b in buffers if b.size > 0]
    problem = problem_of(used, alignment)
    answer = solve(problem, capacity, seconds)
    offsets = {b.id: b.offset or 0 for b in buffers}
    offsets.update(zip((b.id for b in used), (int(o) for o in answer.offsets), strict=True))
    size = max(problem.height(answer.offsets), bound)
    made = Plan(offsets, size, bound, size <= answer.proven, answer.method, buffers)
    if capacity is not None and size > capacity:
        least = max(answer.proven, bound)
        why = f"no plan takes less than {least}" if least > capacity else f"none was found in {seconds:g} s"
        raise CapacityError(
            f"no plan within the capacity of {capacity} bytes: {why}; the best takes {size}, {size - capacity} more",
            needed=size,
            capacity=capacity,
            plan=made,
        )
    return made


def plan(buffers: Sequence[tuple[int, int, int]], *, seconds: float = 10.0) -> list[int]:
    """Offsets for ``[(start, end, size), ...]`` (end exclusive), in the same order, in as little memory as possible.

    Raises:
        MemoryPlanError: the buffers make no sense.
    """
    named = [Buffer(str(i), start, end, size) for i, (start, end, size) in enumerate(buffers)]
    offsets = assign_offsets(named, alignment=1, seconds=seconds).offsets
    return [offsets[b.id] for b in named]
