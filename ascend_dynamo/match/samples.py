"""Sample sizes, scalars and arguments on which the functions of a declarative pattern are traced."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ascend_dynamo.contracts import Domain
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.terms import Expr, Spread

# In no regular order, so that no difference of two sizes is the same in two samples.
_PRIMES = (5, 11, 7, 17, 13, 29, 19, 41, 23, 59, 31, 83, 37, 61, 43, 97, 47, 73, 53, 101, 67, 79, 71, 89, 103)
VARIADIC = (1, 2, 3, 4)


@dataclass(frozen=True)
class Signature:
    """The parameters of a pattern: tensors with parsed shapes, scalars, choices, and the variadic one, if any."""

    order: tuple[str, ...]
    shapes: Mapping[str, tuple[Any, ...]]
    scalars: Mapping[str, tuple[float, float]]
    choices: Mapping[str, tuple[Any, ...]]
    variadic: str | None
    dims: Mapping[str, tuple[int, int | None]]
    dtypes: Mapping[str, torch.dtype]

    def spreads(self) -> tuple[str, ...]:
        items = [i for shape in self.shapes.values() for i in shape if isinstance(i, Spread)]
        return tuple(dict.fromkeys(i.name for i in items))

    def sizes(self) -> tuple[str, ...]:
        items = [i for shape in self.shapes.values() for i in shape if isinstance(i, Expr)]
        names = [n for i in items for n in sorted(i.names())]
        return tuple(dict.fromkeys([*names, *self.dims]))


def parse_shape(pattern: str, name: str, shape: Sequence[Any]) -> tuple[Any, ...]:
    """``("*B", "2*H", "1")`` as expressions and at most one spread."""
    items: list[Any] = []
    for axis in shape:
        text = str(axis).strip()
        if text.startswith("*"):
            items.append(Spread(text[1:]))
            continue
        try:
            items.append(Expr(text))
        except SyntaxError:
            raise PatternError(
                f'pattern "{pattern}": the shape of "{name}" has the axis {axis!r}, which is no size: write a name, '
                'a number, or an expression such as "2*H"'
            ) from None
    if sum(isinstance(i, Spread) for i in items) > 1:
        raise PatternError(f'pattern "{pattern}": the shape of "{name}" has two runs of axes; only one can be found')
    return tuple(items)


def read_signature(
    pattern: str,
    functions: Mapping[str, Callable[..., Any]],
    domain: Domain,
    scalars: Mapping[str, tuple[float, float]],
    choices: Mapping[str, tuple[Any, ...]],
    dtypes: Mapping[str, torch.dtype],
) -> Signature:
    """The common signature of ``functions``.

    Raises PatternError, naming function and parameter, if two of them take different parameters, or if a parameter
    is neither a tensor of ``domain.shapes`` nor a scalar nor a choice.
    """
    found: dict[str, tuple[str, ...]] = {}
    variadic: str | None = None
    for label, fn in functions.items():
        names: list[str] = []
        for p in inspect.signature(fn).parameters.values():
            names.append(p.name)
            if p.kind is p.VAR_POSITIONAL:
                variadic = p.name
        found[label] = tuple(names)
    (first, order), *others = found.items()
    for label, other in others:
        if other != order:
            raise PatternError(
                f'pattern "{pattern}": {first} takes ({", ".join(order)}) but {label} takes ({", ".join(other)}); '
                "all spellings and the replacement take the same parameters in the same order"
            )
    for name in order:
        if name not in domain.shapes and name not in scalars and name not in choices:
            raise PatternError(
                f'pattern "{pattern}": parameter "{name}" has no shape in domain.shapes, and is no scalar and no choice'
            )
    for name in [*domain.shapes, *scalars, *choices]:
        if name not in order:
            raise PatternError(f'pattern "{pattern}": "{name}" is declared, but {first} has no such parameter')
    shapes = {n: parse_shape(pattern, n, domain.shapes[n]) for n in order if n in domain.shapes}
    return Signature(order, shapes, dict(scalars), dict(choices), variadic, dict(domain.dims), dict(dtypes))


@dataclass(frozen=True)
class Sample:
    """One assignment: a dtype, sizes (with ``"*B"`` tuples), scalar values, choices, and how many variadic tensors."""

    dtype: torch.dtype
    sizes: Mapping[str, Any]
    scalars: Mapping[str, float]
    choices: Mapping[str, Any]
    count: int = 1
    ones: frozenset[str] = frozenset()
    env: Mapping[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "env", with_spreads(self.sizes))

    def shape(self, items: tuple[Any, ...]) -> tuple[int, ...]:
        return evaluate(items, self.env)


def with_spreads(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """``sizes`` plus the rank and the number of elements of each spread, as the solver names them."""
    env = dict(sizes)
    for name, run in sizes.items():
        if name.startswith("*"):
            env[f"len_{name[1:]}"] = len(run)
            env[f"numel_{name[1:]}"] = math.prod(run)
    return env


def evaluate(items: tuple[Any, ...], env: Mapping[str, Any]) -> tuple[Any, ...]:
    """A list of sizes: expressions evaluated, spreads unrolled."""
    out: list[Any] = []
    for item in items:
        if isinstance(item, Spread):
            run = env["*" + item.name]
            out.extend(range(len(run)) if item.positions else run)
        else:
            out.append(item(env))
    return tuple(out)


def choose(signature: Signature) -> Iterator[dict[str, Any]]:
    """Every combination of the choices."""
    names = list(signature.choices)
    for values in itertools.product(*signature.choices.values()):
        yield dict(zip(names, values, strict=True))


def make_sample(
    signature: Signature,
    dtype: torch.dtype,
    choices: Mapping[str, Any],
    index: int,
    rank: int,
    count: int = 1,
    ones: frozenset[str] = frozenset(),
) -> Sample:
    """The ``index``-th sample: primes that no other sample shares with the same size, within the bounds of ``dims``."""
    sizes: dict[str, Any] = {}
    pool = list(_PRIMES[index * 3 :] + _PRIMES[: index * 3])
    for name in signature.spreads():
        sizes["*" + name] = tuple(pool.pop(0) for _ in range(rank))
    for name in signature.sizes():
        low, high = signature.dims.get(name, (1, None))
        if name in ones:
            sizes[name] = 1
            continue
        fits = [p for p in pool if p >= low and (high is None or p <= high)]
        sizes[name] = fits[0] if fits else low + index % (1 + (high or low) - low)
        if fits:
            pool.remove(fits[0])
    scalars = {
        name: _between(low, high, (0.3819 + 0.2361 * index + 0.1459 * k) % 1)
        for k, (name, (low, high)) in enumerate(signature.scalars.items())
    }
    return Sample(dtype, sizes, scalars, dict(choices), count, ones)


def _between(low: float, high: float, where: float) -> float:
    """A number of the range, the same kind as its bounds; wide positive ranges are walked by magnitude."""
    if isinstance(low, int) and isinstance(high, int):
        return low + round(where * (high - low))
    if low > 0 and high / low > 100:
        return low * (high / low) ** where
    return low + (high - low) * where


_decisions: ContextVar[tuple[list[bool], list[bool]] | None] = ContextVar("optional_decisions", default=None)


def optional(fn: Callable[..., Any], x: Any) -> Any:
    """Inside a spelling: both ``fn(x)`` and ``x`` are meant. Outside of tracing, ``fn(x)``."""
    state = _decisions.get()
    if state is None:
        return fn(x)
    planned, taken = state
    take = planned[len(taken)] if len(taken) < len(planned) else True
    taken.append(take)
    return fn(x) if take else x


@contextmanager
def deciding(planned: Sequence[bool]) -> Iterator[list[bool]]:
    """Inside, ``optional`` follows ``planned`` and then says yes; yields what was decided."""
    taken: list[bool] = []
    token = _decisions.set((list(planned), taken))
    try:
        yield taken
    finally:
        _decisions.reset(token)
