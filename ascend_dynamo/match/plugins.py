"""Finding the patterns of a compilation: built-in and installed ones by entry point, and those given by option."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from ascend_dynamo.contracts import Pattern
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.registry import Registry
from ascend_dynamo.report.records import CompileRecord, Quarantined

log = logging.getLogger("ascend_dynamo.match")

GROUP = "ascend_dynamo.patterns"
_ATTRIBUTES = ("name", "version", "level", "benefit", "users", "domain", "eager", "match", "rewrite", "before", "after")


def load_registry(options: Any, record: CompileRecord | None = None) -> Registry:
    """All patterns for these options. The built-ins come first, then installed plugins by name, then ``plugins``.

    A plugin that raises while loading, that brings something that is no pattern, or a name that is taken, is left
    out, logged and noted in ``record``.

    Raises:
        PatternError: the same, if ``options.strict``.
    """
    found: dict[str, Pattern] = {}
    for origin, load in (*_installed(), *_given(options)):
        try:
            brought = _flatten(load(), origin)
            _check_names(brought, found, origin)
            merged = {**found, **{p.name: p for p in brought}}
            Registry(merged.values())
        except Exception as error:
            _refuse(origin, error, options, record)
            continue
        found = merged
    return Registry(found.values())


def _installed() -> list[tuple[str, Any]]:
    points = sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name != "builtin", e.name))
    return [(f"plugin {e.name} ({e.value})", lambda e=e: _call(e.load())) for e in points]


def _given(options: Any) -> list[tuple[str, Any]]:
    return [(f"option plugins[{i}]", lambda given=given: given) for i, given in enumerate(options.plugins)]


def _call(loaded: Any) -> Any:
    return loaded() if callable(loaded) and not hasattr(loaded, "rewrite") else loaded


def _flatten(thing: Any, origin: str) -> list[Pattern]:
    """Patterns out of a pattern, a registry, or an iterable of these."""
    if isinstance(thing, type):
        raise PatternError(f"{origin}: {thing.__name__} is a class; give an instance of it")
    if hasattr(thing, "rewrite") or not isinstance(thing, Iterable):
        missing = [a for a in _ATTRIBUTES if not hasattr(type(thing), a) and not hasattr(thing, a)]
        if missing:
            raise PatternError(f"{origin}: {thing!r} is no pattern: it lacks {', '.join(missing)}")
        return [thing]
    return [p for item in thing for p in _flatten(item, origin)]


def _check_names(brought: list[Pattern], found: dict[str, Pattern], origin: str) -> None:
    for p in brought:
        if p.name in found and found[p.name] is not p:
            raise PatternError(f'{origin}: the name "{p.name}" is taken by another pattern; rename it')


def _refuse(origin: str, error: Exception, options: Any, record: CompileRecord | None) -> None:
    message = f"{type(error).__name__}: {error}"
    if options.strict:
        raise error if isinstance(error, PatternError) else PatternError(f"{origin} failed: {message}") from error
    log.error("%s is left out; it failed: %s", origin, message)
    if record is not None:
        record.quarantined.append(Quarantined(origin, message, "loading"))
