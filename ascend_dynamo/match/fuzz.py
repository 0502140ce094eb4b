"""Fuzzing a pattern over its declared domain: it must fire where it says so, and wherever it fires it must be right.

Each case is captured, normalised and rewritten by this pattern alone, then run against what it was. After that the
captured graph is changed in one small way at a time (alpha, another dim, an exchanged operand, a write in between...)
and whatever the pattern still rewrites is compared with the changed graph.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo import capture
from ascend_dynamo.contracts import GraphUnit, Pattern
from ascend_dynamo.match.cases import Case, draw_case
from ascend_dynamo.match.difference import difference
from ascend_dynamo.match.driver import run_patterns
from ascend_dynamo.match.finding import Finding
from ascend_dynamo.match.mutate import copy_unit, mutated, mutations
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.options import Options
from ascend_dynamo.report.records import CompileRecord

convert = torch.ops.prims.convert_element_type.default

MUTATIONS = 24  # per case after the first of a spelling, which gets all of them
REDRAWS = 6  # of a case that the pattern's own check refuses


def fuzz(
    pattern: Pattern, budget: int = 20, seed: int = 0, among: Iterable[Pattern] = (), enough: int = 8
) -> list[Finding]:
    """Faults of ``pattern`` in ``budget`` cases drawn from its domain; the same seed draws the same cases.

    ``among`` are patterns that may run before it, where it matches what they make; ``enough`` findings end the search.
    """
    run = _Fuzz(pattern, random.Random(f"{pattern.name} {seed}"), tuple(among), enough)
    dtypes = [d for d in pattern.domain.dtypes if d.is_floating_point] or list(pattern.domain.dtypes)
    for i in range(max(budget, len(pattern.eager))):
        first = i < len(pattern.eager)
        run.one(i, dtypes[i % len(dtypes)] if first else run.rng.choice(dtypes))
        if len(run.findings) >= enough:
            break
    return list(dict.fromkeys(run.findings))


@dataclass
class _Fuzz:
    pattern: Any
    rng: random.Random
    among: tuple[Any, ...]
    enough: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def level(self) -> int:
        """Bits are promised only if every rewrite that may have taken part promises them."""
        return max((self.pattern.level, *(p.level for p in self.among)))

    def one(self, index: int, dtype: torch.dtype) -> None:
        for _ in range(REDRAWS):
            try:
                case = draw_case(self.pattern, index, self.rng, dtype)
                unit = capture_case(case, self.pattern)
            except Exception as error:
                fn = self.pattern.eager[index % len(self.pattern.eager)]
                name = getattr(fn, "__name__", str(fn))
                self.found("inputs", f"{name} cannot be run: {type(error).__name__}: {error}", str(dtype))
                return
            if self.positive(case, unit):
                break
        with quiet():
            self.hostile(index, case, unit)

    def hostile(self, index: int, case: Case, unit: GraphUnit) -> None:
        hostile = list(mutations(unit))
        if index >= len(self.pattern.eager):
            hostile = self.rng.sample(hostile, min(MUTATIONS, len(hostile)))
        for mutation in hostile:
            changed = mutated(unit, mutation)
            if changed is not None and len(self.findings) < self.enough:
                self.compare(changed, case, f"{case.text}; {mutation.text}", "hostile", [])

    def positive(self, case: Case, unit: GraphUnit) -> bool:
        """Check a spelling as it is; False if the pattern's own check refused these numbers, as it may."""
        expected: list[Any] = []
        with contextlib.suppress(Exception), torch.no_grad():
            given = [a.clone() if isinstance(a, torch.Tensor) else a for a in case.args]
            out = case.fn(*given)
            expected = list(out) if isinstance(out, (tuple, list)) else [out]
        record = self.compare(unit, case, case.text, "domain", expected)
        if record is None or record.count(self.pattern.name):
            return True
        misses = [m for m in record.missed if m.pattern == self.pattern.name]
        if self.pattern.domain.requires is not None and any(m.progress >= 1.0 for m in misses):
            return False
        if case.dynamic and any(m.code == "unproven" for m in misses):
            return True  # refusing what it cannot know is right
        if case.must_fire and not (case.dtype == torch.float64 and _loses(unit)):
            why = max(misses, key=lambda m: m.progress).reason if misses else "no anchor was tried"
            self.found("silent", f"does not fire on its own spelling: {why}", case.text)
        return True

    def compare(
        self, unit: GraphUnit, case: Case, text: str, check: str, expected: Sequence[Any]
    ) -> CompileRecord | None:
        """Rewrite a copy of ``unit`` and compare it with ``unit`` (and with what eager gave)."""
        after = copy_unit(unit)
        record = self.rewrite(after, text, ())
        if record is not None and not record.fired and self.among:
            after = copy_unit(unit)
            record = self.rewrite(after, text, self.among)
        if record is None or not record.fired:
            return record
        level = self.level if check == "domain" else 2
        c_ulp = getattr(self.pattern, "c_ulp", None)
        fault = difference(unit, after, case.tensors(), level=level, expected=expected, c_ulp=c_ulp)
        if fault is not None and (
            fault.runs or check == "domain"
        ):  # a spelling of ours must run; a changed one need not
            self.found(check, fault.sentence, text)
        return record

    def rewrite(self, unit: GraphUnit, text: str, among: Sequence[Any]) -> CompileRecord | None:
        options = Options(level=3, plugins=(), strict=False, validate=False)
        record = CompileRecord()
        with quiet():
            try:
                run_patterns(unit, Registry((*among, self.pattern)), options, record)
            except Exception as error:
                self.found("crash", f"{type(error).__name__}: {error}", text)
                return None
        for q in record.quarantined:
            self.found("crash", q.error, text)
        return record

    def found(self, check: str, sentence: str, case: str) -> None:
        self.findings.append(Finding(self.pattern.name, check, sentence, case))


def _loses(unit: GraphUnit) -> bool:
    """True if a spelling casts float64 down: ``.float()`` means something else there, and need not be recognised."""
    return any(
        n.target is convert and n.args[1] in (torch.float32, torch.bfloat16, torch.float16) for n in unit.gm.graph.nodes
    )


def capture_case(case: Case, pattern: Any) -> GraphUnit:
    """The case as a normalised unit; its tensors but the first are parameters unless the pattern says which are."""
    from ascend_dynamo.normalize import normalize

    tensors = case.tensors()
    mode: Any = None
    fakes: dict[int, Any] = {}
    if case.dynamic:
        mode, symbolic = compat.symbolic_fakes(tensors)
        fakes = {id(t): f for t, f in zip(tensors, symbolic, strict=True)}
    else:
        mode = FakeTensorMode()
    with torch.no_grad():
        unit = capture.trace(case.fn, [fakes.get(id(a), a) for a in case.args], fake_mode=mode)
    placeholders = unit.gm.graph.find_nodes(op="placeholder")
    which: Iterable[int] = getattr(pattern, "fuzz_params", range(1, len(placeholders)))
    unit.params = tuple(placeholders[i].name for i in which if i < len(placeholders))
    normalize(unit)
    return unit


_LOUD = ("ascend_dynamo.match", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Quarantines are findings here, not log lines; and that a changed graph does not run is no news either."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
