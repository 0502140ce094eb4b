"""SDPA and sizes: one graph for a growing cache, whose keys and values have a symbol each; one head for all queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse

from ascend_dynamo.backend import Backend


def step(q, k, v, past_k, past_v):
    return F.scaled_dot_product_attention(q, torch.cat((past_k, k), -2), torch.cat((past_v, v), -2))


def arguments(length):
    new = (torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    return *new, torch.randn(2, 4, length, 8), torch.randn(2, 4, length, 8)


def compiled(step):
    backend = Backend({"target": "reference", "strict": True, "validate": True}, texts=True)
    return torch.compile(step, backend=backend), backend


def test_separate_symbols_of_keys_and_values_are_one_count():
    run, backend = compiled(step)
    with torch.no_grad():
        for length in (5, 6, 23):
            args = arguments(length)
            torch.testing.assert_close(run(*args), step(*args))
    _, record = backend.records  # the first length, and all others
    assert "s0 + 1" in record.before and "s1 + 1" in record.before
    assert record.count("flash_attention") == 1 and not record.quarantined


def test_counts_known_to_differ_are_refused():
    def shifted(q, k, v, past_k, past_v):
        return F.scaled_dot_product_attention(q, torch.cat((past_k, k), -2), torch.cat((past_k, k, v), -2))

    run, backend = compiled(shifted)
    with torch.no_grad():
        run(*arguments(5))
    (record,) = backend.records
    assert record.count("flash_attention") == 0 and not record.quarantined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_head_of_keys_serves_all_queries(dtype):
    def falcon(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    one = (torch.randn(2, 1, 7, 8, dtype=dtype) for _ in "kv")
    args = (torch.randn(2, 4, 5, 8, dtype=dtype), *one, torch.rand(2, 1, 5, 7) < 0.7)
    result = fuse(falcon, args, "sdpa")
    assert result.fired == ["sdpa"] and result.ops("aten.scaled_dot_product_attention") == 0
    assert_same(falcon, args, result)


@pytest.mark.parametrize("heads", [(1, 4), (4, 1), (2, 2)], ids=str)
def test_other_counts_of_heads_stay(heads):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    k, v = (torch.randn(2, n, 7, 8) for n in heads)
    queries = 4 if 1 in heads else 2
    q = torch.randn(2, queries, 5, 8)
    result = fuse(attend, (q, k, v), "sdpa")
    assert result.fired == ([] if 1 in heads else ["sdpa"])
    assert_same(attend, (q, k, v), result)
