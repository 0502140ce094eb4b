"""What the machine can do and what else it is doing: read bandwidth, matmul peak, load of other processes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Machine:
    """Measured limits with ``threads`` threads: bytes/s of a read, FLOP/s of a matmul by dtype name.

    ``foreign`` is how many cores other processes used meanwhile: where it is not near 0 the floors are too high.
    """

    cpu: str
    threads: int
    read: float
    matmul: dict[str, float]
    foreign: float

    def floor(self, *, bytes_read: float, flops: float, dtype: str) -> float:
        """Seconds that no implementation can beat: reading the weights once, or doing the arithmetic."""
        return max(bytes_read / self.read, flops / self.matmul[dtype])


def measure(threads: int = 2) -> Machine:
    """Run the probes: about seven seconds, so that a moment in which nothing else runs is among them."""
    torch.set_num_threads(threads)
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    data = torch.ones(128 * 1024 * 1024)
    read = data.nbytes / best(lambda: data.sum(), 5, 2.0)
    peaks = {name: _peak(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    others = busy_seconds() - busy - (time.process_time() - own)
    return Machine(cpu_name(), threads, read, peaks, max(0.0, others) / (time.perf_counter() - start))


def _peak(dtype: torch.dtype) -> float:
    found = 0.0
    for m, k, n in ((1024, 1024, 1024), (512, 1024, 3072), (2048, 2048, 2048)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        found = max(found, 2 * m * k * n / best(partial(torch.nn.functional.linear, a, b), 5, 0.8))
    return found


def best(fn: Callable[[], object], times: int, at_least: float = 0.0) -> float:
    """The shortest of ``times`` calls, or of more until ``at_least`` seconds have passed, after one to warm up."""
    fn()
    seconds: list[float] = []
    while len(seconds) < times or sum(seconds) < at_least:
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cpu_name() -> str:
    """Model name and the number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name} x{os.cpu_count()}"


def busy_seconds() -> float:
    """CPU seconds that the whole machine has worked since boot, stolen time included; 0 where the kernel is silent."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / TICK
