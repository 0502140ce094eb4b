"""What the compiler did and why: records, graph diffs, ``explain``, HTML."""

from __future__ import annotations

from ascend_dynamo.report.diff import side_by_side, unified
from ascend_dynamo.report.explain import Explanation, explain
from ascend_dynamo.report.records import CompileRecord, Fired, Lowered, Missed, Quarantined

__all__ = [
    "CompileRecord",
    "Explanation",
    "Fired",
    "Lowered",
    "Missed",
    "Quarantined",
    "explain",
    "side_by_side",
    "unified",
]
