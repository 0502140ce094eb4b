"""``aten.rms_norm`` (``F.rms_norm``, kept whole by capture) -> ``ascend.rms_norm``.

Before (``x: T[*B, *N]``, ``w: T[*N]`` or None): ``y = aten.rms_norm(x, [*N], w, eps)``; after:
``y = ascend.rms_norm(x, w, eps, ndim=len(N), compute=C)`` with ``C`` float32 for half types and ``T`` otherwise.
ATen multiplies by the weight before it rounds to ``T``. ``eps=None`` means the machine epsilon of ``C``.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arguments, ascend, aten, dtype, refuse

HALF = (torch.bfloat16, torch.float16)


def last_axis(x, w):  # type: ignore[no-untyped-def]
    return F.rms_norm(x, (x.shape[-1],), w, 1e-5)


def default_eps(x, w):  # type: ignore[no-untyped-def]
    return F.rms_norm(x, (x.shape[-1],), w)


def two_axes(x, w):  # type: ignore[no-untyped-def]
    return F.rms_norm(x, tuple(x.shape[-2:]), w, 1e-6)


class AtenRmsNorm(ProceduralPattern):
    name = "aten_rms_norm"
    level = 1
    benefit = 1
    anchors = (aten.rms_norm.default,)
    domain = Domain(shapes={"x": ("*B", "H"), "w": ("H",)})
    eager = (last_axis, default_eps, two_axes)
    emits = frozenset({"ascend.rms_norm"})
    before = frozenset({"add_rms_norm"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        call = arguments(anchor)
        x, weight, eps = call["input"], call["weight"], call["eps"]
        kind = dtype(facts, x)
        if weight is not None and dtype(facts, weight) != kind:
            found = f"weight of {dtype(facts, weight)}, input of {kind}"
            return refuse(facts, "dtype", anchor, "weight and input of one dtype", found, 0.5, "cast the weight")
        compute = torch.float32 if kind in HALF else kind
        inputs = {"x": x, "weight": weight, "eps": torch.finfo(compute).eps if eps is None else eps}
        inputs |= {"ndim": len(call["normalized_shape"]), "compute": compute}
        return Match(self.name, anchor, frozenset((anchor,)), inputs, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        x, weight, eps, ndim, compute = (m.inputs[k] for k in ("x", "weight", "eps", "ndim", "compute"))
        return (b.op(ascend.rms_norm.default, x, weight, eps, ndim=ndim, compute=compute),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        shape = (rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([2, 7, 16]))
        weight = torch.randn(shape[-2:] if spelling == 2 else shape[-1:], dtype=dtype)
        return torch.randn(shape, dtype=dtype), weight


PATTERNS = (AtenRmsNorm(),)
