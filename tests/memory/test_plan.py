"""Memory plans: what holds for any buffers, optima by brute force, and every kind of bad input."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_dynamo.errors import CapacityError, MemoryPlanError
from ascend_dynamo.memory import Buffer, Plan, assign_offsets, exact, heuristic, plan, read_csv, write_csv
from ascend_dynamo.memory.instances import capacity_of
from ascend_dynamo.memory.problem import problem_of


def clashes(buffers: list[Buffer], offsets: dict[str, int]) -> list[tuple[str, str]]:
    """By painting bytes, one point in time after the other: nothing in common with how plans are made or checked."""
    found = []
    for t in {b.start for b in buffers}:
        owner: dict[int, str] = {}
        for b in buffers:
            if b.start <= t < b.end:
                for byte in range(offsets[b.id], offsets[b.id] + b.size):
                    if byte in owner:
                        found.append((owner[byte], b.id))
                    owner[byte] = b.id
    return found


def greedy(buffers: list[Buffer], alignment: int = 1) -> int:
    """Greedy-by-size as one would write it down: the largest first, into the tightest gap, else on top."""
    done: list[tuple[Buffer, int]] = []
    for b in sorted(buffers, key=lambda b: -b.size):
        near = sorted((o, o + x.size) for x, o in done if x.start < b.end and b.start < x.end)
        floor, gaps = 0, []
        for low, high in near:
            if low - floor >= b.size:
                gaps.append((low - floor, floor))
            floor = max(floor, -(-high // alignment) * alignment)
        done.append((b, min(gaps)[1] if gaps else floor))
    return max((o + b.size for b, o in done), default=0)


def optimum(buffers: list[Buffer]) -> int:
    """The least height over all orders in which buffers could be stacked, each as low as those before it allow."""
    best = sum(b.size for b in buffers)
    for order in itertools.permutations(buffers):
        top: list[tuple[Buffer, int]] = []
        for b in order:
            below = [o + x.size for x, o in top if x.start < b.end and b.start < x.end]
            top.append((b, max(below, default=0)))
        best = min(best, max(o + b.size for b, o in top))
    return best


@st.composite
def some_buffers(draw: st.DrawFn, most: int = 24, largest: int = 40, alignments: bool = True) -> list[Buffer]:
    out = []
    for i in range(draw(st.integers(0, most))):
        start, span = draw(st.integers(-3, 12)), draw(st.integers(1, 8))
        alignment = draw(st.sampled_from([1, 1, 2, 8])) if alignments else 1
        out.append(Buffer(f"b{i}", start, start + span, draw(st.integers(0, largest)), alignment))
    return out


@settings(max_examples=100, deadline=None)
@given(some_buffers(), st.sampled_from([1, 4, 6]))
def test_any_plan(buffers: list[Buffer], alignment: int) -> None:
    made = assign_offsets(buffers, alignment=alignment, seconds=0.1)
    assert clashes(buffers, made.offsets) == []
    made.check()
    assert all(made.offsets[b.id] % alignment == 0 and made.offsets[b.id] % b.alignment == 0 for b in buffers)
    assert made.size == max((made.offsets[b.id] + b.size for b in buffers if b.size), default=0)
    live = [sum(b.size for b in buffers if b.start <= t < b.end) for t in range(-3, 21)]
    assert made.lower_bound == max(live) <= made.size
    if not any(b.alignment > 1 for b in buffers):
        assert made.size <= greedy([b for b in buffers if b.size], alignment)


@settings(max_examples=60, deadline=None)
@given(some_buffers(most=14), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 60)), max_size=4))
def test_reserved_regions_stay(buffers: list[Buffer], places: list[tuple[int, int]]) -> None:
    reserved = [Buffer(f"r{i}", t + 9 * i, t + 9 * i + 4, 7, 1, offset) for i, (t, offset) in enumerate(places)]
    kept: list[Buffer] = []
    for r in reserved:
        if not clashes([*kept, r], {b.id: b.offset or 0 for b in [*kept, r]}):
            kept.append(r)
    made = assign_offsets([*buffers, *kept], alignment=1, seconds=0.3)
    assert clashes([*buffers, *kept], made.offsets) == []
    made.check()
    assert all(made.offsets[r.id] == r.offset for r in kept)
    assert made.lower_bound <= made.size


@settings(max_examples=80, deadline=None)
@given(some_buffers(most=6, alignments=False))
def test_small_plans_are_optimal(buffers: list[Buffer]) -> None:
    buffers = [b for b in buffers if b.size]
    least = optimum(buffers) if buffers else 0
    made = assign_offsets(buffers, alignment=1, seconds=5)
    assert made.size == least
    assert made.optimal
    if buffers and exact.available():
        problem = problem_of(buffers, 1)
        assert exact.search(problem, least, seconds=5).offsets is not None
        assert exact.search(problem, least - 1, seconds=5).impossible


@settings(max_examples=40, deadline=None)
@given(some_buffers(most=7, largest=5), st.integers(1, 3), st.integers(0, 12), st.integers(0, 6))
def test_exact_search_agrees_with_all_offsets(buffers: list[Buffer], alignment: int, offset: int, at: int) -> None:
    """With alignments and a reserved region, against trying every offset."""
    buffers = [b for b in buffers if b.size]
    fixed = Buffer("fixed", at, at + 3, 4, 1, offset)
    problem = problem_of([*buffers, fixed], alignment)
    for capacity in range(problem.bound(), offset + 4 + sum(b.size + 8 for b in buffers)):
        found = exact.search(problem, capacity, seconds=5)
        possible = fill(buffers, [fixed], {"fixed": offset}, capacity, alignment)
        assert (found.offsets is not None, found.impossible) == (possible, not possible)
        if possible:
            assert found.offsets is not None
            offsets = dict(zip([b.id for b in [*buffers, fixed]], map(int, found.offsets), strict=True))
            assert clashes([*buffers, fixed], offsets) == []
            return


def fill(left: list[Buffer], done: list[Buffer], offsets: dict[str, int], capacity: int, alignment: int) -> bool:
    if not left:
        return True
    b = left[0]
    step = int(np.lcm(alignment, b.alignment))
    for offset in range(0, capacity - b.size + 1, step):
        if all(
            x.end <= b.start or b.end <= x.start or offset + b.size <= offsets[x.id] or offsets[x.id] + x.size <= offset
            for x in done
        ) and fill(left[1:], [*done, b], {**offsets, b.id: offset}, capacity, alignment):
            return True
    return False


@settings(max_examples=15, deadline=None)
@given(some_buffers(most=24))
def test_repeatable(buffers: list[Buffer]) -> None:
    """Without the clock: where steps end the search."""
    assert assign_offsets(buffers, seconds=0) == assign_offsets(buffers, seconds=0)
    problem = problem_of([b for b in buffers if b.size], 1)
    first, second = (exact.search(problem, problem.bound(), seconds=60, steps=500, seed=3) for _ in range(2))
    assert first.impossible == second.impossible
    assert np.array_equal(first.offsets, second.offsets)  # type: ignore[arg-type]


def test_the_public_function() -> None:
    assert plan([]) == []
    assert sorted(plan([(0, 2, 4), (1, 3, 5)])) in ([0, 4], [0, 5])
    offsets = plan([(0, 3, 4), (3, 9, 4), (0, 9, 4), (9, 21, 4), (0, 21, 4)])  # MiniMalloc's example
    assert max(o + 4 for o in offsets) == 12
    assert plan([(0, 1, 0), (0, 1, 7)]) == [0, 0]


def test_default_alignment_and_methods(caplog: pytest.LogCaptureFixture) -> None:
    made = assign_offsets([Buffer("a", 0, 2, 10), Buffer("b", 1, 3, 10)])
    assert sorted(made.offsets.values()) == [0, 64]
    assert (made.size, made.lower_bound, made.optimal) == (74, 20, True)
    assert made.method == "greedy by size"
    empty = assign_offsets([])
    assert (empty.size, empty.lower_bound, empty.optimal, empty.offsets) == (0, 0, True, {})


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([Buffer("x", 3, 3, 1)], "'x': start 3 is not before end 3"),
        ([Buffer("x", 0, 1, -1)], "'x': size -1 is negative"),
        ([Buffer("x", 0, 1, 1, 0)], "'x': alignment 0 is not positive"),
        ([Buffer("x", 0, 1, 1, 1, -5)], "'x': the reserved offset -5"),
        ([Buffer("x", 0, 1, 1), Buffer("x", 2, 3, 1)], "two buffers are called 'x'"),
        ([Buffer("x", 0, 1, 2.5)], "'x': size is 2.5, which is no integer"),  # type: ignore[arg-type]
        ([Buffer("x", 0, 2**63, 1)], "leaves 62 bits"),
        ([Buffer("x", 0, 1, 2**62), Buffer("y", 0, 1, 2**62)], "more than 2\\*\\*62"),
        ([Buffer("x", 0, 3, 8, 1, 0), Buffer("y", 2, 4, 8, 1, 7)], "'x'.*'y'.*overlap during \\[2, 3\\)"),
    ],
)
def test_bad_buffers(buffers: list[Buffer], message: str) -> None:
    with pytest.raises(MemoryPlanError, match=message):
        assign_offsets(buffers)


def test_bad_alignment() -> None:
    with pytest.raises(MemoryPlanError, match="alignment is 0"):
        assign_offsets([], alignment=0)


def test_capacity_below_the_bound_says_by_how_much() -> None:
    with pytest.raises(CapacityError, match="99 bytes is 21 bytes too small: 120 bytes") as e:
        assign_offsets([Buffer("a", 0, 2, 70), Buffer("b", 1, 3, 50)], capacity=99)
    assert (e.value.needed, e.value.capacity) == (120, 99)


def test_capacity_that_only_the_search_refutes() -> None:
    """Never more than 7 bytes live, but no plan of 7."""
    buffers = [Buffer(str(i), s, e, z) for i, (s, e, z) in enumerate(GAP)]
    least = optimum(buffers)
    made = assign_offsets(buffers, alignment=1)
    assert (made.size, made.lower_bound, made.optimal) == (least, least - 1, True)
    with pytest.raises(CapacityError, match=f"no plan takes less than {least}; the best takes {least}, 1 more") as e:
        assign_offsets(buffers, capacity=least - 1, alignment=1)
    assert isinstance(e.value.plan, Plan)
    e.value.plan.check()


GAP = ((0, 4, 3), (2, 6, 1), (6, 7, 3), (0, 3, 1), (2, 5, 2), (4, 6, 2), (0, 2, 3), (5, 7, 4))


def test_check_finds_what_is_wrong() -> None:
    buffers = (Buffer("a", 0, 2, 8), Buffer("b", 1, 3, 8, 4), Buffer("c", 0, 9, 2, 1, 20))
    good = Plan({"a": 0, "b": 8, "c": 20}, 22, 18, False, "by hand", buffers)
    good.check()
    for offsets, message in (
        ({"a": 0, "b": 4, "c": 20}, r"'a' .*'b' .*overlap during \[1, 2\)"),
        ({"a": 0, "b": 10, "c": 20}, "'b' at 10 is not aligned to 4"),
        ({"a": 0, "b": 8, "c": 18}, "'c' is reserved at 20"),
        ({"a": 15, "b": 4, "c": 20}, "'a' at 15 with 8 bytes leaves the 22 bytes"),
        ({"a": -1, "b": 8, "c": 20}, "'a' at -1"),
    ):
        with pytest.raises(MemoryPlanError, match=message):
            Plan(offsets, 22, 18, False, "by hand", buffers).check()


@settings(max_examples=100, deadline=None)
@given(some_buffers(most=12, largest=6), st.data())
def test_check_agrees_with_painting(buffers: list[Buffer], data: st.DataObject) -> None:
    offsets = {b.id: data.draw(st.integers(0, 5)) * b.alignment for b in buffers}
    size = max((offsets[b.id] + b.size for b in buffers), default=0)
    made = Plan(offsets, size, 0, False, "random", tuple(buffers))
    if clashes(buffers, offsets):
        with pytest.raises(MemoryPlanError, match="overlap"):
            made.check()
    else:
        made.check()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from ascend_dynamo import native

    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("ASCEND_DYNAMO_CACHE_DIR", str(tmp_path))
    native.compiler.cache_clear()
    exact._library.cache_clear()
    try:
        buffers = [Buffer(str(i), s, e, z) for i, (s, e, z) in enumerate(GAP)]
        with caplog.at_level(logging.WARNING, "ascend_dynamo"):
            made = assign_offsets(buffers, alignment=1)
        assert "heuristic alone" in caplog.text and "install g++" in caplog.text
        assert "not compiled" in made.method
        assert made.size <= greedy(buffers)
        made.check()
    finally:
        native.compiler.cache_clear()
        exact._library.cache_clear()


def test_local_search_keeps_what_is_better() -> None:
    rng = np.random.default_rng(0)
    buffers = [
        Buffer(str(i), s := int(rng.integers(0, 40)), s + int(rng.integers(1, 20)), int(rng.integers(1, 90)))
        for i in range(60)
    ]
    problem = problem_of(buffers, 1)
    start = heuristic.greedy_by_size(problem)
    found = heuristic.improve(problem, start, problem.bound(), seconds=20)
    again = heuristic.improve(problem, start, problem.bound(), seconds=20)
    assert (found == again).all()
    assert problem.height(found) < problem.height(start)
    offsets = {b.id: int(o) for b, o in zip(buffers, found, strict=True)}
    assert clashes(buffers, offsets) == []


def test_csv_both_ways(tmp_path: Path) -> None:
    buffers = [Buffer("a", 0, 3, 7), Buffer("b", -1, 2, 9)]
    path = tmp_path / "some.16.csv"
    write_csv(path, buffers)
    assert path.read_text() == "id,lower,upper,size\na,0,3,7\nb,-1,2,9\n"
    assert read_csv(path) == buffers
    assert capacity_of(path) == 16
    assert capacity_of("plain.csv") is None
    more = [Buffer("a", 0, 3, 7, 8), Buffer("b", 1, 2, 9, 1, 128)]
    write_csv(path, more)
    assert read_csv(path) == more
    path.write_text("id,lower,upper,size\na,0,3,seven\n")
    with pytest.raises(MemoryPlanError, match="line 2: size is 'seven'"):
        read_csv(path)
    path.write_text("id,lower,upper\na,0,3\n")
    with pytest.raises(MemoryPlanError, match="no column size"):
        read_csv(path)
