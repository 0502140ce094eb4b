"""Running models with caches, compiled and not, and watching what the compiled graphs do to memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _kv_caches
import _models

from ascend_dynamo.backend import Backend

__all__ = ["Watch", "Watched", "_kv_caches", "_models", "addresses", "tokens"]


class Watch(TorchDispatchMode):
    """Notes every operator that makes, or overwrites in whole, a tensor of at least ``elements`` elements.

    Inside an operator of the dialect nothing is seen: what it does there is the kernel's matter.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in pytree.tree_leaves(out):
            if not isinstance(t, Tensor) or t.numel() < self.elements:
                continue
            if t.untyped_storage().data_ptr() not in given or func is torch.ops.aten.copy_.default:
                self.copies.append(f"{func}{tuple(t.shape)}")
        return out


class Watched:
    """A backend on the reference target whose compiled graphs run under ``Watch``; ``graphs`` counts them."""

    def __init__(self, elements: int, **options: Any) -> None:
        self.backend = Backend({"target": "reference", **options}, texts=True)
        self.watch = Watch(elements)
        self.__name__ = "watched"

    @property
    def graphs(self) -> int:
        return len(self.backend.records)

    def __call__(self, gm: Any, inputs: Sequence[Any], **more: Any) -> Callable[..., Any]:
        compiled = self.backend(gm, inputs, **more)

        def run(*args: Any) -> Any:
            with self.watch:
                return compiled(*args)

        return run


def tokens(step: Callable[..., Any], cache: Any, first: Tensor, steps: int, **more: Any) -> Tensor:
    """Greedy tokens [B, steps] after ``first`` [B, S], each from ``step(ids, past_key_values=cache)``."""
    out, ids = [], first
    for _ in range(steps):
        ids = step(ids, past_key_values=cache, use_cache=True, **more).logits[:, -1:].argmax(-1)
        out.append(ids)
    return torch.cat(out, 1)


def addresses(cache: Any) -> list[int]:
    """Where the cache keeps its keys and values."""
    return [t.data_ptr() for t in _kv_caches.buffers(cache)]
