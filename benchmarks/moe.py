"""Mixture-of-experts models on the CPU, prefill and decode: eager, stock Inductor, and ascend_opt; recompiles counted.

    python benchmarks/moe.py [--quick] [--only REGEX] [--rounds N] [--json PATH]

Rows: ds3-small (DeepSeek-V3: sigmoid router in groups with a correction bias, a shared expert) and q3moe-small
(Qwen3-MoE: softmax router), 32 experts of which each token takes 4, in bf16: a prefill of 128 and of 512 tokens, and
one decode step against a static cache of 256 slots. All contenders run the same Hugging Face model with the same
weights, SDPA attention, static shapes, and the experts as transformers runs them by default (grouped_mm).

Each contender also runs other prompts of the same shape, which are routed otherwise (how many ways, is counted on the
eager model): "recompiles" are the graphs that this makes beyond those of the first prompt. The floor of a row is the
larger of (bytes of the weights that the chosen experts and everything else hold / measured read bandwidth) and (FLOPs /
measured matmul peak).
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import _harness as h
import _machine
import _models
import torch
from _worker import Prepared
from torch import nn

CONTENDERS = ("eager", "inductor", "ours")
PROMPTS = 5
PROMPT, SLOTS = 128, 256
GOAL_ROW = 1.5
MODELS = ("ds3-small", "q3moe-small")

CASES: list[dict[str, Any]] = [
    {"model": m, "kind": kind, "seq": seq, "dtype": "bf16"}
    for m in MODELS
    for kind, seq in (("prefill", 128), ("prefill", 512), ("decode", 1))
]
QUICK: list[dict[str, Any]] = [{"model": m, "kind": "decode", "seq": 1, "dtype": "bf16", "layers": 2} for m in MODELS]

_built: dict[str, Any] = {}  # the worker's one model, kept from row to row


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    size = f"{case['seq']}" if case["kind"] != "decode" else f"at {PROMPT}/{SLOTS}"
    return f"{case['model']} {case['kind']} {size} {case['dtype']}"


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: the model, compiled by the contender, ready to be timed; recompiles are in ``notes``."""
    key = f"{case['model']} {case.get('layers')}"
    if key not in _built:
        _built.clear()
        _built[key] = _models.build(case["model"], layers=case.get("layers"), check=False)
    model = _built[key]
    torch._dynamo.reset()
    call: Callable[..., Any] = {
        "eager": lambda: model,
        "inductor": lambda: torch.compile(model, dynamic=False),
        "ours": lambda: torch.compile(model, backend="ascend_opt", dynamic=False),
    }[contender]()
    prompts = [_models.token_ids(model.config.vocab_size, 1, max(case["seq"], 1), seed) for seed in range(PROMPTS)]
    make = _decode if case["kind"] == "decode" else _prefill
    with torch.no_grad(), graphs() as made:
        prepared, others = make(model, call, prompts)
        prepared.run()
        first = made()
        for run in others:
            run()
        prepared.notes = {"graphs": first, "recompiles": made() - first, "routings": routings(model, prompts)}
    prepared.work = work(model, case)
    return prepared


@contextmanager
def graphs() -> Iterator[Callable[[], int]]:
    """A function that says how many graphs Dynamo has made since the beginning of the block."""
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    yield lambda: counters["unique_graphs"] - before


