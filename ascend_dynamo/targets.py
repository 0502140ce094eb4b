"""Targets: which one to compile for, and the installed lowerings, found by entry point."""

from __future__ import annotations

from importlib.metadata import entry_points

import torch

from ascend_dynamo.contracts import Lowering
from ascend_dynamo.errors import OptionError

GROUP = "ascend_dynamo.lowerings"


def installed_targets() -> tuple[str, ...]:
    """Names of the targets that have a lowering installed."""
    return tuple(sorted({e.name for e in entry_points(group=GROUP)}))


def choose_target(target: str = "auto") -> str:
    """``auto`` resolved: the NPU if torch sees one, else the CPU."""
    if target != "auto":
        return target
    npu = getattr(torch, "npu", None)
    return "npu" if npu is not None and npu.is_available() else "cpu"


def load_lowering(target: str = "auto") -> Lowering:
    """A fresh lowering for ``target``.

    Raises:
        OptionError: no lowering of that name is installed.
    """
    name = choose_target(target)
    found = [e for e in entry_points(group=GROUP) if e.name == name]
    if not found:
        raise OptionError(
            f'option "target": no lowering for "{name}" is installed (installed: {", ".join(installed_targets())})'
        )
    lowering: Lowering = found[0].load()()
    return lowering
