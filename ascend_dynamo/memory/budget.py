"""Weights, KV cache, activations and workspace in one budget: whether a gear fits in N GB, and what would fit."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ascend_dynamo.errors import MemoryPlanError
from ascend_dynamo.memory.gear import Fit, Gear, Needed
from ascend_dynamo.memory.limit import needed_bytes
from ascend_dynamo.memory.record import MemoryRecord
from ascend_dynamo.memory.units import parse_bytes, show_bytes

if TYPE_CHECKING:
    from ascend_dynamo.runtime.kv.layer_kinds import LayerKind


@dataclass(frozen=True)
class MemoryBudget:
    """What a model takes, by gear.

    Args:
        weights: bytes that are there before any step.
        layers: what each layer keeps per token (``layer_kinds(config)``); none: no KV cache.
        activations: bytes of intermediates and outputs of one step, a number or a function of the gear.
        kv_dtype: of the pages; torch.int8 adds two float32 scales per token and head.
        page_size: tokens per page.
        workspace: bytes beside the activations (what a runtime keeps for itself).
    """

    weights: int
    layers: tuple[LayerKind, ...] = ()
    activations: int | Callable[[Gear], int] = 0
    kv_dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    workspace: int = 0

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise MemoryPlanError(f"page_size is {self.page_size}: a page holds at least one token")

    @classmethod
    def of(cls, record: MemoryRecord, example: Gear, config: Any = None, **more: Any) -> MemoryBudget:
        """From the record of a compiled graph (``forecast`` makes one without running anything).

        ``example`` says which gear the graph was compiled with: its symbolic sizes are told apart by their values
        there (a graph compiled without a cache has its chunk as its only length). ``config`` is the transformers
        configuration that tells the KV cache; what the graph was passed as a cache is not counted again. Where a call
        was recorded, what its kernels allocated beyond the prediction becomes the ``workspace``.
        """
        kinds: Sequence[LayerKind] = ()
        if config is not None:
            from ascend_dynamo.runtime.kv.layer_kinds import layer_kinds

            kinds = layer_kinds(config)
            more.setdefault("kv_dtype", getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32)
        if record.recorded is not None:
            more.setdefault("workspace", max(0, record.recorded - record.lower_bound))
        return cls(record.weights + record.derived, tuple(kinds), _Activations(record, example), **more)

    def page_bytes(self) -> int:
        """One page of every layer, keys and values (and scales)."""
        return self.page_size * sum(self._token(kind) for kind in self.layers)

    def kv_bytes(self, gear: Gear) -> int:
        """The pages that the gear's sequences hold during the step; a sliding layer keeps only its window's."""
        return gear.batch * sum(self._pages(kind, gear) * self.page_size * self._token(kind) for kind in self.layers)

    def needed(self, gear: Gear) -> Needed:
        """What a step of this gear takes, part by part."""
        activations = self.activations(gear) if callable(self.activations) else self.activations
        return Needed(self.weights, self.kv_bytes(gear), activations, self.workspace)

    def fits(self, memory: int | str, gear: Gear) -> Fit:
        """Whether a step of this gear fits in ``memory`` (bytes or "8GB"), and what to change if it does not."""
        limit = parse_bytes(memory)
        needed = self.needed(gear)
        advice = () if needed.total <= limit else tuple(self._advice(limit, gear, needed))
        return Fit(gear, limit, needed, advice)

    def pages(self, memory: int | str, gear: Gear) -> int:
        """How many pages (of every layer) fit beside weights, activations and workspace."""
        needed = self.needed(gear)
        room = parse_bytes(memory) - needed.total + needed.kv
        return max(0, room // self.page_bytes()) if self.layers else 0

    def _latent(self) -> bool:
        """Latent attention has no int8 pages: latents and rotary keys share one row."""
        return any(kind.k_width != kind.v_width and kind.heads == 1 for kind in self.layers)

    def _token(self, kind: LayerKind) -> int:
        return kind.bytes_per_token(self.kv_dtype.itemsize, self.kv_dtype is torch.int8)

    def _pages(self, kind: LayerKind, gear: Gear) -> int:
        whole = -(-gear.kv_length // self.page_size)
        if kind.window is None:
            return whole
        return whole - max(gear.kv_length - gear.chunk - kind.window + 1, 0) // self.page_size

    def _advice(self, limit: int, gear: Gear, needed: Needed) -> list[str]:
        fixed = needed.weights + needed.workspace
        if fixed >= limit:
            return [f"weights and workspace alone take {show_bytes(fixed)}: more memory, or weights in fewer bits"]
        found = []
        pages = self.pages(limit, gear)
        if pages:
            tokens = pages * self.page_size
            found.append(
                f"a pool of {pages} pages of {self.page_size} fits: {tokens} tokens in all, where this gear asks for "
                f"{gear.batch * gear.kv_length}"
            )
        for name, words in (("batch", "sequences"), ("chunk", "new tokens a step"), ("kv_length", "tokens of context")):
            best = self._largest(limit, gear, name)
            if best:
                found.append(f"at most {best} {words} instead of {getattr(gear, name)}")
        if self.layers and self.kv_dtype is not torch.int8 and not self._latent():
            found.append(self._int8(limit, gear))
        if not found:
            least = self.needed(Gear())
            found.append(f"no single change is enough: one sequence of one token takes {show_bytes(least.total)}")
        return found

    def _int8(self, limit: int, gear: Gear) -> str:
        small = replace(self, kv_dtype=torch.int8)
        total = small.needed(gear).total
        pages = small.pages(limit, gear)
        verdict = (
            "which fits" if total <= limit else f"not enough by itself, for there is room for {pages} of its pages"
        )
        return f"int8 pages: {show_bytes(total)} in all, {verdict}"

    def _largest(self, limit: int, gear: Gear, name: str) -> int:
        """The largest value below the gear's with which it fits, 0 if none; every part grows with each of them."""

        def total(n: int) -> int:
            return self.needed(replace(gear, **{name: n})).total

        low, high = gear.chunk if name == "kv_length" else 1, getattr(gear, name)
        if low >= high or total(low) > limit:
            return 0
        return low - 1 + bisect.bisect_right(range(low, high), limit, key=total)


