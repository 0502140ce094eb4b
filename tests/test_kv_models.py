"""Unmodified models decode with every cache, compiled: eager's tokens, few graphs, no copies, buffers that stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache as once
from typing import Any

import pytest
import torch
import transformers as tf
from kv_support import Watched, _kv_caches, _models, addresses, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from ascend_dynamo.runtime.kv import PagedKVCache

tf.logging.set_verbosity_error()
BATCH, PROMPT, STEPS, ROOM = 2, 70, 8, 96
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@once
def model_of(name: str) -> Any:
    return _models.build(name, dtype=torch.float32, check=False)


def prompt_of(model: Any, seed: int = 0, batch: int = BATCH) -> Tensor:
    return _models.token_ids(model.config.vocab_size, batch, PROMPT, seed)


def static(model: Any) -> Any:
    return tf.StaticCache(config=model.config, max_cache_len=ROOM)


def dynamic(model: Any) -> Any:
    return tf.DynamicCache(config=model.config)


def paged(model: Any, **more: Any) -> Any:
    size = {"max_tokens": BATCH * ROOM, "max_length": ROOM, "page_size": 16, "target": "reference", **more}
    return PagedKVCache(model.config, **size)


def elements(cache: Any) -> int:
    """Of the smallest tensor of keys or values of one prompt."""
    return min(t.numel() for t in _kv_caches.buffers(cache))


def prefilled(model: Any, make: Callable[[Any], Any], prompt: Tensor) -> tuple[Any, Tensor]:
    """A cache that holds the prompt, and the first token after it."""
    cache = make(model)
    logits = model(prompt, past_key_values=cache, use_cache=True).logits
    return cache, logits[:, -1:].argmax(-1)


@once
def expected(name: str, seed: int = 0, steps: int = STEPS) -> Tensor:
    """Eager's tokens after the first one, with the cache that grows by cat."""
    model = model_of(name)
    with torch.no_grad():
        cache, first = prefilled(model, dynamic, prompt_of(model, seed))
        found = tokens(model, cache, first, steps)
    assert found.unique().numel() > steps // 2, "the model says the same thing again and again"
    return found


def compile_for(model: nn.Module, cache: Any, dynamic: bool | None) -> tuple[Callable[..., Any], Watched]:
    backend = Watched(elements(cache))
    return torch.compile(model, backend=backend, dynamic=dynamic), backend


JOINED = (
    f"aten.cat.default({BATCH}, 1, {ROOM}, 192)"  # latents beside rotary keys, as a dense latent attention reads them
)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-ds3", "tiny-q3moe"])
def test_a_static_cache_is_written_in_place(name: str):
    model = model_of(name)
    cache, first = prefilled(model, static, prompt_of(model))
    step, backend = compile_for(model, cache, False)
    where = addresses(cache)
    assert torch.equal(tokens(step, cache, first, STEPS), expected(name))
    assert backend.graphs == 1
    assert set(backend.watch.copies) == ({JOINED} if name == "tiny-ds3" else set())
    assert addresses(cache) == where


def test_two_static_caches_share_one_graph_and_can_be_reset():
    model = model_of("tiny-qwen3")
    (a, one), (b, two) = (prefilled(model, static, prompt_of(model, seed)) for seed in (0, 1))
    step, backend = compile_for(model, a, False)
    where = addresses(a) + addresses(b)
    found: list[list[Tensor]] = [[], []]
    for _ in range(STEPS):  # a step of this one, a step of that one
        one, two = (tokens(step, c, ids, 1) for c, ids in ((a, one), (b, two)))
        found[0].append(one)
        found[1].append(two)
    for seed in (0, 1):
        assert torch.equal(torch.cat(found[seed], 1), expected("tiny-qwen3", seed))
    a.reset()
    first = model(prompt_of(model, 1), past_key_values=a, use_cache=True).logits[:, -1:].argmax(-1)
    assert torch.equal(tokens(step, a, first, STEPS), expected("tiny-qwen3", 1))
    assert backend.graphs == 1 and not backend.watch.copies
    assert addresses(a) + addresses(b) == where


