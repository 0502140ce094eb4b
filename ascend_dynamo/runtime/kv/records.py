"""What the block pool gives out and keeps per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ABSENT = -1  # a table entry without a page: never stored (padding), or given back behind a sliding window
New = int | Sequence[int]  # how many tokens, or which


class Copy(NamedTuple):
    """The content of page ``source`` must be copied to page ``target`` before anything is written."""

    source: int
    target: int


class Opened(NamedTuple):
    """A new sequence, and how many of its first tokens are stored already."""

    sequence: int
    cached: int


@dataclass
class StoredSequence:
    """One sequence of the pool: its pages in order and what is known of its tokens."""

    pages: list[int]
    length: int  # tokens, absent ones included
    ids: list[int] | None  # the tokens, while all are known and none was left out
    keys: list[bytes] = field(default_factory=list)  # of the first full pages, as far as committed
    salt: bytes = b""
    gone: int = 0  # leading pages that were given back behind the window


@dataclass(frozen=True)
class PoolStatistics:
    """A snapshot. ``stored`` counts tokens per sequence (shared ones once for each), ``waste`` the token slots that
    each sequence has allocated and not filled, ``used`` pages in somebody's table, and ``orphans`` pages that nobody
    holds and that are not to be had: 0."""

    total: int
    used: int
    free: int
    cached: int
    page_size: int
    stored: dict[int, int]
    waste: dict[int, int]
    evictions: int
    prefix_hits: int
    copies: int

    @property
    def orphans(self) -> int:
        return self.total - self.used - self.free - self.cached
