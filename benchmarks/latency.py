"""Latency of BERT-base and Qwen3-0.6B on the CPU: eager, stock Inductor, and ascend_opt.

    python benchmarks/latency.py [--quick] [--only REGEX] [--rounds N] [--json PATH]

Rows: BERT-base at batch 1 and 8, 128 and 512 tokens; Qwen3-0.6B prefill of 128 and 1024 tokens and one decode step
(static cache of 256 slots, 128 of them filled), each in bf16 and fp32. All contenders run the same Hugging Face model
with the same weights, SDPA attention, and keys and values in the model's dtype, with static shapes. The floor of a row
is the larger of (bytes of the weights read / measured read bandwidth) and (FLOPs / measured matmul peak).

A full run takes about 20 minutes, most of it compilation.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from typing import Any

import _harness as h
import _machine
import _models
import torch
from _worker import Prepared

CONTENDERS = ("eager", "inductor", "ours")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PROMPT, SLOTS = 128, 256
GOAL_GEOMEAN, GOAL_ROW = 1.25, 0.98

BERT: list[dict[str, Any]] = [
    {"model": "bert-base", "kind": "encode", "batch": b, "seq": s} for b in (1, 8) for s in (128, 512)
]
QWEN: list[dict[str, Any]] = [
    {"model": "qwen3-0.6b", "kind": "prefill", "batch": 1, "seq": 128},
    {"model": "qwen3-0.6b", "kind": "prefill", "batch": 1, "seq": 1024},
    {"model": "qwen3-0.6b", "kind": "decode", "batch": 1, "seq": 1},
]
CASES: list[dict[str, Any]] = [{**c, "dtype": d} for d in ("bf16", "fp32") for c in (*BERT, *QWEN)]
QUICK: list[dict[str, Any]] = [
    {"model": "bert-base", "kind": "encode", "batch": 1, "seq": 128, "dtype": "bf16", "layers": 2},
    {"model": "qwen3-0.6b", "kind": "decode", "batch": 1, "seq": 1, "dtype": "bf16", "layers": 2},
]

_built: dict[str, Any] = {}  # the worker's one model, kept from row to row


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    size = f"{case['batch']}x{case['seq']}" if case["kind"] != "decode" else f"at {PROMPT}/{SLOTS}"
    return f"{case['model']} {case['kind']} {size} {case['dtype']}"


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: the model, compiled by the contender, ready to be timed."""
    key = f"{case['model']} {case['dtype']} {case.get('layers')}"
    if key not in _built:
        _built.clear()
        dtype = DTYPES[case["dtype"]]
        _built[key] = _models.build(case["model"], dtype=dtype, layers=case.get("layers"), check=False)
    model = _built[key]
    torch._dynamo.reset()
    call: Callable[..., Any] = {
        "eager": lambda: model,
        "inductor": lambda: torch.compile(model, dynamic=False),
        "ours": lambda: torch.compile(model, backend="ascend_opt", dynamic=False),
    }[contender]()
    prepared = _decode(model, call, case) if case["kind"] == "decode" else _forward(model, call, case)
    prepared.work = work(model, case)
    return prepared


def _forward(model: Any, call: Callable[..., Any], case: dict[str, Any]) -> Prepared:
    ids = _models.token_ids(model.config.vocab_size, case["batch"], case["seq"])
    more = {"logits_to_keep": 1, "use_cache": False} if case["kind"] == "prefill" else {}

    def run(f: Callable[..., Any] = call) -> torch.Tensor:
        out = f(ids, **more)
        return out.logits if more else out.last_hidden_state

    return Prepared(run, reference=_reference(model, run, case))


