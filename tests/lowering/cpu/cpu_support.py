"""The rounding budget: per row, twice what eager is off, or a unit of the dtype on the absolute sum of the terms."""

from __future__ import annotations

import torch

from ascend_dynamo.lowering.cpu import kernels

kernels.load()
ops = torch.ops.ascend_cpu


def assert_in_budget(
    got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor, ulps: float = 1.0
) -> None:
    """``exact`` is float64; ``scale`` (broadcastable to it) bounds the absolute sum of the terms of an element."""
    assert got.dtype == eager.dtype and got.shape == eager.shape
    new, old = got.double(), eager.double()
    assert torch.equal(new.isnan(), exact.isnan())
    infinite = exact.isinf()
    assert torch.equal(new[infinite], exact[infinite])
    if not exact.numel():
        return
    finite = exact.isfinite()
    off, allowed = (new - exact).abs(), (old - exact).abs()
    allowed = torch.where(finite & allowed.isfinite(), allowed, torch.zeros_like(allowed))
    budget = torch.maximum(2 * allowed.amax(-1, keepdim=True), ulps * torch.finfo(got.dtype).eps * scale.double())
    wrong = finite & ~(off <= budget)
    assert not wrong.any(), f"{int(wrong.sum())} elements; worst {off[wrong].max()}"
