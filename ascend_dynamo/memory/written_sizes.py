"""Sizes that a generated program spells in Python, and what the graph behind it knows about its operators' results."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.memory.lifetimes import Size
from ascend_dynamo.memory.liveness import storage_bytes

_Functions = compat.sympy_functions()
_CALLS: dict[str, Callable[..., Any]] = {
    "max": _Functions["Max"],
    "min": _Functions["Min"],
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    **_Functions,
}


def size_expr(node: ast.expr) -> Size:
    """``16*s0 + s1 // 2`` as an int or a sympy expression over symbols of these names.

    Raises:
        ValueError: an expression of another kind.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sympy.Symbol(node.id, integer=True, nonnegative=True)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -size_expr(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = size_expr(node.left), size_expr(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right if isinstance(left, int) and isinstance(right, int) else sympy.floor(left / right)
        if isinstance(node.op, ast.Div):
            return sympy.sympify(left) / right
        if isinstance(node.op, ast.Mod):
            return left % right if isinstance(left, int) and isinstance(right, int) else sympy.Mod(left, right)
        if isinstance(node.op, ast.Pow) and isinstance(right, int):
            return left**right
    if isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS:
        return _CALLS[ast.unparse(node.func)](*map(size_expr, node.args))
    raise ValueError(f"{ast.unparse(node)} is no size")


def size_of_text(text: str) -> Size:
    """The size that a text spells: Python, or what sympy prints.

    Raises:
        ValueError: it spells no size.
    """
    return size_expr(ast.parse(text, mode="eval").body)


def shape_of(node: ast.expr) -> list[Size]:
    """A tuple of sizes."""
    if not isinstance(node, ast.Tuple):
        raise ValueError(f"{ast.unparse(node)} is no tuple of sizes")
    return [size_expr(e) for e in node.elts]


def size_of(sizes: ast.expr, strides: ast.expr) -> Size:
    """How many elements a tensor of these sizes and strides takes."""
    shape = shape_of(sizes)
    count: Size = 1
    for n in shape:
        count = count * n
    steps = shape_of(strides)
    if not all(isinstance(n, int) for n in (*shape, *steps)) or not count:
        return count
    return max(count, 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)))


def concrete(shape: list[Size], values: Mapping[str, int]) -> tuple[int, ...] | None:
    """The sizes with numbers for symbols, or None if one is missing."""
    found = []
    for n in shape:
        if not isinstance(n, int):
            if any(s.name not in values for s in n.free_symbols):
                return None
            n = int(n.subs({s: values[s.name] for s in n.free_symbols}))
        found.append(n)
    return tuple(found)


class Results:
    """What the calls of a graph return, to find the dtype of a result by its operator and its sizes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._by_op: dict[str, list[list[Any]]] = {}
        self._by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._largest: dict[str, list[tuple[int, Size, str]]] = {}
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            values = list(value) if isinstance(value, (tuple, list)) else [value]
            if node.op == "call_function":
                self._by_op.setdefault(f"torch.ops.{node.target}", []).append(values)
            for v in values:
                if isinstance(v, torch.Tensor):
                    self._by_shape.setdefault(_hinted(v), []).append(v)

    def kind(self, call: str, part: int, sizes: ast.expr, values: Mapping[str, int]) -> tuple[torch.dtype, str]:
        """The dtype and the device type of result ``part`` of operator ``call`` with these sizes: as the graph has it;
        of an operator that is not in the graph, the widest dtype of any value of these sizes.

        Raises:
            ValueError: the graph has no such value.
        """
        shape = concrete(shape_of(sizes), values)
        if shape is None:
            raise ValueError(f"{ast.unparse(sizes)} has a size without a value")
        same = [v[part] for v in self._by_op.get(call, ()) if part < len(v) and isinstance(v[part], torch.Tensor)]
        found = [v for v in same if _hinted(v) == shape] or self._by_shape.get(shape, [])
        if not found:
            raise ValueError(f"the graph has no value of sizes {shape}, which {call} returns")
        widest = max(found, key=lambda v: v.dtype.itemsize)
        return widest.dtype, widest.device.type

    def others(self, call: str, known: Container[int]) -> Iterator[tuple[int, Size, str]]:
        """(index, bytes, device) of what ``call`` returns beside ``known``: the largest where calls differ."""
        if call not in self._largest:
            candidates = self._by_op.get(call, ())
            rows = range(max(map(len, candidates), default=0))
            tensors = [[v[i] for v in candidates if i < len(v) and isinstance(v[i], torch.Tensor)] for i in rows]
            largest = ((i, max(found, key=_weight)) for i, found in enumerate(tensors) if found)
            self._largest[call] = [(i, storage_bytes(v), v.device.type) for i, v in largest]
        return (row for row in self._largest[call] if row[0] not in known)


def _weight(value: torch.Tensor) -> int:
    return math.prod(_hinted(value)) * value.dtype.itemsize


def _hinted(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(compat.size_hint(n) for n in value.shape)
