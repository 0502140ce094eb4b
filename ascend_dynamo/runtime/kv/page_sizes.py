"""Which page sizes a target's kernels can read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ascend_dynamo.contracts import Lowering
from ascend_dynamo.errors import PageSizeError
from ascend_dynamo.targets import load_lowering


@dataclass(frozen=True)
class PageSizes:
    """Legal page sizes, in tokens: multiples of ``multiple`` up to ``largest`` (None: any)."""

    multiple: int = 1
    largest: int | None = None
    recommended: int = 16

    def __str__(self) -> str:
        step = "any" if self.multiple == 1 else f"a multiple of {self.multiple}"
        return f"{step}{'' if self.largest is None else f', at most {self.largest}'} ({self.recommended} recommended)"

    def check(self, size: int, target: str, dtype: torch.dtype) -> int:
        """``size`` itself. PageSizeError, with what is legal, if the target cannot use it."""
        legal = size >= 1 and size % self.multiple == 0 and (self.largest is None or size <= self.largest)
        if not legal:
            raise PageSizeError(f"page_size={size} is illegal for {dtype} pages on target {target!r}; legal is {self}")
        return size


def page_sizes(target: str | Lowering, dtype: torch.dtype) -> PageSizes:
    """What a target (a name as in ``options["target"]``, or a lowering) allows for pages of ``dtype``.

    A lowering says it by a method ``page_sizes(dtype)``; one without has no limits.
    """
    lowering = load_lowering(target) if isinstance(target, str) else target
    ask = getattr(lowering, "page_sizes", None)
    return PageSizes() if ask is None else ask(dtype)


def checked_page_size(size: int | None, target: str | Lowering, dtype: torch.dtype) -> int:
    """``size``, or the recommended one for None. PageSizeError if the target cannot use it."""
    lowering = load_lowering(target) if isinstance(target, str) else target
    legal = page_sizes(lowering, dtype)
    return legal.recommended if size is None else legal.check(size, lowering.target, dtype)
