"""Peak memory and time of models that spell attention out, against stock Inductor and against hand-written SDPA.

    python benchmarks/attention.py [--quick] [--only REGEX] [--json PATH]

Models: one causal attention layer written by hand (16 query heads of 128 over 8 key heads, bf16), two layers of
Qwen3-0.6B (bf16, Hugging Face) and two of BERT-base with padding (fp32), prefill of 512 to 16384 tokens. Contenders:
the eager spelling (Hugging Face's attn_implementation="eager") run eagerly, by stock Inductor and by ascend_opt; and
scaled_dot_product_attention (attn_implementation="sdpa") by stock Inductor and by ascend_opt. Static shapes.

Memory is what one call adds to the process's resident memory at its highest, after two calls to warm up. Its exponent
in the sequence is fitted to all lengths (least squares in logarithms), and taken between the two longest; the worse of
the two is reported. A contender that would need more memory than there is, going by its growth so far, is not run, and
the row says what it would need. Results are compared with SDPA in float32 on the same weights.

Then the forms of attention (windows, soft caps, sinks, padding, biases, latent attention, decode steps, three dtypes),
each alone and spelled out, against stock Inductor on the same spelling.

A full run takes about 15 minutes.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import _harness as h
import _machine
import _memory
from _attention import prepare
from _attention_forms import FORMS

__all__ = ["main", "prepare"]

EAGER, SDPA = ("eager", "inductor", "ours"), ("inductor-sdpa", "ours-sdpa")
CONTENDERS = (*EAGER, *SDPA)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MODELS = {"layer": "bf16", "qwen3-0.6b": "bf16", "bert-long": "fp32"}
CASES: list[dict[str, Any]] = [{"model": m, "dtype": d, "seq": s} for m, d in MODELS.items() for s in LENGTHS]
CASES += [{"form": name, "dtype": form.dtype} for name, form in FORMS.items()]
QUICK: list[dict[str, Any]] = [{"model": "layer", "dtype": "bf16", "seq": s} for s in (512, 2048)]
QUICK.append({"form": "decode, MLA absorbed", "dtype": "bf16"})
ROUNDS = {8192: 2, 16384: 1}  # of a row; 3 where it is shorter
SHARE = 0.8  # of the available memory that a contender may be expected to need
COMPARED = 4096  # the length at which we are compared with Inductor
GOAL_EXPONENT, GOAL_INDUCTOR, GOAL_SDPA, GOAL_FORM = 1.1, 2.0, 0.98, 1.0


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    return case.get("form") or f"{case['model']} {case['seq']} {case['dtype']}"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent e of y ~ x**e, by least squares in logarithms; nan with fewer than two points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return math.nan
    mx, my = (sum(c) / len(logs) for c in zip(*logs, strict=True))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The larger of the exponent over all lengths and that between the two longest."""
    return max(slope(points), slope(points[-2:])) if len(points) > 1 else math.nan


