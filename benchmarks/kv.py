"""KV caches in decoding: time and memory of a step, copies, waste, and long sequences.

    python benchmarks/kv.py [--quick] [--only REGEX] [--rounds N] [--json PATH]

Contenders: Hugging Face's DynamicCache and StaticCache run eagerly, stock Inductor with StaticCache, and ascend_opt
with StaticCache, DynamicCache and PagedKVCache, all on the same model, weights and cached tokens, SDPA attention, bf16.
"step" rows are one decode step of Qwen3-0.6B or ds3-small (latent attention) for batch x context tokens; where a row
says fewer layers than the model has, its vocabulary is cut in the same proportion, so that every part keeps its share.
"attention" rows are the cache update and the attention of all layers alone: the difference that the layout makes.

The caches are filled with the same drawn tokens through their own ``update``. Before a row is timed the contenders'
next-token logits are compared (with float32 where that fits), and one step of each is looked at: tensors of KV size
that it allocates (its copies), buffers that moved, bytes of the cache that changed, time inside append and attention.
The floor of a row is (weights + cached keys and values) / measured read bandwidth.

Then uneven requests through the block pool (pages allocated against tokens stored), and the long-sequence batch of 4:
KV + activation memory of the padded batch against packed pages.

A full run takes about 40 minutes, most of it compilation.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from typing import Any

import _harness as h
import _kv_caches as caches
import _kv_long as long
import _kv_waste as waste
import _machine
import _memory
import _models
from _kv import FULL, WAYS, prepare

__all__ = ["main", "prepare"]

CONTENDERS = tuple(WAYS)
BATCHES, CONTEXTS = (1, 4, 16), (128, 1024, 4096, 16384, 32768)
WHOLE = ((1, 1024), (16, 128))  # batch and context of the rows that run all layers of Qwen3-0.6B
MOST = 4  # layers of the other rows, fewer where the cache would be too large
SHARE = 1.2e9  # bytes that one contender's cache may take: all of them are in memory at once
LATENT = ((1, 4096), (16, 1024))  # batch and context of the rows of ds3-small
ATTENTION = ((1, 4096), (1, 32768), (4, 4096), (16, 1024), (16, 4096))
BIG = 16  # the batch of the goals
GOAL_STEP, GOAL_APPEND, GOAL_PAGED, GOAL_LONG = 1.2, 0.02, 0.95, 0.5


def layers_of(model: str, batch: int, context: int) -> int:
    """How many layers a row runs: 0 if not even one fits."""
    if (batch, context) in WHOLE and model == "qwen3-0.6b":
        return FULL[model]
    one = token_bytes(model) * batch * (context + caches.SLACK)
    return min(MOST, int(SHARE // one))


def token_bytes(model: str) -> int:
    """Bytes of one token in one layer of the cache."""
    import transformers

    spec = _models.SPECS[model]
    return caches.shape_of(transformers.AutoConfig.for_model(spec.model_type, **spec.config)).layer_bytes


def case_of(kind: str, model: str, batch: int, context: int, layers: int | None = None) -> dict[str, Any]:
    layers = layers_of(model, batch, context) if layers is None else layers
    return {"kind": kind, "model": model, "batch": batch, "context": context, "layers": layers, "dtype": "bf16"}


def cases() -> list[dict[str, Any]]:
    """All rows of a full run; those with 0 layers do not fit."""
    rows = [case_of("step", "qwen3-0.6b", b, c) for b in BATCHES for c in CONTEXTS]
    rows += [case_of("attention", "qwen3-0.6b", b, c) for b, c in ATTENTION]
    return rows + [case_of("step", "ds3-small", b, c, 2) for b, c in LATENT]


def quick() -> list[dict[str, Any]]:
    return [case_of("step", "qwen3-0.6b", BIG, 512, 1), case_of("attention", "qwen3-0.6b", BIG, 512, 1)]


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    return f"{case['kind']} {case['model']} {case['batch']}x{case['context']} {case['layers']}L"


def contenders_of(case: dict[str, Any]) -> tuple[str, ...]:
    """Requests are packed by whole models only."""
    return tuple(c for c in CONTENDERS if c != "ours-packed" or case["kind"] == "step")


# --- what a row says -------------------------------------------------------------------------------------------------


def note(row: h.Row, contender: str, name: str) -> Any:
    """A contender's note, None if it has none."""
    return row.timings[contender].notes.get(name) if contender in row.timings else None


def ratio(row: h.Row, of: str, against: str) -> float:
    """How many times faster ``of`` is; nan unless both ran."""
    both = all(c in row.timings and row.timings[c].rounds for c in (of, against))
    return row.ratio(against, of) if both else math.nan


def append_share(row: h.Row, contender: str) -> float:
    """Share of a step that goes into writing the new tokens, by the profiler; nan if it did not run."""
    found = note(row, contender, "append_share")
    return math.nan if found is None else found


def copied(row: h.Row, contender: str) -> float:
    """Bytes of KV size that one step allocates; nan where activations are as large as the cache."""
    found = note(row, contender, "copied")
    return math.nan if found is None else found


def _mark(row: h.Row) -> str:
    failed = any(t.error for t in row.timings.values())
    noisy = any(t.dirty for t in row.timings.values())
    return "results differ" if not row.agreed else "failed" if failed else "noisy" if noisy else "yes"


HEAD = ("ms per step", *CONTENDERS, "floor", "clean")
MEMORY_HEAD = ("MB: KV held, copied per step, process", *CONTENDERS, "stored")


