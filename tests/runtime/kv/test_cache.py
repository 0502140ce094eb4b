"""PagedKVCache in generate(): the tokens of DynamicCache, whatever the family, the search and the padding."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import transformers
from kv_models import FAMILIES, WINDOW, dynamic, generate, model_of, prompt

from ascend_dynamo.errors import KVCacheError, OutOfPagesError, PageSizeError, UnsupportedCacheError
from ascend_dynamo.runtime.kv import PagedKVCache, PageSizes
from ascend_dynamo.runtime.kv.error import cache_error


def padded(ids: torch.Tensor, *padding: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask


def sound(cache: PagedKVCache) -> None:
    statistics = cache.statistics()
    assert statistics.orphans == 0 and statistics.largest_waste < cache.page_size
    for group in cache.groups:
        group.pool.check()
        for row, sequence in zip(group.block_table, group.sequences, strict=True):  # what the kernels read
            table = group.pool.table(sequence)
            assert row[: len(table)].tolist() == list(table) and set(row[len(table) :].tolist()) <= {-1}
        assert group.kv_len.tolist() == [group.seen] * len(group.sequences)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_a_dynamic_cache(name: str) -> None:
    model = model_of(name)
    ids = prompt(model, 2, 21)
    wanted = generate(model, ids, dynamic(model), 24)
    assert len(set(wanted[:, 21:].flatten().tolist())) > 8
    cache = PagedKVCache(model.config, num_pages=30, page_size=4)
    for _ in range(2):  # again after reset: the same memory
        assert torch.equal(generate(model, ids, cache, 24), wanted)
        sound(cache)
        assert cache.get_seq_length() == 21 + 24 - 1
        for group in cache.groups:
            per_row = 44 // 4 if group.pool.window is None else -(-WINDOW // 4) + 1
            assert group.pool.pages.used <= 2 * per_row
        cache.reset()
        assert all(group.pool.pages.free == 30 for group in cache.groups)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-gemma2", "tiny-ds3"])
@pytest.mark.parametrize("told", [True, False])
def test_left_padding(name: str, told: bool) -> None:
    model = model_of(name)
    ids = prompt(model, 3, 21)
    mask = padded(ids, 18, 3)
    cache = PagedKVCache(model.config, num_pages=40, page_size=4)
    if told:
        cache.set_padding(mask)
    wanted = generate(model, ids, dynamic(model), attention_mask=mask)
    assert torch.equal(generate(model, ids, cache, attention_mask=mask), wanted)
    sound(cache)
    full = cache.groups[-1].pool
    assert full.pages.used == 3 * 8 - (4 if told else 0)
    assert (full.table(cache.groups[-1].sequences[0])[:4] == (-1,) * 4) is told


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3", "tiny-ds3"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}])
def test_beams_share_full_pages_and_copy_only_tails(name: str, options: dict[str, int]) -> None:
    model = model_of(name)
    ids = prompt(model, 2, 13)
    mask = padded(ids, 6)
    cache = PagedKVCache(model.config, num_pages=60, page_size=4)
    cache.set_padding(mask)
    wanted = generate(model, ids, dynamic(model), attention_mask=mask, **options)
    assert torch.equal(generate(model, ids, cache, attention_mask=mask, **options), wanted)
    sound(cache)
    beams = options["num_beams"]
    for group in cache.groups:
        tables = [group.pool.table(s) for s in group.sequences]
        assert len(tables) == 2 * beams and 0 < group.pool.statistics().copies <= 2 * (beams - 1) * 12 * 2
    assert group.pool.pages.used < sum(len([p for p in t if p >= 0]) for t in tables)


def test_sampling_and_a_prompt_in_chunks() -> None:
    model = model_of("tiny-qwen3")
    ids = prompt(model, 2, 19)
    for options in ({"do_sample": True, "top_k": 8}, {"prefill_chunk_size": 5}):
        wanted = generate(model, ids, dynamic(model), **options)
        cache = PagedKVCache(model.config, max_tokens=2 * 32, page_size=8)
        assert torch.equal(generate(model, ids, cache, **options), wanted)


def logits(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-gemma2", "tiny-ds3"])
def test_reorder_crop_repeat_and_select_as_dynamic_cache_does(name: str) -> None:
    model = model_of(name)
    ids = prompt(model, 3, 11)
    ours, theirs = PagedKVCache(model.config, num_pages=40, page_size=4), dynamic(model)
    for cache in (ours, theirs):
        cache.activate_past_recording()

    def same(tokens: torch.Tensor) -> None:
        torch.testing.assert_close(logits(model, tokens, ours), logits(model, tokens, theirs), rtol=1e-4, atol=1e-4)
        sound(ours)

    same(ids)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([2, 0, 2]))
    same(prompt(model, 3, 2, 1))
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    same(prompt(model, 6, 1, 2))
    for cache in (ours, theirs):
        cache.crop(-3)
    same(prompt(model, 6, 2, 3))
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([4, 1]))
    same(prompt(model, 2, 3, 4))
    for cache in (ours, theirs):
        cache.crop(-1)
        cache.crop(0)
    same(prompt(model, 2, 1, 5))
    assert ours.batch_size == 2 and ours.get_seq_length() == theirs.get_seq_length() == 16
    for index, layer in enumerate(ours.groups[-1].layers):
        k, v = ours.dense(index if len(ours.groups) == 1 else 1)
        assert k.shape[2] == v.shape[2] == 16 and layer.store.keys.shape[:2] == (40, 4)


def test_assisted_decoding_takes_tokens_back() -> None:
    model = model_of("tiny-qwen3")
    ids = prompt(model, 1, 12)
    wanted = generate(model, ids, dynamic(model), 16)
    cache = PagedKVCache(model.config, num_pages=40, page_size=4)
    assert torch.equal(generate(model, ids, cache, 16, prompt_lookup_num_tokens=3), wanted)
    sound(cache)


def test_exhaustion_in_the_middle_leaves_the_cache_usable() -> None:
    for name in ("tiny-qwen3", "tiny-gemma2"):
        model = model_of(name)
        ids = prompt(model, 2, 12)
        cache = PagedKVCache(model.config, num_pages=8, page_size=4, sliding_pages=20, max_length=64)
        before = logits(model, ids, cache)
        tables = [[g.pool.table(s) for s in g.sequences] for g in cache.groups]
        with pytest.raises(OutOfPagesError, match="4 pages asked for, 2 to be had"):
            logits(model, prompt(model, 2, 8), cache)
        assert [[g.pool.table(s) for s in g.sequences] for g in cache.groups] == tables
        assert cache.get_seq_length() == 12 and [g.kv_len.tolist() for g in cache.groups] == [[12, 12]] * len(tables)
        reference = dynamic(model)
        torch.testing.assert_close(logits(model, ids, reference), before, rtol=1e-4, atol=1e-4)
        more = prompt(model, 2, 4, 1)
        torch.testing.assert_close(logits(model, more, cache), logits(model, more, reference), rtol=1e-4, atol=1e-4)
        with pytest.raises(OutOfPagesError):
            cache.batch_repeat_interleave(99) if cache.groups[0].seen % 4 else logits(model, more, cache)
        sound(cache)


def test_the_first_step_may_fail_too() -> None:
    model = model_of("tiny-gemma2")
    cache = PagedKVCache(model.config, num_pages=3, page_size=4, sliding_pages=20, max_length=64)
    with pytest.raises(OutOfPagesError):
        logits(model, prompt(model, 2, 9), cache)
    assert all(g.pool.sequences == () and g.pool.pages.used == 0 for g in cache.groups)
    logits(model, prompt(model, 1, 9), cache)  # a smaller batch fits


def test_a_copy_has_pages_of_its_own() -> None:
    model = model_of("tiny-qwen3")
    ids = prompt(model, 1, 10)
    first = PagedKVCache(model.config, num_pages=16, page_size=4)
    logits(model, ids, first)
    second = copy.deepcopy(first)
    more = prompt(model, 1, 3, 1)
    wanted = logits(model, more, first)
    assert torch.equal(logits(model, more, second), wanted)
    first.reset()
    logits(model, prompt(model, 1, 16, 2), first)
    again = dynamic(model)
    logits(model, torch.cat([ids, more], 1), again)
    torch.testing.assert_close(logits(model, more, second), logits(model, more, again), rtol=1e-4, atol=1e-4)
    assert int(first.groups[0].handle) != int(second.groups[0].handle)
    del first
    gc.collect()
    sound(second)


def test_int8_pages_are_close_and_half_as_large() -> None:
    for name in ("tiny-qwen3", "tiny-ds3"):
        model = model_of(name)
        ids = prompt(model, 2, 24)
        full, small = (PagedKVCache(model.config, num_pages=16, page_size=4, quantization=q) for q in (None, "int8"))
        assert torch.equal(logits(model, ids, full), logits(model, ids, full.__class__(model.config, num_pages=16)))
        logits(model, ids, small)
        errors = cache_error(small, full)
        # the first layer's keys are equal but for their rounding: at most half a step of 1/127 of each row's largest
        assert 0 < errors[0].keys < 0.01 and 0 < errors[0].values < 0.01 and len(errors) == len(small.layers)
        assert small.statistics().bytes_allocated < full.statistics().bytes_allocated * 0.3
        assert cache_error(full, full)[0].keys == 0


def test_sizes_by_tokens_and_by_bytes() -> None:
    config = model_of("tiny-qwen3").config
    page = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * 16
    cache = PagedKVCache(config, memory=5 * page + 1, page_size=16, dtype=torch.float32)
    logits(model_of("tiny-qwen3"), prompt(model_of("tiny-qwen3"), 1, 20), cache)
    assert cache.groups[0].pool.pages.total == 5 and cache.statistics().bytes_allocated == 5 * page
    assert cache.statistics().bytes_used == 2 * page
    assert PagedKVCache(config, max_tokens=33, page_size=16).groups[0].pool.pages.total == 3
    for sizes in ({}, {"num_pages": 3, "max_tokens": 4}, {"memory": 100}):
        with pytest.raises(UnsupportedCacheError, match=r"one of num_pages|holds no page"):
            PagedKVCache(config, **sizes)


def test_memory_out_of_a_pool() -> None:
    from ascend_dynamo.errors import PoolError
    from ascend_dynamo.runtime.pool import MemoryPool

    model = model_of("tiny-qwen3")
    ids = prompt(model, 1, 9)
    pool = MemoryPool("2MB", "64KB")
    cache = PagedKVCache(model.config, memory="1MB", page_size=4, dtype=torch.float32, pool=pool)
    assert torch.equal(logits(model, ids, cache), logits(model, ids, dynamic(model)))
    assert pool.statistics().used == cache.statistics().bytes_allocated <= 1 << 20
    own = copy.deepcopy(cache)  # from the heap, and only the pages
    with pytest.raises(PoolError):
        PagedKVCache(model.config, memory="1500KB", page_size=4, dtype=torch.float32, pool=pool)
    assert pool.statistics().used == cache.statistics().bytes_allocated
    cache.close()
    assert pool.statistics().used == 0
    logits(model, ids[:, :1], own)


def test_page_sizes_are_the_targets() -> None:
    from ascend_dynamo.lowering.npu_pages import npu_page_sizes
    from ascend_dynamo.lowering.reference import ReferenceLowering

    class Npu(ReferenceLowering):
        target = "npu"
        page_sizes = staticmethod(npu_page_sizes)

    config = model_of("tiny-qwen3").config
    legal = r"page_size=24 is illegal for torch.bfloat16 pages on target 'npu'; legal is a multiple of 16, at most 512"
    with pytest.raises(PageSizeError, match=legal + r" \(128 recommended\)"):
        PagedKVCache(config, num_pages=2, page_size=24, dtype=torch.bfloat16, target=Npu())
    with pytest.raises(PageSizeError, match="a multiple of 32"):
        PagedKVCache(config, num_pages=2, page_size=16, quantization="int8", target=Npu())
    for size in (528, 0, -16):
        with pytest.raises(PageSizeError):
            PagedKVCache(config, num_pages=2, page_size=size, dtype=torch.bfloat16, target=Npu())
    assert PagedKVCache(config, num_pages=2, dtype=torch.bfloat16, target=Npu()).page_size == 128
    assert PagedKVCache(config, num_pages=2, page_size=7, target="cpu").page_size == 7
    assert str(PageSizes()) == "any (16 recommended)"


def test_what_pages_cannot_serve_is_named() -> None:
    config = model_of("tiny-qwen3").config
    with pytest.raises(UnsupportedCacheError, match="layer 0 of this qwen3_next model keeps a LinearAttention"):
        PagedKVCache(transformers.AutoConfig.for_model("qwen3_next"), num_pages=4)
    with pytest.raises(UnsupportedCacheError, match="quantization='int4'"):
        PagedKVCache(config, num_pages=4, quantization="int4")  # type: ignore[arg-type]
    model = model_of("tiny-qwen3")
    cache = PagedKVCache(config, num_pages=8, page_size=4)
    with pytest.raises(UnsupportedCacheError, match="layer 0 holds nothing"):
        cache.dense(0)
    logits(model, prompt(model, 2, 5), cache)
    with pytest.raises(UnsupportedCacheError, match="holds 2 sequences and gets a batch of 3"):
        logits(model, prompt(model, 3, 1), cache)
    with pytest.raises(UnsupportedCacheError, match="before the prompt"):
        cache.set_padding(torch.ones(2, 5))
    with pytest.raises(UnsupportedCacheError, match="negative number"):
        cache.crop(3)
    with pytest.raises(KVCacheError, match="max_length=33"):
        logits(model, prompt(model, 2, 28), cache)
    cache.reset()
    cache.set_padding(torch.ones(2, 5))
    with pytest.raises(UnsupportedCacheError, match="given 2 rows, the batch has 3"):
        logits(model, prompt(model, 3, 1), cache)
    sliding = model_of("tiny-mistral")
    cache = PagedKVCache(sliding.config, num_pages=40, page_size=4)
    logits(sliding, prompt(sliding, 1, 40), cache)
    logits(sliding, prompt(sliding, 1, 1), cache)
    with pytest.raises(KVCacheError, match="activate_past_recording"):
        cache.crop(-9)
    sound(cache)


def test_sizes_that_the_configuration_does_not_tell() -> None:
    model = model_of("tiny-gptneox")  # its configuration speaks of key-value heads that the model has not
    ids = prompt(model, 1, 9)
    cache = PagedKVCache(model.config, num_pages=8, page_size=4)
    torch.testing.assert_close(logits(model, ids, cache), logits(model, ids, dynamic(model)))
    before = cache.dense(0)[0]
    with pytest.raises(UnsupportedCacheError, match="make one per model"):
        logits(model_of("tiny-llama"), prompt(model_of("tiny-llama"), 1, 1), cache)
    assert cache.get_seq_length() == 9 and torch.equal(cache.dense(0)[0], before)
