"""When two results are equal: the one definition, and the one table of tolerances, for tests, fuzzer and validation.

A new result is judged against the exact one (float64), and may be as wrong as the old one was: per row,

    |new - f64| <= max(2 * max_row |eager - f64|, c_ulp * eps(dtype) * s_row)

never by closeness of new to eager alone. s_row is the size of what was added up in the row: sum |a||b| for a dot, max
|V| for attention, by default the largest magnitude of the exact row. A row is the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Tolerance:
    """``eps``: the unit of the rounding budget. ``tiny``: differences below it are never an error (denormals)."""

    eps: float
    tiny: float


def _of(dtype: torch.dtype) -> Tolerance:
    info = torch.finfo(dtype)
    return Tolerance(info.eps, info.tiny)


ALGEBRA = 1e-10  # relative tolerance in float64: it tells erf from tanh, and eps 1e-5 from 1e-6
TOLERANCE: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float64: Tolerance(ALGEBRA, 1e-300),
        **{dtype: _of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
        **{dtype: _of(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)},
    }
)


@dataclass(frozen=True)
class Disagreement:
    """Why two results are not equal, in one sentence. ``excess``: the worst element's error over its budget."""

    reason: str
    output: int = 0
    index: tuple[int, ...] = ()
    excess: float = float("inf")

    def __str__(self) -> str:
        return self.reason


def agree(
    new: Any,
    eager: Any,
    f64: Any = None,
    *,
    dtype: torch.dtype | None = None,
    c_ulp: float = 4.0,
    row_scale: Any = None,
    strides: bool = False,
) -> Disagreement | None:
    """Compare results (tensors, or the same tree of tensors): None if they are equal, else why not.

    Args:
        new: the result to judge.
        eager: the result of the code that it replaces; None judges ``new`` by ``f64`` and ``c_ulp`` alone.
        f64: the exact result in float64; None takes ``eager`` for it (budget ``c_ulp`` only). For an integer result
            it may be float64 values before rounding to nearest.
        dtype: the dtype in which the computation rounded, if wider in eps than a result's own dtype.
        row_scale: s_row of each output: None, or a tree like ``f64`` (leaves broadcastable to the output, or None).
        strides: also compare strides (of axes longer than 1).
    """
    news, eagers, exacts = _leaves(new), _leaves(eager), _leaves(f64)
    exacts = exacts if f64 is not None else list(eagers)
    eagers = eagers if eager is not None else [None] * len(news)
    if not len(news) == len(eagers) == len(exacts):
        return Disagreement(f"{len(news)} outputs, expected {max(len(eagers), len(exacts))}")
    scales = [None] * len(news) if row_scale is None else _leaves(row_scale)
    for i, (n, e, x, s) in enumerate(zip(news, eagers, exacts, scales, strict=True)):
        found = _one(n, e, x, dtype, c_ulp, s, strides)
        if found is not None:
            prefix = f"output {i}: " if len(news) > 1 else ""
            return Disagreement(prefix + found.reason, i, found.index, found.excess)
    return None


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda leaf: leaf is None)


def _one(
    new: Any, eager: Any, exact: Any, dtype: torch.dtype | None, c_ulp: float, scale: Any, strides: bool
) -> Disagreement | None:
    if not isinstance(new, Tensor):
        return None if new == exact else Disagreement(f"{new!r}, expected {exact!r}")
    typed = eager if eager is not None else exact
    if new.shape != typed.shape:
        return Disagreement(f"shape {tuple(new.shape)}, expected {tuple(typed.shape)}")
    if eager is not None and new.dtype != eager.dtype:
        return Disagreement(f"dtype {new.dtype}, expected {eager.dtype}")
    if strides and eager is not None and significant_strides(new) != significant_strides(eager):
        return Disagreement(f"strides {new.stride()}, expected {eager.stride()}")
    if new.numel() == 0:
        return None
    new, exact = new.detach(), exact.detach()
    eager = None if eager is None else eager.detach()
    if new.is_complex():
        # real and imaginary parts share a row, whose scale is the magnitude's
        parts = [None if t is None else torch.view_as_real(t.resolve_conj()).flatten(-2) for t in (new, eager, exact)]
        return _floating(parts[0], parts[1], parts[2], dtype, c_ulp, scale)
    if new.is_floating_point():
        return _floating(new, eager, exact, dtype, c_ulp, scale)
    if exact.is_floating_point():
        return _rounded(new, eager, exact, dtype, c_ulp, scale)
    wrong = new != (eager if eager is not None else exact)
    return _worst("integer", wrong.double(), new, typed, torch.zeros(())) if bool(wrong.any()) else None


