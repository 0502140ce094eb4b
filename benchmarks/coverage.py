"""How much of every current model family is fused, in how many graphs, and whether it still says the same.

    python benchmarks/coverage.py [--quick] [--only llama,bert] [--target reference|cpu] [--attention eager]
                                  [--dtype float32] [--jobs N] [--resume FOLDER] [--json PATH]

Small models from the families' real configurations (``_families``), in both attention implementations of transformers
and two dtypes: a prompt, then single tokens with a DynamicCache, then ``generate`` with a StaticCache, twice. Each
family is a process of its own. What is expected follows from the configuration. A family is complete if everything
expected is fused in every mode; what is missing is listed with the reason that came nearest. Results must be as right
as eager's against a float64 copy of the model, tokens equal unless their float64 margin is under that budget.

With ``--resume`` finished families are kept in the folder and not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _families
import _harness as h
import _machine
import torch

ATTENTION, DTYPES = ("eager", "sdpa"), ("float32", "bfloat16")
QUICK = ("llama", "gpt-2", "bert")
STEPS, LONG_STEPS = 3, 64
TIMEOUT = 900.0
MAX_DECODE_GRAPHS, MAX_EXEMPT = 2, 2


def cells(family: _families.Family, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to run of a family. The first cell also decodes long; each implementation counts aot_eager's graphs once."""
    from _models import SPECS

    only_eager = SPECS[family.model].eager_only
    found = []
    for attention in args.attention.split(","):
        if attention == "sdpa" and only_eager:
            continue
        for i, dtype in enumerate(args.dtype.split(",")):
            steps = LONG_STEPS if not found and not args.quick else STEPS
            found.append({"attention": attention, "dtype": dtype, "steps": steps, "peer": i == 0 and not args.quick})
    return found


