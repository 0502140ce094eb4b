"""softmax(q k^T * scale + mask) v, spelled out -> ``ascend.flash_attention``.

Before (``q: T[B, Hq, Sq, D]``, ``k, v: T[B, Hk, Sk, D]`` repeated to Hq heads; the steps between are optional)::

    s = matmul(q, permute(k, [0, 1, 3, 2])) * scale
    s = tanh(s / cap) * cap
    s = s + bias                                  # or masked_fill / where with -inf or finfo.min
    p = convert(_softmax(convert(s, float32), -1, False), T)
    y = matmul(p, v)

after: ``y = ascend.flash_attention(q, k, v, bias=, mask=, scale=, softcap=, empty_row=...)``. An additive bias stays
one, so a row of -inf gives NaN and a row of finfo.min the mean, as before; ``empty_row`` is about rows without a key.
The weights ``p`` never exist, so they must have no other use.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from .._calls import arg, arguments, ascend, aten, convert, dtype, is_call, leaks, lossless, rank, refuse, same_shape
from ..spellings.attention import SPELLINGS, fuzz_inputs
from .operands import common_dtype, emit, find_operand
from .read import PRODUCTS, leads_to_product
from .sdpa import check_operands
from .walk import Scores, walk_scores


class EagerAttention(ProceduralPattern):
    name = "eager_attention"
    level = 2
    benefit = 10
    anchors = (aten._softmax.default,)
    domain = Domain(shapes={"q": ("B", "Hq", "Sq", "D"), "k": ("B", "Hk", "Sk", "D"), "v": ("B", "Hk", "Sk", "Dv")})
    eager = SPELLINGS
    emits = frozenset({"ascend.flash_attention"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        call = arguments(anchor)
        scores = call["self"]
        if not leads_to_product(scores):
            return refuse(facts, "op", anchor, "a softmax of q k^T", "a softmax of something else")
        if call["dim"] not in (-1, rank(facts, scores) - 1):
            return refuse(facts, "arg", anchor, "softmax over the last axis", f"dim={call['dim']}", 0.2)
        down = _weighted_values(anchor, facts)
        if isinstance(down, NoMatch):
            return down
        output, v, after = down
        up = walk_scores(scores, facts)
        if isinstance(up, NoMatch):
            return up
        product, found = up
        q, kt = arg(product, 0), arg(product, 1)
        ranks = {rank(facts, n) for n in (q, kt, v, product)}
        if ranks not in ({3}, {4}):
            found_ranks = f"{sorted(ranks)} axes"
            return refuse(facts, "shape", product, "q, k, v all of three or all of four axes", found_ranks, 0.8)
        if not same_shape(facts, scores, product):
            return refuse(
                facts, "shape", anchor, "scores of the shape of q k^T", f"{list(facts.val(scores).shape)}", 0.8
            )
        kind = common_dtype(facts, q, kt, v)
        if isinstance(kind, NoMatch):
            return kind
        parts = [
            find_operand(facts, q),
            find_operand(facts, kt, swap=True, grouped=True),
            find_operand(facts, v, grouped=True),
        ]
        nodes = frozenset((anchor, *after, output, *found.nodes))
        refusal = check_operands(facts, anchor, parts) or leaks(facts, nodes, (output,), 0.95)
        if refusal is not None:
            return refusal
        inputs = {"q": parts[0], "k": parts[1], "v": parts[2], "scores": found, "dtype": kind}
        inputs["empty_row"], assumes = _empty_row(facts, found)
        return Match(self.name, anchor, nodes, inputs, (output,), assumes)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        s: Scores = m.inputs["scores"]
        q, k, v = (emit(b, m.inputs[name], m.inputs["dtype"]) for name in "qkv")
        shape = m.outputs[0].meta["val"].shape
        options: dict[str, Any] = {"scale": s.scale, "softcap": s.softcap, "empty_row": m.inputs["empty_row"]}
        if s.biases:
            total = s.biases[0]
            for other in s.biases[1:]:
                total = b.op(aten.add.Tensor, other, total)
            options["bias"] = _four_axes(b, total, len(shape))
        if s.masks:
            keeps = [m_ if keep else b.op(aten.logical_not.default, m_) for m_, keep in s.masks]
            total = keeps[0]
            for other in keeps[1:]:
                total = b.op(aten.logical_and.default, total, other)
            options["mask"] = _four_axes(b, total, len(shape))
        y = b.op(ascend.flash_attention.default, q, k, v, **options)
        return (y if len(shape) == 4 else b.op(aten.reshape.default, y, list(shape)),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return fuzz_inputs(rng, dtype, spelling)


def _weighted_values(softmax: fx.Node, facts: Facts) -> tuple[fx.Node, fx.Node, tuple[fx.Node, ...]] | NoMatch:
    """(p @ v, v, the casts in between) below a softmax."""
    n, casts = softmax, []
    while True:
        users = list(n.users)
        if len(users) != 1:
            found = ", ".join(f"%{u.name}" if u.op != "output" else "the graph's output" for u in users)
            fix = "do not return the attention weights (output_attentions=False)"
            return refuse(facts, "users", n, "weights used only by the product with v", found, 0.9, fix)
        (user,) = users
        if not is_call(user, convert):
            break
        casts.append(user)
        n = user
    if not is_call(user, *PRODUCTS) or arg(user, 0) is not n or not isinstance(arg(user, 1), fx.Node):
        found = "the graph's output" if user.op == "output" else f"{user.target}"
        return refuse(facts, "op", user, "a product of the weights with v", found, 0.4)
    v = arg(user, 1)
    narrow = next((c for c in casts if not lossless(dtype(facts, v), dtype(facts, c))), None)
    if narrow is not None or dtype(facts, n) != dtype(facts, v):
        found = f"{dtype(facts, narrow or n)}"
        fix = "cast the weights once, to the dtype of v"
        return refuse(facts, "dtype", narrow or n, f"weights rounded to {dtype(facts, v)} at most", found, 0.8, fix)
    return user, v, tuple(casts)


def _empty_row(facts: Facts, s: Scores) -> tuple[str, tuple[str, ...]]:
    """What a row without a visible key gives, and what that rests on."""
    if s.fill is not None:
        if s.fill == -math.inf:
            return "nan", ()
        return "uniform", ("scores are above finfo.min",)
    if s.biases and all(_finite(facts, bias) for bias in s.biases[:1]) and len(s.biases) == 1:
        return "zero", ("the bias is finite, so no row is empty",)
    return "nan", ()


def _finite(facts: Facts, bias: fx.Node) -> bool:
    """True if the bias is chosen between two finite constants: the usual mask of 0 and finfo.min."""
    n: Any = bias
    while is_call(n, aten.expand.default, aten.reshape.default, aten.permute.default, aten.slice.Tensor):
        n = arg(n, 0)
    if not is_call(n, aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf):
        return False
    return all(_finite_constant(facts, arguments(n)[side]) for side in ("self", "other"))


def _finite_constant(facts: Facts, x: Any) -> bool:
    if isinstance(x, (int, float)):
        return math.isfinite(x)
    value = facts.const(x) if isinstance(x, fx.Node) else None
    return value is not None and bool(torch.isfinite(value).all())


def _four_axes(b: Builder, n: fx.Node, dims: int) -> fx.Node:
    """A bias or mask of three-axis scores [B, Sq, Sk] gets the head axis."""
    shape = n.meta["val"].shape
    return n if dims == 4 or len(shape) < 3 else b.op(aten.reshape.default, n, [shape[0], 1, *shape[1:]])


PATTERNS = (EagerAttention(),)
