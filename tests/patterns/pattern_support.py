"""Shared by the tests of the built-in patterns: capture a function, run patterns over it, compare, snapshot."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascend_dynamo import capture
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.match import run_patterns
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.patterns import registry
from ascend_dynamo.report.records import CompileRecord, Missed

GRAPHS = Path(__file__).parents[1] / "graphs"
ALL = registry()


@dataclass
class Result:
    """A function after the patterns: the graph, its texts before and after, and the record."""

    unit: GraphUnit
    before: str
    after: str
    record: CompileRecord

    def count(self, name: str) -> int:
        return self.record.count(name)

    @property
    def fired(self) -> list[str]:
        return [f.pattern for f in self.record.fired]

    def ops(self, name: str) -> int:
        """How many calls of an operator (as the text form names it) are left."""
        return sum(f" = {name}(" in line for line in self.after.splitlines())

    def missed(self, name: str) -> Missed:
        """The nearest miss of a pattern."""
        found = [m for m in self.record.missed if m.pattern == name]
        assert found, f"{name} has no near miss among {[(m.pattern, m.code) for m in self.record.missed]}"
        return max(found, key=lambda m: m.progress)


def fuse(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *names: str,
    params: Sequence[int] = (),
    level: int = 2,
    validate: bool = True,
) -> Result:
    """Capture ``fn(*args)``, normalise, run the named patterns (default: all); ``params``: which inputs are weights."""
    with torch.no_grad():
        unit = capture.trace(fn, args)
    placeholders = unit.gm.graph.find_nodes(op="placeholder")
    unit.params = tuple(placeholders[i].name for i in params)
    normalize(unit)
    before = graph_text(unit, sources=False)
    record = CompileRecord()
    options = Options.resolve(None, {"level": level, "validate": validate, "strict": True}, {})
    run_patterns(unit, ALL.only(*names) if names else ALL, options, record)
    normalize(unit)
    return Result(unit, before, graph_text(unit, sources=False), record)


def run(unit: GraphUnit, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The graph on real tensors, dialect by its references, prologue values computed by their transforms."""
    named = dict(zip((p.name for p in unit.gm.graph.find_nodes(op="placeholder")), args, strict=False))
    wanted = [named[str(p.target)] for p in unit.prologue.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        extra = unit.prologue(*wanted)
        return tuple(unit.gm(*args, *extra))


def assert_same(fn: Callable[..., Any], args: Sequence[Any], result: Result, *, exact: bool = False) -> None:
    """The rewritten graph gives what eager gives: bit for bit, or within the dtype's tolerance."""
    with torch.no_grad():
        expected = fn(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = run(result.unit, [a for a in args if isinstance(a, torch.Tensor)])
    assert len(got) == len(expected)
    for new, old in zip(got, expected, strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
        if exact:
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        else:
            scale = old.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if old.numel() else 0.0
            eps = torch.finfo(old.dtype).eps
            torch.testing.assert_close(new, old, rtol=4 * eps, atol=8 * eps * scale, equal_nan=True)


def snapshot(name: str, *results: Result) -> None:
    """Compare before and after with tests/graphs/<name>.txt; ASCEND_DYNAMO_ACCEPT=1 writes the file."""
    text = "\n".join(f"before\n{r.before}\n\nafter: {', '.join(r.fired)}\n{r.after}\n" for r in results)
    path = GRAPHS / f"{name}.txt"
    if os.environ.get("ASCEND_DYNAMO_ACCEPT") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    have = path.read_text() if path.exists() else ""
    if have != text:
        diff = "\n".join(difflib.unified_diff(have.splitlines(), text.splitlines(), "snapshot", "now", lineterm=""))
        raise AssertionError(f"{path.name} differs (ASCEND_DYNAMO_ACCEPT=1 accepts):\n{diff}")
