"""Binding: the extra inputs that the compiler derived from parameters, computed once per weight identity.

A compiled graph takes the inputs that were captured and, after them, one input per prologue value. ``Bound`` is the
boxed callable in between: it hands through the captured inputs and appends the derived ones. Merged weights are
views of the parameters' own storage (``weights.py``); copied ones (packed, quantised) are recomputed when a source
changed its identity, its address or its version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.ir.transforms import Transform
from ascend_dynamo.ir.transforms import transform as find_transform
from ascend_dynamo.memory.lifetimes import Liveness
from ascend_dynamo.runtime.arena import GraphArena
from ascend_dynamo.runtime.weights import merge, why_not_mergeable

log = logging.getLogger("ascend_dynamo.runtime")


@dataclass
class _Merged:
    """A merged weight: valid as long as every part still lies where its slice is."""

    indices: tuple[int, ...]
    value: torch.Tensor | None = None
    addresses: tuple[int, ...] = ()
    warned: bool = False

    def get(self, args: Sequence[Any]) -> torch.Tensor:
        parts = [args[i] for i in self.indices]
        addresses = tuple(part.data_ptr() for part in parts)
        if self.value is not None and addresses == self.addresses:
            return self.value
        reason = why_not_mergeable(parts)
        if reason:
            # Weights were replaced by ones that must not be re-stored: right, but a copy on every call.
            if not self.warned:
                log.warning("merged weights are copied on every call, because %s", reason)
                self.warned = True
            self.value = None
            return torch.cat([part.detach() for part in parts])
        self.value = merge(parts)
        self.addresses = tuple(part.data_ptr() for part in parts)
        return self.value


@dataclass
class _Copied:
    """A transformed copy: valid as long as every source has the same identity, address and version."""

    indices: tuple[int, ...]
    transform: Transform
    value: Any = None
    seen: tuple[Any, ...] = ()
    sample: torch.Tensor | None = None
    strict: bool = False

    def get(self, args: Sequence[Any]) -> Any:
        parts = [args[i] for i in self.indices]
        seen = tuple((id(p), p.data_ptr(), compat.version_of(p)) for p in parts)
        if seen == self.seen and not (self.strict and self._edited(parts)):
            return self.value
        with torch.no_grad():
            self.value = self.transform.fn(*parts)
            self.sample = _sample(parts)
        self.seen = seen
        return self.value

    def _edited(self, parts: Sequence[torch.Tensor]) -> bool:
        """Strict mode: a few elements of each source tell of writes through ``.data``, which no version shows."""
        return self.sample is None or not torch.equal(_sample(parts), self.sample)


def _sample(parts: Sequence[torch.Tensor], count: int = 64) -> torch.Tensor:
    flat = [p.detach().reshape(-1) for p in parts]
    return torch.cat([f[:: max(1, f.numel() // count)][:count].double() for f in flat])


class Bound:
    """The boxed callable that AOTAutograd runs: captured inputs in, outputs out. Thread-safe like the graph itself."""

    _boxed_call = True

    def __init__(self, inner: Callable[[list[Any]], list[Any]], extras: Sequence[_Merged | _Copied]) -> None:
        self.inner = inner
        self.extras = tuple(extras)

    def __call__(self, args: list[Any]) -> list[Any]:
        if self.extras:
            for extra in self.extras:  # a later one may take an earlier one
                args.append(extra.get(args))
        return self.inner(args)


class Artifact:
    """A compiled graph and the recipe of its prologue; holds no weights until it is bound.

    ``lifetimes`` computes what one run allocates, where the target can tell; ``host_memory`` says that the run's
    intermediates come from torch's CPU allocator on the calling thread, so that an arena may serve them.
    """

    def __init__(
        self,
        inner: Callable[[list[Any]], list[Any]],
        unit: GraphUnit,
        lifetimes: Callable[[], Liveness] | None = None,
        *,
        host_memory: bool = False,
    ) -> None:
        self.inner = inner
        self.host_memory = host_memory
        self.lifetimes = lifetimes
        self.recipe = tuple(_recipe(unit))

    def bind(self, *, strict: bool = False, arena: GraphArena | None = None) -> Bound:
        """A boxed callable over all graph inputs. Derived weights are made at the first call that needs them, outside
        the ``arena`` that the compiled graph itself runs in."""
        return Bound(
            self.inner if arena is None else arena.around(self.inner),
            [
                _Merged(indices) if transform.alias else _Copied(indices, transform, strict=strict)
                for transform, indices in self.recipe
            ],
        )


def _recipe(unit: GraphUnit) -> Iterable[tuple[Transform, tuple[int, ...]]]:
    """Each prologue value: its transform, and where its sources stand among captured and earlier derived inputs."""
    placeholders = unit.gm.graph.find_nodes(op="placeholder")
    position = {str(n.target): i for i, n in enumerate(placeholders)}
    holders = [n for n in placeholders if PROLOGUE in n.meta]
    (output,) = unit.prologue.graph.find_nodes(op="output")
    results: Any = output.args[0]
    derived = {result: position[str(holder.target)] for holder, result in zip(holders, results, strict=True)}
    for holder, result in zip(holders, results, strict=True):
        sources = tuple(derived[n] if n in derived else position[str(n.target)] for n in result.args)
        yield find_transform(holder.meta[PROLOGUE][0]), sources
