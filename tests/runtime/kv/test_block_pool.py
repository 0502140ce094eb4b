"""The block pool against a simple model, operation by operation, and each of its named errors."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ascend_dynamo.errors import (
    BadPageError,
    DoubleFreeError,
    KVCacheError,
    OutOfPagesError,
    PageSizeError,
    UnknownSequenceError,
)
from ascend_dynamo.runtime.kv import ABSENT, BlockPool
from ascend_dynamo.runtime.kv.prefix import page_keys


class Memory:
    """What the pages hold, written and copied as the pool says: one token per slot."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool, self.slots = pool, {}

    def copy(self, copies: Any) -> None:
        for source, target in copies:
            for offset in range(self.pool.page_size):
                self.slots[target, offset] = self.slots.get((source, offset))

    def write(self, sequence: int, begin: int, tokens: list[int]) -> None:
        for slot, token in zip(self.pool.slots(sequence, begin, begin + len(tokens)), tokens, strict=True):
            assert slot != ABSENT
            self.slots[divmod(slot, self.pool.page_size)] = token

    def read(self, sequence: int) -> list[int | None]:
        pages, size = self.pool.table(sequence), self.pool.page_size
        return [
            self.slots.get((pages[j // size], j % size)) if pages[j // size] != ABSENT else None
            for j in range(self.pool.length(sequence))
        ]


def state(pool: BlockPool) -> Any:
    """Everything that a failed call must leave alone."""
    tables = {s: (pool.table(s), pool.length(s)) for s in pool.sequences}
    return tables, tuple(pool.pages.refs), pool.pages.free, pool.pages.cached, pool.statistics()


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)  # few values, so that prefixes meet
PICK = st.randoms(use_true_random=False)


class PoolMachine(RuleBasedStateMachine):
    """Random operations. The model: what every sequence says, and which of its tokens a window still sees."""

    @initialize(pages=st.integers(1, 12), size=st.integers(1, 4), window=st.sampled_from([None, None, 1, 3, 5]))
    def start(self, pages: int, size: int, window: int | None) -> None:
        self.pool = BlockPool(pages, size, window=window)
        self.memory = Memory(self.pool)
        self.said: dict[int, list[int]] = {}
        self.empty: dict[int, int] = {}  # leading tokens that are never stored
        self.loose: list[int] = []
        self.freed: list[int] = []

    def attempt(self, call: Any) -> Any:
        """The result, or None for a refusal, which must change nothing."""
        before = state(self.pool)
        try:
            return call()
        except KVCacheError:
            assert state(self.pool) == before
            return None

    def some(self, pick: random.Random) -> int:
        return pick.choice(list(self.said))

    @rule(tokens=TOKENS, known=st.booleans())
    def open(self, tokens: list[int], known: bool) -> None:
        sequence, cached = self.pool.open(tokens if known else None)
        self.said[sequence], self.empty[sequence] = tokens[:cached], 0
        assert cached < len(tokens) and cached % self.pool.page_size == 0
        self.grow({sequence: tokens[cached:]}, known)

    @rule(pages=st.integers(0, 2))
    def open_behind_padding(self, pages: int) -> None:
        sequence, _ = self.pool.open(empty_pages=pages)
        self.empty[sequence] = pages * self.pool.page_size
        self.said[sequence] = [-1] * self.empty[sequence]

    def grow(self, news: dict[int, list[int]], known: bool = True) -> None:
        asked = news if known else {s: len(new) for s, new in news.items()}
        copies = self.attempt(lambda: self.pool.append_all(asked))
        if copies is None:
            return
        self.memory.copy(copies)
        for sequence, new in news.items():
            self.memory.write(sequence, len(self.said[sequence]), new)
            self.said[sequence] = self.said[sequence] + new

    @precondition(lambda self: self.said)
    @rule(pick=PICK, tokens=TOKENS, known=st.booleans(), commit=st.booleans())
    def append(self, pick: random.Random, tokens: list[int], known: bool, commit: bool) -> None:
        chosen = pick.sample(list(self.said), pick.randint(1, len(self.said)))
        self.grow({s: tokens[: pick.randint(1, len(tokens))] for s in chosen}, known)
        if commit:
            for s in chosen:
                self.pool.commit(s)

    @precondition(lambda self: self.said)
    @rule(pick=PICK)
    def fork(self, pick: random.Random) -> None:
        old = self.some(pick)
        new = self.pool.fork(old)
        self.said[new], self.empty[new] = list(self.said[old]), self.empty[old]

    @precondition(lambda self: self.said)
    @rule(pick=PICK)
    def free(self, pick: random.Random) -> None:
        chosen = pick.sample(list(self.said), pick.randint(1, len(self.said)))
        self.pool.free(*chosen)
        for s in chosen:
            del self.said[s], self.empty[s]
        self.freed += chosen

    @precondition(lambda self: self.said)
    @rule(pick=PICK)
    def crop(self, pick: random.Random) -> None:
        chosen = pick.sample(list(self.said), pick.randint(1, len(self.said)))
        length = pick.randint(0, min(len(self.said[s]) for s in chosen))
        copies = self.attempt(lambda: self.pool.crop(chosen, length))
        if copies is not None:
            self.memory.copy(copies)
            for s in chosen:
                self.said[s], self.empty[s] = self.said[s][:length], min(self.empty[s], length)

    @precondition(lambda self: self.said)
    @rule(pick=PICK, count=st.integers(1, 4))
    def reorder(self, pick: random.Random, count: int) -> None:
        chosen = pick.sample(list(self.said), pick.randint(1, len(self.said)))
        parents = [pick.randrange(len(chosen)) for _ in range(count)]
        done = self.attempt(lambda: self.pool.reorder(chosen, parents))
        if done is None:
            return
        new, copies = done
        self.memory.copy(copies)
        said = [(list(self.said[chosen[p]]), self.empty[chosen[p]]) for p in parents]
        for s in chosen:
            del self.said[s], self.empty[s]
        for s, (tokens, empty) in zip(new, said, strict=True):
            self.said[s], self.empty[s] = tokens, empty
        tails = [self.pool.table(s)[-1] for s in new if self.pool.length(s) % self.pool.page_size]
        assert len(set(tails)) == len(tails)  # each may write at once

    @rule(count=st.integers(0, 3))
    def allocate(self, count: int) -> None:
        self.loose += self.attempt(lambda: self.pool.allocate(count)) or []

    @precondition(lambda self: self.loose)
    @rule(pick=PICK)
    def release(self, pick: random.Random) -> None:
        page = pick.choice(self.loose)
        self.pool.release([page])
        self.loose.remove(page)

    @rule(count=st.none() | st.integers(0, 3))
    def evict(self, count: int | None) -> None:
        before = self.pool.pages.cached
        assert self.pool.evict(count) == before - self.pool.pages.cached

    @rule(pick=PICK)
    def misuse(self, pick: random.Random) -> None:
        before = state(self.pool)
        with pytest.raises(UnknownSequenceError):
            self.pool.append(10**9, 1)
        with pytest.raises(BadPageError):
            self.pool.release([self.pool.pages.total])
        unheld = [page for page in range(self.pool.pages.total) if not self.pool.pages.refs[page]]
        if self.freed:
            with pytest.raises(DoubleFreeError):
                self.pool.free(pick.choice(self.freed))
        if unheld:
            with pytest.raises(DoubleFreeError):
                self.pool.release([pick.choice(unheld)])
        assert state(self.pool) == before

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        pool, statistics = self.pool, self.pool.statistics()
        assert set(pool.sequences) == set(self.said)
        assert statistics.orphans == 0 and all(0 <= w < pool.page_size for w in statistics.waste.values())
        assert not set(self.loose) & {p for s in pool.sequences for p in pool.table(s)}
        for sequence, said in self.said.items():
            assert pool.length(sequence) == len(said)
            seen = 0 if pool.window is None else len(said) - pool.window + 1
            for j, (token, held) in enumerate(zip(said, self.memory.read(sequence), strict=True)):
                if j >= max(seen, self.empty[sequence]):
                    assert held == token, (sequence, j)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.free(*self.said)
            self.pool.release(self.loose)
            self.pool.evict()
            assert self.pool.pages.free == self.pool.pages.total
            self.pool.check()


SOAK = hypothesis.settings.default.max_examples >= 1000  # make soak: a million operations
TestPool = PoolMachine.TestCase
TestPool.settings = hypothesis.settings(stateful_step_count=500 if SOAK else 40)


def test_ten_thousand_requests_leave_every_page_free() -> None:
    """A served pool: prompts with common prefixes, forks, beams, evictions, a window in half of the runs."""
    rng = random.Random(0)
    for window in (None, 24):
        pool = BlockPool(96, 8, window=window)
        prefixes = [[rng.randrange(50) for _ in range(rng.randrange(8, 60))] for _ in range(12)]
        running: list[int] = []
        opened = 0
        while opened < 5000 or running:
            if opened < 5000 and len(running) < 12:
                prompt = rng.choice(prefixes) + [rng.randrange(50) for _ in range(rng.randrange(1, 12))]
                sequence, cached = pool.open(prompt)
                opened += 1
                try:
                    pool.append(sequence, prompt[cached:])
                    pool.commit(sequence)
                    running.append(sequence)
                    if rng.random() < 0.2:
                        running.append(pool.fork(sequence))
                except OutOfPagesError:
                    pool.free(sequence)
                    with suppress(IndexError):
                        pool.free(running.pop(rng.randrange(len(running))))
            for sequence in rng.sample(running, len(running)):
                try:
                    pool.append(sequence, [rng.randrange(50)])
                except OutOfPagesError:
                    pool.free(sequence)
                    running.remove(sequence)
            if len(running) > 3 and rng.random() < 0.1:
                with suppress(OutOfPagesError):
                    new, _ = pool.reorder(running[:3], [rng.randrange(3) for _ in range(3)])
                    running[:3] = new
            for sequence in [s for s in running if rng.random() < 0.15]:
                pool.commit(sequence)
                pool.free(sequence)
                running.remove(sequence)
            if opened % 500 == 0:
                pool.check()
        statistics = pool.statistics()
        assert statistics.used == statistics.orphans == 0 and statistics.free + statistics.cached == 96
        assert statistics.evictions > 1000 and statistics.copies > 100 and statistics.prefix_hits > 1000
        pool.evict()
        assert pool.pages.free == 96
        pool.check()


def test_a_page_that_was_lost_is_counted() -> None:
    pool = BlockPool(4, 2)
    sequence, _ = pool.open()
    pool.append(sequence, 3)
    pool.pages.take(1)  # behind the pool's back: nobody's table has it
    assert pool.statistics().used == 2 and pool.statistics().orphans == 1


def test_a_prefix_is_shared_once_it_is_committed() -> None:
    pool = BlockPool(10, 4)
    prompt = list(range(11))
    first, cached = pool.open(prompt)
    assert cached == 0
    pool.append(first, prompt)
    assert pool.match(prompt) == 0  # reserved, not written yet
    pool.commit(first)
    second, cached = pool.open(prompt)
    assert cached == 8 and pool.table(second) == pool.table(first)[:2]
    assert pool.match(prompt[:8]) == 4  # never all of it: the last token's output is wanted
    assert pool.match(prompt, salt=b"another adapter") == 0
    assert pool.match([9, *prompt[1:]]) == 0 and pool.match([*prompt[:7], 9, 9, 9]) == 4
    pool.free(first, second)
    assert (pool.pages.used, pool.pages.cached) == (0, 2)
    third, cached = pool.open(prompt, limit=5)
    assert cached == 4
    pool.free(third)
    pool.allocate(10)  # evicts
    assert pool.match(prompt) == 0 and pool.statistics().evictions == 2


def test_the_last_pages_of_a_freed_sequence_are_evicted_first() -> None:
    pool = BlockPool(4, 2)
    tokens = list(range(9))
    sequence, _ = pool.open(tokens)
    pool.append(sequence, tokens[:8])
    pool.commit(sequence)
    pool.free(sequence)
    for left in (6, 4, 2, 0):
        pool.allocate(1)
        assert pool.match(tokens) == left


def test_a_shared_tail_is_copied_by_all_writers_but_the_last() -> None:
    pool = BlockPool(8, 4)
    first, _ = pool.open()
    pool.append(first, 6)
    forks = [pool.fork(first), pool.fork(first)]
    assert pool.pages.used == 2
    tail = pool.table(first)[1]
    copies = pool.append_all({s: 1 for s in (first, *forks)})
    assert [c.source for c in copies] == [tail, tail] and pool.pages.used == 4
    assert pool.table(forks[1])[1] == tail and len({pool.table(s)[1] for s in (first, *forks)}) == 3
    assert {pool.table(s)[0] for s in (first, *forks)} == {pool.table(first)[0]}


def test_pages_behind_the_window_are_reused() -> None:
    pool = BlockPool(3, 4, window=5)
    sequence, _ = pool.open()
    for _ in range(100):
        pool.append(sequence, 1)
    assert pool.length(sequence) == 100 and pool.pages.used <= 3
    assert pool.table(sequence)[:23] == (ABSENT,) * 23
    with pytest.raises(KVCacheError, match="set retain"):
        pool.crop([sequence], 88)
    pool.crop([sequence], 99)
    kept = BlockPool(30, 4, window=5)
    kept.retain = True
    sequence, _ = kept.open()
    kept.append(sequence, 50)
    kept.append(sequence, 50)
    kept.crop([sequence], 52)
    assert ABSENT not in kept.table(sequence)


def test_exhaustion_says_what_is_free_and_what_was_asked() -> None:
    pool = BlockPool(4, 4)
    one, _ = pool.open()
    pool.append(one, 9)
    before = state(pool)
    with pytest.raises(OutOfPagesError, match=r"2 pages asked for, 1 to be had .* of 4; free sequences") as found:
        pool.append(one, 8)
    assert (found.value.asked, found.value.free, found.value.total) == (2, 1, 4)
    two = pool.fork(one)
    pool.append(two, 1)  # its copy of the tail is the last page
    with pytest.raises(OutOfPagesError):
        pool.append_all({one: 3, two: 3})  # neither
    assert pool.length(one) == 9 and pool.length(two) == 10
    pool.free(two)
    assert state(pool)[0] == before[0]


def test_misuse_is_named() -> None:
    pool = BlockPool(4, 4)
    one, _ = pool.open()
    pool.append(one, 5)
    pool.free(one)
    with pytest.raises(DoubleFreeError, match="sequence 0 was freed already"):
        pool.free(one)
    with pytest.raises(UnknownSequenceError, match="sequence 7 was never opened"):
        pool.table(7)
    two, _ = pool.open()
    with pytest.raises(DoubleFreeError, match="twice in one call"):
        pool.free(two, two)
    pool.append(two, 1)
    with pytest.raises(BadPageError, match="belongs to a sequence"):
        pool.release([pool.table(two)[0]])
    with pytest.raises(BadPageError, match="has pages 0 to 3"):
        pool.release([4])
    pages = pool.allocate(1)
    with pytest.raises(DoubleFreeError, match="given back 2 times and is held 1 times"):
        pool.release(pages * 2)
    pool.release(pages)
    for call, match in (
        (lambda: pool.append(two, -1), "-1 tokens cannot be appended"),
        (lambda: pool.crop([two], 2), "cannot be cropped to 2"),
        (lambda: pool.slots(two, 0, 2), "are not in a sequence of 1"),
        (lambda: pool.reorder([two], [1]), "no indices into 1 sequences"),
        (lambda: pool.reorder([two, two], [0]), "stands twice"),
        (lambda: pool.open([1], empty_pages=1), "empty pages"),
        (lambda: pool.allocate(-1), "-1 pages"),
        (lambda: BlockPool(0, 4), "num_pages=0"),
        (lambda: BlockPool(4, 4, window=0), "window=0"),
    ):
        with pytest.raises(KVCacheError, match=match):
            call()
    with pytest.raises(PageSizeError, match="page_size=0"):
        BlockPool(4, 0)
    pool.check()


def test_the_checker_sees_corruption() -> None:
    def broken(damage: Any, match: str) -> None:
        pool = BlockPool(6, 2)
        tokens = [1, 2, 3, 4, 5]
        for _ in range(2):
            sequence, cached = pool.open(tokens)
            pool.append(sequence, tokens[cached:])
            pool.commit(sequence)
        pool.free(0)
        pool.check()
        damage(pool)
        with pytest.raises(KVCacheError, match=match):
            pool.check()

    broken(lambda pool: pool.pages._free.append(pool.pages._free[0]), "twice")
    broken(lambda pool: pool.pages.share(pool.table(1)[0]), "counts 2 holders and has 1")
    broken(lambda pool: pool.pages._free.pop(), "not exactly one")
    broken(lambda pool: pool.pages._by_key.clear(), "directions")
    broken(lambda pool: pool._sequences[1].pages.append(ABSENT), "sequence 1 has 4 pages")


def test_keys_depend_on_everything_before_them() -> None:
    keys = page_keys([1, 2, 3, 4, 5], 2)
    assert len(keys) == 2 and page_keys([1, 2, 3, 4, 5, 6], 2, known=keys)[:2] == keys
    assert page_keys([9, 2, 3, 4], 2)[1] != keys[1] and page_keys([1, 2, 3, 4], 2, b"x")[0] != keys[0]
    assert len({key for key in page_keys([7] * 40, 2)}) == 20
