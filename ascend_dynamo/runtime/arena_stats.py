"""What arenas tell about themselves: plain numbers, all sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ascend_dynamo.memory import Buffer


@dataclass(frozen=True)
class Block:
    """An allocation of a recorded call. Times count allocations and frees; ``end`` is None if it outlived the call."""

    size: int
    start: int
    end: int | None


@dataclass(frozen=True)
class Recording:
    """All allocations of one call, in their order."""

    blocks: tuple[Block, ...]

    @property
    def buffers(self) -> list[Buffer]:
        """The blocks that live in the arena, named by their number: what is planned."""
        return [Buffer(str(i), b.start, b.end, b.size) for i, b in enumerate(self.blocks) if b.end is not None]

    @property
    def escaping(self) -> int:
        """How many blocks outlive the call (outputs, caches): they stay on the heap."""
        return sum(b.end is None for b in self.blocks)

    @property
    def bytes(self) -> int:
        """The sum of all sizes."""
        return sum(b.size for b in self.blocks)

    def peak(self, *, escaping: bool = False) -> int:
        """The most bytes that were alive at once: of the intermediates, or of everything that the call allocated."""
        events: list[tuple[int, int]] = []
        for b in self.blocks:
            if b.end is not None:
                events += [(b.start, b.size), (b.end, -b.size)]
            elif escaping:
                events.append((b.start, b.size))
        alive = most = 0
        for _, change in sorted(events):
            alive += change
            most = max(most, alive)
        return most


@dataclass(frozen=True)
class ShapeStats:
    """One graph at one shape.

    ``state`` is new, recording, recorded, planned or off. ``calls`` counts all, ``recorded`` those that were recorded,
    ``replayed`` those whose intermediates all lay in the arena, ``mismatches`` those that allocated otherwise than the
    recorded one (their rest went to the heap), ``outlived`` those of which an intermediate stayed alive, ``unleased``
    those that found no arena free, ``heaped`` those that ran on the heap altogether. Of the last call: blocks that the
    arena ``gave``, blocks that were known to ``escape``, and intermediates that came from the ``heap``.
    """

    key: tuple[int, ...]
    state: str
    plan_bytes: int
    calls: int
    recorded: int
    replayed: int
    mismatches: int
    outlived: int
    unleased: int
    heaped: int
    last_gave: int
    last_escaped: int
    last_heap: int
    reason: str = ""
    recording: Recording | None = field(default=None, repr=False)

    @property
    def peak_bytes(self) -> int:
        """The most bytes of intermediates that were alive at once in the recorded call; 0 before there is one."""
        return self.recording.peak() if self.recording is not None else 0


@dataclass(frozen=True)
class GraphStats:
    """One graph: its shapes that are remembered, and how many calls had another one."""

    index: int
    shapes: tuple[ShapeStats, ...]
    unknown_calls: int


@dataclass(frozen=True)
class ArenaStats:
    """The arenas of one backend.

    ``reason`` says why there are none, else it is empty. ``size`` is that of the largest plan: what one arena takes.
    ``committed`` bytes are taken from the system, in ``instances`` arenas, of which ``busy`` are leased or hold blocks
    that outlive their call.
    """

    reason: str
    size: int
    committed: int
    instances: int
    busy: int
    graphs: tuple[GraphStats, ...]

    @property
    def shapes(self) -> Sequence[ShapeStats]:
        """Those of all graphs."""
        return [s for g in self.graphs for s in g.shapes]
