"""Which pages are free, used or cached: free list, reference counts, content keys, least recently used eviction."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from ascend_dynamo.errors import BadPageError, DoubleFreeError, KVCacheError, OutOfPagesError


class Pages:
    """Pages 0 to ``total - 1``, each in exactly one state:

    * free: on the free list, content meaningless;
    * used: ``refs[page]`` holders, at least one;
    * cached: no holder, but its content is known by a key, so that it can be found again until it is evicted.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise KVCacheError(f"num_pages={total}: a pool has at least one page")
        self.total = total
        self.refs = [0] * total
        self.evictions = 0
        self._free = list(range(total - 1, -1, -1))  # a stack: pages that were used last are warm in the CPU's caches
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Pages on the free list."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that can still be found by their content."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Pages that ``take`` can give: free ones and cached ones, which it evicts."""
        return len(self._free) + len(self._cached)

    def require(self, asked: int, freed: int = 0) -> None:
        """OutOfPagesError unless ``asked`` pages could be taken once ``freed`` more are given back."""
        if asked <= self.available + freed:
            return
        raise OutOfPagesError(
            f"{asked} pages asked for, {self.available + freed} to be had (free {self.free}, cached {self.cached},"
            f" given back by this call {freed}) of {self.total}; free sequences, or make the pool with more pages",
            asked=asked,
            free=self.available + freed,
            total=self.total,
        )

    def take(self, count: int) -> list[int]:
        """So many pages with one holder each; the least recently used cached pages are evicted if need be."""
        self.require(count)
        taken = []
        for _ in range(count):
            if not self._free:
                victim, _nothing = self._cached.popitem(last=False)
                self.forget(victim)
                self.evictions += 1
                self._free.append(victim)
            page = self._free.pop()
            self.refs[page] = 1
            taken.append(page)
        return taken

    def share(self, page: int) -> None:
        """One more holder of a used or cached page."""
        self._cached.pop(page, None)
        self.refs[page] += 1

    def drop(self, page: int) -> None:
        """One holder less; the last one leaves the page cached if its content has a key, else free."""
        if self.refs[page] < 1:
            raise DoubleFreeError(f"page {page} is given back, but nobody holds it")
        self.refs[page] -= 1
        if self.refs[page] == 0:
            if page in self._keys:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Make the content of a used page findable; of two pages with the same content the first one stays so."""
        if page not in self._keys and key not in self._by_key:
            self._keys[page], self._by_key[key] = key, page

    def forget(self, page: int) -> None:
        """The content of a page is about to change: no longer findable."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._by_key[key]

    def find(self, key: bytes) -> int | None:
        """The page with this content, used or cached."""
        return self._by_key.get(key)

    def evict(self, count: int | None = None) -> int:
        """Give up to ``count`` cached pages (default: all) back to the free list, oldest first; how many it were."""
        count = self.cached if count is None else min(count, self.cached)
        for _ in range(count):
            victim, _nothing = self._cached.popitem(last=False)
            self.forget(victim)
            self._free.append(victim)
        self.evictions += count
        return count

    def freed_by(self, drops: Counter[int], gains: Counter[int] | None = None) -> int:
        """How many pages become available if each is dropped and shared so many times."""
        gains = gains or Counter()
        freed = sum(self.refs[page] + gains[page] == count for page, count in drops.items())
        return freed - sum(self.refs[page] == 0 and page not in drops for page in gains)

    def in_range(self, pages: Iterable[int]) -> None:
        """BadPageError for an id outside the pool."""
        for page in pages:
            if not (isinstance(page, int) and 0 <= page < self.total):
                raise BadPageError(f"page {page!r} is not in this pool, which has pages 0 to {self.total - 1}")

    def check(self, holders: Counter[int]) -> None:
        """KVCacheError unless every page is in exactly one state and has the holders that are counted."""
        free, cached = set(self._free), set(self._cached)
        problems = []
        if len(free) != len(self._free):
            problems.append("a page is on the free list twice")
        for page in range(self.total):
            if self.refs[page] != holders[page]:
                problems.append(f"page {page} counts {self.refs[page]} holders and has {holders[page]}")
            if (page in free) + (page in cached) + (self.refs[page] > 0) != 1:
                problems.append(f"page {page} is not exactly one of free, cached, used")
            if page in free and page in self._keys:
                problems.append(f"free page {page} can be found by its content")
            if page in cached and page not in self._keys:
                problems.append(f"cached page {page} cannot be found")
        if {key: page for page, key in self._keys.items()} != self._by_key:
            problems.append("the two directions of the content keys differ")
        if problems:
            raise KVCacheError("the block pool is corrupt: " + "; ".join(problems[:5]))
