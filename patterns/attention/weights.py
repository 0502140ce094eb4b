"""From the weights of a softmax down to their product with v.

On the way the weights may be cast, reshaped, permuted, multiplied by what is the same for all keys (a head mask: it is
applied to the result instead) and filled with zeros where the scores are masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import LAYOUT, arg, arguments, aten, commuted, convert, dtype, is_call, lossless, number, refuse
from .frame import Atoms, Axes, Frame
from .read import PRODUCTS, constant
from .softmax import Softmax


@dataclass
class Weighted:
    """weights @ v: ``output`` has ``axes``.

    ``factors`` are numbers and tensors (with their axes) that the result is multiplied by; ``zeros`` boolean masks
    (with their axes, and True if True keeps) that zero the weights.
    """

    output: fx.Node
    product: fx.Node
    v: fx.Node
    v_axes: Axes
    axes: Axes
    rows: Atoms
    columns: Atoms
    nodes: set[fx.Node] = field(default_factory=set)
    factors: list[tuple[Any, Axes]] = field(default_factory=list)
    zeros: list[tuple[fx.Node, Axes, bool]] = field(default_factory=list)


def walk_weights(s: Softmax, frame: Frame, axes: Axes, facts: Facts) -> Weighted | NoMatch:
    """The product of the weights of ``s``, whose axes are ``axes``, with v, or why there is none."""
    n, base, keys, level = s.weights, s.weights, axes[s.dim], axes
    nodes: set[fx.Node] = set()
    casts: list[fx.Node] = []
    factors: list[tuple[Any, Axes]] = []
    zeros: list[tuple[fx.Node, Axes, bool]] = []
    while True:
        users = [u for u in n.users if u not in s.nodes]
        if len(users) != 1:
            others = ", ".join(f"%{u.name}" if u.op != "output" else "the graph's output" for u in users) or "nothing"
            fix = "do not return the attention weights (output_attentions=False)"
            return refuse(facts, "users", n, "weights used only by the product with v", others, 0.9, fix)
        (user,) = users
        if is_call(user, *PRODUCTS) or user.op == "output":
            break
        here = axes if is_call(user, *LAYOUT) else frame.below(base, axes, n)
        if here is None:
            return _lost(facts, n)
        if is_call(user, convert):
            casts.append(user)
        elif is_call(user, *LAYOUT):
            nodes.add(user)
            n = user
            continue
        elif (filled := _zeroed(user, n, facts)) is not None:
            mask, keep = filled
            aligned = frame.aligned(facts.val(mask).shape, here, facts.val(user).shape)
            if aligned is None:
                return _lost(facts, user)
            zeros.append((mask, aligned, keep))
        else:
            factor = _factor(user, n)
            if factor is None:
                return refuse(facts, "op", user, "a product of the weights with v", f"{user.target}", 0.4)
            constant_axes = _constant_along(factor, keys, frame, here, facts, user)
            if isinstance(constant_axes, NoMatch):
                return constant_axes
            factors.append((factor, constant_axes))
        nodes.add(user)
        n = base = user
        axes = here
    here = frame.below(base, axes, n)
    if here is None:
        return _lost(facts, n)
    found = _product(user, n, here, keys, frame, facts)
    if isinstance(found, NoMatch):
        return found
    narrow = next((c for c in casts if not lossless(dtype(facts, found.v), dtype(facts, c))), None)
    if narrow is not None or dtype(facts, n) != dtype(facts, found.v):
        wide = f"{dtype(facts, narrow or n)}"
        fix = "cast the weights once, to the dtype of v"
        expected = f"weights rounded to {dtype(facts, found.v)} at most"
        return refuse(facts, "dtype", narrow or n, expected, wide, 0.8, fix)
    found.nodes |= nodes
    found.factors, found.zeros = factors, zeros
    return found if s.total is None else _divided(found, s.total, s, frame, level)


def _product(user: fx.Node, n: fx.Node, axes: Axes, keys: Atoms, frame: Frame, facts: Facts) -> Weighted | NoMatch:
    """weights @ v, or v^T @ weights^T, with the axes of everything."""
    found = "the graph's output" if user.op == "output" else f"{user.target}"
    if not is_call(user, *PRODUCTS) or arg(user, 0) is arg(user, 1):
        return refuse(facts, "op", user, "a product of the weights with v", found, 0.4)
    left = arg(user, 0) is n
    v, contracted, rows = arg(user, 1 if left else 0), axes[-1 if left else -2], axes[-2 if left else -1]
    if frame.leaves(contracted) != frame.leaves(keys) or len(axes) < 2:
        fix = "take the softmax along the axis that the product with v sums over"
        return refuse(facts, "arg", user, "weights summed over the axis of the softmax",
                      "a softmax over another dim than the product with v sums over", 0.5, fix)  # fmt: skip
    shape, out = facts.val(v).shape, facts.val(user).shape
    same = all(facts.known(a == b) for a, b in zip(out[:-2], facts.val(n).shape[:-2], strict=False))
    batch = frame.aligned(shape[:-2], axes[:-2], out[:-2]) if len(out) == len(axes) and same else None
    if batch is None or len(shape) < 2:
        return refuse(facts, "shape", user, "weights as large as their product with v", f"{list(shape)}", 0.6)
    (columns,) = frame.fresh([shape[-1 if left else -2]])
    v_axes = (*batch, keys, columns) if left else (*batch, columns, keys)
    out_axes = (*axes[:-2], rows, columns) if left else (*axes[:-2], columns, rows)
    return Weighted(user, user, v, v_axes, out_axes, rows, columns, {user})


def _divided(w: Weighted, total: fx.Node, s: Softmax, frame: Frame, level: Axes) -> Weighted | NoMatch:
    """The product, divided by the sum of the exponentials: it must be that of the same rows, axis by axis."""
    facts = frame.facts
    n = base = w.output
    axes: Axes | None = w.axes
    while list(n.users) != [total]:
        users = list(n.users)
        if len(users) != 1 or not is_call(users[0], *LAYOUT, convert) or axes is None:
            return refuse(
                facts, "op", total, "weights @ v over the sum of the weights", f"%{n.name} used otherwise", 0.6
            )
        (n,) = users
        w.nodes.add(n)
        if is_call(n, convert):
            if not lossless(dtype(facts, arg(n, 0)), dtype(facts, n)):
                return refuse(facts, "dtype", n, "a product that is divided before it is rounded", "a cast", 0.6)
            axes, base = frame.below(base, axes, arg(n, 0)), n
    axes = None if axes is None else frame.below(base, axes, n)
    sums = tuple(() if i == s.dim else frame.leaves(atoms) for i, atoms in enumerate(level))
    wanted = None if axes is None else tuple(() if a == w.columns else frame.leaves(a) for a in axes)
    if wanted is None or len(wanted) < len(sums) or wanted != ((),) * (len(wanted) - len(sums)) + sums:
        return refuse(
            facts, "unproven", total, "each row of weights @ v over the sum of its weights", "other rows", 0.6
        )
    w.nodes.add(total)
    w.output, w.axes = total, axes  # type: ignore[assignment]
    return w


def _zeroed(user: fx.Node, n: fx.Node, facts: Facts) -> tuple[fx.Node, bool] | None:
    """(mask, True if True keeps) of a call that fills the weights ``n`` with zeros."""
    if is_call(user, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        call = arguments(user)
        return (call["mask"], False) if call["self"] is n and constant(call["value"], facts) == 0 else None
    if is_call(user, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        call = arguments(user)
        for x, other, keep in ((call["self"], call["other"], True), (call["other"], call["self"], False)):
            if x is n and constant(other, facts) == 0:
                return call["condition"], keep
    return None


def _factor(user: fx.Node, n: fx.Node) -> Any:
    """What the weights ``n`` are multiplied with, else None."""
    if is_call(user, aten.div.Tensor) and arg(user, 0) is n and arguments(user).get("rounding_mode") is None:
        by = number(arg(user, 1))
        return 1.0 / by if by else None
    if not is_call(user, aten.mul.Tensor) or arg(user, 0) is arg(user, 1):
        return None
    (other,) = (y for x, y in commuted(user) if x is n)
    return other if isinstance(other, fx.Node) else number(other)


def _constant_along(factor: Any, keys: Atoms, frame: Frame, axes: Axes, facts: Facts, user: fx.Node) -> Axes | NoMatch:
    if not isinstance(factor, fx.Node):
        return ()
    aligned = frame.aligned(facts.val(factor).shape, axes, facts.val(user).shape)
    varies = aligned is None or any(atom in frame.leaves(keys) for atoms in aligned for atom in frame.leaves(atoms))
    if aligned is None or varies or not dtype(facts, factor).is_floating_point:
        fix = "mask the scores with -inf instead"
        return refuse(facts, "op", user, "a product of the weights with v", "weights multiplied key by key", 0.5, fix)
    if dtype(facts, user) != dtype(facts, user.args[0] if user.args[0] is not factor else user.args[1]):  # type: ignore[arg-type]
        return refuse(facts, "dtype", user, "a factor of the dtype of the weights", f"{dtype(facts, factor)}", 0.5)
    return aligned


def _lost(facts: Facts, n: fx.Node) -> NoMatch:
    return refuse(facts, "unproven", n, "weights whose axes can be followed", f"{list(facts.val(n).shape)}", 0.5)
