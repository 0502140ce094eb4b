"""Lint of patterns and of registries: what can be known to be wrong, dead or doubled without knowing any model."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.canonical import COMMUTATIVE
from ascend_dynamo.match.cases import draw_case
from ascend_dynamo.match.driver import run_patterns
from ascend_dynamo.match.finding import Finding
from ascend_dynamo.match.fuzz import capture_case, quiet
from ascend_dynamo.match.language import DeclarativePattern
from ascend_dynamo.match.mutate import copy_unit, exchange
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.match.terms import Alternative
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord


def lint(registry: Registry) -> list[Finding]:
    """Faults of every pattern and of their combination; errors first."""
    found = [f for p in registry for f in lint_pattern(p)]
    broken = {f.pattern for f in found if f.check == "tracing"}
    whole = Registry(p for p in registry if p.name not in broken)
    found += _doubles(whole)
    found += _unknown_names(registry)
    found += [f for p in whole for f in _shadowed(p, whole)]
    return sorted(dict.fromkeys(found), key=lambda f: f.severity)


def lint_pattern(pattern: Any) -> list[Finding]:
    """Faults of one pattern by itself."""
    found = list(_declaration(pattern))
    if isinstance(pattern, DeclarativePattern):
        try:
            alternatives = pattern.all_alternatives()
        except PatternError as error:
            return [*found, Finding(pattern.name, "tracing", str(error))]
        found += _traces(pattern, alternatives)
    found += _spellings(pattern)
    return found


def _declaration(p: Any) -> Iterator[Finding]:
    if not p.eager:
        yield Finding(p.name, "oracle", "it has no eager spelling, so nothing can be checked")
    used = {n for shape in p.domain.shapes.values() for axis in shape for n in _words(str(axis))}
    for name in p.domain.dims:
        if name not in used and isinstance(p, DeclarativePattern):
            yield Finding(p.name, "domain", f'domain.dims bounds "{name}", which no shape mentions')
    if not isinstance(p, DeclarativePattern):
        for op in p.anchors:
            if not isinstance(op, torch._ops.OpOverload):
                yield Finding(p.name, "anchors", f"the anchor {op} is no overload, so no node has it (.default?)")
        if not p.anchors:
            yield Finding(p.name, "anchors", "it has no anchors, so it is never tried")


def _words(text: str) -> list[str]:
    return [w for w in text.replace("*", " ").replace("+", " ").replace("/", " ").split() if w.isidentifier()]


def _traces(p: DeclarativePattern, alternatives: Iterable[Alternative]) -> Iterator[Finding]:
    made = {str(c.op).rpartition(".")[0] for a in alternatives for c in a.new_calls}
    for name in sorted(p.emits - made):
        yield Finding(p.name, "emits", f"it declares to emit {name}, but no replacement has it", severity="note")
    for a in alternatives:
        if a.calls and [repr(c) for c in a.calls] == [repr(c) for c in a.new_calls]:
            sentence = f"spelling {a.spelling} and its replacement are the same graph: the rewrite contains its pattern"
            yield Finding(p.name, "termination", sentence)


def _spellings(p: Any) -> list[Finding]:
    found: list[Finding] = []
    for i, fn in enumerate(p.eager):
        try:
            unit = _captured(p, i)
        except Exception as error:
            found.append(Finding(p.name, "inputs", f"spelling {i} cannot be run: {type(error).__name__}: {error}"))
            continue
        record = _run([p], unit)
        name = getattr(fn, "__name__", str(fn))
        for q in record.quarantined:
            check = "termination" if "rewrit" in q.error or "re-creates" in q.error else "rewrite"
            found.append(Finding(p.name, check, f"on spelling {i} ({name}): {q.error}"))
        if record.count(p.name) and not record.quarantined:
            found += _twins(p, i, name, unit)
    return found


def _twins(p: Any, i: int, name: str, unit: GraphUnit) -> Iterator[Finding]:
    """Each commutative call with its operands exchanged: the pattern should fire all the same."""
    for k, node in enumerate(unit.gm.graph.nodes):
        if node.op != "call_function" or node.target not in COMMUTATIVE:
            continue
        if len(node.args) < 2 or not all(hasattr(a, "meta") for a in node.args[:2]) or node.args[0] is node.args[1]:
            continue
        twin = copy_unit(unit)
        exchange(k)(twin.gm.graph)
        if not _run([p], twin).count(p.name):
            sentence = f"spelling {i} ({name}) is not found with the operands of %{node.name} ({node.target}) exchanged"
            yield Finding(p.name, "commuted twin", sentence)


def _doubles(registry: Registry) -> list[Finding]:
    found: list[Finding] = []
    owners: dict[str, str] = {}
    for p in registry:
        if not isinstance(p, DeclarativePattern):
            continue
        for a in p.all_alternatives():
            key = repr((a.calls, a.outputs, sorted(map(str, a.dtypes)), sorted(a.ranks.items()), a.inputs))
            other = owners.setdefault(key, p.name)
            if other != p.name:
                found.append(Finding(p.name, "duplicate", f"spelling {a.spelling} is what {other} finds already"))
    return found


def _unknown_names(registry: Registry) -> list[Finding]:
    return [
        Finding(p.name, "order", f'{relation} names "{other}", which is no pattern here', severity="note")
        for p in registry
        for relation, names in (("before", p.before), ("after", p.after))
        for other in sorted(names)
        if other not in registry
    ]


def _shadowed(p: Any, registry: Registry) -> list[Finding]:
    """A pattern that fires alone but never among the others is dead."""
    culprits: set[str] = set()
    alone = False
    for i in range(len(p.eager)):
        try:
            unit = _captured(p, i)
        except Exception:
            continue  # reported by _spellings
        if not _run([p], copy_unit(unit)).count(p.name):
            continue
        alone = True
        record = _run(registry, unit)
        if record.count(p.name):
            return []
        culprits |= {f.pattern for f in record.fired}
    if not alone:
        return []
    return [Finding(p.name, "shadowed", f"among the others it never fires: {', '.join(sorted(culprits))} come first")]


def _captured(p: Any, spelling: int) -> GraphUnit:
    dtype = torch.float32 if torch.float32 in p.domain.dtypes else next(iter(p.domain.dtypes))
    with quiet():
        return capture_case(draw_case(p, spelling, random.Random(spelling), dtype), p)


def _run(patterns: Iterable[Any], unit: GraphUnit) -> CompileRecord:
    record = CompileRecord()
    with quiet():
        run_patterns(copy_unit(unit), Registry(patterns), Options(level=3), record, explain=False)
    return record
