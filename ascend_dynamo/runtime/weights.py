"""Weights merged by aliasing: one tensor holds the data, the model's own parameters become slices of it.

There is one copy of every weight, and in-place writes, ``.data`` writes and ``load_state_dict`` show through, which no
version counter could see. What makes it safe is that re-storing a parameter is only done when nobody else can reach
its memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ascend_dynamo import _torch_compat as compat

_restoring = threading.Lock()  # two graphs of one model may bind at the same time


def are_adjacent(parts: Sequence[torch.Tensor]) -> bool:
    """True if the ``parts`` already are consecutive slices along axis 0 of one stretch of memory."""
    where = parts[0].data_ptr()
    storage = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != where or not part.is_contiguous() or part.untyped_storage().data_ptr() != storage:
            return False
        where += part.numel() * part.element_size()
    return True


def why_not_mergeable(parts: Sequence[torch.Tensor]) -> str:
    """Why ``parts`` must not become slices of one tensor; "" if they may (or already are)."""
    for part in parts:
        if type(part) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"a weight is a {type(part).__name__}, whose storage is its own business"
        if part.layout != torch.strided or part.is_quantized or part.is_meta:
            return "a weight is not a dense tensor in memory"
    if len({id(part) for part in parts}) < len(parts):
        return "the same weight is used twice"
    if len({(p.dtype, p.device, p.shape[1:]) for p in parts}) > 1:
        return "the weights differ in dtype, device or trailing shape"
    if not all(part.is_contiguous() for part in parts):
        return "a weight is not contiguous"
    if any(part.numel() == 0 for part in parts):
        return "a weight is empty"
    if any(part.is_inference() for part in parts):
        return "a weight was created in inference mode and cannot be re-stored"
    if are_adjacent(parts):
        return ""
    for part in parts:
        if part.untyped_storage().nbytes() != part.numel() * part.element_size():
            return "a weight is a view into a larger tensor (tied, memory-mapped, or already merged with others)"
        if compat.storage_use_count(part) > 1:
            return "a weight shares its memory with another tensor"
    return ""


def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[sum(n_i), ...]``, of which ``parts`` ``[n_i, ...]`` become (or already are) the slices along axis 0.

    Call ``why_not_mergeable`` first.
    """
    with _restoring, torch.no_grad(), compat.no_dispatch_modes():
        if are_adjacent(parts):
            rows = sum(part.shape[0] for part in parts)
            return parts[0].detach().as_strided((rows, *parts[0].shape[1:]), parts[0].stride())
        merged = torch.cat([part.detach() for part in parts])
        row = 0
        for part in parts:
            part.data = merged[row : row + part.shape[0]]
            row += part.shape[0]
    return merged


def refresh(model: torch.nn.Module) -> None:
    """Tell every compiled graph that the weights of ``model`` changed.

    Needed only after writes through ``.data`` while a plugin or target packs or quantises weights: merged weights see
    every write by themselves, and ordinary in-place writes and replaced parameters are noticed.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
