"""One element of a tensor of the graph, as a function of index variables: what masks are made of, evaluated.

``Evaluator.formula`` reads boolean tensors, ``Evaluator.cases`` numbers. They ask for what they need, from the mask
upwards, so that layout and gathering are substitutions of indices. What no rule knows is an ``Element`` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts

from .formula import FALSE, TRUE, Formula, Given, either, every, held_by, negated
from .index_algebra import ZERO, Affine, Element, Space, constant
from .index_cases import Cases, Leaf, chosen, compared, number_leaf, rounded
from .index_layout import LAYOUT_CALLS, Index, broadcast, shape, source_index
from .index_rules import CASES, FORMULAS, PIECEWISE
from .index_tables import read_table

BUDGET = 2000  # elements evaluated for one mask; the masks of transformers take some 60


class Evaluator:
    """Evaluates elements of one graph at indices in ``space``. Canonical variables 0, 1, ... are the mask's own axes.

    ``sizes`` are those of the scores that the mask is for, which its axes broadcast to.
    """

    def __init__(self, facts: Facts, sizes: tuple[Any, ...]) -> None:
        self.facts = facts
        self.space = Space(facts, sizes)
        self.target = tuple(self.space.sizes)
        self.own = tuple(ZERO if s == 1 else Affine({v: 1}, 0) for v, s in enumerate(self.target))
        self.steps = 0
        self._formulas: dict[Any, Formula] = {}
        self._cases: dict[Any, Cases] = {}

    @property
    def read(self) -> frozenset[fx.Node]:
        """The calls of which elements have been evaluated."""
        return frozenset(n for n, _ in (*self._formulas, *self._cases) if n.op == "call_function")

    def formula(self, n: fx.Node, index: Index) -> Formula:
        """A boolean tensor at ``index``."""
        key = (n, index)
        found = self._formulas.get(key)
        if found is None:
            found = self._read(FORMULAS, n, index)
            if found is None:
                found = Given(Element(n, index))
            if self._aligned(n, index):
                found = held_by(found, n)
            self._formulas[key] = found
        return found

    def cases(self, n: Any, index: Index, dtype: torch.dtype | None = None) -> Cases | None:
        """A number, or a tensor of numbers or truth values at ``index``; ``dtype`` is what a Python number becomes."""
        if not isinstance(n, fx.Node):
            leaf = number_leaf(n, dtype or (torch.float64 if isinstance(n, float) else torch.int64))
            return None if leaf is None else ((TRUE, leaf),)
        val = self.facts.val(n)
        if not isinstance(val, torch.Tensor):
            return ((TRUE, constant(self.facts.size(n))),) if isinstance(val, (int, torch.SymInt)) else None
        if val.dtype == torch.bool:
            f = self.formula(n, index)
            return tuple((g, constant(v)) for g, v in ((f, 1), (negated(f), 0)) if g != FALSE)
        key = (n, index)
        found = self._cases.get(key)
        if found is None:
            found = self._read(CASES, n, index)
            if found is None or not all(self._exact(leaf, val.dtype) for _, leaf in found):
                found = ((TRUE, self._unknown(n, index, val.dtype)),)
            self._cases[key] = found
        return found

    def operand(self, n: fx.Node, x: Any, index: Index) -> Cases | None:
        """An argument of the elementwise call ``n``, broadcast, at the call's ``index``."""
        if not isinstance(x, fx.Node) or not isinstance(self.facts.val(x), torch.Tensor):
            kind = self.facts.val(n).dtype
            # half precision is computed with the number in single precision: only one that both have is the same
            if isinstance(x, float) and kind in (torch.float16, torch.bfloat16) and rounded(x, kind) != x:
                return None
            return self.cases(x, (), kind if kind != torch.bool else None)
        inner = broadcast(self.space, shape(self.space, x), shape(self.space, n), index)
        return None if inner is None else self.cases(x, inner)

    def truth(self, n: fx.Node, x: Any, index: Index) -> Formula | None:
        """An argument of the elementwise call ``n`` as a truth value: not zero."""
        if isinstance(x, fx.Node) and isinstance(self.facts.val(x), torch.Tensor):
            inner = broadcast(self.space, shape(self.space, x), shape(self.space, n), index)
            if inner is None:
                return None
            if self.facts.val(x).dtype == torch.bool:
                return self.formula(x, inner)
        cases = self.operand(n, x, index)
        return None if cases is None else compared(self.space, "ne", cases, ((TRUE, ZERO),))

    def _read(self, rules: Mapping[Any, Any], n: fx.Node, index: Index) -> Any:
        self.steps += 1
        if self.steps > BUDGET:
            return None
        if n.op == "get_attr":
            return self._constant(n, index)
        if n.op != "call_function":
            return None
        rule = rules.get(n.target)
        if rule is not None:
            return rule(self, n, index)
        if n.target in LAYOUT_CALLS:
            inner = source_index(self.space, n, index)
            return None if inner is None else self.element(n, n.args[0], inner)
        piecewise = PIECEWISE.get(n.target)
        return None if piecewise is None else piecewise(self, n, index)

    def element(self, n: fx.Node, source: Any, index: Index) -> Any:
        """An element of another tensor of the dtype of ``n``, in the form that ``n`` is asked for."""
        return self.formula(source, index) if self.facts.val(n).dtype == torch.bool else self.cases(source, index)

    def choose(self, n: fx.Node, condition: Formula, then: Any, other: Any) -> Any:
        """One of two elements (formulas if ``n`` is boolean)."""
        if then is None or other is None:
            return None
        if not isinstance(then, Formula):
            return chosen(self.space, condition, then, other)
        if then == other:
            return then
        no = negated(condition)
        return every(self.space, (either(self.space, (no, then)), either(self.space, (condition, other))))

    def filled(self, n: fx.Node, value: Any) -> Any:
        """An element of value ``value`` in the dtype of ``n``."""
        if self.facts.val(n).dtype == torch.bool:
            return (TRUE if value else FALSE) if isinstance(value, (bool, int, float)) else None
        return self.cases(value, (), self.facts.val(n).dtype)

    def _constant(self, n: fx.Node, index: Index) -> Any:
        numbers = self.facts.numbers(n)
        return read_table(self, n, numbers, index) if numbers else None

    def _unknown(self, n: fx.Node, index: Index, dtype: torch.dtype) -> Leaf:
        element = Element(n, index)
        return element if dtype.is_floating_point or dtype.is_complex else Affine({element: 1}, 0)

    def _exact(self, leaf: Leaf, dtype: torch.dtype) -> bool:
        if isinstance(leaf, float):
            return rounded(leaf, dtype) == leaf
        return not isinstance(leaf, Affine) or self.space.exact(leaf, dtype)

    def _aligned(self, n: fx.Node, index: Index) -> bool:
        """True if ``n`` broadcasts to the scores and ``index`` is their own."""
        sizes = shape(self.space, n)
        skip = len(self.target) - len(sizes)
        if skip < 0:
            return False
        for size, i, own, full in zip(sizes, index, self.own[skip:], self.target[skip:], strict=True):
            if size == 1:
                if i != ZERO:
                    return False
            elif i != own or not self.space.same(size, full):
                return False
        return True
