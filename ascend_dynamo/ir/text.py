"""The stable text form of a graph: snapshots, diffs, logs, documents and errors all show this.

One line per node. Values are numbered in program order, whatever the nodes are called; parameters are ``%w0..``, other
inputs ``%x0..``, prologue inputs ``%p0..``; symbolic sizes are renamed ``s0..`` in order of appearance::

    %x0: i64[2, s0] = input
    %w0: bf16[896, 896] = param
    %0: bf16[2, s0, 896] = aten.linear(%x1, %w0)  # model.py:88
    return (%0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.ir.provenance import short_src

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def graph_text(graph: fx.GraphModule | GraphUnit, *, params: Iterable[str] = (), sources: bool = True) -> str:
    """The text form. ``params`` names the parameters (a ``GraphUnit`` brings its own); ``sources=False`` leaves the
    user's lines out."""
    if isinstance(graph, GraphUnit):
        params = graph.params
        graph = graph.gm
    return "\n".join(_Printer(graph, frozenset(params)).lines(sources))


def dtype_name(dtype: torch.dtype) -> str:
    """``bf16``, ``f32``, ``i64``, ...; dtypes without a short name keep torch's."""
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def op_name(target: Any) -> str:
    """``aten.linear``, ``aten.add.Tensor``, ``getitem``; the ``default`` overload is not shown."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


class _Printer:
    def __init__(self, gm: fx.GraphModule, params: frozenset[str]) -> None:
        self._gm = gm
        self._params = params
        self._names: dict[fx.Node, str] = {}
        self._symbols: dict[Any, Any] = {}
        self._counts: dict[str, int] = {}
        self._sizes: dict[Any, str] = {}
        self._targets: dict[int, str] = {}  # by id: hashing an overload is slow

    def lines(self, sources: bool) -> list[str]:
        result = []
        for node in self._gm.graph.nodes:
            if node.op == "output":
                args = node.args[0] if isinstance(node.args[0], (tuple, list)) else node.args
                result.append(f"return ({', '.join(map(self._arg, args))})")
                continue
            name = self._name(node)
            line = f"{name}: {self._value(node.meta.get('val'))} = {self._body(node)}"
            where = short_src(node) if sources and node.op != "placeholder" else ""
            result.append(f"{line}  # {where}" if where else line)
        return result

    def _name(self, node: fx.Node) -> str:
        prefix = ""
        if node.op == "placeholder":
            prefix = "p" if PROLOGUE in node.meta else "w" if self._is_param(node) else "x"
        number = self._counts.get(prefix, 0)
        self._counts[prefix] = number + 1
        self._names[node] = name = f"%{prefix}{number}"
        return name

    def _is_param(self, node: fx.Node) -> bool:
        return node.name in self._params or node.target in self._params

    def _body(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            made = node.meta.get(PROLOGUE)
            return f"prologue {made[0]}" if made else "param" if self._is_param(node) else "input"
        if node.op == "get_attr":
            return f"const {self._constant(node)}"
        target = self._targets.get(id(node.target))
        if target is None:
            target = op_name(node.target) if node.op == "call_function" else f"{node.op} {node.target}"
            self._targets[id(node.target)] = target
        args = [self._arg(a) for a in node.args]
        if node.kwargs:
            args += [f"{k}={self._arg(a)}" for k, a in sorted(node.kwargs.items())]
        return f"{target}({', '.join(args)})"

    def _constant(self, node: fx.Node) -> str:
        value: Any = self._gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if not isinstance(value, torch.Tensor) or compat.is_fake(value) or value.is_meta:
            return type(value).__name__
        with compat.no_dispatch_modes():
            if value.numel() == 1:
                return repr(value.item())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return "sha256:" + hashlib.sha256(data).hexdigest()[:12]

    def _arg(self, a: Any) -> str:
        if type(a) is fx.Node:
            return self._names[a]
        if type(a) is int:
            return str(a)
        if isinstance(a, (list, tuple)):
            return f"[{', '.join(map(self._arg, a))}]"
        if isinstance(a, torch.dtype):
            return dtype_name(a)
        if isinstance(a, (torch.memory_format, torch.layout)):
            return str(a).removeprefix("torch.")
        if isinstance(a, fx.GraphModule):
            return "graph"
        if isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(a)
        if isinstance(a, str):
            return repr(a)
        return str(a)

    def _value(self, val: Any) -> str:
        if isinstance(val, torch.Tensor):
            return f"{dtype_name(val.dtype)}[{', '.join([self._size(s) for s in val.shape])}]"
        if isinstance(val, (list, tuple)):
            return f"({', '.join(map(self._value, val))})"
        if isinstance(val, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"sym {self._size(val)}"
        return "none" if val is None else type(val).__name__

    def _size(self, size: Any) -> str:
        if type(size) is int:
            return str(size)
        e = compat.sym_expr(size)
        key = (type(e), e)  # True is not 1
        found = self._sizes.get(key)
        if found is None:
            self._sizes[key] = found = self._expression(e)
        return found

    def _expression(self, e: Any) -> str:
        if not isinstance(e, sympy.Basic):
            return str(e)
        if not e.free_symbols <= self._symbols.keys():
            for symbol in sorted(e.free_symbols - self._symbols.keys(), key=str):
                prefix = "u" if str(symbol).startswith("u") else "s"
                number = self._counts.get("sym_" + prefix, 0)
                self._counts["sym_" + prefix] = number + 1
                self._symbols[symbol] = sympy.Symbol(f"{prefix}{number}", integer=True, positive=True)
        return str(e.xreplace(self._symbols))
