"""What the paged KV cache is tested against: formulas in float64, one token at a time, and sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect._attention_checks import attend_f64
from ascend_dynamo.dialect.spec import Draw, Sample


def kv_write_f64(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    write_f64(k, k_cache, slot_mapping)
    write_f64(v, v_cache, slot_mapping)


def write_f64(values: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, cache.shape[1])
            cache[block, offset].copy_(values[token])


def paged_attention_f64(
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
    y = q.new_zeros((q.shape[0], q.shape[1], v_cache.shape[-1]))
    size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for n, length in enumerate(kv_len.tolist()):
        begin, end = int(q_start[n]), int(q_start[n + 1])
        places = [(int(block_table[n, j // size]), j % size) for j in range(length)]
        for t in range(begin, end):
            p = length - end + t
            seen = torch.tensor([(not causal or j <= p) and (window < 0 or j > p - window) for j in range(length)])
            for h in range(q.shape[1]):
                if not length:
                    continue
                keys = torch.stack([k_cache[block, offset, h // group] for block, offset in places])
                values = torch.stack([v_cache[block, offset, h // group] for block, offset in places])
                scores = torch.einsum("d,jd->j", q[t, h], keys) * scale
                if softcap > 0:
                    scores = softcap * torch.sinh(scores / softcap) / torch.cosh(scores / softcap)
                sink = None if sinks is None else float(sinks[h])
                y[t, h] = attend_f64(scores, seen, values, sink, "zero")
    return y


def cache_scale(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, **__: Any) -> Tensor:
    return v_cache.abs().nan_to_num(0.0, 0.0, 0.0).max().view(1, 1, 1)


def batch_of(d: Draw, lengths: list[tuple[int, int]], size: int, blocks: int, padding: int = 0) -> tuple[Any, ...]:
    """block_table, q_start, kv_len and the token count for sequences of (query, key) lengths, on shuffled pages."""
    pages = d.permutation(blocks).tolist()
    width = max(-(-kv // size) for _, kv in lengths) + 1
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    starts = [0]
    for n, (queries, kv) in enumerate(lengths):
        starts.append(starts[-1] + queries)
        for i in range(-(-kv // size)):
            table[n, i] = pages.pop()
    lens = torch.tensor([kv for _, kv in lengths], dtype=torch.int32)
    return table, torch.tensor(starts, dtype=torch.int32), lens, starts[-1] + padding


def paged_attention_samples(d: Draw) -> Iterator[Sample]:
    k, v = d.normal(9, 4, 2, 8), d.normal(9, 4, 2, 8)
    mixed = [(3, 3), (1, 9), (2, 6)]
    for lengths, padding, options, note in (
        (mixed, 0, {}, "prefill and decode"),
        (mixed, 2, {"window": 3}, "window, padding tokens"),
        (mixed, 0, {"causal": False}, "not causal"),
        (mixed, 0, {"causal": False, "window": 2}, "window, not causal"),
        (mixed, 0, {"softcap": 3.0}, "softcap"),
        (mixed, 0, {"sinks": d.normal(4)}, "sinks"),
        ([(5, 5)], 0, {}, "one sequence"),
        ([(1, 8), (1, 1), (0, 3), (1, 0)], 0, {}, "decode, a sequence without queries, one without keys"),
    ):
        table, starts, lens, tokens = batch_of(d, lengths, 4, 9, padding)
        yield Sample((d.normal(tokens, 4, 8), k, v, table, starts, lens), {"scale": 0.35, **options}, note)


def kv_write_samples(d: Draw) -> Iterator[Sample]:
    for slots, note in (
        ([5, 0, 11, 7], "all real"),
        ([-1, 0, 3, -1], "padding around a write to slot 0"),
        ([-1, -1, -1, -1], "all padding"),
    ):
        caches = d.normal(4, 4, 2, 8), d.normal(4, 4, 2, 6)
        yield Sample((d.normal(4, 2, 8), d.normal(4, 2, 6), *caches, torch.tensor(slots)), {}, note)
    stacked = d.normal(2, 4, 4, 2, 8)
    yield Sample(
        (
            d.normal(1, 2, 8),
            d.normal(1, 2, 8),
            stacked[0].transpose(1, 2).contiguous().transpose(1, 2),
            stacked[1],
            torch.tensor([9]),
        ),
        {},
        "strided caches",
    )