def _line(row: h.Row) -> list[str]:
    cells = [f"{1e3 * t.median:.2f}" if t.rounds else "failed" for t in _each(row)]
    return [label(row.case), *cells, f"{1e3 * row.floor:.2f}", _mark(row)]


def _memory_line(row: h.Row) -> list[str]:
    def cell(contender: str) -> str:
        values = [note(row, contender, n) for n in ("allocated", "copied", "resident")]
        return " ".join("-" if v is None else f"{v / 1e6:.0f}" for v in values)

    stored = next((v for c in CONTENDERS if (v := note(row, c, "stored")) is not None), math.nan)
    return [label(row.case), *map(cell, CONTENDERS), f"{stored / 1e6:.0f}"]


def _each(row: h.Row) -> list[h.Timing]:
    return [row.timings.get(c, h.Timing()) for c in CONTENDERS]


def summary(rows: list[h.Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line that follow from the rows; the worst row counts."""

    def worst(values: Iterable[float], pick: Any = min) -> float:
        return pick((x for x in values if x == x), default=math.nan)

    big = [r for r in rows if r.case["batch"] == BIG]
    steps = [r for r in big if r.case["kind"] == "step"]
    alone = [r for r in big if r.case["kind"] == "attention"]
    ours = [c for c in CONTENDERS if c.startswith("ours")]
    held = [c for c in ours if c != "ours-dynamic"]  # whose buffers stay where they are
    values: dict[str, Any] = {
        "kv_copied_bytes": worst((copied(r, c) for r in rows for c in ours), max),
        "buffers_moved": sum(note(r, c, "moved") or 0 for r in rows for c in held),
        "append_share": worst((append_share(r, c) for r in steps for c in held), max),
        "step_vs_hf_static": worst(ratio(r, "ours-static", "hf-static") for r in steps),
        "step_vs_inductor": worst(ratio(r, "ours-static", "inductor") for r in steps),
        "attention_vs_hf_static": worst(ratio(r, "ours-static", "hf-static") for r in alone),
        "attention_vs_inductor": worst(ratio(r, "ours-static", "inductor") for r in alone),
        "paged_vs_static": worst(ratio(r, "ours-paged", "ours-static") for r in rows),
        "agreed": f"{sum(r.agreed for r in rows)}/{len(rows)}",
        "clean": f"{sum(_mark(r) == 'yes' for r in rows)}/{len(rows)}",
    }
    goals = {
        "kv_copied_bytes": 0,
        "buffers_moved": 0,
        "append_share": f"<={GOAL_APPEND}",
        "step_vs_hf_static": GOAL_STEP,
        "paged_vs_static": GOAL_PAGED,
    }
    return values, goals


def measure(selected: list[dict[str, Any]], machine: _machine.Machine, rounds: int) -> list[h.Row]:
    """All rows, each contender in its own process; what does not fit is said and left out."""
    bench = h.Bench("kv", CONTENDERS, rounds=rounds, machine=machine)
    rows: list[h.Row] = []
    with bench.processes() as running:
        for case in selected:
            if not case["layers"]:
                one = token_bytes(case["model"]) * case["batch"] * case["context"]
                h.say(
                    f"{label(case)}: left out, one layer's cache is {one / 1e9:.1f} GB, for {len(CONTENDERS)} at once"
                )
                continue
            row = bench.row(case, {c: running[c] for c in contenders_of(case)}, in_turn=True)
            rows.append(row)
            h.say("  ".join(_line(row)))
            for name, t in row.timings.items():
                detail = f"difference {t.difference:.1e}, compile {t.compile:.0f} s, {t.notes}"
                h.say(f"  {name}: {t.error or detail}")
    return rows


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--only", metavar="REGEX", default="", help="rows whose name matches: 'step.* 16x', waste, long"
        )
        parser.add_argument("--rounds", type=int, default=5, help="timed rounds per row")

    args = h.arguments(__doc__, more)
    selected = [c for c in (quick() if args.quick else cases()) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    h.say(f"settings: SDPA attention, bf16 keys and values, no prefix caching, pages of {caches.PAGE} tokens;")
    h.say(f"{_memory.available() / 1e9:.0f} GB of memory free")
    rows = measure(selected, machine, 3 if args.quick else args.rounds)
    for head, line in ((HEAD, _line), (MEMORY_HEAD, _memory_line)):
        h.say("\n" + h.table(head, [line(r) for r in rows]) if rows else "")
    values, goals = summary(rows)
    if re.search(args.only, "waste"):
        values |= uneven()
        goals |= {"waste": f"<{caches.PAGE}", "orphans": 0}
    if re.search(args.only, "long"):
        values |= long.report(args.quick)
        goals |= {"long_saving": GOAL_LONG, "long_wrong_steps": 0}
    h.result("kv", values, goals, args.json, machine=machine, rows=[r.to_dict() for r in rows])


def uneven() -> dict[str, Any]:
    """Run the uneven requests through the block pool and through padded batches."""
    queue = waste.requests()
    pages, rows = waste.paged(queue, caches.PAGE), waste.padded(queue)
    h.say(f"\n{len(queue)} uneven requests, {waste.RUNNING} at a time; token slots taken per token stored:")
    h.say(f"  pages of {caches.PAGE}: {pages.factor:.3f}, at worst {pages.worst} slots of a sequence not filled,")
    h.say(f"  {pages.orphans} orphaned pages at any time, {pages.left} still held at the end")
    h.say(f"  padded to the longest of {waste.RUNNING}: {rows.factor:.2f}")
    return {"waste": pages.worst, "orphans": pages.orphans + pages.left, "padding_factor": rows.factor}


if __name__ == "__main__":
    main()
