"""Measuring what a graph really allocates, by means that share nothing with the planner's liveness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree


def traced(fn: Callable[..., Any], *args: Any, symbolic: bool = False) -> fx.GraphModule:
    """``fn`` as an ATen graph with fake values; in-place operators stay."""
    return make_fx(fn, tracing_mode="symbolic" if symbolic else "fake", _allow_non_fake_inputs=True)(*args)


class Measured(fx.Interpreter):
    """Runs a graph on real tensors and weighs, after each call, the storages that its values hold."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.peak = 0
        self.held: set[int] = set()

    def weigh(self, *args: Any) -> int:
        """The peak of bytes in storages that did not exist before the call."""
        constants = [t for _, t in self.module.named_buffers()]
        self.held = {t.untyped_storage().data_ptr() for t in [*args, *constants] if isinstance(t, torch.Tensor)}
        self.run(*args)
        return self.peak

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        used = [value for node, value in self.env.items() if node.users]  # generated code drops the others at once
        tensors = [t for t in pytree.tree_leaves([*used, result]) if isinstance(t, torch.Tensor)]
        live = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.peak = max(self.peak, sum(b for address, b in live.items() if address not in self.held))
        return result


def allocated_peak(run: Callable[..., Any], *args: Any) -> int:
    """The peak of bytes that torch's CPU allocator handed out during ``run``, temporaries inside kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        output = run(*args)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del output
    return peak


def sweep(lives: Sequence[tuple[int, int, int]]) -> int:
    """The peak of (start, end, bytes), step by step."""
    steps = range(max((end for _, end, _ in lives), default=0))
    return max((sum(b for s, e, b in lives if s <= t < e) for t in steps), default=0)
