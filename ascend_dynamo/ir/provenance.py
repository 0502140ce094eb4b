"""Where a node comes from: the user's line, and the fuse region around it."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_HIDDEN = tuple(str(Path(d).resolve()) + "/" for d in (Path(torch.__file__).parent, Path(__file__).parent.parent))
_COPIED = ("stack_trace", "nn_module_stack", "custom", "source_fn_stack", "seq_nr")


def src(node: fx.Node) -> tuple[str, int] | None:
    """The innermost user frame (file, line) of a node: neither inside torch nor inside this package."""
    return src_of_trace(node.meta.get("stack_trace") or "")


def src_of_trace(trace: str) -> tuple[str, int] | None:
    """The innermost user frame of a stack trace in text form."""
    return _last_user_frame(trace) if trace else None


def short_src(node: fx.Node) -> str:
    """``model.py:88``, or "" if the node has no user line."""
    found = src(node)
    return f"{found[0].rsplit('/', 1)[-1]}:{found[1]}" if found else ""


def region(node: fx.Node) -> str:
    """The fuse / no_fuse region, "" outside any."""
    return (node.meta.get("custom") or {}).get("ascend_region", "")


def copy_provenance(origin: fx.Node | None, node: fx.Node) -> None:
    """Give ``node`` the user line, module path and region of ``origin``."""
    if origin is not None:
        meta = origin.meta
        for key in _COPIED:
            if key in meta:
                node.meta[key] = meta[key]


@lru_cache(maxsize=8192)
def _last_user_frame(trace: str) -> tuple[str, int] | None:
    for file, line in reversed(_FRAME.findall(trace)):
        if not file.startswith(_HIDDEN) and not file.startswith("<"):
            return file, int(line)
    return None
