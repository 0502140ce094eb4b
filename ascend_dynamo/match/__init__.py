"""Patterns: how to write them, collect them, run them over a graph, and check them."""

from __future__ import annotations

from ascend_dynamo.match.driver import run_patterns
from ascend_dynamo.match.language import DeclarativePattern, ProceduralPattern, declare
from ascend_dynamo.match.plugins import load_registry
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.match.samples import optional

__all__ = [
    "DeclarativePattern",
    "ProceduralPattern",
    "Registry",
    "declare",
    "load_registry",
    "optional",
    "run_patterns",
]
