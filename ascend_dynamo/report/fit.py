"""``ascend-dynamo memory``: does a model fit at a gear, and what would, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ascend_dynamo.errors import MemoryPlanError
from ascend_dynamo.memory import Fit, Gear, MemoryBudget, forecast


def check_fit(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    limit: int | str,
    batch: int | None = None,
    chunk: int | None = None,
    kv_length: int | None = None,
    options: Mapping[str, Any] | None = None,
    **budget: Any,
) -> Fit:
    """Whether ``model`` fits in ``limit`` at a gear; the sizes that are not given are those of the example arguments.

    The first tensor of ``args`` and ``kwargs`` is [batch, chunk, ...]. The KV cache is counted where the model has a
    transformers configuration (``model.config``). ``budget`` are arguments of ``MemoryBudget``.

    Raises:
        MemoryPlanError: the example has no such tensor, or a size is impossible.
    """
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
    if first is None or first.dim() < 2:
        raise MemoryPlanError("the example arguments hold no tensor [batch, tokens, ...] to read the gear from")
    example = Gear(first.shape[0], first.shape[1], first.shape[1])
    length = kv_length or max(chunk or example.chunk, 1)
    gear = Gear(batch or example.batch, chunk or example.chunk, length)
    config = getattr(model, "config", None)
    config = config if hasattr(config, "get_text_config") else None
    found = MemoryBudget.of(forecast(model, *args, options=options, **kwargs), example, config, **budget)
    return found.fits(limit, gear)


def to_dict(fit: Fit) -> dict[str, Any]:
    """Plain data for JSON."""
    return {
        "fits": bool(fit),
        "limit": fit.limit,
        "gear": asdict(fit.gear),
        "needed": {**asdict(fit.needed), "total": fit.needed.total},
        "advice": list(fit.advice),
    }
