"""Which samples a declarative pattern is traced on, and how the traces group into alternatives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from ascend_dynamo.contracts import Domain
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.antiunify import Observation, anti_unify
from ascend_dynamo.match.samples import VARIADIC, Sample, Signature, choose, make_sample
from ascend_dynamo.match.terms import LIST, SCALAR, SIZE, SIZES, Alternative, Arg, Call, Expr
from ascend_dynamo.match.trace import SHAPED, Traced, structure, trace, used_inputs

aten = torch.ops.aten
_HALF = frozenset({torch.bfloat16, torch.float16})
# With a size of 1 these normalise differently: an expand vanishes, a permute becomes a reshape.
_LAYOUT = SHAPED | {aten.permute.default, aten.slice.Tensor, aten.cat.default}


class Traceable(Protocol):
    """What tracing needs to know of a declarative pattern."""

    name: str
    eager: tuple[Any, ...]
    replace: Any
    domain: Domain
    signature: Signature


def family_of(pattern: Traceable, dtype: torch.dtype) -> frozenset[torch.dtype]:
    """The dtypes of the domain that are traced together with ``dtype``; empty if it is outside of the domain."""
    if dtype not in pattern.domain.dtypes:
        return frozenset()
    together = _HALF if dtype in _HALF else frozenset({dtype})
    return together & frozenset(pattern.domain.dtypes)


def alternatives_of(pattern: Traceable, family: frozenset[torch.dtype]) -> tuple[Alternative, ...]:
    """Every alternative of every spelling for one family of dtypes, larger ones first."""
    found: dict[str, Alternative] = {}
    for index in range(len(pattern.eager)):
        for alternative in _Spelling(pattern, index, family).alternatives():
            key = str(alternative).partition("\n")[2] + str((alternative.ranks, alternative.fixed))
            found.setdefault(key + str(sorted(map(str, alternative.dtypes))), alternative)
    return tuple(sorted(found.values(), key=lambda a: -len(a.calls)))


class _Spelling:
    def __init__(self, pattern: Traceable, index: int, family: frozenset[torch.dtype]) -> None:
        self.pattern = pattern
        self.signature = pattern.signature
        self.index = index
        self.fn = pattern.eager[index]
        self.family = sorted(family, key=str)
        name = getattr(self.fn, "__name__", "?")
        self.label = f'pattern "{pattern.name}", spelling {index} ({name})'

    def alternatives(self) -> Iterator[Alternative]:
        counts = VARIADIC if self.signature.variadic else (1,)
        for choices in choose(self.signature):
            for count in counts:
                first = make_sample(self.signature, self.family[0], choices, 0, self.ranks[0], count)
                taken = trace(self.label, self.fn, self.signature, first).taken
                for planned in itertools.product((True, False), repeat=len(taken)):
                    yield from self._decided(choices, count, planned)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (1, 2) if self.signature.spreads() else (0, 0)

    def _decided(self, choices: dict[str, Any], count: int, planned: tuple[bool, ...]) -> Iterator[Alternative]:
        def sample(i: int, rank: int, dtype: torch.dtype, ones: frozenset[str] = frozenset()) -> Sample:
            return make_sample(self.signature, dtype, choices, i, rank, count, ones)

        low, high = self.ranks
        seen = [self._observe(sample(0, low, self.family[0]), planned)]
        seen.append(self._observe(sample(1, high, self.family[0]), planned))
        if len(self.family) > 1:
            seen.append(self._observe(sample(0, low, self.family[1]), planned))
        if _numbers(seen[0].eager) != _numbers(seen[1].eager) or _numbers(seen[0].new) != _numbers(seen[1].new):
            seen.append(self._observe(sample(2, low, self.family[0]), planned))
        by_rank = low != high and _key(seen[0]) != _key(seen[1])
        if by_rank:
            extra = ((3, 0), (4, 0), (5, 3), (6, 3), (7, 2), (8, 1))
            seen.extend(self._observe(sample(i, rank, self.family[0]), planned) for i, rank in extra)
        if any(op in _LAYOUT for o in seen for op, _, _ in (*o.eager.calls, *o.new.calls)):
            known = {_key(o) for o in seen}
            for name in self.signature.sizes():
                if self.signature.dims.get(name, (1, None))[0] <= 1:
                    ones = frozenset({name})
                    seen.append(self._observe(sample(0, low, self.family[0], ones), planned))
                    if _key(seen[-1]) not in known:  # a form of its own: a second sample tells its numbers apart
                        seen.append(self._observe(sample(1, high, self.family[0], ones), planned))
        groups: dict[Any, list[Observation]] = {}
        for o in seen:
            groups.setdefault(_key(o), []).append(o)
        for group in groups.values():
            alternative = self._unify(group, seen)
            yield alternative

    def _unify(self, group: Sequence[Observation], seen: Sequence[Observation]) -> Alternative:
        absent = self._absent(group[0].eager, group[0].sample)
        own = {o.sample.dtype for o in group}
        shared = len(own) == len(self.family) or len({o.sample.dtype for o in seen}) == 1
        dtypes = frozenset(self.family) if shared else frozenset(own)
        made = anti_unify(self.label, self.index, self.signature, group, absent, dtypes)
        self._check_bound(made)
        return made

    def _absent(self, eager: Traced, sample: Sample) -> frozenset[str]:
        used = used_inputs(eager)
        names = [n for n in self.signature.shapes if n != self.signature.variadic]
        return frozenset(n for n in names if n not in used)

    def _observe(self, sample: Sample, planned: tuple[bool, ...]) -> Observation:
        eager = trace(self.label, self.fn, self.signature, sample, planned)
        absent = self._absent(eager, sample)
        label = f'pattern "{self.pattern.name}", replace'
        if absent:
            label += f" with {', '.join(sorted(absent))} = None, which spelling {self.index} does not use"
        new = trace(label, self.pattern.replace, self.signature, sample, (), absent)
        if len(eager.outputs) != len(new.outputs):
            raise PatternError(
                f"{self.label}: returns {len(eager.outputs)} tensors, but the replacement returns {len(new.outputs)}"
            )
        for k, (a, b) in enumerate(zip(eager.signature, new.signature, strict=True)):
            if a[:2] != b[:2]:
                raise PatternError(
                    f"{self.label}: output {k} is {a[0]} {list(a[1])}, but the replacement gives {b[0]} {list(b[1])} "
                    f"at sizes {dict(sample.sizes)}"
                )
        return Observation(sample, eager, new)

    def _check_bound(self, made: Alternative) -> None:
        have, need = _mentioned(made.calls), _mentioned(made.new_calls)
        have |= {n for i in made.inputs for item in i.shape for n in _size_names(item)}
        missing = sorted(need - have)
        if missing:
            raise PatternError(
                f"{self.label}: the replacement needs {', '.join(missing)}, which cannot be read off a match of this "
                "spelling: no literal of the graph follows it"
            )


def _key(o: Observation) -> Any:
    return structure(o.eager), structure(o.new)


def _numbers(traced: Traced) -> Any:
    return [[a for a in args if isinstance(a, (int, tuple))] for _, args, _ in traced.calls], [
        shape for _, _, shape in traced.calls
    ]


def _mentioned(calls: Sequence[Call]) -> set[str]:
    """Names of the scalars and sizes that the literals of ``calls`` follow."""
    found: set[str] = set()

    def look(a: Arg) -> None:
        if a.kind == LIST:
            for x in a.data:
                look(x)
        elif a.kind == SCALAR:
            found.add(a.data.name)
        elif a.kind == SIZE:
            found.update(a.data.names())
        elif a.kind == SIZES:
            found.update(n for item in a.data for n in _size_names(item))

    for call in calls:
        for a in call.args:
            look(a)
        for item in call.shape or ():
            found.update(_size_names(item))
    return found


def _size_names(item: Any) -> frozenset[str]:
    if isinstance(item, Expr):
        return item.names()
    return frozenset({item.name, f"len_{item.name}", f"numel_{item.name}"})
