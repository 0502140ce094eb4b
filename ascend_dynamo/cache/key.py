"""Cache keys: a digest per component, so that a miss names what changed instead of being a mystery.

Everything that can change the compiled code must be in one of the components. Values of weights are not: artifacts
hold no weights.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ascend_dynamo.contracts import CacheKey
from ascend_dynamo.options import Options

PACKAGES = ("ascend-dynamo", "torch", "torch-npu", "sympy", "numpy")
MEANING = {
    "graph": "the graph itself: its operators, literals, or regions",
    "inputs": "the dtype, shape, strides or device of an input",
    "guards": "the conditions under which the graph holds",
    "options": "the options",
    "registry": "the patterns: a source, a version, or the set",
    "versions": "the version of torch, of Ascend Dynamo, of Python or of the C++ compiler",
    "device": "the processor or the number of threads",
    "params": "the dtype, shape, strides or device of a weight",
    "ranks": "the rank or the size of the process group",
}


def digest(value: Any) -> str:
    """Hex sha256 of strings, numbers, None, and (nested) sequences and mappings of them; types never collide."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"map": sorted((str(k), _plain(v)) for k, v in value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{value!r} has no stable digest: describe it by strings and numbers first")


def compute(
    *,
    graph: str,
    inputs: Sequence[Any],
    options: Options,
    registry: str,
    guards: str = "",
    regions: Iterable[str] = (),
    params: Sequence[torch.Tensor] = (),
    versions: Mapping[str, str] | None = None,
    device: Mapping[str, Any] | None = None,
    ranks: tuple[int, int] | None = None,
) -> CacheKey:
    """The key of one captured graph.

    ``graph`` is its text form before our passes and ``regions`` the region of each node, in order; ``inputs`` the
    example inputs (tensors, fake tensors, numbers); ``registry`` a registry's digest; ``params`` the weights, of which
    only the metadata enters. ``versions``, ``device`` and ``ranks`` (rank, world size) default to this process's own.
    """
    return CacheKey(
        graph=digest([graph, *regions]),
        inputs=digest([describe(i) for i in inputs]),
        guards=digest(guards),
        options=options.digest(),
        registry=digest(registry),
        versions=digest(installed_versions() if versions is None else versions),
        device=digest(this_device() if device is None else device),
        params=digest([describe(p) for p in params]),
        ranks=digest(list(this_rank() if ranks is None else ranks)),
    )


def combined(key: CacheKey) -> str:
    """One hex digest for the whole key: the name of the cache entry."""
    return digest({f.name: getattr(key, f.name) for f in fields(key)})


def explain(old: CacheKey, new: CacheKey) -> tuple[str, ...]:
    """The names of the components that differ, in the order of ``CacheKey``; empty if the keys are equal."""
    return tuple(f.name for f in fields(CacheKey) if getattr(old, f.name) != getattr(new, f.name))


def sentence(changed: Sequence[str]) -> str:
    """What ``explain`` found, for people: ``compiled again because the options changed``."""
    if not changed:
        return "nothing changed"
    return f"compiled again because these changed: {'; '.join(MEANING[name] for name in changed)}"


def describe(value: Any) -> Any:
    """Metadata of an input as plain data: a tensor's dtype, sizes, strides, device and class; other values as text.

    Symbolic sizes are spelled by name (``s0``), which costs no guard.
    """
    if isinstance(value, torch.Tensor):
        strides = [str(s) for s in value.stride()] if value.layout == torch.strided else str(value.layout)
        kind = type(value).__name__ if type(value) not in (torch.nn.Parameter, torch.Tensor) else "Tensor"
        sizes = [str(s) for s in value.shape]
        return [kind, str(value.dtype), sizes, strides, str(value.device), bool(value.requires_grad)]
    return [type(value).__name__, str(value)]


@lru_cache(maxsize=1)
def installed_versions() -> Mapping[str, str]:
    """Versions of Python, of the packages that take part, and of the C++ compiler."""
    found = {"python": platform.python_version(), "c++": _compiler_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _compiler_version() -> str:
    try:
        done = subprocess.run(["g++", "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0]


def this_device() -> Mapping[str, Any]:
    """Architecture, instruction sets, threads, and the accelerator's name where there is one."""
    return {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "features": _cpu_features(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(),
    }


@lru_cache(maxsize=1)
def _cpu_features(path: str = "/proc/cpuinfo") -> str:
    """The processor's instruction sets, sorted; empty where the system does not say."""
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return " ".join(sorted(flags.partition(":")[2].split()))


def _accelerator() -> str:
    if not torch.accelerator.is_available():
        return ""
    kind = torch.accelerator.current_accelerator()
    return f"{kind}:{torch.get_device_module(kind).get_device_name()}"


def this_rank() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
