"""From traces of one spelling on several samples to one ``Alternative``: literals stay or are solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.canonical import COMMUTATIVE, same_literal
from ascend_dynamo.match.samples import Sample, Signature
from ascend_dynamo.match.solve import solve_int, solve_scalar, solve_sizes
from ascend_dynamo.match.terms import (
    CALL,
    DEVICE,
    DTYPE,
    LIST,
    LITERAL,
    SCALAR,
    SIZE,
    SIZES,
    SKIP,
    VAR,
    Alternative,
    Arg,
    Call,
    Expr,
    Input,
    Route,
)
from ascend_dynamo.match.trace import SHAPED, Name, Ref, Traced, input_names


@dataclass(frozen=True)
class Observation:
    """One sample with both functions traced on it."""

    sample: Sample
    eager: Traced
    new: Traced


def anti_unify(
    label: str,
    spelling: int,
    signature: Signature,
    group: Sequence[Observation],
    absent: frozenset[str],
    dtypes: frozenset[torch.dtype],
) -> Alternative:
    """One alternative from observations of equal structure.

    Raises PatternError, naming the literal, if a literal varies and nothing in the grammar explains it.
    """
    first = group[0].sample
    names = input_names(signature, first, absent)
    inputs = tuple(
        Input(n, signature.shapes[_declared(signature, n)], signature.dtypes.get(_declared(signature, n)))
        for n in names
    )
    samples = [o.sample for o in group]
    calls, outputs = _Unifier(label, samples, names).run([o.eager for o in group])
    new_calls, new_outputs = _Unifier(f"{label}, replacement", samples, names).run([o.new for o in group], True)
    roots, routes = _roots(label, calls, outputs)
    ranks = {}
    for name in signature.spreads():
        seen = {len(s.sizes["*" + name]) for s in samples}
        if len(seen) == 1:
            ranks[name] = seen.pop()
    fixed = frozenset(n for n in first.ones if all(n in s.ones for s in samples))
    constants = {**first.choices, **dict.fromkeys(sorted(absent))}
    return Alternative(
        spelling, inputs, calls, outputs, new_calls, new_outputs, roots, routes, dtypes, ranks, fixed, constants
    )


def _declared(signature: Signature, name: str) -> str:
    return name if name in signature.shapes else str(signature.variadic)


class _Unifier:
    def __init__(self, label: str, samples: Sequence[Sample], names: tuple[str, ...]) -> None:
        self.label = label
        self.samples = samples
        self.envs = [{**s.env, **{k: v for k, v in s.scalars.items() if type(v) is int}} for s in samples]
        self.index = {n: i for i, n in enumerate(names)}
        self.made: list[Call] = []

    def run(self, traces: Sequence[Traced], results: bool = False) -> tuple[tuple[Call, ...], tuple[Arg, ...]]:
        for i, (op, _, shape) in enumerate(traces[0].calls):
            shaped = op in SHAPED
            columns = list(zip(*(t.calls[i][1] for t in traces), strict=True))
            made = tuple(
                Arg(SKIP) if shaped and k == 1 else self.arg(column, f"argument {k} of {op} (call {i})")
                for k, column in enumerate(columns)
            )
            out = None
            if shape is not None:
                shapes = [t.calls[i][2] or () for t in traces]
                out = self.sizes(shapes, f"the output shape of {op} (call {i})")
            commutes = op in COMMUTATIVE and all(a.kind == LITERAL and same_literal(a.data, 1) for a in made[2:])
            self.made.append(Call(i, op, made, out, commutes and len(made) >= 2 and repr(made[0]) != repr(made[1])))
            if results:
                self.made[-1].result = self.result([t.results[i] for t in traces])
        outputs = tuple(self.arg((o,) * len(traces), "output") for o in traces[0].outputs)
        return tuple(self.made), outputs

    def result(self, seen: Sequence[tuple[torch.dtype, tuple[int, ...]] | None]) -> Any:
        """Dtype and shape of a call in every sample, so that they need not be computed at each site; None: unknown."""
        known = [r for r in seen if r is not None]
        shape = solve_sizes([r[1] for r in known], self.envs) if len(known) == len(seen) else None
        if shape is None:
            return None
        try:
            return self.dtype([r[0] for r in known], "the dtype of a result"), shape
        except PatternError:
            return None

    def arg(self, values: Sequence[Any], where: str) -> Arg:
        v = values[0]
        if isinstance(v, Ref):
            return Arg(CALL, self.made[v.index])
        if isinstance(v, Name):
            return Arg(VAR, self.index[v.name])
        if isinstance(v, torch.dtype):
            return self.dtype(values, where)
        if isinstance(v, torch.device):
            return Arg(DEVICE)
        if isinstance(v, bool) or v is None or isinstance(v, str):
            return Arg(LITERAL, v)
        if isinstance(v, int):
            return self.integer(values, where)
        if isinstance(v, float):
            return self.floating(values, where)
        if isinstance(v, tuple):
            if all(isinstance(t, tuple) and all(type(x) is int for x in t) for t in values):
                if all(t == v for t in values):
                    return Arg(LITERAL, v)
                return Arg(SIZES, self.sizes(values, where))
            return Arg(LIST, tuple(self.arg(column, where) for column in zip(*values, strict=True)))
        return Arg(LITERAL, v)

    def sizes(self, values: Sequence[Sequence[int]], where: str) -> tuple[Any, ...]:
        found = solve_sizes(values, self.envs)
        if found is None:
            raise self.unsolved(values, where)
        return found

    def integer(self, values: Sequence[int], where: str) -> Arg:
        if len(set(values)) == 1:
            return Arg(LITERAL, values[0])
        found = solve_int(values, self.envs)
        if found is None:
            raise self.unsolved(values, where)
        return Arg(SIZE, found)

    def floating(self, values: Sequence[float], where: str) -> Arg:
        found = solve_scalar(values, [s.scalars for s in self.samples], [s.env for s in self.samples])
        if isinstance(found, Expr):
            return Arg(SIZE, found)
        if found is not None:
            return Arg(SCALAR, found)
        if all(same_literal(v, values[0]) for v in values):
            return Arg(LITERAL, values[0])
        raise self.unsolved(values, where)

    def dtype(self, values: Sequence[torch.dtype], where: str) -> Arg:
        own = [s.dtype for s in self.samples]
        if len(set(own)) > 1 and all(v == o for v, o in zip(values, own, strict=True)):
            return Arg(DTYPE)
        if all(v == values[0] for v in values):
            return Arg(LITERAL, values[0])
        raise self.unsolved(values, where)

    def unsolved(self, values: Sequence[Any], where: str) -> PatternError:
        cases = "; ".join(
            f"{v} at {dict(s.sizes)}{s.scalars or ''} {s.dtype}" for v, s in zip(values, self.samples, strict=True)
        )
        return PatternError(
            f"{self.label}: {where} varies and is no expression of the declared sizes and scalars: {cases}. "
            "Declare the value as a scalar or a choice, or give the size a name in domain.shapes"
        )


def _roots(label: str, calls: tuple[Call, ...], outputs: tuple[Arg, ...]) -> tuple[tuple[Call, ...], tuple[Route, ...]]:
    """The outputs that no other output contains, the one that covers most first, and routes to the others."""
    if not calls or not any(o.kind == CALL for o in outputs):
        raise PatternError(f"{label}: there is nothing to match: no call is left after normalisation")
    wanted = list(dict.fromkeys(o.data for o in outputs if o.kind == CALL))
    below = {c: _below(c) for c in wanted}
    tops = [c for c in wanted if not any(c in below[d] for d in wanted if d is not c)]
    tops.sort(key=lambda c: -len(below[c]))
    bound, names = set(below[tops[0]]), _inputs_of(below[tops[0]])
    routes: list[Route] = []
    rest = tops[1:]
    while rest:
        found = next(((t, r) for t in rest if (r := _route(t, below[t], bound, names)) is not None), None)
        if found is None:
            raise PatternError(f"{label}: the outputs share neither an input nor a call; they are separate patterns")
        top, route = found
        routes.append(route)
        rest.remove(top)
        bound.update(below[top])
        names |= _inputs_of(below[top])
    return (tops[0], *(r.up[-1] for r in routes)), tuple(routes)


def _below(call: Call) -> dict[Call, None]:
    """``call`` and every call under it."""
    found: dict[Call, None] = {}
    todo = [call]
    while todo:
        c = todo.pop()
        if c not in found:
            found[c] = None
            todo.extend(c.children())
    return found


def _inputs_of(calls: dict[Call, None]) -> set[int]:
    return {
        item.data for c in calls for a in c.args for item in (a.data if a.kind == LIST else (a,)) if item.kind == VAR
    }


def _route(top: Call, inside: dict[Call, None], bound: set[Call], names: set[int]) -> Route | None:
    """The shortest way up to ``top`` from a bound call or, failing that, from a bound input."""
    queue: list[tuple[Call, tuple[Call, ...]]] = [(top, (top,))]
    fallback: Route | None = None
    while queue:
        call, up = queue.pop(0)
        for a in call.args:
            for item in a.data if a.kind == LIST else (a,):
                if item.kind == CALL:
                    if item.data in bound:
                        return Route(False, item.data.index, up)
                    queue.append((item.data, (item.data, *up)))
                elif item.kind == VAR and item.data in names and fallback is None:
                    fallback = Route(True, item.data, up)
    return fallback