def run(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All cells of a family in one process; a process that dies leaves an error in place of its missing cells."""
    kept = folder / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    wanted = cells(_families.FAMILIES[name], args)
    request = {"family": name, "cells": wanted, "target": args.target}
    worker = Path(__file__).with_name("_coverage_cell.py")
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(worker), json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=h.clean_environment(1),
            cwd=worker.parent,
        )
        try:
            output, _ = process.communicate(timeout=TIMEOUT * len(wanted))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    results = [json.loads(line) for line in output.splitlines()]
    for cell in wanted[len(results) :]:
        died = f"the process ended with code {process.returncode}; see {log.name}"
        lost = {"attention": cell["attention"], "dtype": cell["dtype"], "modes": {}, "seconds": 0.0}
        results.append({**lost, "errors": {"process": died}})
    if process.returncode == 0:
        kept.write_text(json.dumps(results))
    return results


def modes(results: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mode of every cell, with a label."""
    for cell in results:
        for mode, report in cell["modes"].items():
            yield f"{cell['attention']} {cell['dtype']} {mode}", report


def complete(results: list[dict[str, Any]]) -> bool:
    return all(not r["short"] for _, r in modes(results)) and not any(c["errors"] for c in results)


def agrees(results: list[dict[str, Any]]) -> bool:
    return not any(r["disagrees"] or r["faults"] for _, r in modes(results)) and not any(c["errors"] for c in results)


def few_graphs(results: list[dict[str, Any]]) -> bool:
    """No more graphs than aot_eager, at most two for all decode steps, none for the second ``generate``."""
    for cell in results:
        reports = cell["modes"]
        if any(reports[m]["graphs"] > n for m, n in cell.get("peer", {}).items() if m in reports):
            return False
        if "decode" in reports and reports["decode"]["graphs"] > MAX_DECODE_GRAPHS:
            return False
        if reports.get("generate", {}).get("graphs_again", 0):
            return False
    return True


def total(results: list[dict[str, Any]], kind: str) -> tuple[int, int]:
    """(fused, expected) over all modes and cells."""
    pairs = [(r["fused"][kind], r["expected"][kind]) for _, r in modes(results) if r["expected"][kind] is not None]
    return sum(min(f, n) for f, n in pairs), sum(n for _, n in pairs)


def row(name: str, results: list[dict[str, Any]]) -> list[str]:
    """A family's line: fused/expected over all its modes, graphs of ours and aot_eager's, agreement."""
    line = [name]
    for kind in _families.KINDS:
        got, wanted = total(results, kind)
        found = sum(r["fused"][kind] for _, r in modes(results))
        said = any(r["expected"][kind] is not None for _, r in modes(results))
        line.append(f"{got}/{wanted}" if said and wanted else f"({found})" if not said and found else "-")
    first = results[0]
    graphs = [f"{first['modes'][m]['graphs']}:{n}" for m, n in first.get("peer", {}).items() if m in first["modes"]]
    seconds = sum(c["seconds"] for c in results)
    state = "yes" if complete(results) else "exempt" if _families.FAMILIES[name].exempt else "NO"
    agree = "yes" if agrees(results) else "NO"
    return [*line, " ".join(graphs) or "-", "yes" if few_graphs(results) else "NO", agree, state, f"{seconds:.0f} s"]


def problems(name: str, results: list[dict[str, Any]]) -> Iterator[str]:
    """Everything that a family lacks, one line each."""
    for cell in results:
        for part, error in cell["errors"].items():
            yield f"{name} {cell['attention']} {cell['dtype']} {part}: {error}"
    for label, report in modes(results):
        for text in (report["disagrees"], *report["faults"]):
            if text:
                yield f"{name} {label}: {text}"
        for kind in report["short"]:
            yield f"{name} {label}: {kind} {report['fused'][kind]}/{report['expected'][kind]}"
            yield from (f"    {reason}" for reason in report["near"][kind])


def summary(everything: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and the goals of the RESULT line."""
    required = {n: r for n, r in everything.items() if _families.FAMILIES[n].required}
    values: dict[str, Any] = {}
    for kind in _families.KINDS:
        pairs = [total(r, kind) for r in required.values()]
        values[kind] = f"{sum(p[0] for p in pairs)}/{sum(p[1] for p in pairs)}"
    exempt = sum(bool(_families.FAMILIES[n].exempt) for n in required)
    attention = [n for n, r in required.items() if total(r, "attention")[0] == total(r, "attention")[1]]
    values |= {
        "families_attention": f"{len(attention)}/{len(required)}",
        "families_complete": f"{sum(map(complete, required.values()))}/{len(required)}",
        "exempt": exempt,
        "agree": f"{sum(map(agrees, everything.values()))}/{len(everything)}",
        "graphs_ok": f"{sum(map(few_graphs, everything.values()))}/{len(everything)}",
        "compiled": sum(r["graphs"] for results in everything.values() for _, r in modes(results)),
    }
    goals = {
        "attention": "100%",
        "exempt": MAX_EXEMPT,
        "agree": f"{len(everything)}/{len(everything)}",
        "graphs_ok": f"{len(everything)}/{len(everything)}",
        "decode_graphs": MAX_DECODE_GRAPHS,
    }
    return values, goals


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", default="", help="families, separated by commas")
        parser.add_argument("--target", default="reference", choices=("reference", "cpu"))
        parser.add_argument("--attention", default=",".join(ATTENTION))
        parser.add_argument("--dtype", default="", help="float32, bfloat16 or both (default)")
        parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each (default 2)")
        parser.add_argument("--resume", type=Path, help="folder of finished families")

    args = h.arguments(__doc__, more)
    args.dtype = args.dtype or (DTYPES[0] if args.quick else ",".join(DTYPES))
    names = args.only.split(",") if args.only else list(QUICK if args.quick else _families.FAMILIES)
    if unknown := set(names) - set(_families.FAMILIES):
        raise SystemExit(f"no family {', '.join(sorted(unknown))}; known are {', '.join(_families.FAMILIES)}")
    folder = args.resume or Path(tempfile.mkdtemp(prefix="bench-coverage-"))
    folder.mkdir(parents=True, exist_ok=True)
    h.say(f"{_machine.cpu_name()}, torch {torch.__version__}, target {args.target}, logs in {folder}")
    everything: dict[str, list[dict[str, Any]]] = {}
    start = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {n: pool.submit(run, n, args, folder) for n in names}
        for i, (name, future) in enumerate(futures.items(), 1):
            everything[name] = future.result()
            seconds = time.perf_counter() - start
            done = "complete" if complete(everything[name]) else "incomplete"
            right = "agrees" if agrees(everything[name]) else "DISAGREES"
            h.say(f"[{i}/{len(names)}, {seconds:.0f} s] {name}: {done}, {right}")
    head = ("fused/expected", *_families.KINDS, "graphs ours:aot", "few", "agree", "complete", "time")
    h.say(h.table(head, [row(n, r) for n, r in everything.items()]))
    for name, results in everything.items():
        for line in problems(name, results):
            h.say(line)
    values, goals = summary(everything)
    assert values["compiled"], "nothing was compiled"
    h.result("coverage", values, goals, args.json, target=args.target, families=everything)


if __name__ == "__main__":
    main()
