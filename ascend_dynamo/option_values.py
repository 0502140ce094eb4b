"""What each option may be: readers that return the value in its one form, or say what would be legal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from ascend_dynamo.cache.gears import Gears
from ascend_dynamo.contracts import Level
from ascend_dynamo.errors import MemoryPlanError, OptionError
from ascend_dynamo.memory.units import parse_bytes

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ARENAS = ("on", "off", "poison")
TARGETS = ("auto", "cpu", "npu", "reference")
LOWERINGS = "ascend_dynamo.lowerings"  # the entry point group that adds targets


class Frozen(dict[str, Any]):
    """A small mapping that nobody can change: hashable and picklable, which ``MappingProxyType`` is not."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("options are immutable: use options.replace(name=value)")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse  # type: ignore[assignment]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: ``did you mean "x"?`` or the list of legal names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known) or 'none'}"


def illegal(name: str, value: object, legal: str) -> OptionError:
    return OptionError(f'option "{name}": {value!r} is not legal; use {legal}')


def choice(legal: tuple[str, ...]) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if value in legal:
            return str(value)
        hint = f" ({nearest(value, legal)})" if isinstance(value, str) else ""
        raise illegal(name, value, f"one of {', '.join(map(repr, legal))}{hint}")

    return read


def read_target(name: str, value: Any) -> str:
    """One of ours, or the name of any installed lowering."""
    if isinstance(value, str) and value not in TARGETS:
        return choice((*TARGETS, *sorted({e.name for e in entry_points(group=LOWERINGS)} - set(TARGETS))))(name, value)
    return choice(TARGETS)(name, value)


def read_mode(name: str, value: Any) -> str | None:
    return None if value is None else choice(MODES)(name, value)


def read_arena(name: str, value: Any) -> str:
    """True and False are words for on and off."""
    return choice(ARENAS)(name, {True: "on", False: "off"}[value] if isinstance(value, bool) else value)


def read_level(name: str, value: Any) -> Level:
    text = str(value).upper().removeprefix("O")
    if isinstance(value, bool) or not isinstance(value, (int, str)) or text not in ("0", "1", "2", "3"):
        raise illegal(name, value, "0, 1, 2, 3 or 'O0', 'O1', 'O2', 'O3'")
    return int(text)  # type: ignore[return-value]


def read_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise illegal(name, value, "True or False")
    return value


def read_patterns(name: str, value: Any) -> Frozen:
    legal = "a mapping of pattern name to True or False, or a list of names ('-name' is off) and patterns"
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Mapping):
        names = [v for v in value if isinstance(v, str)] if isinstance(value, Iterable) else None
        if names is None or not all(n.lstrip("+-") for n in names):
            raise illegal(name, value, legal)
        value = {n.lstrip("+-"): not n.startswith("-") for n in names}
    for key, on in value.items():
        if not isinstance(key, str) or not isinstance(on, bool):
            raise illegal(name, {key: on}, legal)
    return Frozen(value)


def read_plugins(name: str, value: Any) -> tuple[Any, ...]:
    legal = "Pattern or Registry objects (as returned by ascend_dynamo.match.declare), or a list of them"
    if hasattr(value, "match"):
        return (value,)
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise illegal(name, value, legal)
    if callable(getattr(value, "digest", None)):  # a registry stays whole: it names itself in errors
        return (value,)
    items = tuple(value)
    for item in items:
        if isinstance(item, (str, Mapping)) or not (hasattr(item, "match") or isinstance(item, Iterable)):
            raise illegal(name, item, legal)
    return items


def read_expect(name: str, value: Any) -> Frozen:
    legal = "a mapping of pattern name to the number of times that it must fire, such as {'rms_norm': 4}"
    if not isinstance(value, Mapping):
        raise illegal(name, value, legal)
    for key, count in value.items():
        good = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        if not isinstance(key, str) or not good:
            raise illegal(name, {key: count}, legal)
    return Frozen(value)


def read_cache(name: str, value: Any) -> bool | str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) or (isinstance(value, str) and value):
        return value
    raise illegal(name, value, "True, False or the path of a directory")


def read_gears(name: str, value: Any) -> Gears | None:
    if value is None or isinstance(value, Gears):
        return value
    if not isinstance(value, Mapping):
        raise illegal(name, value, 'None or a mapping such as {"batch": [1, 2, 4, 8], "seq": "pow2"}')
    return Gears.parse(value)


def read_dump(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, (str, os.PathLike)) and str(value)):
        return None if value is None else os.fspath(value)
    raise illegal(name, value, "None or the path of a directory")


def read_memory(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        return parse_bytes(value)
    except MemoryPlanError:
        raise illegal(name, value, 'None, a positive number of bytes, or "8GB", "512MB"') from None


def split_plugins(options: dict[str, Any]) -> dict[str, Any]:
    """Move pattern objects out of ``patterns`` into ``plugins``."""
    value = options.get("patterns")
    whole = hasattr(value, "match") or callable(getattr(value, "digest", None))
    if not whole and (isinstance(value, (str, Mapping)) or not isinstance(value, Iterable)):
        return options
    names: list[str] = []
    objects: list[Any] = [value]
    if not whole:
        items = list(value or ())
        names = [v for v in items if isinstance(v, str)]
        objects = [v for v in items if not isinstance(v, str)]
    extra = tuple(read_plugins("plugins", options.get("plugins", ())))
    return {**options, "patterns": names, "plugins": (*extra, *read_plugins("patterns", objects))}
