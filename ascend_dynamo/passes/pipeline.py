"""The pipeline of one captured graph: normalize, fuse, lower, re-inplace, verify."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ascend_dynamo.contracts import GraphUnit, Lowering, Pass, PassResult
from ascend_dynamo.ir.builder import GraphBuilder
from ascend_dynamo.ir.effects import remove_dead
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.ir.verify import promise, verify
from ascend_dynamo.match import Registry, run_patterns
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.passes.kv_copies import kv_copies
from ascend_dynamo.passes.manager import run_passes
from ascend_dynamo.passes.reinplace import Reinplace
from ascend_dynamo.report.records import CompileRecord, Lowered


@dataclass(frozen=True)
class Normalize:
    """Captured ATen ─► the normal form."""

    name: str = "normalize"
    before: frozenset[str] = frozenset({"fuse"})
    after: frozenset[str] = frozenset()

    def run(self, g: GraphUnit, options: Options) -> PassResult:
        return normalize(g)


@dataclass(frozen=True)
class Fuse:
    """ATen ─► dialect ─► dialect, by patterns."""

    registry: Registry
    record: CompileRecord
    explain: bool = False
    name: str = "fuse"
    before: frozenset[str] = frozenset({"lower"})
    after: frozenset[str] = frozenset({"normalize"})

    def run(self, g: GraphUnit, options: Options) -> PassResult:
        return run_patterns(g, self.registry, options, self.record, explain=self.explain)


@dataclass(frozen=True)
class Lower:
    """Each op that the target has a kernel for: the kernel where it is supported and cheaper, else its reference."""

    lowering: Lowering
    record: CompileRecord
    name: str = "lower"
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset({"fuse"})

    def run(self, g: GraphUnit, options: Options) -> PassResult:
        facts = GraphFacts(g.gm, g.params, g.weights)
        lowered = sum([self.lower(g, facts, node) for node in g.gm.graph.nodes])
        if lowered:
            remove_dead(g.gm.graph)
        return PassResult(lowered > 0)

    def lower(self, g: GraphUnit, facts: GraphFacts, node: fx.Node) -> bool:
        """Put the target's kernel in the place of one node, if it has one that pays; returns whether it did."""
        if node.op != "call_function" or node.target not in self.lowering.ops:
            return False
        reason = self.lowering.supports(node.target, node, facts)
        if reason is None and (cost := self.lowering.cost(node.target, node, facts)) >= 0.0:
            self._note(node, "reference", f"the kernel would cost {1e6 * cost:.1f} us more")
        elif reason is None:
            self._replace(node, GraphBuilder(g, facts, node, node))
            self._note(node, "kernel")
            return True
        else:
            self._note(node, "reference", str(reason))
        return False

    def _note(self, node: fx.Node, path: str, reason: str = "") -> None:
        self.record.lowered.append(Lowered(str(node.target), node.name, path, reason))

    def _replace(self, node: fx.Node, b: GraphBuilder) -> None:
        (new,) = self.lowering.lower(node, b)
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)


@dataclass
class Pipeline:
    """What one backend runs on every captured graph."""

    registry: Registry
    lowering: Lowering
    options: Options
    explain: bool = False
    """Also collect near misses, which costs time."""
    extra: tuple[Pass, ...] = field(default=())

    def run(self, unit: GraphUnit, record: CompileRecord) -> None:
        """Transform ``unit`` in place.

        Raises:
            VerifyError: the graph that came out does not keep the promises of the one that went in.
        """
        before = promise(unit)
        passes: list[Pass] = [Normalize()]
        if self.options.level > 0:
            passes.append(Fuse(self.registry, record, self.explain))
        lower = Lower(self.lowering, record)
        passes += [*self.extra, lower]
        if self.options.level > 0:
            passes.append(Reinplace(lower.lower))
        run_passes(passes, unit, self.options, record)
        verify(unit, before)
        record.kv_copies = list(kv_copies(unit))
