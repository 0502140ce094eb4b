"""Value-semantics twins of the cache writes: the new contents of the caches are results, the old ones stay.

Graphs keep these through all passes; the last pass (``passes/reinplace.py``) makes them the in-place operators again
where the old contents are dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ascend_dynamo.dialect import mla, paged
from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample

_WRITES = {spec.name: spec for family in (paged, mla) for spec in family.SPECS if spec.mutates}


def _written(write: Callable[..., Any], new: tuple[Tensor, ...], caches: tuple[Tensor, ...], *rest: Any) -> Any:
    """Copies of the caches after ``write``."""
    copies = [cache.clone(memory_format=torch.contiguous_format) for cache in caches]
    write(*new, *copies, *rest)
    return copies


def _with_scales(
    write: Callable[..., Any], k: Tensor, v: Tensor, caches: tuple[Tensor, Tensor], slots: Tensor, scales: Any
) -> list[Tensor]:
    given = {name: s.clone(memory_format=torch.contiguous_format) for name, s in scales.items() if s is not None}
    copies = [cache.clone(memory_format=torch.contiguous_format) for cache in caches]
    write(k, v, *copies, slots, **given)
    return [*copies, *given.values()]


def kv_write_functional(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> list[Tensor]:
    """The caches after ``kv_write`` of the same arguments, which stay as they are.

    Returns [k_cache, v_cache], behind them [k_scale, v_scale] where those are given: contiguous copies.
    """
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return _with_scales(_WRITES["kv_write"].reference, k, v, (k_cache, v_cache), slot_mapping, scales)


def _kv_write_kernel(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> list[Tensor]:
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return _with_scales(torch.ops.ascend.kv_write.default, k, v, (k_cache, v_cache), slot_mapping, scales)


def _kv_write_fake(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (k_cache, v_cache, k_scale, v_scale) if x is not None]


def _kv_write_f64(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> list[Tensor]:
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return _with_scales(_WRITES["kv_write"].formula, k, v, (k_cache, v_cache), slot_mapping, scales)


def mla_kv_write_functional(
    ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    """The caches [blocks, block_size, R] and [blocks, block_size, P] after ``mla_kv_write`` of the same arguments.

    Those stay as they are: the results are contiguous copies.
    """
    write = _WRITES["mla_kv_write"].reference
    a, b = _written(write, (ckv, k_rope), (ckv_cache, rope_cache), slot_mapping)
    return a, b


def _mla_kernel(
    ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    write = torch.ops.ascend.mla_kv_write.default
    a, b = _written(write, (ckv, k_rope), (ckv_cache, rope_cache), slot_mapping)
    return a, b


def _mla_fake(
    ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    return ckv_cache.new_empty(ckv_cache.shape), rope_cache.new_empty(rope_cache.shape)


def _mla_f64(
    ckv: Tensor, k_rope: Tensor, ckv_cache: Tensor, rope_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor]:
    write = _WRITES["mla_kv_write"].formula
    a, b = _written(write, (ckv, k_rope), (ckv_cache, rope_cache), slot_mapping)
    return a, b


def _samples_of(name: str) -> Callable[[Draw], Iterator[Sample]]:
    """Those of the in-place operator; what it rounds to int8 is compared with it, not with float64."""

    def samples(d: Draw) -> Iterator[Sample]:
        yield from (sample for sample in _WRITES[name].samples(d) if not sample.kwargs)

    return samples


SPECS = (
    OpSpec(
        "kv_write_functional",
        "(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, *, Tensor? k_scale=None,"
        " Tensor? v_scale=None) -> Tensor[]",
        kv_write_functional,
        _kv_write_fake,
        _kv_write_f64,
        c_ulp=1.0,
        samples=_samples_of("kv_write"),
        kernel=_kv_write_kernel,
    ),
    OpSpec(
        "mla_kv_write_functional",
        "(Tensor ckv, Tensor k_rope, Tensor ckv_cache, Tensor rope_cache, Tensor slot_mapping) -> (Tensor, Tensor)",
        mla_kv_write_functional,
        _mla_fake,
        _mla_f64,
        c_ulp=1.0,
        samples=_samples_of("mla_kv_write"),
        kernel=_mla_kernel,
    ),
)
