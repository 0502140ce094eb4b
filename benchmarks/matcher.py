"""Matching speed: 100 patterns on graphs of 1k, 10k and 50k calls, and all our passes on a real 28-layer graph.

    python benchmarks/matcher.py [--quick] [--only synthetic|qwen3] [--json PATH]

Contenders on the synthetic graphs (see ``_synthetic``), each in a process of its own with one thread:

* ``ours``: ``run_patterns``: match, rewrite, verify each rewrite, to the fixpoint;
* ``inductor``: ``PatternMatcherPass`` with graph patterns and the cheapest handler that makes the same replacement;
* ``fx``: ``SubgraphMatcher`` for each pattern in turn, matching only (not run on 50k calls, where it takes minutes).

All must find the same occurrences. Tracing the patterns, done once per process, is reported on its own. The floor is
one walk over the graph that looks at each node's operator and inputs. The second part compiles a 28-layer Qwen3 (its
real layers, narrow) with an empty Inductor cache and relates the time of all our passes to the whole compilation.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _harness as h
import _machine
import _models
import _synthetic as s
import torch
from _worker import Prepared
from torch import fx

SIZES = (1_000, 10_000, 50_000)
PEERS = ("inductor", "fx")
GOAL_FLAT, GOAL_PEER, GOAL_PASSES, GOAL_SHARE = 1.3, 5.0, 0.2, 0.10


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: ``run`` matches all patterns on a fresh copy of the graph, made by ``reset``."""
    torch.set_num_threads(1)
    if case["kind"] == "qwen3":
        return _qwen3(case)
    original, occurrences = s.graph(case["calls"])
    start = time.perf_counter()
    match = {"ours": _ours, "inductor": _inductor, "fx": _fx}[contender]()
    trace = time.perf_counter() - start
    held: list[fx.GraphModule] = []

    def reset() -> None:
        held[:] = [_copy(original)]

    def run() -> torch.Tensor:
        return match(held[0])

    walk = _machine.best(lambda: [(n.target, n.args) for n in original.graph.nodes], 5)
    return Prepared(run, reset, 1, notes={"trace": trace, "walk": walk, "occurrences": occurrences})


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(torch.nn.Module(), copy.deepcopy(gm.graph))


def _ours() -> Callable[[fx.GraphModule], torch.Tensor]:
    from ascend_dynamo.contracts import Domain, GraphUnit
    from ascend_dynamo.match import Registry, declare, run_patterns
    from ascend_dynamo.options import Options
    from ascend_dynamo.report.records import CompileRecord

    domain = Domain(dims={"N": (1, None)}, shapes={"x": ("N",), "y": ("N",), "z": ("N",)})
    made: list[Any] = [
        declare(f"p{i}", eager=(s.search(i),), replace=s.replacement(i), domain=domain) for i in range(s.COUNT)
    ]
    registry = Registry(made)
    options = Options.resolve()

    def match(gm: fx.GraphModule) -> torch.Tensor:
        unit = GraphUnit(gm, fx.GraphModule(torch.nn.Module(), fx.Graph()))
        run_patterns(unit, registry, options, CompileRecord(), explain=False)
        return s.counts(gm)

    match(s.graph(64)[0])  # traces the patterns
    return match


def _inductor() -> Callable[[fx.GraphModule], torch.Tensor]:
    from torch._inductor.pattern_matcher import Arg, CallFunction, PatternMatcherPass, register_graph_pattern

    passes = PatternMatcherPass()

    def handler(i: int) -> Callable[..., None]:
        def replace(match: Any, x: fx.Node, y: fx.Node, z: fx.Node) -> None:
            old = match.output_node()
            with match.graph.inserting_before(old):
                new = match.graph.call_function(s.FUSED, (x, y, z, i))
            new.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(new)
            match.erase_nodes()

        return replace

    for i in range(s.COUNT):
        a, b, root = s.parts(i)
        product = CallFunction(torch.ops.aten.mul.Tensor, CallFunction(b, Arg()), Arg())
        register_graph_pattern(CallFunction(root, CallFunction(a, product), Arg()), pass_dict=passes)(handler(i))

    def match(gm: fx.GraphModule) -> torch.Tensor:
        passes.apply(gm)
        return s.counts(gm)

    return match


def _fx() -> Callable[[fx.GraphModule], torch.Tensor]:
    from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

    matchers = []
    for i in range(s.COUNT):
        a, b, root = s.parts(i)
        g = fx.Graph()
        x, y, z = (g.placeholder(n) for n in "xyz")
        product = g.call_function(torch.ops.aten.mul.Tensor, (g.call_function(b, (x,)), y))
        g.output(g.call_function(root, (g.call_function(a, (product,)), z)))
        matchers.append(SubgraphMatcher(g))

    def match(gm: fx.GraphModule) -> torch.Tensor:
        return torch.tensor([float(len(m.match(gm.graph))) for m in matchers])

    return match


