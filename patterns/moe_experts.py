"""The experts of a mixture, applied to the tokens that chose them -> ``ascend.moe_experts``.

Before, sorted by expert (``x: T[N, H]``, ``ids: i64[N, k]``, ``w_gate_up: T[E, 2I, H]``, ``w_down: T[E, H, I]``)::

    by_expert, perm = sort(reshape(ids, [N * k]))
    offs = cumsum(histc(by_expert, E, 0, E - 1), int32)
    h = _grouped_mm(x[perm // k], permute(w_gate_up), offs)          # + b_gate_up[by_expert]
    y = _grouped_mm(act(gate of h) * up of h, permute(w_down), offs)  # + b_down[by_expert]
    y = (y * reshape(weights, [N * k])[perm])[inverse of perm]
    y = sum(reshape(y, [N, k, H]), [-2])                             # or index_add by token

or with a copy of its expert's weights per slot (``matmul(w_gate_up[ids], x)``), rows in token order. After::

    y = ascend.moe_experts(x, weights, ids, w_gate_up, w_down, activation=...)

The ids must be known to lie in [0, E): eager wraps negative ones and misplaces rows of others. A permutation counts as
undone only where it provably is, and both products must go by the same ids.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, arguments, ascend, aten, commuted, dtype, is_call, leaks, rank, refuse, same_shape
from ._experts import Slots
from ._experts_products import Product, read_gate, read_product, sum_in
from .spellings.experts import SPELLINGS, fuzz_inputs

_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


class MoeExperts(ProceduralPattern):
    name = "moe_experts"
    level = 2
    benefit = 9
    anchors = (aten.sum.dim_IntList, aten.index_add.default)
    domain = Domain(dtypes=(torch.bfloat16,), shapes={"x": ("T", "H")})
    users = "duplicate"  # zeros and aranges are shared between layers; `leaks` guards the rest
    eager = SPELLINGS
    emits = frozenset({"ascend.moe_experts"})
    before = frozenset({"swiglu", "gelu_mul"})
    after = frozenset({"silu"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        start = _added(anchor, facts) if is_call(anchor, aten.index_add.default) else _summed(anchor, facts)
        if isinstance(start, NoMatch):
            return start
        slots, rows = start
        slots.seen(anchor)
        weighted = _weighted(slots, rows)
        if isinstance(weighted, NoMatch):
            return weighted
        rows, weights = weighted
        down = read_product(slots, rows)
        if isinstance(down, NoMatch):
            return down
        if down.spread:
            return refuse(facts, "shape", anchor, "activations of each chosen expert", "one row per token", 0.6)
        gate = read_gate(slots, down.rows)
        if isinstance(gate, NoMatch):
            return gate
        up = read_product(slots, gate.source)
        if isinstance(up, NoMatch):
            return up
        x = slots.tokens_of(up.rows, spread=up.spread)
        if x is None or slots.ids is None:
            return refuse(facts, "op", anchor, "rows of x, each for the k experts of its token", "others", 0.8)
        refusal = _shapes(facts, anchor, x, up, down) or slots.why_ids(facts.val(up.weight).shape[0])
        if refusal is not None:
            return refusal
        output = sum_in(facts, anchor, dtype(facts, x))
        if isinstance(output, NoMatch):
            return output
        slots.seen(output)
        refusal = leaks(facts, slots.core, (output,), 0.95)
        if refusal is not None:
            return refusal
        inputs = {"x": x, "weights": weights, "ids": slots.ids, "up": up, "down": down, "options": gate.options}
        inputs |= {"tokens": slots.tokens, "k": slots.top_k}
        nodes = frozenset((*slots.core, *slots.shared))
        return Match(self.name, anchor, nodes, inputs, (output,), ("every id is below the number of experts",))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        up, down, k = m.inputs["up"], m.inputs["down"], m.inputs["k"]
        x = m.inputs["x"]
        width = x.meta["val"].shape[-1]
        tokens = m.inputs["tokens"]
        flat = x if x.meta["val"].dim() == 2 else b.op(aten.reshape.default, x, [tokens, width])
        weights, ids = (
            n if n.meta["val"].dim() == 2 else b.op(aten.reshape.default, n, [tokens, k])
            for n in (m.inputs["weights"], m.inputs["ids"])
        )
        options = dict(m.inputs["options"])
        options |= {"b_gate_up": up.bias} if up.bias is not None else {}
        options |= {"b_down": down.bias} if down.bias is not None else {}
        w_up, w_down = _rows_first(b, up), _rows_first(b, down)
        return (b.op(ascend.moe_experts.default, flat, weights, ids, w_up, w_down, **options),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return fuzz_inputs(rng, dtype, spelling)


def _rows_first(b: Builder, p: Product) -> fx.Node:
    """The weight as [E, N, K]."""
    if not p.swapped:
        return p.weight
    if is_call(p.weight, aten.permute.default) and list(arg(p.weight, 1)) == [0, 2, 1]:
        source: fx.Node = arg(p.weight, 0)
        return source
    return b.op(aten.permute.default, p.weight, [0, 2, 1])


def _summed(anchor: fx.Node, facts: Facts) -> tuple[Slots, fx.Node] | NoMatch:
    """Slots of a sum over the k places of [T, k, H]."""
    call = arguments(anchor)
    source: fx.Node = call["self"]
    if list(call["dim"] or ()) != [-2] or call["keepdim"] or rank(facts, source) != 3:
        return refuse(facts, "arg", anchor, "a sum over the experts of each token", f"dim={call['dim']}")
    tokens, k, _ = facts.val(source).shape
    if call["dtype"] is not None or not isinstance(k, int):
        return refuse(facts, "arg", anchor, "a sum over a fixed number of experts", f"{k}", 0.1)
    return Slots(facts, k, tokens), source


def _added(anchor: fx.Node, facts: Facts) -> tuple[Slots, fx.Node] | NoMatch:
    """Slots of rows added to zeros by token, in the order of a sort."""
    call = arguments(anchor)
    zeros, index, rows = call["self"], call["index"], call["source"]
    if call["dim"] not in (0, -2) or call["alpha"] != 1 or rank(facts, zeros) != 2 or not is_call(zeros, *_ZEROS):
        return refuse(facts, "arg", anchor, "rows added to zeros by token", f"dim={call['dim']}", 0.1)
    if rank(facts, rows) != 2 or not facts.known(facts.val(zeros).shape[1] == facts.val(rows).shape[1]):
        return refuse(facts, "shape", anchor, "rows [S, H] added to [T, H]", f"{list(facts.val(rows).shape)}", 0.1)
    divisor = arg(index, 1) if is_call(index, aten.floor_divide.default, aten.div.Tensor_mode) else 1
    slots = Slots(facts, divisor if isinstance(divisor, int) else 0, facts.val(zeros).shape[0])
    if not slots.is_token(index):
        return refuse(facts, "op", anchor, "rows added by the sort's order divided by k", f"%{index.name}", 0.3)
    slots.seen(zeros, shared=True)
    return slots, rows


def _weighted(slots: Slots, n: fx.Node) -> tuple[fx.Node, fx.Node] | NoMatch:
    """(the rows before their weights, the weights) on the way up from the sum; a sort is undone at most once."""
    facts = slots.facts
    weights: fx.Node | None = None
    n = slots.peel(n)
    while True:
        picked = slots.picked(n)
        if picked is not None and slots.order is None and rank(facts, picked[0]) == 2:
            if not slots.is_inverse(picked[1]):
                return refuse(facts, "unproven", n, "rows put back in token order", f"%{picked[1].name}", 0.4)
            slots.seen(n)
            n = slots.peel(picked[0])
        elif is_call(n, aten.mul.Tensor) and weights is None:
            found = _column(slots, n)
            if found is None:
                return refuse(facts, "op", n, "rows times a weight each", "another product", 0.4)
            slots.seen(n)
            n, weights = slots.peel(found[0]), found[1]
        elif weights is None:
            return refuse(facts, "op", n, "rows times a weight each", f"{n.target}", 0.3)
        else:
            return n, weights


def _column(slots: Slots, n: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(rows, weights in token order) of rows [..., H] * weights [..., 1]."""
    facts = slots.facts
    for rows, column in commuted(n):
        if not isinstance(rows, fx.Node) or not isinstance(column, fx.Node) or not same_shape(facts, rows, n):
            continue
        shape = facts.val(column).shape
        lead = all(facts.known(a == b) for a, b in zip(shape[:-1], facts.val(n).shape[:-1], strict=False))
        if len(shape) != rank(facts, n) or not (isinstance(shape[-1], int) and shape[-1] == 1) or not lead:
            continue
        weights = slots.peel(column)
        picked = slots.picked(weights)
        if slots.order is not None:
            if picked is None or picked[1] is not slots.order or rank(facts, picked[0]) != 1:
                return None
            slots.seen(weights)
            weights = slots.peel(picked[0])
        return rows, weights
    return None


