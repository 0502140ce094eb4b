"""Mixture of experts on the CPU: what is lowered to ``ascend_cpu.moe_gate`` and ``moe_experts``, and what it gains.

The reference of the experts runs every expert on every token (or copies an expert's weights for each of few tokens);
the kernel reads each chosen expert once and computes what is asked for. Both operators are worth having without vectors
too: the alternative is a dozen small calls, or work that is thrown away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import Builder, Facts, NoMatch

_convert = torch.ops.prims.convert_element_type.default

_CALL = 3e-6  # seconds of a small ATen call, of which the router's reference makes at least five
_WRITE = 10e9  # bytes/s at which the reference writes what it makes in between
_FLOPS = 0.2e12  # flop/s at which it multiplies


def gate_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    logits = facts.val(n.args[0])  # type: ignore[arg-type]
    if logits.dtype is torch.float64:
        return NoMatch("dtype", n, "logits of at most float32", "float64", src=facts.src(n))
    return None


def gate_gain(n: fx.Node, isa: str) -> float:
    return 5 * _CALL


def lower_gate(n: fx.Node, b: Builder) -> fx.Node:
    return b.op(torch.ops.ascend_cpu.moe_gate.default, *n.args, **n.kwargs)


def experts_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    dtype = facts.val(n).dtype
    w_up, w_down = n.args[3:5]
    operands = (n.args[0], w_up, w_down, n.kwargs.get("b_gate_up"), n.kwargs.get("b_down"))
    other = next((a for a in operands if isinstance(a, fx.Node) and facts.val(a).dtype is not dtype), None)
    if other is not None:
        found = f"%{other.name} of {facts.val(other).dtype}"
        return NoMatch("dtype", n, f"operands of {dtype}", found, src=facts.src(n))
    if facts.val(n.args[1]).dtype is torch.float64:  # type: ignore[arg-type]
        return NoMatch("dtype", n, "weights of at most float32", "float64", src=facts.src(n))
    return None


def experts_gain(n: fx.Node, isa: str) -> float:
    """What the reference spends on experts that a token did not choose, and on copies of weights."""
    ids, weight = n.args[2].meta["val"], n.args[3].meta["val"]  # type: ignore[union-attr]
    tokens, top_k = map(compat.size_hint, ids.shape)
    experts, rows, width = map(compat.size_hint, weight.shape)
    weights = 3 * rows * width // 2  # of both layers of one expert
    if tokens * top_k <= experts:
        return 2 * tokens * top_k * weights * weight.dtype.itemsize / _WRITE + _CALL
    return 2 * tokens * (experts - min(top_k, experts - 1)) * weights / _FLOPS


def lower_experts(n: fx.Node, b: Builder) -> fx.Node:
    """The router's int32 ids go in as they are, not through the cast that the model's int64 ids were."""
    args: list[Any] = list(n.args)
    ids = args[2]
    if isinstance(ids, fx.Node) and ids.target is _convert and ids.args[1] is torch.int64:
        source = ids.args[0]
        if isinstance(source, fx.Node) and source.meta["val"].dtype is torch.int32:
            args[2] = source
    return b.op(torch.ops.ascend_cpu.moe_experts.default, *args, **n.kwargs)
