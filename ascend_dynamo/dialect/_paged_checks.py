"""What the paged KV cache is tested against: formulas in float64, one token at a time, and sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect._attention_checks import attend_f64
from ascend_dynamo.dialect.spec import Draw, Sample


def kv_write_f64(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    write_f64(k, k_cache, slot_mapping, k_scale)
    write_f64(v, v_cache, slot_mapping, v_scale)


def write_f64(values: Tensor, cache: Tensor, slot_mapping: Tensor, scale: Tensor | None = None) -> None:
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, cache.shape[1])
        if scale is None:
            cache[block, offset].copy_(values[token])
            continue
        for head, x in enumerate(values[token]):
            unit = torch.maximum(x.max(), -x.min()) / 127
            scale[block, offset, head] = unit if unit > 0 else 1.0
            # adding 1.5 * 2^52 leaves an integer, ties to even
            exact = x.double() / scale[block, offset, head].double()
            cache[block, offset, head] = ((exact + 1.5 * 2**52) - 1.5 * 2**52).to(cache.dtype)


def row_f64(cache: Tensor, pages: Tensor, j: int, scale: Tensor | None = None) -> Tensor:
    """Token j of the sequence that owns these pages; zeros if its page was never stored."""
    block, offset = int(pages[j // cache.shape[1]]), j % cache.shape[1]
    if block < 0:
        return torch.zeros_like(cache[0, 0], dtype=cache.dtype if scale is None else scale.dtype)
    row = cache[block, offset]
    return row if scale is None else torch.einsum("hd,h->hd", row.to(scale.dtype), scale[block, offset])


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
    mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    y = q.new_zeros((q.shape[0], q.shape[1], v_cache.shape[-1]))
    group = q.shape[1] // k_cache.shape[2]
    for n, length in enumerate(kv_len.tolist()):
        begin, end = int(q_start[n]), int(q_start[n + 1])
        if not length:
            continue
        keys = torch.stack([row_f64(k_cache, block_table[n], j, k_scale) for j in range(length)])
        values = torch.stack([row_f64(v_cache, block_table[n], j, v_scale) for j in range(length)])
        for t in range(begin, end):
            p = length - end + t
            seen = torch.tensor(
                [
                    (not causal or j <= p) and (window < 0 or j > p - window) and (mask is None or bool(mask[t, j]))
                    for j in range(length)
                ]
            )
            for h in range(q.shape[1]):
                scores = torch.einsum("d,jd->j", q[t, h], keys[:, h // group]) * scale
                if softcap > 0:
                    scores = softcap * torch.sinh(scores / softcap) / torch.cosh(scores / softcap)
                sink = None if sinks is None else float(sinks[h])
                y[t, h] = attend_f64(scores, seen, values[:, h // group], sink, "zero")
    return y


def cache_scale(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any, v_scale: Tensor | None = None, **__: Any
) -> Tensor:
    v = v_cache if v_scale is None else v_cache * v_scale.unsqueeze(-1)
    return v.abs().nan_to_num(0.0, 0.0, 0.0).max().view(1, 1, 1)


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
    table, starts, lens, tokens = batch_of(d, mixed, 4, 9)
    sample = (d.normal(tokens, 4, 8), k, v, table, starts, lens)
    yield Sample(sample, {"scale": 0.35, "mask": d.bools(tokens, 10)}, "mask wider than any sequence")
    table = table.clone()
    table[1, 0] = table[2, 1] = -1
    sample = (d.normal(tokens, 4, 8), k, v, table, starts, lens)
    yield Sample(sample, {"scale": 0.35, "mask": d.bools(tokens, 9)}, "pages never stored, mask")
    yield Sample(sample, {"scale": 0.35, "softcap": 2.0}, "pages never stored, seen")
    k8, v8 = (d.ints(9, 4, 2, n, low=-127, high=128, dtype=torch.int8) for n in (8, 6))
    scales = {f"{name}_scale": d.uniform(9, 4, 2, low=0.001, high=0.02, dtype=torch.float32) for name in "kv"}
    yield Sample((sample[0], k8, v8, *sample[3:]), {"scale": 0.35, **scales}, "int8")


def kv_write_samples(d: Draw) -> Iterator[Sample]:
    for slots, note in (
        ([5, 0, 11, 7], "all real"),
        ([-1, 0, 3, -1], "padding around a write to slot 0"),
        ([-1, -1, -1, -1], "all padding"),
    ):
        caches = d.normal(4, 4, 2, 8), d.normal(4, 4, 2, 6)
        yield Sample((d.normal(4, 2, 8), d.normal(4, 2, 6), *caches, torch.tensor(slots)), {}, note)
    int8 = [d.ints(4, 4, 2, n, low=-127, high=128, dtype=torch.int8) for n in (8, 6)]
    scales = {f"{name}_scale": d.uniform(4, 4, 2, low=0.001, high=0.02, dtype=torch.float32) for name in "kv"}
    k, v = d.normal(4, 2, 8), d.normal(4, 2, 6)
    k[..., 0] = v[..., 0] = 127 / 16  # a scale of 1 / 16, so that quotients, ties too, are exact in every dtype
    k[2, 1] = 0
    yield Sample((k, v, *int8, torch.tensor([-1, 0, 3, 9])), scales, "int8")
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
