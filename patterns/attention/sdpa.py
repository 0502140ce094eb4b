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
from ..spellings.grammar import ATTENTION
from .cache import cache_notes
from .frame import Frame
from .groups import Groups, find_groups
from .operands import Operand, emit, find_operand
from .visible import Visible, visible_in_sdpa


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
    grammar = ATTENTION

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        call = arguments(anchor)
        q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
        if call["dropout_p"] != 0:
            found = f"dropout_p={call['dropout_p']}"
            return refuse(facts, "arg", anchor, "attention without dropout", found, 0.5, "call model.eval()")
        if call["is_causal"] and mask is not None:
            fix = "make the mask causal and leave is_causal out"
            return refuse(facts, "arg", anchor, "a mask or is_causal", "both, which ATen does not define", 0.5, fix)
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
        frame = Frame(facts)
        parts = _operands(frame, q, k, v, bool(call["enable_gqa"]), anchor)
        if isinstance(parts, NoMatch):
            return parts
        inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "frame": frame, "parts": parts}
        inputs["scale"] = float(scale)
        seen = Visible("top_left" if call["is_causal"] else "none", empty_row="zero")
        if mask is not None:
            seen = visible_in_sdpa(facts, mask, (*facts.val(q).shape[:-1], facts.val(k).shape[-2]))
        inputs["seen"] = seen
        inputs["operands"] = [*(x.node for x in seen.masks), *(x.node for x in seen.biases)]
        level = (*facts.val(q).shape[:-1], facts.val(k).shape[-2])
        inputs["axes"] = [frame.aligned(facts.val(n).shape, parts[3], level) for n in inputs["operands"]]
        if None in inputs["axes"]:
            found = ", ".join(f"{list(facts.val(n).shape)}" for n in inputs["operands"])
            return refuse(facts, "shape", anchor, "a mask that broadcasts to the scores", found, 0.7)
        notes = (*seen.notes, *cache_notes(facts, (k, -2), (v, -2)))
        return Match(self.name, anchor, frozenset((anchor,)), inputs, (anchor,), notes, seen.computed)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        kind = m.anchor.meta["val"].dtype
        frame, (operands, g, columns, level) = m.inputs["frame"], m.inputs["parts"]
        q, k, v = operands
        seen: Visible = m.inputs["seen"]
        options: dict[str, Any] = {"scale": m.inputs["scale"], "causal": seen.causal, "empty_row": seen.empty_row}
        if seen.window >= 0:
            options["window"] = seen.window
        at = dict(zip(m.inputs["operands"], m.inputs["axes"], strict=True))
        for x in seen.masks:
            keep = x.node if x.keep else b.op(aten.logical_not.default, x.node)
            keep = frame.emit(b, keep, at[x.node], g.scores)
            options["mask"] = b.op(aten.logical_and.default, options["mask"], keep) if "mask" in options else keep
        for bias in seen.biases:
            options["bias"] = frame.emit(b, bias.node, at[bias.node], g.scores)
        y = b.op(
            ascend.flash_attention.default,
            emit(b, frame, q, (g.batch, g.heads, g.rows, q.features), kind),
            emit(b, frame, k, (g.batch, g.key_heads, g.keys, k.features), kind),
            emit(b, frame, v, (g.batch, g.key_heads, g.keys, v.features), kind),
            **options,
        )
        return (frame.emit(b, y, (g.batch, g.heads, g.rows, columns), (*level[:-1], columns), fill=True),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        b, sq, sk, d = rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([1, 4, 6]), rng.choice([2, 8])
        hk = rng.choice([1, 2])
        hq = hk * rng.choice([1, 3]) if spelling in (3, 4) else hk
        q, k = torch.randn(b, hq, sq, d, dtype=dtype), torch.randn(b, hk, sk, d, dtype=dtype)
        v = torch.randn(b, hk, sk, rng.choice([d, 4]) if spelling != 4 else d, dtype=dtype)
        return (q, k, v, torch.rand(b, 1, sq, sk) < 0.6) if spelling == 2 else (q, k, v)


_Parts = tuple[tuple[Operand, Operand, Operand], Groups, Any, Any]


def _operands(frame: Frame, q: fx.Node, k: fx.Node, v: fx.Node, gqa: bool, anchor: fx.Node) -> _Parts | NoMatch:
    """q, k and v, the roles of their axes, the columns of v, the axes of the scores; a refusal if sizes may not fit."""
    facts = frame.facts
    shapes = [facts.val(n).shape for n in (q, k, v)]
    (*bq, sq, dq), (*bk, sk, dk), (*bv, sv, dv) = shapes
    if not facts.known(dq == dk):
        return refuse(facts, "shape", anchor, "one head size of q and k", f"{dq} and {dk}", 0.7)
    # Attention with another number of values than keys has no meaning (the kernel reads past the shorter of them), so
    # their equality need not be proven: the keys and values of a growing cache have a symbol each.
    if facts.known(sk != sv):
        return refuse(facts, "shape", anchor, "as many values as keys", f"{sv} and {sk}", 0.7)
    for what, a, b in [*(("batch", a, b) for x in (bk, bv) for a, b in zip(bq[:1], x[:1], strict=True))]:
        if not facts.known(a == b):
            return refuse(facts, "shape", anchor, f"one {what} of q, k and v", f"{a} and {b}", 0.7)
    (features,), (columns,) = frame.fresh([dq]), frame.fresh([dv])
    level = frame.fresh([*bq, sq, sk])
    stored = level[:-2]
    if len(bq) == 2 and not all(facts.known(bq[1] == x[1]) for x in (bk, bv)):
        # One head of keys broadcasts (Falcon's multi-query attention); several serve groups only by enable_gqa.
        grouped = facts.known(bk[1] == 1) or (gqa and _divides(facts, bq[1], bk[1]))
        pair = frame.split(level[1], [bk[1], bq[1] // bk[1]]) if grouped else None
        if pair is None or not facts.known(bk[1] == bv[1]):
            found = f"{bq[1]}, {bk[1]} and {bv[1]} heads"
            return refuse(facts, "shape", anchor, "as many heads in k as in v, dividing those of q", found, 0.7)
        stored = (level[0], pair[0])
    operands = (
        find_operand(frame, q, (*level[:-2], level[-2], features), features),
        find_operand(frame, k, (*stored, level[-1], features), features, grouped=True),
        find_operand(frame, v, (*stored, level[-1], columns), columns, grouped=True),
    )
    held = operands[1].atoms(frame) | operands[2].atoms(frame)
    groups = find_groups(frame, level, len(level) - 1, held, (level[-2],), set())
    return operands, groups, columns, level


def _divides(facts: Facts, a: Any, b: Any) -> bool:
    return facts.known(a % b == 0)


PATTERNS = (Sdpa(),)
