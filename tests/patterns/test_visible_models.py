"""Masks of transformers in whole models: flags in the compiled graph, no mask operand, the same logits."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_dynamo.backend import Backend

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _models


def compiled(name: str, attention: str, *args: Any, dynamic: bool | None = None, **more: Any) -> list[str]:
    """The calls of flash attention of a one-layer model, which must agree with eager."""
    model = _models.build(name, attention=attention, layers=1, check=False, dtype=torch.float32)
    backend = Backend({"target": "reference", "strict": True}, texts=True)
    with torch.no_grad():
        cache = more.pop("cache", lambda: None)
        expected = model(*args, past_key_values=cache(), **more).logits
        got = torch.compile(model, backend=backend, dynamic=dynamic)(*args, past_key_values=cache(), **more).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    return [line for r in backend.records for line in r.after.splitlines() if "ascend.flash_attention" in line]


def operands(call: str) -> set[str]:
    return set(re.findall(r"\b(mask|bias)=", call))


def tokens(length: int) -> torch.Tensor:
    return _models.token_ids(512, 2, length)


@pytest.mark.parametrize(
    ("name", "attention", "dynamic"),
    [("tiny-llama", "eager", True), ("tiny-llama", "sdpa", None), ("tiny-mistral", "eager", None),
     ("tiny-mistral", "sdpa", True), ("tiny-gemma2", "eager", None)],
)  # fmt: skip
def test_prefill_has_no_mask(name, attention, dynamic):
    (call,) = compiled(name, attention, tokens(70), use_cache=False, dynamic=dynamic)
    assert operands(call) == set() and "causal='top_left'" in call
    assert ("window=64" in call) == (name != "tiny-llama")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_that_is_not_reached_is_none(attention):
    (call,) = compiled("tiny-mistral", attention, tokens(20), use_cache=False)
    assert operands(call) == set() and "window" not in call


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_stays_a_row_of_keys(attention):
    ids = tokens(20)
    given = torch.ones_like(ids)
    given[0, :5] = 0
    (call,) = compiled("tiny-llama", attention, ids, attention_mask=given, use_cache=False)
    assert operands(call) == {"mask"} and "causal='top_left'" in call


@pytest.mark.parametrize(("rows", "dynamic"), [(1, None), (4, True)])
def test_steps_behind_a_cache_have_no_mask(rows, dynamic):
    from transformers import DynamicCache

    model = _models.build("tiny-llama", attention="eager", layers=1, check=False, dtype=torch.float32)

    def cache() -> Any:
        filled = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(20), past_key_values=filled)
        return filled

    (call,) = compiled("tiny-llama", "eager", tokens(24)[:, 20 : 20 + rows], cache=cache, dynamic=dynamic)
    assert operands(call) == set() and ("causal='bottom_right'" in call) == (rows > 1)
