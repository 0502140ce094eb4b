"""How the kernels are compiled, with a stand-in for the compiler: once, keyed by content, with clear errors."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascend_dynamo import native
from ascend_dynamo.errors import LoweringError
from ascend_dynamo.lowering.cpu import build

FAKE = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = "--version" ] && echo "fake 1.0" && exit 0
{trouble}
while [ $# -gt 0 ]; do [ "$1" = "-o" ] && echo built > "$2"; shift; done
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in (*build.SOURCE_DIR.glob("*.cpp"), *build.SOURCE_DIR.glob("*.h")):
        shutil.copy(path, sources)
    monkeypatch.setattr(build, "SOURCE_DIR", sources)
    monkeypatch.setenv("ASCEND_DYNAMO_CACHE_DIR", str(tmp_path / "cache"))
    native.compiler.cache_clear()
    yield tmp_path
    native.compiler.cache_clear()


def use_compiler(place: Path, monkeypatch: pytest.MonkeyPatch, trouble: str = "") -> Path:
    log, script = place / "log", place / "fake-g++"
    script.write_text(FAKE.format(log=log, trouble=trouble))
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(script))
    native.compiler.cache_clear()
    return log


def compilations(log: Path) -> int:
    return sum(" -c " in f" {line} " for line in log.read_text().splitlines())


def test_built_once_and_said_so(place, monkeypatch, caplog):
    log = use_compiler(place, monkeypatch)
    caplog.set_level(logging.INFO, "ascend_dynamo")
    library = build.build()
    assert library.read_text() == "built\n"
    assert library.parent == place / "cache" / "cpu_kernels"
    count = compilations(log)
    assert count == len(list(build.SOURCE_DIR.glob("*.cpp")))
    assert "compiling, once" in caplog.text
    assert "(1 of " in caplog.text
    assert build.build() == library
    assert compilations(log) == count


def test_key_follows_sources_and_compiler(place, monkeypatch):
    use_compiler(place, monkeypatch)
    before = build.build()
    header = build.SOURCE_DIR / "simd.h"
    header.write_text(header.read_text() + "// changed\n")
    after = build.build()
    assert after != before
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("fake 1.0", "fake 1.1"))
    assert build.build() not in (before, after)


def test_concurrent_builds_compile_once(place, monkeypatch):
    log = use_compiler(place, monkeypatch, trouble="sleep 0.1")
    found: list[Path] = []
    workers = [threading.Thread(target=lambda: found.append(build.build())) for _ in range(4)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert compilations(log) == len(list(build.SOURCE_DIR.glob("*.cpp")))


def test_a_failed_build_shows_the_compiler_and_leaves_nothing(place, monkeypatch):
    use_compiler(place, monkeypatch, trouble='echo "no such instruction: vdpbf16ps" >&2; exit 3')
    with pytest.raises(LoweringError, match=r"exit 3(.|\n)*vdpbf16ps"):
        build.build()
    assert [p.name for p in (place / "cache" / "cpu_kernels").iterdir()] == ["lock"]


def test_no_compiler(place, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(LoweringError, match=r"/nonexistent/g\+\+.*install g\+\+"):
        build.build()


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("ASCEND_DYNAMO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "ascend_dynamo" / "cpu_kernels"


def test_environment_limits_the_instruction_set():
    code = (
        "import torch\n"
        "from ascend_dynamo.lowering.cpu import kernels\n"
        "assert kernels.isa() == 'portable'\n"
        "x, w = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()\n"
        "assert torch.equal(torch.ops.ascend_cpu.linear(x, w), torch.nn.functional.linear(x, w))\n"
    )
    env = {**os.environ, "ASCEND_DYNAMO_CPU_ISA": "portable"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=300)
