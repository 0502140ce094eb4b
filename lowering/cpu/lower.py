"""The CPU target: our kernels where they win, Inductor for everything else."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import Builder, CacheKey, CompiledArtifact, Facts, GraphUnit, NoMatch
from ascend_dynamo.dialect import SPECS
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.lowering.retrace import retrace
from ascend_dynamo.runtime.prologue import Artifact


class CpuLowering:
    """Dialect ops become their references, which Inductor fuses well, except where a kernel of ours is faster."""

    target = "cpu"
    version = "1"

    def __init__(self) -> None:
        self.kernels: dict[Any, Any] = {}
        self.ops: frozenset[Any] = frozenset(self.kernels)

    def supports(self, op: Any, n: fx.Node, facts: Facts) -> NoMatch | None:
        return self.kernels[op].supports(n, facts)

    def cost(self, op: Any, n: fx.Node, facts: Facts) -> float:
        return self.kernels[op].cost(n, facts)

    def lower(self, n: fx.Node, b: Builder) -> tuple[fx.Node, ...]:
        return self.kernels[n.target].lower(n, b)

    def compile(self, g: GraphUnit, key: CacheKey | None = None) -> CompiledArtifact:
        gm = retrace(g, {spec.overload: spec.reference for spec in SPECS.values()}, compat.inductor_decompositions())
        values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
        inputs = g.gm.graph.find_nodes(op="placeholder")
        static = [i for i, n in enumerate(inputs) if n.name in g.params or PROLOGUE in n.meta]
        return Artifact(compat.inductor_compile(gm, values, static), g)
