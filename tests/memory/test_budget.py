"""Budgets: sizes counted by hand, advice that is true (it fits, one more does not), and limits that stop a call."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DeepseekV3Config, Gemma3TextConfig, Qwen3Config

import ascend_dynamo
from ascend_dynamo.cli import main
from ascend_dynamo.errors import MemoryLimitError, MemoryPlanError
from ascend_dynamo.memory import Gear, MemoryBudget, forecast
from ascend_dynamo.memory.units import parse_bytes, show_bytes
from ascend_dynamo.runtime.kv import PagedKVCache
from ascend_dynamo.runtime.kv.layer_kinds import LayerKind, layer_kinds

QWEN = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
TOKEN = 3 * 2 * 16 * 2 * 4  # layers, heads, width, keys and values, float32


def budget(**more: Any) -> MemoryBudget:
    given = {"kv_dtype": torch.float32, "page_size": 16, **more}
    return MemoryBudget(1000, tuple(layer_kinds(QWEN)), lambda g: 100 * g.batch * g.chunk, **given)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 << 30), ("1.5 MiB", 3 << 19), ("2k", 2048), ("77", 77), (5, 5), ("3 tb", 3 << 40)]
)
def test_sizes_in_words(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("wrong", ["", "GB", "-1", "0", 0, -5, 1.5, None, True, "8 apples"])
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(MemoryPlanError, match="is no size of memory"):
        parse_bytes(wrong)


def test_sizes_are_shown_in_the_unit_that_fits():
    assert [show_bytes(n) for n in (12, 1536, 3 << 19, 8 << 30, 3 << 40)] == [
        "12 B",
        "1.50 KB",
        "1.50 MB",
        "8.00 GB",
        "3.00 TB",
    ]


def test_a_budget_adds_its_parts():
    needed = budget(workspace=7).needed(Gear(2, 5, 40))
    assert (needed.weights, needed.workspace, needed.activations) == (1000, 7, 1000)
    assert needed.kv == 2 * 3 * 16 * TOKEN  # 40 tokens take 3 pages of 16
    assert needed.total == 2007 + needed.kv


def test_int8_pages_hold_two_scales_per_token_and_head():
    assert budget(kv_dtype=torch.int8).page_bytes() == 16 * 3 * 2 * (2 * 16 + 8)


def test_latents_are_one_row():
    config = DeepseekV3Config(num_hidden_layers=2, kv_lora_rank=512, qk_rope_head_dim=64)
    found = MemoryBudget(0, tuple(layer_kinds(config)), kv_dtype=torch.bfloat16, page_size=1)
    assert found.kv_bytes(Gear(1, 1, 10)) == 2 * 10 * (512 + 64) * 2
    assert not any("int8" in line for line in found.fits(100, Gear(1, 1, 10)).advice)


def test_a_sliding_layer_keeps_its_window():
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=32, num_key_value_heads=1, head_dim=8)
    kinds = layer_kinds(config)
    sliding = sum(k.window is not None for k in kinds)
    assert 0 < sliding < 6
    found = MemoryBudget(0, tuple(kinds), kv_dtype=torch.float32, page_size=8)
    page = 8 * 2 * 8 * 4
    # 1000 tokens: 125 pages; before the step of one token, those that end before token 999 - 32 + 1 are gone
    assert found.kv_bytes(Gear(1, 1, 1000)) == page * ((6 - sliding) * 125 + sliding * (125 - 968 // 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_pages_of_a_cache_take_what_the_budget_says(dtype):
    found = budget(kv_dtype=dtype)
    kwargs: dict[str, Any] = {"quantization": "int8"} if dtype is torch.int8 else {"dtype": dtype}
    cache = PagedKVCache(QWEN, num_pages=5, page_size=16, max_length=64, **kwargs)
    k = torch.randn(1, 2, 3, 16)
    for layer in range(3):
        cache.update(k, k, layer)
    held = 0
    for layer in cache.layers:
        store = layer.store
        tensors = [store.keys, store.values, store.k_scale, store.v_scale]
        held += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    assert held == 5 * found.page_bytes()


def test_what_fits_needs_no_advice():
    fit = budget().fits("1GB", Gear(2, 5, 40))
    assert fit and fit.advice == () and fit.require() is fit and "fits in 1.00 GB" in str(fit)


gears = st.builds(
    lambda batch, chunk, more: Gear(batch, chunk, chunk + more),
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(0, 200),
)


@given(gears, st.integers(1000, 400_000))
@settings(max_examples=150, deadline=None)
def test_advice_is_true(gear, limit):
    """Every figure is the largest: with it the gear fits, with one more it does not."""
    found = budget()
    fit = found.fits(limit, gear)
    assert bool(fit) == (found.needed(gear).total <= limit)
    text = "\n".join(fit.advice)
    for name, words in (("batch", "sequences"), ("chunk", "new tokens a step"), ("kv_length", "tokens of context")):
        match = re.search(rf"at most (\d+) {words}", text)
        if match:
            best = int(match[1])
            assert found.needed(replace(gear, **{name: best})).total <= limit
            assert found.needed(replace(gear, **{name: best + 1})).total > limit
    pages = re.search(r"a pool of (\d+) pages", text)
    if pages:
        room = limit - found.needed(gear).total + found.needed(gear).kv
        assert int(pages[1]) * found.page_bytes() <= room < (int(pages[1]) + 1) * found.page_bytes()
    if "which fits" in text:
        assert replace(found, kv_dtype=torch.int8).needed(gear).total <= limit
    assert fit or fit.advice


def test_weights_that_are_too_large_are_said_so():
    fit = budget().fits(900, Gear())
    assert not fit and fit.advice == ("weights and workspace alone take 1000 B: more memory, or weights in fewer bits",)
    with pytest.raises(MemoryLimitError, match="does not fit in 900 B") as caught:
        fit.require()
    assert caught.value.limit == 900 and caught.value.needed == fit.needed.total


@pytest.mark.parametrize(
    ("wrong", "why"), [({"batch": 0}, "batch is 0"), ({"chunk": 5}, "too short"), ({"kv_length": 1.5}, "kv_length")]
)
def test_impossible_gears_are_refused(wrong, why):
    with pytest.raises(MemoryPlanError, match=why):
        Gear(**wrong)
    with pytest.raises(MemoryPlanError, match="page_size is 0"):
        budget(page_size=0)


def test_a_model_is_forecast_without_a_run_and_evaluated_for_other_gears():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    options = {"target": "reference"}
    record = forecast(model, torch.randn(2, 24, 8), options=options)
    assert sorted(record.sizes.values()) == [2, 24]
    assert record.weights == sum(p.numel() * 4 for p in model.parameters())
    found = MemoryBudget.of(record, Gear(2, 24, 24), QWEN)
    assert found.kv_dtype is torch.float32
    other = forecast(model, torch.randn(3, 40, 8), options=options)
    assert found.needed(Gear(3, 40, 40)).activations == other.arena + other.outputs
    assert found.needed(Gear(3, 40, 40)).kv == 3 * 3 * 16 * TOKEN
    fit = found.fits("1MB", Gear(64, 512, 4096))
    assert not fit and fit.needed.kv == 64 * 4096 * TOKEN


def test_what_kernels_took_beyond_the_prediction_is_workspace():
    record = forecast(nn.Linear(4, 4).eval(), torch.randn(6, 4), options={"target": "reference"})
    record.recorded = record.lower_bound + 500
    assert MemoryBudget.of(record, Gear(6, 1, 1)).workspace == 500
    assert MemoryBudget.of(record, Gear(6, 1, 1), workspace=3).workspace == 3


def test_a_forecast_runs_nothing():
    model = Wide().eval()
    record = forecast(model, torch.randn(9, 16), options={"target": "reference"})
    assert model.count == 0 and record.peak > 0 and record.recorded is None


def test_sizes_of_an_example_must_tell_themselves_apart():
    model = nn.Linear(4, 4).eval()
    record = forecast(model, torch.randn(6, 6, 4), options={"target": "reference"})
    with pytest.raises(MemoryPlanError, match="6 as batch and chunk"):
        MemoryBudget.of(record, Gear(6, 6, 8))
    fixed = forecast(model, torch.randn(1, 6, 4), options={"target": "reference"})
    with pytest.raises(MemoryPlanError, match="batch is fixed at 1"):
        MemoryBudget.of(fixed, Gear(1, 6, 6)).needed(Gear(2, 6, 6))


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 256, bias=False), nn.Linear(256, 16, bias=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.down(torch.relu(self.up(x)))


def test_a_call_beyond_the_limit_raises_before_anything_runs():
    model = Wide().eval()
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True, "memory_limit": "128KB"})
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(9, 16))
        assert model.count == 1
        with pytest.raises(MemoryLimitError) as caught:
            compiled(torch.randn(90, 16))
        assert model.count == 1 and len(backend.records) == 1
        text = str(caught.value)
        assert "memory_limit is 128.00 KB" in text and "aten.mm.default" in text and "test_budget.py:" in text
        (best,) = re.findall(r"\(L\['x'\]\.size\(\)\[0\]\) at most (\d+) instead of 90", text)
        compiled(torch.randn(int(best), 16))
        compiled(torch.randn(9, 16))
    assert model.count == 3
    assert caught.value.limit == 128 << 10 < caught.value.needed


def test_what_is_passed_in_counts_once():
    limit = 60 << 10
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True, "memory_limit": limit})
    compiled = torch.compile(lambda a, b: (a[0] + b[0]).sum(), backend=backend)
    x = torch.zeros(2, 4096)  # 32 KB
    compiled(x, x.view(2, 64, 64).view(2, 4096))
    with pytest.raises(MemoryLimitError, match="what is passed in alone is too large"):
        compiled(x, x.clone())


def test_without_a_limit_nothing_is_checked():
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True})
    torch.compile(lambda x: x + 1, backend=backend)(torch.randn(1 << 20))
    assert backend.records[0].memory.peak == 4 << 20
    assert backend.records[0].seconds["memory"] > 0


def test_a_prediction_that_fails_is_quarantined_unless_something_rests_on_it(monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr("ascend_dynamo.backend.record_memory", broken)
    x = torch.randn(4)
    backend = ascend_dynamo.Backend({"target": "reference"})
    assert torch.equal(torch.compile(lambda x: x.sin(), backend=backend)(x), x.sin())
    (record,) = backend.records
    assert record.memory is None and [q.pattern for q in record.quarantined] == ["memory"] and record.nodes_after == 1
    strict = ascend_dynamo.Backend({"target": "reference", "strict": True})
    with pytest.raises(Exception, match="planted"):
        torch.compile(lambda x: x.cos(), backend=strict)(x)


def test_a_graph_that_is_compiled_for_training_says_that_the_limit_is_not_checked():
    backend = ascend_dynamo.Backend({"target": "reference", "memory_limit": "1MB"})
    model = nn.Linear(4, 4)
    torch.compile(model, backend=backend)(torch.randn(2, 4)).sum().backward()
    assert any("memory_limit is not checked" in note for note in backend.records[0].notes)


def test_the_command_line_says_whether_it_fits(tmp_path, capsys):
    script = tmp_path / "fitting_model.py"
    script.write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(8, 64).eval(), (torch.randn(3, 5, 8),)\n"
        "def flat():\n    return torch.nn.Linear(8, 64).eval(), (torch.randn(8),)\n"
    )
    command = ["memory", f"{script}:build", "-o", "target=reference"]
    assert main([*command, "--limit", "1GB"]) == 0
    assert "batch 3, 5 new tokens, 5 tokens each in the cache" in capsys.readouterr().out
    assert main([*command, "--limit", "64KB", "--batch", "100", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and found["needed"]["activations"] == 100 * 5 * 64 * 4
    (best,) = [int(n) for a in found["advice"] for n in re.findall(r"at most (\d+) sequences", a)]
    assert best == ((64 << 10) - found["needed"]["weights"]) // (5 * 64 * 4)
    assert main([*command, "--limit", "eight"]) == 2 and "is no size" in capsys.readouterr().err
    assert main(["memory", f"{script}:flat", "--limit", "1GB"]) == 2
    assert "no tensor [batch, tokens, ...]" in capsys.readouterr().err


def test_kinds_without_layers_ask_for_no_pages():
    assert MemoryBudget(10).pages("1GB", Gear()) == 0 and MemoryBudget(10).needed(Gear()).total == 10
    assert LayerKind(None, 1, 2, 2).bytes_per_token(2, False) == 8
