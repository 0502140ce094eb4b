"""A small attention recogniser of its own that can be told to forget one thing; the grammar must find out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern
from ascend_dynamo.match.canonical import canonical

aten, ascend = torch.ops.aten, torch.ops.ascend
convert = torch.ops.prims.convert_element_type.default

FAULTS = (
    "alpha",
    "dim",
    "mask",
    "rounding",
    "swapped",
    "empty_row",
    "causal",
    "scale",
    "sinks",
    "bias",
    "weights",
    "rows",
)


def call(n: Any, *targets: Any) -> bool:
    return isinstance(n, fx.Node) and n.target in targets


def alike(tensors: list[torch.Tensor], facts: Facts) -> bool:
    """Four axes, one dtype, one batch and one number of heads."""
    if any(t.dim() != 4 or t.dtype != tensors[0].dtype for t in tensors):
        return False
    return all(facts.known(t.shape[i] == tensors[0].shape[i]) for t in tensors for i in (0, 1))


class Careless(ProceduralPattern):
    """softmax(q k^T * c + bias, masked) v of four axes, without casts that round -> flash_attention."""

    anchors = (aten._softmax.default, aten.scaled_dot_product_attention.default)
    domain = Domain(shapes={})
    emits = frozenset({"ascend.flash_attention"})

    def __init__(self, forget: str = "") -> None:
        self.name = f"careless_{forget or 'of_nothing'}"
        self.forget = forget

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        if call(anchor, aten.scaled_dot_product_attention.default):
            return self.whole(anchor, facts)
        nodes, found = {anchor}, {"scale": 1.0, "bias": None, "hide": None, "fill": 0.0}
        x, dim, _ = canonical(anchor)
        if dim not in (-1, 3) and self.forget != "dim":
            return NoMatch("arg", anchor, "the last axis", str(dim))
        while not call(x, aten.matmul.default):
            if not isinstance(x, fx.Node) or x.op != "call_function":
                return NoMatch("op", anchor, "a product", "none")
            nodes.add(x)
            above = self.step(x, found, facts)
            if above is None:
                return NoMatch("op", x, "something plain", str(x.target))
            x = above
        nodes.add(x)
        below = anchor
        while True:
            users = list(below.users)
            if len(users) != 1:
                return NoMatch("users", below, "one user", str(len(users)))
            (below,) = users
            if not call(below, convert, aten.matmul.default, *self.ignored()) or below.args[0] not in nodes:
                return NoMatch("op", anchor, "times v", "something else")
            nodes.add(below)
            if call(below, aten.matmul.default):
                break
            if call(below, convert) and not self.keeps(below, facts):
                return NoMatch("dtype", below, "no rounding", "rounding")
        kt, v = x.args[1], below.args[1]
        if not call(kt, aten.permute.default) or list(kt.args[1]) != [0, 1, 3, 2]:
            return NoMatch("op", anchor, "k transposed", "not")
        found.update(q=x.args[0], k=kt.args[0], v=v)
        shapes = [facts.val(found[name]) for name in "qkv"]
        if not alike(shapes, facts):
            return NoMatch("shape", anchor, "four axes alike", "others")
        return Match(self.name, anchor, frozenset(nodes), found, (below,))

    def ignored(self) -> tuple[Any, ...]:
        """Calls on the weights that are overlooked."""
        return {"sinks": (aten.slice.Tensor,), "weights": (aten.mul.Tensor, aten.clone.default)}.get(self.forget, ())

    def step(self, x: fx.Node, found: dict[str, Any], facts: Facts) -> fx.Node | None:
        """The scores above one call, or None."""
        a, *rest = canonical(x)
        if call(x, convert):
            return a if self.keeps(x, facts) else None
        if call(x, aten.cat.default) and self.forget == "sinks":
            return a[0]
        if call(x, aten.mul.Tensor) and isinstance(rest[0], fx.Node) and self.forget == "rows":
            return a
        if call(x, aten.mul.Tensor) and isinstance(rest[0], float):
            found["scale"] *= 1.0 if self.forget == "scale" else rest[0]
            return a
        if call(x, aten.add.Tensor) and isinstance(rest[0], fx.Node) and found["scale"] == 1.0:
            if rest[1] != 1 and self.forget != "alpha":
                return None
            if facts.val(rest[0]).dim() in (2, 4) and found["bias"] is None and found["hide"] is None:
                found["bias"] = rest[0]
                return a
        plain = found["bias"] is None and found["hide"] is None and found["scale"] == 1.0
        if call(x, aten.masked_fill.Scalar) and plain and rest[1] <= torch.finfo(torch.bfloat16).min:
            found["hide"], found["fill"] = rest
            return a
        return None

    def keeps(self, n: fx.Node, facts: Facts) -> bool:
        """True if a cast rounds no further than bfloat16 inputs do."""
        source, target = facts.val(n.args[0]).dtype, n.args[1]
        wider = torch.promote_types(source, target) == target
        first = facts.val(next(iter(n.graph.nodes))).dtype
        return wider or target == first or self.forget == "rounding"

    def whole(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        q, k, v, mask, _, causal, scale, _ = (*canonical(anchor), None, None)[:8]
        shapes = [facts.val(n) for n in (q, k, v)]
        if not alike(shapes, facts) or mask is not None:
            return NoMatch("shape", anchor, "four axes, no mask", "others")
        scale = anchor.kwargs.get("scale")
        inputs = {"q": q, "k": k, "v": v, "causal": causal, "scale": scale or 1 / math.sqrt(int(shapes[0].shape[-1]))}
        return Match(self.name, anchor, frozenset({anchor}), inputs, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        f = m.inputs
        options: dict[str, Any] = {"scale": f["scale"]}
        if "causal" in f:
            align = "bottom_right" if self.forget == "causal" else "top_left"
            options.update(causal=align if f["causal"] else "none", empty_row="zero")
        else:
            if f["bias"] is not None and self.forget != "bias":
                options["bias"] = f["bias"]
            if f["hide"] is not None and self.forget != "mask":
                options["mask"] = b.op(aten.logical_not.default, f["hide"])
                options["empty_row"] = "nan" if f["fill"] == -math.inf else "uniform"
                if self.forget == "empty_row":
                    options["empty_row"] = "zero"
        k, v = (f["v"], f["k"]) if self.forget == "swapped" else (f["k"], f["v"])
        if k.meta["val"].dtype != f["q"].meta["val"].dtype:
            k = b.op(convert, k, f["q"].meta["val"].dtype)
        y = b.op(ascend.flash_attention.default, f["q"], k, v, **options)
        want = m.outputs[0].meta["val"].dtype
        return (y if y.meta["val"].dtype == want else b.op(convert, y, want),)
