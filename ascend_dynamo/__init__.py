"""Ascend Dynamo: a graph compiler for LLM inference on Ascend NPUs, built on ``torch.compile``.

``torch.compile(model, backend="ascend_opt")`` needs no import of this package; what it exports are the tools around.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascend_dynamo.backend import Backend
    from ascend_dynamo.regions import fuse, no_fuse
    from ascend_dynamo.report.explain import explain
    from ascend_dynamo.runtime.kv import PagedAttention, PagedKVCache, PagedRequests
    from ascend_dynamo.runtime.pool import MemoryPool
    from ascend_dynamo.runtime.weights import refresh

__version__ = "0.1.0"
__all__ = [
    "Backend",
    "MemoryPool",
    "PagedAttention",
    "PagedKVCache",
    "PagedRequests",
    "explain",
    "fuse",
    "no_fuse",
    "refresh",
]

_HOMES = {
    "Backend": "ascend_dynamo.backend",
    "MemoryPool": "ascend_dynamo.runtime.pool",
    "PagedAttention": "ascend_dynamo.runtime.kv",
    "PagedKVCache": "ascend_dynamo.runtime.kv",
    "PagedRequests": "ascend_dynamo.runtime.kv",
    "explain": "ascend_dynamo.report.explain",
    "fuse": "ascend_dynamo.regions",
    "no_fuse": "ascend_dynamo.regions",
    "refresh": "ascend_dynamo.runtime.weights",
}


def __getattr__(name: str) -> Any:
    """Imported on first use: the names above pull in the compiler, and ``import ascend_dynamo`` should be cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
