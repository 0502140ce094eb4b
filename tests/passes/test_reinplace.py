"""Caches are written in place where nobody sees a difference, and copied where somebody would."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reinplace_support import compiled, copied_notes, ops

import ascend_dynamo.dialect  # noqa: F401

ascend = torch.ops.ascend
B, H, S, D = 2, 3, 8, 4


def new(n: int = 1):
    return [torch.randn(B, H, n, D) for _ in range(3)]


def caches(count: int = 2):
    return [torch.randn(B, H, S, D) for _ in range(count)]


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def by_index_copy(q, k, v, old_k, old_v, at):
    old_k.index_copy_(2, at, k)
    old_v.index_copy_(2, at, v)
    return attend(q, old_k, old_v)


def by_index_put(q, k, v, old_k, old_v, at):
    old_k[:, :, at] = k
    old_v[:, :, at] = v
    return attend(q, old_k, old_v)


def by_slices(q, k, v, old_k, old_v, at):
    old_k[:, :, 3:5] = k
    old_v[:, :, 3:5] = v
    return attend(q, old_k, old_v)


def transposed(q, k, v, old_k, old_v, at):
    old_k.transpose(1, 2).index_copy_(1, at, k.transpose(1, 2))
    old_v.transpose(1, 2)[:, at] = v.transpose(1, 2)
    return attend(q, old_k, old_v)


def twice(q, k, v, old_k, old_v, at):
    y = by_index_copy(q, k, v, old_k, old_v, at)
    return y + by_index_copy(q, k * 2, v * 2, old_k, old_v, at + 2)


def with_length(q, k, v, old_k, old_v, at):
    y = by_index_copy(q, k, v, old_k, old_v, at)
    at.add_(1)
    return y


def read_before_too(q, k, v, old_k, old_v, at):
    total = old_k.sum() * 2
    return by_index_copy(q, k, v, old_k, old_v, at), total


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn",
    [by_index_copy, by_index_put, by_slices, transposed, twice, with_length, read_before_too],
    ids=lambda f: f.__name__,
)
def test_static_caches_are_written_in_place(fn, dynamic):
    record = compiled(fn, [*new(2), *caches(), torch.tensor([3, 4])], dynamic=dynamic)
    assert record.kv_copies == [] and copied_notes(record) == []
    assert ops(record, "aten.index_copy") + ops(record, "aten.index_put") + ops(record, "aten.slice_scatter") == 0
    assert not any("aten.copy_(%x3" in line or "aten.copy_(%x4" in line for line in record.after.splitlines())


class Layered(torch.nn.Module):
    """[L, 2, B, H, S, D], one buffer for all layers."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.kv = torch.nn.Buffer(torch.randn(layers, 2, B, H, S, D))

    def forward(self, x, at):
        return stacked(x, self.kv, at)


def stacked(x, kv, at):
    for layer in range(kv.shape[0]):
        kv[layer, 0][:, :, at] = x
        kv[layer, 1].index_copy_(2, at, x * 2)
        x = attend(x, kv[layer, 0], kv[layer, 1])
    return x


def stacked_by_one_index(x, kv, at):
    for layer in range(kv.shape[0]):
        kv[layer, 0, :, :, 5:6] = x
        kv[layer, 1, :, :, 5:6] = x * 2
        x = attend(x, kv[layer, 0], kv[layer, 1])
    return x


@pytest.mark.parametrize("fn", [stacked, stacked_by_one_index], ids=lambda f: f.__name__)
def test_stacked_buffers(fn):
    record = compiled(fn, [torch.randn(B, H, 1, D), torch.randn(3, 2, B, H, S, D), torch.tensor([5])])
    assert record.kv_copies == [] and copied_notes(record) == []


def test_buffers_of_a_module_and_two_caches_one_compile():
    from reinplace_support import backend

    own = backend()
    with torch.no_grad():
        fn = torch.compile(by_index_copy, backend=own, fullgraph=True)
        for _ in range(2):
            (q, k, v), (old_k, old_v), at = new(), caches(), torch.tensor([2])
            mine = old_k.clone(), old_v.clone()
            assert torch.equal(fn(q, k, v, *mine, at), by_index_copy(q, k, v, old_k, old_v, at))
            assert torch.equal(mine[0], old_k) and torch.equal(mine[1], old_v)
    assert len(own.records) == 1 and own.records[0].kv_copies == []


def late(q, k, v, old_k, old_v, at):
    before = old_k * 1
    return by_index_copy(q, k, v, old_k, old_v, at), before


def old_version_attended(q, k, v, old_k, old_v, at):
    """The value that the write replaces is read behind it."""
    stale = old_k.clone()
    y = by_index_copy(q, k, v, old_k, old_v, at)
    return y + attend(q, stale, old_v)


