"""ascend_cpu.kv_write and mla_kv_write: the bits of the dialect's operators, in any dtype and layout."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_support import ops
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_support import examples

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layout(x: torch.Tensor, how: int) -> torch.Tensor:
    """A copy of [blocks, size, H, D] that lies in memory in one of several ways."""
    if how == 1:  # a static cache's
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.stack((x, x))[1]
    if how == 3:
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return x.clone()


@settings(max_examples=examples(60))
@given(
    st.lists(st.integers(-1, 39), min_size=1, max_size=12, unique_by=lambda s: s if s >= 0 else object()),
    st.sampled_from([(40, 1), (10, 4), (5, 8), (1, 40)]),
    st.sampled_from([(1, 64), (2, 16), (3, 7)]),
    st.sampled_from(FLOATS),
    st.sampled_from([*FLOATS, torch.int8]),
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()),
    st.integers(0, 1000),
)
def test_any_write(slots, pool, vector, dtype, cache_dtype, layouts, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    k, v = (draw(len(slots), *vector).to(dtype) for _ in range(2))
    k[0, 0] = 0
    if layouts[2]:
        k = k.transpose(0, 2).contiguous().transpose(0, 2)
    caches = [(draw(*pool, *vector) * 9).to(cache_dtype) for _ in range(2)]
    scales = [draw(*pool, vector[0]) for _ in range(2)] if cache_dtype is torch.int8 else []
    written = []
    for op in (ops.kv_write, torch.ops.ascend.kv_write):
        mine = [layout(c, how) for c, how in zip(caches, layouts, strict=False)] + [s.clone() for s in scales]
        op(k, v, *mine[:2], torch.tensor(slots), **dict(zip(("k_scale", "v_scale"), mine[2:], strict=False)))
        written.append(mine)
    for a, b in zip(*written, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=examples(20))
@given(st.lists(st.integers(-1, 11), min_size=1, max_size=6, unique_by=lambda s: s if s >= 0 else object()))
def test_latents(slots):
    values = torch.randn(len(slots), 16).bfloat16(), torch.randn(len(slots), 6).bfloat16()
    caches = torch.randn(3, 4, 16).bfloat16(), torch.randn(3, 4, 6)
    written = []
    for op in (ops.mla_kv_write, torch.ops.ascend.mla_kv_write):
        mine = [c.clone() for c in caches]
        op(*values, *mine, torch.tensor(slots))
        written.append(mine)
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_vector_poisons_its_own_int8_slot_only(poison: float) -> None:
    k = torch.randn(3, 2, 4)
    k[1, 0, 2] = poison
    written = []
    for op in (ops.kv_write, torch.ops.ascend.kv_write):
        cache, scale = torch.zeros(1, 4, 2, 4, dtype=torch.int8), torch.zeros(1, 4, 2)
        op(k, k, cache, cache.clone(), torch.tensor([0, 1, 2]), k_scale=scale, v_scale=scale.clone())
        written.append((cache, scale))
    assert torch.equal(written[0][0], written[1][0])
    torch.testing.assert_close(written[0][1], written[1][1], rtol=0, atol=0, equal_nan=True)


def test_a_mistake_is_named_and_nothing_is_written() -> None:
    k, cache, slots = torch.ones(2, 1, 3), torch.zeros(2, 4, 1, 3), torch.tensor([0, 8])
    latents, scale = torch.zeros(2, 4, 3), torch.ones(2, 4, 1)
    for call, error, message in (
        (lambda: ops.kv_write(k, k, cache, cache.clone(), slots), IndexError, "slot 8 is beyond the cache"),
        (lambda: ops.kv_write(k, k, cache, cache[:1].clone(), slots - 4), IndexError, "slot 4 is beyond the cache"),
        (lambda: ops.mla_kv_write(k[:, 0], k[:, 0], latents, latents.clone(), slots), IndexError, "slot 8"),
        (lambda: ops.kv_write(k, k, cache, cache.clone(), slots[:1]), ValueError, "cannot be written to"),
        (lambda: ops.kv_write(k, k[..., :2], cache, cache.clone(), slots - 4), ValueError, "cannot be written to"),
        (lambda: ops.kv_write(k, k, cache, cache.to(torch.int8), slots - 4), ValueError, "v_cache is Char with no sca"),
        (
            lambda: ops.kv_write(k, k, cache, cache.clone(), slots - 4, v_scale=scale),
            ValueError,
            "v_cache is Float with",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
        assert not cache.any() and not latents.any()


def test_many_tokens_and_versions() -> None:
    k, cache = torch.randn(700, 4, 64), torch.zeros(50, 16, 4, 64)
    slots, version = torch.randperm(800)[:700], cache._version
    ops.kv_write(k, k, cache, torch.empty_like(cache), slots)
    assert torch.equal(cache.flatten(0, 1)[slots], k) and cache._version == version + 1
    with torch.inference_mode():
        held = torch.zeros(50, 16, 4, 64)
        ops.kv_write(k, k, held, torch.empty_like(held), slots)
    assert torch.equal(held, cache)


def test_schema_and_fake() -> None:
    k, cache, slots = torch.ones(2, 1, 3), torch.zeros(2, 4, 1, 3), torch.tensor([0, 7])
    int8, scale = cache.to(torch.int8), torch.ones(2, 4, 1)
    scaled = (k, k, int8, int8.clone(), slots), {"k_scale": scale, "v_scale": scale.clone()}
    for args, kwargs in (((k, k, cache, cache.clone(), slots), {}), scaled):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(ops.kv_write.default, args, kwargs, test_utils=checks)
