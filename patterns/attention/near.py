"""Why a softmax is not attention: what stands above it in place of q k^T."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import LAYOUT, arg, aten, convert, is_call, rank, refuse
from .softmax import Softmax

NEAR = 0.3  # a softmax is worth a line in the report, whatever it is of; an exp that is none is not
_CARRIERS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self)


def no_product(s: Softmax, anchor: fx.Node, facts: Facts) -> NoMatch:
    """The reason for a softmax above which no product of two activations was found."""
    axes = f"axis {s.dim} of {rank(facts, s.scores)}"
    found = f"a softmax along {axes} of {_what(s.scores, facts)}"
    return refuse(facts, "op", anchor, "a softmax of q k^T", found, NEAR)


def _what(n: Any, facts: Facts) -> str:
    """What the scores are, in words."""
    while is_call(n, convert, *LAYOUT, *_CARRIERS):
        n = next((a for a in n.all_input_nodes), None)
    if not isinstance(n, fx.Node):
        return "numbers"
    if is_call(n, aten.linear.default) or is_call(n, aten.addmm.default):
        weight = arg(n, 1)
        return f"%{n.name}, a linear with the weight %{weight.name} (router logits, a classifier), no q k^T above it"
    if n.op == "placeholder":
        return f"the input %{n.name}, no q k^T above it"
    return f"%{n.name} = {n.target}(...), no q k^T above it"
