"""Residual add + RMSNorm -> ``ascend.add_rms_norm``.

Before (``x, residual: T[*B, H]``, ``w: T[H]``; ``h`` is used again by the next residual add, or is an output)::

    h = x + residual
    y = ascend.rms_norm(h, w, eps, ...)

after::

    y, h = ascend.add_rms_norm(x, residual, w, eps, ...)

``y`` is computed from the rounded ``h``, as before: bit exact. The sum may have any number of other users; of two
norms that read one sum the first in program order takes it.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arguments, ascend
from ._residual import above_reshape, match_outputs, outputs, residual_add


def llama_stream(x, residual, w):  # type: ignore[no-untyped-def]
    h = residual + x
    n = h.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * n.to(h.dtype), h


def gemma_branch(x, residual, w):  # type: ignore[no-untyped-def]
    h = x + residual
    n = h.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (n * (1.0 + w.float())).type_as(h)


def flattened(x, residual, w):  # type: ignore[no-untyped-def]
    h = (x + residual).reshape(-1, x.shape[-1])
    n = h.float()
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * n.to(h.dtype), h


class AddRmsNorm(ProceduralPattern):
    name = "add_rms_norm"
    level = 1
    benefit = 3
    anchors = (ascend.rms_norm.default,)
    domain = Domain(shapes={"x": ("*B", "H"), "residual": ("*B", "H"), "w": ("H",)})
    eager = (llama_stream, gemma_branch, flattened)
    emits = frozenset({"ascend.add_rms_norm"})
    after = frozenset({"rms_norm", "rms_norm_reordered", "aten_rms_norm"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        norm = arguments(anchor)
        h, between = above_reshape(facts, norm.pop("x"), norm["ndim"])
        found = residual_add(facts, anchor, h)
        if isinstance(found, NoMatch):
            return found
        inputs = {"x": found[0], "residual": found[1], "norm": norm, "reshaped": bool(between)}
        nodes = frozenset((h, anchor, *between))
        return Match(self.name, anchor, nodes, inputs, match_outputs(anchor, h, between))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        rest = dict(m.inputs["norm"])
        weight, eps = rest.pop("weight"), rest.pop("eps")
        return outputs(
            b, m, b.op(ascend.add_rms_norm.default, m.inputs["x"], m.inputs["residual"], weight, eps, **rest)
        )

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        shape = (rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([2, 7, 16]))
        return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)


PATTERNS = (AddRmsNorm(),)
