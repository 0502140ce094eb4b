"""Softmax in every spelling: from the operator, or from exp, up to the scores and down to the weights.

    _softmax(x, d)                  _safe_softmax(x, d)             exp(_log_softmax(x, d))
    exp(x - logsumexp(x, d))        e = exp(x - max(x, d)): e / sum(e, d), e * (1 / sum(e, d)), (e @ v) / sum(e, d)

``x - max(x)`` in front of a softmax changes nothing: a row of finite scores is shifted, a row of -inf gives NaN
either way. Without the maximum ``exp`` may overflow or lose everything, so ``exp(x) / sum(exp(x))`` is another
function, unless a soft cap bounds the scores. GPT-OSS's sinks are a column of logits that is concatenated and dropped
behind the softmax.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import arg, arguments, aten, commuted, convert, dtype, is_call, lossless, number, rank, refuse

ANCHORS = (aten._softmax.default, aten._safe_softmax.default, aten.exp.default)


@dataclass(frozen=True)
class Softmax:
    """softmax(scores, dim) = weights. ``nodes`` compute it; ``columns`` of the scores beside them are dropped behind.

    ``zero`` says that a row without a visible key gives 0. ``total`` divides not the weights but what is made of them:
    the sum of the exponentials. ``shifted`` is False if nothing keeps ``exp`` from overflowing.
    """

    scores: fx.Node
    dim: int
    weights: fx.Node
    nodes: frozenset[fx.Node] = field(default_factory=frozenset)
    sinks: fx.Node | None = None
    zero: bool = False
    total: fx.Node | None = None
    shifted: bool = True


def read_softmax(anchor: fx.Node, facts: Facts) -> Softmax | NoMatch:
    """The softmax that ``anchor``, one of ``ANCHORS``, belongs to."""
    if is_call(anchor, aten.exp.default):
        found = _by_hand(anchor, facts)
    else:
        call = arguments(anchor)
        x = call["self"]
        if not lossless(dtype(facts, x), dtype(facts, anchor)):
            return refuse(facts, "dtype", anchor, "a softmax in the dtype of its scores or a wider one",
                          f"{dtype(facts, x)} to {dtype(facts, anchor)}", 0.3)  # fmt: skip
        zero = anchor.target is aten._safe_softmax.default
        found = Softmax(x, call["dim"] % max(rank(facts, x), 1), anchor, frozenset((anchor,)), zero=zero)
    if isinstance(found, NoMatch) or rank(facts, found.scores) == 0:
        return found
    return _with_sinks(_unshifted(found, facts), facts)


def _by_hand(e: fx.Node, facts: Facts) -> Softmax | NoMatch:
    x = arg(e, 0)
    if is_call(x, aten._log_softmax.default):
        call = arguments(x)
        return Softmax(call["self"], call["dim"] % rank(facts, call["self"]), e, frozenset((e, x)))
    shift = _shift(x, facts)
    if shift is not None and shift.total:
        return Softmax(shift.scores, shift.dim, e, shift.nodes | {e})
    divided = _divided(e, facts)
    if isinstance(divided, NoMatch):
        return divided
    weights, total, dim, nodes = divided
    if shift is None:
        return Softmax(x, dim, weights, nodes | {e}, total=total, shifted=False)
    if shift.dim != dim:
        return refuse(facts, "arg", x, f"the maximum along the axis of the sum, {dim}", f"along {shift.dim}", 0.3)
    return Softmax(shift.scores, dim, weights, nodes | shift.nodes | {e}, total=total)


@dataclass(frozen=True)
class _Shift:
    """``scores - max(scores, dim)``, or (``total``) ``scores - logsumexp(scores, dim)``."""

    scores: fx.Node
    dim: int
    nodes: frozenset[fx.Node]
    total: bool = False


def _shift(n: fx.Node, facts: Facts) -> _Shift | None:
    if not is_call(n, aten.sub.Tensor) or arguments(n)["alpha"] != 1:
        return None
    x, top = arg(n, 0), arg(n, 1)
    if not isinstance(x, fx.Node) or not isinstance(top, fx.Node):
        return None
    for op, total in ((aten.amax.default, False), (aten.max.dim, False), (aten.logsumexp.default, True)):
        found = _reduced(top, op, x, facts)
        if found is not None:
            return _Shift(x, found[0], found[1] | {n}, total)
    return None


def _reduced(n: fx.Node, op: Any, x: fx.Node, facts: Facts) -> tuple[int, frozenset[fx.Node]] | None:
    """(dim, calls) if ``n`` is ``op(x)`` along one axis, which is kept with size one."""
    nodes = [n]
    if is_call(n, aten.reshape.default):
        n = arg(n, 0)
        nodes.append(n)
    if is_call(n, operator.getitem) and arg(n, 1) == 0:
        n = arg(n, 0)
        nodes.append(n)
    if not is_call(n, op) or arg(n, 0) is not x:
        return None
    call = arguments(n)
    dims = call["dim"]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    shape, full = facts.val(nodes[0]).shape, facts.val(x).shape
    if len(dims) != 1 or len(shape) != len(full):
        return None
    dim = dims[0] % len(full)
    kept = all(facts.known(s == (1 if i == dim else full[i])) for i, s in enumerate(shape))
    return (dim, frozenset(nodes)) if kept else None


_Divided = tuple[fx.Node, "fx.Node | None", int, frozenset[fx.Node]]


def _divided(e: fx.Node, facts: Facts) -> _Divided | NoMatch:
    """(weights, total, dim, calls) of an exponential that is divided by its sum, at once or (``total``) later."""
    fix = "divide the exponentials by their sum along the keys"
    for user in e.users:
        wide = user if is_call(user, convert) else e
        sums = [s for s in wide.users if is_call(s, aten.sum.dim_IntList)]
        for summed in sums:
            if not lossless(dtype(facts, e), dtype(facts, summed)):
                continue
            kept = next((u for u in summed.users if is_call(u, aten.reshape.default)), summed)
            found = _reduced(kept, aten.sum.dim_IntList, wide, facts)
            if found is None or len(kept.users) != 1:
                continue
            (quotient,) = kept.users
            nodes = found[1] | {wide}
            numerator = _numerator(quotient, kept)
            if numerator is None and is_call(quotient, aten.reciprocal.default) and len(quotient.users) == 1:
                nodes |= {quotient}
                (product,) = quotient.users
                numerator, quotient = _other(product, quotient), product
            if numerator is None:
                return refuse(facts, "op", quotient, "the exponentials over their sum", f"{quotient.target}", 0.2, fix)
            if numerator in (e, wide):
                return quotient, None, found[0], nodes | {quotient}
            return e, quotient, found[0], nodes
    return refuse(
        facts, "op", e, "a softmax: exponentials over their sum", "exponentials that are not summed", 0.0, fix
    )


def _numerator(n: fx.Node, total: fx.Node) -> fx.Node | None:
    if not is_call(n, aten.div.Tensor) or arg(n, 1) is not total or arguments(n).get("rounding_mode") is not None:
        return None
    x = arg(n, 0)
    return x if isinstance(x, fx.Node) and x is not total else None


def _other(n: fx.Node, factor: fx.Node) -> fx.Node | None:
    """What a product multiplies with ``factor``."""
    if not is_call(n, aten.mul.Tensor):
        return None
    return next((x for x, y in commuted(n) if y is factor and isinstance(x, fx.Node) and x is not factor), None)


def _unshifted(s: Softmax, facts: Facts) -> Softmax:
    """Softmax does not change if the maximum of each row is taken off first."""
    shift = _shift(s.scores, facts)
    if shift is None or shift.total or shift.dim != s.dim:
        return s
    return replace(s, scores=shift.scores, nodes=s.nodes | shift.nodes)


def _with_sinks(s: Softmax, facts: Facts) -> Softmax | NoMatch:
    """``cat([scores, column])`` in front, ``[..., :-1]`` behind: the column is one more logit without a value."""
    n, above = s.scores, set(s.nodes)
    while True:
        shift = _shift(n, facts)
        if is_call(n, convert) and lossless(dtype(facts, arg(n, 0)), dtype(facts, n)):
            above.add(n)
            n = arg(n, 0)
        elif shift is not None and not shift.total and shift.dim == s.dim:
            above |= shift.nodes
            n = shift.scores
        else:
            break
    if not is_call(n, aten.cat.default):
        return s
    parts, dim = list(arg(n, 0)), arguments(n)["dim"] % rank(facts, n)
    if len(parts) != 2 or dim != s.dim or s.total is not None:
        return refuse(facts, "op", n, "one column of sinks beside the scores", f"{len(parts)} parts along {dim}", 0.3)
    users = [u for u in s.weights.users if u.op == "call_function"]
    if len(users) != len(s.weights.users) or len(users) != 1 or not is_call(users[0], aten.slice.Tensor):
        return refuse(facts, "users", s.weights, "weights of which the column of sinks is dropped", "no slice", 0.3)
    (kept,) = users
    _, along, start, _, step = (arg(kept, i) for i in range(5))
    for scores, column, first in ((parts[0], parts[1], 0), (parts[1], parts[0], 1)):
        size = facts.val(scores).shape[dim]
        same = facts.known(facts.val(kept).shape[dim] == size) and along == dim and step == 1
        if same and facts.known(facts.val(column).shape[dim] == 1) and number(start) == first:
            nodes = frozenset((*above, n, kept))
            return replace(s, scores=scores, weights=kept, nodes=nodes, sinks=column)
    return refuse(facts, "arg", kept, "a slice that drops the column of sinks", "another slice", 0.4)
