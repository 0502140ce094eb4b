"""Arenas: calls are recorded, planned, replayed; what does otherwise than recorded gets the heap, and is right."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ascend_dynamo.memory import assign_offsets
from ascend_dynamo.runtime import arena as arena_module
from ascend_dynamo.runtime.arena import Arenas, holds
from ascend_dynamo.runtime.arena_stats import ShapeStats

X = torch.linspace(-1.0, 1.0, 32 * 32).reshape(32, 32)


def chain(args: list[Any]) -> list[torch.Tensor]:
    """Five intermediates and one output."""
    (x,) = args
    y = x.cos()
    z = y @ x
    del y
    return [(z.relu().sin() @ z).tanh()]


def only(arenas: Arenas) -> ShapeStats:
    (shape,) = arenas.stats().shapes
    return shape


def heap_events(call: Callable[[], object]) -> int:
    """How many operators torch's own allocator gave memory to, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
        del result
    return sum(e.name != "[memory]" and e.self_cpu_memory_usage > 0 for e in seen.events() or ())


def test_replayed_calls_are_equal_and_leave_the_heap_alone() -> None:
    arenas = Arenas()
    run = arenas.graph().around(chain)
    expected = chain([X])[0]
    plain = heap_events(lambda: chain([X]))
    for _ in range(4):
        got = run([X])[0]
        assert torch.equal(got, expected) and not holds(got)
    assert plain > 3 and heap_events(lambda: run([X])) == 1  # the output
    stats, shape = arenas.stats(), only(arenas)
    assert stats.reason == "" and (stats.instances, stats.busy) == (1, 0)
    assert (shape.state, shape.calls, shape.recorded, shape.replayed) == ("planned", 5, 1, 4)
    assert (shape.mismatches, shape.outlived, shape.unleased, shape.heaped) == (0, 0, 0, 0)
    assert (shape.last_gave, shape.last_escaped, shape.last_heap) == (plain - 1, 1, 0)


def test_the_arena_is_as_large_as_the_plan() -> None:
    arenas = Arenas()
    run = arenas.graph().around(chain)
    for _ in range(2):
        run([X])
    shape = only(arenas)
    assert shape.recording is not None
    assert shape.recording.escaping == 1 and shape.recording.bytes >= 5 * X.nbytes
    plan = assign_offsets(shape.recording.buffers)
    plan.check()
    assert plan.lower_bound == shape.peak_bytes == shape.recording.peak() == 3 * X.nbytes
    assert shape.recording.peak(escaping=True) >= shape.peak_bytes
    assert shape.plan_bytes == arenas.stats().size == plan.size == 3 * X.nbytes
    assert plan.size <= arenas.stats().committed < plan.size + (1 << 16)


def test_graphs_of_one_backend_share_one_arena() -> None:
    arenas = Arenas()
    small, large = arenas.graph(0).around(chain), arenas.graph(1).around(chain)
    wide = torch.ones(64, 64)
    for _ in range(3):
        small([X])
        large([wide])
    stats = arenas.stats()
    assert [g.index for g in stats.graphs] == [0, 1] and [s.replayed for s in stats.shapes] == [2, 2]
    assert stats.instances == 1 and stats.size == 3 * wide.nbytes


def test_outputs_stay_as_they_are() -> None:
    run = Arenas().graph().around(chain)
    kept = [run([X])[0] for _ in range(5)]
    assert all(torch.equal(k, kept[0]) for k in kept) and len({k.data_ptr() for k in kept}) == 5


@pytest.mark.parametrize("other", ["size", "more", "fewer"])
def test_another_sequence_gets_the_heap_and_is_recorded_again(other: str) -> None:
    odd = False

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0].cos()
        if odd:
            y = {"size": lambda: torch.cat([y, y]), "more": lambda: y.sin().sin().sin(), "fewer": lambda: y}[other]()
        else:
            y = y.sin().sin()
        return [y[:8].exp()]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for _ in range(3):
        run([X])
    odd = True
    want = program([X])[0]
    assert torch.equal(run([X])[0], want)
    shape = only(arenas)
    assert (shape.mismatches, shape.state) == (1, "new")
    for _ in range(3):
        assert torch.equal(run([X])[0], want)
    shape = only(arenas)
    assert (shape.state, shape.recorded, shape.last_heap) == ("planned", 2, 0)


