"""Plans of one program at several sizes: each planned alone, all in one arena."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ascend_dynamo.errors import MemoryPlanError
from ascend_dynamo.memory.lifetimes import Liveness
from ascend_dynamo.memory.plan import Plan, assign_offsets


def plan_at(found: Liveness, sizes: Mapping[str, int] | None = None, *, seconds: float = 1.0) -> Plan:
    """The plan of the arena at these sizes (by symbol name; those that are missing as in ``Liveness.at``).

    Raises:
        ValueError: a name is no symbol of the program, or a size that has no bound is missing.
    """
    return assign_offsets(found.buffers(sizes), seconds=seconds)


def shared_arena(
    found: Liveness, gears: Iterable[Mapping[str, int]], *, seconds: float = 1.0
) -> tuple[int, tuple[Plan, ...]]:
    """(bytes, plans): one arena for all gears is as large as the largest of their plans, for one runs at a time.

    Raises:
        MemoryPlanError: there are no gears.
        ValueError: as ``plan_at``.
    """
    plans = tuple(plan_at(found, gear, seconds=seconds) for gear in gears)
    if not plans:
        raise MemoryPlanError("no gears: an arena has to be as large as some plan")
    return max(p.size for p in plans), plans
