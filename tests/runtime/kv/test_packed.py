"""Packed steps over pages: mixtures of prompts, parts of prompts and new tokens say what each request says alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kv_models import model_of, prompt

from ascend_dynamo import hf
from ascend_dynamo.errors import KVCacheError, OutOfPagesError, UnknownSequenceError, UnsupportedCacheError
from ascend_dynamo.runtime.kv import PagedKVCache, PagedRequests


def tokens_of(model: Any, *lengths: int) -> list[list[int]]:
    return [prompt(model, 1, n, n)[0].tolist() for n in lengths]


@torch.no_grad()
def alone(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits of one request, [S, vocab], by the model's own attention."""
    return model(torch.tensor([tokens])).logits[0]


@pytest.fixture
def paged():
    """Switches a model to packed attention, and back after the test."""
    switched = []

    def switch(model: Any) -> Any:
        switched.append((model, hf.use_paged_attention(model)))
        return model

    yield switch
    for model, before in switched:
        model.set_attn_implementation(before)


@torch.no_grad()
def run(model: Any, requests: PagedRequests, news: dict[int, list[int]], commit: bool = True) -> torch.Tensor:
    batch = requests.step(news)
    logits = model(**batch.inputs()).logits[0]
    if commit:
        requests.commit(batch)
    return logits


FAMILIES = ("tiny-qwen3", "tiny-llama", "tiny-q3moe", "tiny-gemma2", "tiny-gptoss", "tiny-ds3")


@pytest.mark.parametrize("name", FAMILIES)
def test_any_mixture_equals_each_request_alone(name: str, paged: Any) -> None:
    model = model_of(name)
    prompts = tokens_of(model, 40, 3, 22, 31)
    wanted = [alone(model, p) for p in prompts]
    requests = PagedRequests(PagedKVCache(paged(model).config, num_pages=60, page_size=4))
    ids = [requests.open(p) for p in prompts]
    rng = random.Random(1)
    mixed = 0
    while any(requests.length(r) < len(p) for r, p in zip(ids, prompts, strict=True)):
        news: dict[int, list[int]] = {}
        for r, p in rng.sample(list(zip(ids, prompts, strict=True)), rng.randint(1, 4)):
            done = requests.length(r)
            if done < len(p):
                news[r] = p[done : done + rng.choice([1, 1, 7, 20])]
        if not news:
            continue
        mixed += len({len(n) > 1 for n in news.values()}) > 1
        for row, r in zip(run(model, requests, news), news, strict=True):
            torch.testing.assert_close(row, wanted[r][requests.length(r) - 1], rtol=1e-3, atol=1e-4)
    assert mixed > 1
    assert requests.cache.statistics().orphans == 0
    requests.free(*ids)
    for group in requests.cache.groups:
        group.pool.check()
        assert group.pool.pages.used == 0


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-gemma2", "tiny-ds3"])
def test_prefixes_and_forks_share_pages(name: str, paged: Any) -> None:
    model = model_of(name)
    (base,) = tokens_of(model, 37)
    other = [*base[:30], *tokens_of(model, 5)[0]]
    wanted = {tuple(t): alone(model, t)[-1] for t in (base, other, [*base, 17], [*base, 18])}
    requests = PagedRequests(PagedKVCache(paged(model).config, num_pages=60, page_size=4))

    def check(news: dict[int, list[int]], *said: list[int]) -> None:
        for row, tokens in zip(run(model, requests, news), said, strict=True):
            torch.testing.assert_close(row, wanted[tuple(tokens)], rtol=1e-3, atol=1e-4)

    first = requests.open(base)
    check({first: base}, base)
    second = requests.open(other)
    assert requests.length(second) == 28  # the whole pages of what they have in common
    check({second: other[28:]}, other)
    fork = requests.fork(first)
    check({first: [17], fork: [18]}, [*base, 17], [*base, 18])
    assert [g.pool.statistics().copies for g in requests.cache.groups] == [1] * len(requests.cache.groups)
    requests.crop(fork, 37)
    assert requests.length(fork) == 37
    check({fork: [17]}, [*base, 17])
    requests.free(first, fork)
    again = requests.open(base)  # from the cache of freed pages, where a window has not given them back
    assert requests.length(again) == 36 or len(requests.cache.groups) > 1
    check({again: base[requests.length(again) :]}, base)


