"""The pattern language: ``declare`` for what examples can spell, ``ProceduralPattern`` for what they cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Level, Match, NoMatch, Users
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.family import alternatives_of, family_of
from ascend_dynamo.match.instantiate import instantiate
from ascend_dynamo.match.matcher import TracedMatch, match_alternative
from ascend_dynamo.match.samples import Signature, read_signature
from ascend_dynamo.match.terms import Alternative
from ascend_dynamo.match.why import Why


class BasePattern:
    """The attributes that every pattern has, with their defaults; see ``contracts.Pattern``."""

    name: str = ""
    version: int = 1
    level: Level = 2
    benefit: int = 1
    anchors: tuple[Any, ...] = ()
    users: Users = "refuse"
    domain: Domain = Domain()
    eager: tuple[Callable[..., Any], ...] = ()
    emits: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()
    location: tuple[str, int] | None = None
    c_ulp: float | None = None  # for fuzzing: roundings of the largest element that a result may be off, if not UNITS

    def __repr__(self) -> str:
        return f"<pattern {self.name} v{self.version} O{self.level}>"


class ProceduralPattern(BasePattern):
    """A recogniser written by hand. Subclass it, set the attributes, implement ``match`` and ``rewrite``.

    ``anchors`` are the overloads at which ``match`` is tried. Once refused, a site is tried again when a rewrite has
    put a call of one of ``reads`` (empty: of any operator) up to ``depth`` calls above it. ``eager`` holds spellings
    in plain torch, the oracle of the fuzzer, and ``fuzz_inputs`` draws arguments for them. Both methods are pure: the
    driver commits and verifies.
    """

    reads: tuple[Any, ...] = ()
    depth: int = 12

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        module = sys.modules.get(cls.__module__)
        cls.location = (getattr(module, "__file__", None) or cls.__module__, getattr(cls, "__firstlineno__", 0))

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        """The match whose last node is ``anchor``, or the reason why there is none."""
        raise NotImplementedError(f"pattern {self.name}: match is not implemented")

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        """Replacements for ``m.outputs``, built through ``b``."""
        raise NotImplementedError(f"pattern {self.name}: rewrite is not implemented")

    def fuzz_inputs(self, rng: Any, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        """Arguments for ``eager[spelling]``; ``rng`` is a ``random.Random``."""
        raise NotImplementedError(f"pattern {self.name}: fuzz_inputs is not implemented")


class DeclarativePattern(BasePattern):
    """A pattern given by functions: made by ``declare``. Traced when it is first needed, per dtype, and remembered."""

    def __init__(
        self,
        name: str,
        eager: tuple[Callable[..., Any], ...],
        replace: Callable[..., Any],
        domain: Domain,
        signature: Signature,
        location: tuple[str, int],
        **attributes: Any,
    ) -> None:
        self.name = name
        self.eager = eager
        self.replace = replace
        self.domain = domain
        self.signature = signature
        self.location = location
        for key, value in attributes.items():
            setattr(self, key, value)
        self._by_dtype: dict[torch.dtype, tuple[Alternative, ...]] = {}
        self._families: dict[frozenset[torch.dtype], tuple[Alternative, ...] | PatternError] = {}

    def alternatives(self, dtype: torch.dtype) -> tuple[Alternative, ...]:
        """Everything to look for in a graph that has tensors of ``dtype``; traced at the first call.

        Raises PatternError if the pattern is ill-formed.
        """
        ready = self._by_dtype.get(dtype)
        if ready is not None:
            return ready
        family = family_of(self, dtype)
        if not family:
            return ()
        found = self._families.get(family)
        if found is None:
            try:
                found = alternatives_of(self, family)
            except PatternError as error:
                found = error
            self._families[family] = found
        if isinstance(found, PatternError):
            raise found
        self._by_dtype[dtype] = found
        return found

    def all_alternatives(self) -> tuple[Alternative, ...]:
        """The alternatives of every dtype of the domain."""
        families = dict.fromkeys(family_of(self, d) for d in self.domain.dtypes)
        return tuple(a for f in families for a in self.alternatives(min(f, key=str)))

    @property
    def anchors(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The overloads at which a match can end."""
        return tuple(dict.fromkeys(a.anchor for a in self.all_alternatives()))

    def alternatives_for(self, dtypes: Iterable[torch.dtype]) -> tuple[Alternative, ...]:
        """The alternatives of some dtypes, each once."""
        return tuple(dict.fromkeys(a for d in dtypes for a in self.alternatives(d)))

    def match(self, anchor: fx.Node, facts: Facts, dtypes: Iterable[torch.dtype] | None = None) -> Match | NoMatch:
        """The first alternative (of ``dtypes``, if given) that fits at ``anchor``, or the reason of the nearest."""
        why = Why()
        for alternative in self.all_alternatives() if dtypes is None else self.alternatives_for(dtypes):
            found = match_alternative(self, alternative, anchor, facts, why)
            if found is not None:
                return found
        return why.best(anchor, facts)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        if not isinstance(m, TracedMatch):
            raise PatternError(f'pattern "{self.name}": asked to rewrite a match that it did not make')
        return instantiate(m, b)


def declare(
    name: str,
    *,
    eager: Iterable[Callable[..., Any]] | Callable[..., Any],
    replace: Callable[..., Any],
    domain: Domain,
    level: Level = 2,
    benefit: int = 1,
    version: int = 1,
    users: Users = "refuse",
    scalars: Mapping[str, tuple[float, float]] | None = None,
    choices: Mapping[str, Iterable[Any]] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    before: Iterable[str] = (),
    after: Iterable[str] = (),
    emits: Iterable[str] = (),
) -> DeclarativePattern:
    """A pattern from functions to find (``eager``: every spelling) and one to put in their place (``replace``).

    All take the same parameters: tensors (named in ``domain.shapes``, all of one dtype of ``domain.dtypes`` unless
    ``dtypes`` says otherwise), ``scalars`` (floats found in the graph, with the range in which the pattern holds) and
    ``choices`` (one trace per value). All return the same number of tensors. A size is a name or an expression such
    as ``"2*H"``. ``users`` says what happens to an intermediate that is used elsewhere too: "refuse" it; "duplicate"
    its computation, which stays beside the replacement; "export": spellings return it, which makes it an output, and
    one that they do not return is refused. ``optional(fn, x)`` in a spelling means both ``fn(x)`` and ``x``; ``*xs``
    is one to four tensors.

    Raises PatternError, naming function and parameter, if the signatures disagree. Tracing happens at first use.
    """
    spellings = (eager,) if callable(eager) else tuple(eager)
    if not name or not spellings:
        raise PatternError(f'pattern "{name}": a pattern needs a name and at least one eager spelling')
    if level not in (0, 1, 2, 3) or users not in ("refuse", "duplicate", "export"):
        raise PatternError(f'pattern "{name}": level is 0 to 3 and users is refuse, duplicate or export')
    functions: dict[str, Callable[..., Any]] = {
        f"spelling {i} ({getattr(f, '__name__', f)})": f for i, f in enumerate(spellings)
    }
    functions[f"replace ({getattr(replace, '__name__', replace)})"] = replace
    fixed = {k: tuple(v) for k, v in (choices or {}).items()}
    signature = read_signature(name, functions, domain, scalars or {}, fixed, dtypes or {})
    frame = sys._getframe(1)
    return DeclarativePattern(
        name,
        spellings,
        replace,
        domain,
        signature,
        (frame.f_code.co_filename, frame.f_lineno),
        level=level,
        benefit=benefit,
        version=version,
        users=users,
        before=frozenset(before),
        after=frozenset(after),
        emits=frozenset(emits),
    )
