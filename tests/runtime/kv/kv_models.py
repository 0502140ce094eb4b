"""Small models of the families that the cache tests use, and how to run them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from _models import build, token_ids

transformers.logging.set_verbosity_error()

# sdpa attention; gemma2: softcap, a window in every other layer; gptoss: sinks; mistral: a window everywhere;
# ds3: latents; q3moe: experts
FAMILIES = ("tiny-qwen3", "tiny-llama", "tiny-q3moe", "tiny-gemma2", "tiny-gemma3", "tiny-mistral", "tiny-ds3")
WINDOW = 16


@cache
def model_of(name: str, layers: int | None = None) -> Any:
    """float32, with a window short enough that pages fall out of it; the same object each time: leave it as it was."""
    model = build(name, dtype=torch.float32, check=False, layers=layers)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = WINDOW
        for layer in model.model.layers:
            if getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn.sliding_window = WINDOW
    return model


def prompt(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return token_ids(model.config.vocab_size, batch, length, seed)


def generate(model: Any, ids: torch.Tensor, cache: Any, new: int = 12, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, **{"do_sample": False, **options})


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)
