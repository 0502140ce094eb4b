"""Attention to gathered pages becomes attention to pages, exactly where both mean the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot

import ascend_dynamo.dialect  # noqa: F401

ascend = torch.ops.ascend
B, HQ, HK, SIZE, COLUMNS, D = 2, 4, 2, 4, 3, 8
L = 10
RAISED = ("sdpa", "eager_attention", "paged_attention")


def pages(queries: int = 1, dtype: torch.dtype = torch.float32):
    """q, k_cache, v_cache, table."""
    g = torch.Generator().manual_seed(queries)
    q = torch.randn(B, HQ, queries, D, generator=g).to(dtype)
    caches = [torch.randn(7, SIZE, HK, D, generator=g).to(dtype) for _ in range(2)]
    return q, *caches, torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32)


def read(k_cache, v_cache, table, length=L):
    return ascend.kv_gather(k_cache, table, length), ascend.kv_gather(v_cache, table, length)


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def decode(q, k_cache, v_cache, table):
    return attend(q, *read(k_cache, v_cache, table))


def prefill(q, k_cache, v_cache, table):
    return attend(q, *read(k_cache, v_cache, table), is_causal=True)


def masked(q, k_cache, v_cache, table, mask):
    return attend(q, *read(k_cache, v_cache, table), attn_mask=mask)


def lower_right(q, k_cache, v_cache, table):
    i = torch.arange(q.shape[2]).unsqueeze(-1) + L - q.shape[2]
    return attend(q, *read(k_cache, v_cache, table), attn_mask=torch.arange(L) <= i)


def windowed(q, k_cache, v_cache, table):
    i = torch.arange(q.shape[2]).unsqueeze(-1) + L - q.shape[2]
    j = torch.arange(L)
    return attend(q, *read(k_cache, v_cache, table), attn_mask=(j <= i) & (j > i - 3))


def repeated(q, k_cache, v_cache, table):
    k, v = (x[:, :, None].expand(B, HK, HQ // HK, L, D).reshape(B, HQ, L, D) for x in read(k_cache, v_cache, table))
    return F.scaled_dot_product_attention(q, k, v)


def eager(q, k_cache, v_cache, table):
    k, v = (x[:, :, None].expand(B, HK, HQ // HK, L, D).reshape(B, HQ, L, D) for x in read(k_cache, v_cache, table))
    return torch.softmax(q @ k.transpose(2, 3) * 0.3, -1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fn", "queries"),
    [(decode, 1), (decode, 3), (prefill, L), (lower_right, 4), (windowed, 4), (repeated, 1), (eager, 1)],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_pages_are_read(fn, queries, dtype):
    args = pages(queries, dtype)
    result = fuse(fn, args, *RAISED)
    assert result.count("paged_attention") == 1 and result.ops("ascend.kv_gather") == 0
    assert_same(fn, args, result)


@pytest.mark.parametrize("shape", [(B, 1, 3, L), (1, 1, 3, L), (3, L), (B, 1, 1, L), (1, L)], ids=str)
def test_masks_are_packed(shape):
    args = (*pages(3), torch.rand(shape) < 0.6)
    result = fuse(masked, args, *RAISED)
    assert result.count("paged_attention") == 1
    assert_same(masked, args, result)
    closed = (*args[:4], torch.zeros(shape, dtype=torch.bool))
    assert_same(masked, closed, result)  # rows without keys


def test_pages_that_were_never_stored():
    q, k, v, _ = pages(2)
    args = (q, k, v, torch.tensor([[-1, 0, 2], [-1, -1, 3]], dtype=torch.int32))
    result = fuse(decode, args, *RAISED)
    assert result.count("paged_attention") == 1
    assert_same(decode, args, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_pages(dtype):
    def fn(q, k_cache, v_cache, table, k_scale, v_scale):
        k, v = ascend.kv_gather(k_cache, table, L, scale=k_scale), ascend.kv_gather(v_cache, table, L, scale=v_scale)
        return attend(q, k.to(q.dtype), v.to(q.dtype))

    q, _, _, table = pages(1, dtype)
    codes = [torch.randint(-127, 128, (7, SIZE, HK, D), dtype=torch.int8) for _ in range(2)]
    args = (q, *codes, table, *(torch.rand(7, SIZE, HK) * 0.02 for _ in range(2)))
    result = fuse(fn, args, *RAISED, validate=False)
    assert result.count("paged_attention") == 1
    assert_same(fn, args, result)


def test_written_and_read_in_one_graph_over_two_layers():
    def fn(q, k_cache, v_cache, table, k, v, slots):
        for _ in range(2):
            k_cache, v_cache = ascend.kv_write_functional(k, v, k_cache, v_cache, slots)
            q = attend(q, *read(k_cache, v_cache, table))
        return q, k_cache, v_cache

    args = (*pages(), torch.randn(B, HK, D), torch.randn(B, HK, D), torch.tensor([17, 20]))
    result = fuse(fn, args, *RAISED)
    assert result.count("paged_attention") == 2
    assert result.ops("aten.arange") == 1 and result.ops("aten.full") == 1, "lengths are made once for all layers"
    assert_same(fn, args, result)
    snapshot("paged_attention", result)


def test_keys_that_two_layers_share():
    def fn(q, k_cache, v_cache, table):
        k, v = read(k_cache, v_cache, table)
        return attend(attend(q, k, v), k, v)

    result = fuse(fn, pages(), *RAISED)
    assert result.count("paged_attention") == 2 and result.ops("ascend.kv_gather") == 0
    assert_same(fn, pages(), result)


def per_head_mask(q, k_cache, v_cache, table):
    return masked(q, k_cache, v_cache, table, torch.ones(B, HQ, q.shape[2], L, dtype=torch.bool))


def biased(q, k_cache, v_cache, table):
    return masked(q, k_cache, v_cache, table, (q[:, :1, :, :1] * 2).expand(B, 1, q.shape[2], L))


def top_left(q, k_cache, v_cache, table):
    return prefill(q, k_cache, v_cache, table)


def two_tables(q, k_cache, v_cache, table):
    return attend(q, ascend.kv_gather(k_cache, table, L), ascend.kv_gather(v_cache, table.flip(0), L))


def gathered_for_others_too(q, k_cache, v_cache, table):
    k, v = read(k_cache, v_cache, table)
    return attend(q, k, v), k.sum()


def a_part_of_the_tokens(q, k_cache, v_cache, table):
    k, v = read(k_cache, v_cache, table)
    return attend(q, k[:, :, 2:], v[:, :, 2:])


def long_table(q, k_cache, v_cache, table):
    return attend(q, *read(k_cache, v_cache, table.long()))


def empty_rows_of_nan(q, k_cache, v_cache, table):
    k, v = (x[:, :, None].expand(B, HK, HQ // HK, L, D).reshape(B, HQ, L, D) for x in read(k_cache, v_cache, table))
    scores = (q @ k.transpose(2, 3)).masked_fill(q[:, :1, :, :1].expand(B, 1, q.shape[2], L) > 0, -torch.inf)
    return torch.softmax(scores, -1) @ v


def more_queries_than_keys(q, k_cache, v_cache, table):
    return attend(torch.cat([q] * 6, 2), *read(k_cache, v_cache, table))


@pytest.mark.parametrize(
    ("fn", "code", "reason"),
    [
        (per_head_mask, "shape", "all heads"),
        (biased, "arg", "bias"),
        (top_left, "unproven", "top_left"),
        (two_tables, "arg", "one block table"),
        (gathered_for_others_too, "users", "only attention"),
        (a_part_of_the_tokens, "op", "kv_gather"),
        (long_table, "dtype", "int32"),
        (empty_rows_of_nan, "arg", "nan"),
        (more_queries_than_keys, "unproven", "no more queries"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_what_is_not_the_same_says_why(fn, code, reason):
    args = pages(2)
    if fn is per_head_mask:
        args = (*pages(2), torch.rand(B, HQ, 2, L) < 0.5)
        fn = masked
    result = fuse(fn, args, *RAISED)
    assert result.count("paged_attention") == 0
    missed = result.missed("paged_attention")
    assert missed.code == code and reason in missed.reason, missed
    assert_same(fn, args, result)
