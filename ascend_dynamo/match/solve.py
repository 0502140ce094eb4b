"""Solving the literals that vary between samples as expressions of the pattern's sizes and scalars.

The grammar is small on purpose: what it cannot say is an error that names the literal, not a guess.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ascend_dynamo.match.terms import Expr, Form, Spread

Env = Mapping[str, Any]  # sizes by name; "*B" is a tuple, "len_B" and "numel_B" describe it
_FACTORS = (2, 3, 4, 8, -1)


def solve_int(values: Sequence[int], envs: Sequence[Env]) -> Expr | None:
    """The first expression of the grammar that gives ``values[i]`` in ``envs[i]`` for every sample."""
    if len(set(values)) == 1:
        return Expr(str(values[0]))
    names = [n for n in envs[0] if not n.startswith("*")]
    for text in _integer_texts(names, values, envs):
        expr = Expr(text)
        if all(expr(env) == v for env, v in zip(envs, values, strict=True)):
            return expr
    return None


def _integer_texts(names: Sequence[str], values: Sequence[int], envs: Sequence[Env]) -> Iterator[str]:
    yield from names
    for n in names:
        for k in _FACTORS:
            yield f"{k} * {n}"
        for k in (2, 3, 4, 8):
            yield f"{n} // {k}"
            yield f"{n} - {n} // {k}"
    for n in names:
        for k in (1, *_FACTORS):
            offset = values[0] - k * envs[0][n]
            yield f"{n if k == 1 else f'{k} * {n}'} {'+' if offset >= 0 else '-'} {abs(offset)}"
    for r in (2, 3, 4):
        for group in itertools.combinations(names, r):
            yield " * ".join(group)
            yield " + ".join(group)
    for a, b in itertools.permutations(names, 2):
        yield f"{a} // {b}"
        yield f"{a} - {b}"
        yield f"2 * {a} * {b}"
        yield f"{a} + 2 * {b}"
    for a, b, c in itertools.permutations(names, 3):
        if a < b:
            yield f"{a} * {b} // {c}"
            yield f"({a} + {b}) * {c}"
        yield f"({a} + 2 * {b}) * {c}"
        if b < c:
            yield f"{a} // ({b} * {c})"


def solve_sizes(lists: Sequence[Sequence[int]], envs: Sequence[Env]) -> tuple[Any, ...] | None:
    """A list of integers per sample as expressions, with at most one run of leading axes (sizes or positions)."""
    spreads = [n for n in envs[0] if n.startswith("*")]
    if len({len(values) for values in lists}) == 1:
        flat = [solve_int(column, envs) for column in zip(*lists, strict=True)]
        if all(e is not None for e in flat):
            return tuple(flat)
    for name in spreads:
        for positions in (False, True):
            found = _with_spread(lists, envs, name, positions)
            if found is not None:
                return found
    return None


def _with_spread(
    lists: Sequence[Sequence[int]], envs: Sequence[Env], name: str, positions: bool
) -> tuple[Any, ...] | None:
    runs = [tuple(range(len(env[name]))) if positions else tuple(env[name]) for env in envs]
    rest = {len(values) - len(run) for values, run in zip(lists, runs, strict=True)}
    if len(rest) != 1 or (count := rest.pop()) < 0:
        return None
    for start in range(count + 1):
        pairs = list(zip(lists, runs, strict=True))
        if not all(tuple(v[start : start + len(run)]) == run for v, run in pairs):
            continue
        outside = [[*v[:start], *v[start + len(run) :]] for v, run in pairs]
        solved = [solve_int(column, envs) for column in zip(*outside, strict=True)] if count else []
        if all(e is not None for e in solved):
            return (*solved[:start], Spread(name[1:], positions), *solved[start:])
    return None


def _forms(name: str) -> tuple[Form, ...]:
    return (
        Form(name, name, lambda s: s, lambda v: v),
        Form(name, f"-{name}", lambda s: -s, lambda v: -v),
        Form(name, f"1/{name}", lambda s: 1 / s, lambda v: 1 / v, positive=True),
        Form(name, f"{name}**2", lambda s: s * s, math.sqrt, positive=True),
        Form(name, f"sqrt({name})", math.sqrt, lambda v: v * v, positive=True),
        Form(name, f"1/sqrt({name})", lambda s: 1 / math.sqrt(s), lambda v: 1 / (v * v), positive=True),
    )


def close(a: float, b: float) -> bool:
    """Equal up to the rounding of one or two float64 operations."""
    return a == b or abs(a - b) <= 4e-15 * max(abs(a), abs(b))


def solve_scalar(
    values: Sequence[float], scalars: Sequence[Mapping[str, float]], envs: Sequence[Env]
) -> Form | Expr | None:
    """A float that follows a scalar variable (or a size: 1/sqrt(D)) in every sample, else None."""
    for name in scalars[0]:
        for form in _forms(name):
            if form.positive and not all(s[name] > 0 for s in scalars):
                continue
            if all(close(form.forward(s[name]), v) for s, v in zip(scalars, values, strict=True)):
                return form
    if len(set(values)) == 1:
        return None
    for name in envs[0]:
        if name.startswith("*"):
            continue
        for text in (f"{name} ** -0.5", f"{name} ** 0.5", f"1.0 / {name}", f"1.0 * {name}", f"{name} ** -0.25"):
            expr = Expr(text)
            if all(env[name] > 0 and close(expr(env), v) for env, v in zip(envs, values, strict=True)):
                return expr
    return None
