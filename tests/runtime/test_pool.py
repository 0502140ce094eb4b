"""MemoryPool: sizes, views, errors that leave it intact; and any sequence of operations against a list of bytes."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ascend_dynamo
from ascend_dynamo import compat
from ascend_dynamo.errors import (
    ForeignHandleError,
    MemoryPlanError,
    PoolDoubleFreeError,
    PoolError,
    PoolExhaustedError,
)
from ascend_dynamo.runtime.pool import Allocation, MemoryPool


def test_as_in_the_document() -> None:
    pool = compat.MemoryPool(pool_size="4GB", block_size="1MB")
    assert (pool.pool_size, pool.block_size) == (1 << 32, 1 << 20)
    piece = pool.allocate("16MB")
    keys = pool.tensor((32, 1024, 128), torch.bfloat16)
    stats = pool.statistics()
    assert (stats.used, stats.reserved, stats.live) == (24 << 20, 24 << 20, 2)
    pool.free(piece)
    pool.free(keys)
    assert pool.statistics().free == 1 << 32 and pool.statistics().peak == 24 << 20
    assert ascend_dynamo.MemoryPool is compat.MemoryPool is MemoryPool
    assert repr(pool) == "<MemoryPool of 4.00 GB in blocks of 1.00 MB>"


def test_pieces_are_aligned_views_that_share_nothing() -> None:
    pool = MemoryPool(64 * 100, 64)
    pieces = [pool.allocate(n) for n in (1, 64, 65, 200)]
    assert [p.offset for p in pieces] == [0, 64, 128, 256]
    for i, p in enumerate(pieces):
        p.buffer.fill_(i)
        assert p.buffer.data_ptr() % 64 == 0
    assert [p.buffer.unique().tolist() for p in pieces] == [[0], [1], [2], [3]]
    t = pieces[3].tensor((5, 10), torch.float32)
    assert t.shape == (5, 10) and t.is_contiguous() and t.data_ptr() == pieces[3].buffer.data_ptr()
    with pytest.raises(PoolError, match=r"takes 204 bytes; this allocation has 200"):
        pieces[3].tensor((51,))
    stats = pool.statistics()
    assert (stats.used, stats.reserved, stats.waste) == (330, 64 * 8, 64 * 8 - 330)
    assert stats.to_dict()["waste"] == stats.waste and stats.to_dict()["fragmentation"] == 0.0


def test_free_neighbours_merge_and_the_smallest_hole_is_taken() -> None:
    pool = MemoryPool(64 * 10, 64)
    a, b, c, d = (pool.allocate(64 * n) for n in (3, 2, 1, 2))
    pool.free(a)
    pool.free(c)
    stats = pool.statistics()
    assert (stats.holes, stats.largest_hole, stats.free) == (3, 64 * 3, 64 * 6)
    assert stats.fragmentation == 0.5
    assert pool.allocate(64).offset == 64 * 5  # where c was, not where a was
    pool.free(b)
    assert pool.allocate(64 * 5).offset == 0  # a and b
    pool.free(d)
    assert pool.statistics().holes == 1


def test_exhaustion_says_what_to_change() -> None:
    pool = MemoryPool("640", 64)
    pieces = [pool.allocate(64) for _ in range(10)]
    for p in pieces[::2]:
        p.free()
    before = pool.statistics()
    with pytest.raises(PoolExhaustedError, match=r"free in 5 holes, the largest 64 B.*between the holes") as error:
        pool.allocate(128)
    assert (error.value.asked, error.value.free, error.value.largest_hole) == (128, 320, 64)
    with pytest.raises(PoolExhaustedError, match="free 64 B more"):
        pool.allocate(384)
    with pytest.raises(MemoryError, match="pool_size=704 at least"):
        pool.allocate(641)
    after = pool.statistics()
    assert after.failures == 3 and {**after.to_dict(), "failures": 0} == before.to_dict()


def test_wrong_frees_leave_the_pool_intact() -> None:
    pool, other = MemoryPool(6400, 64), MemoryPool(6400, 64)
    piece, t = pool.allocate(64), pool.tensor((4, 4))
    pool.free(piece)
    again = pool.allocate(64)  # the same place
    assert again.offset == piece.offset
    with pytest.raises(PoolDoubleFreeError, match="given back already"):
        pool.free(piece)
    with pytest.raises(PoolDoubleFreeError, match="no memory any more"):
        _ = piece.buffer
    for foreign in (other.allocate(64), other.tensor((2,)), torch.ones(2), t[0], t.view(16), object()):
        with pytest.raises(ForeignHandleError, match="the pool it came from"):
            pool.free(foreign)  # type: ignore[arg-type]
    pool.free(t)
    with pytest.raises(PoolDoubleFreeError):
        pool.free(t)
    assert pool.statistics().live == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"pool_size": "4XB"}, MemoryPlanError, "4XB"),
        ({"pool_size": 0}, MemoryPlanError, "0"),
        ({"block_size": -1}, MemoryPlanError, "-1"),
        ({"pool_size": 6400, "block_size": 100}, PoolError, "multiple of 64"),
        ({"pool_size": "1MB", "block_size": "2MB"}, PoolError, "smaller block"),
        ({"pool_size": "8000000TB"}, PoolExhaustedError, "smaller pool_size"),
    ],
)
def test_pools_that_make_no_sense(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryPool(**arguments)
    with pytest.raises(MemoryPlanError):
        MemoryPool(6400, 64).tensor((0, 3))


def test_as_context_managers(caplog: pytest.LogCaptureFixture) -> None:
    with MemoryPool(6400, 64) as pool:
        with pool.allocate(100) as piece:
            assert pool.statistics().live == 1
            piece.tensor((25,)).fill_(1.0)
        assert pool.statistics().live == 0
        t = pool.tensor((10,))
        t.fill_(7.0)
    assert "1 allocations are held" in caplog.text
    assert t.tolist() == [7.0] * 10  # the reservation lives as long as its last tensor
    with pytest.raises(PoolError, match="closed"):
        pool.allocate(64)
    pool.free(t)
    pool.close()


def test_threads() -> None:
    pool = MemoryPool(64 * 200, 64)
    wrong: list[object] = []

    def work(seed: int) -> None:
        r = random.Random(seed)
        held: list[Allocation] = []
        try:
            for _ in range(300):
                if held and (len(held) > 8 or r.random() < 0.5):
                    p = held.pop(r.randrange(len(held)))
                    if not bool((p.buffer == seed).all()):
                        wrong.append(p)
                    p.free()
                else:
                    held.append(pool.allocate(r.randrange(1, 300)))
                    held[-1].buffer.fill_(seed)
            for p in held:
                p.free()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stats = pool.statistics()
    assert not wrong and (stats.live, stats.holes, stats.used) == (0, 1, 0)


class Model(RuleBasedStateMachine):
    """The pool against one owner per block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MemoryPool(64 * 16, 64)
        self.owner: list[int | None] = [None] * 16
        self.held: dict[int, Allocation | torch.Tensor] = {}
        self.gone: list[Allocation | torch.Tensor] = []
        self.number = 0

    def runs(self) -> list[int]:
        """Lengths of the runs of free blocks."""
        words = "".join(".x"[o is not None] for o in self.owner).split("x")
        return [len(w) for w in words if w]

    @rule(size=st.integers(1, 64 * 7), as_tensor=st.booleans())
    def allocate(self, size: int, as_tensor: bool) -> None:
        blocks = -(-size // 64)
        if max(self.runs(), default=0) < blocks:
            with pytest.raises(PoolExhaustedError):
                self.pool.allocate(size)
            return
        self.number += 1
        got = self.pool.tensor((size,), torch.uint8) if as_tensor else self.pool.allocate(size)
        data = got if isinstance(got, torch.Tensor) else got.buffer
        assert data.shape == (size,)
        start = data.storage_offset() // 64
        assert self.owner[start : start + blocks] == [None] * blocks
        self.owner[start : start + blocks] = [self.number] * blocks
        data.fill_(self.number % 251)
        self.held[self.number] = got

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        piece = self.held.pop(number)
        self.pool.free(piece)
        self.owner = [None if o == number else o for o in self.owner]
        self.gone.append(piece)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def free_again(self, data: st.DataObject) -> None:
        with pytest.raises(PoolDoubleFreeError):
            self.pool.free(data.draw(st.sampled_from(self.gone)))

    @invariant()
    def agrees(self) -> None:
        stats, runs = self.pool.statistics(), self.runs()
        assert stats.live == len(self.held) and stats.holes == len(runs)
        assert stats.largest_hole == 64 * max(runs, default=0) and stats.free == 64 * sum(runs)
        for number, piece in self.held.items():
            data = piece if isinstance(piece, torch.Tensor) else piece.buffer
            assert bool((data == number % 251).all())


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