def test_int8_pages(paged: Any) -> None:
    model = model_of("tiny-qwen3")
    (tokens,) = tokens_of(model, 30)
    wanted = alone(model, tokens)[-1]
    requests = PagedRequests(PagedKVCache(paged(model).config, num_pages=30, page_size=4, quantization="int8"))
    got = run(model, requests, {requests.open(tokens): tokens})[0]
    error = float((got - wanted).norm() / wanted.norm())
    assert 1e-5 < error < 0.15
    latent = model_of("tiny-ds3")
    requests = PagedRequests(PagedKVCache(paged(latent).config, num_pages=30, page_size=4, quantization="int8"))
    with pytest.raises(UnsupportedCacheError, match="latents in int8"):
        run(latent, requests, {requests.open(tokens): tokens})


def test_errors_leave_everything_as_it_was(paged: Any) -> None:
    model = paged(model_of("tiny-gemma2"))
    a, b = tokens_of(model, 15, 30)
    requests = PagedRequests(PagedKVCache(model.config, num_pages=10, sliding_pages=20, page_size=4))
    first, second = requests.open(a), requests.open(b)
    run(model, requests, {first: a})

    def state() -> Any:
        return [[(g.pool.table(s), g.pool.length(s)) for s in g.pool.sequences] for g in requests.cache.groups]

    before = state()
    with pytest.raises(OutOfPagesError, match="8 pages asked for, 6 to be had"):
        requests.step({first: [1], second: b})
    with pytest.raises(ValueError):
        requests.step({first: ["a word"]})  # type: ignore[list-item]
    with pytest.raises(KVCacheError, match="at least one token"):
        requests.step({first: []})
    with pytest.raises(KVCacheError):
        requests.crop(first, 16)
    with pytest.raises(UnknownSequenceError, match="request 7 is not open"):
        requests.step({7: [1]})
    assert state() == before
    requests.free(first)
    with pytest.raises(UnknownSequenceError):
        requests.free(first)
    run(model, requests, {second: b})


def test_packed_attention_says_what_it_does_not_serve(paged: Any) -> None:
    model = paged(model_of("tiny-qwen3"))
    requests = PagedRequests(PagedKVCache(model.config, num_pages=10, page_size=4))
    with pytest.raises(UnsupportedCacheError, match="runs packed steps"):
        model(torch.tensor([[1, 2, 3]]))
    batch = requests.step({requests.open([1, 2, 3]): [1, 2, 3]})
    from ascend_dynamo.runtime.kv.interface import paged_attention_forward

    module, q = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8)
    with pytest.raises(UnsupportedCacheError, match=r"gives its attention \['alibi'\]"):
        paged_attention_forward(module, q, q, q, None, paged=batch, alibi=q)
    with pytest.raises(UnsupportedCacheError, match="no mask"):
        paged_attention_forward(module, q, q, q, torch.ones(3, 3), paged=batch)
    module.is_causal = False
    try:
        with pytest.raises(UnsupportedCacheError, match="Qwen3Attention is not causal"):
            paged_attention_forward(module, q, q, q, None, paged=batch)
    finally:
        module.is_causal = True
    sliding = paged(model_of("tiny-mistral"))
    requests = PagedRequests(PagedKVCache(sliding.config, num_pages=10, page_size=4))
    batch = requests.step({requests.open([1, 2, 3]): [1, 2, 3]})
    with pytest.raises(UnsupportedCacheError, match="chunked attention"):
        paged_attention_forward(sliding.model.layers[0].self_attn, q, q, q, None, paged=batch)


def test_a_request_longer_than_its_table_is_refused() -> None:
    model = model_of("tiny-qwen3")
    requests = PagedRequests(PagedKVCache(model.config, num_pages=10, page_size=4, max_length=8))
    request = requests.open([1])
    with pytest.raises(KVCacheError, match=r"request of 9 tokens does not fit tables of 2 pages of 4; .* max_length=9"):
        requests.step({request: [1] * 9})
    assert requests.length(request) == 0 and requests.step({request: [1] * 8}).block_table.shape == (1, 2)
