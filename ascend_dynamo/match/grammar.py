"""Grammars of spellings: what one operator looks like in the wild, as a product of choices.

A pattern may carry a ``grammar``. A spelling is one production per dimension; from it the grammar writes a plain torch
function as source text. Drawing and shrinking know nothing of what the productions mean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

PLAIN = (0.4, 0.65, 0.9, 1.0)  # how likely a dimension keeps its default; one of these per spelling
SIMPLE = (0.9, 1.0, 1.0)  # the same for a spelling that is near
RARE = 0.95
DRAWS = 32


@dataclass(frozen=True)
class Spelling:
    """A point of a grammar: the production of every dimension, and the seed of its numbers."""

    choices: Mapping[str, str]
    seed: int

    def text(self, grammar: Grammar) -> str:
        """What is not the default, such as ``mask=tril, softmax=by_hand, seed=3``."""
        return ", ".join([*(f"{d}={p}" for d, p in grammar.special(self.choices)), f"seed={self.seed}"])


@dataclass(frozen=True)
class Program:
    """A spelling as source: an expression for each input, the lines of the function, and which axes are symbolic.

    ``dynamic`` maps an input to the axes whose sizes are symbols; ``why_near`` says why this particular program need
    not fuse although its productions promise it ("" if it must).
    """

    inputs: Mapping[str, str]
    lines: tuple[str, ...]
    dynamic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    why_near: str = ""

    def source(self, seed: int) -> str:
        """A script that defines the inputs and ``spelling``, and calls it."""
        head = "import math\n\nimport torch\nimport torch.nn.functional as F\n\n"
        inputs = "".join(f"{name} = {expression}\n" for name, expression in self.inputs.items())
        names = ", ".join(self.inputs)
        body = "".join(f"    {line}\n" for line in self.lines)
        return f"{head}torch.manual_seed({seed})\n{inputs}\n\ndef spelling({names}):\n{body}\n\nspelling({names})\n"

    def build(self, seed: int) -> tuple[Callable[..., Any], dict[str, torch.Tensor]]:
        """The function, and its inputs by name; torch's global random state stays as it is."""
        text = self.source(seed).rpartition("\n\nspelling(")[0]
        namespace: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            exec(compile(text, "<spelling>", "exec"), namespace)
        return namespace["spelling"], {name: namespace[name] for name in self.inputs}


@dataclass(frozen=True)
class Needs:
    """The ``productions`` of ``dimension`` exist only where every other dimension has one of the named productions."""

    dimension: str
    productions: tuple[str, ...]
    others: Mapping[str, tuple[str, ...]]

    def unmet(self, choices: Mapping[str, str]) -> Iterator[str]:
        """The dimensions that stand in the way."""
        if choices[self.dimension] in self.productions:
            yield from (d for d, allowed in self.others.items() if choices[d] not in allowed)


