"""The memory of one layer's pages, written and read through the dialect's operators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ascend_dynamo import dialect as _dialect  # registers the operators  # noqa: F401
from ascend_dynamo._torch_compat import mark_static_sizes
from ascend_dynamo.runtime.kv.records import ABSENT

if TYPE_CHECKING:
    from ascend_dynamo.runtime.pool import MemoryPool

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh pages. Zeros cost nothing until they are touched: the system gives zeroed memory page by page."""
    return torch.zeros(shape, dtype=dtype, device=device)


class PoolMemory:
    """Zeroed pages out of a ``MemoryPool``, which ``free`` gives back."""

    def __init__(self, pool: MemoryPool) -> None:
        self.pool = pool
        self.taken: list[Tensor] = []

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self.pool.tensor(shape, dtype)
        self.taken.append(tensor)
        return tensor.zero_()

    def free(self) -> None:
        while self.taken:
            self.pool.free(self.taken.pop())

    def __deepcopy__(self, memo: dict[int, Any]) -> Allocate:
        return zeros


class PageStore:
    """Pages of one layer: ``keys`` [pages, size, Hk, D] and ``values`` [pages, size, Hk, Dv].

    In memory a page is [Hk, size, D]: what one head reads of it lies side by side, as in a contiguous cache. (Token by
    token, a head's rows would lie at a large power of two from each other and share few lines of the first cache.)
    With ``quantized`` they are int8, with a float32 scale per token and head in ``k_scale`` and ``v_scale`` [pages,
    size, Hk], else those are None.
    """

    def __init__(
        self,
        pages: int,
        size: int,
        heads: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        quantized: bool = False,
        allocate: Allocate = zeros,
    ) -> None:
        kept = torch.int8 if quantized else dtype
        shapes = [(pages, heads, size, width) for width in widths]
        self.keys, self.values = (_head_major(allocate(shape, kept, device)) for shape in shapes)
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if quantized:
            self.k_scale, self.v_scale = (_head_major(allocate(shape[:3], torch.float32, device)) for shape in shapes)
        if not torch.compiler.is_compiling():
            for tensor in self.tensors:  # else dynamic=True would make every size of every layer a symbol
                mark_static_sizes(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> PageStore:
        """Memory of its own, of the pages only: copying a tensor would copy the reservation that it lies in."""
        new = copy.copy(self)
        memo[id(self)] = new
        for name in ("keys", "values", "k_scale", "v_scale"):
            tensor = getattr(self, name)
            setattr(new, name, None if tensor is None else mark_static_sizes(tensor.clone()))
        return new

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.keys, self.values, self.k_scale, self.v_scale) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k [T,Hk,D], v [T,Hk,Dv] to ``slots`` [T] int64; -1 writes nothing."""
        torch.ops.ascend.kv_write(k, v, self.keys, self.values, slots, k_scale=self.k_scale, v_scale=self.v_scale)

    def gather(self, block_table: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [B,Hk,length,D] and values of the first ``length`` tokens; zeros where the table is negative."""
        k = torch.ops.ascend.kv_gather(self.keys, block_table, length, scale=self.k_scale)
        v = torch.ops.ascend.kv_gather(self.values, block_table, length, scale=self.v_scale)
        return k.to(dtype), v.to(dtype)

    def copy_pages(self, sources: list[int], targets: list[int]) -> None:
        for tensor in self.tensors:
            tensor[targets] = tensor[sources]


def _head_major(memory: Tensor) -> Tensor:
    """[pages, Hk, size, ...] as [pages, size, Hk, ...]: a tensor of its own; compilers take more care with views."""
    seen = memory.transpose(1, 2)
    own: Tensor = memory.new_empty(0).set_(  # type: ignore[call-overload]
        memory.untyped_storage(), memory.storage_offset(), seen.shape, seen.stride()
    )
    return own


def block_table(rows: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """[B, width] int32 (default: as the longest row needs) of the pages of each row, -1 behind the end of a row."""
    width = max(map(len, rows), default=0) if width is None else width
    return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows], dtype=torch.int32)
