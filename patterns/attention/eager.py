"""softmax(q k^T * scale + mask) v, spelled out -> ``ascend.flash_attention``.

Before (``q: T[B, Hq, Sq, D]``, ``k, v: T[B, Hk, Sk, D]`` repeated to Hq heads; the steps between are optional)::

    s = matmul(q, permute(k, [0, 1, 3, 2])) * scale
    s = tanh(s / cap) * cap
    s = s + bias                                  # or masked_fill / where with -inf or finfo.min
    p = convert(_softmax(convert(s, float32), -1, False), T)
    y = matmul(p, v)

after: ``y = ascend.flash_attention(q, k, v, bias=, mask=, sinks=, scale=, softcap=, empty_row=...)``. An additive bias
stays one, so a row of -inf gives NaN and a row of finfo.min the mean, as before; ``empty_row`` is about rows without a
key. The weights ``p`` never exist, so they must have no other use. Axes may be split, merged and permuted anywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from .._calls import arg, ascend, aten, convert, dtype, is_call, leaks, rank, refuse
from ..spellings.attention import SPELLINGS, fuzz_inputs
from ..spellings.grammar import ATTENTION
from .cache import cache_notes
from .flags import Flagged, masks_only, whole
from .frame import Atoms, Axes, Frame
from .groups import Groups, Sinks, find_groups, find_sinks
from .near import no_product
from .operands import Operand, common_dtype, emit, find_operand
from .read import leads_to_product
from .softmax import ANCHORS, Softmax, read_softmax
from .terms import Plan, emit_bias, emit_blind, emit_mask, finite, plan
from .walk import Scores, walk_scores
from .weights import Weighted, walk_weights

LARGEST_CAP = 60.0  # exp of it, summed over all keys that fit in memory, is finite in float32 and bfloat16


@dataclass(frozen=True)
class Attention:
    """What the rewrite needs. ``poisoned``: a row of NaN scores stays NaN, even if a bias of -inf empties it."""

    frame: Frame
    q: Operand
    k: Operand
    v: Operand
    groups: Groups
    plan: Flagged
    scores: Scores
    weighted: Weighted
    sinks: Sinks | None
    working: torch.dtype
    empty_row: str
    poisoned: bool

    def tokens(self, o: Operand) -> tuple[fx.Node, int]:
        """An operand's node, and which of its axes counts the keys (-1: they are one, or part of an axis)."""
        keys = self.frame.leaves(self.groups.keys)
        places = [i for i, atoms in enumerate(o.axes) if keys and self.frame.leaves(atoms) == keys]
        return o.node, places[0] if places else -1


