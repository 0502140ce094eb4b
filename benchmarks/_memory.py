"""How much memory a call needs: the peak of the process above where it stood."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available() -> float:
    """Bytes that new processes can have without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def resident() -> float:
    """Bytes of this process that are in memory now (nan off Linux)."""
    return _field(_STATUS, "VmRSS") if _STATUS.exists() else float("nan")


def _field(path: Path, name: str) -> float:
    line = next(x for x in path.read_text().splitlines() if x.startswith(name + ":"))
    return 1024.0 * int(line.split()[1])


def peak_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``call`` and the bytes by which the process's resident memory rose at its highest (nan off Linux).

    What the allocator kept from earlier calls is given back first, so that memory used again counts again; memory
    that a library keeps to itself between calls does not.
    """
    if not _CLEAR.exists():
        return call(), float("nan")
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the high-water mark falls to what is resident now
    before = _field(_STATUS, "VmRSS")
    result = call()
    return result, max(0.0, _field(_STATUS, "VmHWM") - before)