def _reference(model: Any, run: Callable[..., torch.Tensor], case: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    """The same in float32 with the same (rounded) weights; a float32 row is compared with eager instead."""
    if case["dtype"] == "fp32":
        return None

    def reference() -> torch.Tensor:
        # A copy: going to float32 and back would round the model's own float32 buffers (rotary frequencies).
        return run(copy.deepcopy(model).float())

    return reference


def _decode(model: Any, call: Callable[..., Any], case: dict[str, Any]) -> Prepared:
    """One token against a static cache; ``reset`` rewinds the cache to the end of the prompt."""
    from transformers import StaticCache

    prompt = _models.token_ids(model.config.vocab_size, 1, PROMPT)
    token = prompt[:, :1].clone()

    def filled(by: Any) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=SLOTS)
        with torch.no_grad():
            by(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    cache = filled(model)

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)  # type: ignore[union-attr]

    def run(f: Callable[..., Any] = call, kept: Any = cache) -> torch.Tensor:
        return f(token, past_key_values=kept, use_cache=True).logits

    reference = _reference(model, lambda f: run(f, filled(f)), case)
    return Prepared(run, reset, reset_every=SLOTS - PROMPT - 8, reference=reference)


def work(model: Any, case: dict[str, Any]) -> dict[str, float]:
    """Bytes that one call must read and FLOPs that it must do: linears, and attention (half of it if causal)."""
    config = model.config
    tokens = case["batch"] * case["seq"]
    head = getattr(model, "lm_head", None)
    read = flops = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows = case["batch"] if module is head else tokens
            read += module.weight.nbytes
            flops += 2 * rows * module.weight.numel()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // 12)
    keys = PROMPT + 1 if case["kind"] == "decode" else case["seq"]
    attention = 4 * tokens * keys * width * config.num_hidden_layers
    if case["kind"] == "decode":
        heads = config.num_key_value_heads * config.head_dim
        read += 2 * keys * heads * config.num_hidden_layers * model.dtype.itemsize
    return {"bytes": read, "flops": flops + attention / (2 if case["kind"] == "prefill" else 1)}


def _line(row: h.Row) -> list[str]:
    cells = [label(row.case)]
    for c in CONTENDERS:
        cells.append(f"{1e3 * row.timings[c].median:.2f}" if row.timings[c].rounds else "failed")
    cells += [f"{row.ratio('inductor'):.2f}x", f"{row.ratio('eager'):.2f}x"]
    cells += [f"{1e3 * row.floor:.2f}", f"{row.reached():.0%}", f"{row.reached('inductor'):.0%}"]
    mark = "yes" if row.clean else "results differ" if not row.agreed else "noisy"
    return [*cells, mark]


HEAD = ("ms per call", *CONTENDERS, "vs inductor", "vs eager", "floor", "reached", "inductor's", "clean")


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--only", metavar="REGEX", default="", help="rows whose name matches, such as 'qwen.*bf16'")
        parser.add_argument("--rounds", type=int, default=5, help="timed rounds per row")

    args = h.arguments(__doc__, more)
    cases = [c for c in (QUICK if args.quick else CASES) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    h.say("settings: SDPA attention, KV in the model's dtype, static shapes, no prefix caching, rope in float32")
    bench = h.Bench("latency", CONTENDERS, rounds=3 if args.quick else args.rounds, machine=machine)
    rows: list[h.Row] = []
    with bench.processes() as running:
        for case in cases:
            row = bench.row(case, running)
            rows.append(row)
            h.say("  ".join(_line(row)) + f"  (compile: {_compiles(row)})")
            for name, t in row.timings.items():
                if t.error:
                    h.say(f"  {name} failed: {t.error}")
    h.say()
    h.say(h.table(HEAD, [_line(r) for r in rows]))
    h.result("latency", *summary(rows), args.json, machine=machine, rows=[r.to_dict() for r in rows])


def _compiles(row: h.Row) -> str:
    return ", ".join(f"{c} {t.compile:.0f} s" for c, t in row.timings.items())


def summary(rows: list[h.Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line."""
    ratio = {
        d: [r.ratio("inductor") for r in rows if r.case["dtype"] == d and r.timings["ours"].rounds] for d in DTYPES
    }
    everything = [x for values in ratio.values() for x in values if x == x]
    values = {
        "bf16_geomean": h.geomean(ratio["bf16"]),
        "fp32_geomean": h.geomean(ratio["fp32"]),
        "worst_row": min(everything, default=float("nan")),
        "agreed": f"{sum(r.agreed for r in rows)}/{len(rows)}",
        "clean": f"{sum(r.clean for r in rows)}/{len(rows)}",
    }
    return values, {"bf16_geomean": GOAL_GEOMEAN, "worst_row": GOAL_ROW}


if __name__ == "__main__":
    main()
