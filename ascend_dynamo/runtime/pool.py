"""``MemoryPool``: one reservation, from which pieces are taken and to which they are given back.

Pieces are runs of whole blocks, found by best fit (the smallest hole that is large enough, the lowest among equals) and
merged with free neighbours when they come back. Everything a program keeps for long (caches, page pools, staging
buffers) can come from one such reservation, so that what it may take is decided once and at the start.
"""

from __future__ import annotations

import bisect
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from types import TracebackType
from typing import Any

import torch

from ascend_dynamo.errors import ForeignHandleError, PoolDoubleFreeError, PoolError, PoolExhaustedError
from ascend_dynamo.memory.units import parse_bytes, show_bytes

log = logging.getLogger("ascend_dynamo.runtime")


@dataclass(frozen=True)
class PoolStatistics:
    """A moment of a pool; all sizes in bytes.

    ``used`` is what was asked for and is held, ``reserved`` the same in whole blocks, ``peak`` the most that was ever
    reserved. ``fragmentation`` is the share of the free memory that lies outside the largest hole (0: all in one).
    """

    pool_size: int
    block_size: int
    used: int
    reserved: int
    free: int
    peak: int
    largest_hole: int
    holes: int
    live: int
    allocations: int
    failures: int

    @property
    def fragmentation(self) -> float:
        return 1.0 - self.largest_hole / self.free if self.free else 0.0

    @property
    def waste(self) -> int:
        """Bytes at the ends of last blocks that nobody asked for."""
        return self.reserved - self.used

    def to_dict(self) -> dict[str, Any]:
        """All of it, by name."""
        return {**asdict(self), "fragmentation": self.fragmentation, "waste": self.waste}