def _shapes(facts: Facts, anchor: fx.Node, x: fx.Node, up: Product, down: Product) -> NoMatch | None:
    """A refusal unless the operands are [E, 2I, H], [E, H, I] and x [.., H] of one dtype."""
    (e0, n0, k0), (e1, n1, k1) = (_sizes(facts, p) for p in (up, down))
    known = facts.known(k0 == facts.val(x).shape[-1]) and facts.known(n1 == k0) and facts.known(n0 == 2 * k1)
    known = known and facts.known(n1 == facts.val(anchor).shape[-1])
    if e0 != e1 or not known:
        found = f"{list(facts.val(up.weight).shape)} and {list(facts.val(down.weight).shape)}"
        return refuse(facts, "shape", anchor, "weights [E, 2I, H] and [E, H, I]", found, 0.85)
    operands = [x, up.weight, down.weight, *(p.bias for p in (up, down) if p.bias is not None)]
    if len({dtype(facts, n) for n in operands}) != 1:
        return refuse(facts, "dtype", anchor, "x, weights and biases of one dtype", "several", 0.85)
    return None


def _sizes(facts: Facts, p: Product) -> tuple[Any, Any, Any]:
    e, n, k = facts.val(p.weight).shape
    return (e, k, n) if p.swapped else (e, n, k)


PATTERNS = (MoeExperts(),)
