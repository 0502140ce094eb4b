"""Multi-head latent attention (DeepSeek-V2, 2024) on a paged cache of latents: mla_kv_write and mla_attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect._paged_checks import batch_of, row_f64, write_f64
from ascend_dynamo.dialect._pages import (
    attend_packed,
    check_lengths,
    check_pages,
    gather_pages,
    scatter_eager,
    write_slots,
)
from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample


def mla_kv_write(ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write one step's compressed keys-and-values and rotary keys to their pages, in place.

    ckv [T,R], k_rope [T,P]; caches [blocks, block_size, R] and [blocks, block_size, P]; slot_mapping as in kv_write.
    """
    write_slots(ckv, ckv_cache, slot_mapping)
    write_slots(k_rope, rope_cache, slot_mapping)


def _mla_kv_write_eager(
    ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor
) -> None:
    scatter_eager("mla_kv_write", slot_mapping, (ckv, ckv_cache, None), (k_rope, rope_cache, None))


def _mla_kv_write_f64(ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor) -> None:
    write_f64(ckv, ckv_cache, slot_mapping)
    write_f64(k_rope, rope_cache, slot_mapping)


def mla_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    rope_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Absorbed latent attention: softmax((q_latent ckv^T + q_rope k_rope^T) * scale) ckv, one key head for all.

    q_latent [T,H,R] (W_UK already applied), q_rope [T,H,P]; caches [blocks, block_size, R] and [.., P]; block_table,
    q_start, kv_len, causal, mask and errors as in paged_attention. Result [T,H,R] in q_latent.dtype (W_UV is applied
    by the caller).
    """
    latent = gather_pages(ckv_cache, block_table, kv_len).to(q_latent.dtype).unsqueeze(2)
    rope = gather_pages(rope_cache, block_table, kv_len).to(q_latent.dtype).unsqueeze(2)
    q = torch.cat((q_latent, q_rope), dim=-1)
    keys = torch.cat((latent, rope), dim=-1)
    return attend_packed(q, keys, latent, q_start, kv_len, scale=scale, causal=causal, mask=mask)


def _mla_attention_eager(
    q_latent: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    rope_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """One sequence at a time, reading only the pages that it uses."""
    y = torch.zeros_like(q_latent, memory_format=torch.contiguous_format)
    starts, size = q_start.tolist(), ckv_cache.shape[1]
    check_lengths("mla_attention", q_start, kv_len, len(q_latent), block_table.shape[1] * size, mask)
    for n, length in enumerate(kv_len.tolist()):
        begin, end = starts[n], starts[n + 1]
        if begin == end or length == 0:
            continue
        pages = block_table[n, : -(-length // size)]
        check_pages("mla_attention", pages, ckv_cache, n)
        y[begin:end] = mla_attention(
            q_latent[begin:end],
            q_rope[begin:end],
            ckv_cache,
            rope_cache,
            pages.unsqueeze(0),
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([length], dtype=torch.int32),
            scale=scale,
            causal=causal,
            mask=None if mask is None else mask[begin:end],
        )
    return y


def _mla_attention_fake(q_latent: Tensor, *_: Any, **__: Any) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


def _mla_attention_f64(
    q_latent: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    rope_cache: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    y = torch.zeros_like(q_latent)
    for n, length in enumerate(kv_len.tolist()):
        begin, end = int(q_start[n]), int(q_start[n + 1])
        for t in range(begin, end):
            visible = min(length, length - end + t + 1) if causal else length
            seen = [j for j in range(visible) if mask is None or bool(mask[t, j])]
            if not seen:
                continue
            ckv = torch.stack([row_f64(ckv_cache, block_table[n], j) for j in seen])
            rope = torch.stack([row_f64(rope_cache, block_table[n], j) for j in seen])
            scores = torch.einsum("hr,jr->hj", q_latent[t], ckv) + torch.einsum("hp,jp->hj", q_rope[t], rope)
            weights = torch.exp(scale * (scores - scores.max(-1, keepdim=True).values))
            y[t] = torch.einsum("hj,jr->hr", weights / weights.sum(-1, keepdim=True), ckv)
    return y


def _value_scale(q_latent: Tensor, q_rope: Tensor, ckv_cache: Tensor, *_: Any, **__: Any) -> Tensor:
    return ckv_cache.abs().nan_to_num(0.0, 0.0, 0.0).max().view(1, 1, 1)


def _mla_attention_samples(d: Draw) -> Iterator[Sample]:
    ckv, rope = d.normal(9, 4, 16), d.normal(9, 4, 6)
    for lengths, padding, options, note in (
        ([(3, 3), (1, 9), (2, 6)], 0, {}, "prefill and decode"),
        ([(3, 3), (1, 9), (2, 6)], 2, {"causal": False}, "not causal, padding tokens"),
        ([(1, 7), (1, 0)], 0, {}, "a sequence without keys"),
        ([(3, 3), (1, 9), (2, 6)], 0, {"mask": d.bools(6, 9)}, "mask"),
    ):
        table, starts, lens, tokens = batch_of(d, lengths, 4, 9, padding)
        q = d.normal(tokens, 3, 16), d.normal(tokens, 3, 6)
        yield Sample((*q, ckv, rope, table, starts, lens), {"scale": 0.2, **options}, note)
    table, starts, lens, tokens = batch_of(d, [(1, 9), (2, 6)], 4, 9)
    table[0, 0] = table[1, 1] = -1
    q = d.normal(tokens, 3, 16), d.normal(tokens, 3, 6)
    yield Sample((*q, ckv, rope, table, starts, lens), {"scale": 0.2}, "pages never stored")


def _mla_kv_write_samples(d: Draw) -> Iterator[Sample]:
    for slots in ([5, 0, 11, 7], [-1, 0, 3, -1], [-1, -1, -1, -1]):
        yield Sample((d.normal(4, 16), d.normal(4, 6), d.normal(4, 4, 16), d.normal(4, 4, 6), torch.tensor(slots)))


SPECS = (
    OpSpec(
        "mla_kv_write",
        "(Tensor ckv, Tensor k_rope, Tensor(a!) ckv_cache, Tensor(b!) rope_cache, Tensor slot_mapping) -> ()",
        mla_kv_write,
        lambda ckv, k_rope, ckv_cache, rope_cache, slot_mapping: None,
        _mla_kv_write_f64,
        c_ulp=1.0,
        samples=_mla_kv_write_samples,
        kernel=_mla_kv_write_eager,
    ),
    OpSpec(
        "mla_attention",
        "(Tensor q_latent, Tensor q_rope, Tensor ckv_cache, Tensor rope_cache, Tensor block_table, Tensor q_start,"
        " Tensor kv_len, *, float scale, bool causal=True, Tensor? mask=None) -> Tensor",
        mla_attention,
        _mla_attention_fake,
        _mla_attention_f64,
        c_ulp=8.0,
        samples=_mla_attention_samples,
        kernel=_mla_attention_eager,
        row_scale=_value_scale,
    ),
)
