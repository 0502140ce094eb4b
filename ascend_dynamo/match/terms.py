"""The compiled form of a pattern: a small term graph whose arguments are variables, literals and solved holes.

A ``Call`` mirrors one call of the normal form. Its arguments are ``Arg`` values, told apart by ``kind`` (an int,
because the matcher switches on it in its inner loop).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

CALL, VAR, LITERAL, LIST, SIZE, SIZES, SCALAR, DTYPE, DEVICE, SKIP = range(10)


_NAME = re.compile(r"[A-Za-z_]\w*")


class Expr:
    """A number as a function of the sizes: ``text`` is Python over their names; ``name`` if it is just one of them."""

    __slots__ = ("code", "name", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.name = text if text.isidentifier() else None
        self.code = compile(text, f"<size {text}>", "eval")

    def names(self) -> frozenset[str]:
        return frozenset(_NAME.findall(self.text))

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        return eval(self.code, {"__builtins__": {}}, sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Spread:
    """A run of axes inside a list of sizes: the sizes of ``*B``, or with ``positions`` their indices 0..n-1."""

    name: str
    positions: bool = False

    def __repr__(self) -> str:
        return f"range(*{self.name})" if self.positions else f"*{self.name}"


@dataclass(frozen=True)
class Form:
    """A scalar variable as it appears in a graph: ``text`` such as ``1/eps``, with the way there and back."""

    name: str
    text: str
    forward: Callable[[float], float] = field(compare=False)
    inverse: Callable[[float], float] = field(compare=False)
    positive: bool = False  # only holds (and is only inverted) for positive numbers

    def __str__(self) -> str:
        return self.text


class Arg:
    """One argument of a pattern call.

    ``data`` by kind: CALL the ``Call``; VAR the index of an input; LITERAL the value; LIST a tuple of Args; SIZE an
    ``Expr``; SIZES a tuple of ``Expr`` and at most one ``Spread``; SCALAR a ``Form``; DTYPE, DEVICE, SKIP nothing.
    """

    __slots__ = ("data", "kind")

    def __init__(self, kind: int, data: Any = None) -> None:
        self.kind = kind
        self.data = data

    def __repr__(self) -> str:
        if self.kind == CALL:
            return f"%{self.data.index}"
        if self.kind == LIST:
            return "[" + ", ".join(map(repr, self.data)) + "]"
        if self.kind == SIZES:
            return "[" + ", ".join(map(str, self.data)) + "]"
        if self.kind == VAR:
            return f"${self.data}"
        return {DTYPE: "T", DEVICE: "device", SKIP: "_"}.get(self.kind, str(self.data))


class Call:
    """A pattern node: ``op`` on ``args``; ``shape`` is the expected output shape where the arguments only say that.

    ``literals`` and ``rest`` are the arguments as the matcher walks them: literals first, since they are cheap; the
    rest from the last on, because it is pushed on a stack. The two operands of a commutative call are in neither.
    """

    __slots__ = ("args", "arity", "commutes", "index", "literals", "op", "rest", "result", "shape")

    def __init__(self, index: int, op: Any, args: tuple[Arg, ...], shape: tuple[Any, ...] | None, commutes: bool):
        self.index = index
        self.op = op
        self.args = args
        self.shape = shape
        self.commutes = commutes
        self.result: tuple[Arg, tuple[Any, ...]] | None = None  # dtype and shape of a call to be made, if solved
        # What the matcher walks: literals first, since they are cheap; the rest from the last argument on, because
        # it is pushed on a stack; the two operands of a commutative call are neither.
        start = 2 if commutes else 0
        self.arity = len(args)
        self.literals = tuple((i, a.data) for i, a in enumerate(args) if i >= start and a.kind == LITERAL)
        self.rest = tuple(
            (i, a) for i, a in reversed(list(enumerate(args))) if i >= start and a.kind not in (LITERAL, SKIP)
        )

    def __repr__(self) -> str:
        shape = "" if self.shape is None else " -> [" + ", ".join(map(str, self.shape)) + "]"
        return f"%{self.index} = {self.op}({', '.join(map(repr, self.args))}){shape}"

    def children(self) -> tuple[Call, ...]:
        """Calls among the arguments, looking into lists."""
        found: list[Call] = []
        for a in self.args:
            for item in a.data if a.kind == LIST else (a,):
                if item.kind == CALL:
                    found.append(item.data)
        return tuple(found)


@dataclass(frozen=True)
class Input:
    """A tensor input: its name, its shape as sizes and at most one Spread, its dtype (None: the pattern's T)."""

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Route:
    """How to reach another root from what is bound: start at an input or call, then go up through users."""

    from_input: bool
    start: int
    up: tuple[Call, ...]


@dataclass(eq=False)
class Alternative:
    """One structure of one spelling: what to find, and the calls to put in its place.

    ``dtypes`` and ``ranks`` (number of axes of each spread; missing: any) and ``fixed`` (sizes that are 1 here) guard
    it. ``roots[0]`` is the anchor; ``routes`` lead to the others. ``outputs`` and ``new_outputs`` are Args.
    """

    spelling: int
    inputs: tuple[Input, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Arg, ...]
    new_calls: tuple[Call, ...]
    new_outputs: tuple[Arg, ...]
    roots: tuple[Call, ...]
    routes: tuple[Route, ...]
    dtypes: frozenset[torch.dtype]
    ranks: Mapping[str, int] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)  # choices, and None for inputs that it lacks
    float_sizes: frozenset[str] = field(init=False)  # sizes from which the replacement computes floating-point numbers
    height: int = field(init=False)  # calls on the longest way down
    ops: frozenset[int] = field(init=False)  # ids of its operators (overloads live as long as the process)
    paths: tuple[tuple[int, ...], ...] = field(init=False)  # ids of one, two and three operators down from the anchor

    def __post_init__(self) -> None:
        exprs = [a.data for c in self.new_calls for a in c.args if a.kind == SIZE]
        self.float_sizes = frozenset(n for e in exprs if "." in e.text or "**" in e.text for n in e.names())
        self.height = max(map(_height, self.roots))
        self.ops = frozenset(id(c.op) for c in self.calls)
        self.paths = tuple(dict.fromkeys(_paths(self.roots[0])))

    @property
    def anchor(self) -> Any:
        return self.roots[0].op

    def __str__(self) -> str:
        names = ", ".join(f"{i.name}[{', '.join(map(str, i.shape))}]" for i in self.inputs)
        lines = [f"spelling {self.spelling}({names})", *map(repr, self.calls), f"return {self.outputs}", "=>"]
        return "\n".join([*lines, *map(repr, self.new_calls), f"return {self.new_outputs}"])


def _height(call: Call) -> int:
    return 1 + max(map(_height, call.children()), default=0)


def _paths(root: Call) -> Iterator[tuple[int, ...]]:
    op = id(root.op)
    yield (op,)
    for child in root.children():
        yield (op, id(child.op))
        for grand in child.children():
            yield (op, id(child.op), id(grand.op))
