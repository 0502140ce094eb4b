"""The long-sequence batch: four requests of 1k, 4k, 16k and 32k tokens, padded to the longest or packed into pages.

    python _kv_long.py WAY FOLDER LENGTH...      one way in this process; it writes FOLDER/WAY.pt

``padded`` is Hugging Face's StaticCache with left padding, as ``generate`` does it; ``alone`` runs the requests one by
one, ``exact`` too, in float32; ``paged`` is ours, all tokens packed. All prefill in chunks of the same number of tokens
per sequence, so that no way pays for a mask of all pairs of tokens. Then some tokens are decoded: every way is given
the tokens that ``exact`` chose, and says what it would have chosen.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness as h
import _kv_caches as caches
import _memory
import _models
import torch
from torch import Tensor

from ascend_dynamo import hf

MODEL, LAYERS = "tiny-qwen3", 2
CHUNK = 512  # tokens of each sequence that are prefilled at once
STEPS = 8
QUICK = 16  # --quick divides the lengths by this
PATIENCE = 900.0  # seconds for one way
TOLERANCE = h.TOLERANCE["bf16"]


@dataclass(frozen=True)
class Outcome:
    """Of one way: bytes at its highest above the loaded model, bytes of the cache, and the logits [steps, B, V]."""

    peak: float
    kv: int
    seconds: float
    logits: Tensor
    graphs: int = 0  # compiled before
    late: int = 0  # compiled meanwhile, which would count as memory of the run


def lengths(quick: bool) -> tuple[int, ...]:
    return tuple(n // (QUICK if quick else 1) for n in _models.LONG_SEQUENCES)


def prompts(model: Any, sizes: Sequence[int]) -> list[Tensor]:
    """One request each, [1, S]."""
    return [_models.token_ids(model.config.vocab_size, 1, n, seed=i) for i, n in enumerate(sizes)]


def alone(model: Any, requests: list[Tensor], forced: Tensor | None, sizes: Sequence[int]) -> Outcome:
    """Each request by itself, with a cache that grows. ``sizes`` are the lengths that there must be room for."""
    from transformers import DynamicCache

    rows, kv = [], 0
    for request in requests:
        cache = DynamicCache(config=model.config)
        for part in request.split(CHUNK, 1):
            out = model(part, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        seen = [out]
        for i in range(STEPS - 1):
            chosen = seen[-1].argmax(-1) if forced is None else forced[i, len(rows)][None]
            seen.append(model(chosen[:, None], past_key_values=cache).logits[:, -1])
        rows.append(torch.stack(seen))
        kv += caches.allocated(caches.buffers(cache))
    return Outcome(math.nan, kv, 0.0, torch.cat(rows, 1))


def padded(model: Any, requests: list[Tensor], forced: Tensor | None, sizes: Sequence[int]) -> Outcome:
    """All in one batch, each row as long as the longest request, padding on the left."""
    from transformers import StaticCache

    assert forced is not None
    longest, batch = max(r.shape[1] for r in requests), len(requests)
    ids = torch.zeros(batch, longest, dtype=torch.long)
    mask = torch.zeros(batch, longest + STEPS, dtype=torch.long)
    for row, request in enumerate(requests):
        ids[row, longest - request.shape[1] :] = request
        mask[row, longest - request.shape[1] :] = 1
    position = mask.cumsum(-1) - 1
    cache = StaticCache(config=model.config, max_cache_len=longest + STEPS)

    def step(part: Tensor, start: int) -> Tensor:
        end = start + part.shape[1]
        where = position[:, start:end].clamp_min(0)
        return model(
            part, attention_mask=mask[:, :end], position_ids=where, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]

    for start in range(0, longest, CHUNK):
        out = step(ids[:, start : start + CHUNK], start)
    seen = [out]
    for i in range(STEPS - 1):
        seen.append(step(forced[i][:, None], longest + i))
    return Outcome(math.nan, caches.allocated(caches.buffers(cache)), 0.0, torch.stack(seen))


def paged(model: Any, requests: list[Tensor], forced: Tensor | None, sizes: Sequence[int]) -> Outcome:
    """Ours: every step packs a chunk of each prompt that is not done, then a token of each, over one paged cache."""
    from ascend_dynamo.runtime.kv import PagedKVCache, PagedRequests

    assert forced is not None
    step = compiled(model)
    rooms = [-(-(n + STEPS) // caches.PAGE) * caches.PAGE for n in sizes]
    cache = PagedKVCache(model.config, max_tokens=sum(rooms), max_length=max(rooms), page_size=caches.PAGE)
    server = PagedRequests(cache)
    waiting = {server.open([]): request[0].tolist() for request in requests}
    order = list(waiting)
    first: dict[int, Tensor] = {}
    while waiting:
        batch = server.step({r: tokens[:CHUNK] for r, tokens in waiting.items()}, rows=len(order))
        logits = step(**batch.inputs()).logits[0]
        first |= {r: logits[i] for i, r in enumerate(waiting) if len(waiting[r]) <= CHUNK}
        waiting = {r: tokens[CHUNK:] for r, tokens in waiting.items() if len(tokens) > CHUNK}
    seen = [torch.stack([first[r] for r in order])]
    for i in range(STEPS - 1):
        batch = server.step({r: [int(t)] for r, t in zip(order, forced[i], strict=True)}, rows=len(order))
        seen.append(step(**batch.inputs()).logits[0])
    stored = caches.allocated(caches.buffers(cache))
    server.free(*order)
    return Outcome(math.nan, stored, 0.0, torch.stack(seen))


_compiled: dict[int, Any] = {}


def compiled(model: Any) -> Any:
    """The model for packed steps, through our backend, once."""
    if id(model) not in _compiled:
        hf.use_paged_attention(model)
        _compiled[id(model)] = torch.compile(model, backend="ascend_opt")
    return _compiled[id(model)]


WAYS = {"exact": alone, "alone": alone, "padded": padded, "paged": paged}


def serve(way: str, folder: Path, sizes: Sequence[int]) -> None:
    """Run one way here; the requests' beginnings first, so that what is made and compiled once is not counted."""
    model = _models.build(MODEL, layers=LAYERS, check=False)
    _models.assert_context_sensitive(model)
    run = WAYS[way]
    if way == "exact":
        model = model.float()
    forced = None if way == "exact" else torch.load(folder / "exact.pt")["logits"].argmax(-1)
    with torch.no_grad():
        short = [min(n, CHUNK + 100 * i) for i, n in enumerate(sizes)]
        for _ in range(2):
            run(model, prompts(model, short), None if forced is None else torch.full((STEPS, len(short)), 20), sizes)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        start = time.perf_counter()
        done, peak = _memory.peak_of(lambda: run(model, prompts(model, sizes), forced, sizes))
    seconds = time.perf_counter() - start
    late = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    result = {"peak": peak, "kv": done.kv, "seconds": seconds, "logits": done.logits.float()}
    torch.save({**result, "graphs": graphs, "late": late}, folder / f"{way}.pt")


