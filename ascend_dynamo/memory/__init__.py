"""Memory plans: how long each buffer of a graph lives, and where it lies."""

from __future__ import annotations

from ascend_dynamo.memory.budget import MemoryBudget
from ascend_dynamo.memory.buffers import Buffer
from ascend_dynamo.memory.evaluate import plan_at, shared_arena
from ascend_dynamo.memory.forecast import forecast
from ascend_dynamo.memory.gear import Fit, Gear
from ascend_dynamo.memory.instances import read_csv, write_csv
from ascend_dynamo.memory.lifetimes import Lifetime, Liveness
from ascend_dynamo.memory.liveness import lifetimes_of, liveness
from ascend_dynamo.memory.plan import Plan, assign_offsets, plan

__all__ = [
    "Buffer",
    "Fit",
    "Gear",
    "Lifetime",
    "Liveness",
    "MemoryBudget",
    "Plan",
    "assign_offsets",
    "forecast",
    "lifetimes_of",
    "liveness",
    "plan",
    "plan_at",
    "read_csv",
    "shared_arena",
    "write_csv",
]
