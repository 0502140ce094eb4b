"""Planning problems whose optimum is known: a block of time x memory that is cut into buffers with nothing left over.

What fills the block completely cannot be planned in less than its height. ``trim`` then shortens lifetimes that do not
touch one column, which keeps the optimum (the column stays full) and makes the rest look like a real program.
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
        trim: share of the buffers whose lifetime is shortened.
        even: cuts in the middle (0.5) or anywhere (0).
    """

    times: int = 1000
    units: int = 1024
    unit: int = 1024
    across: float = 0.5
    wheel: float = 0.0
    long: int = 0
    trim: float = 0.0
    even: float = 0.1


FAMILIES = {
    "guillotine": Family(),
    "pinwheel": Family(wheel=0.6),
    "overlap": Family(across=0.65, wheel=0.3, trim=0.5),
    "tall": Family(across=0.35, units=4096, wheel=0.2, trim=0.3),
    "long": Family(long=24, wheel=0.3, trim=0.4),
    "aligned": Family(times=240, units=64, unit=16384, wheel=0.3, trim=0.4),
    "greedy": Family(across=0.55, even=0.35, wheel=0.5, trim=0.25),
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
    if how.trim:
        boxes = _trimmed(boxes, how, rng)
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


def _trimmed(boxes: list[Box], how: Family, rng: random.Random) -> list[Box]:
    """Some lifetimes shortened, none of them in the one column that stays full."""
    column = rng.randrange(how.times)
    out = []
    for s, e, b, t in boxes:
        if rng.random() < how.trim and e - s > 1 and not s <= column < e:
            cut = rng.randint(1, max(1, (e - s) // 3))
            s, e = (s + cut, e) if rng.random() < 0.5 else (s, e - cut)
        out.append((s, e, b, t))
    return out