@dataclass(frozen=True)
class Grammar:
    """What a dialect operator may look like.

    Args:
        name: unique among all grammars.
        op: the dialect operator that a spelling must become, such as "flash_attention".
        dimensions: productions by dimension; the first is the default, the plainest form.
        write: makes the program of some choices; draws numbers from the given source of randomness.
        needs: which productions go together.
        near: (dimension, production) pairs that make a spelling something else: it need not become ``op``, and
            whatever it becomes must be right.
        rare: dimensions that seldom leave their default unless pinned, such as those that are slow to trace.
    """

    name: str
    op: str
    dimensions: Mapping[str, tuple[str, ...]]
    write: Callable[[Mapping[str, str], random.Random], Program]
    needs: tuple[Needs, ...] = ()
    near: frozenset[tuple[str, str]] = frozenset()
    rare: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for n in self.needs:
            if self.dimensions[n.dimension][0] in n.productions:
                raise ValueError(f"grammar {self.name}: the default of {n.dimension} must go with everything")

    def productions(self) -> tuple[tuple[str, str], ...]:
        """Every (dimension, production)."""
        return tuple((d, p) for d, all_of_d in self.dimensions.items() for p in all_of_d)

    def defaults(self) -> dict[str, str]:
        return {d: productions[0] for d, productions in self.dimensions.items()}

    def special(self, choices: Mapping[str, str]) -> list[tuple[str, str]]:
        """The choices that are not the default."""
        return [(d, choices[d]) for d, productions in self.dimensions.items() if choices[d] != productions[0]]

    def is_near(self, choices: Mapping[str, str]) -> bool:
        return any(pair in self.near for pair in choices.items())

    def program(self, spelling: Spelling) -> Program:
        return self.write(spelling.choices, random.Random(spelling.seed))

    def draw(self, rng: random.Random, pinned: tuple[str, str] | None = None) -> Spelling:
        """A random spelling; ``pinned`` is a production that it has. What is near is drawn on something simple: only a
        recogniser that knows the rest can be wrong about it."""
        plain = rng.choice(SIMPLE if pinned in self.near else PLAIN)
        choices: dict[str, str] = {}
        for dimension, (default, *others) in self.dimensions.items():
            real = [p for p in others if (dimension, p) not in self.near]
            strange = [p for p in others if (dimension, p) in self.near]
            # Something else entirely is drawn because it is pinned, and now and then on top of anything.
            pool = strange if strange and (not real or rng.random() < 0.1) and rng.random() < 0.1 else real
            keep = RARE if dimension in self.rare else plain
            choices[dimension] = default if not pool or rng.random() < keep else rng.choice(pool)
        held: tuple[str, ...] = ()
        if pinned is not None:
            choices[pinned[0]] = pinned[1]
            held = (pinned[0],)
        for _ in range(DRAWS):
            try:
                settled = self.settle(choices, held, rng)
            except ValueError:
                continue  # what the pinned production needs was chosen unluckily
            return Spelling(settled, rng.randrange(1 << 16))
        raise ValueError(f"grammar {self.name}: nothing goes together with {pinned}")

    def settle(
        self, choices: Mapping[str, str], held: Iterable[str] = (), rng: random.Random | None = None
    ) -> dict[str, str]:
        """The choices with whatever does not go together undone; dimensions in ``held`` are kept.

        Raises ValueError if two held dimensions do not go together.
        """
        made, kept = dict(choices), set(held)
        while True:
            broken = next(((n, other) for n in self.needs for other in n.unmet(made)), None)
            if broken is None:
                return made
            need, other = broken
            dimension = need.dimension
            if dimension in kept and other in kept:
                raise ValueError(f"{dimension}={made[dimension]} and {other}={made[other]} do not go together")
            if dimension in kept:
                allowed = need.others[other]
                made[other] = rng.choice(allowed) if rng is not None else allowed[0]
                kept.add(other)
            elif other not in kept and rng is not None and rng.random() < 0.5:
                made[other] = rng.choice(need.others[other])
            else:
                made[dimension] = self.dimensions[dimension][0]

    def simpler(self, spelling: Spelling) -> Iterator[Spelling]:
        """Spellings with at least one more default; what resets most comes first."""
        before = len(self.special(spelling.choices))
        special = self.special(spelling.choices)
        half = len(special) // 2
        groups = [special[:half], special[half:]] if half > 1 else []
        for group in [*groups, *([pair] for pair in special)]:
            fewer = dict(spelling.choices)
            fewer.update({d: self.dimensions[d][0] for d, _ in group})
            made = self.settle(fewer)
            if len(self.special(made)) < before:
                yield Spelling(made, spelling.seed)

    def shrink(self, spelling: Spelling, still: Callable[[Spelling], bool]) -> Spelling:
        """The simplest spelling found for which ``still`` holds, dimension by dimension."""
        while True:
            smaller = next((s for s in self.simpler(spelling) if still(s)), None)
            if smaller is None:
                return spelling
            spelling = smaller
