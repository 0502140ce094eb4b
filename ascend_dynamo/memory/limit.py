"""``options={"memory_limit": "8GB"}``: a call that would not fit raises before anything of it runs."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ascend_dynamo.cache.gears import LRU
from ascend_dynamo.errors import MemoryLimitError
from ascend_dynamo.memory.lifetimes import Lifetime, Liveness
from ascend_dynamo.memory.plan import assign_offsets
from ascend_dynamo.memory.record import QUICK, distinct_bytes
from ascend_dynamo.memory.units import show_bytes

_CONSUMERS = 5  # that the error names
_SHAPES = 256  # whose prediction is remembered


class MemoryLimit:
    """Checks the calls of one compiled graph against a limit in bytes.

    A call needs its inputs (weights and caches: each storage once), ``derived`` bytes of packed weights, and what it
    allocates: the planned arena and the outputs, evaluated for the sizes of that call.
    """

    def __init__(self, limit: int, lifetimes: Liveness, derived: int = 0) -> None:
        self.limit, self.lifetimes, self.derived = limit, lifetimes, derived
        self._needed: LRU[tuple[int, ...], int] = LRU(_SHAPES)

    def around(self, inner: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """``inner``, a boxed callable, behind the check."""

        def call(args: list[Any]) -> Any:
            self.check(args)
            return inner(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def check(self, args: Sequence[Any]) -> None:
        """
        Raises:
            MemoryLimitError: a call with these inputs would take more than the limit.
        """
        sizes = self.lifetimes.sizes_of(args)
        key = tuple(sizes.values())
        allocates = self._needed.get(key)
        if allocates is None:
            allocates = needed_bytes(self.lifetimes, sizes)
            self._needed.put(key, allocates)
        held = distinct_bytes(a for a in args if isinstance(a, torch.Tensor)) + self.derived
        if held + allocates > self.limit:
            raise self._error(sizes, held, allocates)

    def _error(self, sizes: Mapping[str, int], held: int, allocates: int) -> MemoryLimitError:
        needed = held + allocates
        peak = self.lifetimes.at(sizes, default=0).peak()
        lines = [
            f"this call needs {show_bytes(needed)}, but memory_limit is {show_bytes(self.limit)}: weights and other "
            f"inputs take {show_bytes(held)}, intermediates and outputs {show_bytes(allocates)}. Live at the peak:",
            *(f"  {show_bytes(x.bytes):>10}  {_who(x)}" for x in peak.live[:_CONSUMERS]),
            f"To fit: {self._fix(sizes, held, needed)}",
        ]
        return MemoryLimitError("\n".join(lines), needed=needed, limit=self.limit)

    def _fix(self, sizes: Mapping[str, int], held: int, needed: int) -> str:
        """What would make it fit, each found by evaluating the plan."""
        raised = f"raise memory_limit to {show_bytes(needed)} ({needed} bytes)"
        if held >= self.limit:
            return f"what is passed in alone is too large: pass smaller caches or weights, or {raised}"
        smaller = []
        for s in self.lifetimes.symbols:
            best = largest_fitting(self.lifetimes, sizes, s.name, self.limit - held)
            if s.low <= best < sizes[s.name]:
                smaller.append(f"{s} at most {best} instead of {sizes[s.name]}")
        if not smaller:
            return f"make the inputs smaller (their sizes are fixed in this graph), or {raised}"
        return f"{', or '.join(smaller)}; or {raised}"


def needed_bytes(lifetimes: Liveness, sizes: Mapping[str, int] | None = None) -> int:
    """What a run allocates: the planned arena, which is there for the whole run, and the outputs. Sizes that only the
    data tells (hits of a nonzero) count as 0."""
    concrete = lifetimes.at(sizes, default=0)
    outputs = sum(x.bytes for x in concrete.lifetimes if x.output and x.device == concrete.device)
    return assign_offsets(concrete.buffers(), seconds=QUICK).size + outputs


def largest_fitting(lifetimes: Liveness, sizes: Mapping[str, int], symbol: str, room: int) -> int:
    """The largest value of a size, up to the one in ``sizes``, with which a run allocates at most ``room`` bytes; -1 if
    none does. The other sizes stay."""

    candidates = range(sizes[symbol] + 1)
    return bisect.bisect_right(candidates, room, key=lambda n: needed_bytes(lifetimes, {**sizes, symbol: n})) - 1


def _who(x: Lifetime) -> str:
    where = f" at {os.path.basename(x.src[0])}:{x.src[1]}" if x.src else ""
    return f"{x.op} (%{x.id}){where}"
