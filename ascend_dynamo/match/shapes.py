"""Unifying the declared sizes of a pattern with the sizes of a graph, which may be symbolic. Never adds a guard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ascend_dynamo.contracts import Facts
from ascend_dynamo.match.solve import close
from ascend_dynamo.match.terms import Expr, Spread

_MULTIPLE = re.compile(r"\s*(?:(\d+)\s*\*\s*(\w+)|(\w+)\s*\*\s*(\d+))\s*\Z")


class Shapes:
    """The sizes bound so far: ``sizes["H"]`` a number or SymInt, ``sizes["*B"]`` a tuple of them."""

    __slots__ = ("expected", "facts", "found", "pending", "sizes")

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.sizes: dict[str, Any] = {}
        self.pending: list[tuple[Expr, Any]] = []
        self.expected = self.found = ""

    def save(self) -> tuple[dict[str, Any], int]:
        return dict(self.sizes), len(self.pending)

    def restore(self, saved: tuple[dict[str, Any], int]) -> None:
        self.sizes = dict(saved[0])
        del self.pending[saved[1] :]

    def note(self) -> str:
        """The sizes known so far, for messages."""
        known = ", ".join(f"{k} = {v}" for k, v in self.sizes.items())
        return f" with {known}" if known else ""

    def eq(self, a: Any, b: Any) -> bool:
        """True if two sizes are known to be equal."""
        if type(a) is int and type(b) is int:
            return a == b
        return a is b or self.facts.known(a == b)

    def unify(self, wanted: tuple[Any, ...], shape: Sequence[Any]) -> bool:
        """Match a declared shape with a tensor's; binds names that are still free."""
        spread = next((i for i, w in enumerate(wanted) if isinstance(w, Spread)), None)
        if spread is None:
            return len(wanted) == len(shape) and all(map(self.size, wanted, shape))
        run = len(shape) - len(wanted) + 1
        if run < 0:
            return False
        after = spread + run
        return (
            all(map(self.size, wanted[:spread], shape[:spread]))
            and all(map(self.size, wanted[spread + 1 :], shape[after:]))
            and self.run("*" + wanted[spread].name, tuple(shape[spread:after]))
        )

    def run(self, name: str, given: tuple[Any, ...]) -> bool:
        known = self.sizes.get(name)
        if known is None:
            self.sizes[name] = given
            return True
        return len(known) == len(given) and all(map(self.eq, known, given))

    def size(self, wanted: Expr, given: Any) -> bool:
        name = wanted.name
        if name is None:
            if wanted.text.isdigit():
                return self.eq(int(wanted.text), given)
            self.pending.append((wanted, given))
            return True
        known = self.sizes.get(name)
        if known is None:
            self.sizes[name] = given
            return True
        return self.eq(known, given)

    def settle(self, fixed: Iterable[str], dims: Mapping[str, tuple[int, int | None]]) -> bool:
        """Solve what is pending (``2*H`` against 64), then check sizes fixed at 1 and the declared bounds."""
        todo = list(self.pending)
        while todo:
            expr, given = todo.pop(0)
            free = [n for n in expr.names() if n not in self.sizes]
            if not free:
                if not self.eq(expr(self.sizes), given):
                    return self.refuse(f"a size {expr}{self.note()}", given)
                continue
            if len(free) == 1 and (found := _MULTIPLE.match(expr.text)) is not None:
                factor = int(found[1] or found[4])
                if not self.known(given % factor == 0):
                    return self.refuse(f"a size {expr}", given)
                self.sizes[free[0]] = given // factor
            elif any(n not in free for e, _ in todo for n in free if n not in e.names()) and todo:
                todo.append((expr, given))
            else:
                return self.refuse(f"a size {expr} that determines {', '.join(free)}", given)
        for name in fixed:
            if not self.eq(self.sizes.get(name, 1), 1):
                return self.refuse(f"{name} = 1 (as this form needs)", self.sizes[name])
        for name, (low, high) in dims.items():
            size = self.sizes.get(name)
            if size is None:
                continue
            if not self.known(size >= low) or (high is not None and not self.known(size <= high)):
                return self.refuse(f"{low} <= {name}" + ("" if high is None else f" <= {high}"), size)
        return True

    def known(self, relation: Any) -> bool:
        return relation if relation is True or relation is False else self.facts.known(relation)

    def refuse(self, expected: str, found: Any) -> bool:
        self.expected, self.found = expected, str(found)
        return False

    def same(self, wanted: Expr, given: Any, env: dict[str, Any]) -> bool:
        """True if ``given`` is the number that ``wanted`` says; binds a name that only occurs as a literal."""
        free = [n for n in wanted.names() if n not in env]
        if free:
            if wanted.name is None:
                return False
            self.sizes[wanted.name] = env[wanted.name] = given
            return True
        value = wanted(env)
        if isinstance(value, float) or isinstance(given, float):
            return type(value) in (int, float) and type(given) in (int, float) and close(value, given)
        return not isinstance(given, bool) and self.eq(value, given)

    def equal(self, wanted: tuple[Any, ...], given: Sequence[Any], env: dict[str, Any]) -> bool:
        """True if a list of sizes is what ``wanted`` says."""
        flat: list[Any] = []
        for item in wanted:
            if isinstance(item, Spread):
                run = env["*" + item.name]
                flat.extend(range(len(run)) if item.positions else run)
            else:
                flat.append(item)
        if len(flat) != len(given):
            return False
        return all(
            self.same(w, g, env) if isinstance(w, Expr) else self.eq(w, g) for w, g in zip(flat, given, strict=True)
        )
