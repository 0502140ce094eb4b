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


def paged_sample(name="paged_attention", note="prefill and decode"):
    spec = SPECS[name]
    return spec, next(sample for sample in spec.samples(Draw()) if sample.note == note)


@pytest.mark.parametrize("name", ["paged_attention", "mla_attention"])
def test_what_no_sequence_stored_may_hold_anything(name):
    """Free pages, the tail of a page, and table entries beyond a sequence's keys."""
    spec, sample = paged_sample(name)
    at = [i for i, argument in enumerate(spec.overload._schema.arguments) if argument.name.endswith("_cache")]
    table, starts, lens = sample.args[at[-1] + 1 :]
    caches = [torch.full_like(sample.args[i], math.nan) for i in at]
    for n, length in enumerate(lens.tolist()):
        for j in range(length):
            place = int(table[n, j // 4]), j % 4
            for cache, i in zip(caches, at, strict=True):
                cache[place] = sample.args[i][place]
    wild = table.clone()
    for n, length in enumerate(lens.tolist()):
        wild[n, -(-length // 4) :] = 99
    args = (*sample.args[: at[0]], *caches, wild, starts, lens)
    for fn in (spec.overload, spec.reference):
        assert torch.equal(fn(*args, **sample.kwargs), fn(*sample.args, **sample.kwargs)), fn


@pytest.mark.parametrize("name", ["paged_attention", "mla_attention"])
def test_a_wrong_block_is_an_error_that_names_it(name):
    spec, sample = paged_sample(name)
    *rest, table, starts, lens = sample.args
    wrong = table.clone()
    wrong[1, 2] = 9
    with pytest.raises(IndexError, match=rf"{name}: block_table\[1, 2\] is 9, but the cache has 9 blocks"):
        spec.overload(*rest, wrong, starts, lens, **sample.kwargs)
    with pytest.raises(IndexError):  # torch's own
        spec.reference(*rest, wrong, starts, lens, **sample.kwargs)


@pytest.mark.parametrize("name", ["paged_attention", "mla_attention"])
def test_lengths_that_do_not_fit_are_errors(name):
    spec, sample = paged_sample(name)
    *rest, table, starts, lens = sample.args
    for bad_starts, bad_lens, options, message in (
        (starts.flip(0), lens, {}, "q_start .* must ascend within"),
        (starts + 1, lens, {}, "q_start .* must ascend within"),
        (starts[1:], lens, {}, "q_start .* one entry more"),
        (starts, lens + 100, {}, r"kv_len\[0\] is 103, but the block table holds 16 keys"),
        (starts, lens - 4, {}, r"kv_len\[0\] is -1"),
        (starts, lens, {"mask": torch.ones(6, 8, dtype=torch.bool)}, "mask has 8 keys, but a sequence has 9"),
    ):
        with pytest.raises(ValueError, match=message):
            spec.overload(*rest, table, bad_starts, bad_lens, **sample.kwargs, **options)


def test_a_wrong_slot_is_an_error_and_nothing_is_written():
    cache, latent = torch.zeros(2, 4, 1, 3), torch.zeros(2, 4, 3)
    k, slots = torch.ones(2, 1, 3), torch.tensor([0, 8])
    for write, values, target in ((ops.kv_write, k, cache), (ops.mla_kv_write, k[:, 0], latent)):
        with pytest.raises(IndexError, match="slot 8 is beyond the cache, which has 2 blocks of 4 tokens"):
            write(values, values, target, target.clone(), slots)
        assert not bool(target.any())


def test_scales_belong_to_int8_caches():
    k, cache, slots = torch.ones(1, 1, 3), torch.zeros(2, 4, 1, 3), torch.tensor([0])
    scale, where = torch.ones(2, 4, 1), (torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]), torch.tensor([1]))
    for fn in (ops.kv_write, SPECS["kv_write"].reference):
        with pytest.raises(ValueError, match="k_cache is int8 with no scales"):
            fn(k, k, cache.to(torch.int8), cache, slots)
        with pytest.raises(ValueError, match="v_cache is float32 with scales"):
            fn(k, k, cache, cache.clone(), slots, v_scale=scale)
    for fn in (ops.paged_attention, SPECS["paged_attention"].reference):
        with pytest.raises(ValueError, match="v_cache is int8 with no scales"):
            fn(k, cache, cache.to(torch.int8), *where, scale=1.0)
        with pytest.raises(ValueError, match="k_cache is float32 with scales"):
            fn(k, cache, cache, *where, scale=1.0, k_scale=scale)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_vector_poisons_its_own_int8_slot_only(poison):
    k = torch.randn(3, 2, 4)
    k[1, 0, 2] = poison
    for fn in (ops.kv_write, SPECS["kv_write"].reference):
        cache, scale = torch.zeros(1, 4, 2, 4, dtype=torch.int8), torch.zeros(1, 4, 2)
        fn(k, k, cache, cache.clone(), torch.tensor([0, 1, 2]), k_scale=scale, v_scale=scale.clone())
        assert not bool(scale[0, 1, 0].isfinite()) and not bool(cache[0, 1, 0].any())
        got, touched = cache * scale.unsqueeze(-1), torch.zeros(1, 4, 2, dtype=torch.bool)
        touched[0, 1, 0] = True
        assert bool(got[touched].isnan().any()) and bool(got[~touched].isfinite().all())
        torch.testing.assert_close(got[0, 2], k[2], rtol=0, atol=float(k[2].abs().max()) / 127)
