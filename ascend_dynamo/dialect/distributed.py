"""Tensor parallelism: matmul_all_reduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample


def matmul_all_reduce(x: Tensor, w: Tensor, bias: Tensor | None, group: str) -> Tensor:
    """The row-parallel linear: sum over the ranks of ``group`` of x w^T, then + bias once.

    x [*B,K], w [N,K] (this rank's shards of K), bias [N] or None (the same on all ranks); result [*B,N] in x.dtype.
    ``group`` is a process group's name; "" is the default group, or this process alone if torch.distributed is not
    initialised.

    Raises:
        ValueError: a group is named, but torch.distributed is not initialised.
    """
    y = F.linear(x, w)
    name = _group_name(group)
    if name is not None:
        y = torch.ops._c10d_functional.all_reduce(y.contiguous(), "sum", name)
        y = torch.ops._c10d_functional.wait_tensor(y)
    return (y if bias is None else y + bias).contiguous()


def _group_name(group: str) -> str | None:
    if not (dist.is_available() and dist.is_initialized()):
        if group:
            raise ValueError(
                f"matmul_all_reduce: process group {group!r} is named, but torch.distributed is not initialised; "
                "call torch.distributed.init_process_group first, or pass '' to run in this process alone"
            )
        return None
    world = dist.group.WORLD
    return group or (None if world is None else world.group_name)


def _fake(x: Tensor, w: Tensor, bias: Tensor | None, group: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _f64(x: Tensor, w: Tensor, bias: Tensor | None, group: str) -> Tensor:
    """Single process: a group of one rank."""
    y = torch.einsum("...k,nk->...n", x, w)
    return y if bias is None else y + bias


def _row_scale(x: Tensor, w: Tensor, bias: Tensor | None, group: str) -> Tensor:
    y = torch.einsum("...k,nk->...n", x.abs(), w.abs())
    return (y if bias is None else y + bias.abs()).amax(-1, keepdim=True)


def _samples(d: Draw) -> Iterator[Sample]:
    yield Sample((d.normal(2, 3, 16), d.normal(5, 16), None, ""), {}, "no bias")
    yield Sample((d.normal(3, 16), d.normal(5, 16), d.normal(5), ""), {}, "bias")


SPECS = (
    OpSpec(
        "matmul_all_reduce",
        "(Tensor x, Tensor w, Tensor? bias, str group) -> Tensor",
        matmul_all_reduce,
        _fake,
        _f64,
        c_ulp=2.0,
        samples=_samples,
        row_scale=_row_scale,
        autocast="lower",
        differentiable=False,
    ),
)
