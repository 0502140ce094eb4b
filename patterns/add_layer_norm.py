"""Residual add + LayerNorm -> ``ascend.add_layer_norm``.

Before (``x, residual: T[*B, H]``, ``w, b: T[H]`` or None)::

    h = x + residual
    y = aten.layer_norm(h, [H], w, b, eps)

after::

    y, h = ascend.add_layer_norm(x, residual, w, b, eps)

BERT (post-norm: ``h`` dies) and GPT-2 (pre-norm: ``h`` lives on) are both this; so is OPT, which reshapes ``h`` to
``[-1, H]`` before the norm. Bit exact.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arguments, ascend, aten, refuse
from ._residual import above_reshape, match_outputs, outputs, residual_add


def post_norm(x, residual, w, b):  # type: ignore[no-untyped-def]
    return F.layer_norm(x + residual, (x.shape[-1],), w, b, 1e-12)


def pre_norm(x, residual, w, b):  # type: ignore[no-untyped-def]
    h = residual + x
    return F.layer_norm(h, (x.shape[-1],), w, b), h


def flattened(x, residual, w, b):  # type: ignore[no-untyped-def]
    h = (residual + x).reshape(-1, x.shape[-1])
    return F.layer_norm(h, (x.shape[-1],), w, b), h


class AddLayerNorm(ProceduralPattern):
    name = "add_layer_norm"
    level = 1
    benefit = 3
    anchors = (aten.layer_norm.default,)
    domain = Domain(shapes={"x": ("*B", "H"), "residual": ("*B", "H"), "w": ("H",), "b": ("H",)})
    eager = (post_norm, pre_norm, flattened)
    emits = frozenset({"ascend.add_layer_norm"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        norm = arguments(anchor)
        h, between = above_reshape(facts, norm["input"], 1)
        if len(norm["normalized_shape"]) != 1:
            found = f"normalized_shape {list(norm['normalized_shape'])}"
            return refuse(facts, "arg", anchor, "a norm over the last axis only", found, 0.3)
        operands = residual_add(facts, anchor, h)
        if isinstance(operands, NoMatch):
            return operands
        inputs = {"x": operands[0], "residual": operands[1], "reshaped": bool(between)}
        inputs |= {key: norm[key] for key in ("weight", "bias", "eps")}
        nodes = frozenset((h, anchor, *between))
        return Match(self.name, anchor, nodes, inputs, match_outputs(anchor, h, between))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        keys = ("x", "residual", "weight", "bias", "eps")
        return outputs(b, m, b.op(ascend.add_layer_norm.default, *(m.inputs[key] for key in keys)))

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        shape = (rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([2, 7, 16]))
        vectors = (torch.randn(shape[-1], dtype=dtype), torch.randn(shape[-1], dtype=dtype))
        return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), *vectors


PATTERNS = (AddLayerNorm(),)
