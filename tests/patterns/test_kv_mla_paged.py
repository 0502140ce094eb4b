"""Latent attention to gathered latents becomes latent attention to pages."""

from __future__ import annotations

import pytest
import torch
from pattern_support import assert_same, fuse, snapshot

import ascend_dynamo.dialect  # noqa: F401
from ascend_dynamo.patterns import mla_paged
from ascend_dynamo.patterns.spellings import mla as spelled

ascend = torch.ops.ascend
NAMES = ("sdpa", "eager_attention", "merge_linears", "paged_attention", "mla_paged")  # without the way out, mla_absorb
B, H, SIZE, COLUMNS, RANK, P = 2, 3, 4, 10, 24, 4
L = SIZE * COLUMNS


def inputs(queries=1, dtype=torch.float64, batch=B):
    g = torch.Generator().manual_seed(queries)
    q = torch.randn(batch, H, queries, spelled.N + P, generator=g).to(dtype)
    caches = [torch.randn(25, SIZE, 1, width, generator=g).to(dtype) for width in (RANK, P)]
    table = torch.randperm(25, generator=g)[: batch * COLUMNS].reshape(batch, COLUMNS).to(torch.int32)
    w = torch.randn(H * (spelled.N + spelled.V), RANK, generator=g).to(dtype) / RANK**0.5
    return q, *caches, table, w


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, B])
def test_decode(dtype, batch):
    args = inputs(1, dtype, batch)
    result = fuse(mla_paged.decode, args, *NAMES)
    assert result.count("mla_paged") == 1 and result.ops("ascend.kv_gather") == 0 and result.ops("aten.linear") == 0
    assert_same(mla_paged.decode, args, result)


def test_masks_and_pages_that_were_never_stored():
    q, c, r, table, w = inputs(2)
    table[0, 0] = -1
    args = (q, c, r, table, w, torch.rand(B, 1, 2, L - 3) < 0.7)
    result = fuse(mla_paged.masked, args, *NAMES)
    assert result.count("mla_paged") == 1
    assert_same(mla_paged.masked, args, result)


def test_written_and_read():
    def fn(q, c_cache, r_cache, table, w, c, r, slots):
        c_cache, r_cache = ascend.kv_write_functional(c, r, c_cache, r_cache, slots)
        return mla_paged.decode(q, c_cache, r_cache, table, w), c_cache, r_cache

    args = (*inputs(), torch.randn(B, 1, RANK).double(), torch.randn(B, 1, P).double(), torch.tensor([7, 30]))
    result = fuse(fn, args, *NAMES, "mla_absorb")
    assert result.count("mla_paged") == 1 and result.count("mla_absorb") == 0
    assert_same(fn, args, result)
    snapshot("mla_paged", result)


def test_a_prompt_is_expanded():
    result = fuse(mla_paged.decode, inputs(L), *NAMES)
    assert result.count("mla_paged") == 0 and result.missed("mla_paged").code == "cost"


def other_tables(q, c_cache, r_cache, table, w):
    c = ascend.kv_gather(c_cache, table, L).squeeze(1)
    return spelled.written(q, c, ascend.kv_gather(r_cache, table.flip(0), L).squeeze(1), w)


def rotary_keys_elsewhere(q, c_cache, r_cache, table, w):
    r = r_cache.reshape(-1, P)[: B * L].reshape(B, L, P) * 1.5
    return spelled.written(q, ascend.kv_gather(c_cache, table, L).squeeze(1), r, w)


def biased(q, c_cache, r_cache, table, w):
    c, r = (ascend.kv_gather(x, table, L).squeeze(1) for x in (c_cache, r_cache))
    return spelled.joined_bias(q, c, r, w, q[:, :1, :, :1].expand(B, 1, q.shape[2], L) * 2)


@pytest.mark.parametrize(
    ("fn", "code"),
    [(other_tables, "arg"), (rotary_keys_elsewhere, "op"), (biased, "arg")],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_refusals(fn, code):
    result = fuse(fn, inputs(), *NAMES)
    assert result.count("mla_paged") == 0 and result.missed("mla_paged").code == code
    assert_same(fn, inputs(), result)