def routings(model: nn.Module, prompts: list[torch.Tensor]) -> int:
    """How many different assignments of experts the prompts bring about, counted over the routers of all layers."""
    seen: set[tuple[int, bytes]] = set()
    routers = [m for n, m in model.named_modules() if n.endswith(".gate") and hasattr(m, "top_k")]
    hooks = [
        m.register_forward_hook(lambda _m, _i, out, at=at: seen.add((at, out[2].sort(-1)[0].numpy().tobytes())))
        for at, m in enumerate(routers)
    ]
    for prompt in prompts:
        model(prompt, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return len(seen)


Runs = tuple[Prepared, list[Callable[[], torch.Tensor]]]


def _prefill(model: Any, call: Callable[..., Any], prompts: list[torch.Tensor]) -> Runs:
    def run(f: Callable[..., Any] = call, ids: torch.Tensor = prompts[0]) -> torch.Tensor:
        return f(ids, logits_to_keep=1, use_cache=False).logits

    # A copy: going to float32 and back would round the model's own float32 buffers (rotary frequencies).
    prepared = Prepared(run, reference=lambda: run(copy.deepcopy(model).float()))
    return prepared, [lambda p=p: run(ids=p) for p in prompts[1:]]


def _decode(model: Any, call: Callable[..., Any], prompts: list[torch.Tensor]) -> Runs:
    """One token against a static cache; ``reset`` rewinds the cache to the end of the prompt."""
    from transformers import StaticCache

    def filled(by: Any) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=SLOTS)
        ids = _models.token_ids(model.config.vocab_size, 1, PROMPT)
        with torch.no_grad():
            by(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    cache = filled(model)

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)  # type: ignore[union-attr]

    def run(f: Callable[..., Any] = call, kept: Any = cache, token: torch.Tensor = prompts[0]) -> torch.Tensor:
        return f(token, past_key_values=kept, use_cache=True).logits

    def reference() -> torch.Tensor:
        wide = copy.deepcopy(model).float()
        return run(wide, filled(wide))

    prepared = Prepared(run, reset, reset_every=SLOTS - PROMPT - 8, reference=reference)
    return prepared, [lambda p=p: run(token=p) for p in prompts[1:]]


def work(model: Any, case: dict[str, Any]) -> dict[str, float]:
    """Bytes that one call must read and FLOPs that it must do: linears, chosen experts, attention over the prompt."""
    config, tokens = model.config, case["seq"]
    head = model.lm_head
    read = flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            read += module.weight.nbytes
            flops += 2 * (1 if module is head else tokens) * module.weight.numel()
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and module.down_proj.dim() == 3:
            one = module.gate_up_proj[0].numel() + module.down_proj[0].numel()
            slots = tokens * config.num_experts_per_tok
            read += min(slots, module.down_proj.shape[0]) * one * model.dtype.itemsize
            flops += 2 * slots * one
    return {"bytes": read, "flops": flops}


HEAD = ("ms per call", *CONTENDERS, "vs inductor", "vs eager", "floor", "reached", "recompiles", "routings", "clean")


def _line(row: h.Row) -> list[str]:
    cells = [label(row.case)]
    for c in CONTENDERS:
        cells.append(f"{1e3 * row.timings[c].median:.2f}" if row.timings[c].rounds else "failed")
    cells += [f"{row.ratio('inductor'):.2f}x", f"{row.ratio('eager'):.2f}x"]
    cells += [f"{1e3 * row.floor:.2f}", f"{row.reached():.0%}"]
    notes = row.timings["ours"].notes
    cells += [str(notes.get("recompiles", "?")), str(notes.get("routings", "?"))]
    return [*cells, "yes" if row.clean else "results differ" if not row.agreed else "noisy"]


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--only", metavar="REGEX", default="", help="rows whose name matches, such as 'ds3.*decode'"
        )
        parser.add_argument("--rounds", type=int, default=5, help="timed rounds per row")

    args = h.arguments(__doc__, more)
    cases = [c for c in (QUICK if args.quick else CASES) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    h.say("settings: SDPA attention, KV in the model's dtype, static shapes, experts by grouped_mm, no prefix caching")
    bench = h.Bench("moe", CONTENDERS, rounds=3 if args.quick else args.rounds, machine=machine)
    rows: list[h.Row] = []
    with bench.processes() as running:
        for case in cases:
            row = bench.row(case, running, in_turn=True)
            rows.append(row)
            h.say("  ".join(_line(row)))
            for name, t in row.timings.items():
                h.say(f"  {name}: difference {t.difference:.1e}, compile {t.compile:.0f} s, {t.notes} {t.error}")
    h.say()
    h.say(h.table(HEAD, [_line(r) for r in rows]))
    h.result("moe", *summary(rows), args.json, machine=machine, rows=[r.to_dict() for r in rows])


def summary(rows: list[h.Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line."""
    ratios = [x for r in rows if (x := r.ratio("inductor")) == x]
    values = {
        "worst_row": min(ratios, default=float("nan")),
        "geomean": h.geomean(ratios),
        "recompiles": sum(r.timings["ours"].notes.get("recompiles", 1) for r in rows),
        "agreed": f"{sum(r.agreed for r in rows)}/{len(rows)}",
        "clean": f"{sum(r.clean for r in rows)}/{len(rows)}",
    }
    return values, {"worst_row": GOAL_ROW, "recompiles": 0}


if __name__ == "__main__":
    main()
