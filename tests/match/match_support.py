"""Shared by the tests of the matcher: small patterns over an op of our own, and graphs to try them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ascend_dynamo import capture
from ascend_dynamo.contracts import Domain, GraphUnit
from ascend_dynamo.match import Registry, declare, run_patterns
from ascend_dynamo.match.evaluate import run_unit
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord

library = torch.library.Library("match_test", "DEF")
library.define("fused(Tensor x, Tensor y, float s=1.0) -> Tensor")
library.define("pair(Tensor x, Tensor y, float s) -> (Tensor, Tensor)")
library.define("single(Tensor x) -> Tensor")
library.define("poke(Tensor(a!) x) -> ()")
library.impl("fused", lambda x, y, s=1.0: torch.relu(x + y) * s, "CompositeExplicitAutograd")
library.impl("pair", lambda x, y, s: (torch.relu(x + y) * s, x + y), "CompositeExplicitAutograd")
library.impl("single", lambda x: torch.relu(x) * 1.0, "CompositeExplicitAutograd")
library.impl("poke", lambda x: x.add_(1.0) and None, "CompositeExplicitAutograd")
torch.library.register_fake("match_test::fused", lambda x, y, s=1.0: torch.empty_like(x), lib=library)
torch.library.register_fake("match_test::pair", lambda x, y, s: (torch.empty_like(x), torch.empty_like(x)), lib=library)
torch.library.register_fake("match_test::single", lambda x: torch.empty_like(x), lib=library)
torch.library.register_fake("match_test::poke", lambda x: None, lib=library)
ops = torch.ops.match_test

SAME = Domain(shapes={"x": ("*B", "H"), "y": ("*B", "H")})


def relu_add(x: Any, y: Any) -> Any:
    return torch.relu(x + y)


def fused(x: Any, y: Any) -> Any:
    return ops.fused(x, y)


RELU_ADD = declare("relu_add", eager=relu_add, replace=fused, domain=SAME)


def captured(fn: Callable[..., Any], *args: Any, params: Sequence[int] = ()) -> GraphUnit:
    """``fn(*args)`` as a normalised unit."""
    with torch.no_grad():
        unit = capture.trace(fn, args)
    placeholders = unit.gm.graph.find_nodes(op="placeholder")
    unit.params = tuple(placeholders[i].name for i in params)
    normalize(unit)
    return unit


def rewritten(
    fn: Callable[..., Any], args: Sequence[Any], *patterns: Any, validate: bool = False, **options: Any
) -> tuple[GraphUnit, CompileRecord]:
    """``fn`` after the patterns, checked against ``fn`` itself."""
    unit = captured(fn, *args)
    record = CompileRecord()
    run_patterns(unit, Registry(patterns), Options(strict=True, validate=validate, **options), record)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    expected = fn(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(run_unit(unit, tensors), expected, strict=False):
        torch.testing.assert_close(got, want)
    return unit, record


def count(unit: GraphUnit, target: Any) -> int:
    return len(unit.gm.graph.find_nodes(op="call_function", target=target))


def pair_of(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
