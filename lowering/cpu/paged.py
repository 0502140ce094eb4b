"""The paged cache on the CPU: what is lowered to ``ascend_cpu``'s attention over pages and cache writes, and why.

The references gather every sequence's pages into a dense copy, and let every token meet every sequence; a write goes
through indices that it first repairs. So the kernels always win, without vectors too: they read what a sequence stored,
once, and copy rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import Builder, Facts, NoMatch

_ascend, _cpu = torch.ops.ascend, torch.ops.ascend_cpu
_CALL = 3e-6  # seconds of a small ATen call
_STREAM = 10e9  # bytes/s at which gathered caches and scores are written and read again
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (*DTYPES, torch.int8)


def attention_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    host = next((a for a in n.all_input_nodes if facts.val(a).device.type != "cpu"), None)
    if host is not None:
        found = f"%{host.name} on {facts.val(host).device}"
        return NoMatch("op", n, "tensors on the CPU", found, src=facts.src(n))
    return None


def attention_gain(n: fx.Node, isa: str) -> float:
    """A dense copy of all that the table reaches, and the scores of every token with all of it."""
    first = 2 if n.target is _ascend.paged_attention.default else 3
    q, cache, table = (n.args[i].meta["val"] for i in (0, first, first + 2))  # type: ignore[union-attr]
    keys = _elements(table.shape) * compat.size_hint(cache.shape[1])
    scores = 4 * _elements(q.shape[:2]) * keys
    dense = 2 * keys * _elements(cache.shape[2:]) * cache.dtype.itemsize
    return (dense + scores) / _STREAM + 10 * _CALL


def _elements(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= compat.size_hint(size)
    return total


def write_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    return None


def write_gain(n: fx.Node, isa: str) -> float:
    """The dozen calls by which indices are repaired."""
    return 10 * _CALL


def lower(n: fx.Node, b: Builder) -> fx.Node:
    """The kernel of the same name, which takes the same arguments."""
    name = str(n.target).split(".")[1]
    return b.op(getattr(_cpu, name).default, *n.args, **n.kwargs)
