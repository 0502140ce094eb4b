"""The generator of tight instances, and that they are solved; the benchmark's own check of overlaps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _planner_instances as instances
import planner

from ascend_dynamo.memory import Buffer, assign_offsets, exact, plan
from ascend_dynamo.memory.buffers import lower_bound


@pytest.mark.parametrize("family", instances.FAMILIES)
def test_the_capacity_is_full_and_no_more(family: str) -> None:
    for count, seed in ((150, 0), (300, 1)):
        buffers, capacity = instances.instance(family, count, seed)
        assert len(buffers) == count
        assert lower_bound(buffers) == capacity
        assert instances.instance(family, count, seed) == (buffers, capacity)
        assert instances.instance(family, count, seed + 1) != (buffers, capacity)


@pytest.mark.parametrize("family", instances.FAMILIES)
def test_tight_instances_are_solved(family: str) -> None:
    if not exact.available():
        pytest.fail("a C++ compiler is part of the test environment")
    buffers, capacity = instances.instance(family, 150, 0)
    made = assign_offsets(buffers, capacity=capacity, alignment=1, seconds=60)
    assert made.size == capacity == made.lower_bound
    assert made.optimal
    assert planner.overlaps(buffers, made.offsets) == 0
    made.check()


def test_minimising_reaches_the_capacity() -> None:
    buffers, capacity = instances.instance("guillotine", 150, 1)
    offsets = plan([(b.start, b.end, b.size) for b in buffers], seconds=60)
    assert max(o + b.size for o, b in zip(offsets, buffers, strict=True)) == capacity


def test_the_benchmark_counts_overlaps() -> None:
    buffers = [Buffer("a", 0, 2, 8), Buffer("b", 1, 3, 8), Buffer("c", 2, 4, 8)]
    assert planner.overlaps(buffers, {"a": 0, "b": 8, "c": 0}) == 0
    assert planner.overlaps(buffers, {"a": 0, "b": 7, "c": 0}) == 2
    assert planner.overlaps(buffers, {"a": 0, "b": 0, "c": 100}) == 1


def test_a_row_of_the_benchmark(tmp_path: Path) -> None:
    from ascend_dynamo.memory import write_csv

    buffers, capacity = instances.instance("guillotine", 150, 0)
    write_csv(tmp_path / f"one.{capacity}.csv", buffers)
    (case,) = planner.from_folder(tmp_path)
    assert (case.buffers, case.capacity) == (buffers, capacity)
    row = planner.run(case, seconds=60)
    assert row.solved and row.overlaps == 0
    assert row.greedy > row.ours == row.bound == capacity
    impossible = planner.run(planner.Case("no", [*buffers, Buffer("more", 0, 1, 0)], capacity), seconds=60)
    assert impossible.solved
