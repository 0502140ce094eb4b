"""Sets of patterns as values: they compose, filter, order themselves, and have a digest for cache keys."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import networkx as nx

from ascend_dynamo.contracts import Pattern
from ascend_dynamo.errors import PatternError

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Registry:
    """An immutable set of patterns with unique names, in order of declaration.

    Raises PatternError if two patterns have the same name, or if their before/after relations have a cycle.
    """

    def __init__(self, patterns: Iterable[Pattern] = ()) -> None:
        found: dict[str, Pattern] = {}
        for p in patterns:
            name = getattr(p, "name", None)
            if not isinstance(name, str) or not name:
                raise PatternError(f"{p!r} is not a pattern: it has no name")
            if name in found and found[name] is not p:
                raise PatternError(
                    f'two patterns are named "{name}": rename one, or leave one out by .without("{name}")'
                )
            found[name] = p
        self._patterns = found
        self._strata = _strata(tuple(found.values()))

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self._patterns.values())

    def __len__(self) -> int:
        return len(self._patterns)

    def __contains__(self, name: object) -> bool:
        return name in self._patterns

    def __getitem__(self, name: str) -> Pattern:
        return self._patterns[name]

    def __add__(self, other: Iterable[Pattern]) -> Registry:
        return Registry((*self, *other))

    def __repr__(self) -> str:
        return f"Registry({', '.join(self._patterns)})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._patterns)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Name -> the patterns it speaks for: its own pattern, and for a dialect op all that emit it."""
        found: dict[str, list[str]] = {}
        for p in self:
            ops = {op.removeprefix("ascend.") for op in p.emits if op.startswith("ascend.")}
            for name in {p.name, *ops}:
                found.setdefault(name, []).append(p.name)
        return {name: tuple(members) for name, members in found.items()}

    def without(self, *names: str) -> Registry:
        """All patterns but these; an unknown name is a PatternError."""
        self._check(names)
        return Registry(p for p in self if p.name not in names)

    def only(self, *names: str) -> Registry:
        """Just these patterns, in their order here; an unknown name is a PatternError."""
        self._check(names)
        return Registry(p for p in self if p.name in names)

    def precedence(self) -> dict[str, tuple[int, int, int, int]]:
        """The order in which patterns are tried: before/after first, then level, benefit, order of declaration."""
        return {p.name: (self._strata[p.name], p.level, -p.benefit, i) for i, p in enumerate(self)}

    def digest(self) -> str:
        """A hex digest of what the patterns do: sources of match, rewrite, spellings and domain, and versions."""
        h = hashlib.sha256()
        for p in self:
            for part in _parts(p):
                h.update(part.encode())
                h.update(b"\0")
        return h.hexdigest()

    def _check(self, names: Iterable[str]) -> None:
        for n in names:
            if n not in self._patterns:
                raise PatternError(f'there is no pattern "{n}"; there are: {", ".join(self._patterns)}')


def _strata(patterns: tuple[Pattern, ...]) -> dict[str, int]:
    graph = nx.DiGraph()
    names = {p.name for p in patterns}
    graph.add_nodes_from(p.name for p in patterns)
    for p in patterns:
        graph.add_edges_from((p.name, other) for other in sorted(p.before) if other in names)
        graph.add_edges_from((other, p.name) for other in sorted(p.after) if other in names)
    try:
        return {n: i for i, generation in enumerate(nx.topological_generations(graph)) for n in generation}
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(a for a, _ in nx.find_cycle(graph))
        raise PatternError(f"the before/after relations of the patterns have a cycle: {cycle}") from None


def _parts(p: Pattern) -> Iterator[str]:
    yield f"{p.name} v{p.version} O{p.level} {p.benefit} {p.users} {sorted(p.before)} {sorted(p.after)}"
    yield _describe(p.domain.dims) + _describe(p.domain.shapes) + str(p.domain.dtypes)
    signature = getattr(p, "signature", None)
    if signature is not None:
        yield _describe(signature.scalars) + _describe(signature.choices) + _describe(signature.dtypes)
    functions: list[Any] = [*p.eager, p.domain.requires, getattr(p, "replace", None)]
    if signature is None:
        functions.append(type(p))
        yield from _package_sources(type(p).__module__)
    for fn in functions:
        if fn is not None:
            yield source_of(fn)


def _package_sources(module: str) -> Iterator[str]:
    """The files of the package that a procedural pattern lives in: its class calls helpers from there."""
    parts = module.split(".")
    package = sys.modules.get(".".join(parts[: 2 if parts[0] == "ascend_dynamo" else 1]))
    file = getattr(package, "__file__", None)
    if file is None:
        return
    path = Path(file)
    for source in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
        yield source.read_text(encoding="utf-8")


def _describe(value: Any) -> str:
    return repr(sorted(value.items(), key=lambda kv: str(kv[0]))) if isinstance(value, dict) else repr(value)


def source_of(thing: Any) -> str:
    """The text of a function or class and of what it closes over; bytecode where there is no text."""
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        text = repr((code.co_code, code.co_names, _constants(code))) if code else repr(thing)
    closure = getattr(thing, "__closure__", None) or ()
    cells = [c.cell_contents for c in closure]
    held = [source_of(c) if inspect.isfunction(c) else repr(c) for c in cells if c is not thing]
    # Default representations end in an address, which differs from process to process.
    return _ADDRESS.sub("", "\n".join([text, *held, repr(getattr(thing, "__defaults__", None))]))


def _constants(code: types.CodeType) -> list[Any]:
    return [repr(_constants(c)) if isinstance(c, types.CodeType) else c for c in code.co_consts]
