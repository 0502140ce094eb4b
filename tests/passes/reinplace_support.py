"""Compile a function that writes its arguments, and compare it with eager: results, arguments, and what is copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ascend_dynamo.backend import Backend
from ascend_dynamo.report.records import CompileRecord


def backend(**options: Any) -> Backend:
    return Backend({"target": "reference", "strict": True, **options}, texts=True)


def compiled(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    steps: int = 2,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
) -> CompileRecord:
    """``fn`` on ``args``, called ``steps`` times compiled and in eager mode, is the same bit for bit; the record."""
    torch._dynamo.reset()
    own = backend(**(options or {}))
    theirs = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    ours = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with torch.no_grad():
        run = torch.compile(fn, backend=own, dynamic=dynamic, fullgraph=True)
        for _ in range(steps):
            want, got = fn(*theirs), run(*ours)
            for a, b in zip(leaves(want), leaves(got), strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
            for a, b in zip(theirs, ours, strict=True):
                if isinstance(a, torch.Tensor):
                    torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    assert len(own.records) == 1, "it was compiled again"
    (record,) = own.records
    assert not record.quarantined
    return record


def leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def ops(record: CompileRecord, name: str) -> int:
    """How many calls of an operator the final graph has."""
    return sum(f" = {name}(" in line for line in record.after.splitlines())


def copied_notes(record: CompileRecord) -> list[str]:
    return [n for n in record.notes if n.startswith("reinplace: %")]