class Allocation:
    """A piece of a pool: ``size`` bytes at ``offset``. As a context manager it is given back at the end.

    Tensors made of it are views: who uses one after the piece was freed reads what its next holder writes.
    """

    def __init__(self, pool: MemoryPool, start: int, blocks: int, size: int) -> None:
        self.pool, self.start, self.blocks, self.size = pool, start, blocks, size

    @property
    def offset(self) -> int:
        return self.start * self.pool.block_size

    @property
    def buffer(self) -> torch.Tensor:
        """The bytes: uint8 [size]."""
        return self.pool.bytes_at(self)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The piece as a contiguous tensor, not initialised.

        Raises:
            PoolError: the tensor needs more bytes than the piece has.
        """
        needed = prod(shape) * dtype.itemsize
        if needed > self.size:
            raise PoolError(f"a tensor {tuple(shape)} of {dtype} takes {needed} bytes; this allocation has {self.size}")
        return self.buffer[:needed].view(dtype).view(*shape)

    def free(self) -> None:
        """Give it back; see ``MemoryPool.free``."""
        self.pool.free(self)

    def __enter__(self) -> Allocation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def __repr__(self) -> str:
        return f"<Allocation of {show_bytes(self.size)} at {self.offset} in {self.pool!r}>"


class MemoryPool:
    """One reservation of ``pool_size`` bytes in blocks of ``block_size``; safe to use from several threads.

    Sizes are numbers of bytes or words such as "4GB" and "512MB" (powers of 1024)::

        pool = MemoryPool(pool_size="4GB", block_size="1MB")
        piece = pool.allocate("16MB")
        keys = pool.tensor((32, 1024, 128), torch.bfloat16)
        pool.free(piece)
        pool.free(keys)

    On a CPU the system hands out the memory page by page as it is first written, so that a pool costs what is used of
    it. Every method either does all of its work or raises and leaves the pool as it was.

    Args:
        pool_size: the reservation; rounded down to whole blocks.
        block_size: what sizes are rounded up to; a multiple of 64 bytes, so that every piece is aligned for vectors.
        device: where the memory is.

    Raises:
        MemoryPlanError: a size is none.
        PoolError: the block size is no multiple of 64, or larger than the pool.
        PoolExhaustedError: the device has no such memory.
    """

    def __init__(
        self, pool_size: int | str = "4GB", block_size: int | str = "1MB", *, device: torch.device | str = "cpu"
    ) -> None:
        self.block_size = parse_bytes(block_size)
        self._count = parse_bytes(pool_size) // self.block_size
        if self.block_size % 64:
            raise PoolError(f"block_size={block_size!r} is {self.block_size} bytes: use a multiple of 64")
        if self._count == 0:
            raise PoolError(f"block_size={block_size!r} is larger than pool_size={pool_size!r}: use a smaller block")
        self.pool_size = self._count * self.block_size
        self._memory: torch.Tensor | None = _reserve(self.pool_size, torch.device(device))
        self._lock = threading.RLock()
        self._holes: list[tuple[int, int]] = [(0, self._count)]  # (first block, blocks), by address, never adjacent
        self._live: dict[int, Allocation] = {}  # by first block
        self._given: dict[int, tuple[weakref.ref[torch.Tensor], Allocation]] = {}  # tensors given out, by id
        self._used = self._peak = self._allocations = self._failures = 0

    def allocate(self, size: int | str) -> Allocation:
        """A piece of at least ``size`` bytes.

        Raises:
            MemoryPlanError: ``size`` is none.
            PoolExhaustedError: no hole is large enough; the message says what is free and what to change.
            PoolError: the pool is closed.
        """
        size = parse_bytes(size)
        blocks = -(-size // self.block_size)
        with self._lock:
            self._memory_or_raise()
            fitting = [(n, start) for start, n in self._holes if n >= blocks]
            if not fitting:
                self._failures += 1
                raise self._exhausted(size, blocks)
            n, start = min(fitting)
            at = bisect.bisect_left(self._holes, (start, 0))
            self._holes[at : at + 1] = [(start + blocks, n - blocks)] if n > blocks else []
            piece = self._live[start] = Allocation(self, start, blocks, size)
            self._used += size
            self._allocations += 1
            self._peak = max(self._peak, self._reserved())
            return piece

    def tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A contiguous tensor in a piece of its own, not initialised; ``free`` takes it (not a view of it) back.

        Dropping the tensor gives nothing back: views of it may live on, and nobody could tell. Raises as ``allocate``
        does; a tensor without elements is refused, for it would hold nothing.
        """
        piece = self.allocate(prod(shape) * dtype.itemsize)
        made = piece.tensor(shape, dtype)
        with self._lock:
            key = id(made)
            self._given[key] = (weakref.ref(made, lambda _: self._given.pop(key, None)), piece)
        return made

    def free(self, what: Allocation | torch.Tensor) -> None:
        """Give back an allocation, or a tensor that ``tensor`` made.

        Raises:
            PoolDoubleFreeError: it was given back already.
            ForeignHandleError: it is not this pool's.
        """
        with self._lock:
            piece = self._of_tensor(what) if isinstance(what, torch.Tensor) else what
            if not isinstance(piece, Allocation) or piece.pool is not self:
                raise ForeignHandleError(
                    f"{what!r} is no allocation of {self!r}: give it back to the pool it came from"
                )
            if self._live.get(piece.start) is not piece:
                raise PoolDoubleFreeError(f"{piece!r} was given back already")
            del self._live[piece.start]
            self._used -= piece.size
            self._merge(piece.start, piece.blocks)

    def statistics(self) -> PoolStatistics:
        """How the pool stands."""
        with self._lock:
            free = sum(n for _, n in self._holes) * self.block_size
            largest = max((n for _, n in self._holes), default=0) * self.block_size
            return PoolStatistics(
                self.pool_size,
                self.block_size,
                self._used,
                self.pool_size - free,
                free,
                self._peak * self.block_size,
                largest,
                len(self._holes),
                len(self._live),
                self._allocations,
                self._failures,
            )

    def close(self) -> None:
        """Give the reservation up. Pieces that are still held keep it alive until their tensors are gone."""
        with self._lock:
            if self._memory is not None and self._live:
                log.warning("%r is closed while %d allocations are held", self, len(self._live))
            self._memory = None

    def __enter__(self) -> MemoryPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MemoryPool of {show_bytes(self.pool_size)} in blocks of {show_bytes(self.block_size)}>"

    def bytes_at(self, piece: Allocation) -> torch.Tensor:
        """The bytes of a piece that is held: uint8 [size]."""
        with self._lock:
            if self._live.get(piece.start) is not piece:
                raise PoolDoubleFreeError(f"{piece!r} was given back already: it has no memory any more")
            return self._memory_or_raise()[piece.offset : piece.offset + piece.size]

    def _memory_or_raise(self) -> torch.Tensor:
        if self._memory is None:
            raise PoolError(f"{self!r} is closed")
        return self._memory

    def _reserved(self) -> int:
        return self._count - sum(n for _, n in self._holes)

    def _of_tensor(self, tensor: torch.Tensor) -> Allocation | None:
        known, piece = self._given.get(id(tensor), (None, None))
        return piece if known is not None and known() is tensor else None

    def _merge(self, start: int, blocks: int) -> None:
        """A hole, joined with the holes that touch it."""
        at = bisect.bisect_left(self._holes, (start, 0))
        first, last = at, at
        if at > 0 and sum(self._holes[at - 1]) == start:
            first, start, blocks = at - 1, self._holes[at - 1][0], blocks + self._holes[at - 1][1]
        if at < len(self._holes) and self._holes[at][0] == start + blocks:
            last, blocks = at + 1, blocks + self._holes[at][1]
        self._holes[first:last] = [(start, blocks)]

    def _exhausted(self, size: int, blocks: int) -> PoolExhaustedError:
        s = self.statistics()
        needed = blocks * self.block_size
        if needed > self.pool_size:
            fix = f"make the pool larger: pool_size={needed} at least"
        elif needed <= s.free:
            fix = "free what lies between the holes, or allocate the large pieces first"
        else:
            fix = f"free {show_bytes(needed - s.free)} more, or make the pool that much larger"
        return PoolExhaustedError(
            f"{self!r} has no {show_bytes(size)} left: {show_bytes(s.free)} are free in {s.holes} holes, the largest "
            f"{show_bytes(s.largest_hole)}, and {s.live} allocations hold {show_bytes(s.reserved)}; {fix}",
            asked=size,
            free=s.free,
            largest_hole=s.largest_hole,
        )


def _reserve(size: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError on accelerators, a plain one on a CPU
        raise PoolExhaustedError(
            f"{device} has no {show_bytes(size)} for a pool: use a smaller pool_size ({str(error).splitlines()[0]})",
            asked=size,
            free=0,
            largest_hole=0,
        ) from error
