"""Running a graph before and after a rewrite on the same numbers, and saying how the results differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.match.agree import Budget, differs_at_dtype, differs_in_algebra, liftable
from ascend_dynamo.match.evaluate import run_unit
from ascend_dynamo.match.mutate import copy_unit

convert = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Fault:
    """A difference in one sentence; ``runs`` is False if the graph before the rewrite does not even run."""

    sentence: str
    runs: bool = True


def difference(
    unit: GraphUnit,
    after: GraphUnit,
    inputs: Sequence[torch.Tensor],
    *,
    level: int = 2,
    expected: Sequence[Any] = (),
    c_ulp: float | None = None,
) -> Fault | None:
    """How ``after`` differs from ``unit`` on ``inputs``: in float64, at its own dtype, and from what eager gave.

    A cast to less precision than any input has is part of the meaning, in float64 too; one to the precision of the
    inputs is rounding like any other. ``c_ulp`` is for outputs whose rows are not what was added up, such as those of a
    whole layer: so many roundings of the largest element, and the error of eager anywhere, are the budget of all.
    """
    budget, at_once = (Budget(), _same) if c_ulp is None else (Budget(c_ulp), _one_row)
    nodes = [n for u in (unit, after) for n in u.gm.graph.nodes]
    exact = liftable(nodes)
    coarsest = _coarsest((unit, after), inputs)
    rounded = [unit, after] if coarsest is None else [_keep_rounding(u, inputs) for u in (unit, after)]
    try:
        with compat.no_dispatch_modes():
            was64, was = run_unit(rounded[0], inputs, lifted=True), run_unit(unit, inputs)
    except Exception as error:
        return Fault(f"the spelling does not run: {type(error).__name__}: {error}", runs=False)
    try:
        with compat.no_dispatch_modes():
            now64, now = run_unit(rounded[1], inputs, lifted=True), run_unit(after, inputs)
    except Exception as error:
        return Fault(f"what it makes does not run: {type(error).__name__}: {error}")
    for i, (a, b, a64, b64) in enumerate(zip(was, now, was64, now64, strict=True)):
        fault = differs_in_algebra(a64, b64, exact)
        where = "in float64"
        if not fault:
            fault = differs_at_dtype(at_once(a), at_once(b), at_once(a64), level, budget, coarsest)
            where = f"at {a.dtype}"
        if not fault and i < len(expected):
            fault = differs_at_dtype(at_once(expected[i]), at_once(b), at_once(a64), 2, budget, coarsest)
            where = "from eager"
        if fault:
            return Fault(f"output {i} differs {where} {fault}")
    return None


def _same(x: Any) -> Any:
    return x


def _one_row(x: Any) -> Any:
    return x.flatten() if isinstance(x, torch.Tensor) else x


def _coarse(n: Any, inputs: Sequence[torch.Tensor]) -> torch.dtype | None:
    """The dtype of a cast to less precision than any input has."""
    floats = [torch.finfo(t.dtype).eps for t in inputs if t.dtype.is_floating_point]
    dtype = n.args[1] if n.op == "call_function" and n.target is convert else None
    if not floats or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return None
    return dtype if torch.finfo(dtype).eps > max(floats) else None


def _coarsest(units: Sequence[GraphUnit], inputs: Sequence[torch.Tensor]) -> torch.dtype | None:
    """The least precise dtype that values are cast to, if that is less than any input has."""
    found = {d for u in units for n in u.gm.graph.nodes if (d := _coarse(n, inputs)) is not None}
    return max(found, key=lambda d: torch.finfo(d).eps, default=None)


def _keep_rounding(unit: GraphUnit, inputs: Sequence[torch.Tensor]) -> GraphUnit:
    """The unit with casts to less precision than any input has as calls that round in float64 as well."""
    made = copy_unit(unit)
    for n in made.gm.graph.nodes:
        if _coarse(n, inputs) is not None:
            n.target, n.args = _rounded, (n.args[0], str(n.args[1]).removeprefix("torch."))
    return made


def _rounded(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(getattr(torch, dtype)).to(x.dtype)
