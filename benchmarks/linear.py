"""Linear layers on the CPU: ATen with a plain weight, oneDNN with a packed one, and ascend_cpu.linear.

    python benchmarks/linear.py [--quick] [--only REGEX] [--rounds N] [--json PATH]

The shapes are those of Qwen3-0.6B (QKV, output, gate and up, down, head) and of BERT-base. Weights are taken in turn
from a set larger than the last cache, as a model's layers would be. Stock Inductor calls ATen's with the plain weight;
the packed one is what a copy of every weight would buy. The floor of a row is the larger of (bytes of the weight /
measured read bandwidth) and (FLOPs / measured matmul peak). A full run takes about 10 minutes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from typing import Any

import _harness as h
import _machine
import torch
from _worker import Prepared

CONTENDERS = ("aten", "packed", "ours")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = {
    "qwen3 qkv": (4096, 1024),
    "qwen3 out": (1024, 2048),
    "qwen3 gate_up": (6144, 1024),
    "qwen3 down": (1024, 3072),
    "qwen3 head": (151936, 1024),
    "bert out": (768, 768),
    "bert up": (3072, 768),
    "bert down": (768, 3072),
}
ROWS = (1, 8, 128, 1024, 4096)
COLD = 96e6  # bytes of weights that one round of calls reads: three times the last cache
GOAL_DECODE, GOAL_PREFILL, GOAL_WORST = 2.0, 1.05, 0.97


def _cases(dtypes: tuple[str, ...], shapes: tuple[str, ...], rows: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"shape": s, "m": m, "dtype": d}
        for d, s, m in itertools.product(dtypes, shapes, rows)
        if m <= 8 or s != "qwen3 head"  # only the last token meets the head
    ]


CASES = _cases(("bf16", "fp32"), tuple(SHAPES), ROWS)
QUICK = _cases(("bf16",), ("qwen3 gate_up", "bert down"), (1, 8, 128))


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    return f"{case['shape']} {case['m']} {case['dtype']}"


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: one call per weight of the set, in turn."""
    (n, k), m, dtype = SHAPES[case["shape"]], case["m"], DTYPES[case["dtype"]]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(dtype)
    count = max(1, math.ceil(COLD / (n * k * dtype.itemsize)))
    weights = [(torch.randn(n, k, generator=generator) * 0.02).to(dtype)]
    weights += [weights[0].clone() for _ in range(count - 1)]
    if contender == "packed":
        weights = [torch.ops.mkldnn._reorder_linear_weight(w, m) for w in weights]
    if contender == "ours":
        from ascend_dynamo.lowering.cpu import kernels

        kernels.load()
    turn = itertools.cycle(weights)

    def run() -> torch.Tensor:
        w = next(turn)
        if contender == "aten":
            return torch.nn.functional.linear(x, w)
        if contender == "packed":
            return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        return torch.ops.ascend_cpu.linear(x, w)

    return Prepared(run, work={"bytes": n * k * dtype.itemsize, "flops": 2.0 * m * n * k})


def _line(row: h.Row) -> list[str]:
    (n, k), m = SHAPES[row.case["shape"]], row.case["m"]
    cells = [label(row.case), f"{n}x{k}"]
    cells += [f"{1e3 * row.timings[c].median:.3f}" if row.timings[c].rounds else "failed" for c in CONTENDERS]
    seconds = row.timings["ours"].median
    cells += [f"{row.ratio('aten'):.2f}x", f"{row.ratio('packed'):.2f}x"]
    cells += [f"{n * k * DTYPES[row.case['dtype']].itemsize / seconds / 1e9:.1f}", f"{2e-9 * m * n * k / seconds:.0f}"]
    cells += [f"{row.reached():.0%}", "yes" if row.clean else "results differ" if not row.agreed else "noisy"]
    return cells


HEAD = ("ms per call", "N x K", *CONTENDERS, "vs aten", "vs packed", "GB/s", "GFLOP/s", "of floor", "clean")


def summary(rows: list[h.Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line."""

    def ratios(few: bool, dtype: str = "bf16") -> list[float]:
        timed = (r for r in rows if r.timings["ours"].rounds and r.case["dtype"] == dtype)
        return [x for x in (r.ratio("aten") for r in timed if (r.case["m"] == 1) is few) if x == x]

    values = {
        "bf16_one_row": h.geomean(ratios(True)),
        "bf16_more_rows": h.geomean(ratios(False)),
        "fp32": h.geomean([*ratios(True, "fp32"), *ratios(False, "fp32")]),
        "worst": min([*ratios(True), *ratios(False), *ratios(True, "fp32"), *ratios(False, "fp32")], default=math.nan),
        "agreed": f"{sum(r.agreed for r in rows)}/{len(rows)}",
        "clean": f"{sum(r.clean for r in rows)}/{len(rows)}",
    }
    return values, {"bf16_one_row": GOAL_DECODE, "bf16_more_rows": GOAL_PREFILL, "worst": GOAL_WORST}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", metavar="REGEX", default="", help="rows whose name matches, such as 'bert.*bf16'")
        parser.add_argument("--rounds", type=int, default=3, help="timed rounds per row")

    args = h.arguments(__doc__, more)
    cases = [c for c in (QUICK if args.quick else CASES) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    bench = h.Bench("linear", CONTENDERS, rounds=2 if args.quick else args.rounds, machine=machine)
    rows: list[h.Row] = []
    with bench.processes() as running:
        for case in cases:
            row = bench.row(case, running)
            rows.append(row)
            h.say("  ".join(_line(row)))
            for name, t in row.timings.items():
                if t.error:
                    h.say(f"  {name} failed: {t.error}")
    h.say()
    h.say(h.table(HEAD, [_line(r) for r in rows]))
    h.result("linear", *summary(rows), args.json, machine=machine, rows=[r.to_dict() for r in rows])


if __name__ == "__main__":
    main()
