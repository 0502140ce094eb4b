"""When two results are the same: float64 algebra to 1e-10 of the row, and a rounding budget at the site's dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

ALGEBRA = 1e-10  # relative to the row's largest value
OPAQUE = 2e-6  # where an operator computes in float32 inside and cannot be lifted
UNITS = 16.0  # roundings of the dtype that a result may be off beyond what eager is off


def differs_in_algebra(was: Any, now: Any, tolerance: float = ALGEBRA) -> str:
    """ "" if two float64 results agree, else how they differ."""
    fault = _kind(was, now)
    if fault or not isinstance(was, torch.Tensor):
        return fault
    if not was.dtype.is_floating_point:
        return "" if torch.equal(was, now) else "has other values"
    fault = _special(was, now)
    if fault:
        return fault
    a, b = _finite(was), _finite(now)
    bound = tolerance * _row_scale(a)
    worst = ((a - b).abs() - bound).max() if a.numel() else torch.tensor(-1.0)
    if worst <= 0:
        return ""
    return f"is off by {(a - b).abs().max().item():.3g} where values reach {a.abs().max().item():.3g}"


def differs_at_dtype(was: Any, now: Any, exact: Any) -> str:
    """ "" if ``now`` is as near to ``exact`` (float64) as ``was`` is, up to a few roundings, else how far it is."""
    fault = _kind(was, now)
    if fault or not isinstance(was, torch.Tensor):
        return fault
    if not was.dtype.is_floating_point:
        return "" if torch.equal(was, now) else "has other values"
    fault = _special(was, now)
    if fault:
        return fault
    a, b, e = _finite(was), _finite(now), _finite(exact)
    if not a.numel():
        return ""
    eager = (a - e).abs()
    rows = eager.amax(-1, keepdim=True) if eager.dim() else eager
    budget = torch.maximum(2 * rows, UNITS * torch.finfo(was.dtype).eps * _row_scale(e))
    off = (b - e).abs()
    if bool((off <= budget).all()):
        return ""
    return f"is off by {off.max().item():.3g} (eager by {eager.max().item():.3g}, allowed {budget.max().item():.3g})"


_LIFTABLE = frozenset({"aten", "prims", "ascend", "_operator"})


def algebra_tolerance(nodes: Iterable[fx.Node]) -> float:
    """1e-10, unless one of the calls is of a namespace whose kernels we cannot lift to float64."""
    spaces = {getattr(n.target, "namespace", "_operator") for n in nodes if n.op == "call_function"}
    return ALGEBRA if spaces <= _LIFTABLE else OPAQUE


def _kind(was: Any, now: Any) -> str:
    if not isinstance(was, torch.Tensor):
        return "" if was == now else f"is {now!r} instead of {was!r}"
    if not isinstance(now, torch.Tensor) or now.dtype != was.dtype:
        return f"has dtype {getattr(now, 'dtype', None)} instead of {was.dtype}"
    return "" if now.shape == was.shape else f"has shape {list(now.shape)} instead of {list(was.shape)}"


def _special(was: torch.Tensor, now: torch.Tensor) -> str:
    if not torch.equal(was.isnan(), now.isnan()):
        return f"has {int(now.isnan().sum())} NaNs instead of {int(was.isnan().sum())}, or elsewhere"
    inf = was.isinf()
    if not torch.equal(inf, now.isinf()) or not torch.equal(was[inf], now[inf]):
        return "has other infinities"
    return ""


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x.double(), 0.0, 0.0, 0.0)


def _row_scale(x: torch.Tensor) -> torch.Tensor:
    if not x.numel():
        return x
    scale = x.abs().amax(-1, keepdim=True) if x.dim() else x.abs()
    return scale.clamp_min(1e-30 if bool(x.any()) else 1e-12)
