"""What the operators of the paged cache share: writing slots, reading pages, packed attention, and checks by value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo.dialect.attention import flash_attention


def quantise(values: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., D] -> int8 [..., D] and scales [...]: symmetric, scale = max|values| / 127, rounded to nearest even.

    Where that is 0 the scale is 1. A vector that holds an infinity or NaN becomes zeros with a scale that is not
    finite, so that it alone is poisoned when it is read.
    """
    wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    scale = wide.abs().amax(-1) / 127.0
    scale = torch.where(scale == 0, 1.0, scale).to(scale_dtype)
    finite = torch.isfinite(scale)
    q = torch.round(wide / torch.where(finite, scale, 1.0).unsqueeze(-1)).clamp(-127, 127)
    return torch.where(finite.unsqueeze(-1), q, 0.0).to(torch.int8), scale


def check_scales(op: str, name: str, cache: Tensor, scale: Tensor | None) -> None:
    """Scales are given for an int8 cache, and for no other. Raises ValueError."""
    if (cache.dtype == torch.int8) != (scale is not None):
        given = "no scales" if scale is None else "scales"
        raise ValueError(
            f"ascend::{op}: {name} is {str(cache.dtype).removeprefix('torch.')} with {given}; "
            "an int8 cache needs scales [blocks, block_size, heads], another takes none"
        )


def write_slots(values: Tensor, cache: Tensor, slot_mapping: Tensor, scale: Tensor | None = None) -> None:
    """cache[slot // block_size, slot % block_size] = values, padding slots (-1) left out, by static shapes only.

    With ``scale`` [blocks, block_size, *R] the values [T, *R, D] are quantised. Padding tokens repeat the first real
    token's write, so that no two writes differ; if all are padding they write what slot 0 holds already.
    """
    if scale is not None:
        values, scales = quantise(values, scale.dtype)
        write_slots(scales, scale, slot_mapping)
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


def check_slots(op: str, slot_mapping: Tensor, *caches: Tensor) -> None:
    """Raises IndexError, before anything is written, if a slot lies beyond a cache."""
    for cache in caches:
        slots = cache.shape[0] * cache.shape[1]
        wrong = slot_mapping[slot_mapping >= slots]
        if len(wrong):
            raise IndexError(
                f"ascend::{op}: slot {int(wrong[0])} is beyond the cache, which has {cache.shape[0]} blocks of "
                f"{cache.shape[1]} tokens; slots are block * block_size + offset, -1 for padding"
            )


