"""The paged KV cache (Kwon et al. 2023): kv_write and paged_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect._paged_checks import (
    cache_scale,
    kv_write_f64,
    kv_write_samples,
    paged_attention_f64,
    paged_attention_samples,
)
from ascend_dynamo.dialect.attention import flash_attention
from ascend_dynamo.dialect.spec import OpSpec


def write_slots(values: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot // block_size, slot % block_size] = values, padding slots (-1) left out, by static shapes only.

    Padding tokens repeat the first real token's write, so that no two writes differ; if all are padding they write
    what slot 0 holds already.
    """
    block_size = cache.shape[1]
    real = slot_mapping >= 0
    first = real.to(torch.int32).argmax().unsqueeze(0)
    fallback_slot = slot_mapping[first].clamp(min=0)
    held = cache[fallback_slot // block_size, fallback_slot % block_size]
    trailing = [1] * (values.dim() - 1)
    values = values.to(cache.dtype)
    fallback = torch.where(real[first].view(1, *trailing), values[first], held)
    slots = torch.where(real, slot_mapping, fallback_slot)
    rows = torch.where(real.view(-1, *trailing), values, fallback)
    cache.index_put_((slots // block_size, slots % block_size), rows)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write one step's keys and values to their pages, in place.

    k [T,Hk,D], v [T,Hk,Dv]; caches [blocks, block_size, Hk, D or Dv], any strides; slot_mapping [T] int64 on their
    device: block * block_size + offset, -1 for a padding token, which writes nothing. Slots of one call are distinct.
    Values are cast to the caches' dtype. T >= 1.
    """
    write_slots(k, k_cache, slot_mapping)
    write_slots(v, v_cache, slot_mapping)


def _kv_write_eager(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    scatter_eager(((k, k_cache), (v, v_cache)), slot_mapping)


def scatter_eager(pairs: tuple[tuple[Tensor, Tensor], ...], slot_mapping: Tensor) -> None:
    """As write_slots for several caches, choosing the real tokens by value."""
    real = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[real]
    for values, cache in pairs:
        size = cache.shape[1]
        cache.index_put_((slots // size, slots % size), values[real].to(cache.dtype))


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """[blocks, size, *R] and [B, max_blocks] -> [B, max_blocks * size, *R]; unused table entries may be negative."""
    return cache[block_table.clamp(min=0)].flatten(1, 2)


def attend_packed(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Packed queries [T,Hq,D] against padded keys [B,S,Hk,D]: every token meets every sequence, and keeps its own.

    Sequences meet in no sum, and slots beyond a sequence's length count as 0: neither a poisoned neighbour nor memory
    that was never written reaches a result.
    """
    t, (b, s) = q.shape[0], keys.shape[:2]
    token = torch.arange(t, device=q_start.device, dtype=q_start.dtype).unsqueeze(0)
    j = torch.arange(s, device=q_start.device, dtype=q_start.dtype)
    each = torch.arange(b, device=q_start.device)  # by index: slices would relate symbolic B and B + 1 by a guard
    begin, end, length = (x.unsqueeze(-1) for x in (q_start[each], q_start[each + 1], kv_len))  # [B,1]
    mine = (token >= begin) & (token < end)  # [B,T]
    last = (length - end + token).unsqueeze(-1)  # the token's own position in its sequence
    written = j < length  # [B,S]
    seen = mine.unsqueeze(-1) & written.unsqueeze(1)
    if causal:
        seen = seen & (j <= last)
    if window >= 0:
        seen = seen & (j > last - window)
    written = written.to(q.device).unsqueeze(-1).unsqueeze(-1)
    y = flash_attention(
        q.transpose(0, 1).unsqueeze(0).expand(b, -1, -1, -1),
        torch.where(written, keys, 0).transpose(1, 2),
        torch.where(written, values, 0).transpose(1, 2),
        mask=seen.unsqueeze(1).to(q.device),
        sinks=sinks,
        scale=scale,
        softcap=softcap,
        empty_row="zero",
    )  # [B,Hq,T,Dv]
    mine = mine.to(q.device).unsqueeze(1).unsqueeze(-1)
    return torch.where(mine, y, 0).sum(0).transpose(0, 1).contiguous()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of packed queries over pages, prefill and decode alike.

    q [T,Hq,D], all sequences one after the other; k_cache [blocks, block_size, Hk, D], v_cache likewise with Dv;
    block_table [B, max_blocks] int32, the pages of each sequence (entries beyond its length are ignored); q_start
    [B+1] and kv_len [B] int32 in host memory: sequence b owns tokens q_start[b] to q_start[b+1] and has kv_len[b]
    keys, its queries being the last of them. Key j is visible to the query at position p iff j < kv_len, j <= p if
    causal, and j > p - window if window >= 0. softcap and sinks as in flash_attention. Result [T,Hq,Dv] in q.dtype; 0
    for tokens after q_start[B] (padding) and for rows that see no key.
    """
    keys, values = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    return attend_packed(
        q,
        keys.to(q.dtype),
        values.to(q.dtype),
        q_start,
        kv_len,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def _paged_attention_eager(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One sequence at a time, reading only the pages that it uses."""
    y = q.new_zeros((q.shape[0], q.shape[1], v_cache.shape[-1]))
    starts, size = q_start.tolist(), k_cache.shape[1]
    for n, length in enumerate(kv_len.tolist()):
        begin, end = starts[n], starts[n + 1]
        if begin == end or length == 0:
            continue
        pages = block_table[n, : -(-length // size)]
        k, v = (cache[pages].flatten(0, 1)[:length].transpose(0, 1).to(q.dtype) for cache in (k_cache, v_cache))
        mask = None
        i = torch.arange(length - (end - begin), length, device=q.device).unsqueeze(-1)
        if window >= 0 and not causal:
            mask = torch.arange(length, device=q.device) > i - window
        out = flash_attention(
            q[begin:end].transpose(0, 1).unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            mask=mask,
            sinks=sinks,
            scale=scale,
            causal="bottom_right" if causal else "none",
            window=window if causal else -1,
            softcap=softcap,
            empty_row="zero",
        )
        y[begin:end] = out.squeeze(0).transpose(0, 1)
    return y


def _paged_attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_cache.shape[-1]))


SPECS = (
    OpSpec(
        "kv_write",
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
        kv_write,
        lambda k, v, k_cache, v_cache, slot_mapping: None,
        kv_write_f64,
        c_ulp=1.0,
        samples=kv_write_samples,
        kernel=_kv_write_eager,
    ),
    OpSpec(
        "paged_attention",
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor q_start, Tensor kv_len, *, float scale,"
        " bool causal=True, int window=-1, float softcap=0., Tensor? sinks=None) -> Tensor",
        paged_attention,
        _paged_attention_fake,
        paged_attention_f64,
        c_ulp=8.0,
        samples=paged_attention_samples,
        kernel=_paged_attention_eager,
        row_scale=cache_scale,
    ),
)
