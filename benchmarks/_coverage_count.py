"""Reading what our passes did from compile records: how much is fused, what was nearly fused and why it was not."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import _families

from ascend_dynamo.report.records import CompileRecord, Missed

OPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("ascend.flash_attention", "ascend.mla_attention"),
    "norms": ("ascend.rms_norm", "ascend.add_rms_norm", "aten.layer_norm", "ascend.add_layer_norm"),
    "residual": ("ascend.add_rms_norm", "ascend.add_layer_norm"),
    "rotary": ("ascend.rotary",),
    "gated": ("ascend.swiglu", "ascend.gelu_mul"),
    "gate": ("ascend.moe_gate",),
    "experts": ("ascend.moe_experts",),
}
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "attention": ("eager_attention", "sdpa", "mla"),
    "norms": ("rms_norm", "layer_norm"),
    "residual": ("add_rms_norm", "add_layer_norm"),
    "rotary": ("rotary",),
    "gated": ("swiglu", "gelu_mul"),
    "qkv": ("merge_linears",),
    "gate": ("moe_gate",),
    "experts": ("moe_experts",),
}
SHOWN = 3  # reasons per kind


def fused(records: Sequence[CompileRecord]) -> dict[str, int]:
    """How often each kind is in the graphs: by the operators that they hold, or that a kernel has replaced.

    Merged linears leave no operator of their own; they are those that the source's attention classes made.
    """
    ops: Counter[str] = Counter()
    for record in records:
        ops.update(re.findall(r" = (\w+\.\w+)[.(]", record.after))
        ops.update(x.op.removesuffix(".default") for x in record.lowered if x.path == "kernel")
    found = {kind: sum(ops[name] for name in names) for kind, names in OPS.items()}
    merged = [f for r in records for f in r.fired if f.pattern == "merge_linears"]
    found["qkv"] = sum(f.replaced for f in merged if "Att" in owner(f.src))
    return {kind: found[kind] for kind in _families.KINDS}


def short(expected: _families.Counts, counts: Mapping[str, int]) -> list[str]:
    """The kinds of which something is missing, or of which more is there than can be."""
    return [
        kind
        for kind, n in expected.items()
        if n is not None and (counts[kind] < n or (counts[kind] > n and kind != "residual"))
    ]


def near_misses(records: Sequence[CompileRecord], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Of each kind the reasons that came furthest, with how often each was given and the model's line."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        misses = [m for r in records for m in r.missed if m.pattern.startswith(PATTERNS[kind])]
        misses.sort(key=lambda m: -m.progress)
        counted = Counter(map(_describe, misses))
        found[kind] = [f"{n} x {text}" for text, n in list(counted.items())[:SHOWN]]
    return found


def _describe(m: Missed) -> str:
    reason = re.sub(r"%(\w+)", "a value", re.sub(r" at %\w+.*", "", m.reason))
    return f"{m.pattern}: {reason} ({_where(m.src)})"


def _where(src: tuple[str, int] | None) -> str:
    return f"{Path(src[0]).name}:{src[1]}" if src else "no source line"


@cache
def _classes(file: str) -> tuple[tuple[int, int, str], ...]:
    tree = ast.parse(Path(file).read_text())
    return tuple((n.lineno, n.end_lineno or 0, n.name) for n in ast.walk(tree) if isinstance(n, ast.ClassDef))


def owner(src: tuple[str, int] | None) -> str:
    """The class around a line of a model's source, "" if there is none."""
    if src is None or not Path(src[0]).exists():
        return ""
    return next((name for first, last, name in _classes(src[0]) if first <= src[1] <= last), "")
