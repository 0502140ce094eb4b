"""The reference target: every op runs as its ATen reference, one by one. Slow, exact, the dialect's meaning."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, CacheKey, CompiledArtifact, Facts, GraphUnit, NoMatch
from ascend_dynamo.lowering.retrace import retrace
from ascend_dynamo.memory import liveness
from ascend_dynamo.runtime.prologue import Artifact


class ReferenceLowering:
    """Executes the dialect by its references (``ascend_dynamo.dialect``), without a target compiler."""

    target = "reference"
    version = "1"
    ops: frozenset[Any] = frozenset()

    def supports(self, op: Any, n: fx.Node, facts: Facts) -> NoMatch | None:
        return NoMatch("op", n, "a kernel", "the reference target has none", src=facts.src(n))

    def cost(self, op: Any, n: fx.Node, facts: Facts) -> float:
        return 0.0

    def lower(self, n: fx.Node, b: Builder) -> tuple[fx.Node, ...]:
        raise AssertionError(f"nothing is lowered on the reference target, and so not {n}")

    def compile(self, g: GraphUnit, key: CacheKey | None = None) -> CompiledArtifact:
        gm = retrace(g, {})

        def run(args: list[Any]) -> list[Any]:
            inputs, args[:] = list(args), []
            return gm(*inputs)

        return Artifact(run, g, lambda: liveness(gm))
