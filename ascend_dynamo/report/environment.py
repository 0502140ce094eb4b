"""What this machine and installation offer: the data behind ``ascend-dynamo info``."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ascend_dynamo.options import PREFIX, Options
from ascend_dynamo.report.catalogue import Plugin, plugins

PACKAGES = ("ascend-dynamo", "torch", "torch-npu", "transformers", "sympy", "networkx", "numpy")
LOWERINGS = "ascend_dynamo.lowerings"
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "sve",
    "bf16",
    "i8mm",
)


def info(options: Options) -> dict[str, Any]:
    """Versions, target, CPU features, threads, patterns and lowerings with the packages that bring them."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "target": {"asked": options.target, "chosen": _target(options)},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "features": cpu_features(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX)},
        "patterns": [_plugin(p) for p in plugins()],
        "lowerings": [_lowering(e) for e in sorted(metadata.entry_points(group=LOWERINGS), key=lambda e: e.name)],
    }


def cpu_features(cpuinfo: str | Path = "/proc/cpuinfo") -> list[str]:
    """The instruction sets that matter to us, in the kernel's names; empty where the kernel does not say."""
    path = Path(cpuinfo)
    if not path.exists():
        return []
    for line in path.read_text().splitlines():
        if line.split(":")[0].strip() in ("flags", "Features"):
            present = set(line.split(":", 1)[1].split())
            return [flag for flag in CPU_FLAGS if flag in present]
    return []


def lines(data: dict[str, Any]) -> list[str]:
    """``info`` as text."""
    cpu, target = data["cpu"], data["target"]
    out = [f"{name:<14} {version}" for name, version in data["versions"].items()]
    out.append(f"{'target':<14} {target['chosen']} (asked for: {target['asked']})")
    features = " ".join(cpu["features"])
    out.append(f"{'cpu':<14} {cpu['capability']}, {cpu['threads']} threads on {cpu['cores']} cores: {features}")
    out += [f"{'environment':<14} {k}={v}" for k, v in data["environment"].items()]
    for p in data["patterns"]:
        state = f"failed: {p['error']}" if p["error"] else f"{len(p['names'])} patterns"
        out.append(f"{'patterns':<14} {p['name']} ({p['package']}): {state}")
        out += [f"{'':<14}   {name}" for name in p["names"]]
    out += [f"{'lowering':<14} {p['name']} ({p['package']}): {p['object']}" for p in data["lowerings"]]
    return out


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _target(options: Options) -> str:
    from ascend_dynamo.targets import load_lowering

    return load_lowering(options.target).target


def _plugin(p: Plugin) -> dict[str, Any]:
    names = [pattern.name for pattern in p.patterns]
    return {"name": p.name, "object": p.object, "package": p.package, "names": names, "error": p.error}


def _lowering(e: metadata.EntryPoint) -> dict[str, Any]:
    package = f"{e.dist.metadata['Name']} {e.dist.version}" if e.dist else "unknown package"
    return {"name": e.name, "object": e.value, "package": package}
