"""``PagedKVCache``: a transformers cache whose keys and values live in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache

from ascend_dynamo.contracts import Lowering
from ascend_dynamo.errors import UnsupportedCacheError
from ascend_dynamo.memory.units import parse_bytes
from ascend_dynamo.runtime.kv.group import PageGroup
from ascend_dynamo.runtime.kv.layer import PagedLayer
from ascend_dynamo.runtime.kv.layer_kinds import LayerKind, layer_kinds
from ascend_dynamo.runtime.kv.page_sizes import checked_page_size
from ascend_dynamo.runtime.kv.pool import BlockPool
from ascend_dynamo.runtime.kv.records import PoolStatistics
from ascend_dynamo.runtime.kv.store import Allocate, PoolMemory, zeros
from ascend_dynamo.runtime.pool import MemoryPool


@dataclass(frozen=True)
class CacheStatistics:
    """``pools``: one entry per group of layers (all of attention's tokens; each sliding window). Bytes over all layers;
    ``bytes_used`` is the share of the pages that sequences hold."""

    pools: tuple[PoolStatistics, ...]
    bytes_allocated: int
    bytes_used: int

    @property
    def orphans(self) -> int:
        """Pages that nobody holds and that are not to be had: always 0."""
        return sum(pool.orphans for pool in self.pools)

    @property
    def largest_waste(self) -> int:
        """Token slots that the worst sequence has allocated and not filled; less than a page."""
        return max((w for pool in self.pools for w in pool.waste.values()), default=0)


class PagedKVCache(Cache):
    """Keys and values of a batch in pages; ``model.generate(..., past_key_values=PagedKVCache(model.config, ...))``.

    Give the size as one of ``num_pages``, ``max_tokens`` (over all sequences together) or ``memory`` (over all layers:
    bytes, or "2GB"); ``page_size`` in tokens (default: what the target recommends). ``max_length`` is the longest
    sequence (default: what the pool, and the model's positions, can hold); ``sliding_pages`` the pages of layers with a
    sliding window (default: as many). ``dtype`` of the pages (default: that of the keys), or ``quantization="int8"``.
    The memory comes out of ``pool``, if one is given; ``close`` gives it back.

    All sequences of a batch have the same logical length; of left padding, pages that hold nothing else are not stored
    after ``set_padding(attention_mask)``. Layers with a sliding window give pages back once nothing can see them.

    Raises UnsupportedCacheError for models whose layers keep something else, PageSizeError for a page size that the
    target cannot use, and in ``generate`` OutOfPagesError, with the cache as it was before the step.
    """

    def __init__(
        self,
        config: Any,
        *,
        num_pages: int | None = None,
        max_tokens: int | None = None,
        memory: int | str | None = None,
        page_size: int | None = None,
        max_length: int | None = None,
        sliding_pages: int | None = None,
        dtype: torch.dtype | None = None,
        quantization: Literal["int8"] | None = None,
        device: torch.device | str = "cpu",
        target: str | Lowering = "auto",
        pool: MemoryPool | None = None,
    ) -> None:
        if quantization not in (None, "int8"):
            raise UnsupportedCacheError(f"quantization={quantization!r}: pages are kept as they are (None) or 'int8'")
        kinds = layer_kinds(config)
        text = config.get_text_config(decoder=True)
        model_dtype = dtype or getattr(text, "dtype", None) or torch.float32
        kept = torch.int8 if quantization else model_dtype
        size = checked_page_size(page_size, target, kept)
        quantized = quantization is not None
        pages = _count(kinds, size, kept.itemsize, quantized, sliding_pages, num_pages, max_tokens, memory)
        if max_length is None:
            max_length = min(pages * size, getattr(text, "max_position_embeddings", None) or pages * size)
        self.quantization = quantization
        self._memory = None if pool is None else PoolMemory(pool)
        take: Allocate = self._memory or zeros
        groups: dict[int | None, PageGroup] = {}
        for window in dict.fromkeys(kind.window for kind in kinds):
            blocks = BlockPool(pages if window is None else sliding_pages or pages, size, window=window)
            groups[window] = PageGroup(blocks, -(-max_length // size), torch.device(device))
        self.groups = list(groups.values())
        for group in self.groups:
            group.peers = [other for other in self.groups if other is not group]
        try:
            layers = [
                PagedLayer(groups[kind.window], kind, dtype, guess=model_dtype, quantized=quantized, allocate=take)
                for kind in kinds
            ]
        except BaseException:
            if self._memory is not None:
                self._memory.free()
            raise
        super().__init__(layers=[*layers])

    layers: list[PagedLayer]  # type: ignore[assignment]  # of the same kind all

    @property
    def page_size(self) -> int:
        return self.groups[0].page_size

    @property
    def batch_size(self) -> int:
        """Sequences in the cache, -1 before the first step."""
        return len(self.groups[0].sequences) or -1

    def set_padding(self, attention_mask: Tensor) -> None:
        """Say before the prompt which leading tokens are padding (0 in ``attention_mask`` [B,S]): whole pages of it are
        never stored, and read as zeros, which the mask hides. With beams, B may be the batch before it is repeated."""
        if self.groups[0].seen:
            raise UnsupportedCacheError("set_padding() belongs before the prompt; reset() the cache first")
        leading = (attention_mask != 0).to(torch.int64).cumsum(1).eq(0).sum(1)
        for group in self.groups:
            group.empty_pages = (leading // self.page_size).tolist()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row ``beam_idx[i]`` said: pages are shared, only partly filled last ones copied."""
        self._reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self._reorder([row for row in range(len(self.groups[0].sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows ``indices`` (numbers, or a bool mask)."""
        if self.groups[0].seen == 0:
            return
        self._reorder(torch.arange(len(self.groups[0].sequences))[indices.cpu()].tolist())

    def _reorder(self, parents: list[int]) -> None:
        if self.groups[0].seen == 0:
            return
        for group in self.groups if len(self.groups) > 1 else ():  # all of them or none
            group.pool.reorder(group.sequences, parents, dry_run=True)
        for group in self.groups:
            group.reorder(parents)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens of every row away (a number <= 0, as in transformers).

        Raises UnsupportedCacheError for a positive number, KVCacheError where a sliding window would need pages that
        were given back (``activate_past_recording`` keeps them).
        """
        if tokens_to_remove > 0:
            raise UnsupportedCacheError(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        length = max(self.groups[0].seen + tokens_to_remove, 0)
        if length == self.groups[0].seen:
            return
        for group in self.groups if len(self.groups) > 1 else ():
            group.pool.crop(group.sequences, length, dry_run=True)
        for group in self.groups:
            group.crop(length)

    def activate_past_recording(self) -> None:
        """Keep what sliding windows no longer see, so that ``crop`` can go back there."""
        for group in self.groups:
            group.pool.retain = True

    def reset(self) -> None:
        """Forget all tokens; memory and tables stay, so that compiled code stays valid."""
        for group in self.groups:
            group.reset()

    def close(self) -> None:
        """Give memory that came from a ``MemoryPool`` back to it; the cache is of no use afterwards."""
        self.reset()
        if self._memory is not None:
            self._memory.free()
            self.layers.clear()

    def dense(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys [B,Hk,length,D] and values of a layer, gathered (and dequantised): a copy, for looking at."""
        layer = self.layers[layer_idx]
        if layer.group.block_table is None:
            raise UnsupportedCacheError(f"layer {layer_idx} holds nothing yet")
        store = layer.store
        dtype = store.keys.dtype if store.k_scale is None else store.k_scale.dtype
        gathered: tuple[Tensor, Tensor] = store.gather(layer.group.block_table, layer.group.seen, dtype)
        return gathered

    def statistics(self) -> CacheStatistics:
        """Pages, tokens, waste and memory, now."""
        stores = [(layer.group, layer.store.nbytes) for layer in self.layers]
        return CacheStatistics(
            tuple(group.pool.statistics() for group in self.groups),
            sum(nbytes for _, nbytes in stores),
            sum(nbytes // group.pool.pages.total * group.pool.pages.used for group, nbytes in stores),
        )


def _count(
    kinds: list[LayerKind],
    size: int,
    itemsize: int,
    scales: bool,
    sliding_pages: int | None,
    num_pages: int | None,
    max_tokens: int | None,
    memory: int | str | None,
) -> int:
    if sum(value is not None for value in (num_pages, max_tokens, memory)) != 1:
        raise UnsupportedCacheError("give the size of a PagedKVCache as one of num_pages, max_tokens, memory")
    if num_pages is not None:
        return num_pages
    if max_tokens is not None:
        return -(-max_tokens // size)
    budget = parse_bytes(memory)  # type: ignore[arg-type]  # the one of the three that was given
    page = 0
    for kind in kinds:
        one = size * kind.bytes_per_token(itemsize, scales)
        if kind.window is not None and sliding_pages is not None:
            budget -= sliding_pages * one
        else:
            page += one
    if budget < page or not page:
        raise UnsupportedCacheError(f"memory={memory!r} holds no page: one of {size} tokens takes {page} bytes")
    return budget // page
