"""Every operator as a pytest parameter, its samples, and helpers that the dialect's tests share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from ascend_dynamo.dialect import SPECS, Draw, OpSpec, Sample

HALF = (torch.bfloat16, torch.float16)


def samples(spec: OpSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Sample]:
    return list(spec.samples(Draw(seed, dtype)))


every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)


def clone(tree: Any) -> Any:
    """Copies of the tensors, strides kept."""
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, tree)


def run(fn: Any, sample: Sample) -> Any:
    """The result; for an operator that writes its arguments, the arguments afterwards. The sample stays as it is."""
    args, kwargs = clone((sample.args, dict(sample.kwargs)))
    result = fn(*args, **kwargs)
    return (*args, *kwargs.values()) if result is None else result
