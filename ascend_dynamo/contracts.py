"""The interfaces that every part of the compiler agrees on: reasons, matches, facts, patterns, passes, lowerings.

Nothing here computes anything. ``docs/architecture.md`` explains how the parts meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import fx

Level = Literal[0, 1, 2, 3]
Users = Literal["refuse", "duplicate", "export"]
ReasonCode = Literal[
    "op", "arg", "dtype", "shape", "unproven", "users", "alias", "mutation", "stream", "region", "level", "cost"
]


@dataclass(frozen=True)
class NoMatch:
    """Why something did not happen, as a value: a refusal of the matcher, of a domain check or of a lowering.

    ``progress`` is the fraction (0..1) of the pattern's nodes that had matched before the failure; near misses
    are ranked by it. ``src`` is the user's (file, line). ``fix`` says what would make it fire, if we know.
    """

    code: ReasonCode
    node: fx.Node
    expected: str
    found: str
    progress: float = 0.0
    src: tuple[str, int] | None = None
    fix: str = ""

    def __str__(self) -> str:
        where = f" ({self.src[0]}:{self.src[1]})" if self.src else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.code}: expected {self.expected}, found {self.found} at %{self.node.name}{where}{fix}"


@dataclass(frozen=True)
class Match:
    """A proven occurrence of a pattern.

    ``nodes`` are the nodes that the rewrite replaces (never inputs); ``inputs`` binds the pattern's input names to
    nodes or literals; ``outputs`` are the nodes whose uses the rewrite takes over, in the order in which
    ``Pattern.rewrite`` returns their replacements. ``assumes`` states proven conditions in words. ``computed`` are
    calls in front of the match whose values a proof rests on (a mask): validation runs them, and draws no numbers.
    """

    pattern: str
    anchor: fx.Node
    nodes: frozenset[fx.Node]
    inputs: Mapping[str, Any]
    outputs: tuple[fx.Node, ...]
    assumes: tuple[str, ...] = ()
    computed: frozenset[fx.Node] = frozenset()


class Facts(Protocol):
    """The only way to ask the graph anything. Never adds a guard."""

    def val(self, n: fx.Node) -> Any:
        """The fake value of a node (a tensor, a SymInt, a tuple...)."""
        ...

    def known(self, relation: Any) -> bool:
        """True if ``relation`` (bool, SymBool or sympy relation) is statically known to be true."""
        ...

    def axes(self, n: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
        """Source node and one label per axis of ``n``, seen through permute, reshape, expand and full slices."""
        ...

    def const(self, n: fx.Node) -> torch.Tensor | None:
        """The value of a node that nobody can write (a folded constant), else None."""
        ...

    def numbers(self, n: fx.Node) -> tuple[Any, ...] | None:
        """The elements of ``const(n)`` as Python numbers in row-major order, where they are few (64), else None."""
        ...

    def size(self, s: Any) -> Any:
        """A size (int, SymInt, or a node of one) as an int or a sympy expression: for arithmetic; ask ``known``."""
        ...

    @property
    def memo(self) -> dict[Any, Any]:
        """What recognisers remember about this graph; nothing that a rewrite of values by equal ones can falsify."""
        ...

    def is_param(self, n: fx.Node) -> bool:
        """True for a placeholder that is a parameter or a buffer of the model (a static input)."""
        ...

    def why_not_mergeable(self, params: tuple[fx.Node, ...]) -> str:
        """Why these parameters must not be stored as slices of one tensor; "" if they may."""
        ...

    def may_alias(self, a: fx.Node, b: fx.Node) -> bool: ...

    def effects_between(self, a: fx.Node, b: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes after ``a`` and before ``b`` in program order that write memory or have other effects."""
        ...

    def src(self, n: fx.Node) -> tuple[str, int] | None:
        """The user's (file, line) that produced the node."""
        ...

    def region(self, n: fx.Node) -> str:
        """The fuse / no_fuse region of the node: "" outside any; "no_fuse" or "fuse:name,..." with nesting by /."""
        ...