def returned(q, k, v, old_k, old_v, at):
    y = by_index_copy(q, k, v, old_k, old_v, at)
    return y, old_k.clone()


def stale_returned(q, k, v, old_k, old_v, at):
    stale = old_k.clone()
    return by_index_copy(q, k, v, old_k, old_v, at), stale


def writes_what_it_reads(q, k, v, old_k, old_v, at):
    """y = x.clone(); op(y, x) must not become op(x, x)."""
    copy = old_k.clone()
    old_k.index_copy_(2, torch.arange(S).flip(0), copy)
    return attend(q, old_k, old_v)


def exchanged(q, k, v, old_k, old_v, at):
    a, b = old_k.clone(), old_v.clone()
    old_k.index_copy_(2, at, b[:, :, :2])
    old_v.index_copy_(2, at, a[:, :, :2])
    return attend(q, old_k, old_v)


@pytest.mark.parametrize(
    "fn",
    [late, old_version_attended, returned, stale_returned, writes_what_it_reads, exchanged],
    ids=lambda f: f.__name__,
)
def test_what_would_be_seen_is_copied(fn):
    compiled(fn, [*new(2), *caches(), torch.tensor([3, 4])])


def test_a_copy_that_is_needed_is_named():
    record = compiled(old_version_attended, [*new(2), *caches(), torch.tensor([3, 4])])
    assert len(record.kv_copies) > 0
    (note,) = copied_notes(record)
    assert "when" in note and "overwritten" in note


def test_the_part_that_was_not_written_may_be_read():
    """What lies in another layer's part of a stacked buffer is not overwritten."""

    def fn(x, kv, at):
        first = kv[0, 0] * 1
        kv[1, 0][:, :, at] = x
        return attend(x, kv[1, 0], first)

    record = compiled(fn, [torch.randn(B, H, 1, D), torch.randn(2, 2, B, H, S, D), torch.tensor([5])])
    assert record.kv_copies == []


def test_parts_that_overlap():
    def fn(x, kv):
        old = kv[:, :, 2:5] * 1
        kv[:, :, 3:6] = x
        kv[:, :, 4:7] = old + 1
        return kv.sum(2)

    compiled(fn, [torch.randn(B, H, 3, D), torch.randn(B, H, S, D)])


def pages(*shape: int):
    return torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8), torch.tensor([2, 9]), torch.randn(2, 2, 8)


def paged(k, v, k_cache, v_cache, slots, table):
    ascend.kv_write(k, v, k_cache, v_cache, slots)
    return ascend.kv_gather(k_cache, table, 6) + ascend.kv_gather(v_cache, table, 6)


PAGED = [
    torch.randn(2, 2, 8),
    torch.randn(2, 2, 8),
    torch.randn(6, 4, 2, 8),
    torch.randn(6, 4, 2, 8),
    torch.tensor([2, 9]),
    torch.tensor([[0, 2]], dtype=torch.int32),
]


@pytest.mark.parametrize("dynamic", [False, True])
def test_pages_are_written_in_place(dynamic):
    record = compiled(paged, PAGED, dynamic=dynamic)
    assert ops(record, "ascend.kv_write") == 1 and "functional" not in record.after
    assert copied_notes(record) == []


def test_pages_of_a_stacked_buffer():
    def fn(x, kv, slots, table):
        for layer in range(2):
            ascend.kv_write(x, x * 2, kv[layer, 0], kv[layer, 1], slots)
            x = x + ascend.kv_gather(kv[layer, 0], table, 2).sum() + ascend.kv_gather(kv[layer, 1], table, 2).sum()
        return x

    args = [torch.randn(2, 2, 8), torch.randn(2, 2, 6, 4, 2, 8), *PAGED[4:]]
    record = compiled(fn, args)
    assert ops(record, "ascend.kv_write") == 2 and "functional" not in record.after and "as_strided" not in record.after
    # the pool that holds the buffer may lie anywhere: nothing counts from the start of its storage
    pool = torch.randn(3, 2, 2, 6, 4, 2, 8)
    from reinplace_support import backend

    own = backend()
    with torch.no_grad():
        run = torch.compile(fn, backend=own, fullgraph=True)
        for i in range(3):
            mine = pool.clone()
            want = fn(args[0], pool[i], *args[2:])
            assert torch.equal(run(args[0], mine[i], *args[2:]), want) and torch.equal(mine, pool)


def test_pages_that_are_a_part_by_slices():
    def fn(k, v, both, slots):
        ascend.kv_write(k, v, both[:6], both[6:], slots)
        return both.sum()

    record = compiled(fn, [PAGED[0], PAGED[1], torch.randn(12, 4, 2, 8), PAGED[4]])
    assert ops(record, "ascend.kv_write") == 1 and "functional" not in record.after


