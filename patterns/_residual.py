"""The residual add in front of a norm: shared by ``add_rms_norm`` and ``add_layer_norm``."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, Facts, Match, NoMatch

from ._calls import arg, arguments, aten, dtype, is_call, refuse, same_shape


def above_reshape(facts: Facts, h: Any, ndim: int) -> tuple[Any, tuple[fx.Node, ...]]:
    """(h, nothing), or (sum, the reshape) if ``h`` reshapes a sum without touching the last ``ndim`` axes.

    The rows that a norm sees are then the rows of the sum (OPT flattens batch and sequence in the middle of a layer).
    """
    if not is_call(h, aten.reshape.default) or not is_call(arg(h, 0), aten.add.Tensor):
        return h, ()
    before, after = facts.val(arg(h, 0)).shape, facts.val(h).shape
    rows = min(len(before), len(after)) >= ndim
    if rows and all(facts.known(s == t) for s, t in zip(before[-ndim:], after[-ndim:], strict=True)):
        return arg(h, 0), (h,)
    return h, ()


def outputs(b: Builder, m: Match, both: fx.Node) -> tuple[fx.Node, ...]:
    """Replacements of a match's (norm, sum) or (norm, sum, reshaped sum) by the two results of the fused call."""
    y, h = b.op(operator.getitem, both, 0), b.op(operator.getitem, both, 1)
    norm, _, *more = m.outputs
    if m.inputs["reshaped"]:
        y = b.op(aten.reshape.default, y, list(norm.meta["val"].shape))
    return y, h, *(b.op(aten.reshape.default, h, list(n.meta["val"].shape)) for n in more)


def match_outputs(norm: fx.Node, total: fx.Node, between: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The norm, the sum, and the reshaped sum where somebody else reads it too."""
    return norm, total, *(n for n in between if len(n.users) > 1)


def residual_add(facts: Facts, norm: fx.Node, h: Any) -> tuple[fx.Node, fx.Node] | NoMatch:
    """The operands (x, residual) of the add that feeds ``norm``.

    Refuses anything but a plain sum of two tensors of one shape and one dtype: ``alpha``, a scalar, broadcasting and
    type promotion each change what ``h = x + residual`` means. The residual is the operand that was computed first:
    the stream is older than the branch that returns to it.
    """
    if not is_call(h, aten.add.Tensor):
        found = h.target if isinstance(h, fx.Node) else repr(h)
        return refuse(facts, "op", norm, "a norm of a residual sum (aten.add)", f"a norm of {found}", 0.3)
    a, b = arg(h, 0), arg(h, 1)
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return refuse(facts, "arg", h, "a sum of two tensors", "a tensor plus a number", 0.4)
    alpha = arguments(h)["alpha"]
    if alpha != 1:
        fix = "multiply the branch itself, or drop alpha"
        return refuse(facts, "arg", h, "alpha=1", f"alpha={alpha}", 0.7, fix)
    if dtype(facts, a) != dtype(facts, b):
        found = f"{dtype(facts, a)} + {dtype(facts, b)}"
        return refuse(facts, "dtype", h, "operands of one dtype", found, 0.7, "cast one operand before the sum")
    if not same_shape(facts, a, b):
        found = f"{list(facts.val(a).shape)} + {list(facts.val(b).shape)}"
        fix = "a residual that broadcasts has no fused form"
        return refuse(facts, "shape", h, "operands of one known shape", found, 0.7, fix)
    return (b, a) if a < b else (a, b)
