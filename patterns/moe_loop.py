"""A loop over experts -> ``ascend.moe_experts``.

Before (``x: T[*B, H]``, ``ids: i64[*B, k]``, ``weights: [*B, k]``), every expert on every token::

    y = zeros_like(x)
    for e in range(E):
        y += down_e(act(gate_e(x)) * up_e(x)) * (weights * (ids == e)).sum(-1, keepdim=True)

after::

    y = ascend.moe_experts(x, weights, ids, w_gate_up, w_down, activation=...)

Batched parameters, of which a loop takes ``w[e]``, are used as they lie; linears of the experts' own become slices of
one tensor (by aliasing, as in ``merge_linears``). Each of the experts 0..E-1 must come once, with weights of its own,
and all must go by the same x, ids and weights. The sum must start from zeros, and nothing else may read it on the way.

Eager multiplies what an expert that was not chosen makes by 0, the operator does not compute it.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, arguments, ascend, aten, commuted, convert, dtype, is_call, leaks, lossless, rank, refuse
from ._calls import same_shape as alike
from ._experts_products import sum_in
from ._loop_expert import Expert, Stack, Weight, read_expert, stack
from ._loop_rows import Step, read_chosen, read_chosen_share, steps, taken_at
from ._loop_share import Share, is_zero, looks_like_share, read_share
from .spellings.loops import SPELLINGS, fuzz_inputs

_CHOOSERS = (aten.topk.default, ascend.moe_gate.default)


@dataclass
class Loop:
    """The links read so far, from the last to the first, and the calls seen; ``core`` are those nobody else may use."""

    shares: list[Share] = field(default_factory=list)
    experts: list[Expert] = field(default_factory=list)
    core: dict[fx.Node, None] = field(default_factory=dict)
    shared: dict[fx.Node, None] = field(default_factory=dict)


class MoeLoop(ProceduralPattern):
    name = "moe_loop"
    level = 2
    benefit = 9
    anchors = (aten.add.Tensor, aten.index_add.default, aten.index_put.default)
    reads = (aten.silu.default, aten.gelu.default)
    depth = 5
    domain = Domain(dtypes=(torch.bfloat16, torch.float16), shapes={"x": ("T", "H")})
    users = "duplicate"  # masks and zeros are shared; `leaks` guards the rest
    eager = SPELLINGS
    fuzz_params = range(2, 64)
    emits = frozenset({"ascend.moe_experts"})
    before = frozenset({"merge_linears", "swiglu", "gelu_mul"})
    after = frozenset({"silu"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        if next(_terms(facts, anchor), None) is None:
            return refuse(facts, "op", anchor, "a sum of experts' results times a weight each", "another sum")
        for user in _beyond(anchor):
            if any(_uncast(step.rest) is anchor for step in _terms(facts, user)):
                return refuse(facts, "op", anchor, "the last sum of a loop over experts", f"%{user.name} goes on")
        loop = Loop()
        refusal = _walk(facts, anchor, loop) or _one_loop(facts, anchor, loop)
        if refusal is not None:
            return refusal
        stacks = _stacks(facts, anchor, loop)
        if isinstance(stacks, NoMatch):
            return stacks
        x, share = loop.experts[0].source, loop.shares[0]
        refusal = _shapes(facts, anchor, loop, stacks)
        if refusal is not None:
            return refusal
        computed = _chosen(facts, share.ids)
        if any(s.distinct for s in loop.shares) and computed is None:
            fix = "take the ids from topk"
            return refuse(facts, "unproven", share.ids, "ids that differ per token", f"%{share.ids.name}", 0.9, fix)
        output = sum_in(facts, anchor, dtype(facts, x))
        if isinstance(output, NoMatch):
            return output
        loop.core[output] = None
        refusal = leaks(facts, loop.core, (output,), 0.95)
        if refusal is not None:
            return refusal
        inputs = {"x": x, "weights": share.weights, "ids": share.ids, "casts": share.casts, "stacks": stacks}
        inputs |= {"options": loop.experts[0].options, "parts": tuple(p for s in stacks.values() for p in s.parts)}
        nodes = frozenset(_with_sizes((*loop.core, *loop.shared)))
        return Match(self.name, anchor, nodes, inputs, (output,), computed=computed or frozenset())

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        x, out = m.inputs["x"], m.outputs[0].meta["val"]
        ids, weights = (_flat(b, m.inputs[name]) for name in ("ids", "weights"))
        for kind in m.inputs["casts"]:
            weights = b.op(convert, weights, kind)
        made = {name: s.emit(b) for name, s in m.inputs["stacks"].items()}
        up, down = made.pop("up"), made.pop("down")
        y = b.op(ascend.moe_experts.default, _flat(b, x), weights, ids, up, down, **m.inputs["options"], **made)
        return (y if out.dim() == 2 else b.op(aten.reshape.default, y, list(out.shape)),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return fuzz_inputs(rng, dtype, spelling)


def _flat(b: Builder, n: fx.Node) -> fx.Node:
    """[*B, F] as [T, F]."""
    shape = n.meta["val"].shape
    if len(shape) == 2:
        return n
    rows = 1
    for size in shape[:-1]:
        rows = rows * size
    return b.op(aten.reshape.default, n, [rows, shape[-1]])


def _terms(facts: Facts, n: Any) -> Iterator[Step]:
    """``n`` as a sum so far and rows * share."""
    return (step for step in steps(n) if next(_products(facts, step.term), None) is not None)


def _products(facts: Facts, term: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(rows, share) of a product that may be an expert's results times its share."""
    term = _uncast(term)
    if is_call(term, aten.mul.Tensor):
        for rows, share in commuted(term):
            if isinstance(rows, fx.Node) and looks_like_share(facts, share) and alike(facts, rows, term):
                yield rows, share


