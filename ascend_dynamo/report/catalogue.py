"""The patterns of this installation, each with the package that brings it: ``ascend-dynamo patterns list | show``."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ascend_dynamo.errors import PatternError

log = logging.getLogger("ascend_dynamo.report")

GROUP = "ascend_dynamo.patterns"


@dataclass(frozen=True)
class Plugin:
    """One entry point of the pattern group: what it brought, or why it failed."""

    name: str
    object: str
    package: str
    patterns: tuple[Any, ...] = ()
    error: str = ""


def plugins() -> list[Plugin]:
    """Load every installed plugin, ours first; one that raises, whatever it is, is reported in ``error``."""
    found = []
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name != "builtin", e.name)):
        package = f"{entry.dist.metadata['Name']} {entry.dist.version}" if entry.dist else "unknown package"
        patterns: tuple[Any, ...] = ()
        error = ""
        try:
            patterns = tuple(entry.load()())
        except Exception as failure:
            log.debug("plugin %s failed to load", entry.name, exc_info=True)
            error = f"{type(failure).__name__}: {failure}"
        found.append(Plugin(entry.name, entry.value, package, patterns, error))
    return found


def catalogue() -> list[tuple[Any, str]]:
    """Every pattern with the package that it comes from.

    Raises:
        PatternError: a plugin fails to load; the message names it.
    """
    found: list[tuple[Any, str]] = []
    for plugin in plugins():
        if plugin.error:
            raise PatternError(f"plugin {plugin.name} of {plugin.package} ({plugin.object}): {plugin.error}")
        found += [(p, plugin.package) for p in plugin.patterns]
    return found


def describe(p: Any, source: str) -> dict[str, Any]:
    """A pattern as plain data."""
    d = p.domain
    return {
        "name": p.name,
        "version": p.version,
        "level": p.level,
        "benefit": p.benefit,
        "users": p.users,
        "anchors": sorted(_name(a) for a in p.anchors),
        "emits": sorted(p.emits),
        "before": sorted(p.before),
        "after": sorted(p.after),
        "spellings": [_name(f) for f in p.eager],
        "dtypes": [str(t).removeprefix("torch.") for t in d.dtypes],
        "dims": {k: f"{low}..{'' if high is None else high}" for k, (low, high) in d.dims.items()},
        "shapes": {k: list(v) for k, v in d.shapes.items()},
        "package": source,
        "file": _file(p),
        "summary": _summary(p),
    }


def listing(data: list[dict[str, Any]]) -> list[str]:
    """One line per pattern."""
    width = max((len(d["name"]) for d in data), default=0)
    lines = [f"{d['name']:<{width}}  O{d['level']}  {d['summary']}".rstrip() for d in data]
    packages = sorted({d["package"] for d in data})
    return [*lines, f"{len(data)} patterns from {', '.join(packages) or 'nowhere'}"]


def show(p: Any, source: str) -> list[str]:
    """All that is known about one pattern, then its source file."""
    data = describe(p, source)
    lines = [f"{key:<10} {_plain(value)}" for key, value in data.items() if value not in ("", [], {})]
    module = inspect.getmodule(_home(p))
    return [*lines, "", inspect.getsource(module).rstrip()] if module else lines


def _home(p: Any) -> Any:
    """What says where a pattern was written: the replacement of a declared one, else its class."""
    return inspect.unwrap(getattr(p, "replace", None) or type(p))


def _file(p: Any) -> str:
    home = _home(p)
    try:
        return f"{inspect.getsourcefile(home)}:{inspect.getsourcelines(home)[1]}"
    except (OSError, TypeError):
        return ""


def _summary(p: Any) -> str:
    module = inspect.getmodule(_home(p))
    doc = inspect.getdoc(module) if module else None
    return doc.splitlines()[0].replace("``", "").rstrip(".") if doc else ""


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", None) or str(thing)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} [{_plain(v)}]" if isinstance(v, list) else f"{k} {v}" for k, v in value.items())
    return str(value)
