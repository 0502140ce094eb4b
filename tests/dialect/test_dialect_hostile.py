"""Hostile rows: fully masked, infinite, NaN; a poisoned row must not spread, and a padding slot must not write."""

from __future__ import annotations

import math

import pytest
import torch

from ascend_dynamo.dialect import SPECS, Draw

ops = torch.ops.ascend
FORMS = (
    {},
    {"causal": "bottom_right"},
    {"mask": "mask"},
    {"bias": "bias"},
    {"softcap": 3.0},
    {"sinks": "sinks"},
    {"window": 4, "causal": "bottom_right"},
)


def qkv(dtype=torch.float32):
    return tuple(torch.randn(1, 2, 6, 8).to(dtype) for _ in range(3))


def options(form):
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    given = {"mask": mask, "bias": torch.zeros(6, 6).masked_fill(~mask, -math.inf), "sinks": torch.zeros(2)}
    return {key: given.get(value, value) if isinstance(value, str) else value for key, value in form.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_poisoned_query_poisons_its_own_row_only(form, dtype):
    q, k, v = qkv(dtype)
    clean = ops.flash_attention(q, k, v, scale=0.3, **options(form))
    for poison in (math.nan, math.inf):
        bad = q.clone()
        bad[0, 1, 3, 2] = poison
        got = ops.flash_attention(bad, k, v, scale=0.3, **options(form))
        touched = torch.zeros(1, 2, 6, dtype=torch.bool)
        touched[0, 1, 3] = True
        assert torch.equal(got[~touched], clean[~touched]), poison
        if math.isnan(poison):
            assert bool(got[touched].isnan().all())


@pytest.mark.parametrize("empty_row", ["nan", "uniform", "zero"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("how", ["mask", "bias", "both", "window"])
def test_rows_that_see_nothing(how, softcap, empty_row):
    q, k, v = qkv()
    k, v = k[:, :1], v[:, :1]  # one key head for two query heads
    mask = torch.rand(1, 2, 6, 6) > 0.3
    mask[..., 0] = True
    mask[0, 1, 2] = False
    if how == "both":  # each leaves a key that the other hides
        bias = torch.zeros(1, 2, 6, 6)
        bias[0, 1, 2, 1:] = -math.inf
        mask[0, 1, 2, 1:] = True
        given = {"mask": mask, "bias": bias}
    elif how == "window":
        given = {"window": 0, "causal": "top_left"}
    else:
        given = {"mask": mask} if how == "mask" else {"bias": torch.zeros(1, 2, 6, 6).masked_fill(~mask, -math.inf)}
    got = ops.flash_attention(q, k, v, scale=0.3, softcap=softcap, empty_row=empty_row, **given)
    rows = got[0, 1, 2] if how != "window" else got
    if empty_row == "nan":
        assert bool(rows.isnan().all())
    else:
        mean = v.mean(2)[0, 0] if empty_row == "uniform" else torch.zeros(1)
        torch.testing.assert_close(rows, mean.expand_as(rows))
    if how != "window":
        others = torch.ones(1, 2, 6, dtype=torch.bool)
        others[0, 1, 2] = False
        assert bool(got[others].isfinite().all())


def test_a_lowest_value_bias_gives_the_mean_and_sinks_give_zero():
    q, k, v = qkv()
    lowest = torch.full((6, 6), torch.finfo(torch.float32).min)
    got = ops.flash_attention(q, k, v, scale=0.3, bias=lowest)
    torch.testing.assert_close(got, v.mean(2, keepdim=True).expand_as(got))
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    assert not bool(ops.flash_attention(q, k, v, scale=0.3, mask=nothing, sinks=torch.zeros(2)).any())


def test_rows_are_independent_in_norms_gates_and_experts():
    x = torch.randn(4, 16)
    x[1, 3], x[2, 5] = math.nan, math.inf
    clean = [0, 3]
    w = torch.randn(16)
    y, h = ops.add_rms_norm(x, torch.zeros_like(x), w, 1e-6)
    assert bool(y[clean].isfinite().all() & h[clean].isfinite().all()) and bool(y[1].isnan().all())
    assert bool(ops.swiglu(x)[clean].isfinite().all())
    weights, _ = ops.moe_gate(x, None, top_k=2, scoring="softmax", normalize=True)
    assert bool(weights[clean].isfinite().all())
    q, scale = ops.dynamic_quant(x)
    assert not bool(q[1:3].any()) and not bool(scale[1:3].isfinite().any()) and bool(scale[clean].isfinite().all())
    up, down = torch.randn(4, 8, 16), torch.randn(4, 16, 4)
    ids, even = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32), torch.full((4, 2), 0.5)
    for fn in (ops.moe_experts, SPECS["moe_experts"].reference):
        got = fn(x, even, ids, up, down, activation="silu")
        assert bool(got[clean].isfinite().all()) and bool(got[1].isnan().all())


def test_an_expert_that_overflows_touches_only_its_own_tokens():
    up, down = torch.randn(3, 8, 16), torch.randn(3, 16, 4)
    up[2] = math.inf
    ids = torch.tensor([[0], [1], [0], [1], [2]], dtype=torch.int32)
    for fn in (ops.moe_experts, SPECS["moe_experts"].reference):
        got = fn(torch.randn(5, 16), torch.ones(5, 1), ids, up, down, activation="silu")
        assert bool(got[:4].isfinite().all()) and not bool(got[4].isfinite().any())


@pytest.mark.parametrize("traced", [False, True])
def test_padding_slots_write_nothing(traced):
    spec = SPECS["kv_write"]
    write = spec.reference if traced else spec.overload
    cache = torch.randn(2, 4, 1, 2)
    for slots in ([-1, -1, 0], [0, -1, 7], [-1, -1, -1]):
        k_cache, v_cache = cache.clone(), cache.clone()
        k = torch.full((3, 1, 2), 9.0)
        k[torch.tensor(slots) < 0] = math.nan
        write(k, k, k_cache, v_cache, torch.tensor(slots))
        wanted = cache.clone()
        for slot in slots:
            if slot >= 0:
                wanted[slot // 4, slot % 4] = 9.0
        assert torch.equal(k_cache, wanted) and torch.equal(v_cache, wanted)


def test_a_poisoned_sequence_does_not_reach_its_neighbours():
    spec = SPECS["paged_attention"]
    sample = next(iter(spec.samples(Draw())))
    q, k, v, table, starts, lens = sample.args
    k = k.clone()
    k[int(table[1, 0]), 0] = math.nan  # a page of sequence 1
    for fn in (spec.overload, spec.reference):
        clean, got = fn(*sample.args, **sample.kwargs), fn(q, k, v, table, starts, lens, **sample.kwargs)
        own = slice(int(starts[1]), int(starts[2]))
        assert bool(got[own].isnan().any())
        got[own] = clean[own]
        assert torch.equal(got, clean), fn
