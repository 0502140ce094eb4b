"""Any sequence of calls, allocations, frees, deviations, nesting, exceptions: a tensor that is alive keeps its value.

Each tensor is filled with a number of its own. If two that are alive ever shared memory, one would show the other's.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_dynamo.runtime.arena import Arenas

# One step of a program: allocate a size; free the n-th that is alive; move it to the stash, which outlives the call.
steps = st.one_of(
    st.tuples(st.just("new"), st.sampled_from([1, 3, 16, 17, 100, 1000])),
    st.tuples(st.sampled_from(["free", "free", "stash"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(["call", "unstash", "fail"]), st.integers(0, 2)),
)
programs = st.lists(st.lists(steps, max_size=12), min_size=1, max_size=3)


class Planted(Exception):
    pass


class Machine:
    def __init__(self, programs: list[list[tuple[str, int]]], poison: bool) -> None:
        self.programs, self.arenas = programs, Arenas()
        self.stash: list[tuple[torch.Tensor, int]] = []
        self.alive: list[list[tuple[torch.Tensor, int]]] = []  # of each call that is under way
        self.number = 0
        self.odd: set[int] = set()  # steps that this call leaves out
        self.runs = [self.arenas.graph(i, poison=poison).around(self.body(i)) for i in range(len(programs))]

    def body(self, which: int) -> Any:
        def call(args: list[Any]) -> Any:
            mine: list[tuple[torch.Tensor, int]] = []
            self.alive.append(mine)
            try:
                for i, (what, n) in enumerate(self.programs[which]):
                    if i not in self.odd:
                        self.step(what, n, mine)
                    self.check()
                return mine[:1]
            finally:
                self.alive.pop()

        return call

    def step(self, what: str, n: int, mine: list[tuple[torch.Tensor, int]]) -> None:
        if what == "new":
            self.number += 1
            mine.append((torch.full((n,), float(self.number)), self.number))
        elif what == "free" and mine:
            del mine[n % len(mine)]
        elif what == "stash" and mine:
            self.stash.append(mine[n % len(mine)])
        elif what == "unstash" and self.stash:
            del self.stash[n % len(self.stash)]
        elif what == "call" and len(self.alive) < 3:
            mine += self.runs[n % len(self.runs)]([])
        elif what == "fail" and n == 2 and self.odd:
            raise Planted

    def check(self) -> None:
        for t, number in itertools.chain(self.stash, *self.alive):
            assert bool((t == number).all()), (t, number)


@settings(max_examples=150)
@given(
    programs=programs,
    calls=st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 11), max_size=2)), min_size=3, max_size=10),
    poison=st.booleans(),
)
def test_values_stay(programs: list[list[tuple[str, int]]], calls: list[tuple[int, set[int]]], poison: bool) -> None:
    machine = Machine(programs, poison)
    for which, odd in calls:
        machine.odd = odd
        with contextlib.suppress(Planted):
            machine.runs[which % len(programs)]([])
        machine.check()
    machine.stash.clear()
    stats = machine.arenas.stats()
    assert stats.busy == 0
    for shape in stats.shapes:
        if shape.state == "planned":
            assert shape.recording is not None and shape.plan_bytes <= stats.size
            assert shape.peak_bytes <= shape.plan_bytes or not shape.recording.buffers
