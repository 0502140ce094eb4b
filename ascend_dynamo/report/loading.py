"""Find the model that a command line names: ``file.py:callable`` or ``package.module:callable``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ascend_dynamo.errors import AscendDynamoError


class TargetError(AscendDynamoError, ValueError):
    """A SCRIPT_OR_MODULE:CALLABLE that does not lead to a model and its arguments."""


def load_target(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call what ``spec`` names, which returns ``(model, args)`` or ``(model, args, kwargs)``.

    ``args`` is a tuple or one single argument. A script's own directory is on ``sys.path`` while it is loaded.

    Raises:
        TargetError: the spec has no colon, the file or module or callable is missing, or it returned something else.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(f"{spec!r} names no callable: write path/to/script.py:callable or package.module:callable")
    module = _script(Path(place)) if place.endswith(".py") else _module(place)
    make = getattr(module, name, None)
    if not callable(make):
        others = sorted(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
        raise TargetError(f"{place} has no callable {name!r}; it has: {', '.join(others) or 'none'}")
    made = make()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise TargetError(f"{spec} must return (model, args) or (model, args, kwargs), returned {type(made).__name__}")
    model, args = made[0], made[1]
    kwargs = made[2] if len(made) == 3 else {}
    if isinstance(args, Mapping):
        return model, (), {**args, **kwargs}
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), dict(kwargs)


def _script(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(f"there is no module {name!r}; a script needs its .py suffix") from None
        raise