class Builder(Protocol):
    """What a rewrite may do: add nodes in front of the insertion point, and ask for prologue values."""

    def op(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call; its fake value and provenance are filled in."""
        ...

    def prologue(self, transform: str, *params: fx.Node) -> fx.Node:
        """A value computed once per weight identity from parameters: a new input of the main graph."""
        ...

    def trace(self, fn: Callable[..., Any], *args: Any) -> tuple[fx.Node, ...]:
        """Run ``fn`` on the fake values of ``args`` and add the calls that it makes; returns its output nodes."""
        ...


@dataclass(frozen=True)
class Domain:
    """Where a pattern claims to hold; what fuzzing draws from and what matching enforces.

    ``dims`` gives inclusive bounds of each named size, ``shapes`` the symbolic shape of each input, for example
    ``{"x": ("*B", "H"), "w": ("H",)}`` with ``"*B"`` any number of leading axes and ``"1"`` a broadcast axis. A name
    missing from ``shapes`` is a scalar. ``requires`` is an extra check on the finished match.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dims: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    requires: Callable[[Match, Facts], NoMatch | None] | None = None


@runtime_checkable
class Pattern(Protocol):
    """A fusion. ``match`` and ``rewrite`` are pure: the driver commits, verifies and rolls back.

    ``eager`` holds callables that spell the pattern in plain torch: the fuzz oracle. ``fuzz_inputs``, if present
    (``Callable[[random.Random, torch.dtype], tuple]``), draws arguments for them where ``domain.shapes`` cannot say it.
    """

    name: str
    version: int
    level: Level
    benefit: int
    anchors: tuple[Any, ...]
    users: Users
    domain: Domain
    eager: tuple[Callable[..., Any], ...]
    emits: frozenset[str]
    before: frozenset[str]
    after: frozenset[str]

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch: ...

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]: ...


@dataclass
class GraphUnit:
    """A graph on its way through the compiler.

    ``gm`` is the main graph; ``prologue`` maps parameters to the derived tensors that ``gm`` takes as extra trailing
    placeholders; ``params`` names the placeholders that are parameters or buffers; ``mutated`` the indices of inputs
    that the graph writes; ``out_strides`` the strides promised for each graph output (None: not a tensor).
    ``weights`` holds the live tensors behind ``params``, for questions of identity and memory only: their values are
    never read while compiling.
    """

    gm: fx.GraphModule
    prologue: fx.GraphModule
    params: tuple[str, ...] = ()
    mutated: frozenset[int] = frozenset()
    out_strides: tuple[Any, ...] = ()
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PassResult:
    """What a pass did: whether the graph changed, and anything worth reporting."""

    changed: bool
    notes: tuple[str, ...] = ()


@runtime_checkable
class Pass(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def before(self) -> frozenset[str]: ...

    @property
    def after(self) -> frozenset[str]: ...

    def run(self, g: GraphUnit, options: Any) -> PassResult: ...


@dataclass(frozen=True)
class CacheKey:
    """A digest per component, so that a miss can be explained by naming the component that changed."""

    graph: str
    inputs: str
    guards: str
    options: str
    registry: str
    versions: str
    device: str
    params: str
    ranks: str


class CompiledArtifact(Protocol):
    """A compiled graph without weights.

    Where it has an attribute ``host_memory`` that is true, ``bind`` also takes ``arena``, a ``GraphArena`` (see
    ``runtime/arena.py``) or None, and lets the graph's intermediates live there.
    """

    def bind(self, *, strict: bool = False) -> Callable[[list[Any]], list[Any]]:
        """A boxed callable over all graph inputs. Derived weights are made at the first call; ``strict`` also looks
        for writes into copied ones that no version counter shows."""
        ...


class SerializableArtifact(CompiledArtifact, Protocol):
    """An artifact that the compile cache can store."""

    def to_bytes(self) -> bytes: ...


class Lowering(Protocol):
    """A target: which dialect ops it has kernels for, what they cost, and its graph compiler."""

    target: str
    version: str
    ops: frozenset[Any]
    """The ops (dialect or ATen) that this target may lower to kernels of its own; only these are asked about."""

    def supports(self, op: Any, n: fx.Node, facts: Facts) -> NoMatch | None:
        """None if this target has a kernel for the node, else the reason."""
        ...

    def cost(self, op: Any, n: fx.Node, facts: Facts) -> float:
        """Estimated seconds gained (negative) or lost (positive) by the kernel against the reference path."""
        ...

    def lower(self, n: fx.Node, b: Builder) -> tuple[fx.Node, ...]: ...

    def compile(self, g: GraphUnit, key: CacheKey | None = None) -> CompiledArtifact: ...
