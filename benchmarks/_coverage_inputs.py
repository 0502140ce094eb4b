"""What the models of ``coverage.py`` read: the same values for every contender, in the model's dtype."""

from __future__ import annotations

from typing import Any

import _models
import torch
from torch import Tensor

VOCAB, BATCH, PROMPT, TARGET = 512, 2, 72, 24  # the prompt is longer than the models' sliding windows, 64
PADDING = 8
SIDE, PATCH, FIRST_IMAGE_TOKEN = 64, 16, 4
CACHED = ("text", "seq2seq", "audio", "vlm")  # these generate
DECODER = ("seq2seq", "audio")  # these read their own tokens as decoder_input_ids


def make(kind: str, model: Any) -> dict[str, Any]:
    """The first call's arguments, by the kind of ``_families.Family.inputs``."""
    ids = _models.token_ids(VOCAB, BATCH, PROMPT)
    noise = torch.Generator().manual_seed(0)
    if kind == "text":
        found: dict[str, Any] = {"input_ids": ids}
    elif kind == "encoder":  # the first row is padded
        mask = torch.ones_like(ids)
        mask[0, PROMPT // 2 :] = 0
        found = {"input_ids": ids, "attention_mask": mask}
    elif kind == "seq2seq":
        found = {"input_ids": ids, "decoder_input_ids": ids[:, :TARGET]}
    elif kind == "audio":
        frames = 2 * model.config.max_source_positions
        features = torch.randn(BATCH, model.config.num_mel_bins, frames, generator=noise)
        found = {"input_features": features, "decoder_input_ids": ids[:, :TARGET]}
    else:
        found = {"pixel_values": torch.randn(BATCH, 3, SIDE, SIDE, generator=noise)}
        if kind in ("clip", "vlm"):
            found["input_ids"] = ids
        if kind == "vlm":
            patches = (SIDE // PATCH) ** 2
            ids[:, FIRST_IMAGE_TOKEN : FIRST_IMAGE_TOKEN + patches] = model.config.image_token_index
    return typed(found, model)


def padded(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The same prompts for ``generate``: a causal model's first row is shorter, and padded on the left."""
    if kind != "text":
        return given
    mask = torch.ones_like(given["input_ids"])
    mask[0, :PADDING] = 0
    return {**given, "attention_mask": mask}


def grown(given: dict[str, Any], length: int) -> dict[str, Any]:
    """A padding mask for ``length`` tokens, of which those after the prompt are all there, and its positions."""
    if "attention_mask" not in given:
        return given
    mask = torch.nn.functional.pad(given["attention_mask"], (0, length - given["attention_mask"].shape[1]), value=1)
    return {**given, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def typed(values: dict[str, Any], model: Any) -> dict[str, Any]:
    """Floating-point values in the dtype of the model's parameters."""
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}


def following(kind: str, result: Any, first: Any, token: Tensor) -> dict[str, Any]:
    """The arguments of a call that reads one more ``token`` [B, 1] after ``result``; ``first`` is the first result."""
    if kind not in DECODER:
        return {"input_ids": token, "past_key_values": result.past_key_values}
    return {
        "decoder_input_ids": token,
        "past_key_values": result.past_key_values,
        "encoder_outputs": (first.encoder_last_hidden_state,),
    }


def answer(result: Any) -> Tensor:
    """What a model's result is judged by: logits, else hidden states, else both embeddings."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(result, name, None)
        if found is not None:
            return found
    return torch.cat((result.text_embeds, result.image_embeds))
