"""Heap allocations of one decode step in steady state: eager, stock Inductor, and ours on the heap and in the arena.

    python benchmarks/alloc.py [--quick] [--only REGEX] [--rounds N] [--json PATH]

Rows: a decode step of qwen3-0.6b and ds3-small (DeepSeek-V3: latent attention, experts) against a static cache, bf16,
batch 1. Every contender runs the same Hugging Face model with the same weights.

What is counted, is counted underneath everything by a library that is preloaded in front of libc
(_count_allocations.c), so nothing of ours takes part in it. "Intermediates" are aligned allocations (those of torch's
CPU allocator and of oneDNN) that are freed before the step ends, "outputs" those that are not; "large" are all other
allocations of 4096 bytes or more. Shown is the worst of several steps. The size of the arena is that of the writable
memory that the operating system lists between its addresses, and is compared with the plan, rounded up to pages.

A full run takes about 15 minutes, most of it compilation.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import mmap
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _harness as h
import _machine
import _models
import latency
import moe
import torch
from _worker import Prepared

import ascend_dynamo
from ascend_dynamo.memory import assign_offsets
from ascend_dynamo.runtime import arena

CONTENDERS = ("eager", "inductor", "heap", "ours")  # heap: ours without its arena
WARM, COUNTED = 4, 4  # steps
GOAL_STEP = 1.0

CASES: list[dict[str, Any]] = [
    {"model": m, "kind": "decode", "batch": 1, "seq": 1, "dtype": "bf16"} for m in ("qwen3-0.6b", "ds3-small")
]
QUICK: list[dict[str, Any]] = [{**c, "layers": 2} for c in CASES]

_built: dict[str, Any] = {}  # the worker's one model


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    return f"{case['model']} decode {case['dtype']}"


def counting_library(folder: Path) -> Path:
    """The library to preload, compiled into ``folder``. It stands on glibc's own entry points."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise SystemExit("benchmarks/alloc.py needs a C compiler (cc, gcc or clang) and glibc")
    target = folder / "count_allocations.so"
    source = Path(__file__).with_name("_count_allocations.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return target


def counts(run: Callable[[], object]) -> dict[str, int]:
    """What one call of ``run`` asks the heap for, as the preloaded library saw it."""
    library = ctypes.CDLL(None)
    out = (ctypes.c_uint64 * 7)()
    gc.collect()
    gc.disable()
    try:
        library.counting_start()
        result = run()
        library.counting_stop(out)
    finally:
        gc.enable()
    del result
    aligned, freed, size, large, large_freed, _, lost = map(int, out)
    assert not lost, f"{lost} allocations were not tracked"
    return {
        "intermediates": freed,
        "outputs": aligned - freed,
        "large": large,
        "large_temporary": large_freed,
        "bytes": size,
    }


def writable(begin: int, end: int, maps: str) -> int:
    """Bytes between two addresses that ``maps`` (the text of /proc/self/maps) lists as writable."""
    total = 0
    for line in maps.splitlines():
        place, mode = line.split()[:2]
        low, high = (int(x, 16) for x in place.split("-"))
        if "w" in mode:
            total += max(0, min(high, end) - max(low, begin))
    return total


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: the model, compiled by the contender, and what its steps allocated."""
    key = f"{case['model']} {case.get('layers')}"
    if key not in _built:
        _built.clear()
        dtype = latency.DTYPES[case["dtype"]]
        _built[key] = _models.build(case["model"], dtype=dtype, layers=case.get("layers"), check=False)
    model = _built[key]
    torch._dynamo.reset()
    backend = ascend_dynamo.Backend({"arena": "off" if contender == "heap" else "on"})
    call: Callable[..., Any] = {
        "eager": lambda: model,
        "inductor": lambda: torch.compile(model, dynamic=False),
    }.get(contender, lambda: torch.compile(model, backend=backend, dynamic=False))()
    prepared = latency._decode(model, call, case)
    with torch.no_grad(), moe.graphs() as made:
        prepared.reset()
        for _ in range(WARM):
            prepared.run()
        steps = [counts(prepared.run) for _ in range(COUNTED)]
        graphs = made()
    assert (graphs > 0) == (contender != "eager"), f"{contender} made {graphs} graphs"
    prepared.notes = {name: max(s[name] for s in steps) for name in steps[0]} | {"graphs": graphs}
    if contender == "ours":
        prepared.notes |= _arena(backend)
    prepared.work = moe.work(model, case) if "ds3" in case["model"] else latency.work(model, case)
    return prepared


def _arena(backend: ascend_dynamo.Backend) -> dict[str, Any]:
    """What the arena says of itself, what the system says of it, and the plan made once more."""
    stats = backend.memory()
    assert not stats.reason, stats.reason
    planned = [s for s in stats.shapes if s.recording is not None]
    plans = [assign_offsets(s.recording.buffers) for s in planned if s.recording is not None]
    for plan in plans:
        plan.check()
    pages = -(-max(p.size for p in plans) // mmap.PAGESIZE) * mmap.PAGESIZE
    return {
        "arena": stats.size,
        "peak": max(s.peak_bytes for s in planned),
        "plan": max(p.size for p in plans),
        "plan_pages": pages * stats.instances,
        "mapped": writable(*arena.address_range(), Path("/proc/self/maps").read_text()),
        "instances": stats.instances,
        "mismatches": sum(s.mismatches + s.outlived + s.unleased for s in stats.shapes),
        "given": sum(s.last_gave for s in planned),
    }


HEAD = ("per step", "contender", "intermediates", "outputs", "large", "bytes", "ms", "max diff")


def lines(row: h.Row) -> list[list[str]]:
    """One line per contender."""
    found = []
    for c, t in row.timings.items():
        n = t.notes
        cells = [str(n.get(k, "?")) for k in ("intermediates", "outputs", "large", "bytes")]
        time = f"{1e3 * t.median:.2f}" if t.rounds else t.error or "failed"
        found.append([label(row.case), c, *cells, time, f"{t.difference:.1e}"])
    return found


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", metavar="REGEX", default="", help="rows whose name matches, such as qwen")
        parser.add_argument("--rounds", type=int, default=7, help="timed rounds per row")

    args = h.arguments(__doc__, more)
    cases = [c for c in (QUICK if args.quick else CASES) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    rows: list[h.Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-alloc-") as folder:
        os.environ["LD_PRELOAD"] = str(counting_library(Path(folder)))
        bench = h.Bench("alloc", CONTENDERS, rounds=3 if args.quick else args.rounds, machine=machine)
        with bench.processes() as running:
            del os.environ["LD_PRELOAD"]
            for case in cases:
                rows.append(bench.row(case, running))
                for name, t in rows[-1].timings.items():
                    if t.error:
                        h.say(f"  {name} failed: {t.error}")
    h.say(h.table(HEAD, [line for r in rows for line in lines(r)]))
    for r in rows:
        n = r.timings["ours"].notes
        h.say(
            f"{label(r.case)}: arena {n.get('arena')} bytes, plan {n.get('plan')}, mapped {n.get('mapped')} (plan in "
            f"pages {n.get('plan_pages')}), peak of live bytes {n.get('peak')}; {n.get('given')} allocations served, "
            f"{n.get('mismatches')} calls that went otherwise; step vs our heap {r.ratio('heap'):.3f}x, vs inductor "
            f"{r.ratio('inductor'):.3f}x"
        )
    h.result("alloc", *summary(rows), args.json, machine=machine, rows=[r.to_dict() for r in rows])


def summary(rows: list[h.Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line; a row without figures counts as not met."""
    ours = [r.timings["ours"] for r in rows]
    missing = float("inf")
    values = {
        "intermediates": max((t.notes.get("intermediates", missing) for t in ours), default=missing),
        "outputs": max((t.notes.get("outputs", missing) for t in ours), default=missing),
        "large_temporary": max((t.notes.get("large_temporary", missing) for t in ours), default=missing),
        "arena_over_plan": max((_over(t.notes, "arena", "plan") for t in ours), default=missing),
        "mapped_over_plan": max((_over(t.notes, "mapped", "plan_pages") for t in ours), default=missing),
        "plan_over_peak": max((_over(t.notes, "plan", "peak") for t in ours), default=missing),
        "step_vs_heap": min((r.ratio("heap") for r in rows), default=float("nan")),
        "eager": max((r.timings["eager"].notes.get("intermediates", 0) for r in rows), default=0),
        "inductor": max((r.timings["inductor"].notes.get("intermediates", 0) for r in rows), default=0),
        "agreed": f"{sum(r.agreed for r in rows)}/{len(rows)}",
        "clean": f"{sum(r.clean for r in rows)}/{len(rows)}",
    }
    return values, {"intermediates": 0, "arena_over_plan": 1.0, "mapped_over_plan": 1.0, "step_vs_heap": GOAL_STEP}


def _over(notes: dict[str, Any], a: str, b: str) -> float:
    return notes[a] / notes[b] if notes.get(b) else float("inf")


if __name__ == "__main__":
    main()
