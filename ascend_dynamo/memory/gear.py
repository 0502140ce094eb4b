"""A gear, the parts of what it needs, and the verdict whether it fits: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from ascend_dynamo.errors import MemoryLimitError, MemoryPlanError
from ascend_dynamo.memory.units import show_bytes


@dataclass(frozen=True)
class Gear:
    """One size of a step: ``batch`` sequences, each with ``chunk`` new tokens (1: decode) and ``kv_length`` tokens in
    the cache after the step."""

    batch: int = 1
    chunk: int = 1
    kv_length: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "chunk", "kv_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise MemoryPlanError(f"a gear's {name} is {value!r}: it must be a positive integer")
        if self.chunk > self.kv_length:
            raise MemoryPlanError(f"{self.chunk} new tokens end up in a cache of {self.kv_length}: too short for them")


@dataclass(frozen=True)
class Needed:
    """The bytes of each part."""

    weights: int
    kv: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.workspace

    def __str__(self) -> str:
        parts = ((name, getattr(self, name)) for name in ("weights", "kv", "activations", "workspace"))
        return ", ".join(f"{name} {show_bytes(size)}" for name, size in parts if size)


@dataclass(frozen=True)
class Fit:
    """Whether a gear fits: ``bool(fit)``; ``advice`` says what would, each figure computed for this model and gear."""

    gear: Gear
    limit: int
    needed: Needed
    advice: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.needed.total <= self.limit

    def __str__(self) -> str:
        g = self.gear
        what = f"batch {g.batch}, {g.chunk} new tokens, {g.kv_length} tokens each in the cache"
        verdict = "fits in" if self else "does not fit in"
        lines = [f"{what}: {show_bytes(self.needed.total)} {verdict} {show_bytes(self.limit)} ({self.needed})"]
        return "\n".join([*lines, *(f"  {a}" for a in self.advice)])

    def require(self) -> Fit:
        """Itself, if it fits.

        Raises:
            MemoryLimitError: it does not; the message is the whole report.
        """
        if not self:
            raise MemoryLimitError(str(self), needed=self.needed.total, limit=self.limit)
        return self
