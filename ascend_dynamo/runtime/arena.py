"""Arenas: the intermediates of a compiled graph live in memory that was planned, and not on the heap.

The first call of a graph, per shape, is recorded by a CPU allocator of ours (``arena.cpp``): sizes and lifetimes of
everything that the calling thread allocates, temporaries inside kernels included. The next call plans offsets and
replays them: no allocation, no free, no page fault in steady state. What was alive at the end of the recorded call
(outputs, caches) stays on the heap. A call that does otherwise than the recorded one gets the heap from there on, is
counted, and the next one is recorded again.

All graphs of a backend share one arena as large as its largest plan. Calls lease it: one inside another, or at the same
time on another thread, gets an arena of its own, and so does the next one while a block outlives its call.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch

from ascend_dynamo.errors import AscendDynamoError
from ascend_dynamo.memory import assign_offsets
from ascend_dynamo.runtime.arena_library import Native, install
from ascend_dynamo.runtime.arena_stats import ArenaStats, Block, GraphStats, Recording, ShapeStats

log = logging.getLogger("ascend_dynamo.runtime")
Boxed = Callable[[list[Any]], Any]
Key = Callable[[Sequence[Any]], tuple[int, ...]]

SHAPES = 64  # of one graph that are remembered
ALIGNMENT = 64  # bytes: what torch's own allocator gives
PLANNING = 1.0  # seconds: the search is part of a call that somebody waits for
_NUMBERS = tuple(f.name for f in fields(ShapeStats) if f.type == "int")  # in the order of the C++ half
_STATES = ("new", "recording", "recorded", "planned", "off")


class Arenas:
    """The arenas of one backend.

    Args:
        shapes: how many shapes of one graph are remembered.
    """

    def __init__(self, *, shapes: int = SHAPES) -> None:
        self.capacity = shapes
        self.graphs: list[weakref.ref[GraphArena]] = []
        self._lock = threading.Lock()
        self._installed: Native | str | None = None
        self.handle: int | None = None
        _backends.add(self)

    def _ready(self) -> Native | str:
        """The allocator is installed by the first graph that could use it, not by making a backend."""
        if self._installed is None:
            with self._lock:
                native = install()
                if isinstance(native, Native) and self.handle is None:
                    self.handle = native.group()
                    weakref.finalize(self, native.group_close, self.handle).atexit = False
                self._installed = native
        return self._installed

    @property
    def reason(self) -> str:
        """Why calls run on the heap after all; "" if they do not."""
        native = self._ready()
        if isinstance(native, str):
            return native
        return "" if native.installed() else "another CPU allocator was installed over ours"

    def graph(
        self,
        index: int = 0,
        key: Key | None = None,
        *,
        poison: bool = False,
        recorded: Callable[[Recording], None] | None = None,
    ) -> GraphArena:
        """The arenas of one graph.

        Args:
            index: the graph's number, for ``stats``.
            key: computes, from its inputs, the sizes that tell its shapes apart; None: there is only one.
            poison: fill every block with NaN when it is handed out and with another NaN when it is freed (as integers:
                -1 and 0x7FFE...), so that reading memory that nobody wrote, or that was freed, shows in the result.
            recorded: told of every recording once it is planned.
        """
        graph = GraphArena(self, index, key, poison, recorded)
        self.graphs = [*(ref for ref in self.graphs if ref() is not None), weakref.ref(graph)]
        return graph

    @property
    def native(self) -> Native:
        native = self._ready()
        assert isinstance(native, Native), native
        return native

    def trim(self) -> int:
        """Give memory that no call holds back to the system, and return its bytes. The next call takes it again."""
        return int(self._installed.trim(self.handle)) if isinstance(self._installed, Native) else 0

    def stats(self) -> ArenaStats:
        """What was recorded, planned and replayed so far."""
        out = (ctypes.c_uint64 * 3)()
        reason = ""
        if isinstance(self._installed, Native):
            self._installed.group_stats(self.handle, out)
            reason = self.reason
        elif self._installed is not None:
            reason = self._installed
        alive = [g for ref in self.graphs if (g := ref()) is not None]
        graphs = tuple(g.stats() for g in alive)
        size = max((s.plan_bytes for g in graphs for s in g.shapes), default=0)
        return ArenaStats(reason, size, int(out[1]), int(out[0]), int(out[2]), graphs)


class GraphArena:
    """One compiled graph in the arenas of its backend: ``around`` makes its calls run there."""

    def __init__(
        self,
        arenas: Arenas,
        index: int,
        key: Key | None,
        poison: bool,
        recorded: Callable[[Recording], None] | None,
    ) -> None:
        self.arenas, self.index, self.poison, self.recorded = arenas, index, poison, recorded
        self._key = key
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._once: dict[tuple[int, ...], None] = {}  # seen once while the table was full, oldest first
        self._clock = itertools.count()
        self._lock = threading.Lock()
        self._unknown: _Shape | None = None

    def around(self, inner: Boxed) -> Boxed:
        """``inner``, a boxed callable, with its intermediates in an arena; ``inner`` itself where there are none."""
        if self.arenas.reason:
            return inner
        native = self.arenas.native
        enter, leave = native.enter, native.leave
        find = self._find if self._key is not None else _always(self._shape(()))

        def call(args: list[Any]) -> Any:
            shape = find(args)
            handle = shape.handle
            try:
                while enter(handle):
                    shape.plan()
                result = inner(args)
                leave(handle, 1)
            except BaseException:
                leave(handle, 0)  # does nothing where an interrupt came before entering or after leaving
                raise
            return result

        call._boxed_call = True  # type: ignore[attr-defined]
        call.arena = self  # type: ignore[attr-defined]  # which lives as long as what it made
        return call

    def stats(self) -> GraphStats:
        """What was recorded and replayed of this graph."""
        with self._lock:
            shapes = tuple(shape.stats(key) for key, shape in self._shapes.items())
            return GraphStats(self.index, shapes, self._unknown.stats(()).calls if self._unknown else 0)

    def _shape(self, key: tuple[int, ...]) -> _Shape:
        shape = self._shapes[key] = _Shape(self)
        return shape

    def _find(self, args: Sequence[Any]) -> _Shape:
        assert self._key is not None
        key = self._key(args)
        shape = self._shapes.get(key)
        if shape is None:
            with self._lock:
                shape = self._shapes.get(key) or self._admit(key)
        shape.used = next(self._clock)
        return shape

    def _admit(self, key: tuple[int, ...]) -> _Shape:
        """A new shape is recorded; once the table is full only when it comes back, for it takes the place of the one
        that was not used for longest. So sizes that never come back (a cache that grows) do not sweep the table."""
        if len(self._shapes) < self.arenas.capacity:
            return self._shape(key)
        if key in self._once:
            del self._once[key]
            del self._shapes[min(self._shapes, key=lambda k: self._shapes[k].used)]
            return self._shape(key)
        self._once[key] = None
        if len(self._once) > self.arenas.capacity:
            del self._once[next(iter(self._once))]
        if self._unknown is None:
            self._unknown = _Shape(self)
            self.arenas.native.off(self._unknown.handle)
        return self._unknown


def _always(shape: _Shape) -> Callable[[Sequence[Any]], _Shape]:
    return lambda args: shape


class _Shape:
    """One graph at one shape: the recording, and the plan. It lives as long as a call holds it."""

    def __init__(self, graph: GraphArena) -> None:
        self.native, self.used, self.reason = graph.arenas.native, 0, ""
        self.told = graph.recorded
        self.handle = self.native.entry(graph.arenas.handle, int(graph.poison))
        weakref.finalize(self, self.native.entry_close, self.handle).atexit = False

    def plan(self) -> None:
        """Plan offsets for what was recorded; where that fails the shape stays on the heap."""
        recording = self._recorded()
        try:
            plan = assign_offsets(recording.buffers, alignment=ALIGNMENT, seconds=PLANNING)
        except AscendDynamoError as error:
            return self._off(str(error))
        if plan.size > self.native.slot_bytes():
            return self._off(f"{plan.size} bytes are more than an arena holds ({self.native.slot_bytes()})")
        offsets = [plan.offsets.get(str(i), 0) for i in range(len(recording.blocks))]
        array = (ctypes.c_uint64 * len(offsets))(*offsets)
        wrong = self.native.plan(self.handle, len(offsets), array, plan.size)
        if wrong is not None:
            return self._off(f"the plan is not sound: {wrong.decode()}")
        if self.told is not None:
            self.told(recording)
        return None

    def _off(self, reason: str) -> None:
        log.warning("no arena for a graph's intermediates: %s", reason)
        self.reason = reason
        self.native.off(self.handle)

    def _recorded(self) -> Recording:
        native, handle = self.native, self.handle
        count = native.recorded(handle, 0, None, None, None)
        sizes, starts, ends = (ctypes.c_uint64 * count)(), (ctypes.c_int64 * count)(), (ctypes.c_int64 * count)()
        native.recorded(handle, count, sizes, starts, ends)
        blocks = zip(sizes, starts, ends, strict=True)
        return Recording(tuple(Block(size, start, None if end < 0 else end) for size, start, end in blocks))

    def stats(self, key: tuple[int, ...]) -> ShapeStats:
        out = (ctypes.c_uint64 * 12)()
        self.native.entry_stats(self.handle, out)
        state = _STATES[out[0]]
        recording = self._recorded() if state in ("recorded", "planned") else None
        why = self.reason or ("its allocations differ from call to call" if state == "off" else "")
        numbers = dict(zip(_NUMBERS, map(int, out[1:]), strict=True))
        return ShapeStats(key=key, state=state, reason=why, recording=recording, **numbers)


_backends: weakref.WeakSet[Arenas] = weakref.WeakSet()


def stats() -> list[ArenaStats]:
    """The arenas of every backend of this process that is alive."""
    return [arenas.stats() for arenas in list(_backends)]


def address_range() -> tuple[int, int]:
    """The addresses between which all arenas of this process lie (most of them without memory); (0, 0): there are none.

    What the operating system says about them (/proc/self/maps) is a check on ``stats`` that none of this code made.
    """
    native = install()
    out = (ctypes.c_uint64 * 2)()
    if isinstance(native, Native):
        native.range(out)
    return int(out[0]), int(out[1])


def holds(tensor: torch.Tensor) -> bool:
    """Whether the memory of a CPU tensor lies in an arena. False where arenas were never used."""
    native = install()
    return isinstance(native, Native) and bool(native.holds(tensor.untyped_storage().data_ptr()))
