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
_STATES = ("new", "recording", "recorded", "planned", "off")


class Arenas:
    """The arenas of one backend.

    Args:
        poison: fill every block with NaN when it is handed out and with another NaN when it is freed (integers: -1 and
            0x7FFE...), on the heap too, so that reading memory that nobody wrote shows in the result.
        shapes: how many shapes of one graph are remembered.
    """

    def __init__(self, *, poison: bool = False, shapes: int = SHAPES) -> None:
        self.poison, self.capacity = poison, shapes
        self.graphs: list[weakref.ref[GraphArena]] = []
        self._native = install()
        if isinstance(self._native, Native):
            self.handle = self._native.group(int(poison))
            weakref.finalize(self, self._native.group_close, self.handle).atexit = False

    @property
    def reason(self) -> str:
        """Why calls run on the heap after all; "" if they do not."""
        if isinstance(self._native, str):
            return self._native
        return "" if self._native.installed() else "another CPU allocator was installed over ours"

    def graph(self, index: int = 0, key: Key | None = None) -> GraphArena:
        """The arenas of one graph; ``key`` computes, from its inputs, the sizes that tell its shapes apart."""
        graph = GraphArena(self, index, key)
        self.graphs.append(weakref.ref(graph))
        return graph

    @property
    def native(self) -> Native:
        assert isinstance(self._native, Native), self._native
        return self._native

    def trim(self) -> int:
        """Give memory that no call holds back to the system, and return its bytes. The next call takes it again."""
        return int(self.native.trim(self.handle)) if isinstance(self._native, Native) else 0

    def stats(self) -> ArenaStats:
        """What was recorded, planned and replayed so far."""
        out = (ctypes.c_uint64 * 3)()
        if isinstance(self._native, Native):
            self._native.group_stats(self.handle, out)
        alive = [g for g in (ref() for ref in self.graphs) if g is not None]
        graphs = tuple(g.stats() for g in alive)
        size = max((s.plan_bytes for g in graphs for s in g.shapes), default=0)
        return ArenaStats(self.reason, size, int(out[1]), int(out[0]), int(out[2]), graphs)


class GraphArena:
    """One compiled graph in the arenas of its backend: ``around`` makes its calls run there."""

    def __init__(self, arenas: Arenas, index: int, key: Key | None) -> None:
        self.arenas, self.index, self._key = arenas, index, key
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
        shape = self._shapes[key] = _Shape(self.arenas)
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
            self._unknown = _Shape(self.arenas)
            self.arenas.native.off(self._unknown.handle)
        return self._unknown


def _always(shape: _Shape) -> Callable[[Sequence[Any]], _Shape]:
    return lambda args: shape


class _Shape:
    """One graph at one shape: the recording, and the plan. It lives as long as a call holds it."""

    def __init__(self, arenas: Arenas) -> None:
        self.native, self.used, self.reason = arenas.native, 0, ""
        self.recording: Recording | None = None
        self.handle = self.native.entry(arenas.handle)
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
        self.recording = recording
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
        return ShapeStats(key, state, *map(int, out[1:]), reason=why, recording=recording)


def holds(tensor: torch.Tensor) -> bool:
    """Whether the memory of a CPU tensor lies in an arena. False where arenas were never used."""
    native = install()
    return isinstance(native, Native) and bool(native.holds(tensor.untyped_storage().data_ptr()))
