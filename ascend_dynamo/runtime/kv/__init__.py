"""The paged KV cache at run time; ``docs/kv.md`` says how its parts are used."""

from __future__ import annotations

from ascend_dynamo.runtime.kv.pool import BlockPool
from ascend_dynamo.runtime.kv.records import ABSENT, Copy, Opened, PoolStatistics

__all__ = ["ABSENT", "BlockPool", "Copy", "Opened", "PoolStatistics"]
