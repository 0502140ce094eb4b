"""Putting off the Python code of a graph module: generating it costs more than all matching, and few ever run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx


def recompile_when_called(gm: fx.GraphModule) -> None:
    """Let ``gm`` generate its code at the next call instead of now. Copies and pickles generate their own anyway."""

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()  # puts the real forward in the place of this one
        return self.forward(*args, **kwargs)

    type(gm).forward = forward  # every GraphModule is the only instance of its class


@contextmanager
def one_recompile(gm: fx.GraphModule) -> Iterator[None]:
    """Inside, ``gm.recompile()`` is noted and put off; afterwards the code is generated when it is needed."""
    asked: list[bool] = []
    gm.__dict__["recompile"] = lambda: asked.append(True)
    try:
        yield
    finally:
        del gm.__dict__["recompile"]
        if asked:
            recompile_when_called(gm)
