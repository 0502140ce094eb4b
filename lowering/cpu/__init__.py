"""The CPU target."""

from ascend_dynamo.lowering.cpu.lower import CpuLowering

__all__ = ["CpuLowering"]
