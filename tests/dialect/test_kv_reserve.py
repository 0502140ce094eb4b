"""kv_reserve: what it writes, that it is atomic, under torch.compile, and two pools through one graph."""

from __future__ import annotations

import gc

import pytest
import torch

from ascend_dynamo.dialect.kv_reserve import register_source
from ascend_dynamo.dialect.registry import HOST_OPS, is_dialect_op
from ascend_dynamo.errors import KVCacheError, OutOfPagesError

ops = torch.ops.ascend


class Source:
    """Pages counted up from ``first``; row 0 never stores its first page."""

    def __init__(self, page_size: int, first: int = 0, total: int = 100) -> None:
        self.page_size, self.next, self.total = page_size, first, total
        self.tables: list[list[int]] = []

    def reserve(self, before: list[int], tokens: int) -> list[tuple[int, list[int]]]:
        self.tables = self.tables or [[-1], *([] for _ in before[1:])]
        for table, length in zip(self.tables, before, strict=True):
            while len(table) * self.page_size < length + tokens:
                if self.next == self.total:
                    raise OutOfPagesError("no page left", asked=1, free=0, total=self.total)
                table.append(self.next)
                self.next += 1
        return [
            (length // self.page_size, t[length // self.page_size :])
            for t, length in zip(self.tables, before, strict=True)
        ]


def tables(rows: int, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows, width), -1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)


def test_pages_slots_and_lengths() -> None:
    source = Source(4, first=5)
    handle, (table, length) = register_source(source), tables(2)
    assert ops.kv_reserve(handle, table, length, 6).tolist() == [-1, -1, -1, -1, 20, 21, 24, 25, 26, 27, 28, 29]
    assert table.tolist() == [[-1, 5, -1, -1], [6, 7, -1, -1]] and length.tolist() == [6, 6]
    assert ops.kv_reserve(handle, table, length, 1).tolist() == [22, 30]
    assert length.tolist() == [7, 7]


def test_a_refusal_changes_nothing() -> None:
    source = Source(4, total=2)
    handle, (table, length) = register_source(source), tables(2)
    ops.kv_reserve(handle, table, length, 4)
    before = table.clone(), length.clone()
    with pytest.raises(OutOfPagesError):
        ops.kv_reserve(handle, table, length, 9)
    with pytest.raises(KVCacheError, match=r"17 tokens do not fit a block table of 4 pages of 4; .* max_length=17"):
        ops.kv_reserve(handle, table, length, 13)
    assert torch.equal(table, before[0]) and torch.equal(length, before[1])
    del source
    gc.collect()
    other = Source(4)
    assert int(register_source(other)) != int(handle)  # a dead source's number names nobody else
    with pytest.raises(KVCacheError, match="names no page pool that is alive"):
        ops.kv_reserve(handle, table, length, 1)


def test_opcheck() -> None:
    source = Source(4)
    torch.library.opcheck(ops.kv_reserve.default, (register_source(source), *tables(3), 5))
    assert (ops.kv_reserve.default,) == HOST_OPS and not is_dialect_op(HOST_OPS[0])


@pytest.mark.parametrize("backend", ["aot_eager", "ascend_opt"])
def test_two_pools_run_one_compiled_graph(backend: str) -> None:
    compiles = 0

    def count(gm, inputs, **options):
        from torch._dynamo.backends.registry import lookup_backend

        nonlocal compiles
        compiles += 1
        return lookup_backend(backend)(gm, inputs, **options)

    def step(handle, table, length, k, cache):
        slots = ops.kv_reserve(handle, table, length, k.shape[0] // table.shape[0])
        ops.kv_write(k, k, cache, cache + 0, slots)
        return ops.kv_gather(cache, table, 3), slots

    options = {"options": {"target": "reference"}} if backend == "ascend_opt" else {}
    compiled = torch.compile(step, backend=count, fullgraph=True, dynamic=False, **options)
    with torch.no_grad():
        for first in (0, 3):
            ours, theirs = Source(2, first), Source(2, first)
            table, length = tables(2)
            table_e, length_e = tables(2)
            cache, cache_e = torch.zeros(9, 2, 1, 4), torch.zeros(9, 2, 1, 4)
            handle, handle_e = register_source(ours), register_source(theirs)
            for _ in range(2):
                k = torch.randn(6, 1, 4)
                got = compiled(handle, table, length, k, cache)
                wanted = step(handle_e, table_e, length_e, k, cache_e)
                for a, b in zip((*got, table, length, cache), (*wanted, table_e, length_e, cache_e), strict=True):
                    assert torch.equal(a, b)
    assert compiles == 1
