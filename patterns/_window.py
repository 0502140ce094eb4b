"""Windows on the last axis: the normal form merges slices of slices, so parts are compared by where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, Facts

from ._calls import arguments, aten, is_call, rank


@dataclass(frozen=True)
class Window:
    """Elements ``start, start + step, ...`` (``count`` of them) of the last axis of ``source``."""

    source: fx.Node
    start: int
    count: int
    step: int = 1

    def __str__(self) -> str:
        every = f":{self.step}" if self.step != 1 else ""
        return f"%{self.source.name}[..., {self.start}:{self.start + self.count * self.step}{every}]"


def window(facts: Facts, n: Any) -> Window | None:
    """``n`` as a window on what it is sliced from (on itself if it is no slice); None if its size is not a number."""
    if not isinstance(n, fx.Node) or not hasattr(facts.val(n), "shape") or rank(facts, n) == 0:
        return None
    count = facts.val(n).shape[-1]
    if not isinstance(count, int):
        return None
    if is_call(n, aten.slice.Tensor):
        call = arguments(n)
        source, start, step = call["self"], call["start"], call["step"]
        if call["dim"] in (-1, rank(facts, source) - 1) and isinstance(start, int) and isinstance(step, int):
            outer = window(facts, source)
            if outer is not None:
                return Window(outer.source, outer.start + start * outer.step, count, step * outer.step)
    return Window(n, 0, count)


def joined(first: Window | None, second: Window | None) -> Window | None:
    """The window of which ``first`` and ``second`` are the two halves, else None."""
    if first is None or second is None or first.source is not second.source:
        return None
    same = first.count == second.count and first.step == second.step
    if not same or second.start != first.start + first.count * first.step:
        return None
    return Window(first.source, first.start, 2 * first.count, first.step)


def woven(first: Window | None, second: Window | None) -> Window | None:
    """The window of which ``first`` holds the even and ``second`` the odd elements, else None."""
    if first is None or second is None or first.source is not second.source:
        return None
    same = first.count == second.count and first.step == second.step and first.step % 2 == 0
    if not same or second.start != first.start + first.step // 2:
        return None
    return Window(first.source, first.start, 2 * first.count, first.step // 2)


def emit_window(b: Builder, w: Window) -> fx.Node:
    """The window as a node: its source itself, or a slice of it."""
    shape = w.source.meta["val"].shape
    if w.start == 0 and w.step == 1 and w.count == shape[-1]:
        return w.source
    end = w.start + (w.count - 1) * w.step + 1
    return b.op(aten.slice.Tensor, w.source, len(shape) - 1, w.start, end, w.step)
