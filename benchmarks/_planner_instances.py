"""Planning problems whose optimum is known: a block of time x memory that is cut into buffers with nothing left over.

What fills the block completely cannot be planned in less than its height.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ascend_dynamo.memory import Buffer

SIZES = (150, 200, 300, 400, 500)


@dataclass(frozen=True)
class Family:
    """How a block is cut.

    Attributes:
        times: width of the block; few times mean that many buffers start and end together.
        units: height of the block, in units of ``unit`` bytes.
        across: how often a cut separates memory rather than time.
        wheel: how often five pieces are cut as a pinwheel, which no sequence of straight cuts can make.
        long: buffers that live as long as the block, laid on the bottom before anything is cut.
        even: how far cuts stay away from the edges: 0.5 is the middle.
    """

    times: int = 20_000
    units: int = 8192
    unit: int = 256
    across: float = 0.5
    wheel: float = 0.0
    long: int = 0
    even: float = 0.1


FAMILIES = {
    "guillotine": Family(),
    "pinwheel": Family(wheel=0.5),
    "overlap": Family(across=0.6),
    "tall": Family(across=0.3, wheel=0.2),
    "long": Family(across=0.4, long=4),
    "aligned": Family(times=5000, units=256, unit=4096, across=0.45, wheel=0.1),
    "greedy": Family(even=0.3, wheel=0.3),
}

Box = tuple[int, int, int, int]  # start, end, bottom, top


def instance(family: str, count: int, seed: int) -> tuple[list[Buffer], int]:
    """``count`` buffers, shuffled, and the capacity in which they just fit."""
    how, rng = FAMILIES[family], random.Random(f"{family} {count} {seed}")
    boxes: list[Box] = [(0, how.times, i, i + 1) for i in range(how.long)]
    whole: list[Box] = [(0, how.times, how.long, how.units)]
    for _ in range(200 * count):
        if len(boxes) + len(whole) >= count:
            break
        at = rng.choices(range(len(whole)), [(e - s) * (t - b) for s, e, b, t in whole])[0]
        room = count - len(boxes) - len(whole) + 1
        pieces = _cut(whole[at], how, rng, room)
        whole[at : at + 1] = pieces
    boxes += whole
    assert len(boxes) == count, f"{family}: only {len(boxes)} of {count} buffers could be cut"
    rng.shuffle(boxes)
    return [Buffer(f"b{i}", s, e, (t - b) * how.unit) for i, (s, e, b, t) in enumerate(boxes)], how.units * how.unit


def _cut(box: Box, how: Family, rng: random.Random, room: int) -> list[Box]:
    s, e, b, t = box
    if room >= 5 and e - s >= 3 and t - b >= 3 and rng.random() < how.wheel:
        s1, e1 = sorted(rng.sample(range(s + 1, e), 2))
        b1, t1 = sorted(rng.sample(range(b + 1, t), 2))
        wheel = [(s, e1, b, b1), (e1, e, b, t1), (s1, e, t1, t), (s, s1, b1, t), (s1, e1, b1, t1)]
        if rng.random() < 0.5:  # turning the other way
            wheel = [(s + e - y, s + e - x, lo, hi) for x, y, lo, hi in wheel]
        return wheel
    memory = rng.random() < how.across
    low, high = (b, t) if memory else (s, e)
    margin = max(1, int((high - low) * how.even))
    if high - low < 2 * margin or room < 2:
        return [box]
    at = rng.randint(low + margin, high - margin)
    return [(s, e, b, at), (s, e, at, t)] if memory else [(s, at, b, t), (at, e, b, t)]
