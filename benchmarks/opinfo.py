"""Sweep torch's own operator database through the compiler: wherever ``aot_eager`` agrees with eager, ours must too.

    python benchmarks/opinfo.py [--quick] [--limit N] [--op REGEX] [--shard I/N] [--cpu N] [--state PATH] [--json PATH]

Every operator, forward, without gradients; float32 and one integer or bool dtype; static and dynamic shapes; a few
samples each, through ``ascend_opt`` with the reference target. ``--cpu N`` adds N operators, drawn with a fixed seed,
on the CPU target (each costs a C++ compilation). Values, dtypes, shapes, strides and what happened to the inputs are
compared. ``--state`` keeps one line per finished case, and a second run with the same file goes on where the first one
stopped; a case that killed the process is counted as a crash.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _harness as h
import torch
from torch.utils import _pytree as pytree

from ascend_dynamo.backend import Backend
from ascend_dynamo.dialect.equal import significant_strides
from ascend_dynamo.report.progress import Progress

SAMPLES = 3
DTYPES = (torch.float32, torch.int64, torch.bool)
RTOL, ATOL = 1e-4, 1e-5
SEED = 0
STATES = ("agree", "skip", "disagree", "fallback", "crash")
EAGER_TOO = "eager"  # skip: eager itself refuses the sample
# Skip: what they return is whatever the memory held.
UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Case:
    """One operator, dtype, shape mode, target."""

    op: str
    dtype: str
    dynamic: bool
    target: str

    @property
    def key(self) -> str:
        return f"{self.op} {self.dtype} {'dynamic' if self.dynamic else 'static'} {self.target}"


@dataclass
class Outcome:
    """``state`` is one of STATES; ``detail`` says what differed, or why the case was skipped."""

    state: str
    detail: str = ""


def database() -> dict[str, Any]:
    """Operators by their full name, in order."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = {f"{op.name}.{op.variant_test_name}".rstrip("."): op for op in op_db}
    return dict(sorted(found.items()))


def cases(ops: dict[str, Any], *, target: str = "reference") -> Iterator[Case]:
    """float32 and the first of int64 and bool that the operator takes, static and dynamic; CPU: float32 static."""
    for name, op in ops.items():
        supported = [d for d in DTYPES if d in op.dtypes]
        chosen = [d for d in supported if d.is_floating_point] + [d for d in supported if not d.is_floating_point][:1]
        for dtype in chosen[:1] if target == "cpu" else chosen:
            for dynamic in (False,) if target == "cpu" else (False, True):
                yield Case(name, str(dtype).removeprefix("torch."), dynamic, target)


def run_case(op: Any, case: Case, samples: int = SAMPLES) -> Outcome:
    """Compare up to ``samples`` samples; the first difference decides."""
    if case.op in UNINITIALISED:
        return Outcome("skip", "uninitialised memory")
    torch.manual_seed(SEED)
    made = op.sample_inputs("cpu", getattr(torch, case.dtype), requires_grad=False)
    reasons = set()
    agreed = 0
    for number, sample in zip(range(samples), made, strict=False):
        outcome = _sample(op, (sample.input, tuple(sample.args), dict(sample.kwargs)), case)
        if outcome.state not in ("agree", "skip"):
            return Outcome(outcome.state, f"sample {number}: {outcome.detail}")
        agreed += outcome.state == "agree"
        reasons.add(outcome.detail)
    return Outcome("agree") if agreed else Outcome("skip", "; ".join(sorted(reasons)) or "no samples")


def _sample(op: Any, sample: tuple[Any, ...], case: Case) -> Outcome:
    def call(x: Any, args: Any, kwargs: Any) -> Any:
        return op.op(x, *args, **kwargs)

    eager = _observe(call, sample)
    if isinstance(eager, Exception):
        return Outcome("skip", EAGER_TOO)
    torch._dynamo.reset()
    peer = _observe(torch.compile(call, backend="aot_eager", dynamic=case.dynamic), sample)
    exempt = difference(eager, peer)
    if exempt and not exempt.startswith("stride"):
        return Outcome("skip", f"aot_eager: {exempt}")
    torch._dynamo.reset()
    backend = Backend({"target": case.target, "cache": False})
    ours = _observe(torch.compile(call, backend=backend, dynamic=case.dynamic), sample)
    found = difference(eager, ours)
    if found and not (exempt and found.startswith("stride")):
        return Outcome("disagree", found)
    left_out = [q for r in backend.records for q in r.quarantined]
    return Outcome("fallback", _line(left_out[0].error)) if left_out else Outcome("agree")


def _line(text: str) -> str:
    return text.strip().splitlines()[0][:200]


def _observe(call: Callable[..., Any], sample: tuple[Any, ...]) -> Any:
    """(results, inputs afterwards) of a call on fresh copies, or the exception that it raised."""
    x, args, kwargs = pytree.tree_map_only(torch.Tensor, _fresh, sample)
    torch.manual_seed(SEED)
    try:
        with torch.no_grad():
            return pytree.tree_leaves(call(x, args, kwargs)), pytree.tree_leaves((x, args, kwargs))
    except Exception as error:
        return error


