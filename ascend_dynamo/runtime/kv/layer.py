"""One layer's pages, written and read as a layer of a transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ascend_dynamo.runtime.kv.group import PageGroup
from ascend_dynamo.runtime.kv.store import Allocate, PageStore, zeros


class PagedLayer(CacheLayerMixin):
    """A layer of ``PagedKVCache``. The first layer of its group reserves the step's slots for all of them."""

    is_compileable = True
    is_croppable = True

    def __init__(
        self, group: PageGroup, dtype: torch.dtype | None, *, quantized: bool, allocate: Allocate = zeros
    ) -> None:
        super().__init__()
        self.group, self.dtype = group, dtype
        self.quantized, self.allocate = quantized, allocate
        self.is_sliding = group.pool.window is not None
        self.leads = not group.layers
        self.store: PageStore | None = None
        group.layers.append(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the pages for tokens like these: k [B,Hk,S,D], v [B,Hk,S,Dv]."""
        group = self.group
        self.store = PageStore(
            group.pool.pages.total,
            group.page_size,
            key_states.shape[1],
            (key_states.shape[3], value_states.shape[3]),
            self.dtype or key_states.dtype,
            key_states.device,
            quantized=self.quantized,
            allocate=self.allocate,
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k [B,Hk,S,D] and v [B,Hk,S,Dv]; all keys and values so far, dense, [B,Hk,length,..]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        group, store = self.group, self.store
        if self.leads:
            group.advance(key_states.shape[0], key_states.shape[2])
        store.write(key_states.transpose(1, 2).flatten(0, 1), value_states.transpose(1, 2).flatten(0, 1), group.slots)  # type: ignore[union-attr,arg-type]
        return store.gather(group.block_table, group.seen, key_states.dtype)  # type: ignore[union-attr,arg-type]

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        if self.store is not None:
            self.store.copy_pages(sources, targets)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.group.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.group.seen

    def get_max_length(self) -> int:
        return self.group.width * self.group.page_size