def test_a_cache_that_grows_has_two_graphs_and_is_not_copied():
    name = "tiny-qwen3"
    model = model_of(name)
    cache, first = prefilled(model, dynamic, prompt_of(model))
    step, backend = compile_for(model, cache, None)
    warm = tokens(step, cache, first, 2)
    backend.watch.copies.clear()  # it may move once, to where there is room to grow
    found = torch.cat((warm, tokens(step, cache, warm[:, -1:].clone(), STEPS - 2)), 1)
    assert torch.equal(found, expected(name))
    assert backend.graphs == 2 and not backend.watch.copies


def test_a_cache_that_grows_can_be_cropped_and_reordered():
    model = model_of("tiny-qwen3")
    cache, first = prefilled(model, dynamic, prompt_of(model))
    step, backend = compile_for(model, cache, None)
    taken = tokens(step, cache, first, 4)
    cache.crop(-3)
    assert torch.equal(tokens(step, cache, taken[:, :1].clone(), STEPS - 1), expected("tiny-qwen3")[:, 1:])
    other, first = prefilled(model, dynamic, prompt_of(model))
    swap = torch.tensor([1, 0])
    other.reorder_cache(swap)
    assert torch.equal(tokens(step, other, first[swap], STEPS), expected("tiny-qwen3")[swap])
    assert backend.graphs == 2


def test_copies_of_a_cache_grow_apart():
    model = model_of("tiny-qwen3")
    cache, first = prefilled(model, dynamic, prompt_of(model))
    step, _ = compile_for(model, cache, None)
    tokens(step, cache, first, 2)
    cache.crop(-2)
    fork = dynamic(model)
    for layer, other in zip(cache.layers, fork.layers, strict=True):  # shares memory with the first, as far as it goes
        other.lazy_initialization(layer.keys, layer.values)
        other.keys, other.values = layer.keys, layer.values
    wrong = (first + 1) % 500
    tokens(step, fork, wrong, 3)
    assert torch.equal(tokens(step, cache, first, STEPS), expected("tiny-qwen3"))


def test_a_static_cache_is_reordered_for_beams():
    model = model_of("tiny-qwen3")
    cache, first = prefilled(model, static, prompt_of(model))
    step, backend = compile_for(model, cache, False)
    tokens(step, cache, first, 1)
    swap = torch.tensor([1, 0])
    cache.reorder_cache(swap)
    second = expected("tiny-qwen3")[swap, :1].clone()
    assert torch.equal(tokens(step, cache, second, STEPS - 1), expected("tiny-qwen3")[swap, 1:])
    assert not backend.watch.copies


def test_a_static_sliding_cache_behind_its_window():
    name = "tiny-mistral"
    model = model_of(name)
    cache, first = prefilled(model, static, prompt_of(model))
    step, backend = compile_for(model, cache, None)
    where = addresses(cache)
    assert torch.equal(tokens(step, cache, first, STEPS), expected(name))
    assert backend.graphs <= 2 and addresses(cache) == where


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-ds3", "tiny-gemma3"])
def test_pages_are_written_and_read_in_place(name: str):
    model = model_of(name)
    (a, one), (b, two) = (prefilled(model, paged, prompt_of(model, seed)) for seed in (0, 1))
    step, backend = compile_for(model, a, None)
    where = addresses(a) + addresses(b)
    found: list[list[Tensor]] = [[], []]
    for _ in range(STEPS):
        one, two = (tokens(step, c, ids, 1) for c, ids in ((a, one), (b, two)))
        found[0].append(one)
        found[1].append(two)
    for seed in (0, 1):
        assert torch.equal(torch.cat(found[seed], 1), expected(name, seed))
    assert backend.graphs <= 2 and not backend.watch.copies, backend.watch.copies
    assert addresses(a) + addresses(b) == where
    assert a.statistics().largest_waste < a.page_size and a.statistics().orphans == 0
    a.reset()
    assert all(p.used == 0 for p in a.statistics().pools)