def _beyond(n: fx.Node) -> list[fx.Node]:
    """The users of ``n``, through casts."""
    return [v for u in n.users for v in (_beyond(u) if is_call(u, convert) else (u,))]


def _uncast(n: Any) -> Any:
    while is_call(n, convert):
        n = arg(n, 0)
    return n


def _walk(facts: Facts, anchor: fx.Node, loop: Loop) -> NoMatch | None:
    """Read the links from the last to the first, and the zeros in front."""
    n: Any = anchor
    while True:
        while is_call(n, convert):
            loop.core[n] = None
            n = arg(n, 0)
        found = next(_terms(facts, n), None)
        if found is not None:
            refusal = _link(facts, found, loop)
            n = found.rest
        elif is_zero(facts, n):
            if isinstance(n, fx.Node):
                loop.shared[n] = None
            return None
        elif next(_products(facts, n), None) is not None:
            return _link(facts, Step(None, n, None, ()), loop)
        else:
            at = n if isinstance(n, fx.Node) else anchor
            return refuse(facts, "op", at, "a sum that starts from zeros", f"{getattr(n, 'target', n)}", 0.5)
        if refusal is not None:
            return refusal


def _link(facts: Facts, step: Step, loop: Loop) -> NoMatch | None:
    """Read rows * share."""
    term = step.term
    loop.core.update(dict.fromkeys(step.nodes))
    while is_call(term, convert):
        loop.core[term] = None
        term = arg(term, 0)
    chosen = read_chosen(facts, step.token) if step.token is not None else None
    if step.token is not None and chosen is None:
        expected = "the rows of the tokens that chose an expert"
        return refuse(facts, "op", step.token, expected, f"{step.token.target}", 0.3)
    for rows, column in _products(facts, term):
        if chosen is None or step.token is None:
            share = read_share(facts, column)
        else:
            share = read_chosen_share(facts, column, chosen, step.token)
        if share is None:
            continue
        loop.core[term] = None
        loop.shared.update(dict.fromkeys((column, *share.nodes)))
        while is_call(rows, convert):
            loop.core[rows] = None
            rows = arg(rows, 0)
        expert = read_expert(facts, rows)
        if isinstance(expert, NoMatch):
            return expert
        loop.core.update(dict.fromkeys(expert.nodes))
        if step.token is not None:
            taken = taken_at(facts, expert.source, step.token)
            if taken is None:
                return refuse(facts, "op", expert.source, "x at the tokens that chose the expert", "other rows", 0.5)
            loop.shared.update(dict.fromkeys((step.token, *taken[1])))
            expert = replace(expert, source=taken[0])
        loop.shares.append(replace(share, distinct=share.distinct or step.distinct))
        loop.experts.append(expert)
        return None
    return refuse(facts, "op", term, "an expert's results times the weights of its tokens", "another product", 0.3)


