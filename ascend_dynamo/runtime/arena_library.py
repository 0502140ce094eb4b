"""The C++ half of the arenas: compiled on first use, installed once per process, called through ctypes.

Its functions take no Python objects and hold no locks while they wait for anything, so they are called with the GIL
held (``PyDLL``), which makes a call cost a fraction of a microsecond.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import torch

from ascend_dynamo import native
from ascend_dynamo.errors import BuildError

_FOLDER = Path(__file__).resolve().parent
_SIZES = ctypes.POINTER(ctypes.c_uint64)
_TIMES = ctypes.POINTER(ctypes.c_int64)
_HANDLE = ctypes.c_void_p
# name -> result, arguments
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "install": (ctypes.c_char_p, ()),
    "installed": (ctypes.c_int, ()),
    "holds": (ctypes.c_int, (ctypes.c_void_p,)),
    "slot_bytes": (ctypes.c_uint64, ()),
    "range": (None, (_SIZES,)),
    "group": (_HANDLE, ()),
    "group_close": (None, (_HANDLE,)),
    "group_stats": (None, (_HANDLE, _SIZES)),
    "trim": (ctypes.c_uint64, (_HANDLE,)),
    "entry": (_HANDLE, (_HANDLE, ctypes.c_int)),
    "entry_close": (None, (_HANDLE,)),
    "entry_stats": (None, (_HANDLE, _SIZES)),
    "enter": (ctypes.c_int, (_HANDLE,)),
    "leave": (None, (_HANDLE, ctypes.c_int)),
    "recorded": (ctypes.c_uint64, (_HANDLE, ctypes.c_uint64, _SIZES, _TIMES, _TIMES)),
    "plan": (ctypes.c_char_p, (_HANDLE, ctypes.c_uint64, _SIZES, ctypes.c_uint64)),
    "off": (None, (_HANDLE,)),
}
_lock = threading.Lock()


class Native:
    """The functions ``arena_*`` of the library, without their prefix."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"arena_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for the type checker: all of them are set above
        raise AttributeError(name)


def _library() -> native.Library:
    torch_dir = Path(torch.__file__).resolve().parent
    flags = (
        *native.FLAGS,
        f"-I{torch_dir / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    )
    return native.Library(
        name="arena",
        title="memory arenas",
        folder="runtime",
        sources=((_FOLDER / "arena.cpp", flags),),
        headers=(_FOLDER / "arena_memory.h", _FOLDER / "arena_plan.h"),
        link=(f"-L{torch_dir / 'lib'}", "-lc10"),
        key=(torch.__version__, str(torch_dir)),
        log="ascend_dynamo.runtime",
    )


@functools.cache
def _load() -> Native | str:
    try:
        return Native(ctypes.PyDLL(str(native.build(_library()))))
    except (BuildError, OSError) as error:
        return f"their C++ part is not there: {error}"


def install() -> Native | str:
    """The library, its allocator serving this process; or, in words, why that cannot be.

    Another allocator than torch's own is left in place: what it does may rest on seeing every allocation.
    """
    with _lock:
        loaded = _load()
        if isinstance(loaded, str):
            return loaded
        reason = loaded.install()
        return loaded if reason is None else reason.decode()
