"""Attention of a decode step: contiguous keys against pages, and the write of the new token, kernel by kernel.

    python benchmarks/paged.py [--quick] [--only REGEX] [--rounds N] [--json PATH]

One layer of Qwen3-0.6B's attention (16 query heads of 128 over 8 key heads), batch 1, 4 and 16, context 128 to 32768
(batch 16: to 8192).
``contiguous`` is ascend_cpu.flash_attention on [B, Hk, S, D]; ``tokens`` the same on [B, S, Hk, D], as a projection
writes them; ``static`` is ascend_cpu.paged_attention on a StaticCache's buffer, one page a sequence; ``page N`` on
shuffled pages of N tokens, each [Hk, N, D] in memory, as ``PagedKVCache`` keeps them; ``int8`` on int8 pages of 16;
``append`` is ascend_cpu.kv_write of one token a sequence. All but the last compute the same, which is checked. Caches
are taken in turn from a set larger than the last cache, as a model's layers would be. The floor is the bytes of the
cache at the measured read bandwidth.

The goal is that pages of 16 tokens and more, and static buffers, cost at most 5 % more than ``contiguous``. A full run
takes about 15 minutes.
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

HEADS, KEY_HEADS, DIM = 16, 8, 128
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PAGES = {"page 1": 1, "page 16": 16, "page 64": 64, "page 128": 128}
CONTENDERS = ("contiguous", "tokens", "static", *PAGES, "int8", "append")
COMPARED = ("tokens", "static", *PAGES, "int8")
JUDGED = ("static", "page 16", "page 64", "page 128")
COLD = 96e6  # bytes of caches that one round of calls reads: three times the last cache
MOST = 1 << 18  # tokens of a case in bf16: each of nine processes holds 1 GB of them
GOAL = 1.05

CASES: list[dict[str, Any]] = [
    {"batch": b, "context": s, "dtype": d}
    for d, b, s in itertools.product(DTYPES, (1, 4, 16), (128, 512, 2048, 8192, 32768))
    if b * s * (2 if d == "fp32" else 1) <= MOST
]
QUICK = [{"batch": b, "context": s, "dtype": "bf16"} for b, s in ((1, 2048), (4, 512))]


def label(case: dict[str, Any]) -> str:
    """The row's name, which ``--only`` matches."""
    return f"batch {case['batch']} context {case['context']} {case['dtype']}"