class _Activations:
    """Intermediates and outputs of a compiled graph as a function of the gear: its symbols, told apart by value."""

    def __init__(self, record: MemoryRecord, example: Gear) -> None:
        self.found = record.lifetimes()
        self.values = {s.name: s.hint for s in self.found.symbols}
        self.roles = _roles(example)
        self.known: dict[tuple[int, ...], int] = {}
        for value in set(self.roles.values()) & set(self.values.values()):
            twins = [r for r, v in self.roles.items() if v == value]
            if len(twins) > 1 and twins != ["chunk", "kv_length"]:  # the same where a prompt starts
                raise MemoryPlanError(f"the example gear has {value} as {' and '.join(twins)}: give each its own value")

    def __call__(self, gear: Gear) -> int:
        wanted = _roles(gear)
        for role in ("batch", "chunk"):
            if wanted[role] != self.roles[role] and self.roles[role] not in self.values.values():
                raise MemoryPlanError(
                    f"{role} is fixed at {self.roles[role]} in the compiled graph, so {wanted[role]} cannot be "
                    "predicted: compile with dynamic=True and an example size above 1"
                )
        by_value = {value: role for role, value in reversed(self.roles.items())}
        sizes = {s: wanted[by_value[v]] if v in by_value else v for s, v in self.values.items() if v is not None}
        key = tuple(sizes.values())
        if key not in self.known:
            self.known[key] = needed_bytes(self.found, sizes)
        return self.known[key]


def _roles(gear: Gear) -> dict[str, int]:
    return {
        "batch": gear.batch,
        "chunk": gear.chunk,
        "kv_length": gear.kv_length,
        "past": gear.kv_length - gear.chunk,
    }
