"""The allocation benchmark: what it counts, and what it calls the size of an arena. Nothing here judges a time."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _harness as h  # noqa: E402
import alloc  # noqa: E402

COUNT = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import alloc, torch

x = torch.ones(100)

def step():
    a = x.cos()
    b = a.sin()
    c = b.exp()
    big = bytearray(100_000)
    return c

step()
print(*alloc.counts(step).values())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library that stands on glibc")
def test_counts_what_is_asked_of_libc(tmp_path: Path) -> None:
    library = alloc.counting_library(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    intermediates, outputs, large, large_temporary, size = map(int, done.stdout.split())
    assert (intermediates, outputs, size) == (2, 1, 1200)
    assert large == large_temporary == 1


def test_writable_memory_between_two_addresses() -> None:
    maps = (
        "1000-3000 rw-p 0 00:00 0\n3000-9000 ---p 0 00:00 0 [x]\n9000-a000 rw-p 0 00:00 0\na000-b000 r--p 0 00:00 0\n"
    )
    assert alloc.writable(0x2000, 0xB000, maps) == 0x2000
    own = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(own))
    text = Path("/proc/self/maps").read_text()
    assert alloc.writable(address, address + 3 * mmap.PAGESIZE, text) == 3 * mmap.PAGESIZE


def test_a_row_without_figures_is_not_a_success() -> None:
    row = h.Row({"model": "m", "dtype": "bf16"}, {c: h.Timing(error="no") for c in alloc.CONTENDERS}, agreed=False)
    values, goals = alloc.summary([row])
    assert values["intermediates"] == values["mapped_over_plan"] == float("inf")
    assert goals["intermediates"] == 0 and values["agreed"] == "0/1"
    notes = {"intermediates": 2, "arena": 8192, "plan": 4096, "mapped": 4096, "plan_pages": 4096}
    row.timings["ours"] = h.Timing(rounds=[1.0], notes=notes)
    values, _ = alloc.summary([row])
    assert (values["intermediates"], values["arena_over_plan"], values["mapped_over_plan"]) == (2, 2.0, 1.0)
    assert len(alloc.lines(row)) == len(alloc.CONTENDERS)
