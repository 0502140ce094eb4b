"""Lifetimes of the program that Inductor wrote: what really allocates, after fusion and buffer reuse.

Inductor's wrapper is straight-line Python: ``buf0 = empty_strided_cpu(sizes, strides, dtype)``, calls of kernels,
``buf1 = buf0; del buf0  # reuse``, ``del``, ``return``. Its text is kept with the compiled graph, also where Inductor's
cache had it, so it is read with ``ast`` and followed name by name, as Python's reference counts would. A statement that
is not known makes the program unreadable: then the FX graph is the prediction, an upper bound.
"""

from __future__ import annotations

import ast
import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_dynamo.ir.effects import effects_of
from ascend_dynamo.ir.provenance import src_of_trace
from ascend_dynamo.memory.lifetimes import Lifetime, Liveness, Symbol
from ascend_dynamo.memory.liveness import symbols_of
from ascend_dynamo.memory.written_sizes import Results, size_of

_EMPTY = "empty_strided"
_SILENT = ("assert_size_stride", "assert_alignment", "check_memory_step", "run_intermediate_hooks")
_ALIASES = {"aten": "torch.ops.aten", "inductor_ops": "torch.ops.inductor", "_quantized": "torch.ops._quantized"}


class UnreadableProgramError(Exception):
    """The program has a statement whose effect on memory is not known; the message holds it."""


@dataclass
class _Storage:
    """An allocation on its way: ``sizes`` are unknown until an assertion of the program tells them."""

    name: str
    start: int
    op: str
    line: int
    bytes: Any = None
    device: str = "cpu"
    names: set[str] = field(default_factory=set)
    output: bool = False
    parts: dict[int, _Storage] = field(default_factory=dict)
    call: str = ""
    part: int = 0


