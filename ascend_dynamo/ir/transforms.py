"""The functions that a prologue may apply to parameters, by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ascend_dynamo.errors import PatternError


@dataclass(frozen=True)
class Transform:
    """``fn(*tensors) -> tensor``, for real and for fake tensors.

    ``alias``: the runtime makes the originals slices of the result, so that in-place writes to them show through.
    """

    fn: Callable[..., torch.Tensor]
    alias: bool = False


def concat0(*tensors: torch.Tensor) -> torch.Tensor:
    """``[n_i, ...] -> [sum n_i, ...]``: concatenation along the first dim (merged linears)."""
    return torch.cat(tensors, 0)


BUILTIN: Mapping[str, Transform] = {"concat0": Transform(concat0, alias=True)}


def transform(name: str) -> Transform:
    """A built-in transform, or ``"package.module:attribute"``, which names a ``Transform`` anywhere.

    Raises:
        PatternError: there is no such transform.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    module, _, attribute = name.partition(":")
    found: Any = None
    if attribute:
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError as e:
            raise PatternError(f"prologue transform {name!r}: cannot import {module!r} ({e})") from e
    if not isinstance(found, Transform):
        raise PatternError(
            f"no prologue transform {name!r}: use one of {sorted(BUILTIN)}, "
            "or 'package.module:attribute' of a Transform"
        )
    return found
