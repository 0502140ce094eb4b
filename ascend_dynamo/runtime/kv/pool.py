"""The block pool: sequences of pages with sharing, copy on write, sliding windows and eviction. Host logic only.

The pool holds no memory and no tensors: it says which page a token goes to and which pages must be copied first. After
PagedAttention (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ascend_dynamo.errors import (
    BadPageError,
    DoubleFreeError,
    KVCacheError,
    PageSizeError,
    UnknownSequenceError,
)
from ascend_dynamo.runtime.kv.pages import Pages
from ascend_dynamo.runtime.kv.prefix import page_keys
from ascend_dynamo.runtime.kv.records import ABSENT, Copy, New, Opened, PoolStatistics, StoredSequence


class BlockPool:
    """``num_pages`` pages of ``page_size`` tokens, shared by any number of sequences.

    ``window``: tokens that a sliding attention sees (the query at p sees j > p - window); pages wholly before it are
    given back at the next append and their table entries become -1. Every method that changes something either does
    all of it or raises one of the named errors and leaves the pool as it was.

    A page may be shared in two ways: by ``fork`` and ``reorder`` (any page), and by content (full pages of sequences
    whose tokens are given). Who writes into a shared, partly filled page gets a copy first: the methods return the
    copies to be made, in order, before the write.
    """

    def __init__(self, num_pages: int, page_size: int, *, window: int | None = None) -> None:
        if page_size < 1:
            raise PageSizeError(f"page_size={page_size}: a page holds at least one token")
        if window is not None and window < 1:
            raise KVCacheError(f"window={window}: a sliding window sees at least one token; None for no window")
        self.pages = Pages(num_pages)
        self.page_size, self.window = page_size, window
        self.retain = False
        """Keep the pages before the window, so that tokens can be taken back (speculative decoding)."""
        self._sequences: dict[int, StoredSequence] = {}
        self._loose: Counter[int] = Counter()  # pages held through allocate()
        self._next = 0
        self._hits = self._copied = 0

    # Sequences

    def open(
        self, tokens: Sequence[int] | None = None, *, salt: bytes = b"", limit: int | None = None, empty_pages: int = 0
    ) -> Opened:
        """A new sequence. With ``tokens``, its longest stored prefix of whole pages is shared (at most ``limit`` tokens
        and never all of them: the last one's output is wanted); append the rest. ``empty_pages`` leading pages are
        never stored: left padding."""
        if tokens is not None and empty_pages:
            raise KVCacheError("a sequence with empty pages is not found by its tokens: give one of the two")
        keys, shared = self._stored(tokens or (), salt, limit)
        for page in shared:
            self.pages.share(page)
        cached = len(shared) * self.page_size
        self._hits += cached
        ids = list(tokens[:cached]) if tokens is not None else None
        pages = [ABSENT] * empty_pages + shared
        return Opened(self._add(StoredSequence(pages, len(pages) * self.page_size, ids, keys, salt)), cached)

    def match(self, tokens: Sequence[int], *, salt: bytes = b"") -> int:
        """How many of the first tokens ``open`` would find stored: whole pages, never all of ``tokens``."""
        return len(self._stored(tokens, salt, None)[0]) * self.page_size

    def append(self, sequence: int, new: New) -> list[Copy]:
        """Room for new tokens (how many, or which) behind a sequence; see ``append_all``."""
        return self.append_all({sequence: new})

    def append_all(self, news: Mapping[int, New]) -> list[Copy]:
        """Room for new tokens behind several sequences, for all or none.

        Raises OutOfPagesError, UnknownSequenceError, DoubleFreeError, or KVCacheError for a negative number of tokens.
        """
        plan = self._plan(news)
        copies: list[Copy] = []
        for one, _new in plan:
            self._slide(one)
        for one, new in plan:
            count = new if isinstance(new, int) else len(new)
            if not count:
                continue
            if one.length % self.page_size:
                copies += self._own_tail(one)
            one.pages += self.pages.take(self._count(one.length + count) - len(one.pages))
            one.length += count
            if isinstance(new, int):
                one.ids = None
            elif one.ids is not None:
                one.ids += new
        return copies

    def require(self, news: Mapping[int, New]) -> None:
        """Raise what ``append_all`` would raise, and change nothing."""
        self._plan(news)

    def _plan(self, news: Mapping[int, New]) -> list[tuple[StoredSequence, New]]:
        plan = [(self._get(sequence), new) for sequence, new in news.items()]
        drops: Counter[int] = Counter()
        tails: Counter[int] = Counter()
        asked = 0
        for one, new in plan:
            count = new if isinstance(new, int) else len(new)
            if count < 0:
                raise KVCacheError(f"{count} tokens cannot be appended; crop() takes tokens away")
            if count and one.length % self.page_size:
                if one.pages[-1] == ABSENT:
                    raise KVCacheError("a sequence that ends inside its padding cannot grow; free it and open another")
                tails[one.pages[-1]] += 1
            asked += self._count(one.length + count) - len(one.pages)
            drops.update(page for page in one.pages[one.gone : self._behind(one)] if page != ABSENT)
        asked += sum(min(count, self.pages.refs[page] - 1) for page, count in tails.items())
        self.pages.require(asked, self.pages.freed_by(drops))
        return plan

    def commit(self, sequence: int) -> None:
        """What was appended has been written: its full pages can be found by their content from now on."""
        one = self._get(sequence)
        if one.ids is None:
            return
        known = len(one.keys)
        one.keys = page_keys(one.ids, self.page_size, one.salt, one.keys)
        for page, key in zip(one.pages[known:], one.keys[known:], strict=False):
            if page != ABSENT:
                self.pages.publish(page, key)

    def fork(self, sequence: int) -> int:
        """Another sequence with the same tokens, which shares every page."""
        one = self._get(sequence)
        for page in one.pages:
            if page != ABSENT:
                self.pages.share(page)
        return self._add(self._twin(one))

    def free(self, *sequences: int) -> None:
        """Give sequences back. Their committed pages stay cached until they are evicted; the last pages go first."""
        if len(set(sequences)) != len(sequences):
            raise DoubleFreeError(f"a sequence is given back twice in one call: {sequences}")
        for one in [self._get(sequence) for sequence in sequences]:
            self._drop(one.pages)
        for sequence in sequences:
            del self._sequences[sequence]

    def crop(self, sequences: Iterable[int], length: int, *, dry_run: bool = False) -> list[Copy]:
        """Shorten sequences to ``length`` tokens; their last pages are their own afterwards. ``dry_run`` only checks.

        Raises KVCacheError where a sequence is shorter, or where its window needs pages that were given back.
        """
        plan = [self._get(sequence) for sequence in dict.fromkeys(sequences)]
        count = self._count(length)
        needed = 0 if self.window is None else max(length - self.window + 1, 0) // self.page_size
        for one in plan:
            if not 0 <= length <= one.length:
                raise KVCacheError(f"a sequence of {one.length} tokens cannot be cropped to {length}")
            if length % self.page_size and one.pages[count - 1] == ABSENT:
                raise KVCacheError(f"cropped to {length} tokens a sequence would end inside a page that is not stored")
            if one.gone > needed and needed < count:
                raise KVCacheError(
                    f"cropped to {length} tokens a window of {self.window} would need pages that were given back; "
                    "set retain (activate_past_recording) before tokens are to be taken back"
                )
        drops = Counter(page for one in plan for page in one.pages[count:] if page != ABSENT)
        tails = Counter(one.pages[count - 1] for one in plan) if length % self.page_size else Counter()
        self.pages.require(
            sum(min(n, self.pages.refs[page] - 1) for page, n in tails.items()), self.pages.freed_by(drops)
        )
        copies: list[Copy] = []
        if dry_run:
            return copies
        for one in plan:
            self._drop(one.pages[count:])
            del one.pages[count:]
            one.length, one.gone = length, min(one.gone, count)
            one.keys = one.keys[: length // self.page_size]
            one.ids = one.ids[:length] if one.ids is not None else None
        for one in plan:
            if length % self.page_size:
                copies += self._own_tail(one)
        return copies

    def reorder(
        self, sequences: Sequence[int], parents: Sequence[int], *, dry_run: bool = False
    ) -> tuple[list[int], list[Copy]]:
        """New sequences in place of ``sequences``: the i-th continues ``sequences[parents[i]]`` (beam search).

        Full pages are shared, the last, partly filled page of each new sequence is its own. ``dry_run`` only checks.
        """
        old = [self._get(sequence) for sequence in sequences]
        if len(set(sequences)) != len(sequences):
            raise KVCacheError(f"a sequence stands twice in {list(sequences)}")
        bad = [p for p in parents if not -len(old) <= p < len(old)]
        if bad:
            raise KVCacheError(f"parents {bad} are no indices into {len(old)} sequences")
        chosen = [old[p] for p in parents]
        drops = Counter(page for one in old for page in one.pages if page != ABSENT)
        gains = Counter(page for one in chosen for page in one.pages if page != ABSENT)
        partial = [one for one in chosen if one.length % self.page_size]
        if any(one.pages[-1] == ABSENT for one in partial):
            raise KVCacheError("a sequence that ends inside its padding cannot be continued twice")
        tails = Counter(one.pages[-1] for one in partial)
        after = {page: self.pages.refs[page] - drops[page] + gains[page] for page in tails}
        self.pages.require(sum(min(n, after[page] - 1) for page, n in tails.items()), self.pages.freed_by(drops, gains))
        if dry_run:
            return [], []
        new = [self._twin(one) for one in chosen]
        for one in new:
            for page in one.pages:
                if page != ABSENT:
                    self.pages.share(page)
        self.free(*sequences)
        copies = [copy for one in new if one.length % self.page_size for copy in self._own_tail(one)]
        return [self._add(one) for one in new], copies

    # Pages without a sequence

    def allocate(self, count: int) -> list[int]:
        """So many pages for the caller's own use."""
        if count < 0:
            raise KVCacheError(f"{count} pages cannot be allocated")
        taken = self.pages.take(count)
        self._loose.update(taken)
        return taken

    def release(self, pages: Iterable[int]) -> None:
        """Give back pages of ``allocate``. BadPageError or DoubleFreeError for others, and then none is given back."""
        wanted = Counter(pages)
        self.pages.in_range(wanted)
        for page, count in wanted.items():
            if self._loose[page] < count:
                if self.pages.refs[page] > self._loose[page]:
                    raise BadPageError(f"page {page} belongs to a sequence; free the sequence")
                raise DoubleFreeError(f"page {page} is given back {count} times and is held {self._loose[page]} times")
        for page, count in wanted.items():
            for _ in range(count):
                self.pages.drop(page)
        self._loose -= wanted

    def evict(self, count: int | None = None) -> int:
        """Forget up to ``count`` cached pages (default: all), least recently used first; returns how many."""
        return self.pages.evict(count)

    # Looking

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, those included that were never stored or given back behind the window."""
        return self._get(sequence).length

    def table(self, sequence: int, first: int = 0) -> tuple[int, ...]:
        """The pages of a sequence in order, from column ``first`` on; -1 where there is none."""
        return tuple(self._get(sequence).pages[first:])

    def given_back(self, sequence: int) -> int:
        """How many leading pages of a sequence were given back behind the window."""
        return self._get(sequence).gone

    def slots(self, sequence: int, begin: int, end: int) -> list[int]:
        """page * page_size + offset of tokens ``begin`` to ``end``; -1 in a page that is not stored."""
        one, size = self._get(sequence), self.page_size
        if not 0 <= begin <= end <= one.length:
            raise KVCacheError(f"tokens {begin} to {end} are not in a sequence of {one.length}")
        return [
            one.pages[j // size] * size + j % size if one.pages[j // size] != ABSENT else ABSENT
            for j in range(begin, end)
        ]

    def statistics(self) -> PoolStatistics:
        stored, waste = {}, {}
        for sequence, one in self._sequences.items():
            kept = sum(page != ABSENT for page in one.pages)
            waste[sequence] = len(one.pages) * self.page_size - one.length
            stored[sequence] = kept * self.page_size - waste[sequence]
        pages = self.pages
        return PoolStatistics(
            total=pages.total,
            used=len(self._holders()),
            free=pages.free,
            cached=pages.cached,
            page_size=self.page_size,
            stored=stored,
            waste=waste,
            evictions=pages.evictions,
            prefix_hits=self._hits,
            copies=self._copied,
        )

    def _holders(self) -> Counter[int]:
        """How often each page is held, counted from the tables."""
        tables = Counter(page for one in self._sequences.values() for page in one.pages if page != ABSENT)
        return tables + self._loose

    def check(self) -> None:
        """KVCacheError if an invariant is broken: states and holders of pages, lengths and tables of sequences."""
        self.pages.check(self._holders())
        for sequence, one in self._sequences.items():
            if len(one.pages) != self._count(one.length) or (one.ids is not None and len(one.ids) != one.length):
                raise KVCacheError(f"the block pool is corrupt: sequence {sequence} has {len(one.pages)} pages")

    # The parts

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _get(self, sequence: int) -> StoredSequence:
        one = self._sequences.get(sequence)
        if one is not None:
            return one
        if isinstance(sequence, int) and 0 <= sequence < self._next:
            raise DoubleFreeError(f"sequence {sequence} was freed already")
        raise UnknownSequenceError(f"sequence {sequence!r} was never opened in this pool")

    def _stored(self, tokens: Sequence[int], salt: bytes, limit: int | None) -> tuple[list[bytes], list[int]]:
        """Keys and pages of the longest stored prefix."""
        most = max(len(tokens) - 1, 0)
        keys, pages = page_keys(tokens[: most if limit is None else min(limit, most)], self.page_size, salt), []
        for key in keys:
            page = self.pages.find(key)
            if page is None:
                break
            pages.append(page)
        return keys[: len(pages)], pages

    def _add(self, one: StoredSequence) -> int:
        self._sequences[self._next] = one
        self._next += 1  # never reused, so that a stale id is told from a foreign one
        return self._next - 1

    @staticmethod
    def _twin(one: StoredSequence) -> StoredSequence:
        ids = None if one.ids is None else list(one.ids)
        return StoredSequence(list(one.pages), one.length, ids, list(one.keys), one.salt, one.gone)

    def _behind(self, one: StoredSequence) -> int:
        """How many leading pages no token from now on can see."""
        if self.window is None or self.retain:
            return one.gone
        return max(one.gone, max(one.length - self.window + 1, 0) // self.page_size)

    def _slide(self, one: StoredSequence) -> None:
        behind = self._behind(one)
        self._drop(one.pages[one.gone : behind])
        one.pages[one.gone : behind] = [ABSENT] * (behind - one.gone)
        one.gone = behind

    def _drop(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            if page != ABSENT:
                self.pages.drop(page)

    def _own_tail(self, one: StoredSequence) -> list[Copy]:
        """Make the last page writable: a copy if others hold it, else its old content is no longer findable."""
        page = one.pages[-1]
        if self.pages.refs[page] == 1:
            self.pages.forget(page)
            return []
        (one.pages[-1],) = self.pages.take(1)
        self.pages.drop(page)
        self._copied += 1
        return [Copy(page, one.pages[-1])]
