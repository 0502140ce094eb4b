"""From a match to new calls: the replacement's template with the match's inputs, sizes and scalars filled in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder
from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.match.canonical import split
from ascend_dynamo.match.matcher import TracedMatch
from ascend_dynamo.match.samples import evaluate
from ascend_dynamo.match.terms import (
    CALL,
    DEVICE,
    DTYPE,
    LIST,
    LITERAL,
    SCALAR,
    SIZE,
    SIZES,
    SKIP,
    VAR,
    Arg,
    Call,
    Spread,
)


def instantiate(m: TracedMatch, b: Builder) -> tuple[fx.Node, ...]:
    """Build the replacement of ``m`` through ``b``; returns one node per output."""
    alternative = m.alternative
    assert alternative is not None and m.sizes is not None
    made: list[fx.Node] = []
    inputs = [m.inputs[i.name] for i in alternative.inputs]

    def value(a: Arg, call: Call | None = None) -> Any:
        kind = a.kind
        if kind == CALL:
            return made[a.data.index]
        if kind == VAR:
            return inputs[a.data]
        if kind == LITERAL:
            return list(a.data) if isinstance(a.data, tuple) else a.data
        if kind == LIST:
            return [value(x) for x in a.data]
        if kind == SIZE:
            return _number(a.data, m)
        if kind == SIZES:
            return list(evaluate(a.data, m.sizes or {}))
        if kind == SCALAR:
            return a.data.forward(m.inputs[a.data.name])
        if kind == DTYPE:
            return m.dtype
        if kind == DEVICE:
            return inputs[0].meta["val"].device
        assert kind == SKIP and call is not None and call.shape is not None
        return list(evaluate(call.shape, m.sizes or {}))

    for call in alternative.new_calls:
        args, kwargs = split(call.op, tuple(value(a, call) for a in call.args))
        made.append(_make(b, call, args, kwargs, m, value))
    return tuple(value(o) for o in alternative.new_outputs)


def _make(b: Builder, call: Call, args: Any, kwargs: Any, m: TracedMatch, value: Callable[[Arg], Any]) -> fx.Node:
    """The call, by what tracing has learnt of its result if that says enough here."""
    sizes = m.sizes or {}
    if call.result is not None and isinstance(b, GraphBuilder) and any(isinstance(a, fx.Node) for a in args):
        dtype, shape = call.result
        if _sized(shape, sizes):
            return b.call(call.op, args, kwargs, evaluate(shape, sizes), value(dtype))
    return b.op(call.op, *args, **kwargs)


def _sized(shape: tuple[Any, ...], sizes: Any) -> bool:
    """True if everything that the shape mentions is known here."""
    return all("*" + i.name in sizes if isinstance(i, Spread) else i.names() <= sizes.keys() for i in shape)


def _number(expr: Any, m: TracedMatch) -> Any:
    number = expr({**(m.sizes or {}), **{k: v for k, v in m.inputs.items() if isinstance(v, int)}})
    return float(number) if isinstance(number, float) and math.isfinite(number) else number
