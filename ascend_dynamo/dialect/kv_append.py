"""Caches that grow without being copied: kv_append, concatenation into a buffer with room to spare.

Vectors that grow by a constant factor cost amortised constant time per element; here the elements are tokens. What the
operator returns is a view of a buffer whose rows are tokens, ``[capacity, B, H, D]``: neither its strides nor its
address depend on how much room there is. State lives on the storage itself and dies with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ascend_dynamo.dialect.spec import Draw, OpSpec, Sample

SPARE = 256  # tokens of room in a new buffer, at least
_STATE = "_ascend_growth"


@dataclass
class _Growth:
    """A buffer [capacity, B, H, D], and how many rows of it are taken. Whoever takes rows is the only one who writes
    them, so two threads, or two continuations of one cache, never meet."""

    buffer: Tensor
    used: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, end: int, count: int) -> bool:
        """Take the ``count`` rows from ``end`` on, if these are the next free ones."""
        with self.lock:
            if self.used != end or end + count > self.buffer.shape[0]:
                return False
            self.used = end + count
            return True

    def view(self, start: int, end: int) -> Tensor:
        """Rows ``start`` to ``end`` as [B, H, tokens, D], a tensor of its own: for torch, operators return no views."""
        storage = self.buffer.untyped_storage()[:]
        setattr(storage, _STATE, self)
        _, batch, heads, width = self.buffer.shape
        row = batch * heads * width
        shape, strides = (batch, heads, end - start, width), (heads * width, width, row, 1)
        return self.buffer.new_empty(0).set_(storage, start * row, shape, strides)  # type: ignore[call-overload]


def kv_append(past: Tensor, new: Tensor) -> Tensor:
    """cat([past, new], -2), where appending to what this operator returned copies only the new tokens.

    past [B,H,S,D], new [B,H,n,D] of one dtype and device; result [B,H,S+n,D] with the strides [H*D, D, B*H*D, 1].

    The result may be a view of the memory of ``past``, whose own tokens stay as they are: results are values, and
    nobody should write into one in place, for older and newer ones would show it. If another result already continues
    ``past``, or it was cropped, reordered or made elsewhere, it is copied once, into a buffer with room for at least
    half as many tokens again.

    Raises:
        ValueError: the shapes do not fit, or dtypes or devices differ.
    """
    _check(past, new)
    return torch.cat((past, new), -2).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def _check(past: Tensor, new: Tensor) -> None:
    if past.dim() != 4 or new.dim() != 4:
        raise ValueError(f"kv_append: past and new have {past.dim()} and {new.dim()} axes; both need [B, H, tokens, D]")
    if past.dtype != new.dtype or past.device != new.device:
        found = f"{past.dtype} on {past.device} and {new.dtype} on {new.device}"
        raise ValueError(f"kv_append: past and new are {found}; convert the new tokens first")


def _append(past: Tensor, new: Tensor) -> Tensor:
    _check(past, new)
    (batch, heads, tokens, width), count = past.shape, new.shape[2]
    if new.shape != (batch, heads, count, width):
        raise ValueError(
            f"kv_append: past {list(past.shape)} and new {list(new.shape)} differ in more than their tokens"
        )
    growth = _growth(past)
    start = 0 if growth is None else past.storage_offset() // (batch * heads * width)
    if growth is None or not growth.take(start + tokens, count):
        start, total = 0, tokens + count
        buffer = past.new_empty((total + max(SPARE, total // 2), batch, heads, width))
        buffer[:tokens].copy_(past.permute(2, 0, 1, 3))
        growth = _Growth(buffer, total)
    growth.buffer[start + tokens : start + tokens + count].copy_(new.permute(2, 0, 1, 3))
    return growth.view(start, start + tokens + count)


def _growth(past: Tensor) -> _Growth | None:
    """The buffer of which ``past`` is a run of rows; None if it is another kind of tensor."""
    growth: _Growth | None = getattr(past.untyped_storage(), _STATE, None)
    if growth is None or growth.buffer.is_inference() != torch.is_inference_mode_enabled():
        return None
    batch, heads, _, width = past.shape
    row = batch * heads * width
    strides = (heads * width, width, row, 1)
    if past.dtype != growth.buffer.dtype or growth.buffer.shape[1:] != (batch, heads, width) or row == 0:
        return None
    regular = all(n == 1 or s == t for n, s, t in zip(past.shape, past.stride(), strides, strict=True))
    return growth if regular and past.storage_offset() % row == 0 else None


def _fake(past: Tensor, new: Tensor) -> Tensor:
    batch, heads, tokens, width = past.shape
    shape = (batch, heads, tokens + new.shape[2], width)
    return past.new_empty_strided(shape, (heads * width, width, batch * heads * width, 1))


def _f64(past: Tensor, new: Tensor) -> Tensor:
    batch, heads, tokens, width = past.shape
    y = torch.zeros(batch, heads, tokens + new.shape[2], width, dtype=torch.float64)
    for t in range(y.shape[2]):
        y[:, :, t] = past[:, :, t] if t < tokens else new[:, :, t - tokens]
    return y


def _samples(d: Draw) -> Iterator[Sample]:
    yield Sample((d.normal(2, 3, 5, 4), d.normal(2, 3, 1, 4)), {}, "one token")
    yield Sample((d.normal(1, 3, 5, 4), d.normal(1, 3, 4, 4)), {}, "several tokens, one sequence")
    yield Sample((d.normal(2, 6, 3, 4).transpose(1, 2), d.normal(2, 3, 2, 4)), {}, "another layout")


SPECS = (
    OpSpec(
        "kv_append",
        "(Tensor past, Tensor new) -> Tensor",
        kv_append,
        _fake,
        _f64,
        c_ulp=0.0,
        samples=_samples,
        kernel=_append,
    ),
)
