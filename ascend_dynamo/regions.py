"""Regions: ``with fuse("name"):`` must fuse, ``with no_fuse():`` must not, and no pattern crosses a border.

Both are context managers and decorators. Entering and leaving a region are calls of two operators that do nothing to
tensors. Dynamo therefore records them in program order, through inlining, recursion and exceptions; ``mark`` turns
the brackets of a captured graph into ``node.meta["custom"]["ascend_region"]``, which AOTAutograd carries along, and
takes them out. Frames that Dynamo compiles on their own (behind a graph break) are compiled while the region is
entered for real, in plain Python; ``mark`` starts them with the regions that are active then.

A region is spelled ``no_fuse`` or ``fuse:a,b``, then ``@file:line#k`` so that two sites, or two passes through one
site, never merge; nested regions are joined by ``/`` and the innermost one decides.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Generator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import fx

from ascend_dynamo import _torch_compat

KEY = "ascend_region"
F = TypeVar("F", bound=Callable[..., Any])

_ACTIVE: ContextVar[tuple[str, ...]] = ContextVar("ascend_dynamo_regions", default=())

_library = torch.library.Library("ascend_region", "DEF")
_library.define("enter(str label) -> ()")
_library.define("leave() -> ()")
_library.impl("enter", lambda label: _ACTIVE.set((*_ACTIVE.get(), label)) and None, "CompositeExplicitAutograd")
_library.impl("leave", lambda: _ACTIVE.set(_ACTIVE.get()[:-1]) and None, "CompositeExplicitAutograd")
torch.library.register_fake("ascend_region::enter", lambda label: None, lib=_library)
torch.library.register_fake("ascend_region::leave", lambda: None, lib=_library)

_ENTER = (torch.ops.ascend_region.enter, torch.ops.ascend_region.enter.default)
_LEAVE = (torch.ops.ascend_region.leave, torch.ops.ascend_region.leave.default)


class Region:
    """What ``fuse`` and ``no_fuse`` return: enter it with ``with``, or decorate a function with it.

    Inside a compiled function, write the call in the ``with`` statement itself: Dynamo cannot enter a context manager
    that was made outside. A graph break directly inside a ``with`` block leaves that function to eager, as for any
    context manager (functions that it calls are still compiled, in the region); a decorated function is compiled on
    both sides of its breaks.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    def __enter__(self) -> Region:
        torch.ops.ascend_region.enter(self.label)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.ops.ascend_region.leave()

    def __call__(self, function: F) -> F:
        """The function with its body in this region. Generators are in it while they run, not while suspended.

        TypeError for coroutines, classes and module objects: decorate the method that computes.
        """
        if inspect.iscoroutinefunction(function) or not inspect.isroutine(function):
            raise TypeError(f"a region decorates functions and methods, not {function!r}; decorate its forward")
        label = self.label
        if inspect.isgeneratorfunction(function):
            return _generator_in_region(label, function)  # type: ignore[return-value]

        @functools.wraps(function)
        def in_region(*args: Any, **kwargs: Any) -> Any:
            with Region(label):
                return function(*args, **kwargs)

        return in_region  # type: ignore[return-value]


def _generator_in_region(label: str, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def in_region(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        running = function(*args, **kwargs)
        sent = None
        while True:
            with Region(label):
                try:
                    item = running.send(sent)
                except StopIteration as stop:
                    return stop.value
            sent = yield item

    return in_region


def fuse(*names: str) -> Region:
    """A region whose nodes fuse only among themselves; in strict mode each named pattern must fire in it.

    TypeError or ValueError for a name that cannot be a pattern's.
    """
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"fuse() takes names of patterns, not {name!r}; decorate with @fuse(...) instead")
        if not name or any(c in name for c in "/@,#: "):
            raise ValueError(f"{name!r} cannot be the name of a pattern")
    return Region("fuse:" + ",".join(names))


def no_fuse() -> Region:
    """A region in which no pattern fires."""
    return Region("no_fuse")


def innermost(region: str) -> str:
    """The region that decides, without its site: ``""``, ``"no_fuse"`` or ``"fuse:a,b"``."""
    return region.rpartition("/")[2].partition("@")[0]


def forced(region: str) -> tuple[str, ...]:
    """The names of the patterns that must fire in a region; empty unless its innermost part is a ``fuse``."""
    kind, _, names = innermost(region).partition(":")
    return tuple(name for name in names.split(",") if name) if kind == "fuse" else ()


def active() -> str:
    """The regions that running Python code is in, outside of any compiled graph."""
    return "/".join(_ACTIVE.get())


def mark(gm: fx.GraphModule) -> int:
    """Turn the brackets in a graph that Dynamo captured into ``meta["custom"]`` of the nodes between; in place.

    Returns how many regions the graph enters. Call it first in a backend; bodies of control flow are included.
    """
    return _mark(gm, list(_ACTIVE.get()), 0)


def _mark(gm: fx.GraphModule, stack: list[str], entered: int) -> int:
    before = entered
    for node in list(gm.graph.nodes):
        if node.target in _ENTER:
            stack.append(f"{node.args[0]}@{_site(node)}#{entered}")
            entered += 1
            gm.graph.erase_node(node)
        elif node.target in _LEAVE:
            del stack[-1:]
            gm.graph.erase_node(node)
        elif node.op == "get_attr" and isinstance(body := getattr(gm, str(node.target), None), fx.GraphModule):
            entered = _mark(body, list(stack), entered)
        elif stack and node.op not in ("placeholder", "output"):
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: "/".join(stack)}
    if entered > before:
        gm.recompile()
    return entered


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_HERE = os.path.basename(__file__)


def _site(node: fx.Node) -> str:
    """``file:line`` of the user's ``with`` statement, or of the call of the decorated function."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or node.stack_trace or "")
    for path, line in reversed(frames):
        if path != __file__:
            return f"{os.path.basename(path).replace('/', '_')}:{line}"
    return "?"


# Run by eager code, entering a region is not worth a compiled frame of its own, and must really happen.
_torch_compat.never_compile_frame(Region.__enter__)
_torch_compat.never_compile_frame(Region.__exit__)
