"""The memory timeline as a picture: needs matplotlib (``pip install 'ascend-dynamo[report]'``)."""

from __future__ import annotations

import colorsys
import os
from pathlib import Path
from typing import Any

from ascend_dynamo.errors import MissingExtraError
from ascend_dynamo.memory.record import MemoryRecord
from ascend_dynamo.memory.timeline import caption, hue, live_bytes, rectangles, ticks
from ascend_dynamo.memory.units import show_bytes

ROWS = 10  # of the table


def write_png(record: MemoryRecord, path: str | Path, *, title: str = "", dpi: int = 120) -> Path:
    """Write the figure (lifetimes at their offsets, the peak) above a table of who is live at the peak.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(record, title)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=dpi, format="png")
    return target


def _figure(record: MemoryRecord, title: str) -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError as error:
        raise MissingExtraError(
            "the PNG of the memory timeline needs matplotlib: pip install 'ascend-dynamo[report]' (the HTML report has "
            "the same figure without it)"
        ) from error
    live = record.live()
    rows = live[:ROWS]
    figure = Figure(figsize=(12, 5.2 + 0.28 * (len(rows) + 1)), layout="constrained")
    plot, table = figure.subplots(2, 1, height_ratios=[5, 0.28 * (len(rows) + 1)])
    _draw(plot, record)
    plot.set_title(f"{title}\n{caption(record)}" if title else caption(record), fontsize=10)
    table.axis("off")
    if rows:
        cells = [[show_bytes(b.bytes), b.op, f"%{b.id}", _where(b.src)] for b in rows]
        head = ["size", "operator", "node", f"user's line ({len(rows)} of {len(live)} live at the peak)"]
        drawn = table.table(cells, colLabels=head, colWidths=[0.1, 0.35, 0.2, 0.35], cellLoc="left", loc="upper center")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)
    return figure


def _draw(plot: Any, record: MemoryRecord) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    for kind, alpha, style in (("arena", 0.9, "solid"), ("output", 0.35, "dashed")):
        chosen = [r for r in rectangles(record) if r.kind == kind]
        patches = [Rectangle((r.left, r.low), r.right - r.left, r.high - r.low) for r in chosen]
        colours = [colorsys.hls_to_rgb(hue(r.block.op) / 360, 0.58, 0.55) for r in chosen]
        plot.add_collection(
            PatchCollection(
                patches, facecolors=colours, edgecolors="0.25", linewidths=0.4, alpha=alpha, linestyles=style
            )
        )
    curve = live_bytes(record)
    if curve:
        plot.step(*zip(*curve, strict=True), where="post", color="black", linewidth=1.2, label="live bytes")
    high = max([record.arena, record.peak, *(r.high for r in rectangles(record)), 1])
    plot.axhline(record.arena, color="0.3", linestyle="--", linewidth=0.8, label=f"arena {show_bytes(record.arena)}")
    plot.axvline(record.step + 0.5, color="red", linestyle=":", linewidth=1, label=f"peak {show_bytes(record.peak)}")
    plot.plot([record.step + 0.5], [record.peak], "o", color="red", markersize=4)
    plot.set_xlim(0, max(record.steps, 1))
    plot.set_ylim(0, high * 1.05)
    plot.set_xlabel("program order (one step per call)")
    plot.set_yticks(ticks(high), [show_bytes(size) for size in ticks(high)])
    plot.legend(loc="upper right", fontsize=8)


def _where(src: tuple[str, int] | None) -> str:
    return f"{os.path.basename(src[0])}:{src[1]}" if src else "?"
