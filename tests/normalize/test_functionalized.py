"""Mutating operators after capture: ours become functional twins, others stay the opaque calls that they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ascend_dynamo.dialect  # noqa: F401
from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.backend import Backend
from ascend_dynamo.capture import make_unit
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.dialect.kv_reserve import register_source
from ascend_dynamo.ir.functionalized import View, read_functionalized
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.normalize import normalize

ascend = torch.ops.ascend
V1, V2 = torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2


def captured(fn: Any, *args: torch.Tensor) -> GraphUnit:
    """The graph as AOTAutograd hands it over."""
    found: list[GraphUnit] = []

    def compiler(gm: Any, inputs: Any) -> Any:
        found.append(make_unit(gm))
        run = lambda args: gm(*args)  # noqa: E731
        run._boxed_call = True
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=lambda gm, inputs: compat.aot_compile(gm, inputs, compiler), fullgraph=True)(*args)
    return found[0]


def calls(unit: GraphUnit) -> str:
    return graph_text(unit, sources=False)


def caches(count: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(6, 4, 2, 8, dtype=dtype) for _ in range(count)]


NEW = [torch.randn(2, 2, 8), torch.randn(2, 2, 8)]
SLOTS = torch.tensor([3, 9])


def test_whole_caches_become_the_twin():
    def fn(k, v, k_cache, v_cache, slots):
        ascend.kv_write(k, v, k_cache, v_cache, slots)
        return v_cache.sum(), k_cache * 2

    unit = captured(fn, *NEW, *caches(), SLOTS)
    normalize(unit)
    text = calls(unit)
    assert "ascend.kv_write_functional(%x0, %x1, %x2, %x3, %x4)" in text and "auto_functionalized" not in text
    assert text.count("aten.copy_") == 2
    again = text
    normalize(unit)
    assert calls(unit) == again


def test_latent_caches():
    def fn(c, r, c_cache, r_cache, slots):
        ascend.mla_kv_write(c, r, c_cache, r_cache, slots)
        return c_cache.sum()

    args = (torch.randn(2, 16), torch.randn(2, 4), torch.zeros(6, 4, 16), torch.zeros(6, 4, 4), SLOTS)
    unit = captured(fn, *args)
    normalize(unit)
    assert "ascend.mla_kv_write_functional(%x0, %x1, %x2, %x3, %x4)" in calls(unit)


def test_scales_come_behind_the_caches():
    def fn(k, v, k_cache, v_cache, slots, k_scale, v_scale):
        ascend.kv_write(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
        return k_scale.sum()

    scales = [torch.ones(6, 4, 2) for _ in range(2)]
    unit = captured(fn, *NEW, *caches(dtype=torch.int8), SLOTS, *scales)
    normalize(unit)
    text = calls(unit)
    assert "kv_write_functional(%x0, %x1, %x2, %x3, %x4, k_scale=%x5, v_scale=%x6)" in text
    assert text.count("getitem") == 4


@pytest.mark.parametrize(
    "part",
    [lambda x: (x[0], x[1]), lambda x: (x[0, :3], x[0, 3:]), lambda x: (x[0], x[0].clone())],
    ids=["planes", "slices", "plane and copy"],
)
def test_parts_of_a_buffer_stay(part):
    def fn(k, v, both, slots):
        ascend.kv_write(k, v, *part(both), slots % 12)
        return both.sum()

    unit = captured(fn, *NEW, torch.zeros(2, 6, 4, 2, 8), SLOTS)
    normalize(unit)
    assert "auto_functionalized_v2(ascend.kv_write.default" in calls(unit)


@torch.library.custom_op("normalize_test::bump", mutates_args={"a", "b"})
def bump(a: torch.Tensor, x: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    a.add_(x)
    if b is not None:
        b.sub_(x)
    return a * 2


@bump.register_fake
def _(a, x, b=None):
    return torch.empty_like(a)


def test_other_operators_stay_and_can_be_read():
    def fn(a, x, y):
        bump(a[1:], x)
        return bump(a, x.sum(), y)

    unit = captured(fn, torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 4))
    found = [read for n in unit.gm.graph.nodes if (read := read_functionalized(n)) is not None]
    assert [f.op for f in found] == [torch.ops.normalize_test.bump.default] * 2
    assert found[0].views["a"] == View(0, "slice", (0, 1, 3)) and found[0].views["b"] is None
    assert found[1].views == {"a": View(0), "b": View(1)} and found[0].first == 1
    before = sum("auto_functionalized" in str(n.target) for n in unit.gm.graph.nodes)
    normalize(unit)
    assert sum("auto_functionalized" in str(n.target) for n in unit.gm.graph.nodes) == before == 2


def test_the_first_version_is_read_too():
    unit = captured(lambda a, x: a + x, torch.ones(2), torch.ones(2))
    a, x = unit.gm.graph.find_nodes(op="placeholder")
    with unit.gm.graph.inserting_after(x):
        node = unit.gm.graph.call_function(V1, (torch.ops.normalize_test.bump.default,), {"a": a, "x": x, "b": None})
    found = read_functionalized(node)
    assert found is not None and found.views == {"a": View(0), "b": None} and found.plain == {"x": x}
    assert found.bases[0] is a and found.first == 1


class Pool:
    """Hands out pages in order, and remembers how often it was asked."""

    page_size = 4

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int]] = []

    def reserve(self, before: list[int], tokens: int) -> list[tuple[int, list[int]]]:
        self.asked.append((list(before), tokens))
        return [(0, [2 * row, 2 * row + 1]) for row in range(len(before))]


@pytest.mark.parametrize("level", [0, 2])
def test_pages_are_reserved_once_a_step_and_in_order(level):
    """Twice the same call is two calls; what reads the lengths in between sees those of its time."""

    def fn(pool, table, length, k, v, k_cache, v_cache):
        first = ascend.kv_reserve(pool, table, length, 1)
        between = length * 1
        second = ascend.kv_reserve(pool, table, length, 1)
        ascend.kv_write(k, v, k_cache, v_cache, first)
        ascend.kv_write(k * 2, v * 2, k_cache, v_cache, second)
        return between, length * 1, ascend.kv_gather(k_cache, table, 6)

    pools = Pool(), Pool()
    own = Backend({"target": "reference", "strict": True, "level": level}, texts=True)
    torch._dynamo.reset()
    table, length = torch.full((2, 2), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    args = [[register_source(p), table.clone(), length.clone(), *NEW, *caches()] for p in pools]
    with torch.no_grad():
        run = torch.compile(fn, backend=own, fullgraph=True)
        for step in range(3):
            for want, got in zip(fn(*args[0]), run(*args[1]), strict=True):
                assert torch.equal(want, got)
            assert pools[0].asked == pools[1].asked and len(pools[1].asked) == 2 * (step + 1)
    assert all(torch.equal(a, b) for a, b in zip(args[0][1:], args[1][1:], strict=True))
    assert len(own.records) == 1
    if level:
        assert own.records[0].after.count("= ascend.kv_reserve(") == 2
        assert "auto_functionalized" not in own.records[0].after


def test_an_unused_reservation_still_happens():
    def fn(pool, table, length, x):
        ascend.kv_reserve(pool, table, length, 1)
        return x + 1

    pool = Pool()
    torch._dynamo.reset()
    table, length = torch.full((2, 2), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with torch.no_grad():
        run = torch.compile(fn, backend=Backend({"target": "reference", "strict": True}), fullgraph=True)
        run(register_source(pool), table, length, torch.ones(2))
    assert len(pool.asked) == 1 and length.tolist() == [1, 1] and table[0].tolist() == [0, 1]
