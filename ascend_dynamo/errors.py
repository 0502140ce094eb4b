"""Every error that users can catch: one base class, one subclass per kind of mistake."""

from __future__ import annotations


class AscendDynamoError(Exception):
    """Base of all errors raised by Ascend Dynamo."""


class OptionError(AscendDynamoError, ValueError):
    """An option has an unknown name or an illegal value; the message names it and the nearest legal one."""


class PatternError(AscendDynamoError):
    """A pattern is ill-formed: its functions disagree, a literal has no meaning, a rewrite breaks its promise."""


class ExpectError(AscendDynamoError):
    """``expect={...}`` or a forced ``fuse(...)`` region was not met; the message holds the near misses."""


class VerifyError(AscendDynamoError):
    """A graph or a rewrite violates an invariant of the compiler (types, topological order, aliasing, guards)."""


class LoweringError(AscendDynamoError):
    """A target cannot compile a graph that it promised to compile."""


class BuildError(AscendDynamoError):
    """C++ of ours could not be compiled: there is no compiler, or it refused."""


class MemoryPlanError(AscendDynamoError, ValueError):
    """Buffers, or a memory budget, that make no sense; the message names the value."""


class CapacityError(MemoryPlanError):
    """No plan within the capacity: ``needed`` and ``capacity`` in bytes, and the ``plan`` that was found, if any."""

    def __init__(self, message: str, *, needed: int, capacity: int, plan: object = None) -> None:
        super().__init__(message)
        self.needed, self.capacity, self.plan = needed, capacity, plan


class MemoryLimitError(AscendDynamoError, MemoryError):
    """A call, or a configuration, that does not fit: ``needed`` and ``limit`` in bytes. Nothing of it has run."""

    def __init__(self, message: str, *, needed: int, limit: int) -> None:
        super().__init__(message)
        self.needed, self.limit = needed, limit


class MissingExtraError(AscendDynamoError, ImportError):
    """Something needs a package that is not installed; the message says which extra brings it."""


class PoolError(AscendDynamoError):
    """Base of the errors of ``MemoryPool``. The pool is as it was before the call."""


class PoolExhaustedError(PoolError, MemoryError):
    """No hole of a pool is large enough: ``asked``, ``free`` and ``largest_hole`` in bytes."""

    def __init__(self, message: str, *, asked: int, free: int, largest_hole: int) -> None:
        super().__init__(message)
        self.asked, self.free, self.largest_hole = asked, free, largest_hole


class PoolDoubleFreeError(PoolError):
    """A piece of a pool that was given back already is given back again, or used."""


class ForeignHandleError(PoolError, LookupError):
    """Something is given back to a pool that it did not come from."""


class UnsupportedTorchError(AscendDynamoError, RuntimeError):
    """The installed torch is outside the supported range."""


class KVCacheError(AscendDynamoError):
    """Base of the errors of paged KV caches. The pool and the cache are as they were before the call."""


class OutOfPagesError(KVCacheError):
    """More pages asked for than are free: ``asked``, ``free`` (evictable ones included) and ``total`` in pages."""

    def __init__(self, message: str, *, asked: int, free: int, total: int) -> None:
        super().__init__(message)
        self.asked, self.free, self.total = asked, free, total


class UnknownSequenceError(KVCacheError, LookupError):
    """A sequence id that this pool never gave out."""


class BadPageError(KVCacheError, LookupError):
    """A page id outside the pool, or a page that the caller does not hold."""


class DoubleFreeError(KVCacheError):
    """A sequence or a page that was given back already."""


class PageSizeError(KVCacheError, ValueError):
    """A page size that the target cannot use; the message lists the legal ones."""


class UnsupportedCacheError(KVCacheError, ValueError):
    """A model, or a use of a cache, that pages cannot serve; the message says which part and what can."""
