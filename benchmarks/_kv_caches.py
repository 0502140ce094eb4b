"""The caches of the KV benchmark: made, filled with the same seeded tokens, rewound, and looked into.

A contender's cache is filled through its own ``update``, layer by layer, as a prefill would do it, but with drawn keys
and values: so that 32k tokens of context cost a second and every contender holds the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLACK = 32  # tokens that a static cache holds beyond the context: the steps between two resets, and some
PAGE = 16
CHUNK = 1 << 24  # elements drawn at once


@dataclass(frozen=True)
class Shape:
    """What one layer stores of one token: heads, and the widths of keys and values (of latents and rotary keys)."""

    layers: int
    heads: int
    keys: int
    values: int
    itemsize: int = 2

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * self.layer_bytes

    @property
    def layer_bytes(self) -> int:
        return self.heads * (self.keys + self.values) * self.itemsize


def shape_of(config: Any, itemsize: int = 2) -> Shape:
    """Of a transformers configuration; latent attention stores one head of latents and one of rotary keys."""
    if getattr(config, "kv_lora_rank", None):
        return Shape(config.num_hidden_layers, 1, config.kv_lora_rank, config.qk_rope_head_dim, itemsize)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(config.num_hidden_layers, config.num_key_value_heads, dim, dim, itemsize)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Uniform in [-2, 2) in steps of 1/64, which every dtype holds exactly; the same for the same seed."""
    count = int(np.prod(shape))
    noise = np.random.Generator(np.random.SFC64(seed))
    out = torch.empty(count, dtype=dtype)
    for start in range(0, count, CHUNK):
        part = np.frombuffer(noise.bytes(min(CHUNK, count - start)), dtype=np.int8)
        out[start : start + len(part)] = torch.from_numpy(part.copy()).to(dtype) / 64
    return out.view(shape)


def tokens(
    config: Any, batch: int, context: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [B, heads, context, width] of each layer in turn.

    Keys are drawn thrice as wide as values, so that attention is peaked and a lost page shows.
    """
    shape = shape_of(config, dtype.itemsize)
    for layer in range(shape.layers):
        keys = draw((batch, shape.heads, context, shape.keys), 2 * layer, dtype).mul_(3)
        yield keys, draw((batch, shape.heads, context, shape.values), 2 * layer + 1, dtype)


def fill(cache: Any, config: Any, batch: int, context: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Put ``context`` drawn tokens of ``batch`` sequences into an empty transformers cache."""
    for layer, (keys, values) in enumerate(tokens(config, batch, context, dtype)):
        cache.update(keys, values, layer)


def make(kind: str, config: Any, batch: int, context: int) -> Any:
    """An empty cache for ``batch`` sequences of ``context`` tokens and some steps: "dynamic", "static" or "paged"."""
    from transformers import DynamicCache, StaticCache

    from ascend_dynamo.runtime.kv import PagedKVCache

    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=context + SLACK)
    if kind == "paged":
        longest = -(-(context + SLACK) // PAGE) * PAGE
        return PagedKVCache(config, max_tokens=batch * longest, max_length=longest, page_size=PAGE)
    raise KeyError(f"no cache {kind!r}")


def length(cache: Any) -> int:
    """Tokens stored per sequence."""
    return int(cache.get_seq_length())


def rewind(cache: Any, context: int) -> None:
    """Forget what came after the first ``context`` tokens."""
    if hasattr(cache.layers[0], "max_cache_len"):
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
    elif (extra := length(cache) - context) > 0:
        cache.crop(-extra)


def buffers(cache: Any) -> list[Tensor]:
    """The tensors that hold keys and values, layer by layer."""
    held = [getattr(layer, "store", None) or layer for layer in cache.layers]
    return [t for x in held for t in (x.keys, x.values)]


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind the tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