def _qwen3(case: dict[str, Any]) -> Prepared:
    """One cold compilation, and one more in the same process, where the patterns have been traced already."""
    from ascend_dynamo import Backend

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="bench-matcher-")
    model = _models.build("tiny-qwen3", layers=case["layers"], check=False)
    ids = _models.token_ids(model.config.vocab_size, 1, 32)
    notes: dict[str, Any] = {}
    for name in ("cold", "again"):
        torch._dynamo.reset()
        backend = Backend()
        start = time.perf_counter()
        with torch.no_grad():
            out = torch.compile(model, backend=backend, dynamic=False)(ids, use_cache=False).logits
        whole = time.perf_counter() - start
        record = backend.records[0]
        passes = sum(record.seconds[p] for p in ("normalize", "fuse", "lower"))
        notes[name] = {"passes": passes, "compile": whole, **record.seconds}
        notes["calls"] = record.nodes_before
        notes["fired"] = len(record.fired)
    return Prepared(lambda: out, notes=notes)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", choices=("synthetic", "qwen3"), help="one part")

    args = h.arguments(__doc__, more)
    h.say(f"{_machine.cpu_name()}, one thread, torch {torch.__version__}")
    values: dict[str, Any] = {}
    rows: list[h.Row] = []
    if args.only != "qwen3":
        rows = _synthetic(values, quick=args.quick)
    if args.only != "synthetic":
        rows.append(_real(values, layers=4 if args.quick else 28))
    goals = {"flat": GOAL_FLAT, "vs_peer": GOAL_PEER, "passes_s": GOAL_PASSES, "share": GOAL_SHARE}
    h.result("matcher", values, goals, args.json, rows=[r.to_dict() for r in rows])


def _synthetic(values: dict[str, Any], *, quick: bool) -> list[h.Row]:
    sizes = SIZES[:2] if quick else SIZES
    rows = []
    for calls in sizes:
        contenders = ("ours", "inductor", *(("fx",) if calls <= (1_000 if quick else 10_000) else ()))
        bench = h.Bench("matcher", contenders, rounds=3, machine=None, threads=1)
        with bench.processes() as running:
            rows.append(bench.row({"kind": "synthetic", "calls": calls, "dtype": "fp32"}, running))
    lines = []
    for row in rows:
        calls = row.case["calls"]
        note = row.timings["ours"].notes
        cells = [f"{calls} calls, {note.get('occurrences')} occurrences"]
        for c in ("ours", *PEERS):
            t = row.timings.get(c)
            cells.append("-" if t is None else f"{1e3 * t.median:.1f}" if t.rounds else "failed")
            if t is not None and t.error:
                h.say(f"{c} failed on {calls} calls: {t.error}")
        cells += [f"{1e6 * row.timings['ours'].median / calls:.2f}", f"{1e3 * note.get('walk', 0):.1f}"]
        lines.append(
            [*cells, f"{_fastest_peer(row):.1f}x", "yes" if row.clean else "noisy" if row.agreed else "DIFFER"]
        )
    h.say(h.table(("ms", "ours", *PEERS, "ours us/call", "walk", "vs fastest peer", "clean"), lines))
    traces = ", ".join(f"{c} {t.notes.get('trace', 0):.2f} s" for c, t in rows[0].timings.items())
    h.say(f"tracing the {s.COUNT} patterns, once per process: {traces}\n")
    per_call = [r.timings["ours"].median / r.case["calls"] for r in rows]
    values["flat"] = max(per_call) / min(per_call)
    values["vs_peer"] = _fastest_peer(rows[1])
    values["agreed"] = f"{sum(r.agreed for r in rows)}/{len(rows)}"
    return rows


def _fastest_peer(row: h.Row) -> float:
    ratios = [row.ratio(c) for c in PEERS if c in row.timings and row.timings[c].rounds]
    return min(ratios, default=float("nan"))


def _real(values: dict[str, Any], *, layers: int) -> h.Row:
    bench = h.Bench("matcher", ("ours",), rounds=0, machine=None, threads=1)
    with bench.processes() as running:
        row = bench.row({"kind": "qwen3", "layers": layers, "dtype": "fp32"}, running)
    timing = row.timings["ours"]
    if timing.error:
        h.say(f"Qwen3 failed: {timing.error}")
        return row
    n = timing.notes
    h.say(f"Qwen3, {layers} layers, {n['calls']} captured calls, {n['fired']} rewrites")
    head = ("seconds", "capture", "normalize", "fuse", "lower", "our passes", "whole compile", "share")
    lines = []
    for name in ("cold", "again"):
        t = n[name]
        cells = [f"{t[k]:.3f}" for k in ("capture", "normalize", "fuse", "lower", "passes", "compile")]
        lines.append([name, *cells[:-1], f"{t['compile']:.1f}", f"{t['passes'] / t['compile']:.1%}"])
    h.say(h.table(head, lines) + "\n")
    values["passes_s"] = n["again"]["passes"]
    values["passes_first_s"] = n["cold"]["passes"]
    values["share"] = n["cold"]["passes"] / n["cold"]["compile"]
    return row


if __name__ == "__main__":
    main()
