"""Backtracking match of one alternative at one node.

Work is a linked list of (argument, value, call that has it) still to be matched. A commutative call is the only
choice point inside a tree; the users of a bound node are the choices for a further root. What needs every size to be
known (shapes, literals that follow sizes) is checked at the end, inside the search, so that a wrong order of operands
that only the shapes tell apart is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from ascend_dynamo.contracts import Domain, Facts, Match, NoMatch
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.canonical import canonical, same_literal
from ascend_dynamo.match.samples import Signature, with_spreads
from ascend_dynamo.match.shapes import Shapes
from ascend_dynamo.match.solve import close
from ascend_dynamo.match.terms import (
    CALL,
    DEVICE,
    DTYPE,
    LIST,
    LITERAL,
    SCALAR,
    SIZES,
    SKIP,
    VAR,
    Alternative,
    Arg,
    Call,
    Route,
)
from ascend_dynamo.match.why import Why

Work = Any  # (Arg, value, node, Work) | None


@dataclass(frozen=True)
class TracedMatch(Match):
    """A match of a declarative pattern: also which alternative it is, its sizes and its dtype."""

    alternative: Alternative | None = None
    sizes: Mapping[str, Any] | None = None
    dtype: torch.dtype | None = None


class Owner(Protocol):
    """What the matcher needs to know of the pattern that an alternative belongs to."""

    name: str
    domain: Domain
    signature: Signature


def match_alternative(
    pattern: Owner, alternative: Alternative, anchor: fx.Node, facts: Facts, why: Why
) -> TracedMatch | None:
    """The match of ``alternative`` that ends at ``anchor``, or None with the refusals noted in ``why``."""
    search = _Search(pattern, alternative, facts, why)
    if search.solve((Arg(CALL, alternative.roots[0]), anchor, anchor, None), 0):
        return search.result
    return None


class _Search:
    __slots__ = (
        "alternative",
        "bound",
        "calls",
        "deferred",
        "dtype",
        "facts",
        "inputs",
        "pattern",
        "result",
        "scalars",
        "shapes",
        "why",
    )

    def __init__(self, pattern: Owner, alternative: Alternative, facts: Facts, why: Why) -> None:
        self.pattern = pattern
        self.alternative = alternative
        self.facts = facts
        self.why = why
        self.calls: list[Any] = [None] * len(alternative.calls)
        self.inputs: list[Any] = [None] * len(alternative.inputs)
        self.scalars: dict[str, float] = {}
        self.dtype: torch.dtype | None = None
        self.shapes = Shapes(facts)
        self.deferred: list[tuple[Arg, Any, fx.Node]] = []
        self.bound = 0
        self.result: TracedMatch | None = None

    # ---- search

    def solve(self, work: Work, route: int) -> bool:
        while work is not None:
            arg, value, at, work = work
            kind = arg.kind
            if kind == CALL:
                call = arg.data
                known = self.calls[call.index]
                if known is not None:
                    if known is value:
                        continue
                    return self.fail("arg", at, f"the same value as %{known.name}", value)
                if not isinstance(value, fx.Node) or value.target is not call.op:
                    found = value.target if isinstance(value, fx.Node) else value
                    return self.fail("op", value if isinstance(value, fx.Node) else at, call.op, found)
                given = canonical(value)
                if len(given) != call.arity:
                    return self.fail("arg", value, f"{call.arity} arguments", len(given))
                for i, wanted in call.literals:
                    if not same_literal(wanted, given[i]) and not self.literal(wanted, given[i], value):
                        return False
                self.calls[call.index] = value
                self.bound += 1
                if call.shape is not None:
                    self.deferred.append((arg, None, value))
                for i, item in call.rest:
                    work = (item, given[i], value, work)
                if call.commutes:
                    a, b, x, y = call.args[0], call.args[1], given[0], given[1]
                    straight = (a, x, value, (b, y, value, work))
                    if x is y or not (_possible(a, y) and _possible(b, x)):
                        work = straight
                    elif not (_possible(a, x) and _possible(b, y)):
                        work = (a, y, value, (b, x, value, work))
                    else:
                        saved = self.save()
                        if self.solve(straight, route):
                            return True
                        self.restore(saved)
                        work = (a, y, value, (b, x, value, work))
            elif kind == VAR:
                if not self.bind(arg.data, value, at):
                    return False
            elif kind == LITERAL:
                if not same_literal(arg.data, value) and not self.literal(arg.data, value, at):
                    return False
            elif kind == SCALAR:
                if not self.scalar(arg.data, value, at):
                    return False
            elif kind == LIST:
                if not isinstance(value, (list, tuple)) or len(value) != len(arg.data):
                    return self.fail("arg", at, f"a list of {len(arg.data)}", value)
                for item, element in zip(reversed(arg.data), reversed(value), strict=True):
                    work = (item, element, at, work)
            elif kind != SKIP:  # SIZE, SIZES, DTYPE, DEVICE
                self.deferred.append((arg, value, at))
        if route < len(self.alternative.routes):
            return self.next_root(self.alternative.routes[route], route)
        return self.finish()

    def next_root(self, route: Route, index: int) -> bool:
        start = self.inputs[route.start] if route.from_input else self.calls[route.start]
        top = route.up[-1]
        saved = self.save()
        for node in _climb(start, route.up, 0):
            if node in self.calls:
                continue
            if self.solve((Arg(CALL, top), node, node, None), index + 1):
                return True
            self.restore(saved)
        return self.fail("op", start, f"a use by {top.op}", "no such use")

    def save(self) -> tuple[Any, ...]:
        return (
            self.calls[:],
            self.inputs[:],
            dict(self.scalars),
            self.dtype,
            self.shapes.save(),
            len(self.deferred),
            self.bound,
        )

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.calls, self.inputs = saved[0][:], saved[1][:]
        self.scalars, self.dtype = dict(saved[2]), saved[3]
        self.shapes.restore(saved[4])
        del self.deferred[saved[5] :]
        self.bound = saved[6]

    # ---- single arguments

    def bind(self, index: int, value: Any, at: fx.Node) -> bool:
        known = self.inputs[index]
        if known is not None:
            return known is value or self.fail("arg", at, f"the same value as %{known.name}", value)
        wanted = self.alternative.inputs[index]
        val = value.meta.get("val") if isinstance(value, fx.Node) else None
        if not isinstance(val, torch.Tensor):
            return self.fail("arg", at, f'a tensor for "{wanted.name}"', value)
        dtype = val.dtype
        if wanted.dtype is not None:
            if dtype is not wanted.dtype:
                return self.fail("dtype", value, f'{wanted.dtype} for "{wanted.name}"', dtype)
        elif self.dtype is None:
            if dtype not in self.alternative.dtypes:
                allowed = " or ".join(sorted(map(str, self.alternative.dtypes)))
                # Alternatives of the other dtypes get no further than this wherever the pattern is found.
                return self.fail("dtype", value, f'{allowed} for "{wanted.name}"', dtype, 0.5)
            self.dtype = dtype
        elif dtype is not self.dtype:
            return self.fail("dtype", value, f'{self.dtype} for "{wanted.name}"', dtype)
        if not self.shapes.unify(wanted.shape, val.shape):
            want = "[" + ", ".join(map(str, wanted.shape)) + "]" + self.shapes.note()
            return self.fail("shape", value, f'"{wanted.name}" of shape {want}', list(val.shape))
        self.inputs[index] = value
        return True

    def literal(self, wanted: Any, value: Any, at: fx.Node) -> bool:
        """A literal of the pattern against a symbolic size of the graph, which may be known to be that number."""
        given = value.meta.get("val") if isinstance(value, fx.Node) else value
        if type(wanted) is int and isinstance(given, torch.SymInt) and self.facts.known(given == wanted):
            return True
        both = isinstance(wanted, tuple) and isinstance(value, (list, tuple)) and len(wanted) == len(value)
        if both and all(same_literal(w, v) or self.literal(w, v, at) for w, v in zip(wanted, value, strict=True)):
            return True
        return self.fail("arg", at, f"the literal {wanted}", value)

    def scalar(self, form: Any, value: Any, at: fx.Node) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self.fail("arg", at, f'a number for "{form}"', value)
        if form.positive and not value > 0:
            return self.fail("arg", at, f'a positive number for "{form}"', value)
        known = self.scalars.get(form.name)
        if known is not None:
            return close(form.forward(known), value) or self.fail("arg", at, f"{form} = {form.forward(known)}", value)
        s = form.inverse(value)
        low, high = self.pattern.signature.scalars[form.name]
        if not low <= s <= high:
            return self.fail("arg", at, f'"{form.name}" within {low} .. {high}', s)
        self.scalars[form.name] = s
        return True

    # ---- the end

    def finish(self) -> bool:
        alternative = self.alternative
        if any(i is None for i in self.inputs):
            return self.fail("arg", self.calls[0], "a value for every input", "an input that nothing binds")
        for name, rank in alternative.ranks.items():
            run = self.shapes.sizes.get("*" + name)
            if run is not None and len(run) != rank:
                return self.fail("shape", self.calls[0], f"{rank} leading axes (*{name})", len(run))
        if not self.shapes.settle(alternative.fixed, self.pattern.domain.dims):
            return self.fail("shape", self.calls[0], self.shapes.expected, self.shapes.found)
        env = with_spreads(self.shapes.sizes)
        for arg, value, node in self.deferred:
            if not self.check(arg, value, node, env):
                return False
        for name, (low, high) in self.pattern.signature.scalars.items():
            if name in env and name not in self.scalars:  # a whole number, read off a size-like literal
                if not low <= env[name] <= high:
                    return self.fail("arg", self.calls[0], f'"{name}" within {low} .. {high}', env[name])
                self.scalars[name] = env[name]
        for name in alternative.float_sizes:
            if not isinstance(env.get(name, 0), int):
                return self.fail("unproven", self.calls[0], f"a fixed {name}: a number is computed from it", env[name])
        self.result = self.make(env)
        requires = self.pattern.domain.requires
        if requires is not None:
            refused = requires(self.result, self.facts)
            if refused is not None:
                if not isinstance(refused, NoMatch):
                    raise PatternError(
                        f'pattern "{self.pattern.name}": domain.requires returned {refused!r}, which is neither None '
                        "nor a NoMatch (is it a function that makes the check? then call it)"
                    )
                self.why.refusal(refused)
                self.result = None
                return False
        return True

    def check(self, arg: Arg, value: Any, node: fx.Node, env: dict[str, Any]) -> bool:
        if arg.kind == CALL:
            wanted, given = arg.data.shape, node.meta["val"].shape
            if self.shapes.equal(wanted, given, env):
                return True
            return self.fail("shape", node, f"an output of shape [{', '.join(map(str, wanted))}]", list(given))
        if arg.kind == DTYPE:
            return value is self.dtype or self.fail("dtype", node, f"a cast to {self.dtype}", value)
        if arg.kind == DEVICE:
            return self.device(value, node)
        if arg.kind == SIZES:
            given = [x.meta["val"] if isinstance(x, fx.Node) else x for x in value]
            if self.shapes.equal(arg.data, given, env):
                return True
            return self.fail("arg", node, f"[{', '.join(map(str, arg.data))}]", given)
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if value is not None and self.shapes.same(arg.data, value, env):
            return True
        return self.fail("arg", node, f"{arg.data}{self.shapes.note()}", value)

    def device(self, value: Any, node: fx.Node) -> bool:
        given = [i.meta["val"].device for i in self.inputs]
        if value is None or not given or torch.device(value) == given[0]:
            return True
        return self.fail("arg", node, f"the device {given[0]}", value)

    def make(self, env: Mapping[str, Any]) -> TracedMatch:
        alternative = self.alternative
        inputs: dict[str, Any] = dict(alternative.constants)
        inputs.update({i.name: node for i, node in zip(alternative.inputs, self.inputs, strict=True)})
        inputs.update(self.scalars)
        outputs = tuple(
            self.calls[o.data.index] if o.kind == CALL else self.inputs[o.data] for o in alternative.outputs
        )
        nodes = frozenset(self.calls).difference(self.inputs)
        return TracedMatch(
            self.pattern.name,
            self.calls[alternative.roots[0].index],
            nodes,
            inputs,
            outputs,
            alternative=alternative,
            sizes=env,
            dtype=self.dtype,
        )

    def fail(self, code: Any, node: Any, expected: Any, found: Any, share: float = 1.0) -> bool:
        at = node if isinstance(node, fx.Node) else next((c for c in self.calls if c is not None), None)
        self.why.note(share * self.bound / (len(self.calls) or 1), code, at, expected, found)
        return False


def _possible(arg: Arg, value: Any) -> bool:
    """A cheap necessary condition for ``arg`` to match ``value``."""
    kind = arg.kind
    if kind == CALL:
        return isinstance(value, fx.Node) and value.target is arg.data.op
    if kind == VAR:
        return isinstance(value, fx.Node)
    if kind in (LITERAL, SCALAR):
        return not isinstance(value, fx.Node)
    return kind != SKIP


def _climb(node: fx.Node, up: tuple[Call, ...], at: int) -> Iterator[fx.Node]:
    """Nodes that are reached from ``node`` through users with the operators ``up``, in program order."""
    for user in sorted(u for u in node.users if u.target is up[at].op):
        if at + 1 == len(up):
            yield user
        else:
            yield from _climb(user, up, at + 1)
