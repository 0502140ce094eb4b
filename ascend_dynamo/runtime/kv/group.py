"""Layers that keep the same tokens: one block pool, one block table, one count of tokens for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ascend_dynamo._torch_compat import mark_static_sizes
from ascend_dynamo.dialect.kv_reserve import register_source
from ascend_dynamo.errors import KVCacheError, UnsupportedCacheError
from ascend_dynamo.runtime.kv.pool import BlockPool
from ascend_dynamo.runtime.kv.records import ABSENT, Copy


class Store(Protocol):
    """Pages of one layer."""

    def copy_pages(self, sources: list[int], targets: list[int]) -> None: ...


class PageGroup:
    """A batch of sequences over one pool, as ``kv_reserve`` and the layers' kernels see it.

    ``block_table`` [B, width] int32 and ``kv_len`` [B] int32 (host) exist once the batch is known (``start``); ``seen``
    is the logical length of all rows, padding included; ``slots`` [B * tokens] int64 is where the tokens of the current
    step go. ``peers`` are the other groups of the cache, which get pages in the same step or not at all.
    """

    def __init__(self, pool: BlockPool, width: int, device: torch.device) -> None:
        self.pool, self.width, self.device = pool, width, device
        self.page_size = pool.page_size
        self.handle = register_source(self)
        self.sequences: list[int] = []
        self.empty_pages: list[int] = []
        self.layers: list[Store] = []
        self.peers: list[PageGroup] = []
        self.seen = 0
        self.block_table: Tensor | None = None
        self.kv_len: Tensor | None = None
        self.slots: Tensor | None = None

    def start(self, batch: int) -> None:
        """Tables for a batch; plain tensor code, so that a first step can be compiled."""
        self.block_table = torch.full((batch, self.width), ABSENT, dtype=torch.int32, device=self.device)
        self.kv_len = torch.zeros(batch, dtype=torch.int32)
        if not torch.compiler.is_compiling():
            mark_static_sizes(self.block_table, 1)

    def advance(self, batch: int, tokens: int) -> None:
        """Slots for ``tokens`` new tokens in each row."""
        if self.block_table is None or (self.seen == 0 and self.block_table.shape[0] != batch):
            self.start(batch)
        if self.block_table.shape[0] != batch:  # type: ignore[union-attr]  # start() made it
            raise UnsupportedCacheError(
                f"the cache holds {self.block_table.shape[0]} sequences and gets a batch of {batch}; reset() it first"  # type: ignore[union-attr]
            )
        self.slots = torch.ops.ascend.kv_reserve(self.handle, self.block_table, self.kv_len, tokens)
        self.seen = self.seen + tokens

    # What kv_reserve calls

    def reserve(self, before: list[int], tokens: int) -> list[tuple[int, tuple[int, ...]]]:
        """As ``PageSource.reserve``, for this group, if there is room for its peers too."""
        opened = [group for group in (self, *self.peers) if group._open(len(before))]
        try:
            for peer in self.peers:
                peer.pool.require(peer._missing(before, tokens))
            missing = self._missing(before, tokens)
            changed = [self._first_change(s, length, s in missing) for s, length in self._rows(before)]
            copies = self.pool.append_all(missing)
        except KVCacheError:
            for group in opened:
                group._close()
            raise
        self.copy_pages(copies)
        return [(c, self.pool.table(s, c)) for c, s in zip(changed, self.sequences, strict=True)]

    def _rows(self, before: Sequence[int]) -> list[tuple[int, int]]:
        return list(zip(self.sequences, before, strict=True))

    def _first_change(self, sequence: int, length: int, grows: bool) -> int:
        """The first table column that an append may change: a window gives pages back from where it stopped."""
        if self.pool.window is None:
            return length // self.page_size
        return self.pool.given_back(sequence) if grows else 0

    def _open(self, batch: int) -> bool:
        """Sequences for the rows, if there are none yet; whether this call opened them."""
        if self.sequences:
            if len(self.sequences) != batch:
                raise UnsupportedCacheError(
                    f"the cache holds {len(self.sequences)} sequences and gets a batch of {batch}; reset() it first"
                )
            return False
        rows = len(self.empty_pages)
        if rows and batch % rows:
            raise UnsupportedCacheError(f"set_padding() was given {rows} rows, the batch has {batch}")
        # generate() repeats every row for its beams
        empty = [count for count in self.empty_pages for _ in range(batch // rows)] or [0] * batch
        self.sequences = [self.pool.open(empty_pages=count).sequence for count in empty]
        return True

    def _close(self) -> None:
        self.pool.free(*self.sequences)
        self.sequences = []

    def _missing(self, before: Sequence[int], tokens: int) -> dict[int, int]:
        return {
            sequence: length + tokens - self.pool.length(sequence)
            for sequence, length in self._rows(before)
            if length + tokens > self.pool.length(sequence)
        }

    # What the cache calls between steps

    def copy_pages(self, copies: Sequence[Copy]) -> None:
        if copies:
            sources, targets = [c.source for c in copies], [c.target for c in copies]
            for layer in self.layers:
                layer.copy_pages(sources, targets)

    def reorder(self, parents: list[int]) -> None:
        """Row i continues what row ``parents[i]`` said."""
        if parents == list(range(len(self.sequences))):
            return
        self.sequences, copies = self.pool.reorder(self.sequences, parents)
        self.copy_pages(copies)
        self.refresh()

    def crop(self, length: int) -> None:
        """Only the first ``length`` tokens of every row."""
        self.copy_pages(self.pool.crop(self.sequences, length))
        self.seen = length
        if length == 0:
            self._close()  # a batch of any size may come
        self.refresh()

    def reset(self) -> None:
        """No tokens; the tables stay where they are."""
        self.pool.free(*self.sequences)
        self.sequences, self.empty_pages, self.seen, self.slots = [], [], 0, None
        if self.block_table is not None and self.kv_len is not None:
            self.block_table.fill_(ABSENT)
            self.kv_len.zero_()

    def refresh(self) -> None:
        """Write the tables of all rows, in place if the batch is as large as before."""
        if self.block_table is None or self.kv_len is None:
            return
        if self.sequences and self.block_table.shape[0] != len(self.sequences):
            self.start(len(self.sequences))
        self.block_table.fill_(ABSENT)
        for row, sequence in enumerate(self.sequences):
            table = self.pool.table(sequence)
            self.block_table[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        self.kv_len.fill_(self.seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> PageGroup:
        """A copy has a handle of its own, else both would take pages from one pool."""
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "handle"})
        new.handle = register_source(new)
        return new