def _floating(
    new: Any, eager: Any, exact: Any, dtype: torch.dtype | None, c_ulp: float, scale: Any
) -> Disagreement | None:
    tolerance = _unit(new.dtype, dtype)
    n, x = new.double(), exact.double()
    # what eager gave decides what is not finite: it may overflow where float64 does not
    special = eager.double() if eager is not None else exact.to(new.dtype).double()
    nan = torch.isnan(special)
    if bool((nan != torch.isnan(n)).any()):
        return _worst("NaN position", (nan != torch.isnan(n)).double(), new, special, torch.zeros(()))
    infinite = torch.isinf(special)
    mismatch = (infinite | torch.isinf(n)) & (n != special)
    if bool(mismatch.any()):
        return _worst("infinity", mismatch.double(), new, special, torch.zeros(()))
    finite = ~(nan | infinite)
    x = torch.where(torch.isfinite(x), x, special)  # eager is finite where the algebra is not: eager is the meaning
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (n - x).abs(), zero)
    budget = _budget(error, x, finite, scale, c_ulp * tolerance.eps)
    if eager is not None:
        budget = torch.maximum(budget, 2 * _row_max(torch.where(finite, (special - x).abs(), zero)))
    over = error / (budget + tolerance.tiny)
    return _worst("value", over, new, x, budget) if bool((over > 1).any()) else None


def _rounded(
    new: Tensor, eager: Any, exact: Tensor, dtype: torch.dtype | None, c_ulp: float, scale: Any
) -> Disagreement | None:
    """Integers that should be ``exact`` rounded to nearest: half a unit, and the budget for where the tie falls."""
    unit = _unit(torch.float32, dtype)
    x = exact.double()
    finite = torch.isfinite(x)
    error = torch.where(finite, (new.double() - x).abs(), torch.zeros((), dtype=torch.float64))
    budget = 0.5 + _budget(error, x, finite, scale, c_ulp * unit.eps)
    if eager is not None:
        budget = torch.maximum(budget, _row_max(torch.where(finite, (eager.double() - x).abs(), budget * 0)))
    over = error / budget
    return _worst("rounded value", over, new, x, budget) if bool((over > 1).any()) else None


def _unit(own: torch.dtype, working: torch.dtype | None) -> Tolerance:
    units = [TOLERANCE[_real(d)] for d in (own, working) if d is not None and (d.is_floating_point or d.is_complex)]
    return max(units, key=lambda unit: unit.eps)


def _real(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}.get(
        dtype, dtype
    )


def _budget(error: Tensor, exact: Tensor, finite: Tensor, scale: Any, unit: float) -> Tensor:
    if scale is None:
        magnitude = _row_max(torch.where(finite, exact.abs(), torch.zeros((), dtype=torch.float64)))
    else:
        magnitude = torch.as_tensor(scale, dtype=torch.float64).abs().nan_to_num(0.0, 0.0, 0.0)
    return (unit * magnitude).expand_as(error)


def _row_max(t: Tensor) -> Tensor:
    return (t.amax(-1, keepdim=True) if t.dim() else t).expand_as(t)


