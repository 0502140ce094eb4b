"""How far a cache is from another one that has seen the same tokens: what int8 pages cost."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ascend_dynamo.runtime.kv.cache import PagedKVCache


class LayerError(NamedTuple):
    """Relative error of one layer's keys and values: root mean square of the difference over that of the reference."""

    keys: float
    values: float


def cache_error(cache: PagedKVCache, reference: PagedKVCache) -> list[LayerError]:
    """The error of ``cache`` per layer against ``reference`` (full precision), both after the same tokens.

    The first layer's error is that of storing alone; later ones include what it did to the layers before.
    """
    errors = []
    for index in range(len(cache.layers)):
        pairs = zip(cache.dense(index), reference.dense(index), strict=True)
        errors.append(LayerError(*(_relative(ours.double(), exact.double()) for ours, exact in pairs)))
    return errors


def _relative(ours: Tensor, exact: Tensor) -> float:
    size = float(exact.square().mean().sqrt())
    return float((ours - exact).square().mean().sqrt()) / size if size else float(ours.abs().max() > 0)