def test_a_block_that_lives_longer_than_recorded_is_not_overwritten() -> None:
    """The sizes are the same; only the moment of a free is not."""
    keep = False
    seen: list[bool] = []

    def program(args: list[Any]) -> list[torch.Tensor]:
        first = args[0] + 1
        held = first if keep else None
        del first
        second = args[0] + 2
        seen.append(held is None or (holds(held) and bool(torch.equal(held, X + 1))))
        return [second + 0]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for flag in (False, False, True):
        keep = flag
        assert torch.equal(run([X])[0], X + 2)
    assert all(seen) and only(arenas).mismatches == 1


def test_a_block_that_outlives_its_call_keeps_its_arena() -> None:
    stash: list[torch.Tensor] = []
    keep = False

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0] + 1
        if keep:
            stash.append(y)
        return [y * 2]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for flag in (False, False, True):
        keep = flag
        run([X])
    assert holds(stash[0]) and only(arenas).outlived == 1 and arenas.stats().busy == 1
    keep = False
    for _ in range(3):
        run([X])
    assert torch.equal(stash[0], X + 1) and arenas.stats().instances == 2
    stash.clear()
    run([X])
    assert arenas.stats().busy == 0 and arenas.stats().instances == 2


def test_what_outlives_every_call_is_known_to_escape() -> None:
    stash: list[torch.Tensor] = []

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0] + 1
        stash.append(y)
        return [y * 2]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for _ in range(5):
        run([X])
    assert all(torch.equal(s, X + 1) and not holds(s) for s in stash)
    assert only(arenas).last_escaped == 2 and only(arenas).replayed == 4


def test_allocations_that_depend_on_data_end_the_attempt() -> None:
    size = 0

    def program(args: list[Any]) -> list[torch.Tensor]:
        return [torch.ones(size).sum() + args[0]]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for size in range(1, 60):
        assert torch.equal(run([X])[0], X + size)
    shape = only(arenas)
    assert shape.state == "off" and "differ" in shape.reason and shape.recorded < 20


def test_exceptions_leave_everything_usable() -> None:
    fail = True
    caught: list[BaseException] = []

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0] + 1
        if fail:
            raise ValueError("planted")
        return [y * 2]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for fail in (True, False, False, True, False, True, False):
        if not fail:
            assert torch.equal(run([X])[0], (X + 1) * 2)
            continue
        with pytest.raises(ValueError, match="planted") as error:
            run([X])
        caught.append(error.value)  # its traceback holds the intermediate
    shape = only(arenas)
    assert (shape.state, shape.recorded, shape.mismatches) == ("planned", 1, 0)
    assert arenas.stats().busy > 0
    error = None
    caught.clear()
    gc.collect()
    assert arenas.stats().busy == 0
    assert not holds(X + 1)  # no call is left open


