"""The dynamic programme finds what brute force finds."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_dynamo.cache.buckets import Buckets, optimal_buckets

HISTOGRAMS = st.dictionaries(st.integers(1, 40), st.integers(1, 20), min_size=1, max_size=9)


def padding(histogram: dict[int, int], sizes: tuple[int, ...]) -> int:
    return sum(n * (min(s for s in sizes if s >= size) - size) for size, n in histogram.items())


def brute_force(histogram: dict[int, int], k: int) -> int:
    largest = max(histogram)
    smaller = [s for s in histogram if s != largest]
    choices = (c for r in range(min(k, len(histogram))) for c in combinations(smaller, r))
    return min(padding(histogram, (*c, largest)) for c in choices)


@given(HISTOGRAMS, st.integers(1, 6))
def test_equals_brute_force(histogram: dict[int, int], k: int) -> None:
    found = optimal_buckets(histogram, k)
    assert found.padding == brute_force(histogram, k) == padding(histogram, found.sizes)
    assert found.real == sum(size * n for size, n in histogram.items())
    assert len(found.sizes) <= k and found.sizes == tuple(sorted(set(found.sizes)))
    assert found.sizes[-1] == max(histogram) and set(found.sizes) <= set(histogram)
    assert 0 <= found.waste < 1


@given(HISTOGRAMS)
def test_more_buckets_never_waste_more_and_enough_waste_nothing(histogram: dict[int, int]) -> None:
    wastes = [optimal_buckets(histogram, k).waste for k in range(1, len(histogram) + 2)]
    assert wastes == sorted(wastes, reverse=True) and wastes[-1] == 0


def test_no_more_buckets_than_are_of_use() -> None:
    assert optimal_buckets({7: 3}, 5) == Buckets((7,), real=21, padding=0)
    assert Buckets((), 0, 0).waste == 0


def test_thousands_of_sizes_are_no_trouble() -> None:
    found = optimal_buckets(dict.fromkeys(range(1, 4097), 1), 16)
    assert found.sizes == tuple(range(256, 4097, 256))


@pytest.mark.parametrize(("histogram", "k"), [({}, 1), ({0: 1}, 1), ({1: 0}, 1), ({1: 1}, 0)])
def test_nonsense_is_refused(histogram: dict[int, int], k: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        optimal_buckets(histogram, k)
