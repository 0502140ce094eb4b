"""Compiles the C++ kernels of the CPU target once per user, and loads them.

The library is named after a digest of everything that can change it (sources, flags, compiler, torch, machine), so a
stale one is never loaded; a lock keeps two processes from compiling at once, and it appears by an atomic rename.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ascend_dynamo.errors import LoweringError

log = logging.getLogger("ascend_dynamo.lowering.cpu")

SOURCE_DIR = Path(__file__).resolve().parent
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wall")
# The kernels carry their own instruction set and are entered only after asking the processor: the host's is moot.
_X86_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma")
_NEEDS_X86 = frozenset({"linear.cpp", "attention.cpp", "decode.cpp", "moe.cpp"})
_NEEDS_TORCH = frozenset({"ops.cpp", "attention_ops.cpp", "moe_ops.cpp"})


def cache_dir() -> Path:
    """Where built libraries live: ``$ASCEND_DYNAMO_CACHE_DIR``, else ``$XDG_CACHE_HOME/ascend_dynamo``."""
    base = os.environ.get("ASCEND_DYNAMO_CACHE_DIR")
    if base:
        return Path(base) / "cpu_kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend_dynamo" / "cpu_kernels"


@functools.cache
def compiler() -> str:
    """The C++ compiler: ``$CXX``, else g++, clang++ or c++. LoweringError if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in candidates:
        found = shutil.which(name)
        if found:
            return found
    raise LoweringError(
        f"the CPU kernels need a C++20 compiler, and none of {', '.join(candidates)} was found: "
        "install g++ (11 or newer) or set CXX to a compiler, or choose target='reference'"
    )


def _torch_dir() -> Path:
    return Path(torch.__file__).resolve().parent


def _flags(source: Path) -> list[str]:
    flags = list(_FLAGS)
    if source.name in _NEEDS_X86:
        flags += _X86_FLAGS
    if source.name in _NEEDS_TORCH:
        include = _torch_dir() / "include"
        abi = int(torch.compiled_with_cxx11_abi())
        flags += [
            f"-I{include}",
            f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        ]
    return flags


def _sources() -> list[Path]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [p for p in sorted(SOURCE_DIR.glob("*.cpp")) if x86 or p.name not in _NEEDS_X86]


def _digest() -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    h = hashlib.sha256()
    for part in (version, torch.__version__, platform.machine(), str(_torch_dir())):
        h.update(part.encode() + b"\0")
    for path in [*_sources(), *sorted(SOURCE_DIR.glob("*.h"))]:
        h.update(path.name.encode() + b"\0" + shlex.join(_flags(path)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:20]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where torch's OpenMP ABI differs too

    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(f, fcntl.LOCK_UN)


def _check(command: list[str], process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise LoweringError(
            f"building the CPU kernels failed (exit {process.returncode}).\n$ {shlex.join(command)}\n{errors[-4000:]}"
        )


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _compile(target: Path) -> None:
    started = time.monotonic()
    sources = _sources()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as tmp:
        jobs = []
        for source in sources:
            command = [compiler(), *_flags(source), "-c", str(source), "-o", f"{tmp}/{source.stem}.o"]
            jobs.append((source, command, _start(command)))
        try:
            for done, (source, command, process) in enumerate(jobs, 1):
                _check(command, process)
                log.info("CPU kernels: %s compiled (%d of %d)", source.name, done, len(jobs))
        finally:
            for _, _, process in jobs:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        # libgomp comes in through libtorch_cpu: naming it here could bring a second one, with its own threads.
        objects = [f"{tmp}/{source.stem}.o" for source in sources]
        library = f"{tmp}/{target.name}"
        link = [compiler(), "-shared", *objects, "-o", library, f"-L{_torch_dir() / 'lib'}", "-ltorch_cpu", "-lc10"]
        _check(link, _start(link))
        os.replace(library, target)
    log.info("CPU kernels: built %s in %.0f s", target, time.monotonic() - started)


def build() -> Path:
    """Path of the compiled library; compiles it (under a minute) if no process of this user has done so before."""
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"ascend_cpu_{_digest()}.so"
    if target.exists():
        return target
    with _lock(directory / "lock"):
        if not target.exists():
            log.warning("CPU kernels: compiling, once, into %s (about half a minute)", directory)
            _compile(target)
    return target


@functools.cache
def load() -> None:
    """Make ``torch.ops.ascend_cpu.*`` available in this process. LoweringError if it cannot be built."""
    torch.ops.load_library(str(build()))
