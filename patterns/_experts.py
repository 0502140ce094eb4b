"""Reading a mixture of experts upwards from the sum over each token's slots.

A *slot* is one (token, place among its k experts); every value inside has a row per slot, in token order (slot t * k +
place) or in the order of a sort by expert. Reshapes between [S, F], [T, k, F] and [S, F, 1] keep the rows, so that they
are looked through everywhere.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arg, arguments, ascend, aten, commuted, convert, dtype, is_call, rank, refuse

_INTEGERS = (torch.int32, torch.int64)


@dataclass
class Slots:
    """What is known about the slots of one match, and the nodes seen; ``core`` are those nobody else may use."""

    facts: Facts
    top_k: int
    tokens: Any
    order: fx.Node | None = None  # the permutation by which rows are sorted, None in token order
    ids: fx.Node | None = None
    core: dict[fx.Node, None] = field(default_factory=dict)
    shared: dict[fx.Node, None] = field(default_factory=dict)

    def seen(self, *nodes: fx.Node, shared: bool = False) -> None:
        (self.shared if shared else self.core).update(dict.fromkeys(nodes))

    def peel(self, n: Any, *, shared: bool = False) -> Any:
        """``n`` without reshapes: the rows stay as they are."""
        while is_call(n, aten.reshape.default):
            self.seen(n, shared=shared)
            n = arg(n, 0)
        return n

    def count(self, n: fx.Node) -> bool:
        """True if ``n`` has one axis with a place per slot."""
        shape = self.facts.val(n).shape
        return len(shape) == 1 and self.facts.known(shape[0] == self.tokens * self.top_k)

    def is_ids(self, n: Any) -> bool:
        """True if ``n``, flattened, holds the expert of each slot in token order. The first one asked about is."""
        n = self.peel(n, shared=True)
        if self.ids is None and isinstance(n, fx.Node) and dtype(self.facts, n) in _INTEGERS:
            self.ids = n
        return n is self.ids

    def is_order(self, n: Any) -> bool:
        """True if ``n`` is the permutation that sorts the slots by expert."""
        if n is self.order:
            return n is not None
        if self.order is None and is_call(n, operator.getitem) and arg(n, 1) == 1 and self._sorts(arg(n, 0)):
            self.order = n
            self.seen(n, shared=True)
            return True
        return False

    def _sorts(self, n: Any) -> bool:
        if not is_call(n, aten.sort.default, aten.sort.stable):
            return False
        call = arguments(n)
        if call["descending"] or call["dim"] not in (0, -1) or not self.count(call["self"]):
            return False
        self.seen(n, shared=True)
        return self.is_ids(call["self"])

    def is_ordered_ids(self, n: Any) -> bool:
        """True if ``n`` holds the expert of each slot in the rows' order."""
        if self.order is None:
            return self.is_ids(n)
        if is_call(n, operator.getitem) and arg(n, 1) == 0 and arg(n, 0) is arg(self.order, 0):
            self.seen(n, shared=True)
            return True
        picked = self.picked(n)
        if picked is None or picked[1] is not self.order:
            return False
        self.seen(n, shared=True)
        return self.is_ids(picked[0])

    @staticmethod
    def picked(n: Any) -> tuple[fx.Node, fx.Node] | None:
        """(source, index) of ``source[index]`` along the first axis."""
        if is_call(n, aten.index.Tensor) and len(arg(n, 1)) == 1 and isinstance(arg(n, 1)[0], fx.Node):
            return arg(n, 0), arg(n, 1)[0]
        if is_call(n, aten.index_select.default) and arg(n, 1) == 0:
            return arg(n, 0), arg(n, 2)
        return None

    def is_token(self, n: Any) -> bool:
        """True if ``n`` is the token of each row in the sort's order: the permutation divided by k."""
        if self.top_k == 1 and self.is_order(n):
            return True
        floor = is_call(n, aten.div.Tensor_mode) and arguments(n)["rounding_mode"] == "floor"
        if not (floor or is_call(n, aten.floor_divide.default)) or arg(n, 1) != self.top_k:
            return False
        self.seen(n, shared=True)
        return self.is_order(arg(n, 0))

    def is_inverse(self, n: Any) -> bool:
        """True if ``n`` undoes the sort: its positions written through it, or its own argsort."""
        if is_call(n, aten.index_put.default):
            call = arguments(n)
            positions = call["values"]
            through = call["indices"]
            good = not call["accumulate"] and len(through) == 1 and self.count(call["self"])
            if not good or not self._counts_up(positions) or not self.is_order(through[0]):
                return False
            self.seen(n, positions, shared=True)
            if is_call(call["self"], aten.empty_like.default, aten.zeros_like.default):
                self.seen(call["self"], shared=True)
            return True
        if is_call(n, operator.getitem) and arg(n, 1) == 1 and is_call(arg(n, 0), aten.sort.default, aten.sort.stable):
            call = arguments(arg(n, 0))
            if call["descending"] or call["dim"] not in (0, -1) or not self.is_order(call["self"]):
                return False
            self.seen(n, arg(n, 0), shared=True)
            return True
        return False

    def _counts_up(self, n: Any) -> bool:
        if is_call(n, aten.arange.default):
            return self.count(n)
        if not is_call(n, aten.arange.start, aten.arange.start_step):
            return False
        call = arguments(n)
        return call["start"] == 0 and call.get("step", 1) == 1 and self.count(n)

    def is_offsets(self, n: Any, experts: int) -> bool:
        """True if ``n`` [E] int32 says where each expert's rows end: the running sum of how often it was chosen."""
        if is_call(n, convert):
            self.seen(n, shared=True)
            n = arg(n, 0)
        if not is_call(n, aten.cumsum.default) or arguments(n)["dim"] not in (0, -1):
            return False
        self.seen(n, shared=True)
        counts = arg(n, 0)
        if is_call(counts, aten.histc.default):
            call = arguments(counts)
            self.seen(counts, shared=True)
            source = call["self"]
            wide = is_call(source, convert) and dtype(self.facts, source) in (torch.float32, torch.float64)
            if not wide or (call["bins"], call["min"], call["max"]) != (experts, 0, experts - 1):
                return False
            self.seen(source, shared=True)
            return self.is_ids(arg(source, 0)) or self.is_ordered_ids(arg(source, 0))
        return self._sums_one_hot(counts, experts)

    def _sums_one_hot(self, n: Any, experts: int) -> bool:
        """sum(ids[..., None] == arange(E)) over all axes but the last."""
        if not is_call(n, aten.sum.dim_IntList):
            return False
        call = arguments(n)
        hot = call["self"]
        axes = rank(self.facts, hot)
        if sorted(d % axes for d in call["dim"]) != list(range(axes - 1)) or call["keepdim"]:
            return False
        self.seen(n, shared=True)
        if is_call(hot, convert) and dtype(self.facts, hot) in _INTEGERS:
            self.seen(hot, shared=True)
            hot = arg(hot, 0)
        if not is_call(hot, aten.eq.Tensor):
            return False
        for ids, numbers in commuted(hot):
            if not isinstance(ids, fx.Node) or not is_call(numbers, aten.arange.default):
                continue
            one = self.facts.known(self.facts.val(ids).shape[-1] == 1)
            if one and self.facts.known(self.facts.val(numbers).shape[0] == experts):
                self.seen(hot, numbers, shared=True)
                return self.is_ids(ids)
        return False

    def each(self, n: fx.Node, shape: Any) -> bool:
        """True if the axes ``shape`` of ``n`` are one place per slot: [S] or [T, k]."""
        wanted = (self.tokens * self.top_k,) if len(shape) == 1 else (self.tokens, self.top_k)
        return len(shape) in (1, 2) and all(self.facts.known(a == b) for a, b in zip(shape, wanted, strict=True))

    def tokens_of(self, n: Any, *, spread: bool) -> fx.Node | None:
        """x [..., H] if the rows of ``n`` are those of x, each for the k slots of its token.

        ``spread``: the product broadcasts [T, 1, ...] to the k places.
        """
        facts = self.facts
        picked = self.picked(n)
        if self.order is not None:
            if picked is None or rank(facts, picked[0]) != 2 or not facts.known(self._rows(picked[0]) == self.tokens):
                return None
            self.seen(n)
            return picked[0] if self.is_token(picked[1]) else None
        source, labels = facts.axes(n)
        shape = facts.val(source).shape
        kept = [f"d{i}" for i, s in enumerate(shape[:-1]) if not (isinstance(s, int) and s == 1)]
        if not spread and self.top_k > 1:
            kept.append("x0")
        wanted = ["*".join(kept)] if kept else []
        sizes = facts.val(n).shape
        found = [label for label, s in zip(labels, sizes, strict=True) if not (isinstance(s, int) and s == 1)]
        if found != [*wanted, f"d{len(shape) - 1}"] or not facts.known(self._rows(source) == self.tokens):
            return None
        while n is not source:
            self.seen(n)
            n = arg(n, 0)
        return source

    def _rows(self, n: fx.Node) -> Any:
        rows = 1
        for size in self.facts.val(n).shape[:-1]:
            rows = rows * size
        return rows

    def why_ids(self, experts: int) -> NoMatch | None:
        """A refusal unless every id is known to be in [0, E): eager wraps or misplaces the others."""
        n: Any = self.ids
        while is_call(n, aten.reshape.default, convert) and dtype(self.facts, n) in _INTEGERS:
            n = arg(n, 0)
        scores = None
        if is_call(n, operator.getitem) and arg(n, 1) == 1 and is_call(arg(n, 0), *_CHOOSERS):
            scores = self.facts.val(arg(arg(n, 0), 0)).shape[-1]
        if isinstance(scores, int) and scores <= experts and _last_axis(self.facts, arg(n, 0)):
            return None
        at = n if isinstance(n, fx.Node) else next(iter(self.core))
        fix = "take the ids from topk over as many scores as there are experts"
        return refuse(self.facts, "unproven", at, f"ids below {experts}", f"%{at.name}", 0.9, fix)


_CHOOSERS = (aten.topk.default, ascend.moe_gate.default)


def _last_axis(facts: Facts, n: fx.Node) -> bool:
    return n.target is ascend.moe_gate.default or arguments(n)["dim"] in (-1, rank(facts, arg(n, 0)) - 1)