def _paged(k: torch.Tensor, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, Hk, D] as shuffled pages and their block table."""
    batch, tokens = k.shape[:2]
    count = batch * tokens // size
    order = torch.randperm(count, generator=generator)
    pages = torch.empty(count, k.shape[2], size, k.shape[3], dtype=k.dtype).transpose(1, 2)
    pages[order] = k.reshape(count, size, *k.shape[2:])
    return pages, order.view(batch, -1).to(torch.int32)


def prepare(case: dict[str, Any], contender: str) -> Prepared:
    """Runs in the worker: one call per layer of the set, in turn."""
    from ascend_dynamo.lowering.cpu import kernels

    kernels.load()
    ops = torch.ops.ascend_cpu
    batch, context, dtype = case["batch"], case["context"], DTYPES[case["dtype"]]
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q = draw(batch, HEADS, DIM).to(dtype)
    k, v = (draw(batch, context, KEY_HEADS, DIM).to(dtype) for _ in range(2))
    size = 2 * k.numel() * dtype.itemsize
    layers = max(1, math.ceil(COLD / size))
    ends = torch.arange(batch + 1, dtype=torch.int32), torch.full((batch,), context, dtype=torch.int32)
    scale = DIM**-0.5

    if contender in ("contiguous", "tokens"):
        near = (lambda x: x.transpose(1, 2).contiguous()) if contender == "contiguous" else lambda x: x.transpose(1, 2)
        sets = itertools.cycle([(near(k.clone()), near(v.clone())) for _ in range(layers)])

        def run() -> torch.Tensor:
            return ops.flash_attention(q.unsqueeze(2), *next(sets), scale=scale, causal="bottom_right").squeeze(2)

    elif contender == "append":
        pools = itertools.cycle([(k.clone(), v.clone()) for _ in range(layers)])
        slots = torch.arange(1, batch + 1) * context - 1
        new = k[:, -1].clone(), v[:, -1].clone()

        def run() -> torch.Tensor:
            pool = next(pools)
            ops.kv_write(*new, *pool, slots)
            return pool[0][:, -1]

    else:
        options: dict[str, torch.Tensor] = {}
        where = torch.Generator().manual_seed(1)
        if contender == "static":
            table = torch.arange(batch, dtype=torch.int32).unsqueeze(1)
            caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
        else:
            pages = PAGES.get(contender, 16)
            state = where.get_state()
            caches = []
            for x in (k, v):
                where.set_state(state)
                cache, table = _paged(x, pages, where)
                caches.append(cache)
        if contender == "int8":
            for i, name in enumerate("kv"):
                wide = caches[i].float()
                options[f"{name}_scale"] = wide.abs().amax(-1) / 127
                caches[i] = torch.round(wide / options[f"{name}_scale"].unsqueeze(-1)).to(torch.int8)
        sets = itertools.cycle([tuple(c.clone() for c in caches) for _ in range(layers)])

        def run() -> torch.Tensor:
            return ops.paged_attention(q, *next(sets), table, *ends, scale=scale, **options)

    return Prepared(run, work={"bytes": size, "flops": 4.0 * batch * HEADS * context * DIM})


def check(row: h.Row) -> None:
    """``append`` computes something else, and int8 rounds: it may be as far off as a cache in 8 bits is."""
    off = {c: t.difference for c, t in row.timings.items() if c != "append" and not t.error}
    allowed = h.TOLERANCE[row.case["dtype"]]
    row.agreed = all(d <= (0.05 if c == "int8" else allowed) for c, d in off.items()) and len(off) > 1


def _line(row: h.Row) -> list[str]:
    t = row.timings
    cells = [label(row.case), f"{1e3 * t['contiguous'].median:.3f}"]
    cells += [f"{1 / row.ratio('contiguous', c):.2f}x" if t[c].rounds else "failed" for c in COMPARED]
    cells += [f"{1e6 * t['append'].median:.1f}", f"{t['append'].median / t['page 16'].median:.1%}"]
    noisy = any(x.dirty for x in t.values())
    return [
        *cells,
        f"{row.reached('page 16'):.0%}",
        "results differ" if not row.agreed else "noisy" if noisy else "yes",
    ]


HEAD = ("time of", "contiguous, ms", *COMPARED, "append, us", "of page 16", "floor", "clean")


def summary(rows: list[h.Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and goals of the RESULT line: how many times the contiguous kernel's time pages take."""
    timed = [r for r in rows if all(r.timings[c].rounds for c in ("contiguous", *JUDGED, "int8", "append"))]
    ratios = [1 / r.ratio("contiguous", c) for r in timed for c in JUDGED]
    values = {
        "paged": h.geomean(ratios),
        "paged_worst": max(ratios, default=math.nan),
        "static": h.geomean([1 / r.ratio("contiguous", "static") for r in timed]),
        "page_1": h.geomean([1 / r.ratio("contiguous", "page 1") for r in timed]),
        "int8": h.geomean([1 / r.ratio("contiguous", "int8") for r in timed]),
        "append_share": max(
            (r.timings["append"].median / r.timings["page 16"].median for r in timed), default=math.nan
        ),
        "agreed": f"{sum(r.agreed for r in rows)}/{len(rows)}",
        "clean": f"{sum(r.clean for r in rows)}/{len(rows)}",
    }
    return values, {"paged": GOAL, "paged_worst": GOAL}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--only", metavar="REGEX", default="", help="rows whose name matches, such as 'batch 16.*bf'"
        )
        parser.add_argument("--rounds", type=int, default=3, help="timed rounds per row")

    args = h.arguments(__doc__, more)
    cases = [c for c in (QUICK if args.quick else CASES) if re.search(args.only, label(c))]
    machine = _machine.measure(h.THREADS)
    h.say(h.describe(machine))
    bench = h.Bench("paged", CONTENDERS, rounds=1 if args.quick else args.rounds, machine=machine)
    rows: list[h.Row] = []
    with bench.processes() as running:
        for case in cases:
            row = bench.row(case, running)
            check(row)
            rows.append(row)
            h.say("  ".join(_line(row)))
            for name, t in row.timings.items():
                if t.error:
                    h.say(f"  {name} failed: {t.error}")
    h.say()
    h.say(h.table(HEAD, [_line(r) for r in rows]))
    h.result("paged", *summary(rows), args.json, machine=machine, rows=[r.to_dict() for r in rows])


if __name__ == "__main__":
    main()