def test_threads_have_arenas_of_their_own() -> None:
    arenas = Arenas()
    meet = threading.Barrier(2)
    wrong: list[object] = []
    waiting = False

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0] + 1
        if waiting:
            meet.wait(20)  # both are inside now
        z = y * 2
        if waiting:
            meet.wait(20)
        return [z - y]

    run = arenas.graph().around(program)
    for _ in range(2):
        run([X])
    waiting = True

    def work(shift: float) -> None:
        for i in range(20):
            x = X + shift + i
            if not torch.equal(run([x])[0], (x + 1) * 2 - (x + 1)):
                wrong.append((shift, i))

    threads = [threading.Thread(target=work, args=(100.0 * t,)) for t in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and arenas.stats().instances == 2
    assert only(arenas).replayed == 41 and only(arenas).mismatches == 0


def test_frees_on_another_thread() -> None:
    def program(args: list[Any]) -> list[torch.Tensor]:
        box = [args[0].exp()]
        y = box[0].cos()
        t = threading.Thread(target=box.clear)
        t.start()
        t.join()
        return [y.sin().exp()]

    arenas = Arenas()
    run = arenas.graph().around(program)
    for _ in range(4):
        assert torch.equal(run([X])[0], X.exp().cos().sin().exp())
    shape = only(arenas)
    assert (shape.replayed, shape.last_escaped) == (3, 1) and shape.recording is not None
    assert shape.plan_bytes == 2 * X.nbytes


def test_a_graph_inside_another() -> None:
    arenas = Arenas()
    inner = arenas.graph(1).around(chain)

    def outer(args: list[Any]) -> list[torch.Tensor]:
        y = args[0] + 1
        z = inner([y])[0]
        return [(z + y) * 2]

    run = arenas.graph(0).around(outer)
    want = (chain([X + 1])[0] + (X + 1)) * 2
    for _ in range(4):
        assert torch.equal(run([X])[0], want)
    stats = arenas.stats()
    assert [s.replayed for s in stats.shapes] == [3, 3] and stats.instances == 2
    assert [s.last_escaped for s in stats.shapes] == [1, 1]


def test_a_graph_inside_itself() -> None:
    arenas = Arenas()

    def program(args: list[Any]) -> list[torch.Tensor]:
        x, depth = args
        y = x + 1
        return [run([y, depth - 1])[0] + y if depth else y * 1]

    run = arenas.graph().around(program)
    want = (X + 1) + (X + 2) + (X + 3)
    for _ in range(4):
        assert torch.allclose(run([X, 2])[0], want)
    assert arenas.stats().busy == 0 and not holds(X + 1)


def test_dynamic_shapes_have_plans_of_their_own() -> None:
    arenas = Arenas(shapes=3)
    run = arenas.graph(key=lambda args: (args[0].shape[0],)).around(chain)

    def shapes() -> dict[int, tuple[str, int]]:
        return {s.key[0]: (s.state, s.replayed) for s in arenas.stats().shapes}

    def call(*sizes: int) -> None:
        for n in sizes:
            x = torch.linspace(-1, 1, n * n).reshape(n, n)
            assert torch.equal(run([x])[0], chain([x])[0])

    call(2, 3, 4, 2, 3, 4)
    assert shapes() == {2: ("planned", 1), 3: ("planned", 1), 4: ("planned", 1)}
    call(*range(10, 30))  # none of them comes back: the table stays as it is
    assert set(shapes()) == {2, 3, 4} and arenas.stats().graphs[0].unknown_calls == 20
    call(3, 4, 29, 29)  # came back: takes the place of 2
    assert shapes() == {3: ("planned", 2), 4: ("planned", 2), 29: ("planned", 1)}
    assert 3 * 29 * 29 * 4 <= arenas.stats().size < 3 * (29 * 29 * 4 + 64)


def test_memory_goes_back_to_the_system() -> None:
    arenas = Arenas()
    run = arenas.graph().around(chain)
    for _ in range(2):
        run([X])
    committed = arenas.stats().committed
    assert committed > 0 and arenas.trim() == committed and arenas.stats().committed == 0
    assert torch.equal(run([X])[0], chain([X])[0]) and arenas.stats().committed == committed
    assert Arenas().trim() == 0


def test_more_backends_than_there_is_room_for() -> None:
    """Arenas of backends that are gone are used again; where all are taken, the heap serves."""
    stash: list[torch.Tensor] = []
    keep = False

    def program(args: list[Any]) -> list[torch.Tensor]:
        y = args[0] + 1
        if keep:
            stash.append(y)
        return [y * 2]

    for hold in (False, True):
        unleased = 0
        for _ in range(80):
            arenas = Arenas()
            run = arenas.graph().around(program)
            for flag in (False, False, hold):
                keep = flag
                assert torch.equal(run([X])[0], (X + 1) * 2)
            unleased += arenas.stats().shapes[0].unleased
            del arenas, run
        assert (unleased > 0) == hold
    assert all(torch.equal(s, X + 1) for s in stash)
    stash.clear()
    arenas = Arenas()
    run = arenas.graph().around(program)
    keep = False
    for _ in range(2):
        run([X])
    assert only(arenas).replayed == 1


def test_a_plan_that_is_not_sound_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Overlapping:
        offsets: dict[str, int] = {}  # noqa: RUF012
        size = 1 << 20

    monkeypatch.setattr(arena_module, "assign_offsets", lambda *a, **k: Overlapping)
    arenas = Arenas()
    run = arenas.graph().around(chain)
    for _ in range(3):
        assert torch.equal(run([X])[0], chain([X])[0])
    assert only(arenas).state == "off" and "overlap" in only(arenas).reason and "overlap" in caplog.text


def test_stats_of_all_backends() -> None:
    arenas = Arenas()
    run = arenas.graph(7).around(chain)
    run([X])
    assert any(g.index == 7 for s in arena_module.stats() for g in s.graphs)
