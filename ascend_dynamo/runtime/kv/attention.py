"""``PagedAttention``: one layer's pages, the pool that hands them out, and attention over them, without a framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ascend_dynamo.contracts import Lowering
from ascend_dynamo.errors import BadPageError, KVCacheError, UnsupportedCacheError
from ascend_dynamo.runtime.kv.page_sizes import checked_page_size
from ascend_dynamo.runtime.kv.pool import BlockPool
from ascend_dynamo.runtime.kv.store import PageStore, block_table


class PagedAttention:
    """Attention with its own paged cache of ``num_pages`` pages of ``page_size`` tokens.

    ``pool`` hands out sequences (``pool.open()``, ``fork``, ``free``). ``key_cache`` and ``value_cache`` are
    [num_pages, page_size, num_kv_heads, head_dim] (``v_head_dim`` for values). The short way::

        attention = PagedAttention(num_kv_heads=8, head_dim=128, page_size=16, num_pages=1024)
        first = attention.pool.open().sequence
        y = attention(q, k, v, {first: 5})          # 5 new tokens: stored, then attended to with all before them

    Raises PageSizeError for a page size that the target cannot use.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        page_size: int | None = None,
        num_pages: int = 1024,
        *,
        v_head_dim: int | None = None,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        quantization: Literal["int8"] | None = None,
        device: torch.device | str = "cpu",
        target: str | Lowering = "auto",
    ) -> None:
        if quantization not in (None, "int8"):
            raise UnsupportedCacheError(f"quantization={quantization!r}: pages are kept as they are (None) or 'int8'")
        self.page_size = checked_page_size(page_size, target, torch.int8 if quantization else dtype)
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.pool = BlockPool(num_pages, self.page_size, window=window)
        self.store = PageStore(
            num_pages,
            self.page_size,
            num_kv_heads,
            (head_dim, v_head_dim or head_dim),
            dtype,
            torch.device(device),
            quantized=quantization is not None,
        )

    @property
    def key_cache(self) -> Tensor:
        return self.store.keys

    @property
    def value_cache(self) -> Tensor:
        return self.store.values

    def write(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Store k [T,Hk,D] and v [T,Hk,Dv] at ``slot_mapping`` [T] int64: page * page_size + offset, -1 for nothing.

        Raises BadPageError for a slot outside the cache, KVCacheError for a slot that is written twice.
        """
        slots = slot_mapping[slot_mapping >= 0]
        if slots.numel() and int(slots.max()) >= self.pool.pages.total * self.page_size:
            pages = self.pool.pages.total
            raise BadPageError(f"slot {int(slots.max())} is not in a cache of {pages} pages of {self.page_size}")
        if slots.unique().numel() < slots.numel():
            raise KVCacheError("a slot is written twice by one call")
        self.store.write(k, v, slot_mapping)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: Mapping[int, int],
        *,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention of new tokens, which are stored first. ``new`` says how many each sequence of ``pool`` gets, in
        the order in which they lie in q [T,Hq,D], k [T,Hk,D] and v [T,Hk,Dv]. Result [T,Hq,Dv].

        Raises KVCacheError if the counts do not add up to T, and what the pool raises; nothing is stored then.
        """
        counts = list(new.values())
        if not q.shape[0] == k.shape[0] == v.shape[0] == sum(counts):
            raise KVCacheError(f"new says {sum(counts)} tokens; q, k and v have {[t.shape[0] for t in (q, k, v)]}")
        given, kept = ([tuple(t.shape[-2:]) for t in pair] for pair in ((k, v), (self.key_cache, self.value_cache)))
        if given != kept:
            raise KVCacheError(f"k and v have {given} per token, heads by width; this cache keeps {kept}")
        copies = self.pool.append_all(new)
        if copies:
            self.store.copy_pages([c.source for c in copies], [c.target for c in copies])
        lengths = [self.pool.length(sequence) for sequence in new]
        slots = [
            slot
            for sequence, end, count in zip(new, lengths, counts, strict=True)
            for slot in self.pool.slots(sequence, end - count, end)
        ]
        self.store.write(k, v, torch.tensor(slots, device=k.device))
        return self.attend(q, list(new), counts, scale=scale, softcap=softcap)

    def attend(
        self,
        q: Tensor,
        sequences: Sequence[int],
        counts: Sequence[int],
        *,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Attention of the last ``counts`` tokens of each sequence, q [T,Hq,D] packed, over what is stored."""
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        lengths = torch.tensor([self.pool.length(s) for s in sequences], dtype=torch.int32)
        y: Tensor = torch.ops.ascend.paged_attention(
            q,
            self.store.keys,
            self.store.values,
            block_table([self.pool.table(s) for s in sequences]).to(q.device),
            starts,
            lengths,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            window=-1 if self.pool.window is None else self.pool.window,
            softcap=softcap,
            k_scale=self.store.k_scale,
            v_scale=self.store.v_scale,
        )
        return y
