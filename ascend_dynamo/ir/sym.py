"""Symbolic sizes: an integer of a graph is a Python int, or a node whose value is a SymInt. Never adds a guard."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.errors import VerifyError


def expr(x: Any) -> Any:
    """The size as an int or a sympy expression; ``x`` is an int, a SymInt, a sympy expression or a node of one."""
    if isinstance(x, fx.Node):
        x = x.meta["val"]
    if isinstance(x, int):
        return x
    e = compat.sym_expr(x)
    return int(e) if isinstance(e, sympy.Integer) else e


def known(relation: Any, shape_env: Any = None) -> bool:
    """True if a bool, SymBool or sympy relation is statically known to be true."""
    if isinstance(relation, bool):
        return relation
    if isinstance(relation, torch.SymBool):
        return compat.known(relation)
    return compat.known_sympy(relation, shape_env)


def known_eq(a: Any, b: Any) -> bool:
    """True if two sizes (ints or SymInts) are statically known to be equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if a is b or expr(a) == expr(b):
        return True
    return compat.known(a == b)


def same_shape(a: Any, b: Any) -> bool:
    """True if two shapes are statically known to be equal."""
    if len(a) != len(b):
        return False
    return all(known_eq(x, y) for x, y in zip(a, b, strict=True))


def numel(shape: Any) -> Any:
    """The product of sizes, as an int or a sympy expression."""
    product: Any = 1
    for size in shape:
        product = product * expr(size)
    return product


_Functions = compat.sympy_functions()
_BINARY: dict[Any, Callable[[Any, Any], Any]] = {
    _Functions["FloorDiv"]: operator.floordiv,
    _Functions["CleanDiv"]: operator.floordiv,
    _Functions["Mod"]: operator.mod,
    _Functions["PythonMod"]: operator.mod,
    _Functions["Max"]: torch.sym_max,
    _Functions["Min"]: torch.sym_min,
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
}


