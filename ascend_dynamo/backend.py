"""``torch.compile(model, backend="ascend_opt")``."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import ascend_dynamo.dialect  # noqa: F401  registers torch.ops.ascend
from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.capture import KeepComposites, make_unit
from ascend_dynamo.contracts import CompiledArtifact, GraphUnit, Lowering
from ascend_dynamo.errors import ExpectError, OptionError
from ascend_dynamo.ir.text import graph_text
from ascend_dynamo.log import Once, setup
from ascend_dynamo.match import load_registry
from ascend_dynamo.memory.limit import MemoryLimit
from ascend_dynamo.memory.record import QUICK, record_memory
from ascend_dynamo.options import Options
from ascend_dynamo.passes.manager import collector_paused
from ascend_dynamo.passes.pipeline import Pipeline
from ascend_dynamo.regions import mark as mark_regions
from ascend_dynamo.report.dump import dump_record
from ascend_dynamo.report.records import CompileRecord, Quarantined
from ascend_dynamo.runtime.arena import Arenas, GraphArena
from ascend_dynamo.runtime.arena_key import shape_key
from ascend_dynamo.runtime.arena_stats import ArenaStats, Recording
from ascend_dynamo.targets import load_lowering

log = logging.getLogger("ascend_dynamo.backend")


class Backend:
    """A ``torch.compile`` backend that remembers what it compiled.

    ``options`` are those of ``docs/options.md``; torch's own ``mode`` and ``options`` come on top. Every compiled graph
    leaves a ``CompileRecord`` in ``records``; ``texts`` keeps the graphs' texts and the near misses in them too, as
    ``explain`` and the ``dump`` option need. Backends share nothing: several, with different options or patterns, may
    serve one process.

    Raises:
        OptionError: an option is unknown or illegal.
        UnsupportedTorchError: torch is too old.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        texts: bool = False,
        once: Once | None = None,
        arenas: Arenas | None = None,
    ) -> None:
        compat.check_torch_version()
        setup()
        self.__name__ = "ascend_opt"
        self.records: list[CompileRecord] = []
        self.texts = texts
        self._given = dict(options or {})
        self._index = itertools.count()
        self._once = once or Once()
        self._arenas = arenas or Arenas()
        Options.resolve(None, self._given)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one Dynamo graph for inference; where gradients are needed, compile it without our passes.

        Raises:
            OptionError: an option is unknown or illegal.
            ExpectError: ``expect``, or a forced region in strict mode, was not met.
            Exception: any failure of our own passes in strict mode; otherwise such a failure is logged and recorded,
                and the graph is compiled without them.
        """
        resolved = Options.resolve(mode, {**self._given, **(options or {})})
        mark_regions(gm)
        lowering = load_lowering(resolved.target)
        record = CompileRecord(index=next(self._index), target=lowering.target)
        compiled = self._compile(gm, example_inputs, resolved, lowering, record)
        self.records.append(record)
        if resolved.dump:
            dump_record(record, resolved.dump)
        return compiled

    def memory(self) -> ArenaStats:
        """The arenas in which this backend's graphs keep their intermediates: sizes, and how calls made use of them."""
        return self._arenas.stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """Itself: configurations that name a backend are copied (``generate`` does), what it recorded is not."""
        return self

    def _compile(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        lowering: Lowering,
        record: CompileRecord,
    ) -> Callable[..., Any]:
        plain = compat.eager_training if lowering.target == "reference" else compat.inductor_compile_training
        if torch.is_grad_enabled() and any(isinstance(e, torch.Tensor) and e.requires_grad for e in example_inputs):
            record.training = True
            self._once.warning(
                log,
                "gradients are enabled and an input or parameter needs them: compiled without fusions. For inference, "
                "call the model under torch.no_grad() or torch.inference_mode()",
            )
            _note_unchecked(options, record)
            return plain(gm, example_inputs)
        compat.specialize_module_floats(gm)
        registry = load_registry(options, record)
        options = options.for_patterns(registry.groups)
        texts = self.texts or bool(options.dump)
        pipeline = Pipeline(registry, lowering, options, explain=texts)
        try:
            return _Compilation(pipeline, record, texts, self._arenas).run(gm, example_inputs)
        except (OptionError, ExpectError):
            raise
        except Exception as error:
            if options.strict or compat.is_restart(error):
                raise
            log.exception("our passes failed on graph %d; it is compiled without them", record.index)
            record.quarantined.append(Quarantined("ascend_dynamo", f"{type(error).__name__}: {error}"))
            _note_unchecked(options, record)
            return compat.plain_inference(gm, example_inputs, eager=lowering.target == "reference")


