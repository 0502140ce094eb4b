"""Rotary embedding spelled as a complex product (Llama's original, DeepSeek-V2) -> ``ascend.rotary(interleaved=True)``.

Before (``p: f32[*A, K, 2]``, usually a reshaped ``x: f32[*A, 2K]``; ``f: c64`` that broadcasts to ``[*A, K]``)::

    y = view_as_real(view_as_complex(p) * f)                       # [*A, K, 2], usually flattened next

after: ``y = ascend.rotary(reshape(p, [*A, 2K]), cos, sin, interleaved=True)`` in the shape of ``y``, with the real and
imaginary parts of ``f``, each twice. The complex kernel may fuse its multiply-adds: level 2. Casts around it stay as
they are.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, ascend, aten, commuted, is_call, leaks, refuse
from ._rotary import broadcast_table


def llama_original(x, angles):  # type: ignore[no-untyped-def]
    f = torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * f).flatten(3)


def deepseek_keys(x, angles):  # type: ignore[no-untyped-def]
    f = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    k = x.reshape(x.shape[0], 1, -1, x.shape[-1])
    return torch.view_as_real(torch.view_as_complex(k.reshape(*k.shape[:-1], -1, 2)) * f).flatten(3)


class RotaryComplex(ProceduralPattern):
    name = "rotary_complex"
    level = 2
    benefit = 4
    anchors = (aten.view_as_real.default,)
    domain = Domain((torch.float32, torch.float64), shapes={"x": ("B", "S", "N", "2*K"), "angles": ("B", "S", "K")})
    eager = (llama_original, deepseek_keys)
    emits = frozenset({"ascend.rotary"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        product = arg(anchor, 0)
        if not is_call(product, aten.mul.Tensor):
            return refuse(facts, "op", anchor, "view_as_real(z * f)", "view_as_real of something else")
        pairs = ((z, f) for z, f in commuted(product) if is_call(z, aten.view_as_complex.default))
        found = next(((z, f) for z, f in pairs if isinstance(f, fx.Node)), None)
        if found is None:
            return refuse(facts, "op", anchor, "a product with view_as_complex of pairs", "other factors", 0.3)
        z, f = found
        if not facts.val(f).is_complex() or facts.val(f).dtype != facts.val(z).dtype:
            return refuse(facts, "dtype", f, f"factors of {facts.val(z).dtype}", f"{facts.val(f).dtype}", 0.6)
        refusal = broadcast_table(facts, anchor, z, f)
        users = list(anchor.users)
        last = users[0] if len(users) == 1 and is_call(users[0], aten.reshape.default) else anchor
        p = arg(z, 0)
        source = arg(p, 0) if is_call(p, aten.reshape.default) else p
        nodes = frozenset((last, anchor, product, z))
        refusal = refusal or leaks(facts, nodes, (last,), 0.9)
        if refusal:
            return refusal
        *axes, k, _ = facts.val(p).shape
        flat = [*axes, 2 * k]
        inputs = {
            "x": source,
            "f": f,
            "flat": flat,
            "reshape": (_differ(facts, source, flat), _differ(facts, last, flat)),
        }
        return Match(self.name, anchor, nodes, inputs, (last,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        x, f, flat = (m.inputs[key] for key in ("x", "f", "flat"))
        before, after = m.inputs["reshape"]
        x = b.op(aten.reshape.default, x, flat) if before else x
        *lead, k = f.meta["val"].shape
        last = len(lead) + 1
        parts = b.op(aten.view_as_real.default, f)
        tables: list[fx.Node] = []
        for i in (0, 1):
            part = b.op(aten.slice.Tensor, parts, last, i, i + 1, 1)
            twice = b.op(aten.cat.default, [part, part], last)
            tables.append(b.op(aten.reshape.default, twice, [*lead, 2 * k]))
        y = b.op(ascend.rotary.default, x, *tables, interleaved=True)
        return (b.op(aten.reshape.default, y, list(m.outputs[0].meta["val"].shape)) if after else y,)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, s, k = rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([1, 3, 4])
        x = torch.randn((b, s, rng.choice([1, 3]) if spelling == 0 else 1, 2 * k), dtype=dtype)
        return x, torch.randn((rng.choice([1, b]), s, k), dtype=dtype)


def _differ(facts: Facts, n: fx.Node, shape: list[Any]) -> bool:
    have = facts.val(n).shape
    return len(have) != len(shape) or not all(facts.known(s == t) for s, t in zip(have, shape, strict=True))


PATTERNS = (RotaryComplex(),)
