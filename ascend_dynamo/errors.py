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


class UnsupportedTorchError(AscendDynamoError, RuntimeError):
    """The installed torch is outside the supported range."""