def read_program(source: str, gm: fx.GraphModule, linemap: Sequence[tuple[int, str]] = ()) -> Liveness:
    """The lifetimes of Inductor's program ``source`` for the graph ``gm``; ``linemap`` tells the user's stack by line.

    Sizes of what opaque operators return come from the program's own assertions, dtypes from ``gm``. What a kernel
    allocates for itself is not seen.

    Raises:
        UnreadableProgramError: the program is not of the known form.
    """
    try:
        return _Reader(source, gm, linemap).run()
    except (SyntaxError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UnreadableProgramError(f"{type(error).__name__}: {error}") from error


class _Reader:
    def __init__(self, source: str, gm: fx.GraphModule, linemap: Sequence[tuple[int, str]]) -> None:
        outer = ast.parse(source).body
        bodies = [outer, *(c.body for c in outer if isinstance(c, ast.ClassDef))]
        calls = [f for body in bodies for f in body if isinstance(f, ast.FunctionDef) and f.name == "call"]
        if len(calls) != 1:
            raise UnreadableProgramError(f"it has {len(calls)} functions named call instead of 1")
        self.body = calls[0].body
        self.text = source.encode().split(b"\n")  # columns count bytes
        self.sizes: dict[str, Any] = {}  # by spelling: layers repeat the same ones
        self.kinds: dict[Any, tuple[torch.dtype, str]] = {}
        self.given = symbols_of(gm)
        self.results = Results(gm)
        self.lines = [line for line, _ in linemap]
        self.traces = [trace for _, trace in linemap]
        self.inputs: dict[str, int] = {}
        self.env: dict[str, _Storage] = {}
        self.symbols: dict[str, Symbol] = {}
        self.done: list[Lifetime] = []
        self.labels: list[str] = []

    def run(self) -> Liveness:
        for statement in self.body:
            self._statement(statement)
        return Liveness(
            tuple(sorted(self.done, key=lambda x: (x.start, x.id))),
            len(self.labels),
            tuple(self.symbols.values()),
            "inductor",
            labels=tuple(self.labels),
        )

    def _statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign) and len(s.targets) == 1:
            self._assign(s.targets[0], s.value, s.lineno)
        elif isinstance(s, ast.Delete):
            for target in s.targets:
                self._drop(_name(target))
        elif isinstance(s, ast.Expr) and isinstance(s.value, ast.Call):
            self._call(s.value)
        elif isinstance(s, ast.With):
            for inner in s.body:
                self._statement(inner)
        elif isinstance(s, ast.Return):
            self._finish(s)
        elif not isinstance(s, (ast.Pass, ast.Import, ast.ImportFrom, ast.Assert)) and not _only_raises(s):
            raise UnreadableProgramError(ast.unparse(s).splitlines()[0])

    def _assign(self, target: ast.expr, value: ast.expr, line: int) -> None:
        if isinstance(value, ast.Name) and value.id == "args":
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            self.inputs = {_name(t): i for i, t in enumerate(targets)}
            return
        name = _name(target)
        self._drop(name)
        if isinstance(value, ast.Constant):
            return  # "buf0 = None" lets go of what the name held
        if isinstance(value, ast.Name):
            self._alias(name, value.id)
        elif isinstance(value, ast.Subscript) and _name(value.value) in self.env:
            self._bind(name, self._part(self.env[_name(value.value)], ast.literal_eval(value.slice)))
        elif isinstance(value, ast.Call):
            self._assign_call(name, value, line)
        elif name.startswith("buf"):
            raise UnreadableProgramError(f"{name} = {ast.unparse(value)}")

    def _alias(self, name: str, source: str) -> None:
        if source in self.env:
            self._bind(name, self.env[source])
        elif source in self.inputs and not name.startswith("buf"):
            given = next((g for g in self.given if g.index == self.inputs[source]), None)
            self.symbols[name] = Symbol(
                name,
                self.inputs[source],
                None,
                *((given.hint, given.low, given.high, given.source) if given and given.dim is None else ()),
            )
        elif source in self.inputs:
            self.inputs[name] = self.inputs[source]

    def _assign_call(self, name: str, call: ast.Call, line: int) -> None:
        target = self._spelled(call.func)
        if target.startswith(("empty_strided", "torch.empty_strided")):
            device = target.removeprefix("empty_strided").strip("_") or "cpu"
            made = _Storage(name, len(self.labels), _EMPTY, line, device=device)
            dtype = _dtype(call.args[2] if len(call.args) > 2 else _keyword(call, "dtype"))
            made.bytes = self._elements(call.args[0], call.args[1]) * dtype.itemsize
            self._step(f"{name} = {target}")
            self._bind(name, made)
            return
        if target in ("reinterpret_tensor", "alloc_from_pool"):
            self._alias(name, _name(call.args[0]))
            return
        op = operator_of(target)
        if not name.startswith("buf") or (op is not None and not op._schema.returns):
            self._step(target)  # a number that is read from a tensor, or nothing
            return
        start = len(self.labels)
        self._step(target)
        views = _views(op, call)
        if views is not None:
            self._alias(name, views)
            return
        self._bind(name, _Storage(name, start, _ALIASES.get(target, target), line, call=_full(target)))

    def _call(self, call: ast.Call) -> None:
        target = self._spelled(call.func)
        if target == "assert_size_stride":
            name = _name(call.args[0])
            if name in self.env:
                self._learn(self.env[name], call.args[1], call.args[2])
        elif target not in _SILENT and target != "args.clear":
            self._step(target)
            for argument in call.args:
                if isinstance(argument, ast.Name) and argument.id in self.env and self.env[argument.id].op == _EMPTY:
                    self.env[argument.id].op = target  # who writes it first

    def _learn(self, storage: _Storage, sizes: ast.expr, strides: ast.expr) -> None:
        if storage.bytes is None:
            key = (storage.call, storage.part, self._spelled(sizes))
            if key not in self.kinds:
                values = {s.name: s.hint for s in self.symbols.values() if s.hint is not None}
                self.kinds[key] = self.results.kind(storage.call, storage.part, sizes, values)
            dtype, storage.device = self.kinds[key]
            storage.bytes = self._elements(sizes, strides) * dtype.itemsize

    def _elements(self, sizes: ast.expr, strides: ast.expr) -> Any:
        key = f"{self._spelled(sizes)} {self._spelled(strides)}"
        if key not in self.sizes:
            self.sizes[key] = size_of(sizes, strides)
        return self.sizes[key]

    def _spelled(self, node: ast.expr) -> str:
        """The node's own text."""
        if node.lineno != node.end_lineno:
            return ast.unparse(node)
        return self.text[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    def _part(self, whole: _Storage, index: int) -> _Storage:
        if index not in whole.parts:
            name = f"{whole.name}[{index}]"
            whole.parts[index] = _Storage(
                name, whole.start, whole.op, whole.line, names={whole.name}, call=whole.call, part=index
            )
        return whole.parts[index]

    def _bind(self, name: str, storage: _Storage) -> None:
        self.env[name] = storage
        storage.names.add(name)

    def _drop(self, name: str) -> None:
        storage = self.env.pop(name, None)
        if storage is None:
            self.inputs.pop(name, None)
            return
        storage.names.discard(name)
        if storage.names:
            return
        if storage.bytes is None:
            self._close_parts(storage)
        else:
            self._close(storage)

    def _close_parts(self, whole: _Storage) -> None:
        """The results of an operator that returns several: those that nobody looked at end with the tuple of them."""
        rest = list(self.results.others(whole.call, whole.parts))
        if not rest and not whole.parts:
            raise UnreadableProgramError(f"nothing tells the size of {whole.name}, which {whole.op} made")
        for i, size, device in rest:
            self._close(_Storage(f"{whole.name}[{i}]", whole.start, whole.op, whole.line, size, device))
        for part in whole.parts.values():
            part.names.discard(whole.name)
            if not part.names:
                self._close(part)

    def _close(self, storage: _Storage) -> None:
        if storage.bytes is None:
            raise UnreadableProgramError(f"nothing tells the size of {storage.name}, which {storage.op} made")
        at = bisect.bisect_right(self.lines, storage.line) - 1
        src = src_of_trace(self.traces[at]) if at >= 0 else None
        self.done.append(
            Lifetime(
                storage.name,
                storage.start,
                len(self.labels),
                storage.bytes,
                storage.op,
                src,
                output=storage.output,
                device=storage.device,
            )
        )

    def _finish(self, s: ast.Return) -> None:
        for node in ast.walk(s) if s.value is not None else ():
            if isinstance(node, ast.Name) and node.id in self.env:
                self.env[node.id].output = True
        for name in list(self.env):
            self._drop(name)

    def _step(self, label: str) -> None:
        self.labels.append(label)


def _only_raises(s: ast.stmt) -> bool:
    """A check of the program's: ``if not (u0 >= 0): raise ...``."""
    return isinstance(s, ast.If) and not s.orelse and all(isinstance(x, ast.Raise) for x in s.body)


def _views(op: Any, call: ast.Call) -> str | None:
    """The name of the argument that the result of an operator shares its memory with, if it does."""
    positions = [] if op is None else [v for v in effects_of(op).views if isinstance(v, int) and v < len(call.args)]
    return next((n.id for p in positions for n in ast.walk(call.args[p]) if isinstance(n, ast.Name)), None)


def operator_of(target: str) -> Any:
    """The operator overload that a dotted name stands for, or None."""
    name = _full(target)
    if not name.startswith("torch.ops."):
        return None
    found: Any = torch.ops
    for part in name.split(".")[2:]:
        found = getattr(found, part)
    return found if isinstance(found, torch._ops.OpOverload) else None


def _full(target: str) -> str:
    head, _, rest = target.partition(".")
    return f"{_ALIASES[head]}.{rest}" if head in _ALIASES else target


def _name(node: ast.expr) -> str:
    if not isinstance(node, ast.Name):
        raise UnreadableProgramError(f"{ast.unparse(node)} where a name was expected")
    return node.id


def _keyword(call: ast.Call, name: str) -> ast.expr:
    return next(k.value for k in call.keywords if k.arg == name)


def _dtype(node: ast.expr) -> torch.dtype:
    found = getattr(torch, ast.unparse(node).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise UnreadableProgramError(f"{ast.unparse(node)} is no dtype")
    return found