def test_pages_can_be_cropped_reordered_and_used_again():
    model = model_of("tiny-qwen3")
    cache, first = prefilled(model, paged, prompt_of(model))
    step, backend = compile_for(model, cache, None)
    taken = tokens(step, cache, first, 4)
    cache.crop(-3)
    assert torch.equal(tokens(step, cache, taken[:, :1].clone(), STEPS - 1), expected("tiny-qwen3")[:, 1:])
    swap = torch.tensor([1, 0])
    cache.crop(-STEPS)
    cache.reorder_cache(swap)
    assert torch.equal(tokens(step, cache, first[swap], STEPS), expected("tiny-qwen3")[swap])
    cache.reset()
    first = model(prompt_of(model, 1), past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    assert torch.equal(tokens(step, cache, first, STEPS), expected("tiny-qwen3", 1))
    assert backend.graphs <= 2


def test_one_model_compiled_writes_pages_in_the_prompt_and_reads_them_after():
    model = model_of("tiny-qwen3")
    cache = paged(model)
    backend = Watched(BATCH * 2 * PROMPT * 128)
    step = torch.compile(model, backend=backend)
    first = step(prompt_of(model), past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    where = addresses(cache)
    backend.watch.copies.clear()
    assert torch.equal(tokens(step, cache, first, STEPS), expected("tiny-qwen3"))
    assert backend.graphs <= 3 and not backend.watch.copies and addresses(cache) == where
    ops = backend.backend.records[-1].after
    assert ops.count("ascend.paged_attention") == 2 and "kv_gather" not in ops


class Rows(nn.Module):
    """Attention with buffers of its own, as gpt-fast writes it: [B, H, S, D] each, or all layers in one [L, 2, ...]."""

    def __init__(self, stacked: bool, layers: int = 2, heads: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.heads, self.dim, self.stacked = heads, dim, stacked
        width = heads * dim
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.embed, self.out = nn.Embedding(64, width), nn.Linear(width, 64, bias=False)
        shape = (BATCH, heads, ROOM, dim)
        if stacked:
            self.register_buffer("kv", torch.zeros(layers, 2, *shape))
        else:
            for i in range(layers):
                self.register_buffer(f"k{i}", torch.zeros(shape))
                self.register_buffer(f"v{i}", torch.zeros(shape))

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """ids [B, S] at the positions [S]; logits of the last token [B, 64]."""
        x = self.embed(ids)
        mask = torch.arange(ROOM) <= position[:, None]
        for i, linear in enumerate(self.qkv):
            q, k, v = linear(x).view(BATCH, -1, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            keys, values = self.kv[i] if self.stacked else (getattr(self, f"k{i}"), getattr(self, f"v{i}"))
            keys[:, :, position] = k
            values[:, :, position] = v
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            x = x + y.transpose(1, 2).flatten(2)
        return self.out(x[:, -1])


@pytest.mark.parametrize("stacked", [False, True])
def test_buffers_written_by_hand(stacked: bool):
    eager = Rows(stacked).requires_grad_(False)
    model = copy.deepcopy(eager)
    backend = Watched(BATCH * 2 * ROOM * 16)
    step = torch.compile(model, backend=backend, dynamic=False)
    ids = torch.randint(0, 64, (BATCH, 20))
    where = [b.data_ptr() for b in model.buffers()]
    want, got = eager(ids, torch.arange(20)), model(ids, torch.arange(20))
    for position in range(20, 20 + STEPS):
        at = torch.tensor([position])
        want, got = eager(want.argmax(-1)[:, None], at), step(got.argmax(-1)[:, None], at)
        assert torch.allclose(want, got, atol=1e-5)
    assert backend.graphs == 1 and not backend.watch.copies, backend.watch.copies
    assert [b.data_ptr() for b in model.buffers()] == where
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(eager.buffers(), model.buffers(), strict=True))
