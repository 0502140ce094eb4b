"""Compiles C++ once per user into the cache.

A library is named after a digest of everything that can change it (sources, flags, compiler, machine), so a stale one
is never loaded; a lock keeps two processes from compiling at once, and it appears by an atomic rename.
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
from dataclasses import dataclass
from pathlib import Path

from ascend_dynamo.errors import BuildError

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall")


@dataclass(frozen=True)
class Library:
    """What to compile, and how.

    Args:
        name: what the file's name begins with.
        title: what the log and errors call it, in the plural ("CPU kernels").
        folder: the folder below the cache in which it is kept.
        sources: the C++ files, each with its flags.
        headers: files that the sources include: part of the digest.
        link: flags for the linker.
        key: what else can change the library, such as the version of a library that it links to.
        log: the name of the logger that tells of the compilation.
        patience: how long that takes, in words.
    """

    name: str
    title: str
    folder: str
    sources: tuple[tuple[Path, tuple[str, ...]], ...]
    headers: tuple[Path, ...] = ()
    link: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    log: str = "ascend_dynamo.native"
    patience: str = "a few seconds"


def cache_dir(folder: str) -> Path:
    """Where built libraries live: below ``$ASCEND_DYNAMO_CACHE_DIR``, else ``$XDG_CACHE_HOME/ascend_dynamo``."""
    base = os.environ.get("ASCEND_DYNAMO_CACHE_DIR")
    if base:
        return Path(base) / folder
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend_dynamo" / folder


@functools.cache
def compiler() -> str:
    """The C++ compiler: ``$CXX``, else g++, clang++ or c++. BuildError if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in candidates:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"a C++20 compiler is needed, and none of {', '.join(candidates)} was found: "
        "install g++ (11 or newer) or set CXX to a compiler"
    )


def build(library: Library) -> Path:
    """Path of the compiled library; compiles it if no process of this user has done so before.

    Raises:
        BuildError: there is no compiler, or it failed; its message is part of the error's.
    """
    directory = cache_dir(library.folder)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{library.name}_{_digest(library)}.so"
    if target.exists():
        return target
    with _lock(directory / "lock"):
        if not target.exists():
            log = logging.getLogger(library.log)
            log.warning("%s: compiling, once, into %s (%s)", library.title, directory, library.patience)
            _compile(library, target, log)
    return target


def _digest(library: Library) -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    h = hashlib.sha256()
    for part in (version, platform.machine(), *library.key, shlex.join(library.link)):
        h.update(part.encode() + b"\0")
    for path, flags in (*library.sources, *((p, ()) for p in library.headers)):
        h.update(path.name.encode() + b"\0" + shlex.join(flags).encode() + b"\0" + path.read_bytes())
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


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _check(title: str, command: list[str], process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise BuildError(
            f"building the {title} failed (exit {process.returncode}).\n$ {shlex.join(command)}\n{errors[-4000:]}"
        )


def _compile(library: Library, target: Path, log: logging.Logger) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as tmp:
        jobs = []
        for source, flags in library.sources:
            command = [compiler(), *flags, "-c", str(source), "-o", f"{tmp}/{source.stem}.o"]
            jobs.append((source, command, _start(command)))
        try:
            for done, (source, command, process) in enumerate(jobs, 1):
                _check(library.title, command, process)
                log.info("%s: %s compiled (%d of %d)", library.title, source.name, done, len(jobs))
        finally:
            for _, _, process in jobs:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        objects = [f"{tmp}/{source.stem}.o" for source, _ in library.sources]
        built = f"{tmp}/{target.name}"
        link = [compiler(), "-shared", *objects, "-o", built, *library.link]
        _check(library.title, link, _start(link))
        os.replace(built, target)
    log.info("%s: built %s in %.0f s", library.title, target, time.monotonic() - started)
