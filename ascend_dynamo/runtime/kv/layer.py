"""One layer's pages, written and read as a layer of a transformers cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ascend_dynamo.errors import UnsupportedCacheError
from ascend_dynamo.runtime.kv.group import PageGroup
from ascend_dynamo.runtime.kv.layer_kinds import LayerKind
from ascend_dynamo.runtime.kv.store import Allocate, PageStore, zeros


class PagedLayer(CacheLayerMixin):
    """A layer of ``PagedKVCache``. The first layer of its group reserves the step's slots for all of them."""

    is_compileable = True
    is_croppable = True

    def __init__(
        self,
        group: PageGroup,
        kind: LayerKind,
        dtype: torch.dtype | None,
        *,
        guess: torch.dtype,
        quantized: bool,
        allocate: Allocate = zeros,
    ) -> None:
        super().__init__()
        self.group, self.dtype = group, dtype
        self.quantized, self.allocate = quantized, allocate
        self.is_sliding = group.pool.window is not None
        self.leads = not group.layers
        group.layers.append(self)
        self.store = self._pages(kind.heads, (kind.k_width, kind.v_width), dtype or guess, group.device)
        self.is_initialized = True

    def _pages(self, heads: int, widths: tuple[int, int], dtype: torch.dtype, device: torch.device) -> PageStore:
        pages, size = self.group.pool.pages.total, self.group.page_size
        return PageStore(pages, size, heads, widths, dtype, device, quantized=self.quantized, allocate=self.allocate)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages for tokens like these, k [B,Hk,S,D] and v [B,Hk,S,Dv], where the configuration had said otherwise.

        Raises UnsupportedCacheError if other tokens are stored.
        """
        if any(bool(tensor.any()) for tensor in self.store.tensors):
            kept = [tuple(t.shape[2:]) for t in (self.store.keys, self.store.values)]
            raise UnsupportedCacheError(
                f"the cache keeps {kept} per token, heads by width, in {self.store.keys.dtype}; it is given"
                f" {tuple(key_states.shape)} and {tuple(value_states.shape)} in {key_states.dtype}; make one per model"
            )
        widths = key_states.shape[3], value_states.shape[3]
        self.store = self._pages(key_states.shape[1], widths, self.dtype or key_states.dtype, key_states.device)

    def fit(self, key_states: Tensor, value_states: Tensor) -> None:
        """See to it that the pages can hold k [B,Hk,S,D] and v [B,Hk,S,Dv]; raises as ``lazy_initialization``."""
        keys, values = self.store.keys, self.store.values
        fits = (key_states.shape[1], key_states.shape[3], value_states.shape[3]) == (*keys.shape[2:], values.shape[3])
        exact = self.quantized or self.dtype is not None or keys.dtype == key_states.dtype
        if not (fits and exact and keys.device == key_states.device):
            self.lazy_initialization(key_states, value_states)

    def write(self, key_states: Tensor, value_states: Tensor, slots: Tensor) -> None:
        """Store k [B,Hk,S,D] and v [B,Hk,S,Dv] at ``slots`` [B * S]."""
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        self.store.write(k, v, slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store k [B,Hk,S,D] and v [B,Hk,S,Dv]; all keys and values so far, dense, [B,Hk,length,..]."""
        group = self.group
        self.fit(key_states, value_states)
        if self.leads:
            group.advance(key_states.shape[0], key_states.shape[2])
        self.write(key_states, value_states, group.slots)  # type: ignore[arg-type]
        return self.store.gather(group.block_table, group.seen, key_states.dtype)  # type: ignore[arg-type]

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        self.store.copy_pages(sources, targets)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.group.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.group.seen

    def get_max_length(self) -> int:
        return self.group.width * self.group.page_size