class EagerAttention(ProceduralPattern):
    name = "eager_attention"
    level = 2
    benefit = 10
    anchors = ANCHORS
    domain = Domain(shapes={"q": ("B", "Hq", "Sq", "D"), "k": ("B", "Hk", "Sk", "D"), "v": ("B", "Hk", "Sk", "Dv")})
    eager = SPELLINGS
    emits = frozenset({"ascend.flash_attention"})
    grammar = ATTENTION
    reports_all = True  # of every softmax that is left, why it is not attention

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        softmax = read_softmax(anchor, facts)
        if isinstance(softmax, NoMatch):
            return softmax
        if not leads_to_product(softmax.scores, facts) or rank(facts, softmax.scores) < 2:
            return no_product(softmax, anchor, facts)
        found = recognise(softmax, facts)
        if isinstance(found, NoMatch):
            return found
        w, parts = found.weighted, (found.q, found.k, found.v)
        nodes = frozenset().union(softmax.nodes, w.nodes, found.scores.nodes, *(p.nodes for p in parts))
        refusal = leaks(facts, nodes, (w.output,), 0.95)
        if refusal is not None:
            return refusal
        inputs = {"attention": found, **{name: p.node for name, p in zip("qkv", parts, strict=True)}}
        notes = (*found.plan.notes, *cache_notes(facts, *map(found.tokens, parts[1:])))
        return Match(self.name, anchor, nodes, inputs, (w.output,), notes, found.plan.computed)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        found: Attention = m.inputs["attention"]
        frame, g, w = found.frame, found.groups, found.weighted
        head = found.q.features
        q = emit(b, frame, found.q, (g.batch, g.heads, g.rows, head), found.working)
        if found.plan.blind:
            q = b.op(aten.masked_fill.Scalar, q, emit_blind(b, frame, found.scores.terms, g.scores), 0.0)
        k = emit(b, frame, found.k, (g.batch, g.key_heads, g.keys, head), found.working)
        v = emit(b, frame, found.v, (g.batch, g.key_heads, g.keys, found.v.features), found.working)
        factor = found.scores.factor * found.q.factor * found.k.factor
        options: dict[str, Any] = {"scale": factor, "softcap": found.scores.softcap, "empty_row": found.empty_row}
        options.update(found.plan.options)
        bias = emit_bias(b, frame, found.plan.biases, g.scores)
        mask = emit_mask(b, frame, found.plan.masks, g.scores)
        sinks = found.sinks.emit(b, frame, g) if found.sinks is not None else None
        options.update((name, n) for name, n in (("bias", bias), ("mask", mask), ("sinks", sinks)) if n is not None)
        y = b.op(ascend.flash_attention.default, q, k, v, **options)
        if found.poisoned:
            nothing = b.op(aten.sum.dim_IntList, b.op(aten.mul.Tensor, q, 0.0), [-1], True)  # NaN where q is
            y = b.op(aten.add.Tensor, y, nothing)
        for node, axes in w.factors:
            y = b.op(aten.mul.Tensor, y, frame.emit(b, node, axes, g.scores) if isinstance(node, fx.Node) else node)
        kind = w.output.meta["val"].dtype
        y = y if y.meta["val"].dtype == kind else b.op(convert, y, kind)
        return (frame.emit(b, y, (g.batch, g.heads, g.rows, w.columns), w.axes, fill=True),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return fuzz_inputs(rng, dtype, spelling)


def recognise(s: Softmax, facts: Facts) -> Attention | NoMatch:
    """The attention around a softmax of something that comes from a product."""
    frame = Frame(facts)
    level = frame.fresh(facts.val(s.scores).shape)
    weighted = walk_weights(s, frame, level, facts)
    if isinstance(weighted, NoMatch):
        return weighted
    sinks = None if s.sinks is None else find_sinks(s.sinks, frame, level, facts)
    if isinstance(sinks, NoMatch):
        return sinks
    scores = Scores(frame, level, dtype(facts, weighted.v))
    product = walk_scores(s.scores, scores, facts)
    if isinstance(product, NoMatch):
        return product
    operands = _query_and_key(product, frame, scores.axes, level[s.dim], facts)
    if isinstance(operands, NoMatch):
        return operands
    q, k, rows = operands
    v = find_operand(frame, weighted.v, weighted.v_axes, weighted.columns, grouped=True)
    kind = common_dtype(facts, q.node, k.node, v.node)
    if isinstance(kind, NoMatch):
        return kind
    varied = {atom for t in scores.terms for atoms in t.axes for atom in frame.leaves(atoms)}
    stored = k.atoms(frame) | v.atoms(frame)
    groups = find_groups(frame, level, s.dim, stored, (rows, weighted.rows), varied)
    if sinks is not None and not {a for atoms in sinks.axes for a in frame.leaves(atoms)} <= set(groups.heads):
        return refuse(facts, "shape", sinks.node, "one sink per head", "sinks that vary otherwise", 0.8)
    made = whole(scores.terms, frame, groups, s.zero) if s.shifted and not weighted.zeros else None
    if made is None:
        spelled = plan(scores.terms, facts, sinks is not None)
        if isinstance(spelled, NoMatch):
            return spelled
        empty_row = _empty_row(s, scores, weighted, spelled, facts)
        if isinstance(empty_row, NoMatch):
            return empty_row
        made = masks_only(spelled, empty_row, frame, groups)
    poisoned = s.zero and any(not t.is_mask and not finite(facts, t.node) for t in scores.terms)
    return Attention(frame, q, k, v, groups, made, scores, weighted, sinks, kind, made.empty_row, poisoned)


def _query_and_key(
    product: fx.Node, frame: Frame, axes: Axes, keys: Atoms, facts: Facts
) -> tuple[Operand, Operand, Atoms] | NoMatch:
    """q and k of the product whose axes are ``axes`` (k q^T as well), and the atoms of its rows."""
    left, right = (arg(product, i) for i in ((1, 2) if is_call(product, aten.baddbmm.default) else (0, 1)))
    shapes = [facts.val(n).shape for n in (left, right)]
    weight = is_call(product, aten.linear.default)  # [Sk, D] instead of [D, Sk]
    keys = frame.leaves(keys)
    columns, lines = frame.leaves(axes[-1]), frame.leaves(axes[-2])
    batch = facts.val(product).shape[:-2]
    outer = [frame.aligned(shape[:-2], axes[:-2], batch) for shape in shapes if len(shape) >= 2]
    if len(outer) < 2 or None in outer or (columns != keys and lines != keys):
        return refuse(facts, "arg", product, "a softmax along the rows or columns of q k^T", "along other axes", 0.5)
    (features,) = frame.fresh([shapes[0][-1]])
    first: Axes = (*outer[0], axes[-2], features)  # type: ignore[misc]
    second: Axes = (*outer[1], axes[-1], features) if weight else (*outer[1], features, axes[-1])  # type: ignore[misc]
    one, two = (left, first), (right, second)
    (q, q_axes), (k, k_axes) = (one, two) if columns == keys else (two, one)
    return (
        find_operand(frame, q, q_axes, features, scaled=True),
        find_operand(frame, k, k_axes, features, grouped=True, scaled=True),
        axes[-2] if columns == keys else axes[-1],
    )


def _empty_row(s: Softmax, scores: Scores, w: Weighted, made: Plan, facts: Facts) -> str | NoMatch:
    """What a row without a visible key gives."""
    empty_row = made.empty_row
    if not s.shifted:
        bounded = 0 < scores.softcap <= LARGEST_CAP and not made.biases and s.sinks is None
        if not bounded or dtype(facts, s.scores) == torch.float16:
            fix = "subtract the maximum of each row first, or call torch.softmax"
            found = "exp of scores that may overflow"
            return refuse(facts, "unproven", s.scores, "a softmax that is safe for any scores", found, 0.9, fix)
        empty_row = "nan"
    if s.zero and empty_row == "nan":
        return "zero"
    for mask, axes, keep in w.zeros:
        same = len(made.masks) == 1 and not made.biases and s.total is None and s.sinks is None
        (t,) = made.masks if same else (None,)
        if t is None or t.node is not mask or t.keep is not keep or _leaves(scores, t.axes) != _leaves(scores, axes):
            fix = "zero the weights where the scores are masked, and nowhere else"
            return refuse(facts, "unproven", mask, "weights zeroed by the mask of the scores", "another mask", 0.9, fix)
        empty_row = "zero"
    return empty_row


def _leaves(s: Scores, axes: Axes) -> tuple[Atoms, ...]:
    return tuple(s.frame.leaves(atoms) for atoms in axes)


PATTERNS = (EagerAttention(),)
