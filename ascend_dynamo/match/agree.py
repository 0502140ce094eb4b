"""Comparing before and after: the algebra in float64, then rounding at the site's own dtype (or bits, at level O1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ascend_dynamo.dialect.equal import agree, bitwise

UNITS = 4.0  # roundings of the dtype that a result may be off beyond what eager is off
_LIFTABLE = frozenset({"aten", "prims", "ascend", "_operator"})


def liftable(nodes: Iterable[fx.Node]) -> bool:
    """False if one of the calls is of a namespace whose kernels may compute in float32 whatever they are given."""
    return {getattr(n.target, "namespace", "_operator") for n in nodes if n.op == "call_function"} <= _LIFTABLE


def differs_in_algebra(was: Any, now: Any, exact: bool = True) -> str:
    """How two results computed in float64 differ beyond 1e-10 of a row ("" if they do not); ``exact=False``: beyond
    the rounding of float32, for operators that cannot be lifted."""
    found = agree(now, was, was) if exact else agree(now, None, was, dtype=torch.float32, c_ulp=UNITS)
    return "" if found is None else f"({found})"


def differs_at_dtype(was: Any, now: Any, exact: Any, level: int = 2) -> str:
    """How ``now`` is further from ``exact`` than ``was`` and some rounding allow; at level O1 how its bits differ."""
    found = bitwise(now, was) if level <= 1 else agree(now, was, exact, c_ulp=UNITS)
    return "" if found is None else f"({found})"
