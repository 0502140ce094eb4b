"""Compiles the C++ kernels of the CPU target once per user (see ``ascend_dynamo.native``), and loads them."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from ascend_dynamo import native
from ascend_dynamo.errors import BuildError, LoweringError

SOURCE_DIR = Path(__file__).resolve().parent
_FLAGS = (*native.FLAGS, "-fopenmp", "-fno-math-errno")
# The kernels carry their own instruction set and are entered only after asking the processor: the host's is moot.
_X86_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma")
_NEEDS_X86 = frozenset({"linear.cpp", "attention.cpp", "decode.cpp", "moe.cpp"})
_NEEDS_TORCH = frozenset(
    {"ops.cpp", "attention_ops.cpp", "attention_portable.cpp", "kv_write_ops.cpp", "moe_ops.cpp", "paged_ops.cpp"}
)


def cache_dir() -> Path:
    """Where the built kernels live."""
    return native.cache_dir("cpu_kernels")


def _torch_dir() -> Path:
    return Path(torch.__file__).resolve().parent


def _flags(source: Path) -> tuple[str, ...]:
    flags: tuple[str, ...] = _FLAGS
    if source.name in _NEEDS_X86:
        flags += _X86_FLAGS
    if source.name in _NEEDS_TORCH:
        include = _torch_dir() / "include"
        abi = int(torch.compiled_with_cxx11_abi())
        flags += (
            f"-I{include}",
            f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        )
    return flags


def _library() -> native.Library:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [p for p in sorted(SOURCE_DIR.glob("*.cpp")) if x86 or p.name not in _NEEDS_X86]
    return native.Library(
        name="ascend_cpu",
        title="CPU kernels",
        folder="cpu_kernels",
        sources=tuple((p, _flags(p)) for p in sources),
        headers=tuple(sorted(SOURCE_DIR.glob("*.h"))),
        # libgomp comes in through libtorch_cpu: naming it here could bring a second one, with its own threads.
        link=(f"-L{_torch_dir() / 'lib'}", "-ltorch_cpu", "-lc10"),
        key=(torch.__version__, str(_torch_dir())),
        log="ascend_dynamo.lowering.cpu",
        patience="about half a minute",
    )


def build() -> Path:
    """Path of the compiled library; compiles it (under a minute) if no process of this user has done so before."""
    try:
        return native.build(_library())
    except BuildError as e:
        raise LoweringError(f"the CPU kernels are not there: {e}\nOr choose target='reference'.") from e


@functools.cache
def load() -> None:
    """Make ``torch.ops.ascend_cpu.*`` available in this process. LoweringError if it cannot be built."""
    torch.ops.load_library(str(build()))
