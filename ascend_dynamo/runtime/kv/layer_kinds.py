"""What the layers of a model keep: kinds and sizes, read from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ascend_dynamo.errors import UnsupportedCacheError


@dataclass(frozen=True)
class LayerKind:
    """``window``: tokens that the layer's attention sees, None for all. Per token it keeps ``heads`` rows of
    ``k_width`` and of ``v_width`` elements (latent attention: one row of latents, one of rotary keys)."""

    window: int | None
    heads: int
    k_width: int
    v_width: int

    def bytes_per_token(self, itemsize: int, scales: bool) -> int:
        return self.heads * ((self.k_width + self.v_width) * itemsize + (8 if scales else 0))


def layer_kinds(config: Any) -> list[LayerKind]:
    """One ``LayerKind`` per layer of a transformers model.

    Raises UnsupportedCacheError, naming the layer, for layers that keep anything but keys and values of their own
    (recurrent states, convolution states, compressed or indexed keys, keys shared with another layer).
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    text = config.get_text_config(decoder=True)
    kinds = []
    layers = DynamicCache(config=text).layers
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedCacheError(
                f"layer {index} of this {text.model_type} model keeps a {type(layer).__name__}, which fits no pages"
                " of keys and values; use transformers' DynamicCache"
            )
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        kinds.append(LayerKind(window, *_widths(text)))
    return kinds


def _widths(config: Any) -> tuple[int, int, int]:
    latents = getattr(config, "kv_lora_rank", None)
    if latents is not None:
        return 1, latents, config.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width, getattr(config, "v_head_dim", None) or width
