"""The best k sizes for a histogram of real sizes: least padding, found by dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Buckets:
    """Chosen sizes, ascending, with what they cost: ``real`` elements seen, ``padding`` elements added."""

    sizes: tuple[int, ...]
    real: int
    padding: int

    @property
    def waste(self) -> float:
        """Expected fraction of the computed elements that are padding, 0 <= waste < 1."""
        total = self.real + self.padding
        return self.padding / total if total else 0.0


def optimal_buckets(histogram: Mapping[int, int], k: int) -> Buckets:
    """At most ``k`` sizes such that padding each seen size up to the next of them adds the least elements.

    ``histogram`` is {size: count}. The largest seen size is always in the result, so every seen size fits. The
    cost of a bucket obeys the quadrangle inequality, so divide and conquer finds each layer in O(n log n).
    ValueError for an empty histogram, a size or count below 1, or ``k`` below 1.
    """
    seen = sorted(histogram)
    if k < 1:
        raise ValueError(f"at least one bucket is needed, not {k}")
    if not seen or seen[0] < 1 or min(histogram.values()) < 1:
        raise ValueError("a histogram needs at least one size, and sizes and counts of at least 1")
    n = len(seen)
    count = [0, *accumulate(histogram[s] for s in seen)]
    weight = [0, *accumulate(s * histogram[s] for s in seen)]

    def cost(i: int, j: int) -> int:
        """Padding when the sizes i..j-1 (of ``seen``) share the bucket seen[j-1]."""
        return seen[j - 1] * (count[j] - count[i]) - (weight[j] - weight[i])

    best = [0, *(cost(0, j) for j in range(1, n + 1))]
    cuts: list[list[int]] = [[0] * (n + 1)]
    for layer in range(2, min(k, n) + 1):
        below, best, cut = best, [0] * (n + 1), [0] * (n + 1)
        work = [(layer, n, layer - 1, n - 1)]
        while work:
            low, high, first, last = work.pop()
            if low > high:
                continue
            middle = (low + high) // 2
            options = range(first, min(last, middle - 1) + 1)
            best[middle], cut[middle] = min((below[i] + cost(i, middle), i) for i in options)
            work.append((low, middle - 1, first, cut[middle]))
            work.append((middle + 1, high, cut[middle], last))
        cuts.append(cut)

    sizes, end = [], n
    for cut in reversed(cuts):
        sizes.append(seen[end - 1])
        end = cut[end]
    return Buckets(tuple(reversed(sizes)), real=weight[n], padding=best[n])