def _one_loop(facts: Facts, anchor: fx.Node, loop: Loop) -> NoMatch | None:
    """A refusal unless the links are those of experts 0, 1, ..., once each, of the same operands. Sorts them."""
    found = sorted(s.expert for s in loop.shares)
    if len(found) < 2 or found != list(range(len(found))):
        return refuse(facts, "arg", anchor, "each of the experts 0, 1, ... once", f"{found}", 0.6)
    by_expert = sorted(range(len(found)), key=lambda i: loop.shares[i].expert)
    loop.shares = [loop.shares[i] for i in by_expert]
    loop.experts = [loop.experts[i] for i in by_expert]
    first, head = loop.shares[0], loop.experts[0]
    for share, expert in zip(loop.shares, loop.experts, strict=True):
        what = (
            "ids" if share.ids is not first.ids else
            "weights" if share.weights is not first.weights or share.casts != first.casts else
            "input" if expert.source is not head.source else
            "activation" if expert.options != head.options else ""
        )  # fmt: skip
        if what:
            return refuse(facts, "arg", anchor, f"the same {what} for every expert", f"another for {share.expert}", 0.7)
    wanted = dtype(facts, head.source)
    narrow = next((n for n in loop.core if not lossless(wanted, dtype(facts, n))), None)
    if narrow is not None:
        return refuse(facts, "dtype", narrow, f"no rounding below {wanted}", f"{dtype(facts, narrow)}", 0.7)
    return None


def _stacks(facts: Facts, anchor: fx.Node, loop: Loop) -> dict[str, Stack] | NoMatch:
    """The weights and biases of all experts by name, or why they cannot be brought together."""
    stacks: dict[str, Stack] = {}
    for name, bias, linears in (
        ("up", "b_gate_up", [e.first for e in loop.experts]),
        ("down", "b_down", [(e.down,) for e in loop.experts]),
    ):
        made = stack(facts, [tuple(p.weight for p in row) for row in linears], anchor)
        if isinstance(made, NoMatch):
            return made
        stacks[name] = made
        biases: list[tuple[Weight, ...]] = [tuple(p.bias for p in row if p.bias is not None) for row in linears]
        if not any(biases):
            continue
        if any(len(some) != len(row) for some, row in zip(biases, linears, strict=True)):
            return refuse(facts, "arg", anchor, "a bias in every expert, or in none", "some", 0.8)
        made = stack(facts, biases, anchor)
        if isinstance(made, NoMatch):
            return made
        stacks[bias] = made
    return stacks


def _shapes(facts: Facts, anchor: fx.Node, loop: Loop, stacks: dict[str, Stack]) -> NoMatch | None:
    """A refusal unless the operands are x [*B, H], ids [*B, k], and weights [E, 2I, H] and [E, H, I], of one dtype."""
    x, share = loop.experts[0].source, loop.shares[0]
    up, down = stacks["up"].shape, stacks["down"].shape
    width = facts.val(x).shape[-1]
    fits = len(up) == 3 == len(down) and up[1] == 2 * down[2] and down[1] == up[2] and facts.known(width == up[2])
    fits = fits and all(stacks[n].shape[1] == w[1] for n, w in (("b_gate_up", up), ("b_down", down)) if n in stacks)
    same = facts.known(width == facts.val(anchor).shape[-1]) and facts.known(_rows(facts, x) == _rows(facts, anchor))
    if not fits or not same:
        return refuse(facts, "shape", anchor, "weights [E, 2I, H] and [E, H, I]", f"{up} and {down}", 0.85)
    tokens, k = _rows(facts, x), facts.val(share.ids).shape[-1]
    if rank(facts, x) < 2 or not isinstance(k, int) or not facts.known(_rows(facts, share.ids) == tokens):
        found = f"{list(facts.val(share.ids).shape)}"
        return refuse(facts, "shape", anchor, "ids [*B, k], a fixed number for each row of x", found, 0.85)
    if len({dtype(facts, n) for n in (x, *(p for s in stacks.values() for p in s.parts))}) != 1:
        return refuse(facts, "dtype", anchor, "x, weights and biases of one dtype", "several", 0.85)
    return None


def _with_sizes(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and the sizes that they read off values among them, which only running them tells."""
    found = set(nodes)
    sizes = {s for n in found for s in n.all_input_nodes if is_call(s, aten.sym_size.int)}
    return found | {s for s in sizes if arg(s, 0) in found}


def _rows(facts: Facts, n: fx.Node) -> Any:
    rows = 1
    for size in facts.val(n).shape[:-1]:
        rows = rows * size
    return rows


def _chosen(facts: Facts, n: Any) -> frozenset[fx.Node] | None:
    """The calls that make the ids if these differ per token, as those of topk do."""
    nodes = []
    while is_call(n, convert) and not dtype(facts, n).is_floating_point:
        nodes.append(n)
        n = arg(n, 0)
    if not is_call(n, operator.getitem) or arg(n, 1) != 1 or not is_call(arg(n, 0), *_CHOOSERS):
        return None
    chooser = arg(n, 0)
    if chooser.target is aten.topk.default and arguments(chooser)["dim"] not in (-1, rank(facts, arg(chooser, 0)) - 1):
        return None
    return frozenset((*nodes, n, chooser))


PATTERNS = (MoeLoop(),)