def run_all(folder: Path, sizes: Sequence[int]) -> dict[str, Outcome]:
    """Every way in a process of its own, one after the other."""
    found = {}
    for way in WAYS:
        (folder / f"{way}.pt").unlink(missing_ok=True)
        command = [sys.executable, __file__, way, str(folder), *map(str, sizes)]
        log = folder / f"{way}.log"
        with log.open("w") as out:
            environment = h.clean_environment(h.THREADS)
            done = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=PATIENCE, check=False)
        if done.returncode:
            h.say(f"  {way}: failed: {log.read_text().strip().splitlines()[-1]}")
            continue
        found[way] = Outcome(**torch.load(folder / f"{way}.pt"))
    return found


def disagreements(got: Tensor, exact: Tensor, eager: Tensor) -> int:
    """Steps whose logits are outside the budget, or whose tokens differ by more than it explains.

    Logits [steps, B, V]. The budget, a part of the norm of a row, is twice what ``eager`` (the requests alone) is off
    at its worst; a token may differ where the right one leads by at most twice the largest difference of any logit.
    """
    budget = 2 * max(TOLERANCE, *(h.difference(a, b) for a, b in _rows(eager, exact)))
    margin = 2 * float((eager - exact).abs().max())
    wrong = 0
    for ours, truth in _rows(got, exact):
        lead = float(truth.max() - truth[ours.argmax()])
        wrong += lead > margin or h.difference(ours, truth) > budget
    return wrong


def _rows(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))


def report(quick: bool) -> dict[str, Any]:
    """Run all ways, print what they needed, and give the values for the RESULT line."""
    sizes = lengths(quick)
    scaled = f" (--quick: a {QUICK}th of the lengths)" if quick else ""
    h.say(f"\nlong sequences: {sizes} tokens in one batch{scaled}, {MODEL} of {LAYERS} layers, chunks of {CHUNK}")
    with tempfile.TemporaryDirectory(prefix="bench-kv-long-") as folder:
        found = run_all(Path(folder), sizes)
    for way, got in found.items():
        rest = f"{got.graphs} graphs compiled before, {got.late} meanwhile"
        h.say(f"  {way}: {got.peak / 1e6:.0f} MB at the peak, {got.kv / 1e6:.0f} MB of KV, {got.seconds:.1f} s, {rest}")
    if not {"exact", "alone", "padded", "paged"} <= found.keys():
        return {"long_saving": math.nan, "long_wrong_steps": "failed"}
    ours, theirs = found["paged"], found["padded"]
    wrong = sum(disagreements(x.logits, found["exact"].logits, found["alone"].logits) for x in (ours, theirs))
    return {
        "long_saving": 1 - ours.peak / theirs.peak,
        "long_kv_saving": 1 - ours.kv / theirs.kv,
        "long_wrong_steps": wrong,
        "long_graphs": ours.graphs,
    }


if __name__ == "__main__":
    torch.set_num_threads(h.THREADS)
    serve(sys.argv[1], Path(sys.argv[2]), [int(n) for n in sys.argv[3:]])