def _worst(kind: str, over: Tensor, new: Tensor, expected: Tensor, budget: Tensor) -> Disagreement:
    flat = int(over.flatten().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), over.shape)) if over.dim() else ()
    found, wanted = new.flatten()[flat].item(), expected.flatten()[flat].item()
    count, total = int((over > 0 if budget.dim() == 0 else over > 1).sum()), over.numel()
    text = f"{kind} at {list(index)} is {found!r}, expected {wanted!r}"
    if budget.dim():
        text += f" within {budget.flatten()[flat].item():.3g}"
    return Disagreement(f"{text}; {count} of {total} elements differ", 0, index, float(over.flatten()[flat]))


def significant_strides(t: Tensor) -> tuple[int, ...]:
    """Strides that matter: of axes longer than 1, none for an empty tensor."""
    if t.numel() == 0:
        return ()
    return tuple(int(stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def assert_close_f64(
    new: Any,
    eager: Any,
    f64: Any,
    dtype: torch.dtype | None = None,
    c_ulp: float = 4.0,
    row_scale: Any = None,
    *,
    strides: bool = False,
) -> None:
    """Raise AssertionError with the reason unless ``agree`` says that the results are equal; arguments as there."""
    found = agree(new, eager, f64, dtype=dtype, c_ulp=c_ulp, row_scale=row_scale, strides=strides)
    if found is not None:
        raise AssertionError(found.reason)


def bitwise(new: Any, eager: Any, *, strides: bool = False) -> Disagreement | None:
    """Level O1's equality: same shape, dtype and bits, any NaN equal to any NaN, -0.0 different from 0.0."""
    news, eagers = _leaves(new), _leaves(eager)
    if len(news) != len(eagers):
        return Disagreement(f"{len(news)} outputs, expected {len(eagers)}")
    for i, (n, e) in enumerate(zip(news, eagers, strict=True)):
        if isinstance(n, Tensor) and isinstance(e, Tensor) and (n.shape, n.dtype) == (e.shape, e.dtype):
            found = _bits(n.detach(), e.detach(), strides)
        else:
            found = _one(n, e, e, None, 0.0, None, strides)
        if found is not None:
            return Disagreement(found.reason, i, found.index, found.excess)
    return None


def _bits(new: Tensor, eager: Tensor, strides: bool) -> Disagreement | None:
    if strides and significant_strides(new) != significant_strides(eager):
        return Disagreement(f"strides {new.stride()}, expected {eager.stride()}")
    if new.is_complex():
        new, eager = torch.view_as_real(new.resolve_conj()), torch.view_as_real(eager.resolve_conj())
    wrong = new != eager
    if new.is_floating_point():
        wrong = (wrong & ~(torch.isnan(new) & torch.isnan(eager))) | (torch.signbit(new) != torch.signbit(eager)) & ~(
            torch.isnan(new)
        )
    return _worst("bits", wrong.double(), new, eager, torch.zeros(())) if bool(wrong.any()) else None


def agree_choice(new: Tensor, eager: Tensor, scores64: Tensor, budget: float) -> Disagreement | None:
    """Chosen indices (argmax, top-k; [..., k] into the last axis of ``scores64``): equal, as sets per row, unless the
    float64 scores of what was exchanged differ by at most ``budget``."""
    new, eager = new.long().sort(-1).values, eager.long().sort(-1).values
    gap = (scores64.gather(-1, new).sort(-1).values - scores64.gather(-1, eager).sort(-1).values).abs()
    wrong = (new != eager).any(-1, keepdim=True) & (gap > budget)
    if not bool(wrong.any()):
        return None
    row = tuple(int(i) for i in torch.nonzero(wrong)[0][:-1])
    return Disagreement(
        f"choice in row {list(row)} is {new[row].tolist()}, expected {eager[row].tolist()}, "
        f"whose scores differ by {float(gap[row].max()):.3g}, more than {budget:.3g}",
        0,
        row,
    )