def _fresh(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides where they are dense; torch's clone keeps them."""
    return t.detach().clone()


def difference(expected: Any, got: Any) -> str:
    """What differs between two observations, in a few words; "" if nothing does."""
    if isinstance(got, Exception):
        return _line(f"{type(got).__name__}: {got}")
    worst = ""
    for what, left, right in zip(("result", "input"), expected, got, strict=True):
        if len(left) != len(right):
            return f"{what}: {len(left)} values, got {len(right)}"
        for a, b in zip(left, right, strict=True):
            found = _differs(a, b)
            if found.startswith("stride"):
                worst = worst or found
            elif found:
                return f"{what}: {found}"
    return worst


def _differs(a: Any, b: Any) -> str:
    if not isinstance(a, torch.Tensor):
        return "" if type(a) is type(b) and (a == b or a != a) else f"{a!r} became {b!r}"
    if not isinstance(b, torch.Tensor):
        return f"a tensor became {type(b).__name__}"
    for attribute in ("dtype", "shape", "layout"):
        if getattr(a, attribute) != getattr(b, attribute):
            return f"{attribute} {getattr(a, attribute)} became {getattr(b, attribute)}"
    try:
        inexact = a.dtype.is_floating_point or a.dtype.is_complex
        torch.testing.assert_close(b, a, equal_nan=True, rtol=inexact * RTOL, atol=inexact * ATOL)
    except AssertionError as error:
        return " ".join(str(error).split())[:160]
    if a.layout == torch.strided and significant_strides(a) != significant_strides(b):
        return f"stride {a.stride()} became {b.stride()}"
    return ""


def sweep(todo: list[Case], ops: dict[str, Any], state: Path | None, samples: int = SAMPLES) -> dict[str, Outcome]:
    """Run the cases that ``state`` does not hold yet; returns the outcome of all of ``todo`` by key."""
    outcomes = _load(state)
    with Progress(len(todo), "opinfo") as progress:
        for case in todo:
            if case.key not in outcomes:
                _note(state, {"key": case.key, "state": "crash"})
                outcomes[case.key] = run_case(ops[case.op], case, samples)
                _note(state, {"key": case.key, **asdict(outcomes[case.key])})
            progress.step(case.key)
    return {c.key: outcomes[c.key] for c in todo}


def _load(state: Path | None) -> dict[str, Outcome]:
    """Finished cases; one that was started and never finished stays a crash."""
    found: dict[str, Outcome] = {}
    if state is not None and state.exists():
        for line in state.read_text().splitlines():
            entry = json.loads(line)
            found[entry["key"]] = Outcome(entry["state"], entry.get("detail", "the process died here"))
    return found


def _note(state: Path | None, entry: dict[str, str]) -> None:
    if state is not None:
        with state.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--limit", type=int, help="this many operators, drawn with a fixed seed")
        parser.add_argument("--op", metavar="REGEX", default="", help="operators whose name matches")
        parser.add_argument("--shard", metavar="I/N", default="0/1", help="every N-th operator from the I-th on")
        parser.add_argument("--cpu", type=int, default=0, metavar="N", help="N operators on the CPU target as well")
        parser.add_argument("--state", type=Path, metavar="PATH", help="remember finished cases and go on from there")
        parser.add_argument("--samples", type=int, default=SAMPLES, help="samples per case")

    args = h.arguments(__doc__, more)
    _quiet()
    everything = database()
    index, _, count = args.shard.partition("/")
    names = [n for n in everything if re.search(args.op, n)][int(index) :: int(count)]
    limit = 16 if args.quick else args.limit
    names = sorted(random.Random(SEED).sample(names, min(limit, len(names)))) if limit else names
    todo = list(cases({n: everything[n] for n in names}))
    compiled = random.Random(SEED).sample(names, min(args.cpu, len(names)))
    todo += cases({n: everything[n] for n in sorted(compiled)}, target="cpu")
    outcomes = sweep(todo, everything, args.state, 1 if args.quick else args.samples)
    count_of = Counter(o.state for o in outcomes.values())
    for state in ("disagree", "crash", "fallback"):
        for key, o in outcomes.items():
            if o.state == state:
                h.say(f"{state}: {key}: {o.detail}")
    skipped = Counter(o.detail.split(":")[0] for o in outcomes.values() if o.state == "skip")
    h.say(f"{len(names)} operators, {len(todo)} cases; skipped: {dict(skipped) or 'none'}")
    values = {"operators": len(names), "cases": len(todo), **{s: count_of[s] for s in STATES}}
    goals = {"disagree": 0, "crash": 0}
    h.result("opinfo", values, goals, args.json, outcomes={k: asdict(o) for k, o in outcomes.items()})


def _quiet() -> None:
    """Thousands of hostile samples: what libraries log about each of them would hide the summary."""
    warnings.simplefilter("ignore")
    logging.getLogger("ascend_dynamo").setLevel(logging.CRITICAL)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    torch._logging.set_logs(all=logging.CRITICAL)
    logging.getLogger("ascend_dynamo.progress").setLevel(logging.INFO)
    logging.getLogger("ascend_dynamo.progress").addHandler(logging.StreamHandler(sys.stderr))


if __name__ == "__main__":
    main()
