"""What tells the shapes of a compiled graph apart: the values of its symbolic sizes, taken from a call's inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ascend_dynamo.ir.sym import expr

Key = Callable[[Sequence[Any]], tuple[int, ...]]


def shape_key(values: Sequence[Any]) -> Key | None:
    """A function of a call's inputs, or None where no size is symbolic.

    ``values`` are the fake values of the graph's inputs. Most symbols are inputs of their own (Dynamo adds an integer
    for each); one that is not is read from a tensor's shape.
    """
    places = [i for i, v in enumerate(values) if isinstance(v, torch.SymInt)]
    covered = {e for i in places if _symbol(e := expr(values[i]))}
    axes: list[tuple[int, int]] = []
    for i, v in enumerate(values):
        for d, size in enumerate(v.shape if isinstance(v, torch.Tensor) else ()):
            free: set[Any] = set() if isinstance(size, int) else expr(size).free_symbols - covered
            if free:
                axes.append((i, d))
                covered |= free if _symbol(expr(size)) else set()
    if axes:
        return lambda args: (*(args[i] for i in places), *(args[i].shape[d] for i, d in axes))
    if len(places) == 1:
        (only,) = places
        return lambda args: (args[only],)
    return operator.itemgetter(*places) if places else None


def _symbol(e: Any) -> bool:
    return not isinstance(e, int) and bool(e.is_Symbol)
