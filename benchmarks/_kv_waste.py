"""How much of the memory that uneven requests take holds tokens: pages against padded rows. No model runs."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ascend_dynamo.runtime.kv import ABSENT, BlockPool

REQUESTS, RUNNING = 256, 16


@dataclass(frozen=True)
class Request:
    """Tokens that come, tokens that are made."""

    prompt: int
    new: int


@dataclass(frozen=True)
class Waste:
    """Of one run. ``factor``: token slots taken / tokens stored, summed over all steps."""

    factor: float
    worst: int = 0  # most slots that one sequence had taken and not filled
    orphans: int = 0  # most pages that were neither to be had nor in any sequence's table
    left: int = 0  # pages still held at the end


def requests(count: int = REQUESTS, seed: int = 0) -> list[Request]:
    """Uneven ones: lengths are log-normal, prompts of 16 to 2048 tokens, answers of 1 to 256."""
    draw = random.Random(seed)

    def length(median: float, spread: float, most: int, least: int) -> int:
        return max(least, min(most, round(median * draw.lognormvariate(0.0, spread))))

    return [Request(length(128, 0.7, 2048, 16), length(24, 0.3, 256, 1)) for _ in range(count)]


def padded(queue: Sequence[Request], running: int = RUNNING) -> Waste:
    """Batches in order; each row is as long as the batch's longest prompt and answer, until the last one is done."""
    taken = stored = 0
    for start in range(0, len(queue), running):
        batch = queue[start : start + running]
        steps = max(r.new for r in batch)
        taken += steps * len(batch) * (max(r.prompt for r in batch) + steps)
        stored += sum(r.prompt + step + 1 for r in batch for step in range(r.new))
    return Waste(taken / stored)


def paged(queue: Sequence[Request], page_size: int, running: int = RUNNING) -> Waste:
    """Continuous batching over a block pool: a request enters when one leaves, a token per step and sequence.

    Counts for itself what the pool holds: the pages in the tables of the sequences, against those that are to be had.
    """
    longest = sorted((r.prompt + r.new for r in queue), reverse=True)[:running]
    pool = BlockPool(sum(-(-n // page_size) for n in longest), page_size)
    waiting = deque(queue)
    left: dict[int, int] = {}
    taken = stored = worst = orphans = 0
    while waiting or left:
        while waiting and len(left) < running:
            request = waiting.popleft()
            sequence = pool.open().sequence
            pool.append(sequence, request.prompt)
            left[sequence] = request.new
        pool.append_all(dict.fromkeys(left, 1))
        held: set[int] = set()
        for sequence in left:
            pages = [p for p in pool.table(sequence) if p != ABSENT]
            held.update(pages)
            slots, tokens = len(pages) * page_size, pool.length(sequence)
            worst = max(worst, slots - tokens)
            taken, stored = taken + slots, stored + tokens
        orphans = max(orphans, pool.pages.total - len(held) - pool.pages.available)
        done = [s for s, n in left.items() if n == 1]
        pool.free(*done)
        left = {s: n - 1 for s, n in left.items() if n > 1}
    return Waste(taken / stored, worst, orphans, pool.pages.total - pool.pages.available)
