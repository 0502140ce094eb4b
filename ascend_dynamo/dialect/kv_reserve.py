"""kv_reserve: pages for new tokens, taken from a block pool on the host, as an operator inside the graph.

It is no mathematics but bookkeeping, so it has no reference in ATen: every target runs it as it is. The pool is named
by a handle that is *data* (a number in a tensor), not a Python object, so two caches run the same compiled graph and no
guard asks which. Handles live in a table of weak references.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ascend_dynamo.dialect.library import define_host
from ascend_dynamo.errors import KVCacheError


class PageSource(Protocol):
    """What a handle names: rows of sequences that get pages."""

    page_size: int

    def reserve(self, before: list[int], tokens: int) -> Sequence[tuple[int, Sequence[int]]]:
        """Pages so that row b holds ``before[b] + tokens`` tokens. Per row the first table column that may have changed
        and the entries from it on, -1 where a page is absent. Asking twice for the same gives the same."""
        ...


_SOURCES: WeakValueDictionary[int, PageSource] = WeakValueDictionary()
_NUMBERS = count(1)  # never used twice: the handle of a dead source must not name another one


def register_source(source: PageSource) -> Tensor:
    """A handle of ``source`` for ``kv_reserve``: int64, 0-d, in host memory. The source stays alive by others only."""
    number = next(_NUMBERS)
    _SOURCES[number] = source
    return torch.tensor(number, dtype=torch.int64)


def kv_reserve(pool: Tensor, block_table: Tensor, kv_len: Tensor, tokens: int) -> Tensor:
    """Room for ``tokens`` new tokens behind each sequence of a batch.

    pool: a handle (``register_source``), int64 0-d in host memory; block_table [B, max_blocks] int32 and kv_len [B]
    int32 (host) are brought up to date in place; the result [B * tokens] int64, on block_table's device, holds the
    slots of the new tokens, row after row: block * block_size + offset, -1 in a page that is not stored.

    Raises KVCacheError for a dead handle or a table that is too narrow, and what the source raises (OutOfPagesError);
    nothing is changed then.
    """
    source = _SOURCES.get(int(pool))
    if source is None:
        raise KVCacheError(f"handle {int(pool)} names no page pool that is alive: keep the cache while its graph runs")
    size, width, before = source.page_size, block_table.shape[1], kv_len.tolist()
    longest = max(before, default=0) + tokens
    if longest > width * size:
        raise KVCacheError(
            f"{longest} tokens do not fit a block table of {width} pages of {size}; make the cache with max_length="
            f"{longest} or more"
        )
    rows = enumerate(source.reserve(before, tokens))
    changes = [(row, first + i, page) for row, (first, entries) in rows for i, page in enumerate(entries)]
    if changes:  # one write for all rows: one for each would be most of what a step pays here
        where = torch.tensor(changes, device=block_table.device)
        block_table[where[:, 0], where[:, 1]] = where[:, 2].to(block_table.dtype)
    position = (kv_len.unsqueeze(1) + torch.arange(tokens)).to(block_table.device, torch.int64)
    page = block_table.gather(1, position // size).to(torch.int64)
    kv_len += tokens
    return torch.where(page < 0, -1, page * size + position % size).flatten()


def _kv_reserve_fake(pool: Tensor, block_table: Tensor, kv_len: Tensor, tokens: int) -> Tensor:
    return block_table.new_empty((block_table.shape[0] * tokens,), dtype=torch.int64)


define_host(
    "kv_reserve",
    "(Tensor pool, Tensor(a!) block_table, Tensor(b!) kv_len, SymInt tokens) -> Tensor",
    kv_reserve,
    _kv_reserve_fake,
)

OP = torch.ops.ascend.kv_reserve.default
