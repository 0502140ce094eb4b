"""Gears: picking, padding, trimming, and the LRU of graphs."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_dynamo.cache.gears import LRU, Gears, pad, trim

GEARS = Gears.parse({"batch": [8, 1, 4, 2, 4], "seq": "pow2", "kv": "multiple:128", "one": 16})


@pytest.mark.parametrize(
    ("dim", "size", "gear"),
    [
        ("batch", 1, 1),
        ("batch", 3, 4),
        ("batch", 8, 8),
        ("batch", 9, 16),
        ("batch", 17, 32),
        ("batch", 0, 0),
        ("seq", 1, 1),
        ("seq", 129, 256),
        ("kv", 1, 128),
        ("kv", 129, 256),
        ("one", 3, 16),
        ("unknown", 37, 37),
    ],
)
def test_pick(dim: str, size: int, gear: int) -> None:
    assert GEARS.pick(dim, size) == gear


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="size -1"):
        GEARS.pick("batch", -1)


SPECS = st.one_of(
    st.just("pow2"),
    st.integers(1, 64).map(lambda n: f"multiple:{n}"),
    st.lists(st.integers(1, 200), min_size=1, max_size=6),
)


@given(SPECS, st.integers(0, 5000))
def test_a_gear_holds_its_size_is_itself_a_gear_and_is_monotone(spec: object, size: int) -> None:
    gears = Gears.parse({"d": spec})
    gear = gears.pick("d", size)
    assert gear >= size
    assert gears.pick("d", gear) == gear
    assert gears.pick("d", size + 1) >= gear


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_few_graphs_however_long_the_inputs(sizes: list[int]) -> None:
    gears = Gears.parse({"d": sizes})
    used = {gears.pick("d", n) for n in range(1, 4096)}
    assert len(used) <= len(set(sizes)) + 13


def test_gears_are_values() -> None:
    same = Gears.parse({"one": [16], "kv": "multiple:128", "seq": "pow2", "batch": (1, 2, 4, 8)})
    assert same == GEARS and hash(same) == hash(GEARS) and repr(same) == repr(GEARS)
    assert GEARS.sizes("batch") == (1, 2, 4, 8) and GEARS.sizes("seq") == () == GEARS.sizes("none")
    assert "seq" in GEARS and "none" not in GEARS


def test_from_histogram() -> None:
    gears = Gears.from_histogram({"seq": {10: 100, 11: 5, 50: 1}}, k=2)
    assert gears.sizes("seq") == (11, 50)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_trim_undoes_pad(shape: list[int], data: st.DataObject, dtype: torch.dtype) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    extra = data.draw(st.integers(0, 3))
    x = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    padded = pad(x, dim, shape[dim] + extra, value=1)
    assert padded.dtype == dtype and padded.shape[dim] == shape[dim] + extra
    assert torch.equal(trim(padded, dim, shape[dim]), x)
    assert bool((padded.narrow(dim, shape[dim], extra) == 1).all())


def test_nothing_is_copied_where_nothing_is_to_do() -> None:
    x = torch.ones(2, 3)
    assert pad(x, 1, 3) is x and trim(x, 1, 3) is x
    assert trim(x, 0, 1).data_ptr() == x.data_ptr()


def test_impossible_paddings_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="cannot pad dimension 1 of size 3 to 2"):
        pad(x, 1, 2)
    with pytest.raises(ValueError, match="cannot trim dimension 0 of size 2 to 3"):
        trim(x, 0, 3)


def test_lru_evicts_the_least_recently_used() -> None:
    gone: list[tuple[str, int]] = []
    cache: LRU[str, int] = LRU(2, on_evict=lambda k, v: gone.append((k, v)))
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert gone == [("b", 2)] and list(cache) == ["a", "c"]
    cache.put("a", 4)
    assert gone == [("b", 2), ("a", 1)] and list(cache) == ["c", "a"]
    assert cache.get("b") is None and cache.get("b", 9) == 9 and "b" not in cache and len(cache) == 2
    cache.clear()
    assert gone[2:] == [("c", 3), ("a", 4)] and len(cache) == 0


def test_lru_needs_room() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LRU(0)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("gp"), st.integers(0, 6)), max_size=40))
def test_lru_behaves_as_its_model(capacity: int, steps: list[tuple[str, int]]) -> None:
    cache: LRU[int, int] = LRU(capacity)
    model: list[int] = []
    for step, n in steps:
        if step == "g":
            assert cache.get(n) == (n if n in model else None)
        else:
            cache.put(n, n)
        if n in model:
            model.remove(n)
            model.append(n)
        elif step == "p":
            model = [*model, n][-capacity:]
        assert list(cache) == model


def test_lru_from_many_threads_keeps_its_bound_and_loses_nothing() -> None:
    gone: list[int] = []

    def on_evict(key: int, value: int) -> None:
        gone.append(key)
        cache.get(key)  # it may use the cache itself

    def fill(thread: int) -> None:
        for i in range(100):
            cache.put(thread * 100 + i, i)

    cache: LRU[int, int] = LRU(8, on_evict)
    threads = [threading.Thread(target=fill, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 8 and sorted([*gone, *cache]) == list(range(800))
