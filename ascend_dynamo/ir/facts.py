"""Questions that passes and patterns may ask about a graph. No answer ever adds a guard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.ir import effects, layout, provenance, sym
from ascend_dynamo.ir.fakes import FakeCache, fake_mode_of
from ascend_dynamo.runtime.weights import why_not_mergeable

_aten = torch.ops.aten
FEW = 64  # elements of a constant that patterns may read one by one; normalisation folds no larger ones
PROLOGUE = "ascend_prologue"  # meta key of a placeholder computed by the prologue: (transform, names of its params)


class GraphFacts:
    """``Facts`` of one graph. ``params`` names the placeholders that are parameters or buffers.

    Safe to keep while rewrites add and remove nodes: nothing that a rewrite can change is remembered.
    """

    def __init__(
        self, gm: fx.GraphModule, params: Iterable[str] = (), weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self.gm = gm
        self.weights = dict(weights or {})
        self.params = frozenset(params)
        self.fake_mode = fake_mode_of(gm)
        self.fakes = FakeCache(self.fake_mode)
        self.templates: dict[Any, Any] = {}  # rewrites traced once (see GraphBuilder.trace)
        self.memo: dict[Any, Any] = {}  # what recognisers have proven about values of this graph
        self._shape_env = compat.shape_env_of(self.fake_mode)
        self._sizes: sym.SymEmitter | None = None
        self._effectful: list[fx.Node] | None = None

    @property
    def sizes(self) -> sym.SymEmitter:
        """The emitter of symbolic sizes for this graph."""
        if self._sizes is None:
            self._sizes = sym.SymEmitter(self.gm.graph)
        return self._sizes

    def val(self, n: fx.Node) -> Any:
        return n.meta.get("val")

    def known(self, relation: Any) -> bool:
        return sym.known(relation, self._shape_env)

    def axes(self, n: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
        return layout.axes(n)

    def const(self, n: fx.Node) -> torch.Tensor | None:
        if n.op == "get_attr" and isinstance(n.target, str):
            value: Any = self.gm
            for part in n.target.split("."):
                value = getattr(value, part, None)
            written = any(n in effects.roots(w) for e in self._effects() for w in effects.written(e))
            return value if isinstance(value, torch.Tensor) and not written else None
        if n.target in (_aten.full.default, _aten.scalar_tensor.default):
            return _filled(n)
        return None

    def numbers(self, n: fx.Node) -> tuple[Any, ...] | None:
        val = n.meta.get("val")
        if not isinstance(val, torch.Tensor) or not all(type(s) is int for s in val.shape) or val.numel() > FEW:
            return None
        value = self.const(n)
        if value is None or compat.is_fake(value) or value.layout != torch.strided:
            return None
        with compat.no_dispatch_modes():
            return tuple(value.detach().cpu().flatten().tolist())

    def size(self, s: Any) -> Any:
        return sym.expr(s)

    def is_param(self, n: fx.Node) -> bool:
        return n.op == "placeholder" and (n.name in self.params or n.target in self.params)

    def is_static(self, n: fx.Node) -> bool:
        """True for a parameter, a buffer, or a value that the prologue computes from them."""
        return self.is_param(n) or PROLOGUE in n.meta

    def why_not_mergeable(self, params: tuple[fx.Node, ...]) -> str:
        """Asks the live weights where there are any (a graph captured from a plain function has none)."""
        if len(set(params)) < len(params):
            return "the same weight is used twice"
        live = [self.weights[p.name] for p in params if p.name in self.weights]
        return why_not_mergeable(live) if len(live) == len(params) else ""

    def may_alias(self, a: fx.Node, b: fx.Node) -> bool:
        return bool(self._owners(a) & self._owners(b))

    def effects_between(self, a: fx.Node, b: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(e for e in self._effects() if a < e < b)

    def src(self, n: fx.Node) -> tuple[str, int] | None:
        return provenance.src(n)

    def region(self, n: fx.Node) -> str:
        return provenance.region(n)

    def added(self, node: fx.Node) -> None:
        """Tell the facts about a new node (the builder does)."""
        if self._effectful is not None and _acts(node):
            self._effectful.append(node)
            self._effectful.sort()

    def _effects(self) -> list[fx.Node]:
        if self._effectful is None:
            self._effectful = [n for n in self.gm.graph.nodes if _acts(n)]
        return [n for n in self._effectful if n.prev.next is n]

    def _owners(self, n: fx.Node) -> frozenset[str]:
        """Names of what may own the memory of ``n``; a merged weight is owned by the parameters inside it."""
        names: set[str] = set()
        for root in effects.roots(n):
            made = root.meta.get(PROLOGUE)
            names.update(made[1] if made else (root.name,))
        return frozenset(names)


def _acts(n: fx.Node) -> bool:
    e = effects.node_effects(n)
    return bool(e.writes) or e.other


def _filled(n: fx.Node) -> torch.Tensor | None:
    """A real tensor for ``full`` / ``scalar_tensor`` of a number, expanded, so that it needs no memory."""
    val = n.meta.get("val")
    number = n.args[1] if n.target is _aten.full.default else n.args[0]
    if not isinstance(number, (int, float, bool)) or not isinstance(val, torch.Tensor):
        return None
    if not all(isinstance(s, int) for s in val.shape):
        return None
    with compat.no_dispatch_modes():
        return torch.tensor(number, dtype=val.dtype).expand(val.shape)
