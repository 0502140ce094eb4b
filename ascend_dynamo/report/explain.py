"""``explain(model, *args)``: compile once, run once, and tell what the compiler did and why."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ascend_dynamo import _torch_compat
from ascend_dynamo.errors import AscendDynamoError
from ascend_dynamo.report.records import CompileRecord, Missed

if TYPE_CHECKING:
    from ascend_dynamo.backend import Backend


@dataclass
class Explanation:
    """What one call of a compiled model led to: prints as a report, writes HTML and JSON.

    ``records`` has one entry per compiled graph, ``graph_breaks`` counts Dynamo's reasons for cutting the model,
    ``seconds`` is the whole first call, ``output`` what that call returned.
    """

    model: str
    records: list[CompileRecord]
    options: dict[str, Any] = field(default_factory=dict)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    torch: str = torch.__version__
    output: Any = field(default=None, repr=False)

    @property
    def fired(self) -> Counter[str]:
        """How often each pattern fired, over all graphs."""
        return Counter(f.pattern for r in self.records for f in r.fired)

    @property
    def missed(self) -> list[Missed]:
        """Near misses of all graphs, the nearest first."""
        return sorted((m for r in self.records for m in r.missed), key=lambda m: (-m.progress, m.pattern))

    def text(self, *, colour: bool = False, diff: bool = True) -> str:
        """The report as text; ``diff=False`` leaves the graph diffs out."""
        from ascend_dynamo.report.text import report

        return report(self, colour=colour, diff=diff)

    def __str__(self) -> str:
        return self.text()

    def html(self, path: str | Path) -> Path:
        """Write one standalone HTML file (no external resources) and return its path."""
        from ascend_dynamo.report.html import page

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page(self), encoding="utf-8")
        return target

    def memory_png(self, path: str | Path, *, graph: int | None = None) -> Path:
        """Draw the memory timeline of a graph (by index; default: the one with the highest peak); returns the path.

        Raises:
            MissingExtraError: matplotlib is not installed (``pip install 'ascend-dynamo[report]'``).
            LookupError: there is no such graph, or its target does not tell what it takes.
        """
        from ascend_dynamo.memory.timeline_png import write_png

        known = {r.index: r.memory for r in self.records if r.memory is not None}
        if graph is None and known:
            graph = max(known, key=lambda i: (known[i].peak, -i))
        if graph not in known:
            raise LookupError(f"no memory was predicted for graph {graph}; there are predictions for {sorted(known)}")
        return write_png(known[graph], path, title=f"{self.model}, graph {graph}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists and dicts only."""
        return {
            "model": self.model,
            "torch": self.torch,
            "options": {k: v if isinstance(v, (str, int, float, bool)) else repr(v) for k, v in self.options.items()},
            "seconds": self.seconds,
            "graph_breaks": self.graph_breaks,
            "fired": dict(self.fired.most_common()),
            "graphs": [asdict(r) for r in self.records],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Compile ``model`` with a backend of its own, call it once with ``args`` and ``kwargs``, and report.

    The call runs without gradients (a training graph is not fused, so there would be nothing to explain). What is
    compiled elsewhere stays as it is: the compilation gets its own backend and its own set of Dynamo cache entries.
    The call itself is real: a model that writes its buffers or inputs has written them once afterwards.

    ``options`` are those of the backend, as in ``torch.compile(..., options=...)``; the compile cache is bypassed
    unless they say otherwise, because a cached graph has nothing to tell. Raises what compiling would raise.
    """
    from ascend_dynamo.backend import Backend

    target = getattr(model, "_orig_mod", model)
    backend = Backend({"cache": False, **(options or {})}, texts=True)
    compiled = torch.compile(target, backend=backend, **_torch_compat.isolated_compile_kwargs())
    before = _torch_compat.graph_break_reasons()
    start = time.perf_counter()
    try:
        with torch.no_grad():
            output = compiled(*args, **kwargs)
    except Exception as error:  # Dynamo wraps what a backend raises
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, AscendDynamoError):
            raise inner from error
        raise
    seconds = time.perf_counter() - start
    _learn_recorded(backend)
    return Explanation(
        model=_name(target),
        records=copy.deepcopy(backend.records),
        options=dict(options or {}),
        graph_breaks={_brief(k): n for k, n in (_torch_compat.graph_break_reasons() - before).items()},
        seconds=seconds,
        output=output,
    )


def _learn_recorded(backend: Backend) -> None:
    """The one call was recorded by the arenas: what it really took goes beside what was predicted."""
    found = {g.index: g.shapes for g in backend.memory().graphs}
    for record in backend.records:
        for shape in found.get(record.index, ()):
            if record.memory is not None and shape.recording is not None and record.memory.recorded is None:
                record.memory.recorded = shape.recording.peak()


def _brief(reason: str) -> str:
    """Dynamo's reason without its debug context and links: what happened and the first hint."""
    lines = [line.strip() for line in reason.splitlines()]
    keep = [x for x in lines if x and not x.startswith(("Hint:", "Developer debug context", "For more details"))]
    return " ".join(keep + [x for x in lines if x.startswith("Hint:")][:1])


def _name(model: Any) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return getattr(model, "__qualname__", None) or type(model).__name__