def _note_unchecked(options: Options, record: CompileRecord) -> None:
    if options.memory_limit is not None:
        record.notes.append("memory_limit is not checked in this graph, which was compiled without our passes")
        log.warning("graph %d: %s", record.index, record.notes[-1])


@dataclass
class _Compilation:
    """One Dynamo graph on its way through capture, passes and target compiler."""

    pipeline: Pipeline
    record: CompileRecord
    texts: bool
    arenas: Arenas

    def run(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        keep = KeepComposites()

        def compiler(captured: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], list[Any]]:
            with keep.paused():
                self.record.seconds["capture"] = time.perf_counter() - start
                return self.compile(_unit(captured, example_inputs))

        with keep:
            return compat.aot_compile(gm, example_inputs, compiler)

    def compile(self, unit: GraphUnit) -> Callable[[list[Any]], list[Any]]:
        record = self.record
        record.nodes_before = _calls(unit)
        if self.texts:
            record.before = graph_text(unit)
        self.pipeline.run(unit, record)
        record.nodes_after = _calls(unit)
        if self.texts:
            record.after = graph_text(unit)
        start = time.perf_counter()
        artifact = self.pipeline.lowering.compile(unit)
        record.seconds["compile"] = time.perf_counter() - start
        arena = self._arena(unit) if getattr(artifact, "host_memory", False) else None
        more = {} if arena is None else {"arena": arena}
        return self._limited(unit, artifact.bind(strict=self.pipeline.options.strict, **more), artifact)

    def _arena(self, unit: GraphUnit) -> GraphArena | None:
        """Where this graph's intermediates live, or None: on the heap."""
        how, record = self.pipeline.options.arena, self.record
        if how == "off":
            return None
        if self.arenas.reason:
            record.notes.append(f"intermediates live on the heap, not in an arena: {self.arenas.reason}")
            return None

        def recorded(recording: Recording) -> None:
            if record.memory is not None and record.memory.recorded is None:
                record.memory.recorded = recording.peak()

        key = shape_key([n.meta["val"] for n in unit.gm.graph.find_nodes(op="placeholder")])
        return self.arenas.graph(record.index, key, poison=how == "poison", recorded=recorded)

    def _limited(
        self, unit: GraphUnit, run: Callable[[list[Any]], list[Any]], artifact: CompiledArtifact
    ) -> Callable[[list[Any]], list[Any]]:
        """``run`` behind the memory limit, if there is one; the record learns what a run will take."""
        lifetimes = getattr(artifact, "lifetimes", None)
        limit = self.pipeline.options.memory_limit
        if lifetimes is None:
            if limit is not None:
                raise OptionError(f'option "memory_limit": the target {self.record.target} does not tell what it takes')
            return run
        start = time.perf_counter()
        try:
            with collector_paused():
                found = lifetimes()
                self.record.memory = record_memory(unit, found, seconds=1.0 if self.texts else QUICK)
        except Exception as error:
            if limit is not None or self.pipeline.options.strict:
                raise
            log.exception("the memory of graph %d cannot be predicted; it runs all the same", self.record.index)
            self.record.quarantined.append(Quarantined("memory", f"{type(error).__name__}: {error}"))
            return run
        self.record.seconds["memory"] = time.perf_counter() - start
        return run if limit is None else MemoryLimit(limit, found, self.record.memory.derived).around(run)


def _calls(unit: GraphUnit) -> int:
    return sum(n.op == "call_function" for n in unit.gm.graph.nodes)


def _unit(captured: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphUnit:
    """The captured graph with its parameters: static inputs, known by position where AOTAutograd kept positions."""
    placeholders = captured.graph.find_nodes(op="placeholder")
    static = compat.static_input_indices()
    aligned = len(placeholders) == len(example_inputs) and all(
        _same_kind(n.meta.get("val"), e) for n, e in zip(placeholders, example_inputs, strict=True)
    )
    params = [placeholders[i].name for i in static if i < len(placeholders)] if aligned else []
    unit = make_unit(captured, params)
    unit.weights = {
        placeholders[i].name: example_inputs[i]
        for i in static
        if aligned and isinstance(example_inputs[i], torch.Tensor)
    }
    return unit


def _same_kind(value: Any, example: Any) -> bool:
    if not isinstance(example, torch.Tensor):
        return not isinstance(value, torch.Tensor)
    plain = not compat.is_subclass(example)
    return plain and isinstance(value, torch.Tensor) and value.dtype == example.dtype and value.ndim == example.ndim


# The backend by name is one backend, although each graph makes an object of its own.
_said = Once()
_arenas = Arenas()


def ascend_opt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend by name, ``torch.compile(model, backend="ascend_opt")``; see ``Backend``."""
    return Backend(once=_said, arenas=_arenas)(gm, example_inputs, mode=mode, options=options)
