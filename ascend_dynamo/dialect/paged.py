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
from ascend_dynamo.dialect._pages import (
    attend_packed,
    check_lengths,
    check_pages,
    check_scales,
    gather_pages,
    gather_sequence,
    scatter_eager,
    write_slots,
)
from ascend_dynamo.dialect.attention import flash_attention
from ascend_dynamo.dialect.spec import OpSpec


def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write one step's keys and values to their pages, in place.

    k [T,Hk,D], v [T,Hk,Dv]; caches [blocks, block_size, Hk, D or Dv], any strides; slot_mapping [T] int64 on their
    device: block * block_size + offset, -1 for a padding token, which writes nothing. Slots of one call are distinct.
    Values are cast to the caches' dtype. int8 caches take k_scale and v_scale, float32 [blocks, block_size, Hk], which
    are written too: each vector is stored as round(x / scale) with scale = max|x| / 127 (1 if all are 0). T >= 1.

    Raises:
        ValueError: an int8 cache without scales, or scales for another cache.
        IndexError: a slot beyond the cache (nothing has been written).
    """
    check_scales("kv_write", "k_cache", k_cache, k_scale)
    check_scales("kv_write", "v_cache", v_cache, v_scale)
    write_slots(k, k_cache, slot_mapping, k_scale)
    write_slots(v, v_cache, slot_mapping, v_scale)


def _kv_write_eager(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    check_scales("kv_write", "k_cache", k_cache, k_scale)
    check_scales("kv_write", "v_cache", v_cache, v_scale)
    scatter_eager("kv_write", slot_mapping, (k, k_cache, k_scale), (v, v_cache, v_scale))


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
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of packed queries over pages, prefill and decode alike.

    q [T,Hq,D], all sequences one after the other; k_cache [blocks, block_size, Hk, D], v_cache likewise with Dv;
    block_table [B, max_blocks] int32, the pages of each sequence (entries beyond its length are ignored, a negative one
    within it is a page of zeros: keys and values that were never stored, as in front of a left-padded prompt); q_start
    [B+1] and kv_len [B] int32 in host memory: sequence b owns tokens q_start[b] to q_start[b+1] and has kv_len[b]
    keys, its queries being the last of them. Key j is visible to the query at position p iff j < kv_len, j <= p if
    causal, j > p - window if window >= 0, and mask (bool [T, S], S >= max kv_len) allows it. softcap and sinks as in
    flash_attention; int8 caches come with k_scale and v_scale, as kv_write writes them. Result [T,Hq,Dv] in q.dtype; 0
    for tokens after q_start[B] (padding) and for rows that see no key.

    Raises:
        ValueError: an int8 cache without scales or scales for another; q_start does not ascend within T; a kv_len
            beyond what the table or the mask holds.
        IndexError: an entry of the table that is no block of the cache.
    """
    check_scales("paged_attention", "k_cache", k_cache, k_scale)
    check_scales("paged_attention", "v_cache", v_cache, v_scale)
    keys = gather_pages(k_cache, block_table, kv_len, k_scale)
    values = gather_pages(v_cache, block_table, kv_len, v_scale)
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
        mask=mask,
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
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """One sequence at a time, reading only the pages that it uses."""
    check_scales("paged_attention", "k_cache", k_cache, k_scale)
    check_scales("paged_attention", "v_cache", v_cache, v_scale)
    y = q.new_zeros((q.shape[0], q.shape[1], v_cache.shape[-1]))
    starts, size = q_start.tolist(), k_cache.shape[1]
    check_lengths("paged_attention", q_start, kv_len, q.shape[0], block_table.shape[1] * size, mask)
    for n, length in enumerate(kv_len.tolist()):
        begin, end = starts[n], starts[n + 1]
        if begin == end or length == 0:
            continue
        pages = block_table[n, : -(-length // size)]
        check_pages("paged_attention", pages, k_cache, n)
        k, v = (
            gather_sequence(cache, pages, length, scales).transpose(0, 1).to(q.dtype)
            for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
        )
        seen = None if mask is None else mask[begin:end, :length]
        if window >= 0 and not causal:
            i = torch.arange(length - (end - begin), length, device=q.device).unsqueeze(-1)
            near = torch.arange(length, device=q.device) > i - window
            seen = near if seen is None else seen & near
        out = flash_attention(
            q[begin:end].transpose(0, 1).unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            mask=seen,
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
        "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, Tensor(c!)? k_scale=None,"
        " Tensor(d!)? v_scale=None) -> ()",
        kv_write,
        lambda k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None: None,
        kv_write_f64,
        c_ulp=1.0,
        samples=kv_write_samples,
        kernel=_kv_write_eager,
    ),
    OpSpec(
        "paged_attention",
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor q_start, Tensor kv_len, *, float scale,"
        " bool causal=True, int window=-1, float softcap=0., Tensor? sinks=None, Tensor? mask=None,"
        " Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
        paged_attention,
        _paged_attention_fake,
        paged_attention_f64,
        c_ulp=8.0,
        samples=paged_attention_samples,
        kernel=_paged_attention_eager,
        row_scale=cache_scale,
    ),
)
