"""One layer's pages, written and read as a layer of a transformers cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ascend_dynamo.runtime.kv.group import PageGroup

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh pages. Zeros cost nothing until they are touched: the system gives zeroed memory page by page."""
    return torch.zeros(shape, dtype=dtype, device=device)


class PageStore:
    """Pages of one layer: ``keys`` [pages, size, Hk, D] and ``values`` [pages, size, Hk, Dv].

    With ``quantized`` they are int8, with a float32 scale per token and head in ``k_scale`` and ``v_scale`` [pages,
    size, Hk], else those are None.
    """

    def __init__(
        self,
        pages: int,
        size: int,
        heads: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantized: bool = False,
        allocate: Allocate = zeros,
    ) -> None:
        kept = torch.int8 if quantized else dtype
        self.keys, self.values = (allocate((pages, size, heads, width), kept, device) for width in widths)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if quantized:
            self.k_scale, self.v_scale = (allocate((pages, size, heads), torch.float32, device) for _ in widths)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.k_scale, self.v_scale) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k [T,Hk,D], v [T,Hk,Dv] to ``slots`` [T] int64; -1 writes nothing."""
        torch.ops.ascend.kv_write(k, v, self.keys, self.values, slots, k_scale=self.k_scale, v_scale=self.v_scale)

    def gather(self, block_table: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [B,Hk,length,D] and values of the first ``length`` tokens; zeros where the table is negative."""
        k = torch.ops.ascend.kv_gather(self.keys, block_table, length, scale=self.k_scale)
        v = torch.ops.ascend.kv_gather(self.values, block_table, length, scale=self.v_scale)
        return k.to(dtype), v.to(dtype)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        for tensor in self.tensors:
            tensor[targets] = tensor[sources]


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
