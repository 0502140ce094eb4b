"""Lifetimes of a program's allocations, with symbolic sizes: what planning, prediction and the reports start from.

A program is a row of steps, one per call. A lifetime is live during ``start <= step < end``: from the call that makes
it to the last call that can still touch its memory. What the program hands to its caller is live to the end; it counts
in the peak but never lies in the arena, for the caller may keep it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy

from ascend_dynamo.memory.buffers import Buffer

Size = Any  # int, or a sympy expression over the program's size symbols


@dataclass(frozen=True)
class Lifetime:
    """One allocation. ``start`` and ``end`` are steps (end exclusive), ``bytes`` an int or a sympy expression.

    ``op`` made it, ``src`` is the user's (file, line), ``output`` tells that it escapes to the caller, ``device`` is
    the device type that it lies on.
    """

    id: str
    start: int
    end: int
    bytes: Size
    op: str = ""
    src: tuple[str, int] | None = None
    output: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Symbol:
    """A symbolic size: which input holds it (its axis ``dim``, or the input itself), its value at the first call, its
    range (``high`` None: unbounded), and its name in the user's words (``L['x'].size()[1]``)."""

    name: str
    index: int
    dim: int | None = None
    hint: int | None = None
    low: int = 0
    high: int | None = None
    source: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.source})" if self.source else self.name


@dataclass(frozen=True)
class Peak:
    """The most bytes that are live in one step, the first such step, and who is live then, the largest first."""

    bytes: int
    step: int
    live: tuple[Lifetime, ...]


@dataclass(frozen=True)
class Liveness:
    """All lifetimes of one program. ``source`` says what they were read from, ``exact`` that it is what really runs."""

    lifetimes: tuple[Lifetime, ...]
    steps: int
    symbols: tuple[Symbol, ...] = ()
    source: str = "fx"
    exact: bool = True
    labels: tuple[str, ...] = field(default=(), repr=False)
    """What each step calls."""

    @cached_property
    def hints(self) -> dict[str, int]:
        """The sizes of the first call."""
        return {s.name: s.hint for s in self.symbols if s.hint is not None}

    def sizes_of(self, inputs: Sequence[Any]) -> dict[str, int]:
        """The value of each symbol in a call with these inputs (tensors and numbers, in the order of the graph's)."""
        found = {}
        for s in self.symbols:
            value = inputs[s.index] if s.dim is None else inputs[s.index].shape[s.dim]
            found[s.name] = int(value)
        return found

    def at(self, sizes: Mapping[str, int] | None = None, *, default: int | None = None) -> Liveness:
        """The same with numbers for sizes: those given by symbol name, else those of the first call, else the largest
        that the range allows, else ``default``.

        Raises:
            ValueError: a name is no symbol of the program, or a size that has no bound is missing.
        """
        given = dict(sizes or {})
        unknown = given.keys() - {s.name for s in self.symbols}
        if unknown:
            known = ", ".join(str(s) for s in self.symbols) or "none"
            raise ValueError(f"{sorted(unknown)[0]!r} is no symbolic size of this graph; it has {known}")
        return self._evaluated({**self._bounds, **self.hints, **given}, default)

    def upper(self, sizes: Mapping[str, int] | None = None) -> Liveness:
        """The same with upper bounds: sizes that are not given are as large as their range allows.

        Sound where every size grows with every symbol, which holds for all shapes that are made of sums and products.

        Raises:
            ValueError: a size has neither a value nor a bound.
        """
        return self._evaluated({**self._bounds, **(sizes or {})}, None)

    def buffers(self, sizes: Mapping[str, int] | None = None, device: str | None = None) -> list[Buffer]:
        """What the arena has to hold, for the planner: no outputs, nothing of size 0, one device (the fullest)."""
        concrete = self.at(sizes)
        device = concrete.device if device is None else device
        kept = (x for x in concrete.lifetimes if not x.output and x.bytes > 0 and x.device == device)
        return [Buffer(x.id, x.start, x.end, x.bytes) for x in kept]

    def peak(self, sizes: Mapping[str, int] | None = None, *, arena: bool = False) -> Peak:
        """The peak of live bytes; ``arena`` leaves out what the arena does not hold (outputs)."""
        concrete = self.at(sizes)
        return peak_of(x for x in concrete.lifetimes if not (arena and x.output) and x.device == concrete.device)

    @cached_property
    def device(self) -> str:
        """The device type with the most allocations by size (by number, where sizes are symbolic)."""
        weight: dict[str, tuple[int, int]] = {}
        for x in self.lifetimes:
            n, b = weight.get(x.device, (0, 0))
            weight[x.device] = (n + 1, b + (x.bytes if isinstance(x.bytes, int) else 0))
        return max(weight, key=lambda d: weight[d][::-1]) if weight else "cpu"

    def _evaluated(self, values: Mapping[str, int], default: int | None) -> Liveness:
        memo: dict[Any, int] = {}
        lives = (
            x if isinstance(x.bytes, int) else replace(x, bytes=_number(x.bytes, values, default, memo))
            for x in self.lifetimes
        )
        return replace(self, lifetimes=tuple(lives))

    @cached_property
    def _bounds(self) -> dict[str, int]:
        return {s.name: s.high for s in self.symbols if s.high is not None}


def peak_of(lifetimes: Iterable[Lifetime]) -> Peak:
    """The peak of lifetimes whose sizes are numbers; of equal peaks, the first."""
    lives = [x for x in lifetimes if x.bytes > 0 and x.end > x.start]
    change: dict[int, int] = {}
    for x in lives:
        change[x.start] = change.get(x.start, 0) + x.bytes
        change[x.end] = change.get(x.end, 0) - x.bytes
    best, step, now = 0, 0, 0
    for t in sorted(change):
        now += change[t]
        if now > best:
            best, step = now, t
    live = sorted((x for x in lives if x.start <= step < x.end), key=lambda x: (-x.bytes, x.start, x.id))
    return Peak(best, step, tuple(live))


def _number(size: Size, values: Mapping[str, int], default: int | None, memo: dict[Any, int]) -> int:
    if size not in memo:
        missing = sorted(s.name for s in size.free_symbols if s.name not in values)
        if missing and default is None:
            raise ValueError(f"the size {size} bytes needs a value for {missing[0]}, which has no bound: give one")
        memo[size] = int(size.subs({s: sympy.Integer(values.get(s.name, default)) for s in size.free_symbols}))
    return memo[size]
