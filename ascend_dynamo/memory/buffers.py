"""Buffers with lifetimes, and what holds for every plan of them: their bounds, and which inputs make no sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ascend_dynamo.errors import MemoryPlanError

LARGEST = 2**62  # bytes: sums of offsets and sizes stay within int64
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Buffer:
    """A piece of memory that is in use during ``[start, end)``.

    Args:
        id: its name, unique among the buffers that are planned together.
        start: the first point in time at which it is in use.
        end: the first point at which it is not any more; later than ``start``.
        size: bytes; a buffer of 0 bytes collides with nothing.
        alignment: bytes of which the offset must be a multiple.
        offset: where it already is (a reserved region), or None where the planner chooses.
    """

    id: str
    start: int
    end: int
    size: int
    alignment: int = 1
    offset: int | None = None


def check_buffers(buffers: Sequence[Buffer], alignment: int) -> None:
    """Refuse what has no plan.

    Raises:
        MemoryPlanError: a lifetime that is empty, a size, an alignment or an offset that is negative, an id twice,
            numbers that are no integers or leave 62 bits, or two reserved regions that overlap.
    """
    if not isinstance(alignment, int) or alignment < 1:
        raise MemoryPlanError(f"alignment is {alignment!r}: it must be a positive number of bytes")
    seen: set[str] = set()
    total = 0
    for b in buffers:
        _check_one(b)
        if b.id in seen:
            raise MemoryPlanError(f"two buffers are called {b.id!r}: each id must be unique")
        seen.add(b.id)
        total += b.size + math.lcm(alignment, b.alignment) + (b.offset or 0)
    if total > LARGEST:
        raise MemoryPlanError(f"the buffers and their alignments add up to {total} bytes: more than 2**62")
    reserved = sorted((b for b in buffers if b.offset is not None and b.size > 0), key=_reserved_offset)
    _check_reserved(reserved)


def _check_one(b: Buffer) -> None:
    for name, value in (("start", b.start), ("end", b.end), ("size", b.size), ("alignment", b.alignment)):
        if not isinstance(value, int):
            raise MemoryPlanError(f"buffer {b.id!r}: {name} is {value!r}, which is no integer")
    if b.start >= b.end:
        raise MemoryPlanError(f"buffer {b.id!r}: start {b.start} is not before end {b.end} (the end is exclusive)")
    if max(abs(b.start), abs(b.end)) > LARGEST:
        raise MemoryPlanError(f"buffer {b.id!r}: its lifetime [{b.start}, {b.end}) leaves 62 bits")
    if b.size < 0:
        raise MemoryPlanError(f"buffer {b.id!r}: size {b.size} is negative")
    if b.alignment < 1:
        raise MemoryPlanError(f"buffer {b.id!r}: alignment {b.alignment} is not positive")
    if b.offset is not None and (not isinstance(b.offset, int) or b.offset < 0):
        raise MemoryPlanError(f"buffer {b.id!r}: the reserved offset {b.offset!r} is not a number of bytes from 0 on")


def _reserved_offset(b: Buffer) -> int:
    assert b.offset is not None
    return b.offset


def _check_reserved(reserved: Sequence[Buffer]) -> None:
    """By offset: a region can only collide with those that begin below its end."""
    for i, a in enumerate(reserved):
        top = _reserved_offset(a) + a.size
        for b in reserved[i + 1 :]:
            if _reserved_offset(b) >= top:
                break
            if a.start < b.end and b.start < a.end:
                raise MemoryPlanError(
                    f"the reserved regions {a.id!r} (offset {a.offset}, size {a.size}) and {b.id!r} "
                    f"(offset {b.offset}, size {b.size}) overlap during [{max(a.start, b.start)}, {min(a.end, b.end)})"
                )


def peak(starts: Ints, ends: Ints, sizes: Ints) -> int:
    """The most bytes that are live at once: no plan is smaller."""
    if not len(sizes):
        return 0
    times = np.concatenate([ends, starts])  # at one point in time, what ends is gone before what starts
    order = np.argsort(times, kind="stable")
    return int(np.concatenate([-sizes, sizes])[order].cumsum().max())


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """Bytes that any plan needs: the peak of live bytes, and the end of the highest reserved region."""
    live = peak(
        np.array([b.start for b in buffers], np.int64),
        np.array([b.end for b in buffers], np.int64),
        np.array([b.size for b in buffers], np.int64),
    )
    return max([live, *(b.offset + b.size for b in buffers if b.offset is not None)])