class SymEmitter:
    """Turns sizes into graph arguments: ints stay ints, symbolic sizes become nodes that hold or compute them.

    A size that a placeholder holds, or that one of its axes has, is read once, right behind the placeholders, and
    so is what is computed from such sizes: those nodes dominate every other node. Sizes that only exist from some
    node on (unbacked symbols) are read or computed in front of the node that asks.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._nodes: dict[Any, fx.Node] = {}
        self._axes: dict[Any, tuple[fx.Node, int]] = {}
        self._early: set[fx.Node] = set()
        self._tail: fx.Node | None = None
        for node in graph.find_nodes(op="placeholder"):
            self._early.add(node)
            self.learn(node)
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            val = node.meta.get("val")
            if not isinstance(val, torch.SymInt) or any(i not in self._early for i in node.all_input_nodes):
                break
            self._early.add(node)
            self._tail = node
            self.learn(node)

    def learn(self, node: fx.Node) -> None:
        """Note the sizes that a node holds: its SymInt value, or the symbolic sizes of its tensor value."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            self._nodes.setdefault(expr(val), node)
        elif isinstance(val, torch.Tensor) and _dense(val):
            for dim, size in enumerate(val.shape):
                if not isinstance(size, int):
                    self._axes.setdefault(expr(size), (node, dim))

    def emit(self, size: Any, before: fx.Node) -> int | fx.Node:
        """``size`` (int, SymInt or sympy expression) as a graph argument that is defined in front of ``before``.

        Raises:
            VerifyError: no node in front of ``before`` holds one of the symbols.
        """
        if type(size) is int:
            return size
        e = expr(size)
        if isinstance(e, int):
            return e
        node = self._held(e, before)
        if node is not None:
            return node
        axis = self._axes.get(e)
        if axis is not None and _alive(axis[0]) and axis[0] < before:
            source, dim = axis
            value = source.meta["val"].shape[dim]
            return self._call(e, torch.ops.aten.sym_size.int, (source, dim), value, before)
        if e.is_Symbol:
            return self._search(e, before)
        return self._compute(e, before)

    def find(self, e: Any, node: fx.Node) -> fx.Node | None:
        """The node that holds size ``e`` in place of ``node``, which is noted as its holder if it is the first.

        Sizes that placeholders have are read right behind them, so that one node serves the whole graph.
        """
        held = self._held(e, node)
        if held is not None:
            return held
        if e in self._axes or all(s in self._axes or s in self._nodes for s in getattr(e, "free_symbols", ())):
            try:
                found = self.emit(e, node)
            except VerifyError:
                found = node  # an expression that only this node computes
            return found if isinstance(found, fx.Node) else None
        self.learn(node)
        return None

    def _held(self, e: Any, before: fx.Node) -> fx.Node | None:
        node = self._nodes.get(e)
        if node is None or not _alive(node):
            return None
        return node if node in self._early or node < before else None

    def _search(self, symbol: Any, before: fx.Node) -> int | fx.Node:
        """A symbol that no placeholder has: look at every node in front of ``before``."""
        for node in self._graph.nodes:
            if node is before:
                break
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt) and expr(val) == symbol:
                self._nodes[symbol] = node
                return node
            if isinstance(val, torch.Tensor) and _dense(val):
                for dim, size in enumerate(val.shape):
                    if not isinstance(size, int) and expr(size) == symbol:
                        self._axes[symbol] = (node, dim)
                        return self._call(symbol, torch.ops.aten.sym_size.int, (node, dim), size, before)
        raise VerifyError(f"size {symbol} has no source in front of %{before.name}: pass a node that has this size")

    def _compute(self, e: Any, before: fx.Node) -> int | fx.Node:
        if isinstance(e, sympy.Pow) and e.args[1].is_Integer and int(e.args[1]) > 1:
            return self._fold(operator.mul, [e.args[0]] * int(e.args[1]), before)
        target = _BINARY.get(type(e))
        if target is None:
            raise VerifyError(f"size {e} cannot be computed in the graph ({type(e).__name__}) at %{before.name}")
        args = list(e.args)
        if target is operator.mul and isinstance(args[0], sympy.Rational) and not args[0].is_Integer:
            whole = sympy.Mul(args[0].p, *args[1:])
            return self._apply(operator.floordiv, self.emit(whole, before), int(args[0].q), before)
        return self._fold(target, args, before)

    def _fold(self, target: Callable[[Any, Any], Any], args: list[Any], before: fx.Node) -> int | fx.Node:
        ordered = sorted(args, key=str) if target is not operator.floordiv and target is not operator.mod else args
        value = self.emit(ordered[0], before)
        for arg in ordered[1:]:
            value = self._apply(target, value, self.emit(arg, before), before)
        return value

    def _apply(self, target: Callable[[Any, Any], Any], a: Any, b: Any, before: fx.Node) -> int | fx.Node:
        left, right = (x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b))
        value = target(left, right)
        e = expr(value)
        if isinstance(e, int):
            return e
        return self._held(e, before) or self._call(e, target, (a, b), value, before)

    def _call(self, e: Any, target: Any, args: tuple[Any, ...], value: Any, before: fx.Node) -> fx.Node:
        early = all(a in self._early for a in args if isinstance(a, fx.Node))
        with self._graph.inserting_after(self._end()) if early else self._graph.inserting_before(before):
            node = self._graph.call_function(target, args)
        node.meta["val"] = value
        if early:
            self._early.add(node)
            self._tail = node
        self._nodes[e] = node
        return node

    def _end(self) -> fx.Node:
        """The last placeholder, or the last size that was read behind the placeholders."""
        if self._tail is not None and _alive(self._tail):
            return self._tail
        last = None
        for node in self._graph.nodes:
            if node.op != "placeholder" and node not in self._early:
                break
            last = node
        assert last is not None, "symbolic sizes come from placeholders"
        return last


def _alive(node: fx.Node) -> bool:
    return node.prev.next is node


def _dense(val: torch.Tensor) -> bool:
    return val.layout == torch.strided