class Peaks:
    """The peak memory of every contender of one model, by length, and what it will be at the next."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[float, float]]] = {c: [] for c in CONTENDERS}

    def add(self, row: h.Row) -> None:
        for c, t in row.timings.items():
            if t.peak == t.peak:
                self.points[c].append((row.case["seq"], t.peak))

    def expected(self, contender: str, length: int) -> float:
        """Bytes, from the two longest lengths so far; quadratic growth if there is only one, 0 if there is none."""
        seen = self.points[contender]
        if not seen:
            return 0.0
        x, y = seen[-1]
        growth = slope(seen[-2:]) if len(seen) > 1 else 2.0
        return float(y * (length / x) ** growth)


def measure(bench: h.Bench, case: dict[str, Any], running: dict[str, h.Process], peaks: Peaks) -> h.Row:
    """One row; contenders that would not fit into memory get an error that says what they need."""
    free = SHARE * _memory.available()
    needs = {c: peaks.expected(c, case["seq"]) for c in running}
    fits = {c: p for c, p in running.items() if needs[c] <= free}
    row = bench.row(case, fits, in_turn=True)
    for c in running:
        if c not in fits:
            row.timings[c] = h.Timing(error=f"OOM guard: needs {needs[c] / 1e9:.0f} GB")
    row.timings = {c: row.timings[c] for c in running}
    peaks.add(row)
    return row


def _cell(t: h.Timing) -> str:
    if not t.rounds:
        return t.error.removeprefix("OOM guard: ") if t.error.startswith("OOM guard") else "failed"
    return f"{1e3 * t.median:{'.0f' if t.median > 0.1 else '.2f'}} ms {t.peak / 1e6:.0f} MB"


def _ratio(row: h.Row, of: str, against: str) -> float:
    both = all(c in row.timings and row.timings[c].rounds for c in (of, against))
    return row.ratio(against, of) if both else math.nan


def _mark(row: h.Row) -> str:
    failed = [t for t in row.timings.values() if t.error and not t.error.startswith("OOM guard")]
    noisy = any(t.dirty for t in row.timings.values())
    return "results differ" if not row.agreed else "failed" if failed else "noisy" if noisy else "yes"


def _line(row: h.Row) -> list[str]:
    pairs = [("ours", "inductor")] if "form" in row.case else RATIOS
    cells = [_cell(t) for t in row.timings.values()]
    return [label(row.case), *cells, *(f"{_ratio(row, *pair):.2f}x" for pair in pairs), _mark(row)]


RATIOS = [("ours", "inductor"), ("ours", "inductor-sdpa"), ("ours-sdpa", "inductor-sdpa")]
HEAD_FORMS = ("time, peak memory", *EAGER, "vs inductor", "clean")
HEAD = ("time, peak memory", *CONTENDERS, "vs inductor", "vs its sdpa", "sdpa, both", "clean")


def summary(rows: list[h.Row], forms: list[h.Row], peaks: dict[str, Peaks]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line; the worst model, row or form counts."""

    def worst(values: Iterable[float]) -> float:
        return min((x for x in values if x == x), default=math.nan)

    ours = [exponent(p.points[c]) for p in peaks.values() for c in ("ours", "ours-sdpa")]
    longest = max((r.case["seq"] for r in rows if r.case["seq"] <= COMPARED), default=0)
    everything = [*rows, *forms]
    values: dict[str, Any] = {
        "exponent": -worst(-e for e in ours),
        f"vs_inductor_{longest}": worst(_ratio(r, "ours", "inductor") for r in rows if r.case["seq"] == longest),
        "vs_sdpa": worst(_ratio(r, of, "inductor-sdpa") for r in rows for of in ("ours", "ours-sdpa")),
        "worst_form": worst(_ratio(r, "ours", "inductor") for r in forms),
        "agreed": f"{sum(r.agreed for r in everything)}/{len(everything)}",
        "clean": f"{sum(_mark(r) == 'yes' for r in everything)}/{len(everything)}",
    }
    goals = {"exponent": f"<={GOAL_EXPONENT}", f"vs_inductor_{longest}": GOAL_INDUCTOR, "vs_sdpa": GOAL_SDPA}
    return values, {**goals, "worst_form": GOAL_FORM}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--only", metavar="REGEX", default="", help="rows whose name matches, such as 'layer|sinks'"
        )

    args = h.arguments(__doc__, more)
    cases = [c for c in (QUICK if args.quick else CASES) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    h.say(f"settings: batch 1, no KV cache, static shapes; {_memory.available() / 1e9:.0f} GB of memory free")
    bench = h.Bench("attention", CONTENDERS, rounds=3, machine=machine)
    rows: list[h.Row] = []
    forms: list[h.Row] = []
    peaks = {c["model"]: Peaks() for c in cases if "model" in c}
    with bench.processes() as running:
        for case in cases:
            bench.rounds = ROUNDS.get(case.get("seq", 0), 3)
            if "form" in case:
                row = bench.row(case, {c: running[c] for c in EAGER}, in_turn=True)
                forms.append(row)
            else:
                row = measure(bench, case, running, peaks[case["model"]])
                rows.append(row)
            h.say("  ".join(_line(row)))
            for name, t in row.timings.items():
                if t.error:
                    h.say(f"  {name}: {t.error}")
    for head, lines in ((HEAD, rows), (HEAD_FORMS, forms)):
        h.say("\n" + h.table(head, [_line(r) for r in lines]) if lines else "")
    found = {m: {c: exponent(points) for c, points in p.points.items()} for m, p in peaks.items()}
    for model, of in found.items():
        known = (f"{c} {e:.2f}" for c, e in of.items() if e == e)
        h.say(f"exponent of the peak memory in the sequence, {model}: {', '.join(known)}")
    detail = [r.to_dict() for r in (*rows, *forms)]
    h.result("attention", *summary(rows, forms, peaks), args.json, machine=machine, exponents=found, rows=detail)


if __name__ == "__main__":
    main()
