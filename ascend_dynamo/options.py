"""One immutable, validated ``Options``, decided at the edge: explicit, else environment, else default.

Every field carries its documentation; ``docs/options.md`` holds the table that ``markdown_table`` renders.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ascend_dynamo.cache.gears import Gears
from ascend_dynamo.contracts import Level
from ascend_dynamo.errors import OptionError
from ascend_dynamo.option_values import (
    MODES,
    Frozen,
    illegal,
    nearest,
    read_arena,
    read_bool,
    read_cache,
    read_dump,
    read_expect,
    read_gears,
    read_level,
    read_memory,
    read_mode,
    read_patterns,
    read_plugins,
    read_target,
    split_plugins,
)

PREFIX = "ASCEND_DYNAMO_"
OTHER_VARIABLES = frozenset({"LOGS", "CACHE_DIR", "CPU_ISA"})  # variables of ours that are not options


def _about(read: Callable[[str, Any], Any], values: str, doc: str) -> dict[str, Any]:
    return {"read": read, "values": values, "doc": doc}


@dataclass(frozen=True)
class Options:
    """Everything that a compilation may be told: made by ``resolve``, changed by ``replace``."""

    target: str = field(
        default="auto",
        metadata=_about(
            read_target,
            "auto, cpu, npu, reference, or an installed lowering",
            "Where to run; auto: the NPU if there is one.",
        ),
    )
    level: Level = field(
        default=2,
        metadata=_about(
            read_level,
            "0..3 or O0..O3",
            "Numeric promise. O0: no fusion. O1: bit-exact on the reference target. O2: reassociation and"
            " flash attention within the tolerance of the dtype. O3: lossy patterns too.",
        ),
    )
    patterns: Mapping[str, bool] = field(
        default=Frozen(),
        metadata=_about(
            read_patterns,
            "{name: bool}, or a list of name, -name",
            "Patterns on or off by name; the name `*` speaks for all that are not named. Pattern and Registry"
            " objects in a list are moved to `plugins`.",
        ),
    )
    plugins: tuple[Any, ...] = field(
        default=(),
        metadata=_about(
            read_plugins,
            "Pattern or Registry objects",
            "Patterns of your own, beside the built-in and the installed ones.",
        ),
    )
    strict: bool = field(
        default=False,
        metadata=_about(
            read_bool,
            "True, False",
            "Errors instead of quarantine: a faulty pattern raises, and so does a forced `fuse()` region that"
            " does not fuse. Turns `validate` on unless that is given.",
        ),
    )
    validate: bool = field(
        default=False,
        metadata=_about(
            read_bool,
            "True, False",
            "Translation validation: run before and after of every match on numbers while compiling.",
        ),
    )
    expect: Mapping[str, int] = field(
        default=Frozen(),
        metadata=_about(
            read_expect,
            "{name: count}",
            "How often patterns must fire in each graph; anything else is an error.",
        ),
    )
    cache: bool | str = field(
        default=True,
        metadata=_about(read_cache, "True, False, directory", "Whether to keep compiled artifacts, and where."),
    )
    gears: Gears | None = field(
        default=None,
        metadata=_about(
            read_gears,
            'None, {"batch": [1, 2, 4], "seq": "pow2"}',
            "Sizes that dynamic dimensions are padded to.",
        ),
    )
    dump: str | None = field(
        default=None,
        metadata=_about(read_dump, "None, directory", "Write the texts and the report of every graph there."),
    )
    arena: str = field(
        default="on",
        metadata=_about(
            read_arena,
            "on, off, poison",
            "Whether intermediates live in a planned arena, where the target has one. poison: fill what is handed out"
            " and what is freed with NaN, to find reads of memory that nobody wrote.",
        ),
    )
    memory_limit: int | None = field(
        default=None,
        metadata=_about(
            read_memory,
            'None, bytes, or "8GB"',
            "What a call of a compiled graph may take, weights and caches included: one that would take more raises"
            " `MemoryLimitError` before it runs.",
        ),
    )
    mode: str | None = field(
        default=None,
        metadata=_about(
            read_mode,
            ", ".join(MODES),
            "torch.compile's mode. `reduce-overhead` captures graphs on the NPU and means nothing on a CPU.",
        ),
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, f.metadata["read"](f.name, getattr(self, f.name)))

    @classmethod
    def resolve(
        cls,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Options:
        """Explicit ``options`` (and ``mode``) over ``ASCEND_DYNAMO_<NAME>`` variables over defaults.

        Raises OptionError for an unknown name, with the nearest legal one, and for an illegal value.
        """
        given = dict(_from_environment(os.environ if environ is None else environ))
        given |= split_plugins(_known(options or {}))
        if mode is not None:
            given["mode"] = mode
        if given.get("strict") is True:
            given.setdefault("validate", True)
        return cls(**given)

    def replace(self, **changes: Any) -> Options:
        """A copy with some options changed, validated like the original."""
        return replace(self, **split_plugins(_known(changes)))

    def enabled(self, pattern: str) -> bool:
        """Whether ``patterns`` leaves a pattern of that name on (level and regions have their own say)."""
        return self.patterns.get(pattern, self.patterns.get("*", True))

    def for_patterns(self, groups: Mapping[str, Sequence[str]]) -> Options:
        """These options with every name in ``patterns`` spelled out; ``groups`` is ``Registry.groups``.

        A pattern's own name wins over that of the dialect op which it emits. Raises OptionError if ``patterns`` or
        ``expect`` has a name that is in no group.
        """
        for option in ("patterns", "expect"):
            for name in getattr(self, option):
                if name not in groups and name != "*":
                    raise OptionError(f'option "{option}": no pattern is named "{name}"; {nearest(name, groups)}')
        wide = {m: on for name, on in self.patterns.items() for m in groups.get(name, (name,)) if m != name}
        return self.replace(patterns={**wide, **self.patterns})

    def digest(self) -> str:
        """Hex digest of everything that can change what is compiled, or what compiling must complain about.

        ``cache`` and ``dump`` only say where to write, ``arena`` where intermediates lie; ``memory_limit`` is checked
        call by call. Plugins enter by name: the registry's digest, another component of the cache key, covers their
        sources.
        """
        body = {f.name: _canonical(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_COMPILED}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


_NOT_COMPILED = ("arena", "cache", "dump", "memory_limit")


def _canonical(value: Any) -> Any:
    if isinstance(value, Gears):
        return repr(value)
    if isinstance(value, tuple):
        return [getattr(v, "name", type(v).__name__) for v in value]
    return value


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(Options)}
    for name in options:
        if name not in names:
            raise OptionError(f'there is no option "{name}"; {nearest(str(name), names)}')
    return dict(options)


_WORDS = {
    "1": True,
    "true": True,
    "on": True,
    "yes": True,
    "0": False,
    "false": False,
    "off": False,
    "no": False,
}


def _from_environment(environ: Mapping[str, str]) -> Iterable[tuple[str, Any]]:
    names = {f.name.upper(): f.name for f in fields(Options) if f.name != "plugins"}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or (key := variable.removeprefix(PREFIX)) in OTHER_VARIABLES:
            continue
        if key not in names:
            raise OptionError(f"there is no variable {variable}; {nearest(key, {*names, *OTHER_VARIABLES})}")
        try:
            yield names[key], _read_text(names[key], text.strip())
        except OptionError as error:
            raise OptionError(f"{error} (from the environment variable {variable})") from None


def _read_text(name: str, text: str) -> Any:
    """The value that a variable's text spells, checked."""
    value: Any = text
    if name in ("strict", "validate", "cache", "arena"):
        value = _WORDS.get(text.lower(), text)
    elif name == "patterns":
        value = [part.strip() for part in text.split(",") if part.strip()]
    elif name in ("expect", "gears") and text:
        value = _json_or_pairs(name, text)
    elif name == "dump":
        value = text or None
    elif name == "memory_limit":
        value = int(text) if text.isdecimal() else text or None
    reader = Options.__dataclass_fields__[name].metadata["read"]
    return reader(name, value)


def _json_or_pairs(name: str, text: str) -> Any:
    """``{"a": 1}`` as JSON, or the shorthand ``a=1,b=2``."""
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise illegal(name, text, f"JSON ({error}) or name=value,name=value") from None
    pairs = [part.partition("=") for part in text.split(",")]
    return {key.strip(): int(v) if v.strip().isdecimal() else v.strip() for key, _, v in pairs}


def markdown_table() -> str:
    """The table of ``docs/options.md``: every option with its values, default and meaning."""
    rows = ["| option | values | default | variable | meaning |", "|---|---|---|---|---|"]
    default = Options()
    for f in fields(Options):
        variable = "" if f.name == "plugins" else f"`{PREFIX}{f.name.upper()}`"
        values, doc = f.metadata["values"].replace("|", "\\|"), f.metadata["doc"]
        rows.append(f"| `{f.name}` | {values} | `{getattr(default, f.name)!r}` | {variable} | {doc} |")
    return "\n".join(rows)
