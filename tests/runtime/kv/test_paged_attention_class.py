"""PagedAttention: stored and attended to in one call, against dense attention of each sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ascend_dynamo.compat import PagedAttention
from ascend_dynamo.errors import BadPageError, KVCacheError, OutOfPagesError, PageSizeError, UnsupportedCacheError


def dense(q, k, v, window=None):
    """The last queries of one sequence: q [S,Hq,D] against all keys k [L,Hk,D]."""
    count, length = q.shape[0], k.shape[0]
    i = torch.arange(length - count, length).unsqueeze(1)
    j = torch.arange(length)
    mask = j <= i if window is None else (j <= i) & (j > i - window)
    y = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    return y[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_steps_equal_dense_attention(page_size, window):
    attention = PagedAttention(2, 8, page_size, 128, v_head_dim=6, window=window)
    said = {attention.pool.open().sequence: (torch.zeros(0, 2, 8), torch.zeros(0, 2, 6)) for _ in range(3)}
    a, b, c = said
    for new in ({a: 7, b: 1}, {c: 3}, {b: 1, a: 1, c: 4}, {a: 1, b: 1, c: 1}):
        total = sum(new.values())
        q, k, v = torch.randn(total, 4, 8), torch.randn(total, 2, 8), torch.randn(total, 2, 6)
        y = attention(q, k, v, new)
        begin = 0
        for sequence, count in new.items():
            mine = slice(begin, begin + count)
            said[sequence] = tuple(torch.cat([x, n[mine]]) for x, n in zip(said[sequence], (k, v), strict=True))
            torch.testing.assert_close(y[mine], dense(q[mine], *said[sequence], window))
            begin += count
    fork = attention.pool.fork(a)
    said[fork] = said[a]
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 6)
    y = attention(q, k, v, {a: 1, fork: 1})
    for row, sequence in enumerate((a, fork)):
        whole = (torch.cat([x, n[row : row + 1]]) for x, n in zip(said[sequence], (k, v), strict=True))
        torch.testing.assert_close(y[row : row + 1], dense(q[row : row + 1], *whole, window))


def test_writing_by_slots():
    attention = PagedAttention(1, 2, page_size=4, num_pages=3)
    k = torch.arange(6.0).reshape(3, 1, 2)
    attention.write(k, -k, torch.tensor([9, -1, 2]))
    assert torch.equal(attention.key_cache[2, 1], k[0]) and torch.equal(attention.value_cache[0, 2], -k[2])
    assert int((attention.key_cache != 0).sum()) == 3
    before = attention.key_cache.clone()
    with pytest.raises(BadPageError, match="slot 12 is not in a cache of 3 pages of 4"):
        attention.write(k, k, torch.tensor([0, 1, 12]))
    with pytest.raises(KVCacheError, match="written twice"):
        attention.write(k, k, torch.tensor([3, 1, 3]))
    assert torch.equal(attention.key_cache, before)


def test_refusals_store_nothing():
    attention = PagedAttention(2, 8, 4, 2)
    one = attention.pool.open().sequence
    q, k = torch.randn(9, 4, 8), torch.randn(9, 2, 8)
    with pytest.raises(OutOfPagesError):
        attention(q, k, k, {one: 9})
    with pytest.raises(KVCacheError, match="new says 2 tokens"):
        attention(q, k, k, {one: 2})
    with pytest.raises(KVCacheError, match=r"\(4, 8\)\] per token, heads by width; this cache keeps \[\(2, 8\)"):
        attention(q[:2], q[:2], q[:2], {one: 2})
    assert attention.pool.length(one) == 0 and not attention.key_cache.any()
    with pytest.raises(PageSizeError):
        PagedAttention(2, 8, 0, 2)
    with pytest.raises(UnsupportedCacheError):
        PagedAttention(2, 8, 4, 2, quantization="fp8")


def test_int8_pages():
    full, small = (PagedAttention(2, 64, 4, 8, quantization=quantization) for quantization in (None, "int8"))
    q, k, v = torch.randn(9, 4, 64), torch.randn(9, 2, 64), torch.randn(9, 2, 64)
    exact, close = (a(q, k, v, {a.pool.open().sequence: 9}) for a in (full, small))
    assert small.key_cache.dtype == torch.int8 and small.store.nbytes < full.store.nbytes / 3
    assert 0 < float((close - exact).norm() / exact.norm()) < 0.02