def test_pages_written_twice_and_read_between():
    def fn(k, v, k_cache, v_cache, slots, table):
        y = paged(k, v, k_cache, v_cache, slots, table)
        return y + paged(k * 2, v * 2, k_cache, v_cache, slots + 1, table)

    record = compiled(fn, PAGED)
    assert ops(record, "ascend.kv_write") == 2 and "functional" not in record.after


def test_int8_pages_with_scales():
    def fn(k, v, k_cache, v_cache, slots, table, k_scale, v_scale):
        ascend.kv_write(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
        return ascend.kv_gather(k_cache, table, 6, scale=k_scale) + ascend.kv_gather(v_cache, table, 6, scale=v_scale)

    caches = [torch.zeros(6, 4, 2, 8, dtype=torch.int8) for _ in range(2)]
    scales = [torch.ones(6, 4, 2) for _ in range(2)]
    record = compiled(fn, [*PAGED[:2], *caches, *PAGED[4:], *scales])
    assert ops(record, "ascend.kv_write") == 1 and "functional" not in record.after


def test_latent_pages():
    def fn(c, r, c_cache, r_cache, slots):
        ascend.mla_kv_write(c, r, c_cache, r_cache, slots)
        return c_cache.sum() + r_cache.sum()

    args = [torch.randn(2, 16), torch.randn(2, 4), torch.randn(6, 4, 16), torch.randn(6, 4, 4), torch.tensor([2, 9])]
    record = compiled(fn, args)
    assert ops(record, "ascend.mla_kv_write") == 1 and "functional" not in record.after


def test_pages_whose_old_tokens_are_read_late():
    def fn(k, v, k_cache, v_cache, slots, table):
        stale = k_cache.clone()
        y = paged(k, v, k_cache, v_cache, slots, table)
        return y + ascend.kv_gather(stale, table, 6)

    record = compiled(fn, PAGED)
    assert ops(record, "ascend.kv_write_functional") == 1, "one call writes all in place, or nothing"
    assert len(copied_notes(record)) == 2


def test_what_is_written_comes_from_the_cache_itself():
    def fn(k, v, k_cache, v_cache, slots):
        ascend.kv_write(k_cache[0, :2] * 1, k_cache.clone()[1, 1:3], k_cache, v_cache, slots)
        return k_cache.sum()

    compiled(fn, PAGED[:5])


def test_caches_made_in_the_graph_are_written_where_they_are_allocated():
    """What a first call allocates is the same call twice, for keys and for values: each has memory of its own."""

    def fn(k, v, slots, table):
        k_cache, v_cache = torch.zeros(6, 4, 2, 8), torch.zeros(6, 4, 2, 8)
        return paged(k, v, k_cache, v_cache, slots, table), k_cache, v_cache

    record = compiled(fn, [*PAGED[:2], *PAGED[4:]])
    assert ops(record, "aten.zeros") == 2 and ops(record, "ascend.kv_write") == 1 and ops(record, "aten.clone") == 0


def test_a_static_cache_made_in_the_graph():
    def fn(q, k, v, at):
        return by_index_copy(q, k, v, torch.zeros(B, H, S, D), torch.zeros(B, H, S, D), at)

    record = compiled(fn, [*new(2), torch.tensor([3, 4])])
    assert ops(record, "aten.zeros") == 2 and ops(record, "aten.index_copy_") == 2


def test_zeros_that_are_read_as_zeros_too():
    def fn(k, v, slots, table):
        zeros = torch.zeros(6, 4, 2, 8)
        k_cache, v_cache = zeros.clone(), zeros.clone()
        return paged(k, v, k_cache, v_cache, slots, table), zeros, k_cache

    compiled(fn, [*PAGED[:2], *PAGED[4:]])


@torch.library.custom_op("reinplace_test::put", mutates_args={"cache", "count"})
def put(cache: torch.Tensor, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    at = int(count)
    cache[at] = x
    count.add_(1)
    return x * at


@put.register_fake
def _(cache, x, count):
    return torch.empty_like(x)


def test_any_mutating_operator_runs_once_and_in_place():
    def fn(cache, x, count):
        a = put(cache, x, count)
        b = put(cache, x, count)
        return a + b, cache.sum()

    record = compiled(fn, [torch.zeros(9, 2, 2), torch.randn(2, 2), torch.tensor(0)], steps=3)
    assert ops(record, "reinplace_test.put") == 2 and record.kv_copies == []


def test_level_0_changes_nothing():
    record = compiled(paged, PAGED, options={"level": 0})
    assert ops(record, "ascend.kv_write_functional") == 1
