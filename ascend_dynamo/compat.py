"""Familiar names for what is here: ``NPUConfig`` (switching fusion on, for ``torch.compile(..., options=
config.to_options())``), ``PagedAttention`` and ``MemoryPool``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ascend_dynamo.errors import OptionError
from ascend_dynamo.option_values import nearest, read_bool, read_level
from ascend_dynamo.options import Options
from ascend_dynamo.runtime.kv.attention import PagedAttention as PagedAttention
from ascend_dynamo.runtime.pool import MemoryPool as MemoryPool

_OWN = {"fuse_enable": read_bool, "fuse_level": read_level}


class NPUConfig:
    """``fuse_enable`` and ``fuse_level`` ("O0".."O3"), and every option of ``docs/options.md`` under its own name.

    Set them by keyword, by ``set_options``, as attributes or as items; a value is checked when it is set::

        config = NPUConfig().set_options(fuse_enable=True, fuse_level="O3")
        config.target = "cpu"
        config["strict"] = True
        compiled = torch.compile(model, backend="ascend_opt", options=config.to_options())

    Raises OptionError for an unknown name, with the nearest known one, or for an illegal value.
    """

    _values: dict[str, Any]

    def __init__(self, options: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        object.__setattr__(self, "_values", {"fuse_enable": True, "fuse_level": Options().level})
        self.set_options(options, **named)

    def set_options(self, options: Mapping[str, Any] | None = None, /, **named: Any) -> NPUConfig:
        """Set several at once, all or none; returns the config itself."""
        given = {**(options or {}), **named}
        checked = {name: _check(name, value) for name, value in given.items()}
        self._values.update(checked)
        return self

    def to_options(self) -> dict[str, Any]:
        """The ``options`` argument of ``torch.compile``: fusion off is level 0."""
        level = self._values["fuse_level"] if self._values["fuse_enable"] else 0
        return {"level": level, **{k: v for k, v in self._values.items() if k not in _OWN}}

    def __setattr__(self, name: str, value: Any) -> None:
        self.set_options({name: value})

    def __getattr__(self, name: str) -> Any:
        if name in (values := self.__dict__.get("_values", {})):
            return values[name]
        if name in _names():
            return getattr(Options(), name)
        raise AttributeError(f'NPUConfig has no option "{name}"; {nearest(name, _names())}')

    def __setitem__(self, name: str, value: Any) -> None:
        self.set_options({name: value})

    def __getitem__(self, name: str) -> Any:
        if name not in _names():
            raise KeyError(f'NPUConfig has no option "{name}"; {nearest(name, _names())}')
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NPUConfig) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"NPUConfig({', '.join(f'{k}={v!r}' for k, v in self._values.items())})"


def _names() -> set[str]:
    """``level`` is left out: here it is called ``fuse_level``."""
    return {*_OWN, *(f.name for f in fields(Options))} - {"level"}


def _check(name: str, value: Any) -> Any:
    if name not in _names():
        raise OptionError(f'NPUConfig has no option "{name}"; {nearest(str(name), _names())}')
    if name in _OWN:
        return _OWN[name](name, value)
    Options.resolve(None, {name: value}, {})
    return value
