"""Memory plans: hard instances with a known optimum, and the plans of model graphs, against greedy-by-size.

    python benchmarks/planner.py [--quick] [--instances DIR] [--seconds S] [--write DIR] [--json PATH]

Tight instances (``_planner_instances``) fill their capacity completely at some time, so their optimum equals it;
``--instances DIR`` takes CSV files ``id,lower,upper,size`` instead (the capacity is the last number in the name, as in
``A.1048576.csv``), ``--write DIR`` saves the generated ones in that form. The models are compiled for the reference
target; the lifetimes are those that the compilation records, for the prompt and for the next token.

Contenders: ``greedy`` (largest first, each into the tightest gap), ``heuristic`` (our orders of placing, no search) and
``ours``. Every plan is checked by comparing all pairs of buffers, which is not how the planner checks itself. Sizes are
related to the peak of live bytes, below which no plan exists. On an instance that fails, ``ours`` shows the best plan
that was found.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness as h
import _models
import _planner_instances as instances
import numpy as np
import torch

import ascend_dynamo
from ascend_dynamo.errors import CapacityError
from ascend_dynamo.memory import Buffer, Plan, assign_offsets, exact, heuristic, read_csv, write_csv
from ascend_dynamo.memory.instances import capacity_of
from ascend_dynamo.memory.problem import problem_of

GOAL_MODEL, GOAL_SECONDS, SEEDS = 1.01, 10.0, (0, 1)
PROMPT = 48
ENCODERS = ("tiny-bert", "tiny-roberta", "tiny-deberta")
# What is shown needs token ids alone as its input; None: as deep as it is.
SHALLOW = (("qwen3-0.6b", 2), ("ds3-small", 2), ("q3moe-small", 2), ("tiny-qwen3", 28))
QUICK = (("tiny-qwen3", None), ("tiny-ds3", None), ("tiny-gpt2", None))
OTHER_INPUTS = ("tiny-t5", "tiny-whisper", "tiny-vit", "tiny-swin", "tiny-clip", "tiny-llava")


@dataclass
class Case:
    """Buffers to plan; ``capacity`` where the optimum is known, ``alignment`` of all offsets."""

    name: str
    buffers: list[Buffer]
    capacity: int | None = None
    alignment: int = 1


@dataclass
class Row:
    """What the contenders made of one case: sizes in bytes, wall and CPU seconds of ours, pairs that overlap."""

    name: str
    buffers: int
    bound: int
    capacity: int | None
    greedy: int
    heuristic: int
    ours: int
    seconds: float
    cpu: float
    method: str
    optimal: bool
    overlaps: int

    @property
    def solved(self) -> bool:
        return self.capacity is not None and self.ours <= self.capacity


def overlaps(buffers: Sequence[Buffer], offsets: dict[str, int]) -> int:
    """Pairs of buffers that are live at the same time and share a byte, counted by comparing all pairs."""
    start, end, size = (np.array([getattr(b, k) for b in buffers], np.int64) for k in ("start", "end", "size"))
    low = np.array([offsets[b.id] for b in buffers], np.int64)
    high, found = low + size, 0
    for i in range(len(buffers) - 1):
        rest = slice(i + 1, None)
        at_once = (start[rest] < end[i]) & (start[i] < end[rest])
        found += int((at_once & (low[rest] < high[i]) & (low[i] < high[rest])).sum())
    return found


def run(case: Case, seconds: float) -> Row:
    """All contenders on one case."""
    problem = problem_of([b for b in case.buffers if b.size], case.alignment)
    greedy = problem.height(heuristic.greedy_by_size(problem))
    target = case.capacity if case.capacity is not None else problem.bound()
    alone = problem.height(heuristic.best(problem, target)[0])
    wall, cpu = time.perf_counter(), time.process_time()
    plan = _ours(case, seconds)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    plan.check()
    return Row(
        case.name,
        len(case.buffers),
        plan.lower_bound,
        case.capacity,
        greedy,
        alone,
        plan.size,
        wall,
        cpu,
        plan.method,
        plan.optimal,
        overlaps(case.buffers, plan.offsets),
    )


def _ours(case: Case, seconds: float) -> Plan:
    try:
        return assign_offsets(case.buffers, capacity=case.capacity, alignment=case.alignment, seconds=seconds)
    except CapacityError as e:
        if not isinstance(e.plan, Plan):
            raise
        return e.plan


def tight(quick: bool) -> Iterator[Case]:
    """The generated instances."""
    for family in instances.FAMILIES:
        for count in instances.SIZES[:2] if quick else instances.SIZES:
            for seed in SEEDS[:1] if quick else SEEDS:
                buffers, capacity = instances.instance(family, count, seed)
                yield Case(f"{family}-{count}-{seed}", buffers, capacity)


def from_folder(folder: Path) -> Iterator[Case]:
    """The instances of a folder; without a capacity in its name, one is planned as low as possible."""
    for path in sorted(folder.glob("*.csv")):
        yield Case(path.name.removesuffix(".csv"), read_csv(path), capacity_of(path))


def models(quick: bool) -> Iterator[Case]:
    """The graphs of the models, compiled for the reference target."""
    everything = [(n, None) for n in _models.names("tiny-") if n not in OTHER_INPUTS]
    for name, layers in QUICK if quick else (*everything, *SHALLOW):
        label = name if layers is None else f"{name}, {layers} layers"
        for index, buffers in enumerate(graphs_of(name, layers)):
            yield Case(f"{label} #{index}", buffers, alignment=64)


def graphs_of(name: str, layers: int | None) -> list[list[Buffer]]:
    """The intermediates of every graph that a prompt and the next token compile."""
    torch.compiler.reset()
    model = _models.build(name, layers=layers, check=False)
    backend = ascend_dynamo.Backend({"target": "reference", "strict": True})
    compiled = torch.compile(model, backend=backend)
    ids = torch.arange(PROMPT).remainder(model.config.vocab_size - 3).add(3)[None]
    with torch.no_grad():
        if name in ENCODERS:
            compiled(input_ids=ids)
        else:
            out = compiled(input_ids=ids, use_cache=True)
            compiled(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
    records = [r.memory for r in backend.records if r.memory is not None]
    assert records, f"{name}: nothing was compiled"
    return [[Buffer(b.id, b.start, b.end, b.bytes) for b in r.blocks if not b.output] for r in records]


def show(title: str, rows: Sequence[Row]) -> None:
    """One table: sizes over the bound, time and method of ours."""
    if not rows:
        return
    h.say(f"\n{title}")
    body = [
        [
            r.name,
            str(r.buffers),
            *(f"{x / max(1, r.bound):.3f}" for x in (r.greedy, r.heuristic, r.ours)),
            f"{r.seconds:.2f}",
            f"{r.cpu / max(r.seconds, 1e-9):.2f}",
            ("" if r.capacity is None else "fits, " if r.solved else "DOES NOT FIT, ")
            + r.method
            + (", optimal" if r.optimal else ""),
        ]
        for r in rows
    ]
    h.say(h.table(["case", "buffers", "greedy", "heuristic", "ours", "seconds", "CPU/wall", "method"], body))


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instances", metavar="DIR", type=Path, help="plan the CSV files there, nothing else")
    parser.add_argument("--write", metavar="DIR", type=Path, help="write the generated instances there as CSV files")
    parser.add_argument("--seconds", type=float, default=GOAL_SECONDS, help="limit of one plan (default: %(default)s)")


def main() -> None:
    args = h.arguments(__doc__, _more)
    torch.set_num_threads(1)
    if not exact.available():  # compiled before anything is timed
        h.say("no C++ compiler: the exact search is missing")
    cases = list(from_folder(args.instances) if args.instances else tight(args.quick))
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        for c in cases:
            write_csv(args.write / f"{c.name}.{c.capacity}.csv", c.buffers)
    rows = [run(c, args.seconds) for c in cases]
    show("Tight instances: size / peak of live bytes", rows)
    graphs = [] if args.instances else [run(c, args.seconds) for c in models(args.quick)]
    show("Model graphs, reference target: size / peak of live bytes", graphs)
    everything = [*rows, *graphs]
    known = [r for r in rows if r.capacity is not None]
    values: dict[str, Any] = {
        "tight": len(known),
        "within_capacity": sum(r.solved for r in known),
        "slowest": max((r.seconds for r in known), default=0.0),
        "greedy_ratio": h.geomean([r.greedy / r.bound for r in known]) if known else 0.0,
        "graphs": len(graphs),
        "worst_graph": max((r.ours / max(1, r.bound) for r in graphs), default=1.0),
        "slowest_graph": max((r.seconds for r in graphs), default=0.0),
        "worse_than_greedy": sum(r.ours > r.greedy for r in everything),
        "overlaps": sum(r.overlaps for r in everything),
    }
    goals = {
        "within_capacity": len(known),
        "slowest": GOAL_SECONDS,
        "worst_graph": GOAL_MODEL,
        "worse_than_greedy": 0,
        "overlaps": 0,
    }
    h.result("planner", values, goals, args.json, rows=everything)


if __name__ == "__main__":
    main()
