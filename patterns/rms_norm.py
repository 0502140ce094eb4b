"""RMSNorm spelled by hand -> ``ascend.rms_norm``.

Before (Llama, ``x: bf16[*B, H]``, ``w: bf16[H]``)::

    h = convert(x, float32)
    r = rsqrt(mean(h * h, [-1], True) + eps)
    y = w * convert(h * r, bf16)

after: ``y = ascend.rms_norm(x, w, eps, cast_before_weight=True)``.

Where the weight enters changes the rounding (a quarter of all bf16 elements), so it is read off the graph: after the
cast back (Llama; T5's ``x * r`` promotes ``x`` and is the same arithmetic), before it (OLMo, gpt-oss), as ``1 + w``
(Gemma), in ``x``'s own dtype without any cast, or not at all. A root *rounded* to ``x.dtype`` before the product is
none of these. ``rms_norm`` is bit exact; ``rms_norm_reordered`` takes ``x / sqrt(..)`` and ``sum / n``, which round
otherwise.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Level, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, ascend, aten, commuted, convert, dtype, is_call, leaks, lossless, refuse, same_shape
from ._rms import statistic, weighted
from .spellings import rms_norm as spellings


class RmsNorm(ProceduralPattern):
    name = "rms_norm"
    level: Level = 1
    benefit = 4
    anchors: tuple[Any, ...] = (aten.rsqrt.default,)
    reads = (aten.mul.Tensor, aten.add.Tensor, aten.mean.dim, aten.sum.dim_IntList, convert)
    depth = 5
    domain = Domain(shapes={"x": ("*B", "H"), "w": ("H",)})
    eager: tuple[Any, ...] = spellings.EXACT
    emits = frozenset({"ascend.rms_norm"})
    before = frozenset({"add_rms_norm"})
    exact = True

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        stat = statistic(facts, anchor)
        if isinstance(stat, NoMatch):
            return stat
        product = _normalised(facts, anchor, stat.h)
        if isinstance(product, NoMatch):
            return product
        n, between, exact = product
        if self.exact != (exact and stat.exact):
            other = "rms_norm_reordered" if self.exact else "rms_norm"
            return refuse(facts, "level", n, "the reference's own order of operations", f"a case for {other}", 0.9)
        x, casts = stat.h, []
        if is_call(x, convert) and lossless(dtype(facts, arg(x, 0)), dtype(facts, x)):
            # A cast that others read stays for them; what the norm reads is its source.
            inside = {*stat.nodes, *between, n}
            casts = [x] if all(u in inside for u in x.users) else []
            x = arg(x, 0)
        sizes = tuple(facts.val(x).shape[-stat.ndim :])
        tail = weighted(facts, n, dtype(facts, x), sizes)
        nodes = frozenset((*stat.nodes, *between, *casts, n, *tail.nodes))
        leak = leaks(facts, nodes, (tail.last,), 0.9)
        if leak is not None:
            return leak
        out = dtype(facts, tail.last)
        options: dict[str, Any] = {"compute": dtype(facts, n), "cast_before_weight": tail.cast_first}
        options |= {"ndim": stat.ndim, "weight_offset": tail.offset, "out": None if out == dtype(facts, x) else out}
        inputs = {"x": x, "weight": tail.weight, "eps": stat.eps, "options": options}
        return Match(self.name, anchor, nodes, inputs, (tail.last,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        defaults = {"compute": torch.float32, "cast_before_weight": False, "ndim": 1, "weight_offset": 0.0, "out": None}
        options = {k: v for k, v in m.inputs["options"].items() if v != defaults[k]}
        x, weight, eps = m.inputs["x"], m.inputs["weight"], m.inputs["eps"]
        return (b.op(ascend.rms_norm.default, x, weight, eps, **options),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        shape = (rng.choice([1, 2]), rng.choice([1, 3, 5]), rng.choice([2, 7, 16]))
        return torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype), 10 ** rng.uniform(-8, -2)


class RmsNormReordered(RmsNorm):
    name = "rms_norm_reordered"
    level = 2
    anchors = (aten.rsqrt.default, aten.sqrt.default)
    # The spellings round a float64 input to float32 inside; another order there is not within float64's tolerance.
    domain = Domain((torch.float32, torch.bfloat16, torch.float16), shapes=RmsNorm.domain.shapes)
    eager = spellings.REORDERED
    exact = False


def _normalised(facts: Facts, root: fx.Node, h: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], bool] | NoMatch:
    """(n, calls between root and n, in the reference's order) of ``n = h * rsqrt(..)``, ``h / sqrt(..)`` and the like.

    ``h`` may be taken before its upcast: the product with the root promotes it.
    """
    source = arg(h, 0) if is_call(h, convert) and lossless(dtype(facts, arg(h, 0)), dtype(facts, h)) else h
    exact = is_call(root, aten.rsqrt.default)
    between: tuple[fx.Node, ...] = ()
    users = list(root.users)
    if len(users) == 1 and is_call(users[0], aten.reciprocal.default) and not exact:
        between, root = (users[0],), users[0]
        users = list(root.users)
    inverse = exact or bool(between)
    if len(users) != 1:
        found = f"{len(users)} users"
        return refuse(facts, "users", root, "a root used by one product", found, 0.6, "do not reuse the statistic")
    (n,) = users
    if is_call(n, convert) and not lossless(dtype(facts, root), dtype(facts, n)):
        found = f"the root rounded to {dtype(facts, n)}"
        fix = "multiply in float32 and cast the product"
        return refuse(facts, "dtype", n, "a product in the dtype of the root", found, 0.7, fix)
    pairs = commuted(n) if is_call(n, aten.mul.Tensor) and inverse else ()
    if is_call(n, aten.div.Tensor) and not inverse:
        pairs = ((arg(n, 0), arg(n, 1)),)  # type: ignore[assignment]
    if not any(y in (h, source) and r is root for y, r in pairs):
        return refuse(facts, "op", n, "the input times the reciprocal root", f"{n.target} of something else", 0.6)
    if dtype(facts, n) != dtype(facts, h) or not same_shape(facts, n, h):
        return refuse(facts, "dtype", n, f"a product in {dtype(facts, h)}", f"{dtype(facts, n)}", 0.7)
    return n, between, exact


PATTERNS = (RmsNorm(), RmsNormReordered())