def scatter_eager(op: str, slot_mapping: Tensor, *written: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """As write_slots for several (values, cache, scale), choosing the real tokens by value."""
    check_slots(op, slot_mapping, *(t for _, *targets in written for t in targets if t is not None))
    real = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[real]

    def put(cache: Tensor, values: Tensor) -> None:
        size = cache.shape[1]
        cache.index_put_((slots // size, slots % size), values.to(cache.dtype))

    for values, cache, scale in written:
        if scale is None:
            put(cache, values[real])
        else:
            q, scales = quantise(values[real], scale.dtype)
            put(cache, q)
            put(scale, scales)


def check_pages(op: str, pages: Tensor, cache: Tensor, sequence: int) -> None:
    """Raises IndexError if an entry of a sequence's block table is no block of the cache."""
    wrong = torch.nonzero(pages >= cache.shape[0]).flatten().tolist()
    if wrong:
        raise IndexError(
            f"ascend::{op}: block_table[{sequence}, {wrong[0]}] is {int(pages[wrong[0]])}, but the cache has "
            f"{cache.shape[0]} blocks"
        )


def check_lengths(op: str, q_start: Tensor, kv_len: Tensor, tokens: int, room: int, mask: Tensor | None) -> None:
    """Raises ValueError if sequences own tokens that are not there, or have more keys than table or mask reach."""
    starts, lengths = q_start.tolist(), kv_len.tolist()
    if len(starts) != len(lengths) + 1 or starts[0] < 0 or starts[-1] > tokens or sorted(starts) != starts:
        raise ValueError(
            f"ascend::{op}: q_start {starts} of {len(lengths)} sequences must ascend within [0, {tokens}], "
            "one entry more than sequences"
        )
    wrong = [(n, length) for n, length in enumerate(lengths) if not 0 <= length <= room]
    if wrong:
        raise ValueError(f"ascend::{op}: kv_len[{wrong[0][0]}] is {wrong[0][1]}, but the block table holds {room} keys")
    if mask is not None and mask.shape[1] < max(lengths, default=0):
        raise ValueError(f"ascend::{op}: mask has {mask.shape[1]} keys, but a sequence has {max(lengths)}")


def gather_pages(cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: Tensor | None = None) -> Tensor:
    """[blocks, size, *R] and [B, max_blocks] -> [B, max_blocks * size, *R], dequantised if there are scales.

    Zeros beyond a sequence's kv_len, whatever the table and the pages hold there, and in pages that were never stored
    (negative entries).
    """
    size, width = cache.shape[1], block_table.shape[1]
    begin = torch.arange(width, device=cache.device).unsqueeze(0) * size
    length = kv_len.to(cache.device).unsqueeze(-1)
    used = (block_table >= 0) & (begin < length)
    pages = cache[torch.where(used, block_table, 0)]
    if scale is not None:
        pages = pages.to(scale.dtype) * scale[torch.where(used, block_table, 0)].unsqueeze(-1)
    token = begin.unsqueeze(-1) + torch.arange(size, device=cache.device)
    stored = used.unsqueeze(-1) & (token < length.unsqueeze(-1))
    trailing = [1] * (cache.dim() - 2)
    return torch.where(stored.view(*stored.shape, *trailing), pages, 0).flatten(1, 2)


def gather_sequence(cache: Tensor, pages: Tensor, length: int, scale: Tensor | None = None) -> Tensor:
    """As gather_pages for one sequence [pages] of known length, reading nothing else: [length, *R]."""
    rows = cache[pages.clamp(min=0)]
    if scale is not None:
        rows = rows.to(scale.dtype) * scale[pages.clamp(min=0)].unsqueeze(-1)
    rows = torch.where((pages >= 0).view(-1, *[1] * (rows.dim() - 1)), rows, 0)
    return rows.flatten(0, 1)[:length]


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
    mask: Tensor | None = None,
) -> Tensor:
    """Packed queries [T,Hq,D] against padded keys [B,S,Hk,D]: every token meets every sequence, and keeps its own.

    Sequences meet in no sum, so a poisoned neighbour reaches no result. ``mask`` is bool [T, any number of keys]; what
    it does not reach is hidden.
    """
    t, (b, s) = q.shape[0], keys.shape[:2]
    token = torch.arange(t, device=q_start.device, dtype=q_start.dtype).unsqueeze(0)
    j = torch.arange(s, device=q_start.device, dtype=q_start.dtype)
    each = torch.arange(b, device=q_start.device)  # by index: slices would relate symbolic B and B + 1 by a guard
    begin, end, length = (x.unsqueeze(-1) for x in (q_start[each], q_start[each + 1], kv_len))  # [B,1]
    mine = (token >= begin) & (token < end)  # [B,T]
    last = (length - end + token).unsqueeze(-1)  # the token's own position in its sequence
    seen = mine.unsqueeze(-1) & (j < length).unsqueeze(1)
    if causal:
        seen = seen & (j <= last)
    if window >= 0:
        seen = seen & (j > last - window)
    seen = seen.to(q.device)
    if mask is not None:
        reach = torch.arange(s, device=q.device).clamp(max=mask.shape[1])
        seen = seen & F.pad(mask, (0, 1)).index_select(1, reach)
    y = flash_attention(
        q.transpose(0, 1).unsqueeze(0).expand(b, -1, -1, -1),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        mask=seen.unsqueeze(1),
        sinks=sinks,
        scale=scale,
        softcap=softcap,
        empty_row="zero",
    )  # [B,Hq,T,Dv]
    mine = mine.to(q.device).unsqueeze(1).unsqueeze(-1)
    return torch.where(mine, y, 0).sum(0).transpose(0, 1).contiguous()
