"""The paged KV cache at run time; ``docs/kv.md`` says how its parts are used.

``PagedKVCache`` needs transformers and is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ascend_dynamo.runtime.kv.attention import PagedAttention
from ascend_dynamo.runtime.kv.page_sizes import PageSizes, page_sizes
from ascend_dynamo.runtime.kv.pool import BlockPool
from ascend_dynamo.runtime.kv.records import ABSENT, Copy, Opened, PoolStatistics

if TYPE_CHECKING:
    from ascend_dynamo.runtime.kv.batch import PagedBatch, PagedRequests
    from ascend_dynamo.runtime.kv.cache import CacheStatistics, PagedKVCache

__all__ = [
    "ABSENT",
    "BlockPool",
    "CacheStatistics",
    "Copy",
    "Opened",
    "PageSizes",
    "PagedAttention",
    "PagedBatch",
    "PagedKVCache",
    "PagedRequests",
    "PoolStatistics",
    "page_sizes",
]

_LATE = {"PagedKVCache": "cache", "CacheStatistics": "cache", "PagedBatch": "batch", "PagedRequests": "batch"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
