"""Paged caches under torch.compile on the reference target: eager's tokens, few graphs, and none for another cache."""

from __future__ import annotations

import pytest
import torch
from kv_models import dynamic, generate, model_of, prompt

from ascend_dynamo import hf
from ascend_dynamo.backend import Backend
from ascend_dynamo.runtime.kv import PagedKVCache, PagedRequests

pytestmark = pytest.mark.slow


def test_generate_compiles_decoding_once_for_all_lengths_and_caches() -> None:
    model = model_of("tiny-qwen3", 1)
    ids = prompt(model, 2, 21)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    wanted = generate(model, ids, dynamic(model), attention_mask=mask)
    config = hf.compile_config(target="reference", dynamic=True)
    for graphs in (None, 0):
        cache = PagedKVCache(model.config, num_pages=24, page_size=4)
        cache.set_padding(mask)
        with hf.assert_compiled(config, graphs):
            got = generate(model, ids, cache, attention_mask=mask, compile_config=config)
        assert torch.equal(got, wanted)
        cache.groups[0].pool.check()
    assert hf.compile_count(config) <= 2


@pytest.mark.parametrize(("name", "layers"), [("tiny-gemma2", 2), ("tiny-ds3", 1)])
def test_prompt_and_decoding_as_whole_graphs(name: str, layers: int) -> None:
    """A window that gives pages back; latents. One graph for the prompt, one for every step behind it."""
    model = model_of(name, layers)
    ids = prompt(model, 2, 21)
    backend = Backend({"target": "reference"})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    steps = [ids, *(prompt(model, 2, 1, seed) for seed in range(6))]
    with torch.no_grad():
        reference = dynamic(model)
        wanted = [model(step, past_key_values=reference).logits for step in steps]
        for _ in range(2):
            cache = PagedKVCache(model.config, num_pages=24, page_size=4)
            for step, logits in zip(steps, wanted, strict=True):
                torch.testing.assert_close(compiled(step, past_key_values=cache).logits, logits, rtol=1e-3, atol=1e-4)
            for group in cache.groups:
                group.pool.check()
                assert group.pool.window is None or group.pool.table(group.sequences[0])[0] == -1
    assert len(backend.records) == 2
    if name == "tiny-gemma2":  # both layers of the step read the pages where they are
        assert backend.records[1].count("paged_attention") == 2


def test_one_graph_runs_every_packed_step() -> None:
    model = model_of("tiny-llama", 1)
    a, b = (prompt(model, 1, n, n)[0].tolist() for n in (30, 9))
    with torch.no_grad():
        wanted = [model(torch.tensor([tokens])).logits[0] for tokens in (a, b)]
    before = hf.use_paged_attention(model)
    backend = Backend({"target": "reference"})
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    try:
        for _ in range(2):
            requests = PagedRequests(PagedKVCache(model.config, num_pages=30, page_size=4))
            first, second = requests.open(a), requests.open(b)
            for news in (
                {first: a[:10], second: b[:4]},  # two prompts
                {first: a[10:11], second: b[4:5]},  # two new tokens
                {first: a[11:20], second: b[5:6]},  # a part of a prompt beside a new token
                {second: b[6:7]},
                {first: a[20:25]},
            ):
                batch = requests.step(news, rows=2, tokens=2)
                with torch.no_grad():
                    logits = compiled(**batch.inputs()).logits[0]
                requests.commit(batch)
                for row, request in zip(logits, news, strict=False):
                    place = requests.length(request) - 1
                    torch.testing.assert_close(row, wanted[request][place], rtol=1e-3, atol=1e-4)
    finally:
        model.set_attn_implementation(before)
    assert len(backend.records) == 1
