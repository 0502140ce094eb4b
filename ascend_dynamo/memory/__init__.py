"""Memory plans: how long each buffer of a graph lives, and where it lies."""

from __future__ import annotations

from ascend_dynamo.memory.buffers import Buffer
from ascend_dynamo.memory.plan import Plan, assign_offsets, plan

__all__ = ["Buffer", "Plan", "assign_offsets", "plan"]
