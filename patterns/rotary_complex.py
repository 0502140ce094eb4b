"""Rotary embedding spelled as a complex product (Llama's original) -> ``ascend.rotary(..., interleaved=True)``.

Before (``x: f32[B, S, N, 2K]``, ``f: c64[B|1, S, 1, K]``)::

    z = view_as_complex(reshape(x, [B, S, N, K, 2]))
    y = reshape(view_as_real(z * f), [B, S, N, 2K])

after: ``y = ascend.rotary(x, cos, sin, interleaved=True)`` with the real and imaginary parts of ``f``, each twice. The
complex kernel may fuse its multiply-adds: level 2. Casts around it stay as they are.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, ascend, aten, commuted, is_call, leaks, refuse
from ._rotary import broadcast_table, flattens_pairs


def llama_original(x, angles):  # type: ignore[no-untyped-def]
    f = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * f).flatten(3)


class RotaryComplex(ProceduralPattern):
    name = "rotary_complex"
    level = 2
    benefit = 4
    anchors = (aten.view_as_real.default,)
    domain = Domain((torch.float32, torch.float64), shapes={"x": ("B", "S", "N", "2*K"), "angles": ("B", "S", "K")})
    eager = (llama_original,)
    emits = frozenset({"ascend.rotary"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        product = arg(anchor, 0)
        flat = next(iter(anchor.users), anchor)
        if not is_call(product, aten.mul.Tensor) or len(anchor.users) != 1 or not is_call(flat, aten.reshape.default):
            return refuse(facts, "op", anchor, "view_as_real(z * f) flattened", "another use of view_as_real")
        found = next(((z, f) for z, f in commuted(product) if _pairs(facts, z) and isinstance(f, fx.Node)), None)
        if found is None:
            return refuse(facts, "op", anchor, "a product with view_as_complex of pairs", "other factors", 0.3)
        z, f = found
        pairs = arg(z, 0)
        x = arg(pairs, 0)
        if not flattens_pairs(facts, flat, anchor):
            return refuse(facts, "shape", flat, "the pairs flattened back", f"{list(facts.val(flat).shape)}", 0.6)
        if not facts.val(f).is_complex():
            return refuse(facts, "dtype", f, "complex factors", f"{facts.val(f).dtype}", 0.6)
        refusal = broadcast_table(facts, anchor, z, f)
        nodes = frozenset((flat, anchor, product, z, pairs))
        refusal = refusal or leaks(facts, nodes, (flat,), 0.9)
        if refusal:
            return refusal
        return Match(self.name, anchor, nodes, {"x": x, "f": f}, (flat,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        x, f = m.inputs["x"], m.inputs["f"]
        *lead, k = f.meta["val"].shape
        last = len(lead) + 1
        pairs = b.op(aten.view_as_real.default, f)
        tables: list[fx.Node] = []
        for i in (0, 1):
            part = b.op(aten.slice.Tensor, pairs, last, i, i + 1, 1)
            twice = b.op(aten.cat.default, [part, part], last)
            tables.append(b.op(aten.reshape.default, twice, [*lead, 2 * k]))
        return (b.op(ascend.rotary.default, x, *tables, interleaved=True),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, s, k = rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([1, 3, 4])
        x = torch.randn((b, s, rng.choice([1, 3]), 2 * k), dtype=dtype)
        return x, torch.randn((rng.choice([1, b]), s, k), dtype=dtype)


def _pairs(facts: Facts, z: Any) -> bool:
    """True if ``z`` is view_as_complex of ``x`` with its last axis cut into pairs."""
    if not is_call(z, aten.view_as_complex.default):
        return False
    pairs = arg(z, 0)
    return is_call(pairs, aten.reshape.default) and flattens_pairs(facts, arg(pairs, 0), pairs)


PATTERNS = (RotaryComplex(),)
