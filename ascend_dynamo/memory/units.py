"""Sizes in words: ``"8GB"`` to bytes and back. Units are powers of 1024, as memory is sold: 1 GB = 1 GiB = 2**30."""

from __future__ import annotations

import re

from ascend_dynamo.errors import MemoryPlanError

_UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """``"8GB"``, ``"512 MiB"``, ``"1.5g"`` or a number of bytes, as bytes.

    Raises:
        MemoryPlanError: it is no size, or not positive.
    """
    if isinstance(value, str):
        match = _FORM.fullmatch(value)
        if match:
            size = int(float(match[1]) * _UNITS[f"{match[2].upper()}B" if match[2] else ""])
            if size > 0:
                return size
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise MemoryPlanError(f'{value!r} is no size of memory: use a positive number of bytes, or "8GB", "512MB"')


def show_bytes(size: float) -> str:
    """``1536`` as ``1.50 KB``."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(size) >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.2f} {unit}"
    return f"{int(size)} B"
