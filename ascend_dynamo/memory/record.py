"""What a compilation remembers about memory: the plan and the peak of one graph, as plain data that can be pickled."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.ir.transforms import transform
from ascend_dynamo.memory.lifetimes import Lifetime, Liveness, Symbol, peak_of
from ascend_dynamo.memory.plan import Plan, assign_offsets
from ascend_dynamo.memory.written_sizes import size_of_text

log = logging.getLogger("ascend_dynamo.memory")

QUICK = 0.0  # seconds of search for a plan while somebody waits: only placing in several orders, which compiles nothing


@dataclass(frozen=True)
class MemoryBlock:
    """One allocation: live during steps ``start <= step < end``, at ``offset`` in the arena (None: an output, or on
    another device). ``formula`` spells the bytes where sizes are symbolic."""

    id: str
    start: int
    end: int
    bytes: int
    op: str = ""
    src: tuple[str, int] | None = None
    offset: int | None = None
    output: bool = False
    formula: str = ""


@dataclass
class MemoryRecord:
    """The memory of one graph at the sizes of its first call; everything in bytes.

    ``source`` is what the prediction was read from: "inductor" (the program after fusion) or "fx" (the graph, op by
    op); ``exact`` is False where that is only an upper bound. ``sizes`` are the symbolic sizes of the first call,
    ``names`` what they are in the user's words, ``unknown`` those that only the data tells, counted as 0. ``arena`` is
    the planned size, ``lower_bound`` the most intermediates that are live at once, which no plan can undercut, ``peak``
    the same with the outputs, reached at ``step`` of ``steps``. ``weights``, ``derived`` (packed copies of weights) and
    ``inputs`` (everything else that is passed in: caches, ids) are there before the call. ``recorded`` is the peak of
    intermediates in a real call, once one was recorded (temporaries inside kernels included).
    """

    source: str = "fx"
    exact: bool = True
    sizes: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    blocks: list[MemoryBlock] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    steps: int = 0
    arena: int = 0
    lower_bound: int = 0
    method: str = ""
    peak: int = 0
    step: int = 0
    weights: int = 0
    derived: int = 0
    inputs: int = 0
    recorded: int | None = None

    @property
    def outputs(self) -> int:
        """What the graph allocates for its caller."""
        return sum(b.bytes for b in self.blocks if b.output)

    @property
    def total(self) -> int:
        """Weights, inputs, outputs and the planned arena: what a call needs in all."""
        return self.weights + self.derived + self.inputs + self.outputs + self.arena

    @property
    def ratio(self) -> float | None:
        """The planned arena over the recorded peak of intermediates: 1 is perfect, below 1 is too small."""
        return self.arena / self.recorded if self.recorded else None

    def lifetimes(self) -> Liveness:
        """The arena's and the outputs' lifetimes again, with sizes as expressions: what other sizes would take."""
        symbols = tuple(
            Symbol(k, i, None, n, source=self.names.get(k, "")) for i, (k, n) in enumerate(self.sizes.items())
        )
        lives = tuple(
            Lifetime(b.id, b.start, b.end, size_of_text(b.formula) if b.formula else b.bytes, b.op, b.src, b.output)
            for b in self.blocks
            if b.offset is not None or b.output
        )
        return Liveness(lives, self.steps, symbols, self.source, self.exact)

    def live(self, step: int | None = None) -> list[MemoryBlock]:
        """Who is live at a step (the peak's by default), the largest first."""
        at = self.step if step is None else step
        found = [b for b in self.blocks if b.start <= at < b.end and b.bytes]
        return sorted(found, key=lambda b: (-b.bytes, b.start, b.id))


def record_memory(unit: GraphUnit, found: Liveness, *, seconds: float = QUICK) -> MemoryRecord:
    """The record of a graph whose run allocates ``found``; the search for a plan may take ``seconds``.

    Sizes that only the data tells (the number of hits of a nonzero) count as 0, and ``unknown`` names them.
    """
    sizes = {s.name: s.hint if s.hint is not None else s.high for s in found.symbols}
    known = {name: n for name, n in sizes.items() if n is not None}
    unknown = {s.name for x in found.lifetimes for s in getattr(x.bytes, "free_symbols", ())} - known.keys()
    concrete = found.at(known, default=0)
    plan = _plan(concrete, seconds)
    peak = peak_of(x for x in concrete.lifetimes if x.device == concrete.device)
    return MemoryRecord(
        source=found.source,
        exact=found.exact,
        unknown=sorted(unknown),
        sizes=known,
        names={s.name: s.source for s in found.symbols if s.source},
        blocks=_blocks(found, concrete, plan),
        steps=found.steps,
        arena=plan.size,
        lower_bound=plan.lower_bound,
        method=plan.method,
        peak=peak.bytes,
        step=peak.step,
        weights=distinct_bytes(unit.weights.values()),
        derived=_derived_bytes(unit),
        inputs=_input_bytes(unit),
    )


def _plan(concrete: Liveness, seconds: float) -> Plan:
    return assign_offsets(concrete.buffers(), seconds=seconds)


def _blocks(found: Liveness, concrete: Liveness, plan: Plan) -> list[MemoryBlock]:
    return [
        MemoryBlock(
            x.id,
            x.start,
            x.end,
            x.bytes,
            x.op,
            x.src,
            plan.offsets.get(x.id),
            x.output,
            "" if isinstance(symbolic.bytes, int) else str(symbolic.bytes),
        )
        for symbolic, x in zip(found.lifetimes, concrete.lifetimes, strict=True)
    ]


def distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the tensors' storages, each counted once: tied weights and slices of one tensor share one."""
    seen: dict[tuple[str, int], int] = {}
    for t in tensors:
        if t.layout != torch.strided or compat.is_subclass(t):
            seen["", id(t)] = t.numel() * t.element_size()
            continue
        storage = t.untyped_storage()
        seen[t.device.type, storage.data_ptr() or id(t)] = storage.nbytes()
    return sum(seen.values())


def _derived_bytes(unit: GraphUnit) -> int:
    """Weights that the prologue copies (packs, quantises); those that it merges by aliasing take no more."""
    holders = [n for n in unit.gm.graph.find_nodes(op="placeholder") if PROLOGUE in n.meta]
    return sum(_hinted_bytes(n) for n in holders if not transform(n.meta[PROLOGUE][0]).alias)


def _input_bytes(unit: GraphUnit) -> int:
    """Inputs that are neither parameters nor derived: caches, ids, masks."""
    params = {*unit.params, *unit.weights}
    holders = unit.gm.graph.find_nodes(op="placeholder")
    return sum(_hinted_bytes(n) for n in holders if n.name not in params and PROLOGUE not in n.meta)


def _hinted_bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else compat.size_hint(size)
    return count * value.element_size()
