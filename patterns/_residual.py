"""The residual add in front of a norm: shared by ``add_rms_norm`` and ``add_layer_norm``."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arg, arguments, aten, dtype, is_call, refuse, same_shape


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
