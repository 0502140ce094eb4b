"""What one compilation tells: plain, picklable records without live graph nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from ascend_dynamo.memory.record import MemoryRecord


@dataclass(frozen=True)
class Fired:
    """A rewrite that was committed. ``src`` is the user's (file, line); ``replaced`` counts the nodes taken out."""

    pattern: str
    anchor: str
    src: tuple[str, int] | None
    replaced: int
    assumes: tuple[str, ...] = ()
    region: str = ""
    emits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missed:
    """A near miss: a pattern that matched in part. ``progress`` is 0..1; ``reason`` is one sentence."""

    pattern: str
    anchor: str
    code: str
    reason: str
    progress: float
    src: tuple[str, int] | None = None
    fix: str = ""
    region: str = ""


@dataclass(frozen=True)
class Quarantined:
    """A pattern, pass or plugin that failed and was left out of this compilation."""

    pattern: str
    error: str
    site: str = ""


@dataclass(frozen=True)
class Lowered:
    """The lowering's decision for one dialect node: ``path`` is "kernel" or "reference"."""

    op: str
    node: str
    path: str
    reason: str = ""


@dataclass
class CompileRecord:
    """One compiled graph: its text before and after our passes, and everything that was decided. ``memory`` is what its
    run will take (None: the target cannot tell)."""

    index: int = 0
    target: str = ""
    before: str = ""
    after: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    fired: list[Fired] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    lowered: list[Lowered] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    training: bool = False
    kv_copies: list[str] = field(default_factory=list)
    """What of the final graph copies a cache (``passes/kv_copies.py``): empty if all is in place."""
    memory: MemoryRecord | None = None

    def count(self, pattern: str) -> int:
        """How often a pattern fired in this graph; the name of a dialect op counts every pattern that emits it."""
        return sum(f.pattern == pattern or f"ascend.{pattern}" in f.emits for f in self.fired)
