"""``aten.scaled_dot_product_attention`` (kept whole by capture) -> ``ascend.flash_attention``.

Before (``q: T[B, Hq, Sq, D]``, ``k: T[B, Hk, Sk, D]``, ``v: T[B, Hk, Sk, Dv]``)::

    k, v = repeat_kv(k), repeat_kv(v)                     # optional: expand + reshape
    y = scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=s, enable_gqa=g)

after: ``y = ascend.flash_attention(q, k, v, mask=|bias=, scale=s or 1/sqrt(D), causal=..., empty_row="zero")`` on the
key and value heads before they were repeated. ``is_causal`` aligns at the top left; a boolean mask keeps where it is
True; a row without a visible key is 0, as CPU attention has it. Dropout is refused.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from .._calls import arguments, ascend, aten, dtype, rank, refuse
from .operands import emit, find_operand, heads, sizes


def plain(q, k, v):  # type: ignore[no-untyped-def]
    return F.scaled_dot_product_attention(q, k, v)


def causal(q, k, v):  # type: ignore[no-untyped-def]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def boolean(q, k, v, mask):  # type: ignore[no-untyped-def]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def grouped(q, k, v):  # type: ignore[no-untyped-def]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(q, k, v):  # type: ignore[no-untyped-def]
    b, h, s, d = k.shape
    k, v = (t[:, :, None].expand(b, h, q.shape[1] // h, s, d).reshape(b, q.shape[1], s, d) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


class Sdpa(ProceduralPattern):
    name = "sdpa"
    level = 2
    benefit = 10
    anchors = (aten.scaled_dot_product_attention.default,)
    domain = Domain(shapes={"q": ("B", "Hq", "Sq", "D"), "k": ("B", "Hk", "Sk", "D"), "v": ("B", "Hk", "Sk", "D")})
    eager = (plain, causal, boolean, grouped, repeated)
    emits = frozenset({"ascend.flash_attention"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        call = arguments(anchor)
        q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
        if call["dropout_p"] != 0:
            found = f"dropout_p={call['dropout_p']}"
            return refuse(facts, "arg", anchor, "attention without dropout", found, 0.5, "call model.eval()")
        if not all(rank(facts, n) in (3, 4) for n in (q, k, v)) or len({rank(facts, n) for n in (q, k, v)}) != 1:
            found = ", ".join(f"{list(facts.val(n).shape)}" for n in (q, k, v))
            return refuse(facts, "shape", anchor, "q, k, v all of three or all of four axes", found, 0.3)
        if len({dtype(facts, n) for n in (q, k, v)}) != 1:
            return refuse(facts, "dtype", anchor, "q, k, v of one dtype", "several", 0.3)
        scale = call["scale"]
        if scale is None:
            d = facts.val(q).shape[-1]
            if not isinstance(d, int) or d == 0:
                return refuse(facts, "unproven", anchor, "a fixed head size, for 1/sqrt(D)", f"{d}", 0.5, "pass scale")
            scale = 1.0 / math.sqrt(d)
        parts = [find_operand(facts, n, grouped=name != "q") for name, n in (("q", q), ("k", k), ("v", v))]
        refusal = check_operands(facts, anchor, parts)
        if refusal is not None:
            return refusal
        inputs: dict[str, Any] = {"q": parts[0], "k": parts[1], "v": parts[2], "scale": float(scale)}
        inputs["causal"] = "top_left" if call["is_causal"] else "none"
        inputs["mask"] = mask
        return Match(self.name, anchor, frozenset((anchor,)), inputs, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        kind = m.anchor.meta["val"].dtype
        q, k, v = (emit(b, m.inputs[name], kind) for name in "qkv")
        mask = m.inputs["mask"]
        options: dict[str, Any] = {"scale": m.inputs["scale"], "causal": m.inputs["causal"], "empty_row": "zero"}
        if mask is not None:
            options["mask" if mask.meta["val"].dtype == torch.bool else "bias"] = _four_axes(b, mask, m.anchor)
        y = b.op(ascend.flash_attention.default, q, k, v, **options)
        shape = m.anchor.meta["val"].shape
        return (y if len(shape) == 4 else b.op(aten.reshape.default, y, list(shape)),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, sq, sk, d = rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([1, 4, 6]), rng.choice([2, 8])
        hk = rng.choice([1, 2])
        hq = hk * rng.choice([1, 3]) if spelling in (3, 4) else hk
        q, k = torch.randn(b, hq, sq, d, dtype=dtype), torch.randn(b, hk, sk, d, dtype=dtype)
        v = torch.randn(b, hk, sk, rng.choice([d, 4]) if spelling != 4 else d, dtype=dtype)
        return (q, k, v, torch.rand(b, 1, sq, sk) < 0.6) if spelling == 2 else (q, k, v)


def check_operands(facts: Facts, anchor: fx.Node, parts: list[Any]) -> NoMatch | None:
    """A refusal unless batch, heads and sizes of q, k and v are known to fit ``flash_attention``."""
    (bq, _, dq), (bk, sk, dk), (bv, sv, _) = (sizes(facts, p.node, p.swap) for p in parts)
    for what, a, b in (("batch", bq, bk), ("batch", bk, bv), ("head size", dq, dk), ("key count", sk, sv)):
        if not facts.known(a == b):
            return refuse(facts, "shape", anchor, f"one {what} of q, k and v", f"{a} and {b}", 0.7)
    hq, hk, hv = (heads(facts, p) for p in parts)
    if not (facts.known(hk == hv) and facts.known(hq % hk == 0)):
        found = f"{hq}, {hk} and {hv} heads"
        return refuse(facts, "shape", anchor, "as many heads in k as in v, dividing those of q", found, 0.7)
    return None


def _four_axes(b: Builder, mask: fx.Node, anchor: fx.Node) -> fx.Node:
    """A mask of a three-axis attention gets the head axis."""
    shape = mask.meta["val"].shape
    if anchor.meta["val"].dim() == 4 or len(shape) < 3:
        return mask
    return b.op(aten.reshape.default, mask, [shape[0], 1, *shape[1:]])


PATTERNS = (Sdpa(),)
