"""What one decode step does to the memory of its cache, as the process really did it, and where its time goes.

Nothing is taken from the graph here: allocations come from torch's profiler, which sees every tensor that any kernel,
compiled or not, asks the allocator for; writes from comparing the cache before and after.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEP = "one step"  # the range around all of a traced call
APPEND = "kv append"  # the range that eager contenders put around Cache.update
APPENDS = re.compile(rf"^{APPEND}$|kv_write|kv_append|kv_reserve|index_copy|index_put|slice_scatter")
ATTENTION = re.compile(r"scaled_dot_product|flash_attention|paged_attention|mla_attention|ascend_cpu::attention|decode")


@dataclass(frozen=True)
class Trace:
    """Of one call: every event of the profiler (microseconds), and the sizes of the tensors that were allocated."""

    events: tuple[tuple[str, float, float], ...]  # name, start, duration
    allocations: tuple[int, ...]

    def seconds(self, names: re.Pattern[str]) -> float:
        """Time inside events with such a name; what is nested in one that counts already is not counted again."""
        end = total = 0.0
        for name, start, duration in sorted(self.events, key=lambda e: (e[1], -e[2])):
            if start >= end and names.search(name):
                total, end = total + duration, start + duration
        return 1e-6 * total

    def share(self, names: re.Pattern[str]) -> float:
        """The part of the call's own time that is inside such events."""
        return self.seconds(names) / self.seconds(re.compile(STEP))

    def copied(self, at_least: int) -> int:
        """Bytes in allocations of at least so many bytes."""
        return sum(a for a in self.allocations if a >= at_least)


def trace(call: Callable[[], Any]) -> Trace:
    """Run ``call`` once under torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
    with profiler, torch.profiler.record_function(STEP):
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return parse(json.loads(path.read_text())["traceEvents"])


def parse(events: Sequence[dict[str, Any]]) -> Trace:
    """The events of a Chrome trace."""
    spans = tuple((e["name"], e["ts"], e["dur"]) for e in events if e.get("ph") == "X" and "dur" in e)
    memory = (int(e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return Trace(spans, tuple(b for b in memory if b > 0))


@contextlib.contextmanager
def marked(cache: Any) -> Iterator[None]:
    """Put a profiler range around what the cache's ``update`` does (for eager contenders)."""
    update = cache.update

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(APPEND):
            return update(*args, **kwargs)

    cache.update = ranged
    try:
        yield
    finally:
        del cache.update


@dataclass(frozen=True)
class Writes:
    """What one call changed in a list of buffers."""

    moved: int  # buffers whose address is another
    changed: int  # bytes of those that stayed that differ


def writes(call: Callable[[], Any], tensors: Callable[[], Sequence[Tensor]]) -> Writes:
    """Run ``call`` once and compare the buffers before and after. Needs as much memory again."""
    before = list(tensors())
    held = [(t.data_ptr(), t.clone()) for t in before]
    call()
    after = list(tensors())
    moved = changed = 0
    for (address, old), new in zip(held, after, strict=True):
        if new.data_ptr() != address or new.shape != old.shape:
            moved += 1
        else:
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[new.element_size()]
            changed += int((new.view(bits) != old.view(bits)).any(-1).sum()) * new.shape[-1] * new.element_size()
    return Writes(moved, changed)
