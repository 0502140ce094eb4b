"""Pages read as a dense cache: kv_gather, for attention that knows nothing of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample


def kv_gather(cache: Tensor, block_table: Tensor, length: int, *, scale: Tensor | None = None) -> Tensor:
    """The first ``length`` tokens of every sequence, dense.

    cache [blocks, block_size, Hk, D]; block_table [B, max_blocks] int32 or int64, length <= max_blocks * block_size.
    Result [B,Hk,length,D]: token j of sequence b is cache[block_table[b, j // block_size], j % block_size], and zeros
    where the entry is negative (a page that was never stored). In cache.dtype; with ``scale`` [blocks, block_size, Hk]
    (int8 caches) it is cache * scale in scale.dtype.
    """
    size = cache.shape[1]
    j = torch.arange(length, device=cache.device)
    pages = block_table.to(cache.device)[:, j // size]  # [B,length]
    missing = pages < 0
    pages, offset = pages.clamp(min=0), j % size
    dense = cache[pages, offset]  # [B,length,Hk,D]
    if scale is not None:
        dense = dense.to(scale.dtype) * scale[pages, offset].unsqueeze(-1)
    zero = torch.zeros((), dtype=dense.dtype, device=dense.device)
    return torch.where(missing.unsqueeze(-1).unsqueeze(-1), zero, dense).transpose(1, 2).contiguous()


def _kv_gather_fake(cache: Tensor, block_table: Tensor, length: int, *, scale: Tensor | None = None) -> Tensor:
    dtype = cache.dtype if scale is None else scale.dtype
    return cache.new_empty((block_table.shape[0], cache.shape[2], length, cache.shape[3]), dtype=dtype)


def _kv_gather_f64(cache: Tensor, block_table: Tensor, length: int, *, scale: Tensor | None = None) -> Tensor:
    size, (heads, width) = cache.shape[1], cache.shape[2:]
    dense = torch.zeros(block_table.shape[0], heads, length, width, dtype=torch.float64)
    for b, row in enumerate(block_table.tolist()):
        for j in range(length):
            page, offset = row[j // size], j % size
            for h in range(heads if page >= 0 else 0):
                factor = 1.0 if scale is None else float(scale[page, offset, h])
                dense[b, h, j] = cache[page, offset, h].double() * factor
    return dense


def _kv_gather_samples(d: Draw) -> Iterator[Sample]:
    cache = d.normal(6, 4, 2, 8)
    table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32)
    yield Sample((cache, table, 10), {}, "a partly filled last page")
    yield Sample((cache, table, 12), {}, "whole pages")
    yield Sample((cache, table[:, :2], 3), {}, "less than a page")
    yield Sample((cache, torch.tensor([[-1, 0], [4, -1]]), 7), {}, "pages that were never stored")
    yield Sample((cache, torch.tensor([[2, 2, 1], [2, 2, 3]]), 9), {}, "shared pages")
    poisoned = cache.clone()
    poisoned[0] = torch.nan  # what a negative entry must not read
    yield Sample((poisoned, torch.tensor([[-1, 1]], dtype=torch.int32), 8), {}, "a poisoned page behind an empty entry")
    stacked = d.normal(2, 6, 2, 4, 8)[1].transpose(1, 2)
    yield Sample((stacked, table, 10), {}, "strided cache")
    scale = d.uniform(6, 4, 2, low=0.001, high=0.02)
    yield Sample((d.ints(6, 4, 2, 8, low=-127, high=128, dtype=torch.int8), table, 10), {"scale": scale}, "int8")


def _gather_scale(cache: Tensor, block_table: Tensor, length: int, *, scale: Tensor | None = None) -> Any:
    factor = 1.0 if scale is None else scale.abs().max()
    return (cache.double().nan_to_num(0.0).abs().max() * factor).view(1, 1, 1, 1)


SPECS = (
    OpSpec(
        "kv_gather",
        "(Tensor cache, Tensor block_table, SymInt length, *, Tensor? scale=None) -> Tensor",
        kv_gather,
        _kv_gather_fake,
        _kv_gather_f64,
        c_ulp=1.0,
        samples=_kv_gather_samples,
        row_scale=_gather_scale,
    ),
)
