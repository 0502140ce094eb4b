"""The memory timeline of one graph: lifetimes as rectangles at their offsets over program order, as SVG.

Time runs to the right, one step per call; addresses run upwards. Outputs, which the arena does not hold, are stacked
above it. ``rectangles`` is the layout, which the PNG form (``timeline_png.py``) shares.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from ascend_dynamo.memory.record import MemoryBlock, MemoryRecord
from ascend_dynamo.memory.units import show_bytes

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 960, 360, 74, 34, 22, 12  # of the SVG, in pixels
Kind = Literal["arena", "output"]


@dataclass(frozen=True)
class Rectangle:
    """A block's place: steps ``left..right``, bytes ``low..high``."""

    left: int
    right: int
    low: int
    high: int
    kind: Kind
    block: MemoryBlock


def rectangles(record: MemoryRecord) -> list[Rectangle]:
    """Every block that takes memory: those of the arena at their offsets, outputs above it in the order of their birth.

    Blocks on another device than the arena's have no place and are left out.
    """
    found = []
    top = record.arena
    for b in record.blocks:
        if b.bytes == 0:
            continue
        if b.offset is not None:
            found.append(Rectangle(b.start, b.end, b.offset, b.offset + b.bytes, "arena", b))
        elif b.output:
            found.append(Rectangle(b.start, b.end, top, top + b.bytes, "output", b))
            top += b.bytes
    return found


def live_bytes(record: MemoryRecord) -> list[tuple[int, int]]:
    """(step, bytes live from then on), outputs included, at every step where that changes."""
    change: dict[int, int] = {}
    for r in rectangles(record):
        change[r.left] = change.get(r.left, 0) + r.block.bytes
        change[r.right] = change.get(r.right, 0) - r.block.bytes
    curve, now = [], 0
    for step in sorted(change):
        now += change[step]
        curve.append((step, now))
    return curve


def hue(op: str) -> int:
    """A colour (degrees) per operator, the same in every report."""
    return zlib.crc32(op.encode()) % 360


def label(b: MemoryBlock) -> str:
    """``aten.mm.default %mm, 1.50 MB, model.py:88`` in one line."""
    where = f", {os.path.basename(b.src[0])}:{b.src[1]}" if b.src else ""
    return f"{b.op} %{b.id}, {show_bytes(b.bytes)}{where}"


def caption(record: MemoryRecord) -> str:
    """What the figure shows, in one line of numbers."""
    over = f"{record.arena / record.lower_bound - 1:+.1%} of the bound" if record.lower_bound else "nothing to plan"
    source = "" if record.exact else ", an upper bound"
    source += f"; without what depends on data ({', '.join(record.unknown)})" if record.unknown else ""
    return (
        f"arena {show_bytes(record.arena)} ({over}), peak with outputs {show_bytes(record.peak)} at step {record.step} "
        f"of {record.steps}, from {_SOURCES.get(record.source, record.source)}{source}"
    )


_SOURCES = {"inductor": "the program after fusion", "fx": "the graph, op by op"}


def svg(record: MemoryRecord) -> str:
    """The figure as one ``<svg>`` element without external resources; blocks tell about themselves under the mouse."""
    placed = rectangles(record)
    high = max([record.arena, *(r.high for r in placed), 1])
    steps = max(record.steps, 1)
    scale = _Scale(steps, high)
    parts = [
        f'<svg class="memory" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11" fill="currentColor" '
        f'style="width:100%;max-width:{WIDTH}px"><title>{escape(caption(record))}</title>',
        *(_rect(scale, r) for r in placed),
        _arena_line(scale, record),
        *(_tick(scale, n) for n in ticks(high)),
        _curve(scale, live_bytes(record)),
        _peak(scale, record),
        f'<text x="{(LEFT + WIDTH - RIGHT) // 2}" y="{HEIGHT - 4}" text-anchor="middle">program order: {steps} steps'
        "</text></svg>",
    ]
    return "".join(parts)


class _Scale:
    def __init__(self, steps: int, high: int) -> None:
        self.dx = (WIDTH - LEFT - RIGHT) / steps
        self.dy = (HEIGHT - TOP - BOTTOM) / high

    def x(self, step: float) -> str:
        return f"{LEFT + step * self.dx:.1f}"

    def y(self, size: float) -> str:
        return f"{HEIGHT - BOTTOM - size * self.dy:.1f}"


def _rect(s: _Scale, r: Rectangle) -> str:
    width, height = (r.right - r.left) * s.dx, (r.high - r.low) * s.dy
    dash = ' stroke-dasharray="3 2" fill-opacity="0.35"' if r.kind == "output" else ""
    return (
        f'<rect x="{s.x(r.left)}" y="{s.y(r.high)}" width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}" '
        f'fill="hsl({hue(r.block.op)} 55% 58%)" stroke="hsl({hue(r.block.op)} 55% 35%)" stroke-width="0.5"{dash}>'
        f"<title>{escape(label(r.block))}, steps {r.left} to {r.right - 1}</title></rect>"
    )


def _arena_line(s: _Scale, record: MemoryRecord) -> str:
    y = s.y(record.arena)
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" stroke-dasharray="6 3"/>'
        f'<text x="{WIDTH - RIGHT}" y="{float(y) - 4:.1f}" text-anchor="end">arena {show_bytes(record.arena)}</text>'
    )


def _curve(s: _Scale, curve: Sequence[tuple[int, int]]) -> str:
    points, last = [], 0
    for step, size in curve:
        points += [f"{s.x(step)},{s.y(last)}", f"{s.x(step)},{s.y(size)}"]
        last = size
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="currentColor" stroke-width="1.2"/>'


def _peak(s: _Scale, record: MemoryRecord) -> str:
    x, y = s.x(record.step + 0.5), s.y(record.peak)
    return (
        f'<line class="peak" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#d22" stroke-dasharray="2 2"/>'
        f'<circle cx="{x}" cy="{y}" r="3" fill="#d22"/>'
        f'<text x="{x}" y="{TOP - 8}" text-anchor="middle" fill="#d22">peak {show_bytes(record.peak)}</text>'
    )


def _tick(s: _Scale, size: int) -> str:
    return f'<text x="{LEFT - 6}" y="{float(s.y(size)) + 4:.1f}" text-anchor="end">{show_bytes(size)}</text>'


def ticks(high: int) -> list[int]:
    """Five to ten round sizes (a power of two apart) from 0 to ``high``."""
    step = 1 << max(0, (high // 5).bit_length() - 1)
    return list(range(0, high + 1, step))
